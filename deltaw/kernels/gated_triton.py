"""The gated activation of `gated.py` for CUDA, in Triton: every tensor of M x N values is read or written once.

What passes through memory for each value in 16 bits, and at M 8192, N 14336 the time at 3.0 TB/s:

    gated                       gate, up -> act                          6 bytes    0.23 ms
    gated_backward              g, gate, up -> act, dgate, dup          12          0.47
    gated_backward_low_rank     g, gate, up -> dgate, dup (, act)       10 (12)     0.39 (0.47)

Adding a low-rank part to gate and up, or to g, on the way reads thin tensors only; passes of their own would move 8 and
4 bytes a value.

Sums over tokens and columns are written as partial sums, one for each program, and added by a second, small reduction:
no atomics, the same result every time. They are float32, but those of k of bfloat16 tensors, which are bfloat16 too:
rounding a hundred of them and rounding their sum weigh the same. A program of `gated_backward_low_rank` owns `columns`
columns, as wide as dB_gate, dB_up and dA_down fit its registers, and a strip of `strip` tokens. Writing and reading
partial sums costs

    8 M N r / columns + 24 M N r / strip bytes

beside 10 M N: at rank 16, 128 columns and strips of 1,184 tokens 10 + 3.2 %; at rank 32 with 256 columns, 10 + 6.5 %;
at rank 64 with 128, 40 + 13 %. Separate functions read dgate, dup and act again and write act first: 80 %, and 120 % at
ranks where the first two are read twice. Half of those bytes are memory for a while: 78, 97 and 311 MB at this shape.

Every stored value depends on what was loaded from the same place, so storage may be shared with an input.
"""

from __future__ import annotations

import functools
import math

import torch
import triton  # type: ignore[import-untyped,import-not-found]
import triton.language as tl  # type: ignore[import-untyped,import-not-found]
from torch import Tensor

from deltaw.kernels.gated import Activation, Factors, LowRank
from deltaw.kernels.low_rank_triton import Sum, add_parts

#: Rows and columns of a step, and warps, of the elementwise kernels.
TILE = (4, 1024, 8)
#: The same where the factors' gradients are added up, whose sums take registers; rows that a program goes through then.
SUMMED_TILE = (2, 512, 4)
SUMMED_ROWS = 64
#: Rows and columns of a step, warps and stages of `gated` where it adds the low-rank part; rows that a program goes
#: through, so that it reads B once for them: at rank 16 and 128 columns, 4 % beside the 6 bytes a value.
ADDING_TILE = (32, 128, 4, 3)
ADDING_TILE_32 = (16, 64, 4, 1)
ADDING_ROWS = 256
#: Rows and columns of a step, warps and stages of the kernel with the low-rank sums, by the padded rank; a fifth number
#: bounds a thread's registers. At rank 16 and the shape above an H100 takes 0.56 ms; with (32, 128, 4, 2) 0.62, with
#: (32, 64, 4, 3) 0.70, with (16, 128, 4, 2) 0.72, and with (16, 256, 4, 2), which halves the larger partial sums but
#: does not fit the registers, 0.82.
LOW_RANK_TILES: dict[int, tuple[int, ...]] = {16: (16, 128, 4, 3), 32: (16, 256, 8, 2), 64: (16, 128, 8, 2)}
#: The same for float32, whose products use no tensor cores and are worth it for small ranks only.
LOW_RANK_TILES_32: dict[int, tuple[int, ...]] = {16: (16, 64, 4, 1)}
#: Rows of the tensor cores' tile.
LEAST = 64
#: Most strips that tokens are cut into.
MOST_STRIPS = 64

_TWICE_A = tl.constexpr(2 * math.sqrt(2 / math.pi))
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))


