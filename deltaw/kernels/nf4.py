"""Blockwise quantisation to a codebook of 16 or 256 values, and back.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3; Dettmers et al., "8-bit
Optimizers via Block-wise Quantization", arXiv 2110.02861.

Values are taken flat, in blocks; the last block may be short. With absmax_i the largest magnitude of block i:

    q_j = index of the code nearest to x_j (1 / absmax_i)        x_j ~ code[q_j] absmax_i

Two 4-bit indices share a byte, the earlier one in the high half. Double quantisation stores absmax itself so, less its
mean, in blocks of 256. All arithmetic is float32, rounded once to the wanted dtype, in bitsandbytes' order of
operations: what is read back is bitsandbytes' value to the bit. Where two quantisers may differ, each function says so.

CUDA tensors go to the Triton kernels of `nf4_triton.py` where Triton is installed. The torch functions here are their
reference, to the bit, and the way on CPU.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.core.errors import InputError

#: Scales in a block of double quantisation.
NESTED_BLOCK = 256

#: Values that may share a scale.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

#: Values quantised at a time: at most four float32 temporaries of this many.
QUANTIZE_CHUNK = 1 << 22

#: Values dequantised at a time on CPU, a few MB of float32. Smaller chunks were slower: for bfloat16 2^18 by a fifth,
#: 2^15 by half.
DEQUANTIZE_CHUNK = 1 << 20

#: The same elsewhere, where the calls cost more and there is no such cache.
DEQUANTIZE_CHUNK_DEVICE = 1 << 24

#: Keeps 1 / absmax finite; a smaller absmax is stored as it is.
SMALLEST_DIVISOR = 1e-38


@dataclass(frozen=True)
class NestedScales:
    """Scales stored in 8 bits: absmax_i = code[q_i] absmax[i // 256] + offset.

    Attributes:
        q: (blocks,), uint8.
        code: (256,), float32, ascending.
        absmax: (ceil(blocks / 256),), float32.
        offset: (), float32.
    """

    q: Tensor
    code: Tensor
    absmax: Tensor
    offset: Tensor

    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The scales from `start` to `stop` in float32."""
        stop = len(self.q) if stop is None else min(stop, len(self.q))
        first = start // NESTED_BLOCK
        nested = self.absmax[first : -(-stop // NESTED_BLOCK), None].expand(-1, NESTED_BLOCK).reshape(-1)
        values = torch.index_select(self.code, 0, self.q[start:stop].int())
        # Two roundings, as everywhere: addcmul could fuse them into one.
        return values.mul_(nested[start - first * NESTED_BLOCK :][: len(values)]).add_(self.offset)

    def at(self, index: Tensor) -> Tensor:
        """The scales of chosen blocks in float32: any shape of integers, to the same shape."""
        return self.code[self.q[index].int()].mul_(self.absmax[index // NESTED_BLOCK]).add_(self.offset)


def triton_kernels(tensor: Tensor) -> ModuleType | None:
    """The module of the Triton kernels if `tensor` is on a CUDA device and Triton is installed, else None."""
    return _triton_module() if tensor.is_cuda else None


@functools.cache
def _triton_module() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from deltaw.kernels import nf4_triton

    return nf4_triton


def nearest(x: Tensor, code: Tensor) -> Tensor:
    """The index of the code nearest to each value of x, int32; at a middle between two codes, the smaller.

    Args:
        x: any shape, float32.
        code: (n,), ascending, n up to 256.
    """
    return _nearest(x, code).int()


def _nearest(x: Tensor, code: Tensor) -> Tensor:
    """`nearest` as uint8."""
    middles = (code[:-1] + code[1:]) / 2
    if x.is_cpu and len(code) <= 16:
        cell = _cells(middles).tolist()
        if len(set(cell)) == len(cell):
            return _nearest_by_cells(x, middles)
    return torch.bucketize(x, middles, out_int32=True).to(torch.uint8)


def _cells(x: Tensor) -> Tensor:
    """A grid of 257 cells over [-1, 1], ascending with x; clamped as integers too, since NaN passes the first."""
    return x.mul(128.0).add_(128.0).clamp_(0, 256).int().clamp_(0, 256)


def _nearest_by_cells(x: Tensor, middles: Tensor) -> Tensor:
    """The number of middles below x, no two of which share a cell: those of lower cells, and perhaps the own cell's.

    Exact, since a lower cell means a smaller value. One thread takes 2.6 ns a value, `bucketize`'s search 25 ns.
    """
    cell = _cells(middles)
    below = (torch.arange(257).unsqueeze(1) > cell).sum(1).to(torch.uint8)
    middle = torch.full((257,), float("inf")).index_copy_(0, cell.long(), middles)
    found = torch.empty(x.shape, dtype=torch.uint8)
    for part, target in zip(x.reshape(-1).split(1 << 18), found.view(-1).split(1 << 18), strict=True):
        at = _cells(part)
        torch.index_select(below, 0, at, out=target)
        target.add_(part > torch.index_select(middle, 0, at))
    return found


def _chunks(x: Tensor, code: Tensor, block_size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Pieces of x quantised: the first flat index, uint8 indices (whole blocks), absmax of these blocks."""
    flat = x.detach().reshape(-1)
    step = max(1, QUANTIZE_CHUNK // block_size) * block_size
    for low in range(0, len(flat), step):
        piece = flat[low : low + step].float()
        short = -len(piece) % block_size
        blocks = (F.pad(piece, (0, short)) if short else piece).view(-1, block_size)
        absmax = blocks.abs().amax(1)
        scaled = blocks * (1.0 / absmax.clamp(min=SMALLEST_DIVISOR)).unsqueeze(1)
        yield low, _nearest(scaled, code).flatten(), absmax


def quantize_4bit(x: Tensor, code: Tensor, *, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Codes and scales of x, taken row by row; finite values are the caller's to see to.

    Codes are bitsandbytes' (CUDA kernel and torch fallback) but for what its fallback does in a short last block: it
    divides by absmax there instead of multiplying with 1 / absmax, which can move a value across the middle of two
    codes where both products round differently, and stores 1e-38 where absmax is smaller.

    Extra memory: four float32 copies of `QUANTIZE_CHUNK` values; a copy of x if its values do not lie row by row.

    Args:
        x: any shape of n values, floating.
        code: (16,), float32, ascending from -1 to 1.
        block_size: values that share a scale, one of `BLOCK_SIZES`.

    Returns:
        (ceil(n/2),) uint8 and (ceil(n/block_size),) float32. The unused half of a last byte holds the code of 0.

    Raises:
        InputError: a block size or dtype that is none.
    """
    _check_blocks(block_size)
    if not x.is_floating_point():
        raise InputError(f"cannot quantise {x.dtype}: expected a floating dtype, convert the tensor first")
    kernels = triton_kernels(x)
    quantize = quantize_4bit_torch if kernels is None else kernels.quantize_4bit
    result: tuple[Tensor, Tensor] = quantize(x, code, block_size=block_size)
    return result


def quantize_4bit_torch(x: Tensor, code: Tensor, *, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """`quantize_4bit` in torch on any device."""
    count = x.numel()
    codes = torch.empty(-(-count // 2), dtype=torch.uint8, device=x.device)
    scales = torch.empty(-(-count // block_size), dtype=torch.float32, device=x.device)
    for low, q, absmax in _chunks(x, code, block_size):
        scales[low // block_size :][: len(absmax)] = absmax
        target = codes[low // 2 :][: len(q) // 2]
        # Two indices as one little-endian integer: columns of bytes take ten times as long.
        pairs = q[: 2 * len(target)].view(torch.int16)
        target.copy_(((pairs << 4) | (pairs >> 8)) & 255)
    return codes, scales


def dequantize_4bit(
    codes: Tensor,
    code: Tensor,
    scales: Tensor | NestedScales,
    *,
    start: int,
    stop: int,
    dtype: torch.dtype,
    block_size: int = 64,
    out: Tensor | None = None,
) -> Tensor:
    """The values from `start` to `stop` (exclusive) of the flat sequence, bitsandbytes' to the bit.

    That holds for the flat sequence. bitsandbytes 0.50 itself returns another shape than it was given for vectors,
    (1, n), and the transpose for a single byte; and its AVX-512 kernel takes other blocks' scales in matrices whose
    rows are a multiple of 16 long but not of the block size, so that blocks straddle rows: read as one row, they agree.

    Args:
        codes: (ceil(n/2),), uint8.
        code: (16,), float32.
        scales: (ceil(n/block_size),) float32, or their 8-bit form.
        start: the first flat index.
        stop: the one behind the last.
        dtype: of the result; float32 arithmetic rounded once.
        block_size: values that share a scale, one of `BLOCK_SIZES`.
        out: of `dtype`, to write to: (stop - start,), contiguous, or as many values in a matrix whose rows are
            contiguous and any distance apart. None makes the former.

    Raises:
        InputError: a range outside the codes, a block size that is none, an `out` that does not fit.
    """
    _check_blocks(block_size)
    if not 0 <= start <= stop <= 2 * len(codes):
        raise InputError(f"values {start} to {stop} of {2 * len(codes)}: expected a range inside")
    if out is None:
        out = torch.empty(stop - start, dtype=dtype, device=codes.device)
    elif out.numel() != stop - start or out.dtype != dtype or out.device != codes.device or not _in_rows(out):
        raise InputError(
            f"out is {out.dtype} of shape {tuple(out.shape)}, strides {out.stride()}, on {out.device}: "
            f"expected {dtype}, {stop - start} values in contiguous rows, on {codes.device}"
        )
    kernels = triton_kernels(codes)
    dequantize = dequantize_4bit_torch if kernels is None else kernels.dequantize_4bit
    dequantize(codes, code, scales, start=start, stop=stop, block_size=block_size, out=out)
    return out


def dequantize_4bit_torch(
    codes: Tensor,
    code: Tensor,
    scales: Tensor | NestedScales,
    *,
    start: int,
    stop: int,
    out: Tensor,
    block_size: int = 64,
) -> None:
    """`dequantize_4bit` into `out` in torch on any device; rows that lie apart are made side by side and copied.

    One look-up of 8 bytes per code byte. Measured on two Zen 4 threads against the same with 65,536 entries of 16
    bytes per two code bytes: as fast alone, twice as fast between matrix products, which leave no room in the cache for
    the larger table; `take`, `gather`, indexing and `F.embedding` take 1.3 to 3 times as long as `index_select`. A
    product that writes bfloat16 directly takes 1.4 times as long as one in place and a copy.
    """
    step = DEQUANTIZE_CHUNK if codes.is_cpu else DEQUANTIZE_CHUNK_DEVICE
    if not out.is_contiguous():
        for rows in out.split(max(1, step // out.shape[1])):
            values, stop = torch.empty_like(rows, memory_format=torch.contiguous_format), start + rows.numel()
            dequantize_4bit_torch(codes, code, scales, start=start, stop=stop, out=values, block_size=block_size)
            rows.copy_(values)
            start = stop
        return
    out, table = out.view(-1), _pairs(code)
    begin = start // block_size * block_size
    for low in range(begin, stop, step):
        high = min(low + step, stop)
        packed = codes[low // 2 : -(-high // 2)]
        target = out[max(low, start) - start : high - start]
        whole = out.dtype == torch.float32 and len(target) == 2 * len(packed) and target.data_ptr() % 8 == 0
        aligned = whole and target.storage_offset() % 2 == 0
        values = target if aligned else torch.empty(2 * len(packed), dtype=torch.float32, device=out.device)
        torch.index_select(table, 0, packed.int(), out=values.view(torch.int64))
        first, last = low // block_size, -(-high // block_size)
        absmax = scales.values(first, last) if isinstance(scales, NestedScales) else scales[first:last]
        full = len(values) // block_size
        values[: full * block_size].view(-1, block_size).mul_(absmax[:full].unsqueeze(1))
        if full < len(absmax):
            values[full * block_size :].mul_(absmax[full])
        if values is not target:
            target.copy_(values[max(low, start) - low : high - low])


def _in_rows(out: Tensor) -> bool:
    """Whether the values lie side by side, or do so within each row of a matrix."""
    if out.is_contiguous():
        return out.dim() in (1, 2)
    return out.dim() == 2 and (out.shape[1] == 1 or (out.stride(1) == 1 and out.stride(0) >= out.shape[1]))


@functools.lru_cache(maxsize=8)
def _pairs(code: Tensor) -> Tensor:
    """Both values of each byte, the high half's first, as one number of 8 bytes: (256,), int64.

    Remembered by the codebook's identity: those in use are shared and never written to.
    """
    byte = torch.arange(256, dtype=torch.int32, device=code.device)
    both = torch.stack([byte >> 4, byte & 15], dim=1).flatten()
    return torch.index_select(code, 0, both).view(torch.int64)


def _check_blocks(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise InputError(f"block size {block_size}: expected one of {', '.join(map(str, BLOCK_SIZES))}")


def quantize_8bit(x: Tensor, code: Tensor, *, block_size: int = NESTED_BLOCK) -> tuple[Tensor, Tensor]:
    """As `quantize_4bit` with a codebook of 256: (n,) uint8 and (ceil(n/block_size),) float32.

    Takes the nearest code. bitsandbytes on CPU finds it by a grid of 65,536 cells over [-1, 1], and so takes the
    farther of two codes for some values that lie within 1 / 65,535 of their middle (near 0, where codes lie closer than
    cells, also one farther off by no more than a cell), and code 0 instead of 0.0's for a block of nothing but
    zeros, which its absmax of 0 makes the same value.
    """
    q = torch.empty(x.numel(), dtype=torch.uint8, device=x.device)
    scales = torch.empty(-(-x.numel() // block_size), dtype=torch.float32, device=x.device)
    for low, found, absmax in _chunks(x, code, block_size):
        scales[low // block_size :][: len(absmax)] = absmax
        target = q[low : low + len(found)]
        target.copy_(found[: len(target)])
    return q, scales


def dequantize_8bit(q: Tensor, code: Tensor, absmax: Tensor, *, block_size: int = NESTED_BLOCK) -> Tensor:
    """The values (n,) in float32."""
    values = torch.index_select(code, 0, q.int())
    return values.mul_(absmax[:, None].expand(-1, block_size).reshape(-1)[: len(q)])
