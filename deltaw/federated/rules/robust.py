"""Aggregates of differences that a few lying clients cannot move far.

All look at single uploads, which secure aggregation hides: the two exclude each other. All act on the factors (and
other trained tensors) by themselves, so products are as inexact as `fedavg-ab`'s; `product_error` is against the
weighted mean of all clients' products, the liars' among them. Trimmed mean, median and multi-Krum count every client
once: weights are the clients' own claims, which a liar would make large. Norm bounding keeps them, so a bound on the
weight is the server's to set (`weighting: equal`).

Bytes as `fedavg-ab`: 4 r (in + out) a site, up and down. N values an upload, n uploads, f liars to withstand.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.checkpoint import factored
from deltaw.core.errors import InputError
from deltaw.federated.rules.contract import (
    Outcome,
    Rule,
    as_it_is,
    check_averaged,
    check_uploads,
    check_whole,
    differences,
    every_key,
    mean,
    moved,
    product_error,
)
from deltaw.federated.state import GlobalState, Layout

Uploads = Sequence[Mapping[str, Tensor]]


def _outcome(
    start: GlobalState,
    uploads: Uploads,
    weights: Sequence[float],
    layout: Layout,
    change: Mapping[str, Tensor],
    facts: dict[str, float],
) -> Outcome:
    tensors = moved(start, change)
    return Outcome(
        state=GlobalState(tensors, start.carried),
        facts=facts | product_error(start, uploads, weights, tensors, layout),
    )


def _trimmed(uploads: Uploads, f: int) -> tuple[dict[str, Tensor], list[float]]:
    """Means of each value without its f smallest and f largest; the share of each client's values left out."""
    n = len(uploads)
    change, counts = {}, torch.zeros(n, dtype=torch.int64)
    for key in uploads[0]:
        values, order = torch.stack([factored.wide(upload[key]) for upload in uploads]).sort(dim=0)
        change[key] = values[f : n - f].mean(0)
        counts += torch.bincount(torch.cat([order[:f], order[n - f :]]).flatten(), minlength=n)
    total = sum(value.numel() for value in change.values())
    return change, (counts / total).tolist()


@dataclass(frozen=True, kw_only=True)
class TrimmedMean:
    """The mean of each value without its f smallest and its f largest.

    Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", arXiv 1803.01498,
    definition 2: with u_(1) <= ... <= u_(n) the clients' differences in one coordinate,

        u = 1/(n - 2f) sum_{f < i <= n-f} u_(i)

    Of at most f liars and n > 2f, u lies within the honest clients' range in every coordinate. Cost: a sort,
    O(N n log n). Limits: with silos that differ, honest minorities are trimmed too. `trimmed:<i>` is the share of
    upload i's values that was left out (2f/n on average); `left_out` is 2f, in each coordinate.

    Attributes:
        f: how many lying clients to withstand.
    """

    f: int = 1

    name = "trimmed-mean"
    secure = False
    phases = 1
    additive = True

    check = check_averaged
    trained = every_key
    begin = as_it_is
    upload = differences

    def __post_init__(self) -> None:
        check_whole(self, "f", self.f, least=1)

    @property
    def least_uploads(self) -> int:
        """2f + 1."""
        return 2 * self.f + 1

    def combine(
        self,
        phase: int,
        start: GlobalState,
        uploads: Uploads,
        weights: Sequence[float],
        layout: Layout,
        broadcast: Mapping[str, Tensor],
    ) -> Outcome:
        """The state plus the trimmed mean of differences."""
        check_uploads(self, uploads, weights)
        change, shares = _trimmed(uploads, self.f)
        facts = {"left_out": 2.0 * self.f} | {f"trimmed:{i}": share for i, share in enumerate(shares)}
        return _outcome(start, uploads, weights, layout, change, facts)


