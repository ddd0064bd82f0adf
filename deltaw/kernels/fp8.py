"""Products of a frozen weight in 8-bit floats, and what quantises their operands.

Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433 (e4m3: 3 bits of mantissa, largest value 448,
steps of 2^-9 below 2^-6, no infinity).

Symbols: x (M, K), W (N, K), g (M, N). Each row of an operand has one scale s, float32, which stands outside the sum:

    s_i = max_j |x_ij| / 448 (1 for a row of zeros)      q_ij = e4m3(x_ij / s_i), to nearest even
    y  = x W^T ~ s_i  s_n  (q q_W^T)_in          W by rows, a scale for each output
    dx = g W   ~ s_i' s_k' (q_g q_WT^T)_ik       W^T by its rows, a scale for each input

Both products run along the contiguous axis of both operands, which is what tensor cores take; hence two copies of W.
x / s is computed as x (1 / s). The quotient cannot leave the range, so nothing needs clamping. A row with an infinity
or a NaN has the scale NaN, and its row or column of a product is NaN throughout.

Frozen weights may be given larger scales than they need, others from time to time (`spreads`): a weight that is rounded
in one way for good is another weight, which adapters learn to make up for. And along some directions of x what rounding
took from W (`lost`) can be put back by more columns of both operands: see `fuse/directions.py`.

Error to expect, for normal x and W: a value is off by 2.6 % of its size in the root mean square (1/16 at most, above
2^-6 s), and an element of a product by 3.7 % of the product's root mean square, for any K. Scales and what is added
are float32; how precisely the tensor cores sum is the library's affair, and far finer than that either way.

Bytes through memory, a value of 16 bits, and at 3.0 TB/s:

    quantize_rows                2 read, 1 written                      8192 x 4096     34 us
    quantize_rows_and_columns    2 + 2 read, 2 written                  14336 x 4096   117 us
    quantize_nf4                 0.5 + 0.5 read, 2 written              14336 x 4096    59 us
    either with `lost`           2 more written                         14336 x 4096    39 us more
    matmul_fp8                   M K + N K read, 2 M N written; 6 M N more for `accumulate`

Plain functions for use inside autograd functions. CUDA tensors of at most 32 bits are quantised by `fp8_triton.py`
where Triton is installed; the torch functions are its reference, to the bit, and the way everywhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.core.errors import InputError
from deltaw.kernels.memory import ROW_BYTES
from deltaw.kernels.nf4 import NestedScales, dequantize_4bit
from deltaw.kernels.norm import triton_form, wide_dtype

#: The largest e4m3 value.
LARGEST = 448.0

#: The smallest scale of a row that is not zero, the smallest normal float32: 1 / scale stays finite.
SMALLEST_SCALE = 2.0**-126

#: Whether tensor cores may sum a product with fewer bits than float32 has: 1,266 in the place of 1,129 TFLOP/s on an
#: H100. As in Transformer Engine, forward products do and gradients do not.
FAST_ACCUMULATION = False

#: Columns and rows of the operands that the hardware's product takes come in multiples of this.
_MULTIPLE = 16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

#: q (rows), scale of each; of W also those of W^T.
Rows = tuple[Tensor, Tensor]
RowsAndColumns = tuple[Tensor, Tensor, Tensor, Tensor]
#: Columns of memory behind the rows of either.
Room = tuple[int, int]


class Packed4Bit(Protocol):
    """A matrix in 4 bits as `quant/weight.py` holds it; the codebook comes beside it."""

    @property
    def codes(self) -> Tensor:
        """(ceil(out in / 2),) uint8, row by row, the earlier value in the high half."""

    @property
    def scales(self) -> Tensor | NestedScales:
        """Of each block."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def block_size(self) -> int:
        """Values that share a scale."""


def quantize_rows(x: Tensor, *, behind: Tensor | None = None, factor: Tensor | None = None) -> Rows:
    """X as e4m3 with a scale for each row.

    Args:
        x: (M, K), any strides; rows of contiguous values are read as they lie.
        behind: (M, P) in x's dtype, taken as more columns of x.
        factor: (P,) float32 for the columns of `behind`, as `write_columns` gives it; None: 1.

    Returns:
        q float8_e4m3fn, (M, K), or with `behind` (M, `whole`(K + P)), and scale (M,) float32, so that x ~ q scale, or
        [x, behind factor, zeros].

    Raises:
        InputError: no floating matrix with columns; a `behind` that does not fit.
    """
    _check_matrix("x", x)
    if behind is not None:
        _check_matrix("behind", behind)
        if (len(behind), behind.dtype, behind.device) != (len(x), x.dtype, x.device):
            raise InputError(
                f"behind is {behind.dtype} of {len(behind)} rows on {behind.device}: expected {x.dtype}, {len(x)} rows "
                f"on {x.device}, as x is"
            )
    kernels = triton_form(x, "fp8_triton")
    form = quantize_rows_torch if kernels is None else kernels.quantize_rows
    behind = None if behind is None else _rows_in_order(behind)
    result: Rows = form(_rows_in_order(x), behind=behind, factor=factor)
    return result


