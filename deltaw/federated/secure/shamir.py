"""Shamir's secret sharing of 32-byte secrets (Shamir 1979): any t of n shares give the secret, fewer say nothing.

The secret s is the constant term of a polynomial f of degree t - 1 with uniform coefficients in the field of
p = 2^256 + 297 elements (the smallest prime above 2^256); share i is f(i), i = 1 .. n. From t shares,
s = f(0) = sum_i f(i) prod_{j != i} j / (j - i) mod p. Exact integers throughout.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Mapping

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, *, threshold: int, count: int) -> list[bytes]:
    """`count` shares of 33 bytes, the one at place i - 1 being f(i).

    Raises:
        ValueError: not 32 bytes, or not 1 <= threshold <= count.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= count:
        raise ValueError(f"a secret of {len(secret)} bytes, {threshold} of {count}: expected 32, and t from 1 to n")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = []
    for x in range(1, count + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * x + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


def recover(shares: Mapping[int, bytes], *, threshold: int) -> bytes:
    """The secret from at least `threshold` shares by their numbers i; which of more are taken makes no difference.

    Raises:
        ValueError: too few, a share that is none, or shares that belong to no 32-byte secret.
    """
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares, expected at least {threshold}")
    points = tuple(sorted(shares)[:threshold])
    total = 0
    for x, weight in zip(points, _weights(points), strict=True):
        value = int.from_bytes(shares[x], "big")
        if len(shares[x]) != SHARE_BYTES or value >= PRIME:
            raise ValueError(f"share {x} is no number of the field")
        total = (total + value * weight) % PRIME
    if total >> (8 * SECRET_BYTES):
        raise ValueError("the shares belong to no secret")
    return total.to_bytes(SECRET_BYTES, "big")


@functools.lru_cache(maxsize=64)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights at 0; a server asks with the same points for every secret of a round."""
    weights = []
    for i in points:
        above, below = 1, 1
        for j in points:
            if j != i:
                above, below = above * j % PRIME, below * (j - i) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
