"""Blockwise quantisation to a codebook of 16 or 256 values, and back.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3; Dettmers et al., "8-bit
Optimizers via Block-wise Quantization", arXiv 2110.02861.

Values are taken flat, in blocks; the last block may be short. With absmax_i the largest magnitude of block i:

    q_j = index of the code nearest to x_j / absmax_i        x_j ~ code[q_j] absmax_i

Two 4-bit indices share a byte, the earlier one in the high half. Double quantisation stores absmax itself so, less its
mean, in blocks of 256. All arithmetic is float32, rounded once to the wanted dtype: the order of operations is
bitsandbytes', so that results are its results to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: Scales in a block of double quantisation.
NESTED_BLOCK = 256


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
        q = self.q[start:stop]
        nested = self.absmax.repeat_interleave(NESTED_BLOCK)[start : start + len(q)] if len(q) else self.absmax[:0]
        return torch.index_select(self.code, 0, q.int()) * nested + self.offset


def _blocks(x: Tensor, block_size: int) -> Tensor:
    flat = x.reshape(-1).float()
    short = -len(flat) % block_size
    return (F.pad(flat, (0, short)) if short else flat).view(-1, block_size)


def nearest(x: Tensor, code: Tensor) -> Tensor:
    """The index of the code nearest to each value of x; of two equally near ones, the smaller.

    Args:
        x: any shape, float32.
        code: (n,), ascending.
    """
    return torch.bucketize(x, (code[:-1] + code[1:]) / 2, out_int32=True)


def quantize_4bit(x: Tensor, code: Tensor, *, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Codes and scales of x, taken row by row.

    Args:
        x: any shape of n values, floating.
        code: (16,), float32, ascending from -1 to 1.
        block_size: values that share a scale.

    Returns:
        (ceil(n/2),) uint8 and (ceil(n/block_size),) float32.
    """
    blocks = _blocks(x, block_size)
    absmax = blocks.abs().amax(1) if blocks.numel() else blocks.new_zeros(0)
    q = nearest(blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1), code).flatten()
    count = x.numel()
    q = q[: count + count % 2].to(torch.uint8)
    if len(q) % 2:
        q = F.pad(q, (0, 1))
    return (q[::2] << 4) | q[1::2], absmax


def dequantize_4bit(
    codes: Tensor,
    code: Tensor,
    scales: Tensor | NestedScales,
    *,
    start: int,
    stop: int,
    dtype: torch.dtype,
    block_size: int = 64,
) -> Tensor:
    """The values from `start` to `stop` (exclusive) of the flat sequence.

    Args:
        codes: (ceil(n/2),), uint8.
        code: (16,), float32.
        scales: (ceil(n/block_size),) float32, or their 8-bit form.
        start, stop: flat indices.
        dtype: of the result; float32 arithmetic rounded once.
        block_size: values that share a scale.
    """
    first, last = start // block_size, -(-stop // block_size)
    begin = first * block_size
    packed = codes[begin // 2 : -(-stop // 2)]
    q = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
    values = torch.index_select(code, 0, q.int())
    absmax = scales.values(first, last) if isinstance(scales, NestedScales) else scales[first:last]
    short = (last - first) * block_size - len(values)
    values = (F.pad(values, (0, short)) if short else values).view(-1, block_size) * absmax.unsqueeze(1)
    return values.flatten()[start - begin : stop - begin].to(dtype)


def quantize_8bit(x: Tensor, code: Tensor, *, block_size: int = NESTED_BLOCK) -> tuple[Tensor, Tensor]:
    """As `quantize_4bit` with a codebook of 256: (n,) uint8 and (ceil(n/block_size),) float32."""
    blocks = _blocks(x, block_size)
    absmax = blocks.abs().amax(1) if blocks.numel() else blocks.new_zeros(0)
    q = nearest(blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1), code).flatten()
    return q[: x.numel()].to(torch.uint8), absmax


def dequantize_8bit(q: Tensor, code: Tensor, absmax: Tensor, *, block_size: int = NESTED_BLOCK) -> Tensor:
    """The values (n,) in float32."""
    values = torch.index_select(code, 0, q.int())
    return values * absmax.repeat_interleave(block_size)[: len(q)]
