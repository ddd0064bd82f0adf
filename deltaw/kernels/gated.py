"""The gated activation of a decoder's MLP, its gradient in place, and the low-rank sums that read the same tensors.

Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, equation 6; Hu et al., "LoRA", arXiv 2106.09685, eq. 3.

Symbols, M tokens, N columns: z_gate, z_up, g = dL/dact (M, N); c_gate, c_up (N,), DoRA's factors, absent for 1.

    x = c_gate z_gate      u = c_up z_up      f(x) = x P(x)      act = f(x) u
    dx = g u f'(x)         du = g f(x)        f'(x) = P + x P'
    dL/dz = c dx, c du     dc = sums of dx z_gate, du z_up over tokens

    P    silu: s(x), the sigmoid      gelu_tanh: s(2 a (x + 0.044715 x^3)), a = sqrt(2 / pi)      gelu: the normal cdf

With the adapters of rank r on gate, up and down, h = x A^T and k as in `lora_linear.py`:

    k_gate = scale_gate dz_gate B_gate      dB_gate = scale_gate dz_gate^T h_gate      (up likewise)
    dA_down = k_down^T act

Products that come without their low-rank part get it on the way: z = gate + s h_gate B_gate^T (up likewise), and
dL/dact = g + k_down A_down. That costs no pass of its own over (M, N), and none is rounded before it is used.

Arithmetic is float32 (float64 for float64 inputs), rounded once; the sums read dz and act as rounded, so they are
those of separate functions. Plain functions for use inside autograd functions. CUDA tensors of at most 32 bits go to
`gated_triton.py` and `gated_project_triton.py` where Triton is installed; the torch functions are their reference and
the way everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from deltaw.core.errors import InputError
from deltaw.kernels.low_rank import outer_sum, project, project_and_sum
from deltaw.kernels.norm import check_like, triton_form, wide_dtype

#: f; "gelu_tanh" is transformers' "gelu_pytorch_tanh", "gelu" the one by the error function.
Activation = Literal["silu", "gelu_tanh", "gelu"]
Factors = tuple[Tensor, Tensor]
#: h_gate (M, r), B_gate (N, r), h_up and B_up, whose ranks may differ.
LowRank = tuple[Tensor, Tensor, Tensor, Tensor]
#: a (M, r) and b (r, N), of which a tensor (M, N) lacks a b.
Missing = tuple[Tensor, Tensor]

#: Largest rank of the kernels that take the low-rank part or make its sums along with the rest, by bytes of a value.
LARGEST_RANK = {2: 64, 4: 16}
#: Values that the torch form makes wide at a time.
_ELEMENTS = 1 << 18
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def gated(
    gate: Tensor,
    up: Tensor,
    *,
    activation: Activation,
    factors: Factors | None = None,
    low_rank: LowRank | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Act = f(c_gate z_gate) c_up z_up.

    Args:
        gate: (M, N), z_gate or all of it but its low-rank part; rows contiguous, any stride between them: a half of an
            (M, 2N) buffer is one.
        up: like `gate`.
        activation: f.
        factors: c_gate and c_up, (N,) each, any floating dtype; None stands for 1.
        low_rank: h_gate (M, r), B_gate (N, r), h_up and B_up, where z_gate = gate + h_gate B_gate^T and z_up likewise;
            taken in gate's dtype. None stands for 0. Above `LARGEST_RANK` on CUDA z is rounded once.
        out: storage for act, like `gate`; may be `gate` or `up`. None makes it.

    Returns:
        (M, N) in gate's dtype.

    Raises:
        InputError: shapes, dtypes, devices or strides that do not fit; an unknown activation.
    """
    _check(gate, activation, factors, up=up, out=out)
    if low_rank is not None:
        h_gate, B_gate, h_up, B_up = low_rank
        _check_low_rank(gate, ("gate", B_gate, h_gate), ("up", B_up, h_up))
    if out is None:
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    kernels = triton_form(gate, "gated_triton")
    if kernels is not None and low_rank is not None and not _fits(gate, low_rank[1], low_rank[3]):
        h_gate, B_gate, h_up, B_up = (t.to(gate.dtype) for t in low_rank)
        gate, up, low_rank = torch.addmm(gate, h_gate, B_gate.t()), torch.addmm(up, h_up, B_up.t()), None
    form = gated_torch if kernels is None else kernels.gated
    result: Tensor = form(gate, up, activation=activation, factors=factors, low_rank=low_rank, out=out)
    return result


