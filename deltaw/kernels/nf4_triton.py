"""The 4-bit kernels for CUDA, in Triton: `nf4.py`'s torch functions to the bit, in one launch each.

Both stages of double quantisation are undone in registers, so what passes through memory is half a byte read and one
value written each. Exactness needs two roundings in absmax = code[q] absmax2 + offset, hence `enable_fp_fusion=False`
(the compiler would make it one fused multiply-add), and true divisions.

Values are read by words of 8 codes where a range, and each row of an output whose rows lie apart, is a whole number of
words; else by blocks. Both take 0.055 ms for (14336, 4096) in bfloat16 on an H100, 2.67 TB/s. Flat indices are 64-bit.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found]
import triton.language as tl  # type: ignore[import-untyped,import-not-found]
from torch import Tensor

from deltaw.kernels.nf4 import NESTED_BLOCK, SMALLEST_DIVISOR, NestedScales

#: Values of one program that takes whole blocks (at least one).
TILE = 8192

#: Words of 8 codes in one program that takes words, and its warps: a word or two for each thread.
WORD_TILE = 512
WORD_WARPS = 8


# The kernels' arguments carry no annotations: the compiler would look up their names.
@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    codes,
    code,
    absmax,
    map8,
    absmax2,
    offset,
    out,
    start,
    stop,
    stop_byte,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
):
    block = start // BLOCK_SIZE + tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    live = block * BLOCK_SIZE < stop
    scale = tl.load(absmax + block, mask=live, other=0)
    if NESTED:
        mapped = tl.load(map8 + scale.to(tl.int32))
        scale = mapped * tl.load(absmax2 + block // NESTED_BLOCK, mask=live, other=0.0) + tl.load(offset)

    byte = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    # With a mask in steps of two (2 byte < stop) the compiler sees no runs of equal values, and loads byte by byte.
    pair = tl.load(codes + byte, mask=byte < stop_byte, other=0).to(tl.int32)
    high = tl.load(code + (pair >> 4)) * scale[:, None]
    low = tl.load(code + (pair & 15)) * scale[:, None]

    values = tl.interleave(high, low)
    at = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    tl.store(out + (at - start), values.to(out.dtype.element_ty), mask=(at >= start) & (at < stop))


@triton.jit(do_not_specialize=["first", "count", "row_words"])  # type: ignore[untyped-decorator]
def _dequantize_words_kernel(  # type: ignore[no-untyped-def]
    codes,
    code,
    absmax,
    map8,
    absmax2,
    offset,
    out,
    first,
    count,
    row_words,
    out_row,
    APART: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
):
    """Words of 8 codes, each by one thread, which loads 4 bytes and stores 8 values, 16 bytes in 16 bits.

    The load's layout is the store's: a warp reads 128 bytes in a row and writes 512 in a row, and 64-bit arithmetic and
    masks come once a word. Where rows lie apart, so does the division that finds a word's row, in 32 bits.
    """
    begin = tl.program_id(0).to(tl.int64) * WORDS
    # Claiming no more than single words keeps the compiler from giving a thread four of them.
    word = tl.max_contiguous(tl.arange(0, WORDS), 1)
    live = begin + word < count
    packed = tl.load((codes + (first + begin) * 4).to(tl.pointer_type(tl.uint32)) + word, mask=live, other=0)
    block = (first + begin + word) // BLOCK_WORDS
    scale = tl.load(absmax + block, mask=live, other=0)
    if NESTED:
        mapped = tl.load(map8 + scale.to(tl.int32))
        scale = mapped * tl.load(absmax2 + block // NESTED_BLOCK, mask=live, other=0.0) + tl.load(offset)
    place = tl.arange(0, 8)
    # Little-endian, and the earlier code of a byte in its high half.
    q = (packed[:, None] >> ((place ^ 1) * 4).to(tl.uint32)[None, :]) & 15
    values = tl.load(code + q) * scale[:, None]
    if APART:
        # Words from the beginning of the row in which the program begins.
        ahead = (begin % row_words).to(tl.int32) + word
        row = begin // row_words + ahead // row_words
        out += row[:, None] * out_row + (ahead % row_words)[:, None] * 8
    else:
        out += begin * 8 + word[:, None] * 8
    tl.store(out + place[None, :], values.to(out.dtype.element_ty), mask=live[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _quantize_kernel(  # type: ignore[no-untyped-def]
    x,
    code,
    codes,
    absmax,
    count,
    smallest,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    values = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), axis=1)
    # A maximum drops NaN, which must stay visible in the scales.
    broken = tl.max((values != values).to(tl.int32), axis=1)
    largest = tl.where(broken > 0, float("nan"), largest)
    tl.store(absmax + block, largest, mask=block * BLOCK_SIZE < count)

    scaled = values * tl.math.div_rn(1.0, tl.maximum(largest, tl.cast(smallest, tl.float32)))[:, None]
    q = tl.zeros([BLOCKS, BLOCK_SIZE], dtype=tl.int32)
    for i in tl.static_range(15):
        middle = (tl.load(code + i) + tl.load(code + i + 1)) * 0.5
        q += (scaled > middle).to(tl.int32)
    high, low = tl.split(tl.reshape(q, (BLOCKS, BLOCK_SIZE // 2, 2)))
    byte = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    tl.store(codes + byte, ((high << 4) | low).to(tl.uint8), mask=2 * byte < count)


def dequantize_4bit(
    codes: Tensor,
    code: Tensor,
    scales: Tensor | NestedScales,
    *,
    start: int,
    stop: int,
    out: Tensor,
    block_size: int = 64,
) -> None:
    """`nf4.dequantize_4bit_torch` in one kernel, both forms of scales; all tensors on one CUDA device.

    Rows that lie apart and are no whole number of words are made side by side and copied.
    """
    if start == stop:
        return
    apart = not out.is_contiguous()
    words = (start | stop | (out.shape[1] if apart else 0)) % 8 == 0 and codes.data_ptr() % 4 == 0
    if apart and not words:
        values = torch.empty_like(out, memory_format=torch.contiguous_format)
        dequantize_4bit(codes, code, scales, start=start, stop=stop, out=values, block_size=block_size)
        out.copy_(values)
        return
    nested = isinstance(scales, NestedScales)
    parts = [scales.q, scales.code, scales.absmax, scales.offset] if isinstance(scales, NestedScales) else [scales] * 4
    codes, *parts = [_beside(codes, part) for part in (codes, *parts)]
    with torch.cuda.device_of(codes):
        if words:
            count = (stop - start) // 8
            row_words, out_row = (out.shape[1] // 8, out.stride(0)) if apart else (1, 1)
            _dequantize_words_kernel[(-(-count // WORD_TILE),)](
                codes,
                code,
                *parts,
                out,
                start // 8,
                count,
                row_words,
                out_row,
                APART=apart,
                WORDS=WORD_TILE,
                BLOCK_WORDS=block_size // 8,
                NESTED=nested,
                NESTED_BLOCK=NESTED_BLOCK,
                num_warps=WORD_WARPS,
                enable_fp_fusion=False,
            )
            return
        blocks = max(1, TILE // block_size)
        touched = -(-stop // block_size) - start // block_size
        _dequantize_kernel[(-(-touched // blocks),)](
            codes,
            code,
            *parts,
            out,
            start,
            stop,
            -(-stop // 2),
            BLOCKS=blocks,
            BLOCK_SIZE=block_size,
            NESTED=nested,
            NESTED_BLOCK=NESTED_BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )


def _beside(codes: Tensor, part: Tensor) -> Tensor:
    """Contiguous on the codes' device; a look costs less than the calls that would change nothing."""
    return part if part.device == codes.device and part.is_contiguous() else part.contiguous().to(codes.device)


def quantize_4bit(x: Tensor, code: Tensor, *, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """`nf4.quantize_4bit_torch` in one kernel; all tensors on one CUDA device."""
    flat = x.detach().reshape(-1)
    count = len(flat)
    codes = torch.empty(-(-count // 2), dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=x.device)
    if count:
        blocks = max(1, TILE // 2 // block_size)
        with torch.cuda.device_of(x):
            _quantize_kernel[(triton.cdiv(len(absmax), blocks),)](
                flat,
                code,
                codes,
                absmax,
                count,
                SMALLEST_DIVISOR,
                BLOCKS=blocks,
                BLOCK_SIZE=block_size,
                num_warps=8,
                enable_fp_fusion=False,
            )
    return codes, absmax