def quantize_rows_torch(
    x: Tensor,
    *,
    behind: Tensor | None = None,
    factor: Tensor | None = None,
    spread: Tensor | None = None,
) -> Rows:
    """`quantize_rows` in torch on any device; scales are of the largest values times `spread`."""
    wide = x.to(wide_dtype(x.dtype))
    if behind is not None:
        behind = behind.to(wide.dtype)
        wide = torch.cat([wide, behind if factor is None else behind * factor], 1)
        wide = F.pad(wide, (0, whole(wide.shape[1]) - wide.shape[1]))
    # Torch divides by a number as it multiplies with its inverse on CUDA and not on CPU; this is one product on both.
    largest = wide.abs().amax(1)
    if spread is not None:
        largest = largest * spread
    scale = (largest * (1.0 / LARGEST)).float().clamp_(min=SMALLEST_SCALE).masked_fill_(largest == 0, 1.0)
    scale.masked_fill_(~scale.isfinite(), float("nan"))
    scaled = wide * (1.0 / scale.to(wide.dtype)).unsqueeze(1)
    return scaled.to(torch.float8_e4m3fn), scale


def whole(columns: int) -> int:
    """How many columns an operand has that got more behind its own: what tensor cores' loads fetch at a time.

    With 4,112 columns a product takes 1.5 times as long, and 1.1 times where only rows begin at such multiples.
    """
    return -(-columns // ROW_BYTES) * ROW_BYTES


def spreads(rows: int, columns: int, turn: int, device: torch.device) -> Tensor:
    """Factors from 1 to 2 for the scales of a weight's rows and then columns: (rows + columns,) float32.

    A weight that is rounded the same way in every step is another weight, and adapters learn to make up for that. With
    scales that move through an octave from turn to turn each value is rounded up as often as down. Exponents are a
    low-discrepancy sequence in turn and place.
    """
    place = torch.arange(rows + columns, dtype=torch.float64, device=device)
    return torch.exp2((place * 0.5698402909980532 + turn * 0.7548776662466927).frac_()).float()


def quantize_rows_and_columns(
    W: Tensor | Sequence[Tensor], *, spread: Tensor | None = None, room: Room = (0, 0), lost: Tensor | None = None
) -> RowsAndColumns:
    """W and W^T as e4m3, each with a scale for each of its rows.

    Args:
        W: (N, K), any strides; or several of one K, taken as one matrix, one below the other, so that linears which
            share an input become one product.
        spread: (N + K,) float32, by which the scales of rows and of columns are larger than they need to be, as
            `spreads` gives them.
        room: columns of memory behind the rows of the first q, and of the second.
        lost: (N, K), contiguous, a floating dtype: filled with what rounding the rows took, W - q scale.

    Returns:
        q (N, K), scales (N,); q of W^T (K, N), scales (K,); all contiguous, but for room behind rows.

    Raises:
        InputError: no floating matrices with rows and columns, or of different dtypes, devices or K; a `lost` that does
            not fit.
    """
    parts = [W] if isinstance(W, Tensor) else list(W)
    _check_parts(parts)
    for part in parts:
        _check_matrix("W", part)
    _check_lost(lost, parts, parts[0].device)
    kernels = triton_form(parts[0], "fp8_triton")
    form = quantize_rows_and_columns_torch if kernels is None else kernels.quantize_rows_and_columns
    result: RowsAndColumns = form([_rows_in_order(part) for part in parts], spread=spread, room=room, lost=lost)
    return result


def quantize_rows_and_columns_torch(
    parts: Sequence[Tensor], *, spread: Tensor | None = None, room: Room = (0, 0), lost: Tensor | None = None
) -> RowsAndColumns:
    """`quantize_rows_and_columns` of matrices one below the other, in torch on any device."""
    W = torch.cat(list(parts))
    of_rows, of_columns = (None, None) if spread is None else spread.split([*W.shape])
    q, scale = quantize_rows_torch(W, spread=of_rows)
    if lost is not None:
        wide = wide_dtype(W.dtype)
        lost.copy_(W.to(wide) - q.to(wide) * scale.to(wide)[:, None])
    qT, scaleT = quantize_rows_torch(W.t().contiguous(), spread=of_columns)
    return _roomy(q, room[0]), scale, _roomy(qT, room[1]), scaleT


def _roomy(q: Tensor, room: int) -> Tensor:
    """The same with so many columns of memory behind its rows."""
    if not room:
        return q
    return q.new_empty(len(q), q.shape[1] + room)[:, : q.shape[1]].copy_(q)


def quantize_nf4(
    weight: Packed4Bit | Sequence[Packed4Bit],
    code: Tensor,
    *,
    spread: Tensor | None = None,
    room: Room = (0, 0),
    lost: Tensor | None = None,
) -> RowsAndColumns:
    """`quantize_rows_and_columns` of weights in 4 bits, whose float32 values exist in registers only.

    Not rounded to 16 bits between. Where the number of columns is odd, or Triton absent, the values do pass through
    memory.

    Args:
        weight: W (N, K), or several of one K.
        code: (16,) float32, its codebook.
        spread: as for `quantize_rows_and_columns`.
        room: as there.
        lost: as there.

    Raises:
        InputError: no rows or columns, or different devices or K; a `lost` that does not fit.
    """
    parts = list(weight) if isinstance(weight, Sequence) else [weight]
    _check_parts(parts)
    _check_lost(lost, parts, code.device)
    columns = parts[0].shape[1]
    kernels = triton_form(code, "fp8_triton")
    if kernels is None or columns % 2:
        values = [_values(part, code) for part in parts]
        return quantize_rows_and_columns(values, spread=spread, room=room, lost=lost)
    given = [(part.codes, part.scales, part.shape[0], part.block_size) for part in parts]
    result: RowsAndColumns = kernels.quantize_nf4(given, code, columns, spread=spread, room=room, lost=lost)
    return result


def write_columns(A: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Rows of A become columns of a matrix in 8 bits, each with a factor that lets it fill the range.

    So a product with W^T's rows takes a low-rank part along: [g, k f] [q_WT, q]^T ~ g W + k A.

    Args:
        A: (P, K), rows contiguous.
        q: (K, P) float8_e4m3fn, rows contiguous, any stride between them: written.
        scale: (K,) float32, of the rows that q is behind.

    Returns:
        f (P,) float32, so that A_pk ~ f_p q_kp scale_k.

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    fits = A.dim() == 2 and q.shape == A.shape[::-1] and scale.shape == q.shape[:1] and q.dtype == torch.float8_e4m3fn
    if not fits or A.dtype not in _DTYPES or (q.shape[1] > 1 and q.stride(1) != 1):
        raise InputError(
            f"A is {A.dtype} {tuple(A.shape)}, q {q.dtype} {tuple(q.shape)} of strides {q.stride()} and scale "
            f"{tuple(scale.shape)}: expected a floating (P, K), float8_e4m3fn (K, P) of contiguous rows, and (K,)"
        )
    kernels = triton_form(A, "fp8_triton")
    form = write_columns_torch if kernels is None else kernels.write_columns
    factor: Tensor = form(_rows_in_order(A), q, scale)
    return factor


def write_columns_torch(A: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """`write_columns` in torch on any device."""
    codes, factor = quantize_rows_torch(A.to(wide_dtype(A.dtype)) * (1.0 / scale.to(wide_dtype(A.dtype))))
    q.copy_(codes.t())
    return factor


def _values(weight: Packed4Bit, code: Tensor) -> Tensor:
    rows, columns = weight.shape
    values = dequantize_4bit(
        weight.codes,
        code,
        weight.scales,
        start=0,
        stop=rows * columns,
        dtype=torch.float32,
        block_size=weight.block_size,
    )
    return values.view(rows, columns)


def matmul_fp8(
    q: Tensor,
    scale: Tensor,
    qW: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: Tensor | None = None,
    fast_accumulation: bool = FAST_ACCUMULATION,
) -> Tensor:
    """The product of what q and qW stand for: scale w_scale (q qW^T) + bias + accumulate.

    In the hardware's 8-bit products for bfloat16 on CUDA devices of compute capability 8.9 and up, which want K and N
    in multiples of 16: other operands are copied and padded. There the product with its bias is rounded before
    `accumulate` is added; elsewhere all is rounded once, after a product of float32 copies.

    Args:
        q: (M, K) float8_e4m3fn.
        scale: (M,) float32.
        qW: (N, K) float8_e4m3fn: W's form by rows for x W^T, W^T's for g W.
        w_scale: (N,) float32.
        bias: (N,) or None.
        out_dtype: of the result.
        accumulate: (M, N), added to the result, or None; not written to.
        fast_accumulation: whether the hardware may sum with fewer bits than float32 has.

    Returns:
        (M, N) in `out_dtype`.

    Raises:
        InputError: shapes or dtypes that do not fit.
    """
    _check_product(q, scale, qW, w_scale, bias, accumulate)
    if not (out_dtype == torch.bfloat16 and q.is_cuda and q.numel() and _has_products(q.device)):
        return matmul_fp8_torch(q, scale, qW, w_scale, bias=bias, out_dtype=out_dtype, accumulate=accumulate)
    rows, columns = qW.shape
    more, wider = -rows % _MULTIPLE, -columns % _MULTIPLE
    result = torch._scaled_mm(
        _padded(q, 0, wider),
        _padded(qW, more, wider).t(),
        scale_a=scale.contiguous()[:, None],
        # A padded output is a sum of zeros times this.
        scale_b=(F.pad(w_scale, (0, more), value=1.0) if more else w_scale.contiguous())[None, :],
        bias=None if bias is None else F.pad(bias.to(out_dtype), (0, more)),
        out_dtype=out_dtype,
        use_fast_accum=fast_accumulation,
    )
    if more:
        result = result[:, :rows].contiguous()
    return result if accumulate is None else result.add_(accumulate)


def matmul_fp8_torch(
    q: Tensor,
    scale: Tensor,
    qW: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: Tensor | None = None,
) -> Tensor:
    """`matmul_fp8` by a product of float32 copies, on any device."""
    result = (q.float() @ qW.float().t()).mul_(scale[:, None]).mul_(w_scale)
    for term in (bias, accumulate):
        if term is not None:
            result.add_(term)
    return result.to(out_dtype)


@functools.cache
def _has_products(device: torch.device) -> bool:
    # AMD's processors that multiply 8-bit floats have, up to MI300, another format of them.
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 9)


def _padded(q: Tensor, rows: int, columns: int) -> Tensor:
    """With rows and columns of zeros behind, row by row."""
    if q.stride(1) != 1 or q.stride(0) % _MULTIPLE:
        q = q.contiguous()
    return F.pad(q.view(torch.uint8), (0, columns, 0, rows)).view(q.dtype) if rows or columns else q


def _rows_in_order(x: Tensor) -> Tensor:
    """X, or a copy where the values of a row do not lie side by side."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


def _check_matrix(name: str, x: Tensor) -> None:
    if x.dim() != 2 or x.shape[1] == 0 or x.dtype not in _DTYPES:
        raise InputError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)}: expected a matrix with columns in bfloat16, float16, "
            "float32 or float64"
        )


def _check_parts(parts: Sequence[Tensor] | Sequence[Packed4Bit]) -> None:
    """That matrices can lie one below the other."""
    shapes = [tuple(part.shape) for part in parts]
    if not shapes or any(len(shape) != 2 or shape[1] != shapes[0][-1] or 0 in shape for shape in shapes):
        raise InputError(f"weights of shapes {shapes}: expected at least one, (rows, columns), all of the same columns")
    tensors = [part if isinstance(part, Tensor) else part.codes for part in parts]
    if len({(tensor.dtype, tensor.device) for tensor in tensors}) > 1:
        found = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in tensors)
        raise InputError(f"weights are {found}: expected one dtype and one device, convert or move them")


def _check_lost(lost: Tensor | None, parts: Sequence[Tensor] | Sequence[Packed4Bit], device: torch.device) -> None:
    if lost is None:
        return
    shape = sum(part.shape[0] for part in parts), parts[0].shape[1]
    if lost.shape != shape or not lost.is_contiguous() or lost.dtype not in _DTYPES or lost.device != device:
        raise InputError(
            f"lost is {lost.dtype} of shape {tuple(lost.shape)} on {lost.device}: expected a floating dtype, "
            f"contiguous, {shape} on {device}"
        )


def _check_product(
    q: Tensor, scale: Tensor, qW: Tensor, w_scale: Tensor, bias: Tensor | None, accumulate: Tensor | None
) -> None:
    fits = q.dim() == 2 == qW.dim() and q.shape[1] == qW.shape[1] and q.dtype == qW.dtype == torch.float8_e4m3fn
    if not fits:
        raise InputError(
            f"operands are {q.dtype} {tuple(q.shape)} and {qW.dtype} {tuple(qW.shape)}: expected float8_e4m3fn, (M, K) "
            "and (N, K)"
        )
    rows, columns = q.shape[0], qW.shape[0]
    wanted = {
        "scale": (scale, (rows,)),
        "w_scale": (w_scale, (columns,)),
        "bias": (bias, (columns,)),
        "accumulate": (accumulate, (rows, columns)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and (tensor.shape != shape or (name.endswith("scale") and tensor.dtype != torch.float32)):
            raise InputError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}: expected "
                f"{'float32' if name.endswith('scale') else 'floating values'}, {shape}"
            )
