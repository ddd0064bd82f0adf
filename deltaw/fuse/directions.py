"""Directions in which a weight's rounding to 8 bits is made up for, inside the 8-bit product itself.

Inputs of a linear do not fill their space: a few directions hold most of them. Along those what rounding took from a
frozen weight is put back by more columns of the same product, [x, c] [W8, V]^T with

    c = x P (M, p)      V = (W - W8) R (N, p)      x ~ (x P) R^T

This is LQER's correction (Zhang et al., "LQER: Low-Rank Quantization Error Reconstruction for LLMs", arXiv 2402.02446)
with factors that belong to the input and not to the error, so they are found once and hold for every rounding. With D
the diagonal matrix of the norms of W's columns, to which rounding's errors are in proportion, P = D Q and R = D^-1 Q,
where Q are the first right singular vectors of x D, every row of x weighed by 1 / |x W^T|.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: How many there are: at a width of 4,096 the product is 1.6 % longer.
DIRECTIONS = 64

#: The most that a c is, of the largest value of its row of x, on the rows that directions were learned from; and what
#: it is about on rows that have as much along its direction as along any other.
SHARE = 0.5


class Directions(NamedTuple):
    """P (K, p) in the dtype of x, column by column, and R (K, p) in bfloat16, or at least float32 where x is not."""

    P: Tensor
    R: Tensor


def directions(x: Tensor, W: Tensor, count: int = DIRECTIONS) -> Directions:
    """Of inputs x (M, K) of a weight W (N, K); those beyond what x spans are zeros."""
    dtype, x, W = x.dtype, x.float(), W.float()
    size, outputs = W.norm(dim=0), (x @ W.t()).norm(dim=1)
    used = (outputs > 0) & outputs.isfinite()
    x = x[used]
    found = min(count, *x.shape)
    V = x.new_zeros(x.shape[1], count)
    if found:
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            # The function takes no generator.
            torch.manual_seed(0)  # noqa: TID251
            V[:, :found] = torch.svd_lowrank(x * (size / outputs[used, None]), q=found, niter=2)[2]
    P = size[:, None] * V
    R = torch.where(size[:, None] > 0, V / size[:, None], 0.0)
    if found:
        largest = x.abs().amax(1)
        most = torch.maximum(
            ((x @ P).abs() / largest[:, None]).amax(0),
            P.norm(dim=0) * (x.square().mean(1).sqrt() / largest).median(),
        )
        factor = torch.where(most > 0, SHARE / most, 1.0)
        P, R = P * factor, R / factor
    return Directions(P.t().to(dtype).contiguous().t(), R.to(torch.promote_types(dtype, torch.bfloat16)))