def gated_torch(
    gate: Tensor,
    up: Tensor,
    *,
    activation: Activation,
    factors: Factors | None = None,
    low_rank: LowRank | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`gated` in torch on any device."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    c_gate, c_up = _wide_factors(factors, gate)
    of_gate = of_up = None
    if low_rank is not None:
        h_gate, B_gate, h_up, B_up = low_rank
        of_gate, of_up = _missing(gate, h_gate, B_gate.t()), _missing(up, h_up, B_up.t())
    for rows in _blocks(gate):
        x, u = _rows(gate, rows, of_gate) * c_gate, _rows(up, rows, of_up) * c_up
        P, _ = _curve(x, activation)
        out[rows] = P.mul_(x).mul_(u)
    return out


def gated_and_project(
    gate: Tensor,
    up: Tensor,
    A: Tensor,
    *,
    activation: Activation,
    factors: Factors | None = None,
    low_rank: LowRank | None = None,
    out: Tensor | None = None,
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Act as `gated` makes it and h = act A^T, from act as rounded, on CUDA with one pass over (M, N).

    Args:
        gate: as for `gated`.
        up: as for `gated`.
        A: (R, N), any floating dtype; taken in gate's. Above `LARGEST_RANK`, with `low_rank`, and for few tokens act is
            read again.
        activation: f.
        factors: as for `gated`.
        low_rank: as for `gated`.
        out: as for `gated`; may be `gate` or `up`.
        room: (M, R) in gate's dtype, rows contiguous, any stride between them, that gets h too, as the columns behind
            `out` in one buffer; shares no memory with the other tensors.

    Returns:
        act (M, N) and h (M, R) in gate's dtype, h in contiguous memory of its own.

    Raises:
        InputError: as for `gated`; an A or room that does not fit.
    """
    _check(gate, activation, factors, up=up, out=out)
    _check_projection(gate, A, room)
    kernels = triton_form(gate, "gated_project_triton")
    if kernels is not None and low_rank is None and _fits(gate, A.t()) and kernels.busy(gate):
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
        made: tuple[Tensor, Tensor] = kernels.gated_and_project(
            gate, up, A, activation=activation, factors=factors, out=out, room=room
        )
        return made
    act = gated(gate, up, activation=activation, factors=factors, low_rank=low_rank, out=out)
    h = project(act, A)
    if room is not None:
        room.copy_(h)
    return act, h


def gated_backward(
    g: Tensor, gate: Tensor, up: Tensor, *, activation: Activation, factors: Factors | None = None
) -> tuple[Tensor, Tensor] | None:
    """The gradient of `gated`, in place: gate <- dL/dgate, up <- dL/dup, g <- act, the forward pass's value again.

    Args:
        g: (M, N), dL/dact, rows contiguous, any stride between them.
        gate: like g.
        up: like g.
        activation: f.
        factors: c_gate and c_up, (N,) each, any floating dtype; None stands for 1.

    Returns:
        With factors, their gradients (N,), float32 (float64 for float64); else None.

    Raises:
        InputError: as for `gated`.
    """
    _check(g, activation, factors, gate=gate, up=up)
    kernels = triton_form(g, "gated_triton")
    form = gated_backward_torch if kernels is None else kernels.gated_backward
    result: tuple[Tensor, Tensor] | None = form(g, gate, up, activation=activation, factors=factors)
    return result


def gated_backward_torch(
    g: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    activation: Activation,
    factors: Factors | None = None,
    missing: tuple[Missing | None, Missing | None, Missing | None] = (None, None, None),
) -> tuple[Tensor, Tensor] | None:
    """`gated_backward` in torch on any device; `missing` is what is to be added to g, gate and up first."""
    wide = wide_dtype(g.dtype)
    c_gate, c_up = _wide_factors(factors, g)
    sums = torch.zeros(2, g.shape[1], dtype=wide, device=g.device)
    for rows in _blocks(g):
        grad, z_gate, z_up = (_rows(t, rows, part) for t, part in zip((g, gate, up), missing, strict=True))
        x, u = z_gate * c_gate, z_up * c_up
        P, slope = _curve(x, activation)
        f = P * x
        du, dx = grad * f, slope.add_(P).mul_(grad).mul_(u)
        if factors is not None:
            sums[0] += (dx * z_gate).sum(0)
            sums[1] += (du * z_up).sum(0)
        g[rows], gate[rows], up[rows] = f * u, dx * c_gate, du * c_up
    return None if factors is None else (sums[0], sums[1])


def gated_backward_low_rank(
    g: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    B_gate: Tensor,
    B_up: Tensor,
    h_gate: Tensor,
    h_up: Tensor,
    k_down: Tensor,
    scale_gate: float,
    scale_up: float,
    activation: Activation,
    factors: Factors | None = None,
    write_act: bool = False,
    adds: bool = False,
    A_down: Tensor | None = None,
    sum_scales: tuple[float, float] | None = None,
    room: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`gated_backward` and the low-rank gradients around it, with one read of g, gate and up on CUDA.

    Args:
        g: (M, N), dL/dact, rows contiguous, any stride between them. Afterwards act where `write_act`, else undefined.
        gate: like g; becomes dL/dgate.
        up: like g; becomes dL/dup.
        B_gate: (N, r).
        B_up: (N, r).
        h_gate: (M, r), the MLP's input times A_gate^T.
        h_up: (M, r).
        k_down: (M, r), the gradient of down's A x, its scale included.
        scale_gate: alpha/r or its like.
        scale_up: the same of up.
        activation: f.
        factors: c_gate and c_up, (N,) each; None stands for 1.
        write_act: whether g becomes act.
        adds: gate and up lack scale_gate h_gate B_gate^T and scale_up h_up B_up^T, which are added first.
        A_down: (r, N), where g lacks k_down A_down, which is added first; None where g is whole.
        sum_scales: of dB_gate and dB_up, where B_gate and B_up have theirs already; None: scale_gate and scale_up.
        room: (M, r_gate + r_up) in g's dtype, rows contiguous, any stride between them: storage for k_gate and k_up
            side by side. Shares no memory with the other tensors; None makes it.

    Returns:
        k_gate, k_up (M, r) in g's dtype, dB_gate, dB_up (N, r) and dA_down (r, N), float32 (float64 for float64); with
        factors also their gradients (N,) twice. The three ranks may differ.

    Raises:
        InputError: as for `gated`; low-rank tensors that do not fit.
    """
    _check(g, activation, factors, gate=gate, up=up)
    _check_low_rank(g, ("gate", B_gate, h_gate), ("up", B_up, h_up), k_down, A_down)
    rank = B_gate.shape[1]
    if room is not None:
        _check_room(room, rank + B_up.shape[1], g)
    low_rank = {"B_gate": B_gate, "B_up": B_up, "h_gate": h_gate, "h_up": h_up, "k_down": k_down}
    scales = {"scale_gate": scale_gate, "scale_up": scale_up}
    kernels = triton_form(g, "gated_triton")
    one_rank = rank == B_up.shape[1] == k_down.shape[1]
    if kernels is not None and one_rank and _fits(g, B_gate):
        made: tuple[Tensor, ...] = kernels.gated_backward_low_rank(
            g, gate, up, **low_rank, **scales, activation=activation, factors=factors, write_act=write_act, adds=adds,
            A_down=A_down, sum_scales=sum_scales, room=room,
        )  # fmt: skip
        return made
    B_gate, B_up, h_gate, h_up, k_down = (t.to(g.dtype) for t in low_rank.values())
    of_g = None if A_down is None else (k_down, A_down.to(g.dtype), 1.0)
    of_gate, of_up = ((h_gate, B_gate.t(), scale_gate), (h_up, B_up.t(), scale_up)) if adds else (None, None)
    parts = (of_g, of_gate, of_up)
    if kernels is None:
        g_part, gate_part, up_part = (None if part is None else _missing(g, *part) for part in parts)
        missing = (g_part, gate_part, up_part)
        sums = gated_backward_torch(g, gate, up, activation=activation, factors=factors, missing=missing)
    else:
        for t, part in zip((g, gate, up), parts, strict=True):
            if part is not None:
                t.addmm_(part[0], part[1], alpha=part[2])
        sums = kernels.gated_backward(g, gate, up, activation=activation, factors=factors)
    sum_gate, sum_up = sum_scales or (scale_gate, scale_up)
    place_gate, place_up = (None, None) if room is None else (room[:, :rank], room[:, rank:])
    k_gate, dB_gate = project_and_sum(gate, B_gate, h_gate, scale=scale_gate, sum_scale=sum_gate, out=place_gate)
    k_up, dB_up = project_and_sum(up, B_up, h_up, scale=scale_up, sum_scale=sum_up, out=place_up)
    return k_gate, k_up, dB_gate, dB_up, outer_sum(k_down, g), *(sums or ())


def _curve(x: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """P(x) and x P'(x)."""
    if activation == "gelu":
        P = torch.erf(x * math.sqrt(0.5)).add_(1.0).mul_(0.5)
        return P, (x * x).mul_(-0.5).exp_().mul_(x).mul_(1 / math.sqrt(2 * math.pi))
    if activation == "silu":
        P = torch.sigmoid(x)
        return P, (1.0 - P).mul_(P).mul_(x)
    twice_a, square = 2 * math.sqrt(2 / math.pi), x * x
    P = torch.sigmoid((square * (twice_a * 0.044715)).add_(twice_a).mul_(x))
    inner = square.mul_(3 * 0.044715 * twice_a).add_(twice_a)
    return P, (1.0 - P).mul_(P).mul_(x).mul_(inner)


def _wide_factors(factors: Factors | None, like: Tensor) -> Factors:
    wide = wide_dtype(like.dtype)
    if factors is None:
        one = torch.ones((), dtype=wide, device=like.device)
        return one, one
    return factors[0].to(wide), factors[1].to(wide)


def _missing(like: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Missing:
    """A and scale b in like's dtype, wide."""
    wide = wide_dtype(like.dtype)
    return a.to(like.dtype).to(wide), scale * b.to(like.dtype).to(wide)


def _rows(t: Tensor, rows: slice, missing: Missing | None) -> Tensor:
    """Rows of t with what it lacks, wide."""
    wide = t[rows].to(wide_dtype(t.dtype))
    return wide if missing is None else torch.addmm(wide, missing[0][rows], missing[1])


def _fits(like: Tensor, *Bs: Tensor) -> bool:
    """Whether the kernels take such ranks."""
    return all(0 < B.shape[1] <= LARGEST_RANK[like.itemsize] for B in Bs)


def _blocks(like: Tensor) -> Iterator[slice]:
    step = max(1, _ELEMENTS // max(like.shape[1], 1))
    return (slice(start, start + step) for start in range(0, like.shape[0], step))


def _check(first: Tensor, activation: str, factors: Factors | None, **others: Tensor | None) -> None:
    if activation not in get_args(Activation):
        raise InputError(f"activation {activation!r}: expected one of {', '.join(get_args(Activation))}")
    if first.dim() != 2 or first.dtype not in _DTYPES:
        raise InputError(
            f"the first tensor is {first.dtype} of shape {tuple(first.shape)}: expected (M, N) in bfloat16, float16, "
            "float32 or float64"
        )
    for name, t in {"the first tensor": first, **others}.items():
        if t is None:
            continue
        if t.shape != first.shape or t.dtype != first.dtype or t.device != first.device:
            raise InputError(
                f"{name} is {t.dtype} of shape {tuple(t.shape)} on {t.device}: expected {first.dtype}, "
                f"{tuple(first.shape)}, on {first.device} as the first"
            )
        _check_strides(name, t)
    for c in factors or ():
        if c.shape != first.shape[1:] or c.device != first.device:
            raise InputError(
                f"a factor has shape {tuple(c.shape)} on {c.device}: expected ({first.shape[1]},) on {first.device}"
            )


def _check_strides(name: str, t: Tensor) -> None:
    if (t.shape[1] > 1 and t.stride(1) != 1) or (t.shape[0] > 1 and t.stride(0) < t.shape[1]):
        raise InputError(
            f"{name} has strides {t.stride()}: expected contiguous rows that do not overlap, call contiguous()"
        )


def _check_projection(gate: Tensor, A: Tensor, room: Tensor | None) -> None:
    columns = gate.shape[1]
    if A.dim() != 2 or A.shape[1] != columns or A.device != gate.device or not A.is_floating_point():
        raise InputError(
            f"A is {A.dtype} of shape {tuple(A.shape)} on {A.device}: expected floating values, (R, {columns}), on "
            f"{gate.device}"
        )
    if room is not None:
        _check_room(room, A.shape[0], gate)


def _check_room(room: Tensor, columns: int, like: Tensor) -> None:
    check_like("room", room, (len(like), columns), like)
    _check_strides("room", room)


def _check_low_rank(
    g: Tensor,
    gate: tuple[str, Tensor, Tensor],
    up: tuple[str, Tensor, Tensor],
    k_down: Tensor | None = None,
    A_down: Tensor | None = None,
) -> None:
    rows, columns = g.shape
    for name, B, h in (gate, up):
        if B.dim() != 2 or h.dim() != 2 or B.shape[0] != columns or h.shape != (rows, B.shape[1]):
            raise InputError(
                f"B_{name} is {tuple(B.shape)} and h_{name} {tuple(h.shape)}: expected ({columns}, r) and ({rows}, r)"
            )
    if k_down is not None and (k_down.dim() != 2 or k_down.shape[0] != rows):
        raise InputError(f"k_down is {tuple(k_down.shape)}: expected ({rows}, r)")
    if k_down is not None and A_down is not None and A_down.shape != (k_down.shape[1], columns):
        raise InputError(f"A_down is {tuple(A_down.shape)}: expected ({k_down.shape[1]}, {columns}) as k_down has it")
