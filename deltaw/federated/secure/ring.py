"""Fixed point in the integers modulo 2^32: vectors of reals to words whose sums come back exactly.

A client's value v (|v| <= c) with its weight w (1 <= w <= W) becomes the word round(w v 2^f), and K clients' words are
added modulo 2^32. The sum is read as a number in [-2^31, 2^31), which is right as long as the true sum lies there;
`fraction_bits` gives the largest f for which no inputs within the bounds can leave it.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from deltaw.core.errors import InputError

#: The largest magnitude that a sum may have.
LIMIT = 2**31 - 1


def fraction_bits(*, clients: int, clip: float, weight_bound: int = 1, noise_bound: int = 0) -> int:
    """The largest number f of fraction bits with which a sum cannot overflow; negative for very large bounds.

    Proof. `encode` computes p = fl(w v) in float64, then p 2^f, which is exact, and rounds to a neighbouring integer.
    Rounding of floats is monotone, so |p| <= fl(W c) =: b. A neighbouring integer of a number of magnitude <= b 2^f has
    magnitude <= ceil(b 2^f). f is chosen such that b 2^f <= M with the integer M = floor(LIMIT / K) - N, so that also
    ceil(b 2^f) <= M. With noise of magnitude <= N on each word, K words sum to at most K (M + N) <= LIMIT. The word of
    the weights sums to at most K W, which is checked to be <= LIMIT.

    Args:
        clients: K, the most clients whose words are added.
        clip: c, the largest magnitude of a value.
        weight_bound: W, the largest weight.
        noise_bound: N, the largest magnitude of integer noise that each client adds to each word.

    Raises:
        InputError: bounds that leave no room.
    """
    if clients < 1 or weight_bound < 1 or noise_bound < 0 or not 2.0**-64 <= clip <= 2.0**64:
        raise InputError(
            f"{clients} clients, clip {clip}, weights to {weight_bound}, noise to {noise_bound}: "
            "expected counts of at least 1, noise of at least 0 and a clip from 2^-64 to 2^64"
        )
    largest = LIMIT // clients - noise_bound
    if largest < 1 or clients * weight_bound > LIMIT:
        raise InputError(
            f"{clients} clients with weights to {weight_bound} and noise to {noise_bound} overflow 32-bit words: "
            "lower the weights' or the noise's bound"
        )
    bound = clip * weight_bound
    bits = largest.bit_length() - math.frexp(bound)[1] + 1
    while Fraction(bound) * Fraction(2) ** bits > largest:
        bits -= 1
    return bits


def encode(
    vector: Tensor, *, clip: float, fraction_bits: int, weight: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Words round(weight * vector * 2^fraction_bits), int32 (n,); to the nearest, or stochastic with a generator.

    Args:
        vector: (n,) float, finite, of magnitude at most `clip`.
        clip: the bound that `fraction_bits` was computed with.
        fraction_bits: as `fraction_bits` gives.
        weight: a whole number within the weights' bound.
        generator: draws the rounding, which then has no bias.

    Raises:
        InputError: not a vector of floats, not finite, or beyond the clip; nothing is cut or wrapped silently.
    """
    check_range(vector, clip=clip)
    values = vector.double() * weight
    values.mul_(math.ldexp(1.0, fraction_bits))
    if generator is None:
        return values.round_().to(torch.int32)
    below = values.floor()
    draws = torch.rand(values.shape, dtype=torch.float64, generator=generator)
    return below.add_(draws < values - below).to(torch.int32)


def check_range(vector: Tensor, *, clip: float) -> None:
    """Raises `InputError` unless `vector` is (n,), floating-point, finite and of magnitude at most `clip`."""
    _check_vector(vector, floating=True)
    # max and min are NaN where any value is, and infinite where one is: one pass finds all three faults.
    low, high = (float(bound) for bound in torch.aminmax(vector))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{int((~torch.isfinite(vector)).sum())} of {vector.numel()} values are not finite")
    if max(-low, high) > clip:
        beyond = int((vector.abs() > clip).sum())
        raise InputError(
            f"{beyond} of {vector.numel()} values are beyond the clip of {clip:g} (largest {max(-low, high):g}): "
            "bound the update, or raise the clip on all clients"
        )


def encode_integers(vector: Tensor, *, clients: int, weight: int = 1) -> Tensor:
    """Integers times the weight as words, int32 (n,): for vectors that are integers already (integer noise).

    Raises:
        InputError: not a vector of integers, or one of which `clients` many could overflow the sum.
    """
    _check_vector(vector, floating=False)
    largest = LIMIT // clients // weight
    low, high = (int(bound) for bound in torch.aminmax(vector))
    if max(-low, high) > largest:
        raise InputError(
            f"an integer of magnitude {max(-low, high)} with weight {weight}: expected at most {largest}, "
            f"so that {clients} clients' words cannot overflow; use a coarser granularity"
        )
    return (vector.long() * weight).to(torch.int32)


def decode(words: Tensor, *, fraction_bits: int) -> Tensor:
    """The real numbers that summed words stand for: int32 (n,) to float64 (n,), exactly."""
    return words.double().mul_(math.ldexp(1.0, -fraction_bits))


def _check_vector(vector: Tensor, *, floating: bool) -> None:
    if vector.dim() != 1 or vector.numel() == 0 or vector.is_floating_point() is not floating or vector.is_complex():
        kind = "floating-point" if floating else "integer"
        raise InputError(
            f"a tensor {tuple(vector.shape)} of {vector.dtype}: expected {kind} values (n,), with n at least 1"
        )
