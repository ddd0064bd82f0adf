"""The codebooks: NormalFloat's 16 values, and the 256 of the dynamic data type that holds scales and optimizer states.

Dettmers et al., "QLoRA", arXiv 2305.14314, section 3 and appendix E; Dettmers, "8-bit Approximations for Parallelism
in Deep Learning", arXiv 1511.04561, section 2.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

#: The values of 4-bit NormalFloat, as every file of the format has them.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def normal_float_code() -> Tensor:
    """NormalFloat from its definition: (16,) float64, ascending.

    Eight quantiles of the standard normal above 0 and seven below, evenly spaced in probability up to
    1 - (1/32 + 1/30)/2, and 0 itself; divided by the largest. The published constants, from float32 arithmetic, are
    within 2e-7 of these; they are the format, so they are what is computed with.
    """
    end = 1 - (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return values / values.max()


@functools.cache
def nf4_code(device: torch.device | str = "cpu") -> Tensor:
    """NF4's values on a device: (16,) float32, ascending. Shared: never write to it."""
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)


@functools.cache
def dynamic_code(signed: bool = True, device: torch.device | str = "cpu") -> Tensor:
    """The dynamic 8-bit type's values on a device: (256,) float32, ascending. Shared: never write to it.

    For exponents e = 0 ... -6, the middles of 2^(6+e) (unsigned: twice as many) equal parts of [0.1, 1], times 10^e,
    with both signs where signed; 0 and 1 besides.
    """
    values = [0.0, 1.0]
    for exponent in range(-6, 1):
        parts = 2 ** (6 + exponent + (0 if signed else 1))
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0 * 10.0**exponent
        values += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)
