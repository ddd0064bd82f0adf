"""The factored norms of `dora_linear.row_norms` for CUDA, in Triton: all behind the products with A in one launch.

A model has hundreds of these norms and each is small, so that what counts is how many launches they take: in torch they
are eight, on tensors of (out, r).
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found]
import triton.language as tl  # type: ignore[import-untyped,import-not-found]
from torch import Tensor

#: Rows of a program.
ROWS = 64
#: The largest rank: its products are made on float32 tiles in registers.
LARGEST_RANK = 64


# The kernels' arguments carry no annotations: the compiler would look up their names.
@triton.jit(do_not_specialize=["scale"])  # type: ignore[untyped-decorator]
def _row_norms_kernel(  # type: ignore[no-untyped-def]
    squared, U, G, B, out, rows, rank, u_row, u_column, b_row, b_column, g_row, scale, least,
    ROWS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    direction = tl.arange(0, RANK)
    live = (row < rows)[:, None] & (direction < rank)[None, :]
    wide = row.to(tl.int64)[:, None]
    b = tl.load(B + wide * b_row + direction[None, :] * b_column, mask=live, other=0.0).to(tl.float32)
    u = tl.load(U + wide * u_row + direction[None, :] * u_column, mask=live, other=0.0).to(tl.float32)
    square = (direction < rank)[:, None] & (direction < rank)[None, :]
    g = tl.load(G + direction[:, None] * g_row + direction[None, :], mask=square, other=0.0)
    both = 2.0 * scale * u + scale * scale * tl.dot(b, g, input_precision="ieee")
    total = tl.load(squared + row, mask=row < rows, other=0.0) + tl.sum(b * both, 1)
    tl.store(out + row, tl.sqrt_rn(tl.maximum(total, least)), mask=row < rows)


def row_norms(squared: Tensor, U: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`dora_linear.row_norms` in one launch behind A A^T; `squared` float32, rank up to `LARGEST_RANK`."""
    A = A.detach().float()
    G, out = A @ A.t(), torch.empty_like(squared)
    rows, rank = B.shape
    with torch.cuda.device_of(B):
        _row_norms_kernel[(triton.cdiv(rows, ROWS),)](
            squared, U, G, B, out, rows, rank, *U.stride(), *B.stride(), G.stride(0), float(scale),
            torch.finfo(torch.float32).tiny, ROWS=ROWS, RANK=max(16, triton.next_power_of_2(rank)), num_warps=4,
        )  # fmt: skip
    return out
