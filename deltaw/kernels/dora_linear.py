"""DoRA's linear as one autograd function: y = c (x W^T + scale (x A^T) B^T) + b with W frozen and c = m / n by rows.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, equations 5 and 11: W' = m V / ||V|| with
V = W + scale B A, and the norm n a constant in the backward pass (section 4.3).

Symbols, T tokens in all: x (..., in), W (out, in), A (r, in), B (out, r), m, n, c, b (out,), g = dL/dy (..., out). With
h = x A^T, g_c = c g and k = scale g_c B, and z the sum in brackets:

    dA = k^T x      dB = scale g_c^T h      dx = g_c W + k A      dm = sum of g z over tokens, / n      db = sum of g

The norm never forms B A. By rows, with U = W A^T (out, r):

    n^2 = ||W||^2 + 2 scale sum(B U) + scale^2 sum(B (A A^T) B)

z is as large as y and is not kept: it is (y - b) / c, and y is in memory already wherever what follows keeps its input
(an activation function, attention's values). Where nothing does, keeping y costs memory, and z may be computed again
instead, for a third more in products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.core.protocols import BaseWeight
from deltaw.kernels.lora_linear import Sinks, draw_dropout_seed, dropout_mask, low_rank_gradients
from deltaw.kernels.norm import triton_form
from deltaw.kernels.per_example import along, linear, spread

#: Elements of W that `squared_row_norms` makes wide at a time.
_ELEMENTS = 1 << 16
#: The least |c| in training: z is recovered by dividing by it.
_LEAST = 1e-6


def squared_row_norms(base: BaseWeight) -> Tensor:
    """||W||^2 by rows of W (out, in), a block at a time: (out,), float32 or wider."""
    wide = torch.promote_types(base.dtype, torch.float32)
    rows, columns = base.shape
    step = max(1, _ELEMENTS // max(columns, 1))
    blocks = [base.dequantize(slice(i, min(i + step, rows))).to(wide) for i in range(0, rows, step)]
    return torch.cat([block.square().sum(1) for block in blocks])


def row_norms(squared: Tensor, U: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """||W + scale B A|| by rows, by the factored identity.

    Args:
        squared: ||W||^2 by rows, (out,).
        U: W A^T, (out, r).
        A: (r, in).
        B: (out, r).
        scale: alpha/r or its like.

    Returns:
        (out,), in `squared`'s dtype.
    """
    B, U = B.detach(), U.detach()
    kernels = triton_form(B, "row_norms_triton") if squared.dtype == torch.float32 else None
    if kernels is not None and B.shape[1] <= kernels.LARGEST_RANK:
        norms: Tensor = kernels.row_norms(squared, U, A, B, scale)
        return norms
    return row_norms_torch(squared, U, A, B, scale)


def row_norms_torch(squared: Tensor, U: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`row_norms` in torch on any device."""
    A, B, U = A.detach().to(squared.dtype), B.to(squared.dtype), U.to(squared.dtype)
    # The sum can fall below 0 by rounding where the update cancels the weight.
    both = torch.addmm(2 * U, B, A @ A.t(), beta=scale, alpha=scale * scale)
    return ((B * both).sum(1) + squared).clamp_(min=torch.finfo(squared.dtype).tiny).sqrt_()


def scaled_rows(z: Tensor, c: Tensor, *, in_place: bool = False) -> Tensor:
    """Z (T, out) times c (out,), in z's dtype and with c in its own: exact where c is 1."""
    if z.dtype == c.dtype:
        return z.mul_(c) if in_place else z * c
    shift = (c - 1).to(z.dtype)
    if z.device.type == "cpu" and bool((shift.abs() <= 0.5).all()):
        # A product of two dtypes makes wide copies on CPUs. z + z (c - 1) keeps c's last bits where c is near 1.
        return z.addcmul_(z, shift) if in_place else torch.addcmul(z, z, shift)
    return (z if in_place else z.clone()).mul_(c)


