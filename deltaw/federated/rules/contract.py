"""The contract that aggregation rules share, and the arithmetic that several of them do. There is no parent class.

A round: `begin` makes what clients start from; each trains the tensors that `trained` names; in each phase clients
`upload` and the server `combine`s, with a broadcast between phases. Symbols, here and in the rules: K clients, weights
w_k that sum to 1; at a site the factors A_k (r, in), B_k (out, r) after local training, the scale s, and the update
s B_k A_k of client k, which is never formed. An embedding's site has A (r, vocab) and B (dim, r): the same algebra.
Tensors that belong to no site (biases, heads, magnitudes, token rows) are averaged as they are by every rule.

Sums are made in float64 on the CPU and rounded once, to the dtype of the state's tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from deltaw.checkpoint import factored
from deltaw.core.errors import InputError, RunError
from deltaw.core.protocols import LowRank
from deltaw.federated.state import GlobalState, Layout
from deltaw.methods.initial import is_taken_from_base

#: Methods whose tensors mean the same thing on every client, so that their means do.
AVERAGED = ("lora", "dora", "bitfit", "bottleneck", "prefix", "full")

_REASONS = {
    "adalora": "every client prunes directions of its own, so that factors of two clients do not belong together",
    "dora": "its update is m V/||V|| with V = W + s B A, not s B A",
}


@dataclass(frozen=True)
class Outcome:
    """What a phase gives.

    Attributes:
        broadcast: what every client gets for the next phase; None in the last one.
        state: what the round ends with; None before the last phase.
        facts: numbers about the round, by name.
    """

    broadcast: dict[str, Tensor] | None = None
    state: GlobalState | None = None
    facts: dict[str, float] = field(default_factory=dict)


class Rule(Protocol):
    """An aggregation rule. Instances keep nothing between calls, so that a server may stop and go on anywhere."""

    @property
    def name(self) -> str:
        """What users type."""

    @property
    def secure(self) -> bool:
        """Right from sums alone: under secure aggregation `combine` gets one upload, the mean, of weight 1."""

    @property
    def phases(self) -> int:
        """Uploads in one round."""

    @property
    def additive(self) -> bool:
        """Uploads are differences and the result is the state plus a combination of them.

        Only then may what compression lost be added to the next upload, and a server optimizer take the step.
        """

    @property
    def least_uploads(self) -> int:
        """The fewest uploads that `combine` accepts."""

    def check(self, layout: Layout) -> None:
        """Raises an InputError, with the reason, for a method or options of it that the rule is not right for."""

    def trained(self, round_: int, layout: Layout) -> frozenset[str]:
        """Keys that clients train in a round and upload something of. Rounds of training count from 0."""

    def begin(self, state: GlobalState, layout: Layout, round_: int, generator: torch.Generator) -> GlobalState:
        """What a round's clients start from."""

    def upload(
        self,
        phase: int,
        start: GlobalState,
        local: Mapping[str, Tensor],
        layout: Layout,
        broadcast: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The client's side of a phase.

        Args:
            phase: from 0.
            start: what `begin` gave.
            local: the trained tensors by key, after local training.
            layout: of the state's tensors.
            broadcast: of the phase before; {} in the first.
        """

    def combine(
        self,
        phase: int,
        start: GlobalState,
        uploads: Sequence[Mapping[str, Tensor]],
        weights: Sequence[float],
        layout: Layout,
        broadcast: Mapping[str, Tensor],
    ) -> Outcome:
        """The server's side of a phase; weights sum to 1.

        Raises:
            RunError: fewer than `least_uploads`, or uploads that differ in their keys.
        """


def check_averaged(rule: Rule, layout: Layout) -> None:
    """Raises an InputError unless means of the method's tensors mean something."""
    if layout.method not in AVERAGED:
        raise _refused(rule, layout, AVERAGED)


def check_products(rule: Rule, layout: Layout) -> None:
    """Raises an InputError unless the method's updates are s B A."""
    if layout.method != "lora":
        raise _refused(rule, layout, ("lora",))
    init = layout.config.get("init", "default")
    if is_taken_from_base(str(init)) and not layout.config.get("freeze_a"):
        raise InputError(
            f"rule {rule.name} goes with updates s B A, and those of init {init!r} are s (B A - B0 A0), of twice the "
            "rank: take another init, or freeze_a true, or rule fedavg-ab"
        )


def check_lora(rule: Rule, layout: Layout) -> None:
    """Raises an InputError unless the method is LoRA, of any start."""
    if layout.method != "lora":
        raise _refused(rule, layout, ("lora",))


def _refused(rule: Rule, layout: Layout, known: Sequence[str]) -> InputError:
    reason = _REASONS.get(layout.method, "it has no factors A and B that the rule could act on")
    other = "use rule fedavg-ab" if layout.method in AVERAGED else "use method lora"
    return InputError(
        f"rule {rule.name} is not right for method {layout.method!r}: {reason}; it takes {', '.join(known)}; {other}"
    )


def check_whole(rule: Rule, name: str, value: object, *, least: int) -> None:
    """Raises an InputError for an option that is no whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"rule {rule.name}: {name} is {value!r}: expected a whole number of at least {least}")


def every_key(rule: Rule, round_: int, layout: Layout) -> frozenset[str]:
    """`Rule.trained` of rules under which all is trained that the method trains."""
    return frozenset(layout.shapes) - layout.frozen


def as_it_is(rule: Rule, state: GlobalState, layout: Layout, round_: int, generator: torch.Generator) -> GlobalState:
    """`Rule.begin` of rules under which clients go on from the state."""
    return state


def differences(
    rule: Rule,
    phase: int,
    start: GlobalState,
    local: Mapping[str, Tensor],
    layout: Layout,
    broadcast: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """`Rule.upload` of additive rules: how far each trained tensor has gone."""
    return changes(start, local)


def changes(start: GlobalState, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Local - start by key."""
    return {key: value.detach() - start.tensors[key] for key, value in local.items()}


def check_uploads(rule: Rule, uploads: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> None:
    """Raises unless uploads are enough and of the same keys, and weights sum to 1."""
    if len(uploads) < max(1, rule.least_uploads):
        raise RunError(
            f"rule {rule.name} got {len(uploads)} uploads: it needs at least {max(1, rule.least_uploads)}; raise "
            "min_clients or withstand fewer"
        )
    if len(weights) != len(uploads) or min(weights) < 0 or not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise InputError(f"weights {list(weights)} of {len(uploads)} uploads: expected one each, summing to 1")
    for upload in uploads[1:]:
        if odd := sorted(upload.keys() ^ uploads[0].keys()):
            raise RunError(f"uploads differ in their keys, first at {odd[0]!r}: every client has to train the same")


def mean(uploads: Sequence[Mapping[str, Tensor]], weights: Sequence[float], keys: Sequence[str]) -> dict[str, Tensor]:
    """Weighted means of some keys, float64."""
    pairs = list(zip(uploads, weights, strict=True))
    nothing = torch.zeros((), dtype=torch.float64)
    return {key: sum((factored.wide(upload[key]) * w for upload, w in pairs), nothing) for key in keys}


def moved(start: GlobalState, change: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state's tensors with a change added where there is one, in the state's dtype."""
    return {
        key: _sum(value, change[key]).to(value.dtype) if key in change else value
        for key, value in start.tensors.items()
    }


def loose(keys: Mapping[str, Tensor], layout: Layout) -> list[str]:
    """Those keys that belong to no site's factors."""
    factors = {key for _, *pair, _ in layout.sites() for key in pair}
    return [key for key in keys if key not in factors]


def site_factors(start: GlobalState, values: Mapping[str, Tensor], site: tuple[str, str, str, float]) -> LowRank:
    """A client's update at a site from the factors it uploaded, the start's for one that it does not train."""
    _, key_A, key_B, scale = site
    A, B = (factored.wide(values.get(key, start.tensors[key])) for key in (key_A, key_B))
    return LowRank(A, B, scale)


def product_error(
    start: GlobalState,
    uploads: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    tensors: Mapping[str, Tensor],
    layout: Layout,
) -> dict[str, float]:
    """How far the product of aggregated factors is from the mean of products, of all sites together.

        ||s B A - sum_k w_k s B_k A_k||_F / ||sum_k w_k s B_k A_k||_F

    Args:
        start: what clients started from.
        uploads: differences by key.
        weights: of the mean.
        tensors: the aggregated ones.
        layout: of the tensors.

    Returns:
        {"product_error": ...}, or {} where it says nothing: one upload, updates that are no products, none at all.
    """
    if len(uploads) < 2 or layout.method != "lora":
        return {}
    missed, whole = [], []
    for site in layout.sites():
        clients = []
        for upload in uploads:
            went = {key: _sum(start.tensors[key], upload[key]) for key in site[1:3] if key in upload}
            clients.append(_update({**start.tensors, **went}, site, layout))
        result = _update(tensors, site, layout)
        known = [client for client in clients if client is not None]
        if result is None or len(known) < len(clients):
            return {}
        average = factored.stacked(known, weights)
        missed.append(factored.distance(result, average))
        whole.append(factored.norm(average))
    return {"product_error": math.hypot(*missed) / math.hypot(*whole)} if any(whole) else {}


def _sum(first: Tensor, second: Tensor) -> Tensor:
    return factored.wide(first) + factored.wide(second)


def _update(tensors: Mapping[str, Tensor], site: tuple[str, str, str, float], layout: Layout) -> LowRank | None:
    """A site's update; of twice the rank where factors are distances from a start that was taken from the base."""
    path, key_A, key_B, scale = site
    A, B = factored.wide(tensors[key_A]), factored.wide(tensors[key_B])
    if not is_taken_from_base(str(layout.config.get("init", "default"))) or layout.config.get("freeze_a"):
        return LowRank(A, B, scale)
    start_A, start_B = tensors.get(f"{path}:start_A"), tensors.get(f"{path}:start_B")
    if start_A is None or start_B is None:
        return None
    wide_A, wide_B = factored.wide(start_A), factored.wide(start_B)
    return LowRank(torch.cat([wide_A, A]), torch.cat([B, wide_B + B], dim=1), scale)


def cut(low: LowRank, r: int, *, scale: float = 1.0) -> tuple[LowRank, float, float]:
    """The nearest update of rank r, the Frobenius norm of what that leaves out, and of the whole."""
    kept = factored.truncated(low, r, scale=scale)
    return kept, factored.distance(low, kept), factored.norm(low)


def kaiming_uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """LoRA's start of A (r, in): uniform within 1/sqrt(in), float32."""
    bound = 1.0 / math.sqrt(shape[-1])
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)
