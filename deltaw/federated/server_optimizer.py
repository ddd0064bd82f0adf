"""Steps of the server on the clients' aggregated change, taken for a gradient.

Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, algorithm 2; momentum as Hsu et al., "Measuring the
Effects of Non-Identical Data Distribution for Federated Visual Classification", arXiv 1909.06335. With x a tensor of
the state and Delta = aggregate - x, rate eta:

    none       x <- x + Delta
    momentum   m <- beta1 m + Delta                  x <- x + eta m
    adam       m <- beta1 m + (1 - beta1) Delta      x <- x + eta m / (sqrt(v) + tau)
               v <- beta2 v + (1 - beta2) Delta^2

m starts at 0 and v at tau^2; there is no correction of the bias, as in the paper. Where tau is large
against the changes, adam divides by tau to 2 tau throughout, which is momentum.

For rules whose result is the state plus a combination of differences (`Rule.additive`). `product` and `fedex` put a
part of the round's change into the carried update: a step that stretches the factors alone would break the sum that
they are exact in, and `product` draws its factors anew. `sketch` makes new factors, turned against the old ones, so
that their difference is no direction.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.core.errors import InputError, unknown_name
from deltaw.federated.rules.contract import Rule
from deltaw.federated.state import GlobalState

KINDS = ("none", "momentum", "adam")

_FIRST, _SECOND = "first/", "second/"


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer:
    """One kind of step; what it remembers is handed in and out, as tensors by name.

    Attributes:
        kind: one of `KINDS`.
        learning_rate: eta; None means 1 for momentum and 0.01 for adam.
        beta1: of m.
        beta2: of v.
        tau: adam's degree of adaptivity, in the units of the changes.
    """

    kind: str = "none"
    learning_rate: float | None = None
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("server optimizer", self.kind, KINDS)
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 0.01 if self.kind == "adam" else 1.0)
        problems = []
        for name in ("learning_rate", "tau"):
            if not _is_number(value := getattr(self, name)) or not 0 < value < math.inf:
                problems.append(f"{name} is {value!r}: expected a number above 0")
        for name in ("beta1", "beta2"):
            if not _is_number(value := getattr(self, name)) or not 0 <= value < 1:
                problems.append(f"{name} is {value!r}: expected a number from 0 to below 1")
        if problems:
            raise InputError("server optimizer: " + "; ".join(problems))

    def check(self, rule: Rule) -> None:
        """Raises an InputError for a rule whose result is no step from the state."""
        if self.kind != "none" and not rule.additive:
            raise InputError(
                f"server optimizer {self.kind} with rule {rule.name}: that rule makes new factors or carries a part of "
                "the change beside them, so the factors' change is no gradient; take none, or rule fedavg-ab"
            )

    def step(
        self, start: GlobalState, aggregate: GlobalState, memory: Mapping[str, Tensor], *, trained: Collection[str]
    ) -> tuple[GlobalState, dict[str, Tensor]]:
        """The state after the round, and what to remember.

        Args:
            start: what the round started from.
            aggregate: what the rule made of it.
            memory: what the last step gave; {} at first.
            trained: keys that clients trained in this round. Others stay, whatever is remembered of them.
        """
        if self.kind == "none":
            return aggregate, dict(memory)
        assert self.learning_rate is not None
        kept, tensors = dict(memory), dict(aggregate.tensors)
        for key in trained:
            x = start.tensors[key].double()
            change = aggregate.tensors[key].double() - x
            m = kept[_FIRST + key].double() if _FIRST + key in kept else torch.zeros_like(x)
            if self.kind == "momentum":
                m = self.beta1 * m + change
                move = m
            else:
                v = kept[_SECOND + key].double() if _SECOND + key in kept else torch.full_like(x, self.tau**2)
                m = self.beta1 * m + (1 - self.beta1) * change
                v = self.beta2 * v + (1 - self.beta2) * change.square()
                move = m / (v.sqrt() + self.tau)
                kept[_SECOND + key] = v.to(start.tensors[key].dtype)
            kept[_FIRST + key] = m.to(start.tensors[key].dtype)
            tensors[key] = (x + self.learning_rate * move).to(start.tensors[key].dtype)
        return GlobalState(tensors, aggregate.carried), kept


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
