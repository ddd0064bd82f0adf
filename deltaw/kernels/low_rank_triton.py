"""The thin products of `low_rank.py` for CUDA, in Triton.

`project_and_sum`: a program takes steps over tiles of the large operand, (M, N) here, and multiplies each on the tensor
cores while the next ones are on their way. Where one program for each tile of the result would leave multiprocessors
idle, the summed dimension is split too: parts of the sums go to memory in float32 and a second kernel adds them in
order. No atomics, so equal inputs give equal bits.

Bytes that pass through memory beside those of the large operand, as a share of them, for values of 2 bytes, parts of
`n` steps and tiles of `rows` x `columns` (4 bytes, written and read once each; much of it stays in the L2 cache):
4 r (1 / columns + 1 / (n rows)). At r 16 0.25 + 0.06 for 8192 x 4096 and 0.13 + 0.03 for 14336, whose tiles are wider.
The sums over rows stay in registers, columns x r of them, which is what bounds the tile's width. Of linears side by
side no tile is of two, so that each has the r columns of B and h that are its own and nothing is multiplied by zeros.

`add_product`: a program makes one tile of the result. Every tensor of M x N values is read or written once, 67 MB each
in 16 bits at 8192 x 4096: at 3.0 TB/s 45 us for two, 67 us for three. The thin operands come from the L2 cache, with
r (1 / rows + 1 / columns) times the bytes of one large one. Every stored value depends on what was loaded from the same
place, so storage may be shared with an input.
"""

from __future__ import annotations

import functools
import math
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


#: The first whose tiles fit into a multiprocessor's shared memory (227 KiB on an H100, where the first does up to rank
#: 16), of those as wide as N is large: from so many columns on the widest, which halve the larger partial sums, still
#: give every multiprocessor work. At 14336 they take 0.109 ms on an H100, the second 0.118.
PROJECT_AND_SUM = (Tiles(64, 512, 8, 3, 132), Tiles(64, 256, 8, 3, 132), Tiles(64, 256, 8, 2, 132))
WIDE_COLUMNS = 8192

#: For float32, which is multiplied value by value, with operands in registers.
FLOAT32 = Tiles(32, 64, 4, 2, 264)

#: Rows and columns of a program, and warps. 64 rows for four warps are the least that Hopper's wider product takes; the
#: tile's way between that product's layout and memory's then has 5 barriers, with 32 rows 23.
ADD_PRODUCT = (64, 64, 4)

#: Values that one program of the second kernel adds up, and parts of them loaded at a time.
SUM_TILE = 512
SUM_PARTS = 8


