"""The thin products of a low-rank adapter, each with one read of its large operand.

Symbols of `lora_linear.py`, M tokens: x (M, K), g (M, N), A (R, K), B (N, r), h (M, r), k (M, R).

    h = x A^T        k = scale g B,  dB = scale g^T h        dA = k^T x

With R of 16 a product does 16 to 32 operations for each byte that it reads, a tenth of what would keep tensor cores
busy: it costs what reading x or g costs, and k and dB together no more than one of them if g is read once.

On CUDA they are the Triton kernels of `low_rank_triton.py`, which add partial sums in a fixed order (the same result
every time), else plain products. Sums are float32, float64 for float64, rounded once.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from deltaw.core.errors import InputError

#: What goes to Triton on CUDA. float32 products without TF32 use no tensor cores, so that they are bound by arithmetic,
#: which cuBLAS does as well.
TRITON_DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)

#: The largest ranks that do, 0 for none. Partial sums grow with the rank: those of `project_and_sum` pass through
#: memory with 0.6 times the bytes of g at rank 32 and 1.25 times at 64, where reading g twice in cuBLAS is as good.
PROJECT_RANK = 64
PROJECT_AND_SUM_RANK = 32
OUTER_SUM_RANK = 64

#: Rows taken to float32 at a time where a product cannot return float32 by itself (16 bits on CPU).
CHUNK_ROWS = 1024


@functools.cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from deltaw.kernels import low_rank_triton

    return low_rank_triton


def _kernels_for(large: Tensor, rank: int, most: int) -> ModuleType | None:
    """The Triton kernels if this operand goes to them, else None."""
    fits = large.is_cuda and large.dtype in TRITON_DTYPES and 0 < rank <= most and large.numel() > 0
    return _kernels() if fits else None


def _check(fits: bool, what: str, *tensors: Tensor) -> None:
    if not fits:
        raise InputError(f"shapes {', '.join(str(tuple(tensor.shape)) for tensor in tensors)}: expected {what}")


def project(x: Tensor, A: Tensor) -> Tensor:
    """H = x A^T, (M, R) in x's dtype.

    Args:
        x: (M, K), any strides; rows of contiguous values are read as they lie.
        A: (R, K); taken in x's dtype.

    Raises:
        InputError: shapes that do not match.
    """
    _check(x.dim() == 2 == A.dim() and x.shape[1] == A.shape[1], "x (M, K) and A (R, K)", x, A)
    kernels = _kernels_for(x, len(A), PROJECT_RANK)
    form = project_torch if kernels is None else kernels.project
    h: Tensor = form(x, A)
    return h


def project_torch(x: Tensor, A: Tensor) -> Tensor:
    """`project` in torch on any device."""
    return x @ A.to(x.dtype).t()


def project_and_sum(g: Tensor, B: Tensor, h: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """K = scale g B, (M, r) in g's dtype, and dB = scale g^T h, (N, r) float32 (float64 for float64), g read once.

    Args:
        g: (M, N), any strides; rows of contiguous values are read as they lie.
        B: (N, r); taken in g's dtype.
        h: (M, r); taken in g's dtype.
        scale: alpha/r or its like.

    Raises:
        InputError: shapes that do not match.
    """
    _check(
        g.dim() == 2 == B.dim() and len(B) == g.shape[1] and h.shape == (len(g), B.shape[1]),
        "g (M, N), B (N, r) and h (M, r)",
        g,
        B,
        h,
    )
    kernels = _kernels_for(g, B.shape[1], PROJECT_AND_SUM_RANK)
    form = project_and_sum_torch if kernels is None else kernels.project_and_sum
    k, dB = form(g, B, h, scale=scale)
    return k, dB


def project_and_sum_torch(g: Tensor, B: Tensor, h: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """`project_and_sum` in torch on any device, with two reads of g."""
    # The factor inside the product, so that k is rounded once.
    k = torch.addmm(g.new_zeros(()), g, B.to(g.dtype), beta=0, alpha=scale)
    return k, _summed(g, h.to(g.dtype), scale)


def outer_sum(k: Tensor, x: Tensor) -> Tensor:
    """DA = k^T x, (R, K) float32 (float64 for float64).

    Args:
        k: (M, R); taken in x's dtype.
        x: (M, K), any strides; rows of contiguous values are read as they lie.

    Raises:
        InputError: shapes that do not match.
    """
    _check(k.dim() == 2 == x.dim() and len(k) == len(x), "k (M, R) and x (M, K)", k, x)
    kernels = _kernels_for(x, k.shape[1], OUTER_SUM_RANK)
    form = outer_sum_torch if kernels is None else kernels.outer_sum
    dA: Tensor = form(k, x)
    return dA


def outer_sum_torch(k: Tensor, x: Tensor) -> Tensor:
    """`outer_sum` in torch on any device."""
    return _summed(k.to(x.dtype), x, 1.0)


def _summed(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """Factor a^T b for a (M, m) and b (M, n): (m, n), at least float32."""
    if a.dtype in (torch.float32, torch.float64):
        return (a.t() @ b).mul_(factor)
    if a.is_cuda:
        return torch.mm(a.t(), b, out_dtype=torch.float32).mul_(factor)
    total = a.new_zeros(a.shape[1], b.shape[1], dtype=torch.float32)
    for rows, others in zip(a.split(CHUNK_ROWS), b.split(CHUNK_ROWS), strict=True):
        total.addmm_(rows.t().float(), others.float(), alpha=factor)
    return total
