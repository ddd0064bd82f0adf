"""One attempt at a round: requests to the sampled clients, phase by phase, to what the rule makes of their updates.

What clients send is the change, upload(trained) - upload(start); the server adds upload(start), which it can compute.
Without secure aggregation each client's change is checked; with it the server has their weighted sum only, and checks
what it can: who took part, and lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltaw.core.errors import RunError
from deltaw.federated.compression import Compressor
from deltaw.federated.config import FederationConfig
from deltaw.federated.exchange import SMALL_BYTES, Book, Exchange
from deltaw.federated.messages import MessageError
from deltaw.federated.rules import Outcome, Rule
from deltaw.federated.secure_exchange import SecureRoster, SecureSession
from deltaw.federated.state import GlobalState, Layout
from deltaw.federated.validation import joint_norm, not_finite, too_large, wrong_examples
from deltaw.federated.wire import digest, state_tensors


@dataclass(frozen=True)
class Gathered:
    """What a round's attempt gave.

    Attributes:
        state: as the rule made it.
        facts: the rule's, over all phases.
        drift: mean distance of a client's change from their mean, relative to the mean's norm; None where only the sum
            is known.
    """

    state: GlobalState
    facts: dict[str, float]
    drift: float | None


class Gathering:
    """Attempts at one round.

    Args:
        exchange: to the clients.
        config: of the federation.
        rule: made from it.
        layout: of the tensors.
        about: header entries that every request of the round carries.
        start: what clients start from.
        round_: from 0.
        book: of the round.
        secure: None for plain updates.
    """

    def __init__(
        self,
        exchange: Exchange,
        config: FederationConfig,
        rule: Rule,
        layout: Layout,
        about: Mapping[str, Any],
        start: GlobalState,
        round_: int,
        book: Book,
        secure: SecureRoster | None,
    ) -> None:
        self._exchange, self._config, self._rule, self._layout = exchange, config, rule, layout
        self._about, self._start, self._round, self._book = dict(about), start, round_, book
        self._secure = secure
        #: Whose sum of this round was unmasked before; the only set that those clients will sum again.
        self.revealed: list[str] | None = None
        self._state = state_tensors(start)
        self._digest = digest(self._state)

    def attempt(self, names: Sequence[str], number: int) -> Gathered | None:
        """Asks the clients and combines their updates; None where too few came, with the reasons in the book."""
        session = None
        if self._secure is not None:
            session = SecureSession(self._exchange, self._secure, self._about, self._round, number, self._book)
            opened = session.open(names)
            self.revealed = session.revealed(0)
            if not opened:
                return None
        broadcast: dict[str, Tensor] = {}
        facts: dict[str, float] = {}
        drift: float | None = None
        for phase in range(self._rule.phases):
            # A client that has not moved: what its upload looks like, and what changes are changes from.
            still = {key: self._start.tensors[key] for key in self._rule.trained(self._round, self._layout)}
            unmoved = self._rule.upload(phase, self._start, still, self._layout, broadcast)
            asked = {"phase": phase, "start": self._digest}
            tensors = self._state if phase == 0 else {f"broadcast/{key}": value for key, value in broadcast.items()}
            if session is None:
                changes, weights = self._plain(names, number, asked, tensors, unmoved)
                names = sorted(changes)
            else:
                changes, weights = session.mean(asked, tensors, unmoved)
                names = session.members
            if not changes or len(names) < self._config.least:
                return None
            uploads = [{key: unmoved[key] + value for key, value in changes[name].items()} for name in sorted(changes)]
            total = sum(weights[name] for name in weights)
            shares = [weights[name] / total for name in sorted(changes)]
            outcome = self._rule.combine(phase, self._start, uploads, shares, self._layout, broadcast)
            facts |= outcome.facts
            if phase == 0 and session is None:
                drift = _spread(self._book, changes, dict(zip(sorted(changes), shares, strict=True)))
            broadcast = outcome.broadcast or {}
        return _whole(outcome, facts, drift)

    def _plain(
        self,
        names: Sequence[str],
        number: int,
        asked: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        unmoved: Mapping[str, Tensor],
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
        """The accepted changes and weights by client; the others are in the book."""
        changes, weights = {}, {}
        values = sum(value.numel() for value in unmoved.values())
        # 12 bytes: a value and its place, the most that a compression spends on one.
        replies = self._exchange.ask(
            "train" if asked["phase"] == 0 else "phase",
            {name: {} for name in names},
            book=self._book,
            round_=self._round,
            attempt=number,
            header=self._about | dict(asked),
            tensors=tensors,
            limit_bytes=SMALL_BYTES + 12 * values,
        )
        for name, reply in replies:
            change, reason = self._read(reply.tensors, reply.header.get("compression"), unmoved)
            if reason := wrong_examples(reply.header.get("examples")) or reason:
                self._book.failed(name, "refused", reason)
                continue
            changes[name] = change
            weights[name] = float(reply.header["examples"]) if self._config.weighting == "examples" else 1.0
            self._book.well(name, reply.header.get("facts"))
        return changes, weights

    def _read(
        self, payload: Mapping[str, Tensor], header: Any, unmoved: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], str | None]:
        shapes = {key: tuple(value.shape) for key, value in unmoved.items()}
        compressor = Compressor(self._config.compression, share=self._config.compression_share)
        try:
            change = compressor.decompress(payload, header if isinstance(header, dict) else {}, shapes)
        except MessageError as error:
            return {}, str(error)
        return change, not_finite(change) or too_large(change, self._config.max_update_norm)


def _whole(outcome: Outcome, facts: dict[str, float], drift: float | None) -> Gathered:
    if outcome.state is None:
        raise RunError("the rule gave no state after its last phase: a rule's last phase must")
    return Gathered(outcome.state, facts, drift)


def _spread(book: Book, changes: Mapping[str, Mapping[str, Tensor]], shares: Mapping[str, float]) -> float | None:
    """Notes each change's norm and its cosine with the weighted mean; gives the mean distance from that."""
    keys = next(iter(changes.values())).keys()
    mean = {key: sum(changes[name][key].double() * share for name, share in shares.items()) for key in keys}
    length = joint_norm(mean)  # type: ignore[arg-type]
    distances = []
    for name, change in changes.items():
        norm = joint_norm(change)
        book.of(name)["update_norm"] = norm
        if length > 0 and norm > 0:
            inner = sum(float((change[key].double() * mean[key]).sum()) for key in keys)
            book.of(name)["cosine"] = max(-1.0, min(1.0, inner / (norm * length)))
        distances.append(joint_norm({key: change[key].double() - mean[key] for key in keys}))
    return sum(distances) / len(distances) / length if length > 0 else None
