"""The top of the mean of products from two linear sums: exact aggregation that secure aggregation can do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.checkpoint import factored
from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.core.protocols import LowRank
from deltaw.federated.rules.contract import (
    Outcome,
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
from deltaw.federated.wire import digest

#: Columns beyond the rank where nothing else is asked for; Halko et al. take 5 to 10.
_OVERSAMPLING = 8


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """The best rank-r form of the mean of products, from sums over clients alone.

    Halko, Martinsson and Tropp, "Finding structure with randomness", arXiv 0909.4061, algorithms 4.1 and 5.1, spread
    over clients. With M (out, in) = sum_k w_k s B_k A_k, which nobody forms, and a random Omega (in, c) that all share:

        phase 0    Y = sum_k w_k s B_k (A_k Omega)      (out, c)       Y = Q R, Q with orthonormal columns
        phase 1    Z = sum_k w_k s A_k^T (B_k^T Q)      (in, c)        M ~ Q Q^T M = Q Z^T

    Both are linear in what a client computes from its own factors, so sums suffice. A (r, in) and B (out, r) become the
    truncation of Q Z^T to rank r, of balanced factors, the scale divided out; clients train on from there, so every
    round's B_k A_k contain the state's product, and nothing is carried. Exact but for that truncation where c reaches
    the rank of M, at most min(K r, in, out); else the expected ||M - Q Q^T M|| is within sqrt(1 + r/(c - r - 1)) of the
    best rank-r form's (theorem 10.5). Directions without a singular value get LoRA's start, A random and B = 0: the
    product is the same, and they go on learning.

    Omega is Gaussian, from a generator seeded with the SHA-256 of the factors, names and values, that the round starts
    from at the site: all clients have these, and a round that is begun again has the same. Q is made in float64.

    `sketch_error` estimates ||M - Q Q^T M|| / ||M|| by leaving each column out of Q in turn (Epperly and Tropp,
    "Efficient error and variance estimation for randomized matrix computations", arXiv 2207.06342): it is for
    c - 1 columns, and 0 where c is known to do. `sketch_exact` is 1 where that is so at all sites: c reaches K r, with
    K from `clients` or from single uploads, or min(in, out). `truncation_error` is relative to Q Z^T.

    Cost a site: up 4 c (in + out) bytes, down 4 r (in + out) and 4 c out for Q; a client's flops 4 r c (in + out), the
    server's O(c^2 (in + out)). Limits: what is beyond rank r is dropped each round; factors are turned each time, so
    neither error feedback, a server optimizer nor optimizer states kept over rounds go with it.

    Attributes:
        rank: of the result; None means the site's own r, above which it cannot go.
        columns: c of every site; None means rank + 8. Never more than min(in, out).
        clients: K; takes K r columns instead, which is exact however different clients are.
    """

    rank: int | None = None
    columns: int | None = None
    clients: int | None = None

    name = "sketch"
    secure = True
    phases = 2
    additive = False
    least_uploads = 1

    trained = every_key
    begin = as_it_is

    def __post_init__(self) -> None:
        for option in ("rank", "columns", "clients"):
            if (value := getattr(self, option)) is not None:
                check_whole(self, option, value, least=1)
        if self.columns is not None and self.clients is not None:
            raise InputError("rule sketch: columns and clients both say how wide the sketch is: give one")

    def check(self, layout: Layout) -> None:
        """Refuses what is no product s B A of two trained factors, and ranks that do not fit."""
        check_products(self, layout)
        for path, key_A, key_B, _ in layout.sites():
            if frozen := {key_A, key_B} & layout.frozen:
                raise InputError(
                    f"rule sketch makes new factors, and {min(frozen)} is frozen: set freeze_a false, or use rule ffa"
                )
            r = layout.shapes[key_A][0]
            if self.rank is not None and self.rank > r:
                raise InputError(f"rule sketch: rank is {self.rank}, and {path} has r {r}: give at most that")
            if self.columns is not None and self.columns < (self.rank or r):
                raise InputError(
                    f"rule sketch: columns is {self.columns}: expected at least the rank, {self.rank or r}"
                )

    def upload(
        self,
        phase: int,
        start: GlobalState,
        local: Mapping[str, Tensor],
        layout: Layout,
        broadcast: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Phase 0: `<site>:sketch` (out, c). Phase 1: `<site>:back` (in, c), and differences of other tensors."""
        made = {}
        for site in layout.sites():
            path, key_A, *_ = site
            low = site_factors(start, local, site)
            if phase == 0:
                product = low.scale * (low.B @ (low.A @ self._omega(start, site, layout)))
            else:
                product = low.scale * (low.A.T @ (low.B.T @ factored.wide(broadcast[f"{path}:basis"])))
            made[f"{path}:{'back' if phase else 'sketch'}"] = product.to(start.tensors[key_A].dtype)
        if phase == 0:
            return made
        return made | changes(start, {key: local[key] for key in loose(local, layout)})

    def combine(
        self,
        phase: int,
        start: GlobalState,
        uploads: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        layout: Layout,
        broadcast: Mapping[str, Tensor],
    ) -> Outcome:
        """Phase 0: `<site>:basis`, Q (out, c). Phase 1: the new state."""
        check_uploads(self, uploads, weights)
        total = mean(uploads, weights, list(uploads[0]))
        if phase == 0:
            return self._bases(start, total, layout, len(uploads))
        tensors = moved(start, {key: total[key] for key in loose(total, layout) if key in start.tensors})
        missed, whole = [], []
        for site in layout.sites():
            path, key_A, key_B, scale = site
            low = LowRank(total[f"{path}:back"].T, factored.wide(broadcast[f"{path}:basis"]), 1.0)
            kept, lost, size = cut(low, self._rank(site, layout), scale=scale)
            missed.append(lost)
            whole.append(size)
            A, B = _alive(kept, start, site)
            tensors[key_A], tensors[key_B] = A.to(tensors[key_A].dtype), B.to(tensors[key_B].dtype)
        facts = {"truncation_error": math.hypot(*missed) / math.hypot(*whole)} if any(whole) else {}
        return Outcome(state=GlobalState(tensors, start.carried), facts=facts)

    def _bases(self, start: GlobalState, total: Mapping[str, Tensor], layout: Layout, count: int) -> Outcome:
        clients = self.clients or (count if count > 1 else None)
        bases, missed, whole, exact = {}, [], [], True
        for site in layout.sites():
            path, key_A, key_B, _ = site
            Y = total[f"{path}:sketch"]
            Q, R = torch.linalg.qr(Y)
            bases[f"{path}:basis"] = Q.to(start.tensors[key_B].dtype)
            r, full = layout.shapes[key_A][0], min(layout.shapes[key_B][0], layout.shapes[key_A][1])
            wide_enough = Y.shape[1] >= min(full, clients * r if clients else full)
            missed.append(0.0 if wide_enough else _left_out(R))
            whole.append(float(R.norm()) / math.sqrt(R.shape[1]))
            exact &= wide_enough
        facts = {"sketch_exact": float(exact)}
        if any(whole):
            facts["sketch_error"] = math.hypot(*missed) / math.hypot(*whole)
        return Outcome(broadcast=bases, facts=facts)

    def _rank(self, site: tuple[str, str, str, float], layout: Layout) -> int:
        return self.rank or layout.shapes[site[1]][0]

    def _omega(self, start: GlobalState, site: tuple[str, str, str, float], layout: Layout) -> Tensor:
        """The shared test matrix of a site, (in, c), float64."""
        _, key_A, key_B, _ = site
        (r, in_), (out, _) = layout.shapes[key_A], layout.shapes[key_B]
        wanted = self.clients * r if self.clients else self.columns or self._rank(site, layout) + _OVERSAMPLING
        columns = min(max(wanted, self._rank(site, layout)), in_, out)
        return torch.randn(in_, columns, generator=_generator(start, site, "omega"), dtype=torch.float64)


