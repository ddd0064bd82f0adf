"""ChaCha20's blocks for CUDA in Triton: `chacha.blocks_torch` to the bit, with the 16 words of a block in registers.

Every operation of the torch form goes through memory, 480 of them for a block; here only the result does.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found]
import triton.language as tl  # type: ignore[import-untyped,import-not-found]
from torch import Tensor

#: Blocks of one program.
TILE = 128


# The kernels' arguments carry no annotations: the compiler would look up their names.
@triton.jit  # type: ignore[untyped-decorator]
def _quarter(a, b, c, d):  # type: ignore[no-untyped-def]
    a += b
    d ^= a
    d = (d << 16) | (d >> 16)
    c += d
    b ^= c
    b = (b << 12) | (b >> 20)
    a += b
    d ^= a
    d = (d << 8) | (d >> 24)
    c += d
    b ^= c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit  # type: ignore[untyped-decorator]
def _word(words, i, like):  # type: ignore[no-untyped-def]
    return like * 0 + tl.load(words + i).to(tl.uint32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _blocks_kernel(words, out, count, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    n = block.to(tl.uint32)
    x0, x1, x2, x3 = _word(words, 0, n), _word(words, 1, n), _word(words, 2, n), _word(words, 3, n)
    x4, x5, x6, x7 = _word(words, 4, n), _word(words, 5, n), _word(words, 6, n), _word(words, 7, n)
    x8, x9, x10, x11 = _word(words, 8, n), _word(words, 9, n), _word(words, 10, n), _word(words, 11, n)
    x12, x13, x14, x15 = n, _word(words, 12, n), _word(words, 13, n), _word(words, 14, n)
    for _ in range(10):
        x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
    at = out + block * 16
    live = block < count
    tl.store(at, (x0 + _word(words, 0, n)).to(tl.int32, bitcast=True), mask=live)
    tl.store(at + 1, (x1 + _word(words, 1, n)).to(tl.int32, bitcast=True), mask=live)
    tl.store(at + 2, (x2 + _word(words, 2, n)).to(tl.int32, bitcast=True), mask=live)
    tl.store(at + 3, (x3 + _word(words, 3, n)).to(tl.int32, bitcast=True), mask=live)
    tl.store(at + 4, (x4 + _word(words, 4, n)).to(tl.int32, bitcast=True), mask=live)
    tl.store(at + 5, (x5 + _word(words, 5, n)).to(tl.int32, bitcast=True), mask=live)
    tl.store(at + 6, (x6 + _word(words, 6, n)).to(tl.int32, bitcast=True), mask=live)
    tl.store(at + 7, (x7 + _word(words, 7, n)).to(tl.int32, bitcast=True), mask=live)
    tl.store(at + 8, (x8 + _word(words, 8, n)).to(tl.int32, bitcast=True), mask=live)
    tl.store(at + 9, (x9 + _word(words, 9, n)).to(tl.int32, bitcast=True), mask=live)
    tl.store(at + 10, (x10 + _word(words, 10, n)).to(tl.int32, bitcast=True), mask=live)
    tl.store(at + 11, (x11 + _word(words, 11, n)).to(tl.int32, bitcast=True), mask=live)
    tl.store(at + 12, (x12 + n).to(tl.int32, bitcast=True), mask=live)
    tl.store(at + 13, (x13 + _word(words, 12, n)).to(tl.int32, bitcast=True), mask=live)
    tl.store(at + 14, (x14 + _word(words, 13, n)).to(tl.int32, bitcast=True), mask=live)
    tl.store(at + 15, (x15 + _word(words, 14, n)).to(tl.int32, bitcast=True), mask=live)


def blocks(words: Tensor, count: int) -> Tensor:
    """Blocks 0 to count - 1 as int32 (count, 16); arguments as `chacha.blocks_torch`'s."""
    from deltaw.privacy.chacha import CONSTANTS

    constants = torch.tensor(CONSTANTS, dtype=torch.int32, device=words.device)
    out = torch.empty(count, 16, dtype=torch.int32, device=words.device)
    if count:
        _blocks_kernel[(triton.cdiv(count, TILE),)](torch.cat([constants, words]), out, count, TILE=TILE)
    return out
