"""RMS normalisation of rows, with the residual's sum before it, and its gradient.

Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467, equation 4.

Symbols, M rows: x (M, d), weight (d,), v = weight ("llama") or 1 + weight ("gemma"), g = dL/dy (M, d).

    rstd = 1 / sqrt(mean(x^2) + eps)        h = x rstd        y = v h
    u = v g                                 dx = rstd (u - h mean(u h))

Where v has no zeros the gradient may take h from the output, as y / v, so that x need not be kept beside y.

Arithmetic is float32 (float64 for float64 inputs), rounded once to the output's dtype, but for what transformers'
LlamaRMSNorm rounds beside: "llama" rounds h to x's dtype before the product with the weight; Gemma's norm does not.
The gradient takes that rounding for the identity, as autograd does. The weight is frozen.

These are plain functions for use inside autograd functions. CUDA tensors of at most 32 bits go to `norm_triton.py`
where Triton is installed; the torch functions are its reference and the way everywhere else.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from deltaw.core.errors import InputError

#: How the weight meets the normalised values.
Style = Literal["llama", "gemma"]

#: v that can be divided by, in the smallest normal numbers of its dtype: values of h from 1/1024 on stay normal in y.
_LEAST = 1024.0
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def triton_form(x: Tensor, module: str) -> ModuleType | None:
    """`deltaw.kernels.<module>` if x is on CUDA, of at most 32 bits, and Triton is installed, else None."""
    return _load(module) if x.is_cuda and x.dtype != torch.float64 else None


@functools.cache
def _load(module: str) -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"deltaw.kernels.{module}")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, style: Style = "llama", out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The norm of each row, y = norm(x).

    Args:
        x: (M, d), rows contiguous, any stride between them.
        weight: (d,), any floating dtype.
        eps: added to the mean square.
        style: "llama" or "gemma".
        out: storage for y, like x; may be x. None makes it.

    Returns:
        y (M, d) in x's dtype and rstd (M,), float32 (float64 for float64).

    Raises:
        InputError: shapes, dtypes, devices or strides that do not fit; an unknown style.
    """
    check_norm(weight, x, style)
    _check_rows(x, x=x, out=out)
    kernels = triton_form(x, "norm_triton")
    form = rms_norm_torch if kernels is None else kernels.rms_norm
    result: tuple[Tensor, Tensor] = form(x, weight, eps=eps, style=style, out=out)
    return result


