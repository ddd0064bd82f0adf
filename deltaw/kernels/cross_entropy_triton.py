"""Softmax, loss and gradient of `linear_cross_entropy.py` for CUDA, in Triton, in place over a chunk of logits.

Symbols of that file; of one row, with m the largest z:

    rest = sum over v other than y of exp(z_v - m)      total = rest + exp(z_y - m)
    L = log(total) + m - z_y                            p_v = exp(z_v - m) / total      p_y - 1 = -rest / total

A program owns a row and reads it twice, for the sums and for the gradient, which it writes over the logits: 6 bytes a
logit in 16 bits, 4 where the second read finds the row in the cache (a row of 128,256 takes 256 KB, so few programs of
many warps are better than many programs). At 8,192 tokens and 3.0 TB/s 2.1 or 1.4 ms beside 23 ms of products. No
float32 copy of logits exists. The target's terms are never differences of nearly equal numbers: p_y - 1 comes from
`rest`, and the loss of a nearly certain target from log(1 + rest / exp(z_y - m)).
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found]
import triton.language as tl  # type: ignore[import-untyped,import-not-found]
from torch import Tensor

#: Logits of a row that a program takes at a time, and its warps.
TILE = (8192, 16)

#: Below every logit and finite, so that differences with it are no NaN.
_LOWEST = tl.constexpr(-3.0e38)


# The kernels' arguments carry no annotations: the compiler would look up their names.
@triton.jit  # type: ignore[untyped-decorator]
def _bent(x):  # type: ignore[no-untyped-def]
    """tanh(x) and 1 - tanh(x)^2, neither of them a difference of nearly equal numbers."""
    e = tl.exp(-2.0 * tl.abs(x))
    square = x * x
    small = x * (1.0 - square * (1.0 / 3 - square * (2.0 / 15 - square * (17.0 / 315))))
    large = tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.125, small, large), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit  # type: ignore[untyped-decorator]
def _logit(row, bias, column, live, scale, softcap, BIAS: tl.constexpr, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Z and dz/du; z is -inf outside."""
    u = tl.load(row + column, mask=live, other=float("-inf")).to(tl.float32)
    if BIAS:
        u += tl.load(bias + column, mask=live, other=0.0).to(tl.float32)
    u *= scale
    slope = 1.0
    if CAP:
        u, slope = _bent(u / softcap)
        u = tl.where(live, u * softcap, float("-inf"))
    else:
        u = tl.where(live, u, float("-inf"))
    return u, slope


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    logits, targets, bias, losses, vocab, logits_row, targets_row, scale, softcap,
    BIAS: tl.constexpr, CAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    row = logits + at * logits_row
    target = tl.load(targets + at * targets_row)
    # A target outside the vocabulary has no logit: its loss and the row's gradient are NaN.
    known = (target >= 0) & (target < vocab)
    z_target, _slope = _logit(row, bias, target, known, scale, softcap, BIAS, CAP)
    z_target = tl.where(known, z_target, float("nan"))

    largest = tl.full([BLOCK], _LOWEST, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z, slope = _logit(row, bias, column, column < vocab, scale, softcap, BIAS, CAP)
        z = tl.where(column == target, float("-inf"), z)
        # One exponential: of the old sum's and the new term's factors one is exp(0).
        apart = z - largest
        e = tl.exp(-tl.abs(apart))
        sums = tl.where(apart > 0, sums * e + 1.0, sums + e)
        largest = tl.where(apart > 0, z, largest)
    m = tl.maximum(tl.max(largest, 0), z_target)
    rest = tl.sum(sums * tl.exp(largest - m), 0)
    below = m - z_target
    total = rest + tl.exp(-below)
    ratio = rest * tl.exp(tl.minimum(below, 1.0))
    above = 1.0 + ratio
    # log(1 + x) as log(w) x / (w - 1) with w = 1 + x rounded, which takes the rounding back.
    certain = tl.where(above == 1.0, ratio, tl.log(above) * (ratio / (above - 1.0)))
    tl.store(losses + at, tl.where(below < 1.0, certain, tl.log(total) + below))
    if GRADIENT:
        # No program's thread may overwrite the target's logit before all have read it.
        tl.debug_barrier()
        inverse = 1.0 / total
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            live = column < vocab
            z, slope = _logit(row, bias, column, live, scale, softcap, BIAS, CAP)
            grad = tl.where(column == target, -rest * inverse, tl.exp(z - m) * inverse) * slope
            tl.store(row + column, grad.to(logits.dtype.element_ty), mask=live)


def loss_and_gradient(
    raw: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    wanted: bool,
    *,
    tile: tuple[int, int] = TILE,
) -> Tensor:
    """Summed loss, float32, of raw = h W^T (rows, V) for targets (rows, 1); where wanted, turns `raw` into G in place.

    Unlike the torch form it does not stop at a target outside the vocabulary: the loss and that row's G become NaN.

    Args:
        raw: bfloat16, float16 or float32, rows contiguous.
        target: int64.
        bias: (V,), any floating dtype, or None.
        softcap: c of c tanh(z / c), or None.
        scale: multiplies the logits before the cap.
        wanted: whether to make G.
        tile: as `TILE`.
    """
    losses = torch.empty(len(raw), dtype=torch.float32, device=raw.device)
    block, warps = tile
    block = min(block, triton.next_power_of_2(raw.shape[1]))
    if raw.numel():
        with torch.cuda.device_of(raw):
            _kernel[(len(raw),)](
                raw, target, raw if bias is None else bias.contiguous(), losses, raw.shape[1], raw.stride(0),
                target.stride(0), float(scale), 1.0 if softcap is None else float(softcap),
                BIAS=bias is not None, CAP=softcap is not None, GRADIENT=wanted, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return losses.sum()
