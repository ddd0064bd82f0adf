"""The thin products of a low-rank adapter, each with one read of its large operand where that pays.

Symbols of `lora_linear.py`, M tokens: x (M, K), g (M, N), A (R, K), B (N, r), h (M, r), k (M, R).

    h = x A^T        k = scale g B,  dB = scale g^T h        dA = k^T x        y + h B^T

With R of 16 a product does 16 to 32 operations for each byte that it reads, a tenth of what would keep tensor cores
busy: it costs what reading x or g costs, and k and dB together no more than one of them if g is read once.

Where cuBLAS would read or write a large operand twice, tensors of 16 bits on CUDA go to the Triton kernels of
`low_rank_triton.py`, which add partial sums in a fixed order (the same result every time). Everything else are plain
products. Sums are float32, float64 for float64, rounded once.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from deltaw.core.errors import InputError
from deltaw.kernels.norm import check_like

#: What goes to Triton on CUDA. float32 products without TF32 use no tensor cores, so that they are bound by arithmetic,
#: which cuBLAS does as well.
TRITON_DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)

#: The largest ranks that do. Partial sums grow with the rank: those of `project_and_sum` pass through memory with 0.6
#: times the bytes of g at rank 32 and 1.25 times at 64, where reading g twice in cuBLAS is as good.
PROJECT_AND_SUM_RANK = 32
ADD_PRODUCT_RANK = 64

#: Linears side by side that the kernel of `project_and_sum_blocks` takes.
MOST_BLOCKS = 3

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

    By cuBLAS on CUDA: on an H100 (M 8192, R 48) 0.028 ms for K 4096 and 0.084 for 14336, what reading x takes; a kernel
    of our own was as fast, with more work on the host.

    Args:
        x: (M, K), any strides.
        A: (R, K); taken in x's dtype.

    Raises:
        InputError: shapes that do not match.
    """
    _check(x.dim() == 2 == A.dim() and x.shape[1] == A.shape[1], "x (M, K) and A (R, K)", x, A)
    return x @ A.to(x.dtype).t()