# The kernels' arguments carry no annotations: the compiler would look up their names.
@triton.jit  # type: ignore[untyped-decorator]
def _sum_kernel(  # type: ignore[no-untyped-def]
    g,
    B,
    h,
    k_parts,
    parts,
    M,
    end,
    end2,
    N,
    R,
    scale,
    sum_scale,
    g_stride,
    b_stride,
    h_stride,
    rows_each,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    # Which of up to three blocks of g's columns the tile is of: each has columns of its own in B and in h.
    tile = tl.program_id(0)
    tiles = tl.cdiv(end, COLUMNS)
    tiles2 = tiles + tl.cdiv(end2 - end, COLUMNS)
    block = (tile >= tiles).to(tl.int32) + (tile >= tiles2).to(tl.int32)
    start = tl.where(block == 0, 0, tl.where(block == 1, end, end2))
    stop = tl.where(block == 0, end, tl.where(block == 1, end2, N))
    tile -= tl.where(block == 0, 0, tl.where(block == 1, tiles, tiles2))
    column = start + tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < stop
    rank = tl.arange(0, RANK)
    thin = inside[:, None] & (rank < R)[None, :]
    B += block * R
    h += block * R
    factor = tl.load(B + column.to(tl.int64)[:, None] * b_stride + rank[None, :], mask=thin, other=0.0)
    sums = tl.zeros([COLUMNS, RANK], dtype=tl.float32)
    first = tl.program_id(1) * rows_each
    for low in range(first, tl.minimum(first + rows_each, M), ROWS):
        row = low + tl.arange(0, ROWS)
        wide = row.to(tl.int64)[:, None]
        here = (row < M)[:, None] & (rank < R)[None, :]
        mask = (row < M)[:, None] & inside[None, :]
        values = tl.load(g + wide * g_stride + column[None, :], mask=mask, other=0.0)
        others = tl.load(h + wide * h_stride + rank[None, :], mask=here, other=0.0)
        k = tl.dot(values, factor, input_precision="ieee") * scale
        at = (tl.program_id(0).to(tl.int64) * M + wide) * R + rank[None, :]
        tl.store(k_parts + at, k.to(k_parts.dtype.element_ty), mask=here)
        sums = tl.dot(tl.trans(values), others, sums, input_precision="ieee")
    at = (tl.program_id(1).to(tl.int64) * N + column)[:, None] * R + rank[None, :]
    tl.store(parts + at, sums * sum_scale, mask=thin)


@triton.jit  # type: ignore[untyped-decorator]
def _add(  # type: ignore[no-untyped-def]
    parts, out, tile, count, longest, end, end2, number, width, out_row,
    PIECES: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A tile of `out`, see `Sum`."""
    at = tile * TILE + tl.arange(0, TILE)
    row = (at // width).to(tl.int64)
    if PIECES == 1:
        # By itself, as only here the compiler knows that a thread's values lie side by side.
        parts += at
        step = count.to(tl.int64)
        own = at * 0 + number
    else:
        piece = width // PIECES
        block = at % width // piece
        begin = tl.where(block == 0, 0, tl.where(block == 1, end, end2))
        own = tl.where(block == 0, end, tl.where(block == 1, end2, number)) - begin
        step = (count // PIECES).to(tl.int64)
        parts += begin * step + row * piece + at % piece
    total = tl.zeros([TILE], dtype=tl.float32)
    for low in range(0, longest, PARTS):
        # Unrolled, so that these loads are under way together.
        for i in tl.static_range(PARTS):
            total += tl.load(parts + i * step, mask=(at < count) & (low + i < own), other=0.0)
        parts += PARTS * step
    tl.store(out + row * out_row + at % width, total.to(out.dtype.element_ty), mask=at < count)


@triton.jit  # type: ignore[untyped-decorator]
def _add_kernel(  # type: ignore[no-untyped-def]
    parts, out, count, longest, end, end2, number, width, out_row,
    parts_b, out_b, count_b, longest_b, end_b, end2_b, number_b, width_b, out_row_b,
    PIECES: tl.constexpr, PIECES_B: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    ahead = tl.cdiv(count, TILE)
    if program < ahead:
        _add(parts, out, program, count, longest, end, end2, number, width, out_row, PIECES, TILE, PARTS)
    else:
        _add(
            parts_b, out_b, program - ahead, count_b, longest_b, end_b, end2_b, number_b, width_b, out_row_b,
            PIECES_B, TILE, PARTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]
def _product_kernel(  # type: ignore[no-untyped-def]
    onto, h, B, z, out, M, N, R, onto_stride, h_stride, b_stride, z_stride, out_stride,
    Z: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANK)
    live = (row < M) & (column < N)[None, :]
    base = tl.load(onto + row * onto_stride + column[None, :], mask=live, other=0.0)
    if Z:
        more = tl.load(z + row * z_stride + column[None, :], mask=live, other=0.0)
    thin = tl.load(h + row * h_stride + rank[None, :], mask=(row < M) & (rank < R)[None, :], other=0.0)
    at = B + column.to(tl.int64)[None, :] * b_stride + rank[:, None]
    factor = tl.load(at, mask=(rank < R)[:, None] & (column < N)[None, :], other=0.0)
    total = tl.dot(thin, factor, input_precision="ieee") + base.to(tl.float32)
    if Z:
        total += more.to(tl.float32)
    tl.store(out + row * out_stride + column[None, :], total.to(out.dtype.element_ty), mask=live)


def project_and_sum(
    g: Tensor,
    B: Tensor,
    h: Tensor,
    *,
    scale: float,
    sum_scale: float | None = None,
    out: Tensor | None = None,
    widths: tuple[int, ...] = (),
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """`low_rank.project_and_sum_torch` with one read of g; all tensors on one CUDA device, none of them empty.

    With `widths` as `low_rank.project_and_sum_blocks_torch`, of two or three blocks.
    """
    g = _rows(g)
    B, h = _rows(B.to(g.dtype)), _rows(h.to(g.dtype))
    widths = widths or (g.shape[1],)
    k = torch.empty_like(h, memory_format=torch.contiguous_format) if out is None else out
    (M, N), R = g.shape, h.shape[1] // len(widths)
    dB = g.new_empty(N, R, dtype=torch.float32)
    tiles = tiles or _fitting(g, _padded(R))
    across = [triton.cdiv(width, tiles.columns) for width in widths]
    each, number = _split(sum(across), triton.cdiv(M, tiles.rows), tiles.programs)
    whole = sum(across) == 1 and k.is_contiguous()
    k_parts = k if whole else g.new_empty(sum(across), M, R, dtype=torch.float32)
    parts = dB if number == 1 else g.new_empty(number, N, R, dtype=torch.float32)
    with torch.cuda.device_of(g):
        _sum_kernel[(sum(across), number)](
            g,
            B,
            h,
            k_parts,
            parts,
            M,
            widths[0],
            sum(widths[:2]),
            N,
            R,
            float(scale),
            float(scale if sum_scale is None else sum_scale),
            g.stride(0),
            B.stride(0),
            h.stride(0),
            each * tiles.rows,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            RANK=_padded(R),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        add_parts(Sum(parts, dB), Sum(k_parts, k, tuple(across)))
    return k, dB


def add_product(
    onto: Tensor,
    h: Tensor,
    B: Tensor,
    *,
    z: Tensor | None = None,
    out: Tensor,
    tile: tuple[int, int, int] = ADD_PRODUCT,
) -> Tensor:
    """`low_rank.add_product_torch` in one launch; tensors as checked there, `tile` like `ADD_PRODUCT`."""
    h, B = h.to(onto.dtype), B.to(onto.dtype)
    more = onto if z is None else z
    (M, N), R, (rows, columns, warps) = onto.shape, h.shape[1], tile
    with torch.cuda.device_of(onto):
        _product_kernel[(triton.cdiv(M, rows) * triton.cdiv(N, columns),)](
            onto, h, B, more, out, M, N, R,
            onto.stride(0), h.stride(0), B.stride(0), more.stride(0), out.stride(0),
            Z=z is not None, ROWS=rows, COLUMNS=columns, RANK=_padded(R), num_warps=warps,
        )  # fmt: skip
    return out


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with its rows' values side by side."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _fitting(g: Tensor, rank: int) -> Tiles:
    if g.dtype == torch.float32:
        return FLOAT32
    room = _shared_bytes(g.device.index) if g.is_cuda else math.inf
    for tiles in PROJECT_AND_SUM[g.shape[1] < WIDE_COLUMNS :]:
        # Tiles of g and h under way, B's, and k's in float32 on its way to another layout.
        steps = tiles.stages * tiles.rows * (tiles.columns + rank)
        if g.element_size() * (steps + tiles.columns * rank) + 4 * tiles.rows * rank <= room:
            break
    return tiles


@functools.cache
def _shared_bytes(device: int) -> int:
    """What a program on this CUDA device may use of shared memory."""
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])


def _padded(rank: int) -> int:
    return max(16, int(triton.next_power_of_2(rank)))


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


class Sum(NamedTuple):
    """A result and its parts.

    Attributes:
        parts: (number, rows, columns / pieces), contiguous.
        out: (rows, columns), rows of contiguous values, any stride between them; or `parts` itself, which is whole.
        numbers: how many of the parts, one after the other, are of each piece of the columns, up to three pieces; one
            where it is empty.
    """

    parts: Tensor
    out: Tensor
    numbers: tuple[int, ...] = ()

    def arguments(self) -> tuple[Tensor | int, ...]:
        """What the kernel takes."""
        numbers = self.numbers or (len(self.parts),)
        ends = numbers[0], sum(numbers[:2]), sum(numbers)
        return self.parts, self.out, self.out.numel(), max(numbers), *ends, self.out.shape[1], self.out.stride(0)


def add_parts(*sums: Sum) -> None:
    """Adds the parts of up to two results in one kernel, on the current CUDA device."""
    found = [one for one in sums if one.parts is not one.out and one.out.numel()]
    if not found:
        return
    programs = sum(triton.cdiv(one.out.numel(), SUM_TILE) for one in found)
    first, second = found[0], found[-1]
    _add_kernel[(programs,)](
        *first.arguments(), *second.arguments(), PIECES=max(1, len(first.numbers)),
        PIECES_B=max(1, len(second.numbers)), TILE=SUM_TILE, PARTS=SUM_PARTS, num_warps=4,
    )  # fmt: skip