# The kernels' arguments carry no annotations: the compiler would look up their names.
@triton.jit  # type: ignore[untyped-decorator]
def _curve(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """P(x) and x P'(x)."""
    if ACTIVATION == "silu":
        P = tl.sigmoid(x)
        slope = x * P * (1.0 - P)
    elif ACTIVATION == "gelu_tanh":
        P = tl.sigmoid(x * (_TWICE_A + (_TWICE_A * 0.044715) * x * x))
        slope = x * P * (1.0 - P) * (_TWICE_A + (_TWICE_A * 3 * 0.044715) * x * x)
    else:
        P = 0.5 + 0.5 * tl.erf(x * _SQRT_HALF)
        slope = x * tl.exp(-0.5 * x * x) * _DENSITY
    return P, slope


@triton.jit  # type: ignore[untyped-decorator]
def _real(z, c, FACTORS: tl.constexpr):  # type: ignore[no-untyped-def]
    if FACTORS:
        z = z * c[None, :]
    return z


@triton.jit  # type: ignore[untyped-decorator]
def _gradients(grad, z_gate, z_up, c_gate, c_up, ACTIVATION: tl.constexpr, FACTORS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Act, and the gradients of the real gate and up."""
    x = _real(z_gate, c_gate, FACTORS)
    u = _real(z_up, c_up, FACTORS)
    P, slope = _curve(x, ACTIVATION)
    f = P * x
    return f * u, grad * u * (P + slope), grad * f


@triton.jit  # type: ignore[untyped-decorator]
def _load(base, at, live):  # type: ignore[no-untyped-def]
    return tl.load(base + at, mask=live, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _store(base, at, values, live):  # type: ignore[no-untyped-def]
    tl.store(base + at, values.to(base.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    gate, up, out, c_gate, c_up, rows, columns, gate_row, up_row, out_row,
    ACTIVATION: tl.constexpr, FACTORS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    live = (row < rows) & (column < columns)[None, :]
    at = column[None, :]
    c_gate = _load(c_gate, column, column < columns) if FACTORS else 1.0
    c_up = _load(c_up, column, column < columns) if FACTORS else 1.0
    x = _real(_load(gate, row * gate_row + at, live), c_gate, FACTORS)
    u = _real(_load(up, row * up_row + at, live), c_up, FACTORS)
    P, _ = _curve(x, ACTIVATION)
    _store(out, row * out_row + at, P * x * u, live)


@triton.jit  # type: ignore[untyped-decorator]
def _thin(base, at, step, direction, live):  # type: ignore[no-untyped-def]
    """Values (directions, at) of what lies as (at, directions)."""
    return tl.load(base + at[None, :] * step + direction, mask=live, other=0.0)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _adding_kernel(  # type: ignore[no-untyped-def]
    gate, up, out, c_gate, c_up, h_gate, B_gate, h_up, B_up, rows, columns, gate_rank, up_rank,
    gate_row, up_row, out_row, h_gate_row, B_gate_row, h_up_row, B_up_row,
    ACTIVATION: tl.constexpr, FACTORS: tl.constexpr, PRECISION: tl.constexpr, STRIP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SLOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, COLUMNS)
    strip = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < columns)[None, :]
    c_gate = _load(c_gate, column, column < columns) if FACTORS else 1.0
    c_up = _load(c_up, column, column < columns) if FACTORS else 1.0
    direction = tl.arange(0, SLOT)[:, None]
    B_gate = _thin(B_gate, column, B_gate_row, direction, (direction < gate_rank) & inside)
    B_up = _thin(B_up, column, B_up_row, direction, (direction < up_rank) & inside)
    for start in tl.range(0, STRIP, ROWS, num_stages=STAGES):
        row = strip * STRIP + start + tl.arange(0, ROWS)
        present = (row < rows)[None, :]
        live = (row < rows)[:, None] & inside
        gate_h = _thin(h_gate, row, h_gate_row, direction, (direction < gate_rank) & present)
        up_h = _thin(h_up, row, h_up_row, direction, (direction < up_rank) & present)
        z_gate = _load(gate, row[:, None] * gate_row + column[None, :], live)
        z_up = _load(up, row[:, None] * up_row + column[None, :], live)
        x = _real(tl.dot(tl.trans(gate_h), B_gate, z_gate, input_precision=PRECISION), c_gate, FACTORS)
        u = _real(tl.dot(tl.trans(up_h), B_up, z_up, input_precision=PRECISION), c_up, FACTORS)
        P, _ = _curve(x, ACTIVATION)
        _store(out, row[:, None] * out_row + column[None, :], P * x * u, live)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def]
    g, gate, up, c_gate, c_up, sums, rows, columns, g_row, gate_row, up_row,
    ACTIVATION: tl.constexpr, FACTORS: tl.constexpr, STRIP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, COLUMNS)
    strip = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    c_gate = _load(c_gate, column, inside) if FACTORS else 1.0
    c_up = _load(c_up, column, inside) if FACTORS else 1.0
    sum_gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, STRIP, ROWS):
        row = strip * STRIP + start + tl.arange(0, ROWS)[:, None]
        live = (row < rows) & inside[None, :]
        g_at, gate_at, up_at = (row * g_row + column, row * gate_row + column, row * up_row + column)
        z_gate = _load(gate, gate_at, live)
        z_up = _load(up, up_at, live)
        act, dx, du = _gradients(_load(g, g_at, live), z_gate, z_up, c_gate, c_up, ACTIVATION, FACTORS)
        _store(g, g_at, act, live)
        _store(gate, gate_at, _real(dx, c_gate, FACTORS), live)
        _store(up, up_at, _real(du, c_up, FACTORS), live)
        if FACTORS:
            sum_gate += dx * z_gate
            sum_up += du * z_up
    if FACTORS:
        at = strip * 2 * columns + column
        tl.store(sums + at, tl.sum(sum_gate, 0), mask=inside)
        tl.store(sums + at + columns, tl.sum(sum_up, 0), mask=inside)


@triton.jit(do_not_specialize=["rows", "strip_rows"])  # type: ignore[untyped-decorator]
def _low_rank_kernel(  # type: ignore[no-untyped-def]
    g, gate, up, c_gate, c_up, B_gate, B_up, h_gate, h_up, k_down, A_down, k_sums, d_sums, c_sums,
    rows, columns, strip_rows, rank, g_row, gate_row, up_row, B_gate_row, B_up_row, h_gate_row, h_up_row, k_down_row,
    A_down_row, scale_gate, scale_up, sum_gate, sum_up,
    ACTIVATION: tl.constexpr, FACTORS: tl.constexpr, WRITE_ACT: tl.constexpr, ADDS: tl.constexpr, DOWN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLOT: tl.constexpr, TWO: tl.constexpr, THREE: tl.constexpr,
    STAGES: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, COLUMNS)
    strip = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    dtype: tl.constexpr = g.dtype.element_ty
    c_gate = _load(c_gate, column, inside) if FACTORS else 1.0
    c_up = _load(c_up, column, inside) if FACTORS else 1.0
    # SUMS rows are what the threads hold at a time, so that a step adds within a thread; sums of whole columns would
    # pass between the warps in every step, with 10 barriers in the place of 4.
    dc_gate = tl.zeros([SUMS, COLUMNS], tl.float32)
    dc_up = tl.zeros([SUMS, COLUMNS], tl.float32)

    # Products have the short side first, padded to the 64 rows of the tensor cores' tile, which several factors share:
    # so the large operand is read where it lies in shared memory, once for both products with it. As the first operand
    # it would be spread over registers, which took twice as many and 40 barriers a step in the place of 8.
    slot = tl.arange(0, TWO)[:, None] // SLOT
    direction = tl.arange(0, TWO)[:, None] % SLOT
    known = (slot < 2) & (direction < rank)
    # A choice between addresses: what is computed would be read from shared memory into registers in every step.
    B = tl.where(slot == 0, B_gate + column[None, :] * B_gate_row, B_up + column[None, :] * B_up_row) + direction
    B = tl.load(B, mask=known & inside[None, :], other=0.0)
    # For what is added, operands of the rank's own width: with the padded ones it would take four times the products.
    thin = tl.arange(0, SLOT)[:, None]
    missing = (thin < rank) & inside[None, :]
    gate_B = _thin(B_gate, column, B_gate_row, thin, missing) if ADDS else 0.0
    up_B = _thin(B_up, column, B_up_row, thin, missing) if ADDS else 0.0
    down_A = tl.load(A_down + thin * A_down_row + column[None, :], mask=missing, other=0.0) if DOWN else 0.0
    k_sums += tile * rows * 2 * rank + slot * rank + direction
    d_slot = tl.arange(0, THREE)[:, None] // SLOT
    d_direction = tl.arange(0, THREE)[:, None] % SLOT
    d = tl.zeros([THREE, COLUMNS], tl.float32)
    for start in tl.range(0, strip_rows, ROWS, num_stages=STAGES):
        row = strip * strip_rows + start + tl.arange(0, ROWS)
        live = (row < rows)[:, None] & inside[None, :]
        g_at = row[:, None] * g_row + column[None, :]
        gate_at = row[:, None] * gate_row + column[None, :]
        up_at = row[:, None] * up_row + column[None, :]
        z_gate = _load(gate, gate_at, live)
        z_up = _load(up, up_at, live)
        grad = _load(g, g_at, live)
        there = (thin < rank) & (row < rows)[None, :]
        if ADDS:
            part = tl.trans(_thin(h_gate, row, h_gate_row, thin, there))
            z_gate += scale_gate * tl.dot(part, gate_B, input_precision=PRECISION)
            part = tl.trans(_thin(h_up, row, h_up_row, thin, there))
            z_up += scale_up * tl.dot(part, up_B, input_precision=PRECISION)
        if DOWN:
            part = tl.trans(_thin(k_down, row, k_down_row, thin, there))
            grad += tl.dot(part, down_A, input_precision=PRECISION)
        act, dx, du = _gradients(grad, z_gate, z_up, c_gate, c_up, ACTIVATION, FACTORS)
        if FACTORS:
            dc_gate += tl.sum(tl.reshape(dx * z_gate, (ROWS // SUMS, SUMS, COLUMNS)), 0)
            dc_up += tl.sum(tl.reshape(du * z_up, (ROWS // SUMS, SUMS, COLUMNS)), 0)
        act = act.to(dtype)
        dx = _real(dx, c_gate, FACTORS).to(dtype)
        du = _real(du, c_up, FACTORS).to(dtype)
        if WRITE_ACT:
            tl.store(g + g_at, act, mask=live)
        tl.store(gate + gate_at, dx, mask=live)
        tl.store(up + up_at, du, mask=live)

        token = row[None, :]
        present = (token < rows) & (d_direction < rank)
        side = _thin(h_gate, row, h_gate_row, d_direction, present & (d_slot == 0))
        d = tl.dot(side, dx, d, input_precision=PRECISION)
        side = _thin(h_up, row, h_up_row, d_direction, present & (d_slot == 1))
        d = tl.dot(side, du, d, input_precision=PRECISION)
        side = _thin(k_down, row, k_down_row, d_direction, present & (d_slot == 2))
        d = tl.dot(side, act, d, input_precision=PRECISION)
        k_gate = tl.dot(B, tl.trans(dx), input_precision=PRECISION)
        k_up = tl.dot(B, tl.trans(du), input_precision=PRECISION)
        k = tl.where(slot == 0, scale_gate * k_gate, scale_up * k_up)
        tl.store(k_sums + token * 2 * rank, k.to(k_sums.dtype.element_ty), mask=known & (token < rows))

    scale = tl.where(d_slot == 0, sum_gate, tl.where(d_slot == 1, sum_up, 1.0))
    # dB lie as (columns, rank), dA as (rank, columns).
    at = tl.where(d_slot < 2, column[None, :] * rank + d_direction, d_direction * columns + column[None, :])
    d_sums += (strip * 3 + d_slot) * columns * rank
    tl.store(d_sums + at, scale * d, mask=(d_slot < 3) & (d_direction < rank) & inside[None, :])
    if FACTORS:
        c_sums += strip * 2 * columns + column
        tl.store(c_sums, tl.sum(dc_gate, 0), mask=inside)
        tl.store(c_sums + columns, tl.sum(dc_up, 0), mask=inside)


def gated(
    gate: Tensor,
    up: Tensor,
    *,
    activation: Activation,
    out: Tensor,
    factors: Factors | None = None,
    low_rank: LowRank | None = None,
    tile: tuple[int, ...] | None = None,
) -> Tensor:
    """`gated.gated_torch` in one launch; tensors as checked there, `tile` as `TILE`, with `low_rank` `ADDING_TILE`."""
    if not gate.numel():
        return out
    if low_rank is not None:
        return _gated_adding(gate, up, low_rank, activation=activation, out=out, factors=factors, tile=tile)
    (rows, columns), (height, width, warps) = gate.shape, tile or TILE
    with torch.cuda.device_of(gate):
        _forward_kernel[(triton.cdiv(rows, height) * triton.cdiv(columns, width),)](
            gate, up, out, *_contiguous(factors, gate), rows, columns, gate.stride(0), up.stride(0), out.stride(0),
            ACTIVATION=activation, FACTORS=factors is not None, ROWS=height, COLUMNS=width, num_warps=warps,
        )  # fmt: skip
    return out


def _gated_adding(
    gate: Tensor,
    up: Tensor,
    low_rank: LowRank,
    *,
    activation: Activation,
    out: Tensor,
    factors: Factors | None,
    tile: tuple[int, ...] | None,
) -> Tensor:
    rows, columns = gate.shape
    narrow = gate.dtype == torch.float32
    height, width, warps, stages = tile or (ADDING_TILE_32 if narrow else ADDING_TILE)
    h_gate, B_gate, h_up, B_up = (_rows(t, gate.dtype) for t in low_rank)
    ranks, strip = (B_gate.shape[1], B_up.shape[1]), max(height, ADDING_ROWS)
    with torch.cuda.device_of(gate):
        _adding_kernel[(triton.cdiv(rows, strip) * triton.cdiv(columns, width),)](
            gate, up, out, *_contiguous(factors, gate), h_gate, B_gate, h_up, B_up, rows, columns, *ranks,
            *(t.stride(0) for t in (gate, up, out, h_gate, B_gate, h_up, B_up)),
            ACTIVATION=activation, FACTORS=factors is not None, PRECISION="ieee" if narrow else "tf32", STRIP=strip,
            ROWS=height, COLUMNS=width, SLOT=_slot(max(ranks)), STAGES=stages, num_warps=warps,
        )  # fmt: skip
    return out


def gated_backward(
    g: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    activation: Activation,
    factors: Factors | None = None,
    tile: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """`gated.gated_backward_torch` in one launch, with factors two; `tile` as `TILE`."""
    height, width, warps = tile or (TILE if factors is None else SUMMED_TILE)
    rows, columns = g.shape
    strip = height if factors is None else max(height, SUMMED_ROWS)
    strips = triton.cdiv(rows, strip)
    sums = torch.empty(0 if factors is None else strips, 2, columns, dtype=torch.float32, device=g.device)
    if g.numel():
        with torch.cuda.device_of(g):
            _backward_kernel[(strips * triton.cdiv(columns, width),)](
                g, gate, up, *_contiguous(factors, g), sums, rows, columns, g.stride(0), gate.stride(0), up.stride(0),
                ACTIVATION=activation, FACTORS=factors is not None, STRIP=strip, ROWS=height, COLUMNS=width,
                num_warps=warps,
            )  # fmt: skip
    if factors is None:
        return None
    dc_gate, dc_up = sums.sum(0)
    return dc_gate, dc_up


def gated_backward_low_rank(
    g: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    B_gate: Tensor,
    B_up: Tensor,
    h_gate: Tensor,
    h_up: Tensor,
    k_down: Tensor,
    scale_gate: float,
    scale_up: float,
    activation: Activation,
    factors: Factors | None = None,
    write_act: bool = False,
    adds: bool = False,
    A_down: Tensor | None = None,
    sum_scales: tuple[float, float] | None = None,
    room: Tensor | None = None,
    tile: tuple[int, ...] | None = None,
    strips: int | None = None,
) -> tuple[Tensor, ...]:
    """`gated.gated_backward_low_rank` for one rank up to `gated.LARGEST_RANK`, in one large launch and small sums.

    Tensors as checked there. `tile` is like a value of `LOW_RANK_TILES`, None takes it from there; `strips` is the
    number of parts that the tokens are cut into, None fills the device's processors evenly.
    """
    (rows, columns), rank = g.shape, B_gate.shape[1]
    slot = _slot(rank)
    if tile is None:
        tile = (LOW_RANK_TILES_32 if g.dtype == torch.float32 else LOW_RANK_TILES)[slot]
    height, width, warps, stages, *registers = tile
    tiles = triton.cdiv(columns, width)
    if strips is None:
        strips = _strips(rows, tiles, height, rank, _processors(g.device))
    strip = triton.cdiv(triton.cdiv(rows, strips), height) * height
    strips = triton.cdiv(rows, strip) if rows else 0

    k = g.new_empty(rows, 2 * rank) if room is None else room
    k_sums = g.new_empty(tiles, rows, 2 * rank, dtype=g.dtype if g.dtype == torch.bfloat16 else torch.float32)
    d_sums = g.new_empty(strips, 3 * columns * rank, dtype=torch.float32)
    c_sums = g.new_empty(0 if factors is None else strips, 2, columns, dtype=torch.float32)
    thin = [_rows(t, g.dtype) for t in (B_gate, B_up, h_gate, h_up, k_down, k_down if A_down is None else A_down)]
    if g.numel():
        with torch.cuda.device_of(g):
            _low_rank_kernel[(strips * tiles,)](
                g, gate, up, *_contiguous(factors, g), *thin, k_sums, d_sums, c_sums,
                rows, columns, strip, rank, *(t.stride(0) for t in (g, gate, up, *thin)),
                *map(float, (scale_gate, scale_up, *(sum_scales or (scale_gate, scale_up)))),
                ACTIVATION=activation, FACTORS=factors is not None, WRITE_ACT=write_act, ADDS=adds,
                DOWN=A_down is not None,
                PRECISION="ieee" if g.dtype == torch.float32 else "tf32",
                ROWS=height, COLUMNS=width, SLOT=slot, TWO=max(LEAST, 2 * slot), THREE=max(LEAST, 4 * slot),
                STAGES=stages, SUMS=max(1, min(height, warps * 32 * 16 // g.itemsize // width)), num_warps=warps,
                **dict(zip(("maxnreg",), registers, strict=False)),
            )  # fmt: skip
    d = g.new_empty(3, columns * rank, dtype=torch.float32)
    with torch.cuda.device_of(g):
        add_parts(Sum(k_sums, k), Sum(d_sums, d))
    k_gate, k_up = k.split(rank, 1)
    dB_gate, dB_up, dA_down = d
    made = (k_gate, k_up, dB_gate.view(columns, rank), dB_up.view(columns, rank), dA_down.view(rank, columns))
    return made if factors is None else (*made, *c_sums.sum(0))


@functools.lru_cache(maxsize=64)
def _strips(rows: int, tiles: int, height: int, rank: int, processors: int) -> int:
    """The number of strips with the least time: whole waves of programs, and partial sums beside 10 bytes a value."""

    def time(strips: int) -> float:
        strip = math.ceil(rows / strips / height) * height
        return math.ceil(tiles * math.ceil(rows / strip) / processors) * strip * (1 + 2.4 * rank / strip)

    return min(range(1, MOST_STRIPS + 1), key=time) if rows else 1


def _processors(device: torch.device) -> int:
    # Triton's interpreter runs on the CPU.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _contiguous(factors: Factors | None, unused: Tensor) -> Factors:
    return (unused, unused) if factors is None else (factors[0].contiguous(), factors[1].contiguous())


def _rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A thin tensor with its rows' values side by side; a range of a wider one's columns stays where it is."""
    t = t.to(dtype)
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _slot(rank: int) -> int:
    return max(16, int(triton.next_power_of_2(rank)))