class _DoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        m: Tensor,
        bias: Tensor | None,
        base: BaseWeight,
        squared: Tensor,
        norm: Tensor | None,
        scale: float,
        p: float,
        seed: int,
        recompute: bool,
    ) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        narrow = A.to(x.dtype)
        if norm is None and bias is None and getattr(base, "packed", None) is not None:
            # One product for x W^T and A W^T, so that a weight in few bits is decoded once.
            both = base.matmul(torch.cat([flat, narrow]))
            out, U = both[: len(flat)], both[len(flat) :].t()
            norm = row_norms(squared, U, A, B, scale)
        else:
            norm = row_norms(squared, base.matmul(narrow).t(), A, B, scale) if norm is None else norm.detach()
            out = base.matmul(flat, bias)
        dropped = flat * dropout_mask(flat, p, seed) if p else flat
        h = dropped @ narrow.t()
        out.addmm_(h, B.to(x.dtype).t(), alpha=scale)
        need_A, need_B, need_m = ctx.needs_input_grad[1:4]
        c = m.to(norm.dtype) / norm
        if need_m and not recompute:
            c = torch.where(c.abs() < _LEAST, torch.full_like(c, _LEAST), c)
        out = scaled_rows(out, c, in_place=True)
        if bias is not None:
            out.sub_(((c - 1) * bias.to(c.dtype)).to(out.dtype))
        y = out.view(*x.shape[:-1], out.shape[-1])
        ctx.base, ctx.scale, ctx.p, ctx.seed, ctx.shape = base, scale, p, seed, x.shape
        again = need_m and recompute
        kept_y = y if need_m and not recompute else None
        kept_bias = bias if need_m and not recompute else None
        kept_x, kept_h = x if need_A or again else None, h if need_B or again else None
        ctx.save_for_backward(kept_x, A, B, kept_h, c, norm, kept_y, kept_bias)
        ctx.m_dtype, ctx.sinks = m.dtype, Sinks.of(x, A, B, m)
        ctx.mark_non_differentiable(norm)
        return y, norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, A, B, h, c, norm, y, bias = ctx.saved_tensors
        need_x, _, _, need_m, need_bias = ctx.needs_input_grad[:5]
        g = grad.reshape(-1, grad.shape[-1])
        dm = db = None
        if need_bias or bias is not None:
            db = g.sum(0)
        base: Any = ctx.base
        if need_m and y is None:
            if need_x and getattr(base, "packed", None) is not None:
                # Both of this pass's products with a weight in few bits, after decoding it once.
                base = _Decoded(base.dequantize(dtype=g.dtype))
            z = base.matmul(x.reshape(-1, x.shape[-1])).addmm_(h, B.to(h.dtype).t(), alpha=ctx.scale)
            dm = _given(ctx, _summed_products(_apart(ctx, g), _apart(ctx, z)).to(c.dtype) / norm)
        elif need_m:
            total = _summed_products(_apart(ctx, g), _apart(ctx, y.view_as(g))).to(c.dtype)
            if bias is not None and db is not None:
                db_of = db if ctx.sinks is None else ctx.sinks.split(g).sum(1)
                total = total - bias.to(c.dtype) * db_of.to(c.dtype)
            dm = _given(ctx, total / (c * norm))
        dx, dA, dB = low_rank_gradients(ctx, scaled_rows(g, c), x, A, B, h, base)
        return dx, dA, dB, dm, db if need_bias else None, None, None, None, None, None, None, None


class _Decoded:
    """A dense W (out, in) with a base weight's two products."""

    def __init__(self, W: Tensor) -> None:
        self.W = W

    def matmul(self, x: Tensor) -> Tensor:
        return x @ self.W.t()

    def t_matmul(self, grad: Tensor) -> Tensor:
        return grad @ self.W


def _apart(ctx: Any, flat: Tensor) -> Tensor:
    return flat if ctx.sinks is None else ctx.sinks.split(flat)


def _given(ctx: Any, dm: Tensor) -> Tensor | None:
    """M's gradient, in its dtype; by example it goes to the sink, and None comes."""
    if ctx.sinks is None:
        return dm.to(ctx.m_dtype)
    ctx.sinks.feed(2, dm)
    return None


def _summed_products(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a b over tokens: two (..., T, out) to (..., out), accumulated in float32 or wider."""
    # CPUs accumulate in float32 anyway, and would copy all of it for an output of that dtype.
    return (a * b).sum(-2, dtype=None if a.device.type == "cpu" else torch.promote_types(a.dtype, torch.float32))


def dora_linear(
    x: Tensor,
    base: BaseWeight,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    squared: Tensor,
    *,
    scale: float,
    norm: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """(m / n) (X W^T + scale (dropout(x) A^T) B^T) + bias, differentiable in x, A, B, m and bias; W is frozen.

    Args:
        x: (..., in), of the base's dtype.
        base: the frozen W (out, in).
        A: (r, in).
        B: (out, r).
        magnitude: m, (out,).
        squared: ||W||^2 by rows, (out,), as `squared_row_norms` gives it.
        scale: alpha/r or its like.
        norm: n = ||W + scale B A|| by rows where it is known, (out,); None: it is computed along.
        bias: (out,) or None.
        dropout: probability of dropping an entry of x on the low-rank branch only. The norm and the frozen product see
            all of x; PEFT's drops entries of both products' input.
        recompute: compute z again in the backward pass instead of keeping y.

    Returns:
        The output (..., out) and n.
    """
    if torch.is_autocast_enabled(x.device.type):
        # Autocast chooses a dtype for each operation; only the plain expression lets it.
        if norm is None:
            norm = row_norms(squared, base.matmul(A.detach().to(base.dtype)).t(), A, B, scale)
        z = base.matmul(x) + linear(linear(F.dropout(x, dropout), spread(A)), spread(B)) * scale
        y = z * along((spread(magnitude).to(norm.dtype) / norm).to(z.dtype), z, 1)
        return (y if bias is None else y + bias.to(y.dtype)), norm
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    seed = draw_dropout_seed() if dropout else 0
    y, norm = _DoraLinear.apply(x, A, B, magnitude, bias, base, squared, norm, scale, dropout, seed, recompute)
    return y, norm