def rms_norm_torch(
    x: Tensor, weight: Tensor, *, eps: float, style: Style = "llama", out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`rms_norm` in torch on any device."""
    values, rstd = normalised(x, weight, eps=eps, style=style)
    return _stored(values, x.dtype, out), rstd


def normalised(x: Tensor, weight: Tensor, *, eps: float, style: Style) -> tuple[Tensor, Tensor]:
    """norm(x) over the last dimension before its last rounding, and rstd: (..., d) and (...)."""
    values = x.to(wide_dtype(x.dtype))
    rstd = values.square().mean(-1).add_(eps).rsqrt_()
    values = values * rstd.unsqueeze(-1)
    if style == "llama":
        values = values.to(x.dtype).to(values.dtype)
    return values.mul_(_factors(weight, style, values.dtype)), rstd


def add_rms_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    *,
    eps: float,
    style: Style = "llama",
    factor: Tensor | None = None,
    out: Tensor | None = None,
    norm_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum s = x + factor y, rounded to x's dtype, and n = norm(s) of the rounded sum.

    Args:
        x: (M, d), rows contiguous, any stride between them.
        y: as x.
        weight: (d,), any floating dtype.
        eps: added to the mean square.
        style: "llama" or "gemma".
        factor: (d,), any floating dtype; None stands for 1.
        out: storage for s, like x; may be x or y. None makes it.
        norm_out: the same for n; not out.

    Returns:
        s and n (M, d) in x's dtype, rstd (M,) of s, float32 (float64 for float64).

    Raises:
        InputError: shapes, dtypes, devices or strides that do not fit; an unknown style.
    """
    check_norm(weight, x, style)
    _check_rows(x, x=x, y=y, out=out, norm_out=norm_out)
    if factor is not None:
        check_like("factor", factor, (x.shape[1],), x, dtype=False)
    kernels = triton_form(x, "norm_triton")
    form = add_rms_norm_torch if kernels is None else kernels.add_rms_norm
    result: tuple[Tensor, Tensor, Tensor] = form(
        x, y, weight, eps=eps, style=style, factor=factor, out=out, norm_out=norm_out
    )
    return result


def add_rms_norm_torch(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    *,
    eps: float,
    style: Style = "llama",
    factor: Tensor | None = None,
    out: Tensor | None = None,
    norm_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_rms_norm` in torch on any device."""
    wide = wide_dtype(x.dtype)
    total = x + y if factor is None else y.to(wide).mul(factor.to(wide)).add_(x)
    s = _stored(total, x.dtype, out)
    n, rstd = rms_norm_torch(s, weight, eps=eps, style=style, out=norm_out)
    return s, n, rstd


def rms_norm_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    style: Style = "llama",
    normed: bool = False,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """dL/dx of y = norm(x) with dL/dy = g, plus `add`, what reaches x on other ways.

    Args:
        g: (M, d), rows contiguous, any stride between them.
        x: as g; the norm's input, or y in its place where `normed`.
        weight: (d,), any floating dtype.
        rstd: (M,), as the forward pass returned it.
        style: "llama" or "gemma".
        normed: whether `x` is y, of a norm that can be undone (see `invertible`).
        add: as g, or None.
        out: storage for the result, like x; may be g, add or x. None makes it.

    Returns:
        (M, d), x's dtype.

    Raises:
        InputError: shapes, dtypes, devices or strides that do not fit; an unknown style.
    """
    check_norm(weight, x, style)
    _check_rows(x, x=x, g=g, add=add, out=out)
    check_like("rstd", rstd, tuple(x.shape[:1]), x, dtype=False)
    kernels = triton_form(x, "norm_triton")
    form = rms_norm_backward_torch if kernels is None else kernels.rms_norm_backward
    result: Tensor = form(g, x, weight, rstd, style=style, normed=normed, add=add, out=out)
    return result


def rms_norm_backward_torch(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    style: Style = "llama",
    normed: bool = False,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`rms_norm_backward` in torch on any device; leading dimensions may be any number."""
    wide = wide_dtype(x.dtype)
    v = _factors(weight, style, wide)
    h = x.to(wide) / v if normed else x.to(wide) * rstd.unsqueeze(-1)
    u = g.to(wide) * v
    dx = u.sub_(h.mul_((u * h).mean(-1, keepdim=True))).mul_(rstd.unsqueeze(-1))
    return _stored(dx if add is None else dx.add_(add), x.dtype, out)


def invertible(weight: Tensor, style: Style) -> bool:
    """Whether h = y / v loses no more than y's rounding: no v is zero, or so small that y would be.

    Args:
        weight: (d,), of the dtype of y.
        style: "llama" or "gemma".
    """
    v = _factors(weight.detach(), style, wide_dtype(weight.dtype))
    return bool((v.abs() >= _LEAST * torch.finfo(weight.dtype).tiny).all())


def _factors(weight: Tensor, style: Style, wide: torch.dtype) -> Tensor:
    return weight.to(wide) + 1.0 if style == "gemma" else weight.to(wide)


def _stored(values: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    return values.to(dtype) if out is None else out.copy_(values)


def check_norm(weight: Tensor, x: Tensor, style: str) -> None:
    """That x (..., d), the weight and the style can make a norm; raises InputError."""
    if x.dtype not in _DTYPES:
        raise InputError(f"x is {x.dtype}: expected bfloat16, float16, float32 or float64, convert it first")
    if style not in get_args(Style):
        raise InputError(f"norm style {style!r}: expected one of {', '.join(get_args(Style))}")
    check_like("weight", weight, tuple(x.shape[-1:]), x, dtype=False)


def check_like(name: str, t: Tensor, shape: tuple[int, ...], x: Tensor, *, dtype: bool = True) -> None:
    """That t has the shape, x's device, x's dtype where `dtype`, and values side by side; raises InputError."""
    if t.shape != shape or t.device != x.device or not t.is_floating_point() or (dtype and t.dtype != x.dtype):
        raise InputError(
            f"{name} is {t.dtype} of shape {tuple(t.shape)} on {t.device}: expected "
            f"{x.dtype if dtype else 'floating values'}, {shape}, on {x.device}"
        )
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        raise InputError(f"{name} has a stride of {t.stride(-1)} in its last dimension: expected 1, make it contiguous")


def _check_rows(like: Tensor, **tensors: Tensor | None) -> None:
    if like.dim() != 2:
        raise InputError(f"x has shape {tuple(like.shape)}: expected (rows, d), flatten what leads")
    for name, t in tensors.items():
        if t is not None:
            check_like(name, t, tuple(like.shape), like)
