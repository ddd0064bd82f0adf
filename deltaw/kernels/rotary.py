"""Rotary position embedding, in place or elsewhere, alone or after an RMS norm of each head, and the gradients.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864, equation 34, with the
pairs that transformers' `rotate_half` makes: of a head's first R values, i goes with i + R / 2; the other D - R stay.

    y_i = x_i cos_i - x_j sin_i        y_j = x_j cos_j + x_i sin_j        j = i + R / 2

The transpose, which takes gradients back, is the inverse where cos and sin are a rotation's; it is not where they carry
a scale of their own (YaRN's), so it is computed as the transpose. The norm before it is `norm.py`'s with d = D, as
Qwen3 and Gemma 3 have it on queries and keys.

Outputs of a linear that were multiplied by a factor for each column and then turned (DoRA's, see `scaled.py`) go back
through both in one pass, with the factors' gradients, in `rotate_back_scaled`.

Tensors are (B, S, H, D): batch, tokens, heads, head size. Queries and keys that lie side by side in one buffer are one
call over the heads of both. Arithmetic, dispatch and use as in `norm.py`.
"""

from __future__ import annotations

from torch import Tensor

from deltaw.core.errors import InputError
from deltaw.kernels.norm import (
    Style,
    check_like,
    check_norm,
    normalised,
    rms_norm_backward_torch,
    triton_form,
    wide_dtype,
)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False, out: Tensor | None = None) -> Tensor:
    """Rotates x in place or into `out`.

    Args:
        x: (B, S, H, D), last dimension contiguous, any other strides.
        cos: (B or 1, S, R), R even and at most D, last dimension contiguous, any floating dtype.
        sin: as cos.
        inverse: the transpose, for gradients.
        out: like x with strides of its own, which gets all D values of each head, and shares no memory with x; None
            stands for x.

    Returns:
        What was written to.

    Raises:
        InputError: shapes, dtypes, devices or strides that do not fit.
    """
    _check_heads(x, cos, sin, x=x, out=out)
    kernels = triton_form(x, "rotary_triton")
    result: Tensor = (rotate_torch if kernels is None else kernels.rotate)(x, cos, sin, inverse=inverse, out=out)
    return result


def rotate_torch(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False, out: Tensor | None = None) -> Tensor:
    """`rotate` in torch on any device."""
    wide = wide_dtype(x.dtype)
    rotated = cos.shape[-1]
    a, b = x[..., :rotated].to(wide).chunk(2, -1)
    (cos_a, cos_b), (sin_a, sin_b) = (t.to(wide).unsqueeze(2).chunk(2, -1) for t in (cos, sin))
    sin_a, sin_b = (-sin_b, -sin_a) if inverse else (sin_a, sin_b)
    turned = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    target = x if out is None else out
    for half, values in zip(target[..., :rotated].chunk(2, -1), turned, strict=True):
        half.copy_(values)
    if out is not None:
        out[..., rotated:].copy_(x[..., rotated:])
    return target


def norm_rotate(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, *, eps: float, style: Style = "llama"
) -> tuple[Tensor, Tensor]:
    """Each head's norm over D, then the rotation, rounded once (and where `style` rounds the normalised values).

    Args:
        x: (B, S, H, D), last dimension contiguous, any other strides.
        weight: (D,), any floating dtype.
        cos: (B or 1, S, R) as in `rotate`; None: no rotation.
        sin: as cos.
        eps: added to the mean square.
        style: "llama" or "gemma", as in `norm.py`.

    Returns:
        y (B, S, H, D), contiguous, x's dtype, and rstd (B, S, H), float32 (float64 for float64).

    Raises:
        InputError: shapes, dtypes, devices or strides that do not fit; an unknown style.
    """
    check_norm(weight, x, style)
    _check_heads(x, cos, sin, x=x)
    kernels = triton_form(x, "rotary_triton")
    form = norm_rotate_torch if kernels is None else kernels.norm_rotate
    result: tuple[Tensor, Tensor] = form(x, weight, cos, sin, eps=eps, style=style)
    return result


def norm_rotate_torch(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, *, eps: float, style: Style = "llama"
) -> tuple[Tensor, Tensor]:
    """`norm_rotate` in torch on any device."""
    values, rstd = normalised(x, weight, eps=eps, style=style)
    if cos is not None and sin is not None:
        rotate_torch(values, cos, sin)
    return values.to(x.dtype).contiguous(), rstd.contiguous()