def _median(
    rule: Rule,
    phase: int,
    start: GlobalState,
    uploads: Uploads,
    weights: Sequence[float],
    layout: Layout,
    broadcast: Mapping[str, Tensor],
) -> Outcome:
    check_uploads(rule, uploads, weights)
    change, _ = _trimmed(uploads, (len(uploads) - 1) // 2)
    return _outcome(start, uploads, weights, layout, change, {})


@dataclass(frozen=True, kw_only=True)
class Median:
    """The median of each value, of an even number the mean of the two in the middle.

    Yin et al., arXiv 1803.01498, definition 1: the trimmed mean with f as large as it can be. Withstands any minority
    of liars, as within the honest clients' range. Cost: a sort, O(N n log n). Limits: its noise is about pi/2 of the
    mean's variance, and where silos differ it is biased towards the majority.
    """

    name = "median"
    secure = False
    phases = 1
    additive = True
    least_uploads = 1

    check = check_averaged
    trained = every_key
    begin = as_it_is
    upload = differences
    combine = _median


@dataclass(frozen=True, kw_only=True)
class NormBound:
    """The weighted mean of differences, each scaled down to a joint norm of at most c.

    Sun et al., "Can You Really Backdoor Federated Learning?", arXiv 1911.07963:

        u = sum_k w_k u_k min(1, c / ||u_k||)        u_k all trained tensors of client k as one vector

    so that clients of weight w move the state by at most w c. Where no bound is given, c is the median of the round's
    norms, which a minority cannot choose. Cost: O(N n). Limits: bounds what a lie does, does not find it: liars within
    the bound are averaged in. `bound` is c, `clipped` how many were scaled down, `clipped:<i>` which.

    Attributes:
        bound: c; None takes the median of norms.
    """

    bound: float | None = None

    name = "norm-bound"
    secure = False
    phases = 1
    additive = True
    least_uploads = 1

    check = check_averaged
    trained = every_key
    begin = as_it_is
    upload = differences

    def __post_init__(self) -> None:
        bound = self.bound
        if bound is not None and not (
            isinstance(bound, (int, float)) and not isinstance(bound, bool) and 0 < bound < math.inf
        ):
            raise InputError(f"rule norm-bound: bound is {bound!r}: expected a number above 0")

    def combine(
        self,
        phase: int,
        start: GlobalState,
        uploads: Uploads,
        weights: Sequence[float],
        layout: Layout,
        broadcast: Mapping[str, Tensor],
    ) -> Outcome:
        """The state plus the mean of bounded differences."""
        check_uploads(self, uploads, weights)
        norms = [math.hypot(*(float(factored.wide(value).norm()) for value in upload.values())) for upload in uploads]
        bound = self.bound or statistics.median(norms)
        clipped = [i for i, norm in enumerate(norms) if norm > bound]
        shrunk = [w * (bound / norm if norm > bound else 1.0) for w, norm in zip(weights, norms, strict=True)]
        facts = {"bound": float(bound), "clipped": float(len(clipped))} | {f"clipped:{i}": 1.0 for i in clipped}
        return _outcome(start, uploads, weights, layout, mean(uploads, shrunk, list(uploads[0])), facts)


@dataclass(frozen=True, kw_only=True)
class MultiKrum:
    """The mean of the n - f uploads that lie closest to their neighbours.

    Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", arXiv 1703.02757.
    An upload's score sums its squared distances to its n - f - 2 nearest others,

        score(i) = sum_{j near i} ||u_i - u_j||^2        u_i all trained tensors of client i as one vector,

    and the mean is over the n - f of lowest score. Needs n >= 2f + 3. Cost: O(n^2 N). Limits: liars who agree with each
    other and stay near the honest pass; with silos that differ, the oddest honest ones are left out. `left_out` is f,
    `left_out:<i>` says which.

    Attributes:
        f: how many lying clients to withstand.
    """

    f: int = 1

    name = "multi-krum"
    secure = False
    phases = 1
    additive = True

    check = check_averaged
    trained = every_key
    begin = as_it_is
    upload = differences

    def __post_init__(self) -> None:
        check_whole(self, "f", self.f, least=1)

    @property
    def least_uploads(self) -> int:
        """2f + 3."""
        return 2 * self.f + 3

    def combine(
        self,
        phase: int,
        start: GlobalState,
        uploads: Uploads,
        weights: Sequence[float],
        layout: Layout,
        broadcast: Mapping[str, Tensor],
    ) -> Outcome:
        """The state plus the mean of the chosen differences."""
        check_uploads(self, uploads, weights)
        n = len(uploads)
        squared = torch.zeros(n, n, dtype=torch.float64)
        for key in uploads[0]:
            values = torch.stack([factored.wide(upload[key]).flatten() for upload in uploads])
            # From differences, not from inner products: those lose the digits that tell near uploads apart.
            squared += torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist").square()
        nearest = squared.sort(dim=1).values[:, 1 : n - self.f - 1]
        order = nearest.sum(1).argsort(stable=True).tolist()
        chosen, left_out = sorted(order[: n - self.f]), sorted(order[n - self.f :])
        change = mean([uploads[i] for i in chosen], [1 / len(chosen)] * len(chosen), list(uploads[0]))
        facts = {"left_out": float(self.f)} | {f"left_out:{i}": 1.0 for i in left_out}
        return _outcome(start, uploads, weights, layout, change, facts)
