"""Integer noise for sums made under secure aggregation, sampled exactly, with what it costs.

A client's vector v (d,) of norm at most c becomes integers, gets noise, and is summed in a ring (the distributed
discrete Gaussian, Kairouz, Liu and Steinke, arXiv 2102.06387):

1. `rotated`: H D v / sqrt(D) (Hadamard matrix, random signs that all clients share), which flattens single large
   values. Not needed for privacy; a ring of 32 bits holds sums of unrotated vectors with room to spare.
2. `rounded`: clip to c, divide by the granularity g, round each value up or down at random to its mean, again until
   the norm is at most `norm_bound`: with d' = sqrt(d)/2, min(c/g + sqrt(d), sqrt((c/g)^2 + d/4 + sqrt(2 ln 1/beta)
   (c/g + d'))). The bound is what one client changes in the sum, for certain and not with probability 1 - beta.
3. `skellam` or `discrete_gaussian` noise in units of g, of 1/K of the wanted variance for K clients.

**Exact sampling.** Both laws are reached from the discrete Laplace by rejection, as by Canonne, Kamath and Steinke
(arXiv 2004.00010). What is accepted with probability p = exp(-x) is decided by comparing 63 random bits with p in
float64; where the two are closer than float64's error could make up, the bits are continued and p is computed in as
many digits as the decision needs (mpmath). So the result follows the law exactly, at the speed of float64. The running
time depends on the values, as in every rejection sampler.

**Costs**, as Renyi divergence of order a, for a sum with sensitivities L2 and L1 <= min(L2^2, sqrt(d) L2):
`skellam_rdp` (Agarwal, Kairouz and Liu, arXiv 2110.04995, Theorem 3.5) and `discrete_gaussian_rdp` (2102.06387,
Theorem 1 and Proposition 14). Sums of Skellams are Skellams; those of discrete Gaussians only nearly, hence tau.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import mpmath  # type: ignore[import-untyped]
import torch
from torch import Tensor

from deltaw.core.errors import InputError, RunError
from deltaw.core.generators import generator
from deltaw.privacy.noise import LOW_63_BITS, SecureNoise

#: Chance that a rounding is too long and is made again; the papers' choice.
BETA = math.exp(-0.5)
#: Standard deviations above this would need more than int64's and float64's exact integers.
LARGEST_STD = 2.0**30
CHUNK = 1 << 18
#: Random bits that a decision which float64 leaves open is continued by.
OPEN_BITS = 256


def discrete_gaussian(shape: Sequence[int], *, sigma: float, noise: SecureNoise) -> Tensor:
    """Integers x with probability proportional to exp(-x^2 / (2 sigma^2)), exactly, int64 on the CPU.

    Args:
        shape: of the result.
        sigma: the parameter, from 0 (zeros) to 2^30; for sigma over 1 also the standard deviation, to 1e-7.
        noise: the source.

    Raises:
        InputError: a sigma out of range.
    """
    _check_std(sigma)
    if not sigma:
        return torch.zeros(tuple(shape), dtype=torch.int64)
    width, variance = math.floor(sigma) + 1, sigma * sigma

    def proposed(count: int) -> Tensor:
        y = _discrete_laplace(count, width, noise)
        loss = (y.abs().double() - variance / width).square_().div_(2 * variance)

        def exact(i: int) -> Any:
            square = mpmath.mpf(sigma) ** 2
            return -((abs(int(y[i])) - square / width) ** 2) / (2 * square)

        # sigma^2 / width, below sigma, is wrong by 2^-52 of itself, which the square makes (|y| + sigma) / sigma of.
        error = (loss + (y.abs().double() + sigma) / sigma + 1).mul_(2.0**-49)
        return y[_accepted(-loss, error, exact, noise)]

    return _filled(shape, proposed)


def skellam(shape: Sequence[int], *, variance: float, noise: SecureNoise) -> Tensor:
    """Differences of two independent Poisson numbers of mean variance/2 each, exactly, int64 on the CPU.

    Args:
        shape: of the result.
        variance: from 0 (zeros) to 2^60.
        noise: the source.

    Raises:
        InputError: a variance out of range.
    """
    if not variance >= 0:
        raise InputError(f"a noise variance of {variance}; 0 or more is needed")
    _check_std(math.sqrt(variance))
    if not variance:
        return torch.zeros(tuple(shape), dtype=torch.int64)
    return _poisson(shape, variance / 2, noise).sub_(_poisson(shape, variance / 2, noise))


def _poisson(shape: Sequence[int], mean: float, noise: SecureNoise) -> Tensor:
    """Poisson numbers less floor(mean), which falls out of the difference of two.

    Proposals are floor(mean) + y, y discrete Laplace of width t; accepted by log p + |y| / t less its maximum. That
    lies where p(k + 1) / p(k) = mean / (k + 1) passes exp(-1/t) on the right, and exp(1/t) on the left.
    """
    centre, width = math.floor(mean), math.floor(math.sqrt(mean)) + 1

    def weight(y: Tensor) -> Tensor:
        return _log_poisson(y, centre, mean).add_(y.abs().double() / width)

    peaks = [math.floor(mean * math.exp(side / width)) - centre + near for side in (-1, 1) for near in (-1, 0, 1)]
    highest = torch.tensor(peaks).clamp(min=-centre)
    top = float((weight(highest) + _poisson_error(highest, width)).max())

    def proposed(count: int) -> Tensor:
        y = _discrete_laplace(count, width, noise)
        y = y[y >= -centre]

        def exact(i: int) -> Any:
            k = int(y[i])
            ratio = k * mpmath.log(mpmath.mpf(mean)) - mpmath.loggamma(centre + k + 1) + mpmath.loggamma(centre + 1)
            return ratio + mpmath.mpf(abs(k)) / width - mpmath.mpf(top)

        return y[_accepted(weight(y).sub_(top), _poisson_error(y, width), exact, noise)]

    return _filled(shape, proposed)


def _log_poisson(y: Tensor, centre: int, mean: float) -> Tensor:
    """The logarithm of p(centre + y) / p(centre), float64; Stirling's series where k is 16 or more.

    With a = k - mean: log p(k) = a - (k + 1/2) log1p(a / mean) - series(k) - log(2 pi mean) / 2, without the terms
    of k log k that would cancel.
    """
    k = y.double() + centre
    if centre < 16:
        return y.double() * math.log(mean) - torch.lgamma(k + 1) + math.lgamma(centre + 1)

    def stirling(away: Tensor, k: Tensor) -> Tensor:
        inverse, square = 1 / k, 1 / (k * k)
        series = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square * (1 / 1680 - square / 1188))))
        return away - (k + 0.5) * torch.log1p(away / mean) - series

    short = (k < 16).nonzero().view(-1)
    value = stirling((y.double() + (centre - mean)).clamp_(min=16 - mean), k.clamp(min=16))
    if len(short):
        value[short] = k[short] * math.log(mean) - torch.lgamma(k[short] + 1) - mean + 0.5 * math.log(math.tau * mean)
    middle = torch.tensor(float(centre), dtype=torch.float64)
    return value - stirling(middle - mean, middle)


def _poisson_error(y: Tensor, width: int) -> Tensor:
    """A bound on the float64 error of `_log_poisson` plus |y| / width: 2^-46 of the largest terms."""
    away = y.abs().double()
    return (away + 4096).mul_(2.0**-46)


def _discrete_laplace(count: int, width: int, noise: SecureNoise) -> Tensor:
    """Up to `count` integers with probability proportional to exp(-|y| / width) (2004.00010, Algorithm 2)."""
    limit = 2**63 // width * width
    u = noise.words(count).bitwise_and_(LOW_63_BITS)
    u = u[u < limit].remainder_(width) if limit < 2**63 else u.remainder_(width)
    loss = -u.double() / width

    def exact(i: int) -> Any:
        return -mpmath.mpf(int(u[i])) / width

    u = u[_accepted(loss, torch.full_like(loss, 2.0**-51), exact, noise)]
    whole, going = torch.zeros_like(u), torch.arange(len(u))
    while len(going):
        one = torch.full((len(going),), -1.0, dtype=torch.float64)
        going = going[_accepted(one, torch.zeros_like(one), lambda _: -1, noise)]
        whole[going] += 1
    y = u.add_(whole.mul_(width))
    negative = noise.words(len(y)) < 0
    # Zero has one sign only.
    keep = ~(negative & (y == 0))
    return torch.where(negative, -y, y)[keep]


def _accepted(log_p: Tensor, error: Tensor, exact: Callable[[int], Any], noise: SecureNoise) -> Tensor:
    """True with probability exp(exact(i)) each, where |log_p - exact| <= error: bool (n,)."""
    p = log_p.exp()
    u = noise.words(len(p)).bitwise_and_(LOW_63_BITS)
    ahead = p.mul(2.0**63).sub_(u.double())
    accepted = ahead > 0
    # exp and the difference round to 2^-52 of 2^63 p; a u whose conversion rounds lies within 2^-52 of itself.
    slack = (error * 1.01 + 2.0**-50) * p.mul_(2.0**63) + 4
    for i in torch.nonzero(ahead.abs() <= slack).view(-1).tolist():
        accepted[i] = _decided(int(u[i]), functools.partial(exact, i))
    return accepted


def _decided(u: int, log_p: Callable[[], Any]) -> bool:
    """Whether the number that begins with the 63 bits of `u` lies below exp(log_p), by as many bits as that needs."""
    bits = 63
    while True:
        u, bits = (u << OPEN_BITS) | int.from_bytes(os.urandom(OPEN_BITS // 8), "big"), bits + OPEN_BITS
        # Terms of up to 2^70 cancel in log_p: of 192 more bits, over 100 are right.
        with mpmath.workprec(bits + 192):
            gap = mpmath.exp(log_p()) * 2**bits - u
            if gap < -(2.0**-64) or gap > 1 + 2.0**-64:
                return bool(gap > 0)


def _filled(shape: Sequence[int], proposed: Callable[[int], Tensor]) -> Tensor:
    """A tensor of the first accepted proposals."""
    out = torch.empty(tuple(shape), dtype=torch.int64)
    flat, done = out.view(-1), 0
    while done < len(flat):
        # About half of the proposals come through both rejections.
        found = proposed(min(2 * (len(flat) - done) + 32, CHUNK))[: len(flat) - done]
        flat[done : done + len(found)] = found
        done += len(found)
    return out


def _check_std(std: float) -> None:
    if not 0 <= std <= LARGEST_STD:
        raise InputError(f"integer noise of std {std}; 0 to 2^30 is possible: choose a coarser granularity")


def rotated(vector: Tensor, *, seed: int, inverse_size: int | None = None) -> Tensor:
    """The randomised Hadamard rotation of a vector (d,), padded with zeros to D = 2^m: (D,), of equal norm.

    Args:
        vector: floating, (d,), or (D,) for the inverse.
        seed: of the signs; the same for all clients and the server, as they are public.
        inverse_size: d, to undo the rotation.
    """
    size = 1 << max(len(vector) - 1, 0).bit_length()
    signs = torch.randint(0, 2, (size,), generator=generator(seed, "rotation"), dtype=torch.int8).mul_(2).sub_(1)
    if inverse_size is not None:
        return (_hadamard(vector) * signs)[:inverse_size]
    padded = torch.nn.functional.pad(vector, (0, size - len(vector)))
    return _hadamard(padded.mul_(signs) if padded is not vector else padded * signs)


def _hadamard(x: Tensor) -> Tensor:
    """H x / sqrt(D) for D = 2^m, as a Kronecker product: each pass multiplies the first axis and puts it last."""
    left = len(x)
    while left > 1:
        k = min(left, 64)
        matrix = torch.ones(1, 1, dtype=x.dtype)
        while len(matrix) < k:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        x = (x.view(k, -1).T @ (matrix / math.sqrt(k))).view(-1)
        left //= k
    return x


def norm_bound(*, clip: float, granularity: float, dim: int, beta: float = BETA) -> float:
    """The largest Euclidean norm of `rounded`'s integers (2102.06387, Theorem 1).

    Args:
        clip: norm to which vectors are clipped.
        granularity: what one integer step stands for.
        dim: d, the number of values.
        beta: chance that a rounding is longer than the bound, between 0 and 1.

    Raises:
        InputError: a clip or granularity that is not above 0, a beta outside (0, 1).
    """
    if not (0 < clip < math.inf and 0 < granularity < math.inf and dim >= 0 and 0 < beta < 1):
        raise InputError(
            f"clip {clip}, granularity {granularity}, dim {dim}, beta {beta}: clip and granularity above 0 and beta "
            "between 0 and 1 are needed"
        )
    c = clip / granularity
    spread = math.sqrt(2 * math.log(1 / beta)) * (c + math.sqrt(dim) / 2)
    return min(c + math.sqrt(dim), math.sqrt(c * c + dim / 4 + spread))


def rounded(vector: Tensor, *, granularity: float, clip: float, noise: SecureNoise, beta: float = BETA) -> Tensor:
    """A vector clipped and rounded at random to integers of at most `norm_bound`, mean vector/granularity.

    Args:
        vector: (d,), floating.
        granularity: what one integer step stands for.
        clip: the vector is made shorter where its norm is larger.
        noise: source of the rounding.
        beta: as for `norm_bound`; the mean is exact up to the roundings that are made again.

    Returns:
        int64 (d,) on the CPU.

    Raises:
        InputError: values that are not finite or need more than 31 bits.
    """
    bound = norm_bound(clip=clip, granularity=granularity, dim=vector.numel(), beta=beta)
    exact = vector.detach().double().cpu().view(-1)
    norm = float(exact.norm())
    if not math.isfinite(norm) or bound >= 2**31:
        raise InputError(
            f"a vector of norm {norm} in steps of {granularity} with clip {clip}; finite values and a clip below "
            "2^31 steps are needed"
        )
    scaled = exact * (min(1.0, clip / norm if norm else 1.0) / granularity)
    low = scaled.floor()
    share = (scaled - low).mul_(2.0**63)
    low = low.long()
    # A rounding is too long with probability beta at most, so 2,000 in a row do not happen.
    for _ in range(2000):
        result = low + (noise.words(len(low)).bitwise_and_(LOW_63_BITS).double() < share)
        # Exact in int64: |result| < 2^31, and the sum is at most bound^2 < 2^62 or the float64 sum shows it.
        if float(result.double().square().sum()) < 2.0**62 and int((result * result).sum()) <= bound * bound:
            return result
    raise RunError(f"no rounding of {len(low)} values is within the norm {bound}: choose a beta closer to 1")


def l1_bound(l2: float, dim: int) -> float:
    """The largest sum of absolute values of an integer vector (dim,) of norm `l2`."""
    return min(l2 * l2, math.sqrt(dim) * l2)


def skellam_rdp(order: float, *, l2: float, l1: float, variance: float) -> float:
    """Renyi divergence of a Skellam sum, orders from 2 on, whole numbers (2110.04995, Theorem 3.5).

    Args:
        order: the divergence's order.
        l2: Euclidean norm of what one client changes in the sum, in integers.
        l1: sum of absolute values of it.
        variance: of the sum's noise, all honest clients' together.
    """
    more = ((2 * order - 1) * l2 * l2 + 6 * l1) / (4 * variance**2)
    return order * l2 * l2 / (2 * variance) + min(more, 3 * l1 / (2 * variance))


def discrete_gaussian_rdp(order: float, *, l2: float, dim: int, sigma: float, clients: int) -> float:
    """Renyi divergence of a sum of `clients` discrete Gaussians (2102.06387).

    tau = 10 sum_{k<K} exp(-2 pi^2 sigma^2 k/(k+1)) bounds, for each value, how far their sum is from one discrete
    Gaussian. The two forms of the bound that are stated (Theorem 1, Proposition 14) differ in what stands before
    tau d; the larger is taken.

    Args:
        order: the divergence's order.
        l2: Euclidean norm of what one client changes in the sum, in integers.
        dim: d, the number of values.
        sigma: of one client's noise.
        clients: K, those whose noise is not known to the observer.
    """
    tau = 10 * sum(math.exp(-2 * math.pi**2 * sigma**2 * k / (k + 1)) for k in range(1, clients))
    scale = l2 / (sigma * math.sqrt(clients))
    return min(order / 2 * scale**2 + tau * dim * max(1.0, order / 4), order / 2 * (scale + tau * math.sqrt(dim)) ** 2)