def norm_rotate_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    style: Style = "llama",
    out: Tensor | None = None,
) -> Tensor:
    """dL/dx of `norm_rotate` with dL/dy = g; the weight is frozen.

    Args:
        g: (B, S, H, D), last dimension contiguous, any other strides.
        x: as g; the norm's input.
        weight: (D,), any floating dtype.
        rstd: (B, S, H), contiguous, as the forward pass returned it.
        cos: (B or 1, S, R) as in `rotate`, or None.
        sin: as cos.
        style: "llama" or "gemma".
        out: storage for the result, like x with strides of its own, sharing no memory with g or x. None makes it.

    Returns:
        (B, S, H, D), x's dtype; contiguous unless it is `out`.

    Raises:
        InputError: shapes, dtypes, devices or strides that do not fit; an unknown style.
    """
    check_norm(weight, x, style)
    _check_heads(x, cos, sin, x=x, g=g, out=out)
    check_like("rstd", rstd, tuple(x.shape[:3]), x, dtype=False)
    if not rstd.is_contiguous():
        raise InputError(f"rstd has strides {rstd.stride()}: expected it contiguous, as norm_rotate returned it")
    kernels = triton_form(x, "rotary_triton")
    form = norm_rotate_backward_torch if kernels is None else kernels.norm_rotate_backward
    result: Tensor = form(g, x, weight, rstd, cos, sin, style=style, out=out)
    return result


def norm_rotate_backward_torch(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    style: Style = "llama",
    out: Tensor | None = None,
) -> Tensor:
    """`norm_rotate_backward` in torch on any device."""
    turned = g
    if cos is not None and sin is not None:
        turned = g.to(wide_dtype(x.dtype), copy=True)
        rotate_torch(turned, cos, sin, inverse=True)
    dx = rms_norm_backward_torch(turned, x, weight, rstd, style=style, out=out)
    return dx.contiguous() if out is None else dx


def rotate_back_scaled(
    g: Tensor, y: Tensor, c: Tensor, cos: Tensor | None, sin: Tensor | None, *, out: Tensor
) -> Tensor:
    """Of y = rotate(c z): dL/dz with dL/dy = g, and what dL/dc is made from.

    Args:
        g: (B, S, H, D), last dimension contiguous, any other strides.
        y: as g; turned, as it came forward.
        c: (H D,), any floating dtype.
        cos: (B or 1, S, R) as in `rotate`; None: no rotation.
        sin: as cos.
        out: as g, sharing no memory with g or y; gets dL/dz.

    Returns:
        The sums over tokens of dL/d(c z) times c z, (H D,), float32 (float64 for float64); over c they are dL/dc.

    Raises:
        InputError: shapes, dtypes, devices or strides that do not fit.
    """
    _check_heads(g, cos, sin, g=g, y=y, out=out)
    check_like("c", c, (g.shape[2] * g.shape[3],), g, dtype=False)
    kernels = triton_form(g, "rotary_triton")
    sums: Tensor = (rotate_back_scaled_torch if kernels is None else kernels.rotate_back_scaled)(
        g, y, c, cos, sin, out=out
    )
    return sums


def rotate_back_scaled_torch(
    g: Tensor, y: Tensor, c: Tensor, cos: Tensor | None, sin: Tensor | None, *, out: Tensor
) -> Tensor:
    """`rotate_back_scaled` in torch on any device."""
    wide = wide_dtype(g.dtype)
    grad, before = g.to(wide), y.to(wide)
    if cos is not None and sin is not None:
        cos, sin = cos.to(wide), sin.to(wide)
        # The transpose is the inverse but for a scale that cos and sin may carry (YaRN's).
        size = cos.square() + sin.square()
        grad = rotate_torch(grad, cos, sin, inverse=True, out=grad.new_empty(grad.shape))
        before = rotate_torch(before, cos / size, sin / size, inverse=True, out=before.new_empty(before.shape))
    out.copy_(grad * c.to(wide).view(g.shape[2:]))
    return (grad * before).sum((0, 1)).flatten()


def _check_heads(like: Tensor, cos: Tensor | None, sin: Tensor | None, **tensors: Tensor | None) -> None:
    if like.dim() != 4:
        raise InputError(f"x has shape {tuple(like.shape)}: expected (batch, tokens, heads, head size)")
    for name, t in tensors.items():
        if t is not None:
            check_like(name, t, tuple(like.shape), like)
    if cos is None or sin is None:
        if cos is not sin:
            raise InputError("cos or sin is missing: expected both or, for no rotation, neither")
        return
    batch, length, _, size = like.shape
    if cos.dim() != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != length or not 0 < cos.shape[2] <= size:
        raise InputError(f"cos has shape {tuple(cos.shape)}: expected ({batch} or 1, {length}, at most {size})")
    if cos.shape[2] % 2:
        raise InputError(f"cos has shape {tuple(cos.shape)}: expected an even number of rotated values")
    for name, t in (("cos", cos), ("sin", sin)):
        check_like(name, t, tuple(cos.shape), like, dtype=False)