def _generator(start: GlobalState, site: tuple[str, str, str, float], what: str) -> torch.Generator:
    factors = {key: start.tensors[key] for key in site[1:3]}
    return generator(int(digest(factors), 16), "sketch", what)


def _left_out(R: Tensor) -> float:
    """The leave-one-out estimate of ||M - Q Q^T M||_F from R (c, c) of the sketch: rms of 1/||row of R^-1||."""
    diagonal = R.diagonal().abs()
    if diagonal.min() <= torch.finfo(R.dtype).eps * diagonal.max():
        return 0.0
    inverse = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype), upper=True)
    return float(inverse.norm(dim=1).reciprocal().square().mean().sqrt())


def _alive(kept: LowRank, start: GlobalState, site: tuple[str, str, str, float]) -> tuple[Tensor, Tensor]:
    """Factors of the state's rank from balanced ones, with LoRA's start in directions that have no singular value."""
    _, key_A, key_B, _ = site
    like_A, like_B = start.tensors[key_A], start.tensors[key_B]
    A = kaiming_uniform(like_A.shape, _generator(start, site, "fresh")).double()
    B = torch.zeros(like_B.shape, dtype=torch.float64)
    s = kept.A.square().sum(1)
    living = int((s > torch.finfo(like_A.dtype).eps * s.max()).sum()) if len(s) else 0
    A[:living], B[:, :living] = kept.A[:living], kept.B[:, :living]
    return A, B
