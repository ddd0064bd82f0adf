"""The thin products of `low_rank.py` for CUDA, in Triton.

A program takes steps over tiles of the large operand, (M, N) here, and multiplies each on the tensor cores while the
next ones are on their way. Where one program for each tile of the result would leave multiprocessors idle, the summed
dimension is split too: parts of the sums go to memory in float32 and a second kernel adds them in order. No atomics, so
equal inputs give equal bits.

Bytes that pass through memory beside those of the large operand, as a share of them, for values of 2 bytes, parts of
`n` steps and tiles of `rows` x `columns` (4 bytes, written and read once each; much of it stays in the L2 cache):

    project           4 r / (n columns)                  none at M of 8192 and more, which needs no parts
    project_and_sum   4 r (1 / columns + 1 / (n rows))   r 16: 0.25 + 0.06 for 8192 x 4096, 0.25 + 0.05 for 14336
    outer_sum         4 r / (n rows)                     r 16: 0.06 for 8192 x 4096, 0.05 for 14336

The sums of `project_and_sum` over rows stay in registers, columns x r of them, which is what bounds the tile's width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped,import-not-found]
import triton.language as tl  # type: ignore[import-untyped,import-not-found]
from torch import Tensor


class Tiles(NamedTuple):
    """How a kernel is cut.

    Attributes:
        rows: of the large operand in a step, a power of two, at least 16.
        columns: likewise.
        warps: of a program; tensor cores want a multiple of 4.
        stages: steps whose loads are under way at a time, and so tiles in shared memory (one more for some).
        programs: how many the card runs at a time: an H100 has 132 multiprocessors.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    programs: int


PROJECT = Tiles(64, 128, 4, 4, 132)
PROJECT_AND_SUM = Tiles(64, 256, 8, 3, 132)
OUTER_SUM = Tiles(64, 256, 8, 3, 132)

#: For float32, which is multiplied value by value, with operands in registers.
FLOAT32 = Tiles(32, 64, 4, 2, 264)

#: Values that one program of the second kernel adds up, and parts of them loaded at a time.
SUM_TILE = 512
SUM_PARTS = 8


