"""The mean of products itself: carried beside the adapter (`product`), or what the means of factors miss (`fedex`).

Both need each client's factors, since sum_k w_k B_k A_k is no function of the factors' sums: no secure aggregation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.checkpoint import factored
from deltaw.core.protocols import LowRank
from deltaw.federated.rules.contract import (
    Outcome,
    Rule,
    as_it_is,
    changes,
    check_products,
    check_uploads,
    check_whole,
    cut,
    every_key,
    kaiming_uniform,
    loose,
    mean,
    moved,
    site_factors,
)
from deltaw.federated.state import GlobalState, Layout


def folded(state: GlobalState) -> tuple[GlobalState, Mapping[str, LowRank]]:
    """The state without what it carries, and that, for whoever writes it into the frozen weights."""
    return GlobalState(state.tensors), state.carried


def _factors_themselves(
    rule: Rule,
    phase: int,
    start: GlobalState,
    local: Mapping[str, Tensor],
    layout: Layout,
    broadcast: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    others = loose(local, layout)
    factors = {key: value.detach() for key, value in local.items() if key not in set(others)}
    return factors | changes(start, {key: local[key] for key in others})


def _carried(
    start: GlobalState, layout: Layout, new: Mapping[str, LowRank], truncate: int | None
) -> tuple[dict[str, LowRank], dict[str, float]]:
    """What was carried plus `new`, in the state's dtype, cut to rank `truncate`; and facts.

    A sum whose factors have more columns than its matrix has rank is written with as many as that, which loses nothing.
    """
    carried, missed, whole = dict(start.carried), [], []
    for path, key_A, key_B, _ in layout.sites():
        if path not in new:
            continue
        summands = [*([carried[path]] if path in carried else []), new[path]]
        low = factored.stacked(summands, [1.0] * len(summands))
        limit = min(low.B.shape[0], low.A.shape[1], truncate or len(low.A))
        if len(low.A) > limit:
            low, lost, size = cut(low, limit)
            missed.append(lost)
            whole.append(size)
        A, B = start.tensors[key_A], start.tensors[key_B]
        carried[path] = LowRank(low.A.to(A.dtype), low.B.to(B.dtype), low.scale)
    facts = {"carried_rank": float(max((len(low.A) for low in carried.values()), default=0))}
    if truncate and any(whole):
        facts["truncation_error"] = math.hypot(*missed) / math.hypot(*whole)
    return carried, facts


@dataclass(frozen=True, kw_only=True)
class Product:
    """The exact mean of products, as factors stacked beside the adapter, which starts anew every round.

    Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", arXiv
    2409.05976 (stacking). With the carried update C (out, in) = B_C A_C,

        C + sum_k w_k s B_k A_k = [B_C, B_1 ... B_K] [A_C; w_1 s A_1; ...; w_K s A_K],

    a product of rank rank(C) + K r that no dense matrix is made for. The next round trains fresh factors, A (r, in)
    uniform in +-1/sqrt(in) and B = 0, of an embedding B normal and A = 0, beside C; a frozen factor stays. What the
    first round starts with is the method's own: EVA's directions hold for it alone, and LoftQ's start, whose product is
    not zero, goes into C with the clients' training.

    C's rank grows by up to K r a round, up to min(in, out). `truncate` cuts it to the nearest update of that rank after
    each round (Eckart and Young); `truncation_error` is the relative Frobenius error of all sites together. The server
    may instead fold C into a 16-bit backbone (`folded`).

    Cost: up 4 r (in + out) bytes a site, down that and 4 rank(C) (in + out); no product is needed, and truncation takes
    O((rank(C) + K r)^2 (in + out)) flops. Limits: optimizer states of the factors make no sense in the next round; each
    round's update has rank r on every client.

    Attributes:
        truncate: rank of what is carried; None keeps it exact.
    """

    truncate: int | None = None

    name = "product"
    secure = False
    phases = 1
    additive = False
    least_uploads = 1

    check = check_products
    trained = every_key
    upload = _factors_themselves

    def __post_init__(self) -> None:
        if self.truncate is not None:
            check_whole(self, "truncate", self.truncate, least=1)

    def begin(self, state: GlobalState, layout: Layout, round_: int, generator: torch.Generator) -> GlobalState:
        """The state, with A drawn where `combine` has emptied the factors."""
        tensors = dict(state.tensors)
        for _, key_A, key_B, _ in layout.sites():
            A, B = tensors[key_A], tensors[key_B]
            if A.any():
                continue
            if not B.any():
                tensors[key_A] = kaiming_uniform(A.shape, generator).to(A.dtype)
            elif key_B not in layout.frozen:
                tensors[key_B] = torch.randn(B.shape, generator=generator).to(B.dtype)
        return GlobalState(tensors, state.carried)

    def combine(
        self,
        phase: int,
        start: GlobalState,
        uploads: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        layout: Layout,
        broadcast: Mapping[str, Tensor],
    ) -> Outcome:
        """What is carried plus the mean of products; factors whose product is zero."""
        check_uploads(self, uploads, weights)
        tensors = moved(start, mean(uploads, weights, loose(uploads[0], layout)))
        new = {}
        for site in layout.sites():
            path, key_A, key_B, _ = site
            new[path] = factored.stacked([site_factors(start, upload, site) for upload in uploads], weights)
            # One factor of zeros makes the product zero. What `begin` shall draw anew is zero too; a B that stands
            # while A is zero tells an embedding's site.
            for key in _emptied(start, key_A, key_B, layout):
                tensors[key] = torch.zeros_like(tensors[key])
        carried, facts = _carried(start, layout, new, self.truncate)
        return Outcome(state=GlobalState(tensors, carried), facts=facts)


def _emptied(start: GlobalState, key_A: str, key_B: str, layout: Layout) -> set[str]:
    if not start.tensors[key_A].any() or key_B in layout.frozen:
        return {key_A}
    return {key_A, key_B} - layout.frozen


@dataclass(frozen=True, kw_only=True)
class FedEx:
    """Means of A and B, and what they miss of the mean of products, carried as factors.

    Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models", arXiv
    2410.09432. With A = sum_k w_k A_k, B = sum_k w_k B_k and weights that sum to 1,

        sum_k w_k (B_k - B)(A_k - A) = sum_k w_k B_k A_k - B sum_k w_k A_k - (sum_k w_k B_k) A + B A
                                     = sum_k w_k B_k A_k - B A,

    so that s B A plus s times the left side is the exact mean. Since sum_k w_k (A_k - A) = 0, the last client's share
    can be told from the others', and K - 1 products do:

        sum_k w_k (B_k - B)(A_k - A) = sum_{k<K} w_k (B_k - B_K)(A_k - A).

    Clients train on from A (r, in) and B (out, r), beside what is carried. Its rank grows by up to (K - 1) r a round,
    up to min(in, out); `truncate` cuts it as in `product`. A frozen factor leaves no residual.

    Cost: up 4 r (in + out) bytes a site, down that and 4 rank(carried) (in + out); 2 K r (in + out) flops, and as many
    as `product` for a truncation.

    Attributes:
        truncate: rank of what is carried; None keeps it exact.
    """

    truncate: int | None = None

    name = "fedex"
    secure = False
    phases = 1
    additive = False
    least_uploads = 1

    check = check_products
    trained = every_key
    begin = as_it_is
    upload = _factors_themselves

    def __post_init__(self) -> None:
        if self.truncate is not None:
            check_whole(self, "truncate", self.truncate, least=1)

    def combine(
        self,
        phase: int,
        start: GlobalState,
        uploads: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        layout: Layout,
        broadcast: Mapping[str, Tensor],
    ) -> Outcome:
        """Means of the factors, and their residual added to what is carried."""
        check_uploads(self, uploads, weights)
        tensors = moved(start, mean(uploads, weights, loose(uploads[0], layout)))
        new = {}
        for site in layout.sites():
            path, key_A, key_B, scale = site
            factors = [key for key in (key_A, key_B) if key in uploads[0]]
            means = mean(uploads, weights, factors)
            tensors |= {key: value.to(start.tensors[key].dtype) for key, value in means.items()}
            if len(factors) == 2 and len(uploads) > 1:
                lows = [site_factors(start, upload, site) for upload in uploads]
                rest = [LowRank(low.A - means[key_A], low.B - lows[-1].B, scale) for low in lows[:-1]]
                new[path] = factored.stacked(rest, weights[:-1])
        carried, facts = _carried(start, layout, new, self.truncate)
        return Outcome(state=GlobalState(tensors, carried), facts=facts)