def project_and_sum(
    g: Tensor, B: Tensor, h: Tensor, *, scale: float, sum_scale: float | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """K = scale g B, (M, r) in g's dtype, and dB = scale g^T h, (N, r) float32 (float64 for float64), g read once.

    On an H100 (M 8192, r 16) 0.039 ms for N 4096 and 0.109 for 14336; two products of cuBLAS take 0.062 and 0.172.

    Args:
        g: (M, N), any strides; rows of contiguous values are read as they lie.
        B: (N, r); taken in g's dtype.
        h: (M, r); taken in g's dtype.
        scale: alpha/r or its like.
        sum_scale: that of dB, where B has its own already; None: the same.
        out: storage for k, (M, r) in g's dtype, rows contiguous, any stride between them; shares no memory with the
            other tensors. None makes it.

    Raises:
        InputError: shapes, or an `out`, that do not match.
    """
    _check(
        g.dim() == 2 == B.dim() and len(B) == g.shape[1] and h.shape == (len(g), B.shape[1]),
        "g (M, N), B (N, r) and h (M, r)",
        g,
        B,
        h,
    )
    if out is not None:
        check_like("out", out, tuple(h.shape), g)
    kernels = _kernels_for(g, B.shape[1], PROJECT_AND_SUM_RANK)
    form = project_and_sum_torch if kernels is None else kernels.project_and_sum
    k, dB = form(g, B, h, scale=scale, sum_scale=sum_scale, out=out)
    return k, dB


def project_and_sum_torch(
    g: Tensor, B: Tensor, h: Tensor, *, scale: float, sum_scale: float | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`project_and_sum` in torch on any device, with two reads of g."""
    # The factor inside the product, so that k is rounded once.
    k = torch.addmm(g.new_zeros(()), g, B.to(g.dtype), beta=0, alpha=scale)
    dB = _summed(g, h.to(g.dtype), scale if sum_scale is None else sum_scale)
    return (k if out is None else out.copy_(k)), dB


def project_and_sum_blocks(
    g: Tensor, B: Tensor, h: Tensor, *, widths: Sequence[int], sum_scale: float = 1.0, out: Tensor
) -> Tensor:
    """`project_and_sum` of linears side by side, g read once: k_i = g_i B_i goes to `out`; dB_i = sum_scale g_i^T h_i.

    Args:
        g: (M, N), the columns of the linears one after the other.
        B: (N, n r), n linears; B_i (widths[i], r) in its rows and columns i r ... (i + 1) r, zeros elsewhere.
        h: (M, n r), the h_i (M, r) side by side.
        widths: columns of each linear in g, N together.
        sum_scale: alpha/r or its like, which B has already.
        out: (M, n r) in g's dtype, rows contiguous, any stride between them; gets the k_i side by side. Shares no
            memory with the other tensors.

    Returns:
        The dB_i under one another, (N, r) float32 (float64 for float64).

    Raises:
        InputError: shapes that do not match.
    """
    rank = h.shape[-1] // max(len(widths), 1)
    fits = g.dim() == 2 and sum(widths) == g.shape[1] and rank * len(widths) == h.shape[-1]
    what = "g (M, N), B (N, n r) and h (M, n r), for n widths of N together"
    _check(fits and B.shape == (g.shape[1], h.shape[1]) and len(h) == len(g), what, g, B, h)
    check_like("out", out, tuple(h.shape), g)
    kernels = _kernels_for(g, rank, PROJECT_AND_SUM_RANK) if len(widths) <= MOST_BLOCKS else None
    if kernels is None:
        return project_and_sum_blocks_torch(g, B, h, widths=widths, sum_scale=sum_scale, out=out)
    dB: Tensor
    _, dB = kernels.project_and_sum(g, B, h, scale=1.0, sum_scale=sum_scale, out=out, widths=tuple(widths))
    return dB


def project_and_sum_blocks_torch(
    g: Tensor, B: Tensor, h: Tensor, *, widths: Sequence[int], sum_scale: float = 1.0, out: Tensor
) -> Tensor:
    """`project_and_sum_blocks` in torch on any device."""
    rank = h.shape[1] // len(widths)
    torch.mm(g, B.to(g.dtype), out=out)
    pairs = zip(g.split(list(widths), 1), h.to(g.dtype).split(rank, 1), strict=True)
    return torch.cat([_summed(part, one, sum_scale) for part, one in pairs])


def outer_sum(k: Tensor, x: Tensor) -> Tensor:
    """DA = k^T x, (R, K) float32 (float64 for float64).

    By cuBLAS on CUDA: on an H100 (M 8192, R 48) 0.032 ms for K 4096 and 0.083 for 14336; a kernel of our own took 0.035
    and 0.103, with more work on the host.

    Args:
        k: (M, R); taken in x's dtype.
        x: (M, K), any strides.

    Raises:
        InputError: shapes that do not match.
    """
    _check(k.dim() == 2 == x.dim() and len(k) == len(x), "k (M, R) and x (M, K)", k, x)
    return _summed(k.to(x.dtype), x, 1.0)


def add_product(onto: Tensor, h: Tensor, B: Tensor, *, z: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """The sum onto + h B^T (+ z), rounded once, in one pass over the large operands.

    Args:
        onto: (M, N), of a floating dtype, rows contiguous, any stride between them.
        h: (M, P), likewise; taken in onto's dtype.
        B: (N, P), likewise; taken in onto's dtype.
        z: like onto; None stands for 0.
        out: storage for the sum, like onto; may be onto or z, and shares no memory with h or B. None makes it.

    Returns:
        (M, N) in onto's dtype.

    Raises:
        InputError: shapes, dtypes, devices or strides that do not fit.
    """
    what = "onto (M, N), h (M, P) and B (N, P)"
    fits = onto.dim() == 2 == h.dim() == B.dim() and h.shape[1] == B.shape[1] and onto.shape == (len(h), len(B))
    _check(fits, what, onto, h, B)
    check_like("onto", onto, tuple(onto.shape), onto)
    for name, thin in (("h", h), ("B", B)):
        check_like(name, thin, tuple(thin.shape), onto, dtype=False)
    for name, large in (("z", z), ("out", out)):
        if large is not None:
            check_like(name, large, tuple(onto.shape), onto)
    if out is None:
        out = torch.empty(onto.shape, dtype=onto.dtype, device=onto.device)
    elif len(out) > 1 and out.stride(0) < out.shape[1]:
        raise InputError(f"out has strides {out.stride()}: expected rows that do not overlap")
    kernels = _kernels_for(onto, h.shape[1], ADD_PRODUCT_RANK) if h.shape[1] % 8 == 0 else None
    form = add_product_torch if kernels is None else kernels.add_product
    total: Tensor = form(onto, h, B, z=z, out=out)
    return total


def add_product_torch(onto: Tensor, h: Tensor, B: Tensor, *, z: Tensor | None = None, out: Tensor) -> Tensor:
    """`add_product` in torch on any device."""
    h, B = h.to(onto.dtype), B.to(onto.dtype)
    if z is None and onto.is_cuda:
        return torch.addmm(onto, h, B.t(), out=out)
    large = (onto, out) if z is None else (onto, out, z)
    for thin, base, target, *more in zip(*(t.split(CHUNK_ROWS) for t in (h, *large)), strict=True):
        total = _product(thin, B.t()).add_(base)
        target.copy_(total.add_(more[0]) if more else total)
    return out


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A b, at least float32."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _summed(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """Factor a^T b for a (M, m) and b (M, n): (m, n), at least float32."""
    if a.is_cuda or a.dtype in (torch.float32, torch.float64):
        total = _product(a.t(), b)
        return total if factor == 1.0 else total.mul_(factor)
    total = a.new_zeros(a.shape[1], b.shape[1], dtype=torch.float32)
    for rows, others in zip(a.split(CHUNK_ROWS), b.split(CHUNK_ROWS), strict=True):
        total.addmm_(rows.t().float(), others.float(), alpha=factor)
    return total
