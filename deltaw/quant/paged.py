"""AdamW whose states live in host memory and visit the device, bucket by bucket, during the step.

Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101, algorithm 2. With p the parameter, g its
gradient, m = `exp_avg`, v = `exp_avg_sq`, all of the parameter's shape, and t the parameter's own count of steps:

    p <- (1 - lr weight_decay) p
    m <- m + (1 - beta1) (g - m)            v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Arithmetic is float32 (float64 for float64 parameters) in torch's order of operations; p is rounded once. In 8 bits, m
and v are stored blockwise (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861): 256
values share an absmax, m in the signed dynamic code, v in the unsigned one. They are quantised after p has moved, so
the first step equals the 32-bit one; and a v above 0 is never stored as 0, which would leave eps alone to divide an m
that remains.

Paging (Dettmers et al., "QLoRA", arXiv 2305.14314, section 3): on CUDA the states stay in pinned host memory. While
one bucket is updated, the next is on its way in and the one before on its way out.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from deltaw.core.errors import InputError, RunError, unknown_name
from deltaw.kernels.nf4 import dequantize_8bit, quantize_8bit
from deltaw.quant.codebooks import dynamic_code

#: Values that share a scale in 8 bits.
BLOCK = 256
#: Smaller tensors keep 32-bit states: they weigh nothing, and biases and norms suffer most from 8 bits.
MIN_8BIT_ELEMENTS = 4096
#: 16 MiB a copy in 32 bits, which keeps a PCIe link busy.
BUCKET_ELEMENTS = 4 * 2**20
#: One set of buffers on its way in, one in use, one on its way out.
BUFFER_SETS = 3
#: Largest piece of pinned memory asked for at once, unless one tensor needs more.
ARENA_BYTES = 4 * 2**30

NAMES = {"paged_adamw": 32, "paged_adamw_8bit": 8}
BACKENDS = ("auto", "own", "bitsandbytes")

_WIDE = ("exp_avg", "exp_avg_sq")
_BYTE = (*_WIDE, "exp_avg_absmax", "exp_avg_sq_absmax")


@dataclass(frozen=True)
class _Piece:
    """The elements from `start` to `stop` of one parameter; p and g are the whole of it, flat."""

    p: Tensor
    g: Tensor
    state: dict[str, Any]
    start: int
    stop: int

    def host(self, key: str, quantised: bool) -> Tensor:
        flat: Tensor = self.state[key].view(-1)
        if key.endswith("absmax"):
            return flat[self.start // BLOCK : -(-self.stop // BLOCK)]
        return flat[self.start : -(-self.stop // BLOCK) * BLOCK if quantised else self.stop]


@dataclass
class _Bucket:
    """Pieces that share hyperparameters, step, arithmetic and storage, updated as one flat vector."""

    group: dict[str, Any]
    step: int
    dtype: torch.dtype
    quantised: bool
    pieces: list[_Piece] = field(default_factory=list)
    length: int = 0

    def host(self) -> list[list[Tensor]]:
        """For each kind of state its stretches of host memory, in the pieces' order."""
        keys = _BYTE if self.quantised else _WIDE
        return [_stretches([piece.host(key, self.quantised) for piece in self.pieces]) for key in keys]

    def gather(self, flats: list[Tensor]) -> Tensor:
        """The pieces of `flats` in one vector; memory is shared with a single piece that needs no conversion."""
        parts = []
        for piece, flat in zip(self.pieces, flats, strict=True):
            parts.append(flat[piece.start : piece.stop])
            if self.quantised and (short := (piece.start - piece.stop) % BLOCK):
                parts.append(flat.new_zeros(short))
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(self.dtype)

    def scatter(self, p: Tensor) -> None:
        """Writes `gather`'s vector of parameters back."""
        at = 0
        for piece in self.pieces:
            target = piece.p[piece.start : piece.stop]
            if target.data_ptr() != p.data_ptr():
                target.copy_(p[at : at + len(target)])
            at += len(target) + ((-len(target)) % BLOCK if self.quantised else 0)


