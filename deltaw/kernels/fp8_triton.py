"""`fp8.py`'s quantisation for CUDA, in Triton: the torch functions' bits, in one or two launches.

Results are stored as uint8. Where the processor converts to e4m3 itself (compute capability 8.9 and up) one instruction
does; elsewhere, and in Triton's interpreter, whose own conversion does not round to nearest even, integer arithmetic
makes the same bits. A largest magnitude is taken over bit patterns as integers, whose order is that of the magnitudes,
with infinity and NaN, which a maximum of floats would drop, above all others; and so atomics can take it. Scales come
from one product and one true division, to equal torch's on every device.

Programs of `quantize_rows` take a row each; a row longer than `WHOLE_ROW` is read twice, the second time from the
cache. Programs over a matrix take tiles; a transposed one changes its layout as bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton  # type: ignore[import-untyped,import-not-found]
import triton.language as tl  # type: ignore[import-untyped,import-not-found]
from torch import Tensor

from deltaw.kernels.fp8 import Room, whole
from deltaw.kernels.nf4 import NESTED_BLOCK, NestedScales

#: The longest row that a program holds in registers.
WHOLE_ROW = 32768

#: Columns at a time of longer rows.
LOOP_COLUMNS = 4096

#: Values of a row for each thread, which sets a program's warps (at most 32).
VALUES_PER_THREAD = 32

#: Rows and columns of a tile, and of how many tiles below each other one program takes the largest magnitudes. There
#: are 1 / columns + 1 / (rows tiles) atomics a value.
ABSMAX_TILE = (32, 256)
ABSMAX_TILES = 4

#: Rows and columns of a tile that is quantised; both are also the bytes of a line that it writes.
QUANTIZE_TILE = (64, 128)

#: Warps of the programs over tiles.
TILE_WARPS = 8

_Source = tuple[tuple[Tensor | int, ...], int, dict[str, int]]


# The kernels' arguments carry no annotations: the compiler would look up their names.
@triton.jit  # type: ignore[untyped-decorator]
def _e4m3(v, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits of float32 values, to nearest even, saturating, as uint8."""
    if NATIVE:
        bits = v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        raw = v.to(tl.int32, bitcast=True)
        size = raw & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - ((127 - 7) << 3)
        # Below 2^-6 steps are 2^-9, which is what adding 2^14 rounds to.
        small = (tl.abs(v) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        found = tl.minimum(tl.where(size < 0x3C800000, small, normal), 0x7E)
        found = tl.where(size > 0x7F800000, 0x7F, found)
        bits = (((raw >> 24) & 0x80) | found).to(tl.uint8)
    return bits


@triton.jit  # type: ignore[untyped-decorator]
def _value(bits, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The float32 values of e4m3's bits; 480 in the place of a NaN."""
    if NATIVE:
        value = bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        size = bits.to(tl.int32) & 0x7F
        normal = ((size << 20) + ((127 - 7) << 23)).to(tl.float32, bitcast=True)
        value = tl.where(size < 8, size * 0.001953125, normal)
        value = tl.where(bits >= 0x80, -value, value)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def _magnitude(v):  # type: ignore[no-untyped-def]
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit  # type: ignore[untyped-decorator]
def _scale(largest):  # type: ignore[no-untyped-def]
    """The scale that belongs to the bits of a largest magnitude."""
    scale = tl.maximum(largest.to(tl.float32, bitcast=True) * (1.0 / 448.0), 1.1754943508222875e-38)
    scale = tl.where(largest == 0, 1.0, scale)
    return tl.where(largest >= 0x7F800000, float("nan"), scale)


@triton.jit  # type: ignore[untyped-decorator]
def _rows_kernel(  # type: ignore[no-untyped-def]
    x, stride, behind, behind_stride, factor, q, wide, scale, K, P,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, BEHIND: tl.constexpr, FACTOR: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    q += row * wide
    most = 0
    if BEHIND:
        more = tl.arange(0, BEHIND)
        c = tl.load(behind + row * behind_stride + more, mask=more < P, other=0.0).to(tl.float32)
        if FACTOR:
            c *= tl.load(factor + more, mask=more < P, other=0.0)
        most = tl.max(_magnitude(c), axis=0)
    if WHOLE:
        at = tl.arange(0, BLOCK)
        v = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
        found = _scale(tl.maximum(tl.max(_magnitude(v), axis=0), most))
        tl.store(scale + row, found)
        inverse = tl.math.div_rn(1.0, found)
        tl.store(q + at, _e4m3(v * inverse, NATIVE), mask=at < K)
    else:
        largest = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(0, K, BLOCK):
            at = start + tl.arange(0, BLOCK)
            v = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, _magnitude(v))
        found = _scale(tl.maximum(tl.max(largest, axis=0), most))
        tl.store(scale + row, found)
        inverse = tl.math.div_rn(1.0, found)
        for start in range(0, K, BLOCK):
            at = start + tl.arange(0, BLOCK)
            v = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
            tl.store(q + at, _e4m3(v * inverse, NATIVE), mask=at < K)
    if BEHIND:
        tl.store(q + K + more, _e4m3(c * inverse, NATIVE), mask=more < wide - K)


@triton.jit  # type: ignore[untyped-decorator]
def _columns_kernel(  # type: ignore[no-untyped-def]
    A, A_row, scale, q, q_row, factor, K, BLOCK: tl.constexpr, NATIVE: tl.constexpr
):
    p = tl.program_id(0)
    largest = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        a = tl.load(A + p * A_row + at, mask=at < K, other=0.0).to(tl.float32)
        a *= tl.math.div_rn(1.0, tl.load(scale + at, mask=at < K, other=1.0))
        largest = tl.maximum(largest, _magnitude(a))
    found = _scale(tl.max(largest, axis=0))
    tl.store(factor + p, found)
    inverse = tl.math.div_rn(1.0, found)
    for start in range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        a = tl.load(A + p * A_row + at, mask=at < K, other=0.0).to(tl.float32)
        a *= tl.math.div_rn(1.0, tl.load(scale + at, mask=at < K, other=1.0))
        tl.store(q + at.to(tl.int64) * q_row + p, _e4m3(a * inverse, NATIVE), mask=at < K)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    W, stride, code, absmax, map8, absmax2, offset, n, k, N, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHARE: tl.constexpr, BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows n, columns k on of W, dense (SHARE 0) or in 4 bits with a scale for every SHARE columns; 0 outside."""
    if SHARE == 0:
        at = k + tl.arange(0, COLUMNS)
        live = (n[:, None] < N) & (at[None, :] < K)
        values = tl.load(W + n[:, None] * stride + at[None, :], mask=live, other=0.0).to(tl.float32)
    else:
        group = k + tl.arange(0, COLUMNS // SHARE) * SHARE
        live = (n[:, None] < N) & (group[None, :] < K)
        start = n[:, None] * K + group[None, :]
        block = start // BLOCK_SIZE
        scale = tl.load(absmax + block, mask=live, other=0)
        if NESTED:
            mapped = tl.load(map8 + scale.to(tl.int32))
            scale = mapped * tl.load(absmax2 + block // NESTED_BLOCK, mask=live, other=0.0) + tl.load(offset)
        scale = tl.where(live, scale, 0.0)
        byte = (start // 2)[:, :, None] + tl.arange(0, SHARE // 2)[None, None, :]
        pair = tl.load(W + byte, mask=live[:, :, None], other=0).to(tl.int32)
        high = tl.load(code + (pair >> 4)) * scale[:, :, None]
        low = tl.load(code + (pair & 15)) * scale[:, :, None]
        values = tl.reshape(tl.interleave(high, low), (ROWS, COLUMNS))
    return values


@triton.jit  # type: ignore[untyped-decorator]
def _absmax_kernel(  # type: ignore[no-untyped-def]
    W, stride, code, absmax, map8, absmax2, offset, row_bits, column_bits, N, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, SHARE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * COLUMNS
    below = tl.zeros([COLUMNS], dtype=tl.int32)
    for i in range(TILES):
        n = (tl.program_id(1).to(tl.int64) * TILES + i) * ROWS + tl.arange(0, ROWS)
        w = _tile(
            W, stride, code, absmax, map8, absmax2, offset, n, k, N, K,
            ROWS, COLUMNS, SHARE, BLOCK_SIZE, NESTED, NESTED_BLOCK,
        )  # fmt: skip
        bits = _magnitude(w)
        tl.atomic_max(row_bits + n, tl.max(bits, axis=1), mask=n < N, sem="relaxed")
        below = tl.maximum(below, tl.max(bits, axis=0))
    at = k + tl.arange(0, COLUMNS)
    tl.atomic_max(column_bits + at, below, mask=at < K, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def _quantize_kernel(  # type: ignore[no-untyped-def]
    W, stride, code, absmax, map8, absmax2, offset, row_bits, column_bits, q, q_stride, row_scale, qT, qT_stride,
    column_scale, lost, N, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHARE: tl.constexpr, BLOCK_SIZE: tl.constexpr, NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr, LOST: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * COLUMNS
    n = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    w = _tile(
        W, stride, code, absmax, map8, absmax2, offset, n, k, N, K,
        ROWS, COLUMNS, SHARE, BLOCK_SIZE, NESTED, NESTED_BLOCK,
    )  # fmt: skip
    at = (k + tl.arange(0, COLUMNS)).to(tl.int64)
    of_rows = _scale(tl.load(row_bits + n, mask=n < N, other=0))
    of_columns = _scale(tl.load(column_bits + at, mask=at < K, other=0))
    if tl.program_id(0) == 0:
        tl.store(row_scale + n, of_rows, mask=n < N)
    if tl.program_id(1) == 0:
        tl.store(column_scale + at, of_columns, mask=at < K)
    live = (n[:, None] < N) & (at[None, :] < K)
    by_rows = _e4m3(w * tl.math.div_rn(1.0, of_rows)[:, None], NATIVE)
    tl.store(q + n[:, None] * q_stride + at[None, :], by_rows, mask=live)
    if LOST:
        left = w - _value(by_rows, NATIVE) * of_rows[:, None]
        tl.store(lost + n[:, None] * K + at[None, :], left.to(lost.dtype.element_ty), mask=live)
    by_columns = _e4m3(w * tl.math.div_rn(1.0, of_columns)[None, :], NATIVE)
    live = (at[:, None] < K) & (n[None, :] < N)
    tl.store(qT + at[:, None] * qT_stride + n[None, :], tl.trans(by_columns), mask=live)


def _native(tensor: Tensor) -> bool:
    return (
        tensor.is_cuda and torch.version.cuda is not None and torch.cuda.get_device_capability(tensor.device) >= (8, 9)
    )


def _by_row(columns: int) -> dict[str, int]:
    """A block that holds a row, the warps for it, and no product fused with the addition that rounds small values."""
    block = max(16, triton.next_power_of_2(columns))
    warps = min(32, max(1, block // (32 * VALUES_PER_THREAD)))
    return {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": False}


def _outputs(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    q = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device)
    return q, torch.empty(rows, dtype=torch.float32, device=device)


def quantize_rows(
    x: Tensor,
    *,
    behind: Tensor | None = None,
    factor: Tensor | None = None,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`fp8.quantize_rows_torch` in one kernel; `block`, a power of two, is how many columns a program takes at once."""
    rows, columns = x.shape
    more = 0 if behind is None else behind.shape[1]
    behind = x if behind is None else behind
    wide = whole(columns + more) if more else columns
    q, scale = _outputs(rows, wide, x.device)
    size = _by_row(block or (LOOP_COLUMNS if columns > WHOLE_ROW else columns))
    if rows:
        with torch.cuda.device_of(x):
            _rows_kernel[(rows,)](
                x,
                x.stride(0),
                behind,
                behind.stride(0),
                scale if factor is None else factor,
                q.view(torch.uint8),
                wide,
                scale,
                columns,
                more,
                **size,
                WHOLE=columns <= size["BLOCK"],
                BEHIND=max(16, triton.next_power_of_2(wide - columns)) if more else 0,
                FACTOR=factor is not None,
                NATIVE=_native(x),
            )
    return q, scale


def write_columns(A: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """`fp8.write_columns_torch` in one kernel, a program for each column."""
    factor = torch.empty(len(A), dtype=torch.float32, device=A.device)
    if A.numel():
        block = min(LOOP_COLUMNS, max(16, triton.next_power_of_2(A.shape[1])))
        with torch.cuda.device_of(A):
            _columns_kernel[(len(A),)](
                A, A.stride(0), scale, q.view(torch.uint8), q.stride(0), factor, A.shape[1],
                BLOCK=block, NATIVE=_native(A), num_warps=max(1, block // 1024), enable_fp_fusion=False,
            )  # fmt: skip
    return factor


def quantize_rows_and_columns(
    parts: Sequence[Tensor],
    *,
    spread: Tensor | None = None,
    room: Room = (0, 0),
    lost: Tensor | None = None,
    absmax_tile: tuple[int, int] = ABSMAX_TILE,
    tile: tuple[int, int] = QUANTIZE_TILE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fp8.quantize_rows_and_columns_torch` in two kernels a part; tiles are powers of two, at least 16 by 16."""
    return _by_tiles(_dense(parts), parts[0].shape[1], absmax_tile, tile, spread, room, lost)


def quantize_nf4(
    parts: Sequence[tuple[Tensor, Tensor | NestedScales, int, int]],
    code: Tensor,
    columns: int,
    *,
    spread: Tensor | None = None,
    room: Room = (0, 0),
    lost: Tensor | None = None,
    absmax_tile: tuple[int, int] = ABSMAX_TILE,
    tile: tuple[int, int] = QUANTIZE_TILE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of matrices in 4 bits, each (codes, scales, rows, block size), with an even number of columns."""
    sources = _packed(parts, code, columns, min(tile[1], absmax_tile[1]))
    return _by_tiles(sources, columns, absmax_tile, tile, spread, room, lost)


def _dense(parts: Sequence[Tensor]) -> list[_Source]:
    return [((W, W.stride(0), *(W,) * 5), W.shape[0], {"BLOCK_SIZE": 0, "NESTED": False, "SHARE": 0}) for W in parts]


def _packed(
    parts: Sequence[tuple[Tensor, Tensor | NestedScales, int, int]], code: Tensor, columns: int, widest: int
) -> list[_Source]:
    """Of weights in 4 bits, for tiles of at least `widest` columns."""
    sources: list[_Source] = []
    for codes, scales, rows, block_size in parts:
        nested = isinstance(scales, NestedScales)
        given = (
            (scales.q, scales.code, scales.absmax, scales.offset) if isinstance(scales, NestedScales) else (scales,) * 4
        )
        tensors = [part.contiguous().to(codes.device) for part in given]
        # Columns that share a scale in every row, wherever blocks begin: a power of two that divides both.
        share = min(columns & -columns, block_size, widest)
        options = {"BLOCK_SIZE": block_size, "NESTED": nested, "SHARE": share}
        sources.append(((codes.contiguous(), 0, code, *tensors), rows, options))
    return sources


def _by_tiles(
    sources: Sequence[_Source],
    columns: int,
    absmax_tile: tuple[int, int],
    tile: tuple[int, int],
    spread: Tensor | None,
    room: Room,
    lost: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both forms of matrices one below the other, each (what `_tile` reads it from, rows, what `_tile` must know)."""
    all_rows = sum(rows for _, rows, _ in sources)
    first = sources[0][0][0]
    assert isinstance(first, Tensor)
    q, row_scale = _outputs(all_rows, columns + room[0], first.device)
    qT, column_scale = _outputs(columns, all_rows + room[1], first.device)
    q, qT = q[:, :columns], qT[:, :all_rows]
    bits = torch.zeros(all_rows + columns, dtype=torch.int32, device=first.device)
    shared = {"NESTED_BLOCK": NESTED_BLOCK, "num_warps": TILE_WARPS, "enable_fp_fusion": False}
    below = [0]
    for _, rows, _ in sources:
        below.append(below[-1] + rows)
    with torch.cuda.device_of(first):
        for (source, rows, options), start in zip(sources, below, strict=False):
            _absmax_kernel[(triton.cdiv(columns, absmax_tile[1]), triton.cdiv(rows, absmax_tile[0] * ABSMAX_TILES))](
                *source,
                bits[start:],
                bits[all_rows:],
                rows,
                columns,
                ROWS=absmax_tile[0],
                COLUMNS=absmax_tile[1],
                TILES=ABSMAX_TILES,
                **options,
                **shared,
            )
        if spread is not None:
            bits.view(torch.float32).mul_(spread)
        for (source, rows, options), start in zip(sources, below, strict=False):
            _quantize_kernel[(triton.cdiv(columns, tile[1]), triton.cdiv(rows, tile[0]))](
                *source,
                bits[start:],
                bits[all_rows:],
                q.view(torch.uint8)[start:],
                q.stride(0),
                row_scale[start:],
                qT.view(torch.uint8)[:, start:],
                qT.stride(0),
                column_scale,
                column_scale if lost is None else lost[start:],
                rows,
                columns,
                ROWS=tile[0],
                COLUMNS=tile[1],
                **options,
                **shared,
                LOST=lost is not None,
                NATIVE=_native(first),
            )
    return q, row_scale, qT, column_scale
