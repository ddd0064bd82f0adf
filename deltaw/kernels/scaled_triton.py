"""The products of `scaled.py` for CUDA, in Triton: every tensor of M x N values is read or written once.

    scale_and_sum    g, y -> out           3 tensors
    scaled_add       residual, z -> out    3

At M 8192, N 4096 in 16 bits each tensor has 67 MB, and each function takes 67 us at 3.0 TB/s. Sums are written as
float32 partial sums, one for each program's strip of rows, and added by a second, small reduction: no atomics, the same
result every time. Strips of 32 rows add 8 bytes a column for each: 4 % in 16 bits.

Every stored value depends on what was loaded from the same place, so storage may be shared with an input.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found]
import triton.language as tl  # type: ignore[import-untyped,import-not-found]
from torch import Tensor

from deltaw.kernels.gated_triton import _load, _store

#: Rows and columns of a step, and warps.
TILE = (4, 1024, 8)
#: The same where sums take registers; rows that a program goes through then. Two warps read a row of 512 columns in
#: 16 bits at a time, so that no sum passes between warps; at the shape above all 2,048 programs, of 48 registers a
#: thread, fit on an H100 at once, where four warps leave a short last round.
SUMMED_TILE = (2, 512, 2)
SUMMED_ROWS = 32


# The kernels' arguments carry no annotations: the compiler would look up their names.
@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _scale_and_sum_kernel(  # type: ignore[no-untyped-def]
    g, y, c, out, sums, rows, columns, g_row, y_row, out_row,
    STRIP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, COLUMNS)
    strip = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    factor = _load(c, column, inside)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, STRIP, ROWS):
        row = strip * STRIP + start + tl.arange(0, ROWS)[:, None]
        live = (row < rows) & inside[None, :]
        grad = _load(g, row * g_row + column, live)
        total += grad * _load(y, row * y_row + column, live)
        _store(out, row * out_row + column, grad * factor, live)
    tl.store(sums + strip * columns + column, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _scaled_add_kernel(  # type: ignore[no-untyped-def]
    residual, z, c, bias, out, rows, columns, residual_row, z_row, out_row,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    live = (row < rows) & inside[None, :]
    values = _load(z, row * z_row + column, live) * _load(c, column, inside)[None, :]
    if BIAS:
        values += _load(bias, column, inside)[None, :]
    _store(out, row * out_row + column, values + _load(residual, row * residual_row + column, live), live)


def scale_and_sum(
    g: Tensor,
    y: Tensor,
    c: Tensor,
    *,
    out: Tensor,
    tile: tuple[int, int, int] = SUMMED_TILE,
    strip: int = SUMMED_ROWS,
) -> tuple[Tensor, Tensor]:
    """`scaled.scale_and_sum_torch` in one launch and a small sum; tensors as checked there.

    `tile` is like `SUMMED_TILE`, and `strip`, a multiple of its rows, like `SUMMED_ROWS`.
    """
    (rows, columns), (height, width, warps) = g.shape, tile
    strips = -(-rows // strip)
    sums = torch.empty(strips, columns, dtype=torch.float32, device=g.device)
    if g.numel():
        with torch.cuda.device_of(g):
            _scale_and_sum_kernel[(strips * -(-columns // width),)](
                g, y, c, out, sums, rows, columns, g.stride(0), y.stride(0), out.stride(0),
                STRIP=strip, ROWS=height, COLUMNS=width, num_warps=warps,
            )  # fmt: skip
    return out, sums.sum(0)


def scaled_add(
    residual: Tensor,
    z: Tensor,
    c: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor,
    tile: tuple[int, int, int] = TILE,
) -> Tensor:
    """`scaled.scaled_add_torch` in one launch; tensors as checked there, `tile` like `TILE`."""
    (rows, columns), (height, width, warps) = z.shape, tile
    if z.numel():
        with torch.cuda.device_of(z):
            _scaled_add_kernel[(-(-rows // height) * -(-columns // width),)](
                residual, z, c, c if bias is None else bias, out, rows, columns,
                residual.stride(0), z.stride(0), out.stride(0),
                BIAS=bias is not None, ROWS=height, COLUMNS=width, num_warps=warps,
            )  # fmt: skip
    return out