class PagedAdamW(torch.optim.Optimizer):
    """AdamW with its states in host memory: pinned where the parameters are on CUDA, ordinary for those on the CPU.

    On CUDA a step holds at most three buckets of states on the device, beside float32 copies of one bucket's parameters
    and gradients, and nothing afterwards; it returns when the states are back. Groups may differ in every option.

    Args:
        params: parameters or groups, as for every optimizer of torch.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        bits: 32, or 8 for blockwise 8-bit states (of tensors of 4096 elements and more).
        bucket_elements: elements updated at a time, a multiple of 256. On CUDA a step needs up to about 40 bytes of the
            device for each.

    Raises:
        InputError: no parameters, an option out of range, or a parameter that is no dense float on CPU or CUDA.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        bits: int = 32,
        bucket_elements: int = BUCKET_ELEMENTS,
    ) -> None:
        if bucket_elements < BLOCK or bucket_elements % BLOCK:
            raise InputError(f"bucket_elements is {bucket_elements}: give a positive multiple of {BLOCK}")
        self.bucket_elements = bucket_elements
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, bits=bits)
        super().__init__(_not_empty(params), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with options of their own; raises as the constructor does, and then adds nothing."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except InputError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        Args:
            closure: computes the loss anew, with gradients.

        Returns:
            The closure's loss, or None.

        Raises:
            InputError: a sparse gradient; nothing has changed then.
            RunError: the host has not enough memory to pin.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work: dict[torch.device, list[tuple[Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.layout != torch.strided:
                        raise InputError(
                            f"a parameter of shape {tuple(p.shape)} has a sparse gradient: paged AdamW needs "
                            "dense ones (an embedding with sparse=False)"
                        )
                    work.setdefault(p.device, []).append((p, group))
        self._create([(p, group) for p, group in chain(*work.values()) if not self.state.get(p)])
        for device, entries in work.items():
            buckets, copies = self._buckets(entries, pack=device.type == "cuda")
            if device.type == "cuda":
                self._step_through(device, buckets)
            else:
                for bucket in buckets:
                    _update(bucket, [stretch for (stretch,) in bucket.host()])
            for p, flat in copies:
                p.copy_(flat.view(p.shape))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts a saved state back, straight into host memory, where it is copied.

        Raises:
            InputError: it was saved by another optimizer, or for other parameters; nothing has changed then.
        """
        saved = [(len(group["params"]), group.get("bits")) for group in state_dict["param_groups"]]
        own = [(len(group["params"]), group["bits"]) for group in self.param_groups]
        if saved != own:
            raise InputError(
                f"the saved optimizer's groups have (parameters, bits) {saved}, this one's {own}: load what a paged "
                "AdamW of the same parameters and bits saved"
            )
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        owners = ((p, group) for group in self.param_groups for p in group["params"])
        entries = {number: entry for number, entry in zip(ids, owners, strict=True) if state_dict["state"].get(number)}
        for number, (p, group) in entries.items():
            _check_state(number, state_dict["state"][number], _layout(p, group["bits"]))
        super().load_state_dict({**state_dict, "state": {}})
        self._create(list(entries.values()))
        for number, (p, _) in entries.items():
            for key, value in state_dict["state"][number].items():
                if key == "step":
                    self.state[p][key] = int(value)
                else:
                    self.state[p][key].copy_(value)

    def _create(self, entries: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """Zero states; those of one kind side by side, so that a bucket of many small tensors is one copy."""
        wanted: dict[tuple[str, torch.dtype, bool], list[tuple[Tensor, tuple[int, ...]]]] = {}
        for p, group in entries:
            _check_parameter(p)
            for key, (shape, dtype) in _layout(p, group["bits"]).items():
                wanted.setdefault((key, dtype, p.is_cuda), []).append((p, shape))
        made: dict[Tensor, dict[str, Any]] = {p: {"step": 0} for p, _ in entries}
        for (key, dtype, pinned), users in wanted.items():
            flats = _host_zeros([math.prod(shape) for _, shape in users], dtype, pinned)
            for (p, shape), flat in zip(users, flats, strict=True):
                made[p][key] = flat.view(shape)
        self.state.update(made)

    def _buckets(
        self, entries: list[tuple[Tensor, dict[str, Any]]], *, pack: bool
    ) -> tuple[list[_Bucket], list[tuple[Tensor, Tensor]]]:
        """The step's buckets, of several pieces each if `pack`; flat copies of what isn't contiguous, to write back.

        A piece is counted in whole blocks, so that a tensor is only ever split between blocks.
        """
        made: list[_Bucket] = []
        copies: list[tuple[Tensor, Tensor]] = []
        current: dict[tuple[Any, ...], _Bucket] = {}
        for p, group in entries:
            state = self.state[p]
            state["step"] += 1
            flat, grad = p.detach().contiguous().view(-1), p.grad.contiguous().view(-1)  # type: ignore[union-attr]
            if not p.is_contiguous():
                copies.append((p, flat))
            dtype = torch.promote_types(p.dtype, torch.float32)
            kind = (group, state["step"], dtype, "exp_avg_absmax" in state)
            key, start = (id(group), *kind[1:]), 0
            while start < len(flat):
                bucket = current.get(key)
                if bucket is None or not pack or bucket.length == self.bucket_elements:
                    bucket = current[key] = _Bucket(*kind)
                    made.append(bucket)
                stop = min(len(flat), start + self.bucket_elements - bucket.length)
                bucket.pieces.append(_Piece(flat, grad, state, start, stop))
                bucket.length += -(-(stop - start) // BLOCK) * BLOCK
                start = stop
        return made, copies

    def _step_through(self, device: torch.device, buckets: list[_Bucket]) -> None:
        """Updates the buckets of one CUDA device through a few sets of buffers."""
        if not buckets:
            return
        with torch.cuda.device(device):
            if device not in self._streams:
                self._streams[device] = (torch.cuda.Stream(), torch.cuda.Stream())
            inward, outward = self._streams[device]
            here = torch.cuda.current_stream()
            hosts = [bucket.host() for bucket in buckets]
            size = max(sum(map(_padded_bytes, host)) for host in hosts)
            sets = [torch.empty(size, dtype=torch.uint8, device=device) for _ in buckets[:BUFFER_SETS]]
            left: list[torch.cuda.Event] = []
            try:
                inward.wait_stream(here)  # the buffers' memory may still be in use by earlier work of this stream
                for number, (bucket, host) in enumerate(zip(buckets, hosts, strict=True)):
                    slots = _carve(sets[number % len(sets)], host)
                    pairs = [
                        pair
                        for stretches, slot in zip(host, slots, strict=True)
                        for pair in zip(stretches, slot.split([len(stretch) for stretch in stretches]), strict=True)
                    ]
                    with torch.cuda.stream(inward):
                        if number >= len(sets):
                            inward.wait_event(left[number - len(sets)])
                        for stretch, part in pairs:
                            part.copy_(stretch, non_blocking=True)
                    here.wait_stream(inward)
                    _update(bucket, slots)
                    outward.wait_stream(here)
                    with torch.cuda.stream(outward):
                        for stretch, part in pairs:
                            stretch.copy_(part, non_blocking=True)
                        left.append(outward.record_event())
            finally:
                # No stream guards host memory, which may be read next, and buffers must be idle when they are freed.
                inward.synchronize()
                outward.synchronize()


def paged_optimizer(
    name: str,
    params: Iterable[Any],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    backend: str = "auto",
) -> tuple[torch.optim.Optimizer, str]:
    """A paged AdamW: bitsandbytes' on CUDA where it is installed and its managed memory fits, else `PagedAdamW`.

    The two save states that the other cannot read: a run that may be resumed gives the backend of its first part.

    Args:
        name: "paged_adamw" or "paged_adamw_8bit".
        params: parameters or groups.
        lr: the step size.
        betas: the decays of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled, in units of lr.
        backend: "auto", "own" or "bitsandbytes".

    Returns:
        The optimizer, and one line that says which was taken and why.

    Raises:
        InputError: an unknown name or backend, bad parameters or options, or bitsandbytes asked for where it cannot be.
    """
    if name not in NAMES:
        raise unknown_name("paged optimizer", name, NAMES)
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    groups = _not_empty(params)
    options: dict[str, Any] = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
    bits = NAMES[name]
    own = PagedAdamW(groups, **options, bits=bits)
    if backend == "own":
        return own, f"{name}: own states in host memory, as asked"
    objection, reason = _against_bitsandbytes([p for group in own.param_groups for p in group["params"]], bits)
    if objection is None:
        optim = importlib.import_module("bitsandbytes.optim")
        made = optim.PagedAdamW8bit if bits == 8 else optim.PagedAdamW32bit
        plain = [{key: value for key, value in group.items() if key != "bits"} for group in own.param_groups]
        return made(plain, **options), f"{name}: bitsandbytes' {made.__name__}, {reason}"
    if backend == "bitsandbytes":
        raise InputError(f"{name} by bitsandbytes was asked for, but {objection}: choose backend 'own' or 'auto'")
    return own, f"{name}: own states in host memory, since {objection}"


def _against_bitsandbytes(params: list[Tensor], bits: int) -> tuple[str | None, str]:
    """Why bitsandbytes' paged optimizer cannot be taken, or None; and, if it can, why it may."""
    if not all(p.is_cuda for p in params):
        return "not every parameter is on CUDA", ""
    if any(p.dtype == torch.float64 for p in params):
        return "a parameter is float64", ""
    try:
        importlib.import_module("bitsandbytes.optim")
        usable = importlib.import_module("bitsandbytes.cextension").lib.compiled_with_cuda
    except Exception:  # a broken installation fails in any way
        return "bitsandbytes is not installed, or does not load", ""
    if not usable:
        return "bitsandbytes' CUDA library does not load", ""
    figures = []
    for device in {p.device for p in params}:
        sizes = (_layout(p, bits).values() for p in params if p.device == device)
        need = sum(math.prod(shape) * dtype.itemsize for shape, dtype in chain.from_iterable(sizes))
        free = torch.cuda.mem_get_info(device)[0]
        figures.append(f"states of {need:,} bytes, {free:,} free on {device}")
        if need > free:
            return f"its managed memory would not fit ({figures[-1]})", ""
    return None, "; ".join(figures)


def _update(bucket: _Bucket, slots: list[Tensor]) -> None:
    """One step of a bucket. `slots`: its states, flat, in the order of `_WIDE` or `_BYTE`; written in place."""
    p = bucket.gather([piece.p for piece in bucket.pieces])
    g = bucket.gather([piece.g for piece in bucket.pieces])
    if not bucket.quantised:
        _adamw(p, g, slots[0], slots[1], bucket.group, bucket.step)
    else:
        q_m, q_v, max_m, max_v = slots
        signed, unsigned = (dynamic_code(sign, p.device) for sign in (True, False))
        m = dequantize_8bit(q_m, signed, max_m, block_size=BLOCK).to(bucket.dtype)
        v = dequantize_8bit(q_v, unsigned, max_v, block_size=BLOCK).to(bucket.dtype)
        _adamw(p, g, m, v, bucket.group, bucket.step)
        for value, code, q, absmax in ((m, signed, q_m, max_m), (v, unsigned, q_v, max_v)):
            for target, new in zip((q, absmax), quantize_8bit(value, code, block_size=BLOCK), strict=True):
                target.copy_(new)
        torch.maximum(q_v, (v > 0).to(torch.uint8), out=q_v)
    bucket.scatter(p)


def _adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, group: dict[str, Any], step: int) -> None:
    """The equations above on flat tensors of one dtype; p, m and v in place."""
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    if group["weight_decay"]:
        p.mul_(1 - lr * group["weight_decay"])
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    p.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))


