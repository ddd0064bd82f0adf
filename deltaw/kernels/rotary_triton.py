"""The rotations of `rotary.py` for CUDA, in Triton: one launch and one pass over memory each.

Tensors of B S H D values that pass through memory, and the time at 3.0 TB/s for 8192 tokens, 32 heads of 128 in 16 bits
(67 MB; keys with 8 heads take a quarter):

    rotate                  x -> x         2 (of it the share R / D)    45 us
    rotate elsewhere        x -> out       2                            45 us
    norm_rotate             x -> y         2                            45 us
    norm_rotate_backward    g, x -> dx     3                            67 us
    rotate_back_scaled      g, y -> out    3                            67 us

beside rstd (4 bytes a head) and cos and sin, 4 R bytes for each program: 1 / 8 of what one with 16 heads reads, and
that from the cache but for the first time (4 MB in all at R 128, 1 MB where 4 sequences share them).

A program owns some heads of one token, as both halves of what is rotated and, where R < D, the rest; of
`rotate_back_scaled`, of a strip of tokens, whose sums are written as float32 and added by a second, small reduction.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found]
import triton.language as tl  # type: ignore[import-untyped,import-not-found]
from torch import Tensor

from deltaw.kernels.norm import Style

#: Values of a program's tile in each half: as many heads as fit, at least one.
TILE = 1024
#: Values of a half for each thread.
PER_THREAD = 8
#: Tokens of a program that sums over them.
STRIP = 32


# The kernels' arguments carry no annotations: the compiler would look up their names.
@triton.jit  # type: ignore[untyped-decorator]
def _place(length):  # type: ignore[no-untyped-def]
    """The program's token in all, its sequence and its place there, in 64 bits, divided in 32, which is cheaper."""
    token = tl.program_id(0)
    return token.to(tl.int64), (token // length).to(tl.int64), (token % length).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def _halves(base, lane, R_HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    inside = lane < R_HALF
    first = tl.load(base + lane, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(base + R_HALF + lane, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit  # type: ignore[untyped-decorator]
def _by_angles(a, b, cos_a, cos_b, sin_a, sin_b, INVERSE: tl.constexpr):  # type: ignore[no-untyped-def]
    if INVERSE:
        first = a * cos_a + b * sin_b
        second = b * cos_b - a * sin_a
    else:
        first = a * cos_a - b * sin_a
        second = b * cos_b + a * sin_b
    return first, second


@triton.jit  # type: ignore[untyped-decorator]
def _turned(a, b, cos, sin, lane, R_HALF: tl.constexpr, INVERSE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves (heads, lanes) after the rotation by one token's cos and sin."""
    cos_a, cos_b = _halves(cos, lane, R_HALF)
    sin_a, sin_b = _halves(sin, lane, R_HALF)
    first, second = _by_angles(a, b, cos_a, cos_b, sin_a, sin_b, INVERSE)
    return first, second


@triton.jit(do_not_specialize=["length"])  # type: ignore[untyped-decorator]
def _rotate_kernel(  # type: ignore[no-untyped-def]
    x,
    cos,
    sin,
    out,
    length,
    x_batch,
    x_token,
    x_head,
    out_batch,
    out_token,
    out_head,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    R_HALF: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INVERSE: tl.constexpr,
):
    _token, batch, place = _place(length)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    lane = tl.arange(0, HALF)[None, :]
    live = head < COUNT
    mask = live & (lane < R_HALF)
    x += batch * x_batch + place * x_token + head * x_head
    out += batch * out_batch + place * out_token + head * out_head
    a = tl.load(x + lane, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + R_HALF + lane, mask=mask, other=0.0).to(tl.float32)
    cos += batch * cos_batch + place * cos_token
    sin += batch * sin_batch + place * sin_token
    first, second = _turned(a, b, cos, sin, lane, R_HALF, INVERSE)
    tl.store(out + lane, first.to(out.dtype.element_ty), mask=mask)
    tl.store(out + R_HALF + lane, second.to(out.dtype.element_ty), mask=mask)
    if REST > 0:
        last = 2 * R_HALF + tl.arange(0, REST)[None, :]
        within = live & (last < SIZE)
        tl.store(out + last, tl.load(x + last, mask=within, other=0.0), mask=within)


@triton.jit  # type: ignore[untyped-decorator]
def _factors(weight, lane, inside, GEMMA: tl.constexpr):  # type: ignore[no-untyped-def]
    value = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    if GEMMA:
        value += 1.0
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _normed(values, scale, factors, like, GEMMA: tl.constexpr):  # type: ignore[no-untyped-def]
    values *= scale
    if not GEMMA:
        values = values.to(like.dtype.element_ty).to(tl.float32)
    return values * factors


@triton.jit(do_not_specialize=["length"])  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    cos,
    sin,
    y,
    rstd,
    length,
    x_batch,
    x_token,
    x_head,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    eps,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    R_HALF: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    GEMMA: tl.constexpr,
):
    token, batch, place = _place(length)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    head = heads[:, None]
    live = head < COUNT
    x += batch * x_batch + place * x_token
    y += (token * COUNT + head) * SIZE
    squares = tl.zeros([HEADS], dtype=tl.float32)
    if R_HALF > 0:
        lane = tl.arange(0, HALF)[None, :]
        inside = lane < R_HALF
        mask = live & inside
        a = tl.load(x + head * x_head + lane, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + head * x_head + R_HALF + lane, mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(a * a + b * b, axis=1)
    if REST > 0:
        last = 2 * R_HALF + tl.arange(0, REST)[None, :]
        within = last < SIZE
        c = tl.load(x + head * x_head + last, mask=live & within, other=0.0).to(tl.float32)
        squares += tl.sum(c * c, axis=1)
    scales = tl.rsqrt(squares / SIZE + eps)
    tl.store(rstd + token * COUNT + heads, scales, mask=heads < COUNT)
    scale = scales[:, None]
    if R_HALF > 0:
        a = _normed(a, scale, _factors(weight, lane, inside, GEMMA), x, GEMMA)
        b = _normed(b, scale, _factors(weight + R_HALF, lane, inside, GEMMA), x, GEMMA)
        cos += batch * cos_batch + place * cos_token
        sin += batch * sin_batch + place * sin_token
        first, second = _turned(a, b, cos, sin, lane, R_HALF, False)
        tl.store(y + lane, first.to(y.dtype.element_ty), mask=mask)
        tl.store(y + R_HALF + lane, second.to(y.dtype.element_ty), mask=mask)
    if REST > 0:
        c = _normed(c, scale, _factors(weight, last, within, GEMMA), x, GEMMA)
        tl.store(y + last, c.to(y.dtype.element_ty), mask=live & within)


@triton.jit(do_not_specialize=["length"])  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def]
    g,
    x,
    weight,
    rstd,
    cos,
    sin,
    dx,
    length,
    g_batch,
    g_token,
    g_head,
    x_batch,
    x_token,
    x_head,
    dx_batch,
    dx_token,
    dx_head,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    R_HALF: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    GEMMA: tl.constexpr,
):
    token, batch, place = _place(length)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    head = heads[:, None]
    live = head < COUNT
    g += batch * g_batch + place * g_token
    x += batch * x_batch + place * x_token
    dx += batch * dx_batch + place * dx_token + head * dx_head
    scale = tl.load(rstd + token * COUNT + heads, mask=heads < COUNT, other=0.0).to(tl.float32)[:, None]
    products = tl.zeros([HEADS], dtype=tl.float32)
    if R_HALF > 0:
        lane = tl.arange(0, HALF)[None, :]
        inside = lane < R_HALF
        mask = live & inside
        a = tl.load(g + head * g_head + lane, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(g + head * g_head + R_HALF + lane, mask=mask, other=0.0).to(tl.float32)
        h_a = tl.load(x + head * x_head + lane, mask=mask, other=0.0).to(tl.float32) * scale
        h_b = tl.load(x + head * x_head + R_HALF + lane, mask=mask, other=0.0).to(tl.float32) * scale
        cos += batch * cos_batch + place * cos_token
        sin += batch * sin_batch + place * sin_token
        first, second = _turned(a, b, cos, sin, lane, R_HALF, True)
        first *= _factors(weight, lane, inside, GEMMA)
        second *= _factors(weight + R_HALF, lane, inside, GEMMA)
        products += tl.sum(first * h_a + second * h_b, axis=1)
    if REST > 0:
        last = 2 * R_HALF + tl.arange(0, REST)[None, :]
        within = last < SIZE
        c = tl.load(g + head * g_head + last, mask=live & within, other=0.0).to(tl.float32)
        h_c = tl.load(x + head * x_head + last, mask=live & within, other=0.0).to(tl.float32) * scale
        c *= _factors(weight, last, within, GEMMA)
        products += tl.sum(c * h_c, axis=1)
    mean = (products / SIZE)[:, None]
    if R_HALF > 0:
        tl.store(dx + lane, ((first - h_a * mean) * scale).to(dx.dtype.element_ty), mask=mask)
        tl.store(dx + R_HALF + lane, ((second - h_b * mean) * scale).to(dx.dtype.element_ty), mask=mask)
    if REST > 0:
        tl.store(dx + last, ((c - h_c * mean) * scale).to(dx.dtype.element_ty), mask=live & within)


@triton.jit(do_not_specialize=["length", "tokens"])  # type: ignore[untyped-decorator]
def _back_scaled_kernel(  # type: ignore[no-untyped-def]
    g,
    y,
    c,
    cos,
    sin,
    out,
    sums,
    length,
    tokens,
    g_batch,
    g_token,
    g_head,
    y_batch,
    y_token,
    y_head,
    out_batch,
    out_token,
    out_head,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    R_HALF: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    STRIP: tl.constexpr,
):
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    live = head < COUNT
    sums += (tl.program_id(0).to(tl.int64) * COUNT + head) * SIZE
    if R_HALF > 0:
        lane = tl.arange(0, HALF)[None, :]
        inside = lane < R_HALF
        mask = live & inside
        c_a = tl.load(c + head * SIZE + lane, mask=mask, other=0.0).to(tl.float32)
        c_b = tl.load(c + head * SIZE + R_HALF + lane, mask=mask, other=0.0).to(tl.float32)
        sum_a = tl.zeros([HEADS, HALF], tl.float32)
        sum_b = tl.zeros([HEADS, HALF], tl.float32)
    if REST > 0:
        last = 2 * R_HALF + tl.arange(0, REST)[None, :]
        within = live & (last < SIZE)
        c_rest = tl.load(c + head * SIZE + last, mask=within, other=0.0).to(tl.float32)
        sum_rest = tl.zeros([HEADS, REST], tl.float32)
    for step in range(STRIP):
        place_in_all = tl.program_id(0) * STRIP + step
        there = place_in_all + tl.zeros([1, 1], tl.int32) < tokens
        # Beyond the last token its angles are read again, and nothing else is.
        token = tl.minimum(place_in_all, tokens - 1)
        batch, place = (token // length).to(tl.int64), (token % length).to(tl.int64)
        from_g = g + batch * g_batch + place * g_token + head * g_head
        from_y = y + batch * y_batch + place * y_token + head * y_head
        to = out + batch * out_batch + place * out_token + head * out_head
        if R_HALF > 0:
            now = mask & there
            a = tl.load(from_g + lane, mask=now, other=0.0).to(tl.float32)
            b = tl.load(from_g + R_HALF + lane, mask=now, other=0.0).to(tl.float32)
            y_a = tl.load(from_y + lane, mask=now, other=0.0).to(tl.float32)
            y_b = tl.load(from_y + R_HALF + lane, mask=now, other=0.0).to(tl.float32)
            cos_a, cos_b = _halves(cos + batch * cos_batch + place * cos_token, lane, R_HALF)
            sin_a, sin_b = _halves(sin + batch * sin_batch + place * sin_token, lane, R_HALF)
            first, second = _by_angles(a, b, cos_a, cos_b, sin_a, sin_b, True)
            # Turned back, y over what cos and sin carry is what it was before.
            y_a *= 1.0 / tl.where(inside, cos_a * cos_a + sin_a * sin_a, 1.0)
            y_b *= 1.0 / tl.where(inside, cos_b * cos_b + sin_b * sin_b, 1.0)
            y_a, y_b = _by_angles(y_a, y_b, cos_a, cos_b, sin_a, sin_b, True)
            sum_a += first * y_a
            sum_b += second * y_b
            tl.store(to + lane, (first * c_a).to(out.dtype.element_ty), mask=now)
            tl.store(to + R_HALF + lane, (second * c_b).to(out.dtype.element_ty), mask=now)
        if REST > 0:
            now = within & there
            grad = tl.load(from_g + last, mask=now, other=0.0).to(tl.float32)
            sum_rest += grad * tl.load(from_y + last, mask=now, other=0.0).to(tl.float32)
            tl.store(to + last, (grad * c_rest).to(out.dtype.element_ty), mask=now)
    if R_HALF > 0:
        tl.store(sums + lane, sum_a, mask=mask)
        tl.store(sums + R_HALF + lane, sum_b, mask=mask)
    if REST > 0:
        tl.store(sums + last, sum_rest, mask=within)


def _shape(x: Tensor, rotated: int, tile: int, per_thread: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and the constants of one program. A tile holds at least a value a thread."""
    batch, length, count, size = x.shape
    block = max(32, triton.next_power_of_2(rotated // 2 or size))
    heads = min(max(1, tile // block), triton.next_power_of_2(count))
    warps = min(16, max(1, heads * block // (32 * per_thread)))
    constants = {"COUNT": count, "R_HALF": rotated // 2, "HEADS": heads, "HALF": block, "num_warps": warps}
    return (batch * length, triton.cdiv(count, heads)), constants


def _rest(size: int, rotated: int) -> int:
    """The tile's width for what is not rotated; 0: there is none."""
    return max(32, triton.next_power_of_2(size - rotated)) if rotated < size else 0


def _strides(t: Tensor | None) -> tuple[int, int]:
    """Of cos or sin over the batch, which may share them, and over tokens."""
    return (0, 0) if t is None else (t.stride(0) if len(t) > 1 else 0, t.stride(1))


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    inverse: bool = False,
    out: Tensor | None = None,
    tile: int = TILE,
    per_thread: int = PER_THREAD,
) -> Tensor:
    """`rotary.rotate_torch` in one kernel; all tensors on one CUDA device, last dimensions contiguous.

    `tile` and `per_thread` (powers of two) are for measuring and change no value.
    """
    target = x if out is None else out
    if not x.numel():
        return target
    grid, constants = _shape(x, cos.shape[2], tile, per_thread)
    with torch.cuda.device_of(x):
        _rotate_kernel[grid](
            x,
            cos,
            sin,
            target,
            x.shape[1],
            *x.stride()[:3],
            *target.stride()[:3],
            *_strides(cos),
            *_strides(sin),
            SIZE=x.shape[3],
            REST=0 if out is None else _rest(x.shape[3], cos.shape[2]),
            INVERSE=inverse,
            **constants,
        )
    return target


def norm_rotate(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    eps: float,
    style: Style = "llama",
    tile: int = TILE,
    per_thread: int = PER_THREAD,
) -> tuple[Tensor, Tensor]:
    """`rotary.norm_rotate_torch` in one kernel; otherwise as `rotate` here."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)
    if not x.numel():
        return y, rstd
    rotated = 0 if cos is None else cos.shape[2]
    grid, constants = _shape(x, rotated, tile, per_thread)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](
            x,
            weight,
            weight if cos is None else cos,
            weight if sin is None else sin,
            y,
            rstd,
            x.shape[1],
            *x.stride()[:3],
            *_strides(cos),
            *_strides(sin),
            eps,
            SIZE=x.shape[3],
            REST=_rest(x.shape[3], rotated),
            GEMMA=style == "gemma",
            **constants,
        )
    return y, rstd


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
    tile: int = TILE,
    per_thread: int = PER_THREAD,
) -> Tensor:
    """`rotary.norm_rotate_backward_torch` in one kernel; otherwise as `rotate` here."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if not x.numel():
        return dx
    rotated = 0 if cos is None else cos.shape[2]
    grid, constants = _shape(x, rotated, tile, per_thread)
    with torch.cuda.device_of(x):
        _backward_kernel[grid](
            g,
            x,
            weight,
            rstd,
            weight if cos is None else cos,
            weight if sin is None else sin,
            dx,
            x.shape[1],
            *g.stride()[:3],
            *x.stride()[:3],
            *dx.stride()[:3],
            *_strides(cos),
            *_strides(sin),
            SIZE=x.shape[3],
            REST=_rest(x.shape[3], rotated),
            GEMMA=style == "gemma",
            **constants,
        )
    return dx


def rotate_back_scaled(
    g: Tensor,
    y: Tensor,
    c: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    out: Tensor,
    tile: int = TILE,
    per_thread: int = PER_THREAD,
    strip: int = STRIP,
) -> Tensor:
    """`rotary.rotate_back_scaled_torch` in one kernel and a small sum; otherwise as `rotate` here."""
    batch, length, count, size = g.shape
    tokens = batch * length
    strips = triton.cdiv(tokens, strip)
    sums = torch.empty(strips, count * size, dtype=torch.float32, device=g.device)
    if g.numel():
        rotated = 0 if cos is None else cos.shape[2]
        (_, groups), constants = _shape(g, rotated, tile, per_thread)
        with torch.cuda.device_of(g):
            _back_scaled_kernel[(strips, groups)](
                g,
                y,
                c.contiguous(),
                c if cos is None else cos,
                c if sin is None else sin,
                out,
                sums,
                length,
                tokens,
                *g.stride()[:3],
                *y.stride()[:3],
                *out.stride()[:3],
                *_strides(cos),
                *_strides(sin),
                SIZE=size,
                REST=_rest(size, rotated),
                STRIP=strip,
                **constants,
            )
    return sums.sum(0)
