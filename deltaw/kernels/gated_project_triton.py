"""The gated activation and its thin product of `gated.py` for CUDA, in Triton: act is written, and not read again.

    gated_and_project           gate, up -> act, h          6 bytes a value in 16 bits

At M 8192, N 14336 that is 705 MB, 0.235 ms at 3.0 TB/s. Beside it each program reads A from the L2 cache, R N M / ROWS
values, 117 MB at R 16: predicted is 0.25 ms in all. On an H100 `gated` takes 0.233 ms and the product after it 0.084.

A program owns ROWS rows and goes through all columns, so that h needs no partial sums and is the same every time.
Every stored value of act depends on what was loaded from the same place, so storage may be shared with gate or up.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found]
import triton.language as tl  # type: ignore[import-untyped,import-not-found]
from torch import Tensor

from deltaw.kernels.gated import Activation, Factors
from deltaw.kernels.gated_triton import LEAST, _contiguous, _curve, _load, _processors, _real, _rows, _slot

#: Rows and columns of a step, warps and stages. Two such programs fit a processor of an H100 (90 KiB of shared memory
#: each, 64 registers a thread), so that all 256 for 8192 tokens run at a time, with 64 KiB a processor under way.
TILE = (32, 128, 8, 3)
#: The same for float32, whose products use no tensor cores.
TILE_32 = (16, 64, 4, 1)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _gated_project_kernel(  # type: ignore[no-untyped-def]
    gate, up, A, out, h, room, c_gate, c_up, rows, columns, rank, gate_row, up_row, A_row, out_row, room_row,
    ACTIVATION: tl.constexpr, FACTORS: tl.constexpr, ROOM: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SLOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    direction = tl.arange(0, SLOT)[:, None]
    sums = tl.zeros([SLOT, ROWS], tl.float32)
    for start in tl.range(0, columns, COLUMNS, num_stages=STAGES):
        column = start + tl.arange(0, COLUMNS)
        inside = column < columns
        live = (row < rows)[:, None] & inside[None, :]
        part = tl.load(A + direction * A_row + column[None, :], mask=(direction < rank) & inside[None, :], other=0.0)
        z_gate = _load(gate, row[:, None] * gate_row + column[None, :], live)
        z_up = _load(up, row[:, None] * up_row + column[None, :], live)
        x = _real(z_gate, _load(c_gate, column, inside) if FACTORS else 1.0, FACTORS)
        u = _real(z_up, _load(c_up, column, inside) if FACTORS else 1.0, FACTORS)
        P, _ = _curve(x, ACTIVATION)
        act = (P * x * u).to(out.dtype.element_ty)
        # The short side first, padded to `LEAST` rows, as in `_low_rank_kernel`. The other way around, or padded to 16,
        # the compiler makes act again in the layout of the product's operand: 40 to 58 instructions a value, not 26.
        sums = tl.dot(part, tl.trans(act), sums, input_precision=PRECISION)
        # Here, as the fence before the product would wait for it.
        tl.store(out + row[:, None] * out_row + column[None, :], act, mask=live)
    made = sums.to(h.dtype.element_ty)
    there = (direction < rank) & (row < rows)[None, :]
    tl.store(h + row[None, :] * rank + direction, made, mask=there)
    if ROOM:
        tl.store(room + row[None, :] * room_row + direction, made, mask=there)


def gated_and_project(
    gate: Tensor,
    up: Tensor,
    A: Tensor,
    *,
    activation: Activation,
    out: Tensor,
    factors: Factors | None = None,
    room: Tensor | None = None,
    tile: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """`gated.gated_and_project` for a rank of at least 1 in one launch; tensors as checked there, `tile` as `TILE`."""
    (rows, columns), rank, narrow = gate.shape, A.shape[0], gate.dtype == torch.float32
    height, width, warps, stages = tile or (TILE_32 if narrow else TILE)
    A, h = _rows(A, gate.dtype), gate.new_empty(rows, rank)
    behind = h if room is None else room
    if rows:
        with torch.cuda.device_of(gate):
            _gated_project_kernel[(triton.cdiv(rows, height),)](
                gate, up, A, out, h, behind, *_contiguous(factors, gate), rows, columns, rank,
                *(t.stride(0) for t in (gate, up, A, out, behind)),
                ACTIVATION=activation, FACTORS=factors is not None, ROOM=room is not None,
                PRECISION="ieee" if narrow else "tf32", ROWS=height, COLUMNS=width,
                SLOT=max(_slot(rank), 0 if narrow else LEAST), STAGES=stages, num_warps=warps,
            )  # fmt: skip
    return out, h


def busy(gate: Tensor) -> bool:
    """Whether every processor gets a program; else functions that share out columns too keep more of them busy."""
    height = (TILE_32 if gate.dtype == torch.float32 else TILE)[0]
    return bool(triton.cdiv(len(gate), height) >= _processors(gate.device))