def _layout(p: Tensor, bits: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of a parameter's states. In 8 bits they are flat, in whole blocks."""
    if bits == 32 or p.numel() < MIN_8BIT_ELEMENTS:
        return dict.fromkeys(_WIDE, (tuple(p.shape), torch.promote_types(p.dtype, torch.float32)))
    blocks = -(-p.numel() // BLOCK)
    scales = dict.fromkeys(_BYTE[2:], ((blocks,), torch.float32))
    return {**dict.fromkeys(_WIDE, ((blocks * BLOCK,), torch.uint8)), **scales}


def _host_zeros(sizes: list[int], dtype: torch.dtype, pinned: bool) -> list[Tensor]:
    """Flat zeros of the given lengths, side by side in few allocations.

    torch rounds each pinned allocation up to a power of two bytes: 49 % more than a tensor of 4096 x 11008 needs. So
    tensors share pieces that are powers of two already.
    """
    made: list[Tensor] = []
    left = sum(sizes)
    while len(made) < len(sizes):
        first, room = sizes[len(made)], left
        if pinned:
            below = 1 << max(left.bit_length() - 1, 0)
            room = max(1 << max(first - 1, 0).bit_length(), min(below, ARENA_BYTES // dtype.itemsize))
        try:
            arena = torch.zeros(room, dtype=dtype, pin_memory=pinned)
        except RuntimeError as error:
            kind = "pinned host memory" if pinned else "host memory"
            raise RunError(
                f"{room * dtype.itemsize:,} bytes of {kind} for the optimizer's states cannot be had "
                f"({str(error).splitlines()[0]}): train fewer parameters, or take paged_adamw_8bit"
            ) from error
        at = 0
        while len(made) < len(sizes) and at + sizes[len(made)] <= room:
            made.append(arena[at : at + sizes[len(made)]])
            at += len(made[-1])
        left -= at
    return made


def _stretches(slices: list[Tensor]) -> list[Tensor]:
    """The same memory in fewer flat tensors: neighbours of one storage are joined."""
    joined: list[Tensor] = []
    for piece in slices:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.untyped_storage().data_ptr() == piece.untyped_storage().data_ptr()
            and last.storage_offset() + len(last) == piece.storage_offset()
        ):
            joined[-1] = last.as_strided((len(last) + len(piece),), (1,))
        else:
            joined.append(piece)
    return joined


def _padded_bytes(stretches: list[Tensor]) -> int:
    """Bytes of the stretches, up to the alignment that every dtype and vector load is content with."""
    return -(-sum(stretch.nbytes for stretch in stretches) // BLOCK) * BLOCK


def _carve(buffer: Tensor, host: list[list[Tensor]]) -> list[Tensor]:
    """Flat tensors of the stretches' lengths and dtypes, one for each kind of state, in a buffer of bytes."""
    slots, at = [], 0
    for stretches in host:
        used = sum(stretch.nbytes for stretch in stretches)
        slots.append(buffer[at : at + used].view(stretches[0].dtype))
        at += _padded_bytes(stretches)
    return slots


def _not_empty(params: Iterable[Any]) -> list[Any]:
    if isinstance(params, Tensor):
        raise InputError("the optimizer was given one tensor: give a list of parameters")
    found = list(params)
    if not found:
        raise InputError("the optimizer was given no parameters: give those that are to be trained")
    return found


def _check_group(group: dict[str, Any]) -> None:
    lr, betas, eps, decay = float(group["lr"]), group["betas"], group["eps"], group["weight_decay"]
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", decay)):
        if not 0.0 <= value < math.inf:
            raise InputError(f"{name} is {value}: give a finite number, 0 or more")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise InputError(f"betas are {tuple(betas)}: give two numbers from 0 up to, but not, 1")
    if group["bits"] not in (8, 32):
        raise InputError(f"bits is {group['bits']}: give 8 or 32")
    for p in group["params"]:
        _check_parameter(p)


def _check_parameter(p: Tensor) -> None:
    if p.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or p.layout != torch.strided:
        raise InputError(
            f"a parameter of shape {tuple(p.shape)} is {p.dtype}, {p.layout}: paged AdamW needs dense floats"
        )
    if p.device.type not in ("cpu", "cuda"):
        raise InputError(f"a parameter of shape {tuple(p.shape)} is on {p.device}: paged AdamW runs on cpu and cuda")
    if hasattr(p, "to_local"):
        raise InputError(
            "a parameter is sharded: paged AdamW needs whole ones; train with sharding none, or with adamw"
        )


def _check_state(number: int, state: dict[str, Any], layout: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    if set(state) != {"step", *layout}:
        raise InputError(
            f"the saved state of parameter {number} has {sorted(state)}, expected {sorted(['step', *layout])}"
        )
    for key, (shape, dtype) in layout.items():
        value = state[key]
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise InputError(
                f"the saved {key} of parameter {number} is {tuple(value.shape)} {value.dtype}, expected {shape} "
                f"{dtype}: load the state of a run with the same parameters"
            )
