"""The ChaCha20 keystream (Bernstein 2008, RFC 8439), on CPUs by `cryptography`, on other devices by themselves.

The state of a block is 16 words of 32 bits: 4 constants, the key's 8, the block's number, and 3 that number the call.
Ten double rounds of quarter rounds (add, xor, rotate) and one addition of the state give 64 bytes. A call is a
message of its own, so block numbers begin at 0 and stay below 2^32.

Made on the device, 42M normals need no 336 MB over the bus. torch's own generators (Philox on CUDA, Mersenne twister
on the CPU) are not cryptographic: who sees some of their numbers can find the rest.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from deltaw.core.errors import MissingExtraError

CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
BLOCK_BYTES = 64


def keystream(key: bytes, *, call: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """`count` words of 64 bits as int64 (count,), the same on every device.

    Args:
        key: 32 bytes.
        call: number of the call, at most 96 bits; each may be used once with a key.
        count: words, below 2^35.
        device: where they are made and lie.
    """
    assert len(key) == 32 and 0 <= count < 2**35
    device = torch.device(device)
    if device.type == "cpu":
        return _host(key, call, count)
    return _device(key, call, -(-count // 8), device).view(torch.int64).view(-1)[:count]


def _host(key: bytes, call: int, count: int) -> Tensor:
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
    except ImportError:
        raise MissingExtraError("cryptography is not installed: pip install 'deltaw[privacy]'") from None
    words = torch.empty(count, dtype=torch.int64)
    if count:
        cipher = Cipher(algorithms.ChaCha20(key, bytes(4) + call.to_bytes(12, "little")), mode=None)
        cipher.encryptor().update_into(_zeros(count), memoryview(words.view(torch.uint8).numpy().data))
    return words


@functools.lru_cache(maxsize=4)
def _zeros(count: int) -> bytes:
    return bytes(8 * count)


def _device(key: bytes, call: int, blocks: int, device: torch.device) -> Tensor:
    words = torch.frombuffer(bytearray(key + call.to_bytes(12, "little")), dtype=torch.int32).to(device)
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from deltaw.privacy import chacha_triton

        return chacha_triton.blocks(words, blocks)
    return blocks_torch(words, blocks)


def blocks_torch(words: Tensor, count: int) -> Tensor:
    """Blocks 0 to count - 1 as int32 (count, 16), in torch's integer operations, which wrap around.

    Args:
        words: the key's 8 and the call's 3 words, int32 (11,), on the device to work on.
        count: blocks.
    """
    start = torch.empty(16, count, dtype=torch.int32, device=words.device)
    start[:4] = torch.tensor(CONSTANTS, dtype=torch.int32, device=words.device)[:, None]
    start[4:12] = words[:8, None]
    start[12] = torch.arange(count, device=words.device).to(torch.int32)
    start[13:] = words[8:, None]
    a, b, c, d = (rows.clone() for rows in start.split(4))
    for _ in range(10):
        _quarter_rounds(a, b, c, d)
        b, c, d = b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0)
        _quarter_rounds(a, b, c, d)
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    out = torch.empty(count, 16, dtype=torch.int32, device=words.device)
    return torch.add(torch.cat([a, b, c, d]).T, start.T, out=out)


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> None:
    for x, y, z, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        x.add_(y)
        z.bitwise_xor_(x)
        # The shift to the right carries the sign along.
        low = (z >> (32 - bits)).bitwise_and_((1 << bits) - 1)
        z.bitwise_left_shift_(bits).bitwise_or_(low)
