"""A client: one organisation's side of the protocol. It answers messages, trains by its `Trainer`, and keeps books."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from deltaw.core.protocols import LowRank
from deltaw.federated.state import GlobalState, Layout


@dataclass(frozen=True)
class LocalResult:
    """What a local training gives.

    Attributes:
        tensors: the trained tensors by key, float32 on the CPU.
        examples: rows trained on, the weight of the result where weights go by examples.
        facts: numbers for the log, such as the loss; no loss where training is private.
    """

    tensors: Mapping[str, Tensor]
    examples: int
    facts: Mapping[str, float] = field(default_factory=dict)


class Trainer(Protocol):
    """An organisation's model and data, behind which everything of transformers lies."""

    def describe(self) -> dict[str, Any]:
        """`base` (SHA-256 of the frozen base, hexadecimal), `layout`, `examples` (rows), `versions`; JSON-able."""

    def initial(self) -> tuple[GlobalState, Layout]:
        """The adapter at its start, from the run's seed: equal for all clients."""

    def train(self, start: GlobalState, *, trained: frozenset[str], round_: int, rounds: int) -> LocalResult:
        """Trains the keys of `trained`, from `start`; `round_` counts from 0."""

    def evaluate(self, state: GlobalState) -> dict[str, float]:
        """Metrics on the organisation's own test rows; empty where it has none."""

    def fold(self, carried: Mapping[str, LowRank]) -> None:
        """Adds updates to the frozen base for good, by site; states then stand on the new base.

        Raises:
            InputError: a base in 4 bits.
        """


class Client:
    """Answers the server's requests; see `handle`.

    Args:
        name: of the organisation, as the server knows it.
        trainer: the local model and data.
    """

    def __init__(self, name: str, trainer: Trainer) -> None:
        self.name = name
        self.trainer = trainer

    def handle(self, request: bytes) -> bytes:
        """The reply to a request; never raises for a bad one, but answers with kind `error`."""
        raise NotImplementedError
