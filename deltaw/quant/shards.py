"""A 4-bit weight shared out over processes by FSDP2: each keeps a part of its bytes, and gathers them to compute.

torch's `fully_shard` splits a parameter by rows, and asks the part that a process keeps for two methods: what to send
to the others, and what to make of what all have sent (`fsdp_pre_all_gather` and `fsdp_post_all_gather`).

Nothing is computed with a part, so it need not be a matrix: for n parts, each has a run of 1/n of the codes, taken
flat, and one of the scales, which begin and end wherever that comes to, inside of a row, of a block or of a group of
256 scales. So matrices of every shape are shared out, and what is gathered is the weight to the bit. A part costs 1/n
of the weight's bytes and what fills the runs up to `STEP`; the scales of double quantisation's scales (1/512 bit a
value) are whole in every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.quant.tensor import NF4Tensor
from deltaw.quant.weight import NF4Weight

_aten = torch.ops.aten

#: What is shared out, by the names that a weight's `tensors()` gives.
SPLIT = ("codes", "absmax")

#: Runs are a multiple of so many elements long: FSDP2 sends a block's tensors in one piece, behind one another, and
#: what stands behind a run of bytes is to stay aligned.
STEP = 16


class NF4Shard(torch.Tensor):
    """Rows of a 4-bit weight by name, and a part of its bytes in fact; before `fully_shard`, all of them.

    It knows what FSDP2 does with a parameter: splitting, padding with zeros, copying. Whatever would compute with it is
    refused.

    Attributes:
        runs: the process' run of each of the flat tensors of `SPLIT`.
        whole: the weight that the parts make up, these tensors of it without values.
        transposed: as of `NF4Tensor`.
    """

    runs: dict[str, Tensor]
    whole: NF4Weight
    transposed: bool

    @staticmethod
    def __new__(cls, runs: dict[str, Tensor], whole: NF4Weight, transposed: bool, size: Sequence[int]) -> NF4Shard:
        """Of the shape `size`."""
        made: NF4Shard = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(size), dtype=whole.dtype, device=runs["codes"].device, requires_grad=False
        )
        return made

    def __init__(self, runs: dict[str, Tensor], whole: NF4Weight, transposed: bool, size: Sequence[int]) -> None:
        self.runs = runs
        self.whole = whole
        self.transposed = transposed

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape, dtype and bytes instead of values."""
        count = sum(run.nbytes for run in self.runs.values())
        return f"NF4Shard({tuple(self.shape)}, {self.dtype}, {count:,} bytes on {self.device})"

    def like(self, runs: dict[str, Tensor], size: Sequence[int]) -> NF4Shard:
        """Another part of the same weight."""
        return NF4Shard(runs, self.whole, self.transposed, size)

    def lengths(self, rows: int) -> dict[str, int]:
        """How long the runs are of which each stands for so many rows."""
        all_rows = self.whole.shape[1 if self.transposed else 0]
        parts = -(-all_rows // rows)
        tensors = self.whole.tensors()
        return {name: -(-tensors[name].numel() // (parts * STEP)) * STEP for name in SPLIT}

    # The signature with more arguments demands parts of the padded rows' own shape, which bytes have not.
    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], None]:
        """What this process sends: as much as any other."""
        return tuple(self.runs[name] for name in SPLIT), None

    def fsdp_post_all_gather(
        self, all_gather_outputs: tuple[Tensor, ...], metadata: None, param_dtype: torch.dtype, *, out: Any = None
    ) -> tuple[NF4Tensor, tuple[Tensor, ...]] | None:
        """The weight over what was gathered. FSDP2 frees and fills that memory again, which `out` goes on seeing."""
        if out is not None:
            return None
        tensors = self.whole.tensors()
        for name, gathered in zip(SPLIT, all_gather_outputs, strict=True):
            tensors[name] = gathered[: tensors[name].numel()]
        weight = self.whole.with_tensors(tensors).to(dtype=param_dtype)
        return NF4Tensor(weight, self.transposed), ()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """FSDP2's operations on a parameter."""
        own = _OPERATIONS.get(func)
        if own is None or not isinstance(args[0], NF4Shard):
            raise NotImplementedError(f"{func} on a part of a 4-bit weight: gather it first, by running its block")
        return own(*args, **(kwargs or {}))


def shardable(weight: NF4Tensor) -> nn.Parameter:
    """A 4-bit weight in the form that `fully_shard` shares out; nothing is copied."""
    tensors = weight.packed.tensors()
    runs = {name: tensors[name] for name in SPLIT}
    hollow = {name: torch.empty_like(run, device="meta") for name, run in runs.items()}
    whole = weight.packed.with_tensors(tensors | hollow)
    return nn.Parameter(NF4Shard(runs, whole, weight.transposed, weight.shape), requires_grad=False)


def _same(shard: NF4Shard) -> NF4Shard:
    return shard.like(shard.runs, shard.shape)


def _split(shard: NF4Shard, size: int, dim: int = 0) -> list[NF4Shard]:
    _by_rows(dim)
    lengths = shard.lengths(size)
    return [
        shard.like(
            {name: run[number * lengths[name] : (number + 1) * lengths[name]] for name, run in shard.runs.items()},
            (min(size, len(shard) - row), shard.shape[1]),
        )
        for number, row in enumerate(range(0, len(shard), size))
    ]


def _new_zeros(shard: NF4Shard, size: Sequence[int], **kwargs: Any) -> NF4Shard:
    lengths = shard.lengths(size[0])
    return shard.like({name: run.new_zeros(lengths[name]) for name, run in shard.runs.items()}, size)


def _new_empty(shard: NF4Shard, size: Sequence[int], **kwargs: Any) -> Tensor:
    # Where there are fewer rows than processes, this stands for the rows of those that have none.
    return torch.empty(size, dtype=shard.dtype, device=shard.device)


def _slice(shard: NF4Shard, dim: int = 0, start: int | None = 0, end: int | None = None, step: int = 1) -> NF4Shard:
    _by_rows(dim)
    if start or step != 1:
        raise NotImplementedError("a part of a 4-bit weight has its first rows alone taken: gather it first")
    return shard.like(shard.runs, (len(range(len(shard))[:end]), shard.shape[1]))


def _copy(shard: NF4Shard, source: Any, non_blocking: bool = False) -> NF4Shard:
    if not isinstance(source, NF4Shard):
        raise NotImplementedError(f"a part of a 4-bit weight takes another's values, not those of {source!r:.80}")
    for name, run in source.runs.items():
        shard.runs[name][: len(run)].copy_(run, non_blocking=non_blocking)
    return shard


def _view(shard: NF4Shard, size: Sequence[int]) -> NF4Shard:
    return shard.like(shard.runs, torch.empty(shard.shape, device="meta").view(size).shape)


def _by_rows(dim: int) -> None:
    if dim != 0:
        raise NotImplementedError(f"a 4-bit weight is shared out by dimension 0, not by {dim}")


_OPERATIONS: dict[Any, Any] = {
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.split.Tensor: _split,
    _aten.new_zeros.default: _new_zeros,
    _aten.new_empty.default: _new_empty,
    _aten.slice.Tensor: _slice,
    _aten.copy_.default: _copy,
    _aten.view.default: _view,
}
