"""The norms of `norm.py` for CUDA, in Triton: one launch and one pass over memory each.

Tensors of M x d values that pass through memory, and at M 8192, d 4096 in 16 bits (67 MB each) the time at 3.0 TB/s:

    rms_norm             x -> y                  2        45 us
    add_rms_norm         x, y -> s, n            4        89 us
    rms_norm_backward    g, x or y, add -> dx    4 (3)    89 us (67)

beside rstd (4 M bytes) and the weight, which stays in the caches. A program owns whole rows, so sums need no second
launch and are the same every time. Rows of up to `WHOLE` columns lie in registers; longer ones are read twice, the
second time from the cache where that still has them.

Every stored value depends on what was loaded from the same place, so storage may be shared with an input.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found]
import triton.language as tl  # type: ignore[import-untyped,import-not-found]
from torch import Tensor

from deltaw.kernels.norm import Style

#: Values of a program's tile: as many rows as fit, at least one.
TILE = 4096
#: Longest row held in registers.
WHOLE = 16384
#: Columns of a step where rows are longer.
STEP = 8192
#: Values of a tile for each thread; up to `MOST_WARPS` warps.
PER_THREAD = 16
MOST_WARPS = 16


# The kernels' arguments carry no annotations: the compiler would look up their names.
@triton.jit  # type: ignore[untyped-decorator]
def _load(base, row, stride, column, mask):  # type: ignore[no-untyped-def]
    return tl.load(base + row * stride + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _factors(weight, column, COLUMNS: tl.constexpr, GEMMA: tl.constexpr):  # type: ignore[no-untyped-def]
    # Beyond the row 1, so that it may be divided by.
    value = tl.load(weight + column, mask=column < COLUMNS, other=1.0).to(tl.float32)
    if GEMMA:
        value += 1.0
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _summed(  # type: ignore[no-untyped-def]
    x,
    y,
    factor,
    s,
    row,
    column,
    mask,
    x_row,
    y_row,
    s_row,
    COLUMNS: tl.constexpr,
    ADD: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """A tile of what is to be normalised; where it is a sum, written and read as rounded."""
    values = _load(x, row, x_row, column, mask)
    if ADD:
        other = _load(y, row, y_row, column, mask)
        if FACTOR:
            other *= _factors(factor, column, COLUMNS, False)
        rounded = (values + other).to(s.dtype.element_ty)
        tl.store(s + row * s_row + column, rounded, mask=mask)
        values = rounded.to(tl.float32)
    return values


@triton.jit  # type: ignore[untyped-decorator]
def _write_normed(  # type: ignore[no-untyped-def]
    values, scale, weight, n, row, column, mask, n_row, COLUMNS: tl.constexpr, GEMMA: tl.constexpr
):
    values *= scale[:, None]
    if not GEMMA:
        values = values.to(n.dtype.element_ty).to(tl.float32)
    values *= _factors(weight, column, COLUMNS, GEMMA)
    tl.store(n + row * n_row + column, values.to(n.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    x,
    y,
    factor,
    weight,
    s,
    n,
    rstd,
    rows,
    x_row,
    y_row,
    s_row,
    n_row,
    eps,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    FACTOR: tl.constexpr,
    GEMMA: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (place < rows)[:, None]
    row = place[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    if BLOCK >= COLUMNS:
        mask = live & (column < COLUMNS)
        values = _summed(x, y, factor, s, row, column, mask, x_row, y_row, s_row, COLUMNS, ADD, FACTOR)
        scale = tl.rsqrt(tl.sum(values * values, axis=1) / COLUMNS + eps)
        _write_normed(values, scale, weight, n, row, column, mask, n_row, COLUMNS, GEMMA)
    else:
        squares = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for start in range(0, COLUMNS, BLOCK):
            mask = live & (start + column < COLUMNS)
            values = _summed(x, y, factor, s, row, start + column, mask, x_row, y_row, s_row, COLUMNS, ADD, FACTOR)
            squares += values * values
        scale = tl.rsqrt(tl.sum(squares, axis=1) / COLUMNS + eps)
        if ADD:
            # Other threads may read the sum than wrote it.
            tl.debug_barrier()
        for start in range(0, COLUMNS, BLOCK):
            mask = live & (start + column < COLUMNS)
            # Without a sum, s is x.
            values = _load(s, row, s_row, start + column, mask)
            _write_normed(values, scale, weight, n, row, start + column, mask, n_row, COLUMNS, GEMMA)
    tl.store(rstd + place, scale, mask=place < rows)


@triton.jit  # type: ignore[untyped-decorator]
def _slopes(  # type: ignore[no-untyped-def]
    g, x, weight, scale, row, column, mask, g_row, x_row,
    COLUMNS: tl.constexpr, GEMMA: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """A tile of u and of h."""
    factor = _factors(weight, column, COLUMNS, GEMMA)
    u = _load(g, row, g_row, column, mask) * factor
    h = _load(x, row, x_row, column, mask)
    if NORMED:
        h /= factor
    else:
        h *= scale[:, None]
    return u, h


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def]
    g,
    x,
    weight,
    rstd,
    add,
    out,
    rows,
    g_row,
    x_row,
    add_row,
    out_row,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    GEMMA: tl.constexpr,
    NORMED: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (place < rows)[:, None]
    row = place[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    scale = tl.load(rstd + place, mask=place < rows, other=0.0).to(tl.float32)
    if BLOCK >= COLUMNS:
        mask = live & (column < COLUMNS)
        u, h = _slopes(g, x, weight, scale, row, column, mask, g_row, x_row, COLUMNS, GEMMA, NORMED)
        if ADD:
            # Before the sum, which all loads then wait for together.
            other = tl.load(add + row * add_row + column, mask=mask, other=0.0)
        dx = (u - h * (tl.sum(u * h, axis=1) / COLUMNS)[:, None]) * scale[:, None]
        if ADD:
            dx += other.to(tl.float32)
        tl.store(out + row * out_row + column, dx.to(out.dtype.element_ty), mask=mask)
    else:
        products = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for start in range(0, COLUMNS, BLOCK):
            mask = live & (start + column < COLUMNS)
            u, h = _slopes(g, x, weight, scale, row, start + column, mask, g_row, x_row, COLUMNS, GEMMA, NORMED)
            products += u * h
        mean = (tl.sum(products, axis=1) / COLUMNS)[:, None]
        for start in range(0, COLUMNS, BLOCK):
            mask = live & (start + column < COLUMNS)
            u, h = _slopes(g, x, weight, scale, row, start + column, mask, g_row, x_row, COLUMNS, GEMMA, NORMED)
            dx = (u - h * mean) * scale[:, None]
            if ADD:
                dx += _load(add, row, add_row, start + column, mask)
            tl.store(out + row * out_row + start + column, dx.to(out.dtype.element_ty), mask=mask)


def _shape(rows: int, columns: int, tile: int, per_thread: int) -> tuple[int, dict[str, int]]:
    """How many programs, and the constants of one. A tile holds at least a value a thread."""
    block = max(32, triton.next_power_of_2(columns)) if columns <= WHOLE else STEP
    high = min(max(1, tile // block), triton.next_power_of_2(rows))
    warps = min(MOST_WARPS, max(1, high * block // (32 * per_thread)))
    return triton.cdiv(rows, high), {"COLUMNS": columns, "ROWS": high, "BLOCK": block, "num_warps": warps}


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    style: Style = "llama",
    out: Tensor | None = None,
    tile: int = TILE,
    per_thread: int = PER_THREAD,
) -> tuple[Tensor, Tensor]:
    """`norm.rms_norm_torch` in one kernel; all tensors on one CUDA device, rows contiguous.

    `tile` and `per_thread` (powers of two) are for measuring and change no value's meaning, at most the sums' order.
    """
    n = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    return n, _forward(x, None, None, weight, x, n, eps, style, tile, per_thread)


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
    tile: int = TILE,
    per_thread: int = PER_THREAD,
) -> tuple[Tensor, Tensor, Tensor]:
    """`norm.add_rms_norm_torch` in one kernel; otherwise as `rms_norm` here."""
    s = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    n = torch.empty(x.shape, dtype=x.dtype, device=x.device) if norm_out is None else norm_out
    return s, n, _forward(x, y, factor, weight, s, n, eps, style, tile, per_thread)


def _forward(
    x: Tensor,
    y: Tensor | None,
    factor: Tensor | None,
    weight: Tensor,
    s: Tensor,
    n: Tensor,
    eps: float,
    style: Style,
    tile: int,
    per_thread: int,
) -> Tensor:
    rstd = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if not len(x):
        return rstd
    programs, constants = _shape(x.shape[0], x.shape[1], tile, per_thread)
    second = x if y is None else y
    with torch.cuda.device_of(x):
        _forward_kernel[(programs,)](
            x,
            second,
            weight if factor is None else factor,
            weight,
            s,
            n,
            rstd,
            len(x),
            x.stride(0),
            second.stride(0),
            s.stride(0),
            n.stride(0),
            eps,
            ADD=y is not None,
            FACTOR=factor is not None,
            GEMMA=style == "gemma",
            **constants,
        )
    return rstd


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
    tile: int = TILE,
    per_thread: int = PER_THREAD,
) -> Tensor:
    """`norm.rms_norm_backward_torch` in one kernel; otherwise as `rms_norm` here."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if not len(x):
        return dx
    programs, constants = _shape(x.shape[0], x.shape[1], tile, per_thread)
    other = g if add is None else add
    with torch.cuda.device_of(x):
        _backward_kernel[(programs,)](
            g,
            x,
            weight,
            rstd,
            other,
            dx,
            len(x),
            g.stride(0),
            x.stride(0),
            other.stride(0),
            dx.stride(0),
            ADD=add is not None,
            GEMMA=style == "gemma",
            NORMED=normed,
            **constants,
        )
    return dx
