"""Columns times factors, together with what else reads the same values: the factors' gradients, or the residual's sum.

DoRA (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, equation 5) multiplies the outputs of
a linear by c = m / norm. Symbols, M tokens: c (N,), z (M, N) the outputs before that, g (M, N) the gradient after it.

    scale_and_sum    dL/dz = g c,  sums_n = sum_m g_mn y_mn        for y = z the gradient of c
    scaled_add       residual + z c + bias

Arithmetic and sums are float32 (float64 for float64 inputs), values rounded once to their dtype; sums are taken in a
fixed order. These are plain functions for use inside autograd functions. CUDA tensors of at most 32 bits go to
`scaled_triton.py` where Triton is installed; the torch functions are its reference and the way everywhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.core.errors import InputError
from deltaw.kernels.norm import check_like, triton_form, wide_dtype

#: Values of a block of rows in torch, which bounds the wide temporaries.
_ELEMENTS = 1 << 20


def scale_and_sum(g: Tensor, y: Tensor, c: Tensor, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The product g c by columns, and the sums of g y over rows, with g as it was.

    Args:
        g: (M, N), of a floating dtype, rows contiguous, any stride between them.
        y: like g.
        c: (N,), any floating dtype.
        out: storage for the product, like g; may be g or y. None makes it.

    Returns:
        The product (M, N) in g's dtype, and the sums (N,), float32 (float64 for float64).

    Raises:
        InputError: shapes, dtypes, devices or strides that do not fit.
    """
    _check(g, {"g": g, "y": y}, {"c": c}, out)
    out = torch.empty(g.shape, dtype=g.dtype, device=g.device) if out is None else out
    kernels = triton_form(g, "scaled_triton")
    form = scale_and_sum_torch if kernels is None else kernels.scale_and_sum
    result: tuple[Tensor, Tensor] = form(g, y, c, out=out)
    return result


def scale_and_sum_torch(g: Tensor, y: Tensor, c: Tensor, *, out: Tensor) -> tuple[Tensor, Tensor]:
    """`scale_and_sum` in torch on any device."""
    wide = wide_dtype(g.dtype)
    factor, sums = c.to(wide), torch.zeros(g.shape[1], dtype=wide, device=g.device)
    for grad, other, target in _blocks(g, y, out):
        values = grad.to(wide)
        sums += (values * other).sum(0)
        target.copy_(values * factor)
    return out, sums


def scaled_add(
    residual: Tensor, z: Tensor, c: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """The sum residual + z c + bias, c and bias by columns.

    Args:
        residual: (M, N), of a floating dtype, rows contiguous, any stride between them.
        z: like residual.
        c: (N,), any floating dtype.
        bias: as c; None stands for 0.
        out: storage for the sum, like residual; may be residual or z. None makes it.

    Returns:
        (M, N) in residual's dtype.

    Raises:
        InputError: shapes, dtypes, devices or strides that do not fit.
    """
    _check(residual, {"residual": residual, "z": z}, {"c": c, "bias": bias}, out)
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device) if out is None else out
    kernels = triton_form(residual, "scaled_triton")
    form = scaled_add_torch if kernels is None else kernels.scaled_add
    result: Tensor = form(residual, z, c, bias, out=out)
    return result


def scaled_add_torch(residual: Tensor, z: Tensor, c: Tensor, bias: Tensor | None = None, *, out: Tensor) -> Tensor:
    """`scaled_add` in torch on any device."""
    wide = wide_dtype(z.dtype)
    factor, shift = c.to(wide), None if bias is None else bias.to(wide)
    for base, rows, target in _blocks(residual, z, out):
        values = rows.to(wide) * factor
        target.copy_((values if shift is None else values.add_(shift)).add_(base))
    return out


def _blocks(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    rows, columns = tensors[0].shape
    step = max(1, min(rows, _ELEMENTS // max(1, columns)))
    return zip(*(t.split(step) for t in tensors), strict=True)


def _check(like: Tensor, tensors: dict[str, Tensor], rows: dict[str, Tensor | None], out: Tensor | None) -> None:
    name = next(iter(tensors))
    if like.dim() != 2 or not like.is_floating_point():
        raise InputError(f"{name} is {like.dtype} of shape {tuple(like.shape)}: expected floating values, (rows, N)")
    for name, t in (tensors if out is None else {**tensors, "out": out}).items():
        check_like(name, t, tuple(like.shape), like)
    for name, row in rows.items():
        if row is not None:
            check_like(name, row, (like.shape[1],), like, dtype=False)
    if out is not None and len(out) > 1 and out.stride(0) < out.shape[1]:
        raise InputError(f"out has strides {out.stride()}: expected rows that do not overlap")