# The kernels' arguments carry no annotations: the compiler would look up their names.
@triton.jit  # type: ignore[untyped-decorator]
def _project_kernel(  # type: ignore[no-untyped-def]
    x,
    A,
    parts,
    M,
    K,
    R,
    x_stride,
    a_stride,
    columns_each,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, RANK)
    at_row = x + row.to(tl.int64)[:, None] * x_stride
    first = tl.program_id(1) * columns_each
    sums = tl.zeros([ROWS, RANK], dtype=tl.float32)
    for low in range(first, tl.minimum(first + columns_each, K), COLUMNS):
        column = low + tl.arange(0, COLUMNS)
        tile = tl.load(at_row + column[None, :], mask=(row < M)[:, None] & (column < K)[None, :], other=0.0)
        at = A + rank.to(tl.int64)[:, None] * a_stride + column[None, :]
        factor = tl.load(at, mask=(rank < R)[:, None] & (column < K)[None, :], other=0.0)
        sums = tl.dot(tile, tl.trans(factor), sums, input_precision="ieee")
    at = (tl.program_id(1).to(tl.int64) * M + row)[:, None] * R + rank[None, :]
    tl.store(parts + at, sums.to(parts.dtype.element_ty), mask=(row < M)[:, None] & (rank < R)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _sum_kernel(  # type: ignore[no-untyped-def]
    g,
    B,
    h,
    k_parts,
    parts,
    M,
    N,
    R,
    scale,
    g_stride,
    b_stride,
    h_stride,
    column_stride,
    rank_stride,
    rows_each,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PROJECT: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANK)
    thin = (column < N)[:, None] & (rank < R)[None, :]
    if PROJECT:
        factor = tl.load(B + column.to(tl.int64)[:, None] * b_stride + rank[None, :], mask=thin, other=0.0)
    sums = tl.zeros([COLUMNS, RANK], dtype=tl.float32)
    first = tl.program_id(1) * rows_each
    for low in range(first, tl.minimum(first + rows_each, M), ROWS):
        row = low + tl.arange(0, ROWS)
        wide = row.to(tl.int64)[:, None]
        inside = (row < M)[:, None] & (rank < R)[None, :]
        mask = (row < M)[:, None] & (column < N)[None, :]
        tile = tl.load(g + wide * g_stride + column[None, :], mask=mask, other=0.0)
        others = tl.load(h + wide * h_stride + rank[None, :], mask=inside, other=0.0)
        if PROJECT:
            k = tl.dot(tile, factor, input_precision="ieee") * scale
            at = (tl.program_id(0).to(tl.int64) * M + wide) * R + rank[None, :]
            tl.store(k_parts + at, k.to(k_parts.dtype.element_ty), mask=inside)
        sums = tl.dot(tl.trans(tile), others, sums, input_precision="ieee")
    at = column.to(tl.int64)[:, None] * column_stride + rank[None, :] * rank_stride
    tl.store(parts + tl.program_id(1).to(tl.int64) * N * R + at, sums * scale, mask=thin)


@triton.jit  # type: ignore[untyped-decorator]
def _add(parts, out, tile, count, number, TILE: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tile * TILE + tl.arange(0, TILE)
    parts += at
    total = tl.zeros([TILE], dtype=tl.float32)
    for low in range(0, number, PARTS):
        # Unrolled, so that these loads are under way together.
        for i in tl.static_range(PARTS):
            # Compared as a block: the interpreter of Triton 3.9 makes integers of a scalar beside one.
            total += tl.load(parts + i * count, mask=(at < count) & (at * 0 + (low + i) < number), other=0.0)
        parts += PARTS * count
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)


@triton.jit  # type: ignore[untyped-decorator]
def _add_kernel(  # type: ignore[no-untyped-def]
    parts, out, count, number, parts2, out2, count2, number2, TILE: tl.constexpr, PARTS: tl.constexpr
):
    program = tl.program_id(0)
    ahead = tl.cdiv(count, TILE)
    if program < ahead:
        _add(parts, out, program, count, number, TILE, PARTS)
    else:
        _add(parts2, out2, program - ahead, count2, number2, TILE, PARTS)


def project(x: Tensor, A: Tensor, *, tiles: Tiles | None = None) -> Tensor:
    """`low_rank.project_torch`; all tensors on one CUDA device, none of them empty."""
    x, A = _rows(x), _rows(A.to(x.dtype))
    (M, K), R = x.shape, len(A)
    tiles = tiles or _fitting(PROJECT, x)
    across = triton.cdiv(M, tiles.rows)
    each, number = _split(across, triton.cdiv(K, tiles.columns), tiles.programs)
    h = x.new_empty(M, R)
    parts = _parts(h, number)
    with torch.cuda.device_of(x):
        _project_kernel[(across, number)](
            x,
            A,
            parts,
            M,
            K,
            R,
            x.stride(0),
            A.stride(0),
            each * tiles.columns,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            RANK=_padded(R),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        _add_parts((parts, h))
    return h


def project_and_sum(
    g: Tensor, B: Tensor, h: Tensor, *, scale: float, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """`low_rank.project_and_sum_torch` with one read of g; all tensors on one CUDA device, none of them empty."""
    g = _rows(g)
    B, h = _rows(B.to(g.dtype)), _rows(h.to(g.dtype))
    k, dB = torch.empty_like(h, memory_format=torch.contiguous_format), g.new_empty(B.shape, dtype=torch.float32)
    _launch_sum(g, h, dB, (dB.stride(0), 1), scale, tiles or _fitting(PROJECT_AND_SUM, g), B, k)
    return k, dB


def outer_sum(k: Tensor, x: Tensor, *, tiles: Tiles | None = None) -> Tensor:
    """`low_rank.outer_sum_torch`; all tensors on one CUDA device, none of them empty."""
    x, k = _rows(x), _rows(k.to(x.dtype))
    dA = x.new_empty(k.shape[1], x.shape[1], dtype=torch.float32)
    _launch_sum(x, k, dA, (1, dA.stride(0)), 1.0, tiles or _fitting(OUTER_SUM, x))
    return dA


def _launch_sum(
    g: Tensor,
    h: Tensor,
    out: Tensor,
    strides: tuple[int, int],
    scale: float,
    tiles: Tiles,
    B: Tensor | None = None,
    k: Tensor | None = None,
) -> None:
    """Scale g^T h into `out`, whose strides by g's and h's columns are given; with B also scale g B into k."""
    (M, N), R = g.shape, h.shape[1]
    across = triton.cdiv(N, tiles.columns)
    each, number = _split(across, triton.cdiv(M, tiles.rows), tiles.programs)
    sums = [(_parts(out, number), out)]
    if k is not None:
        sums.append((_parts(k, across), k))
    with torch.cuda.device_of(g):
        _sum_kernel[(across, number)](
            g,
            g if B is None else B,
            h,
            sums[-1][0],
            sums[0][0],
            M,
            N,
            R,
            float(scale),
            g.stride(0),
            0 if B is None else B.stride(0),
            h.stride(0),
            *strides,
            each * tiles.rows,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            RANK=_padded(R),
            PROJECT=B is not None,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        _add_parts(*sums)


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with its rows' values side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _fitting(tiles: Tiles, large: Tensor) -> Tiles:
    return FLOAT32 if large.dtype == torch.float32 else tiles


def _padded(rank: int) -> int:
    return max(16, int(triton.next_power_of_2(rank)))


def _parts(out: Tensor, number: int) -> Tensor:
    """Where parts of a sum go, (number, *out's shape); the result itself where there is one."""
    return out if number == 1 else out.new_empty(number, *out.shape, dtype=torch.float32)


def _split(across: int, steps: int, programs: int) -> tuple[int, int]:
    """Steps of each part, and parts, that take the least time where `across` programs each take a number of steps.

    Time is rounds of programs times steps in each, and one step more for the part's way through memory and back.
    """
    choices = []
    for rounds in (1, 2, 3):
        each = triton.cdiv(steps, max(1, min(steps, rounds * programs // across)))
        number = triton.cdiv(steps, each)
        choices.append((triton.cdiv(across * number, programs) * (each + (number > 1)), number, each))
    _, number, each = min(choices)
    return each, number


def _add_parts(*sums: tuple[Tensor, Tensor]) -> None:
    """The sums over the parts of up to two results in one kernel, leaving out results that came whole."""
    open_sums = [(parts, out) for parts, out in sums if parts is not out]
    if not open_sums:
        return
    first, second = open_sums[0], open_sums[-1]
    count = first[1].numel()
    count2 = second[1].numel() if len(open_sums) == 2 else 0
    _add_kernel[(triton.cdiv(count, SUM_TILE) + triton.cdiv(count2, SUM_TILE),)](
        *first, count, len(first[0]), *second, count2, len(second[0]), TILE=SUM_TILE, PARTS=SUM_PARTS, num_warps=4
    )
