"""The server's side of one secure attempt over the wire: keys, shares, masked vectors, survivors, shares of masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from deltaw.federated.exchange import SMALL_BYTES, Book, Exchange
from deltaw.federated.wire import unflat

if TYPE_CHECKING:
    from deltaw.federated.secure import PublicIdentity, SecureSettings


class IntegerCode(Protocol):
    """How vectors of reals become integers with noise in them, which sum up; the server needs the way back."""

    @property
    def terms(self) -> str:
        """A hash of what clients do; each compares it with its own."""

    def length(self, size: int) -> int:
        """Integers for a vector of `size` reals."""

    def decode(self, total: Tensor, size: int) -> Tensor:
        """The sum of the reals (size,), float64, of a sum of integers."""


@dataclass(frozen=True)
class SecureRoster:
    """What the server knows of secure aggregation's participants.

    Attributes:
        peers: public identity keys of all clients by name.
        settings: what all agreed on.
        integers: how clients' updates become integers, where they mask such (settings without a clip).
    """

    peers: Mapping[str, PublicIdentity]
    settings: SecureSettings
    integers: IntegerCode | None = None


class SecureSession:
    """One attempt at a round. A client that fails in a step is out of it; below the threshold the attempt is over.

    Attributes:
        members: who is still in.
    """

    def __init__(
        self, exchange: Exchange, roster: SecureRoster, about: Mapping[str, Any], round_: int, attempt: int, book: Book
    ) -> None:
        from deltaw.federated.secure import SecureServer, attempt_context

        self._exchange, self._roster, self._about, self._book = exchange, roster, dict(about), book
        self._round, self._attempt = round_, attempt
        self._claims: dict[str, Counter[tuple[str, ...]]] = {}
        self._phase = 0
        self.members: list[str] = []
        context = attempt_context(exchange.run, round_, attempt)
        self._server = SecureServer(context, roster.peers, settings=roster.settings)

    def open(self, names: Sequence[str]) -> bool:
        """Exchanges keys and shares; whether enough took part.

        A client that has helped to unmask a sum in an earlier attempt at this round says of whom: the same set is then
        summed again, as it would refuse any other, whose difference from the first would show single updates.
        """
        from deltaw.federated.secure import SecureError

        try:
            adverts = self._ask("secure-advertise", names, "advert", self._server.add_advert)
            if others := set(self.revealed(0) or adverts) ^ set(adverts):
                self._book.failures.append(f"{', '.join(sorted(others))} not as in an attempt that was unmasked")
                return False
            told = {name: {"adverts": self._server.adverts()} for name in adverts}
            self.members = self._ask("secure-share", adverts, "shares", self._server.add_shares, own=told)
            self._sealed = {name: {"shares": self._server.shares_for(name)} for name in self.members}
        except SecureError as error:
            self._book.failures.append(str(error))
            return False
        return True

    def revealed(self, phase: int) -> list[str] | None:
        """Whose sum of a phase was unmasked in an earlier attempt, as most of those say who say anything."""
        claims = self._claims.get(str(phase))
        return list(claims.most_common(1)[0][0]) if claims else None

    def mean(
        self, asked: Mapping[str, Any], tensors: Mapping[str, Tensor], unmoved: Mapping[str, Tensor]
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
        """The weighted mean of the members' changes in the next phase, as one upload; empty where too few are left."""
        from deltaw.federated.secure import SecureError

        phase = self._phase
        wanted = self.revealed(phase) or self.members
        shapes = {key: tuple(value.shape) for key, value in unmoved.items()}
        size, code = sum(value.numel() for value in unmoved.values()), self._roster.integers
        length = (size if code is None else code.length(size)) + 1
        try:
            uploads = self._exchange.ask(
                "train" if phase == 0 else "phase",
                {name: {"secure": self._sealed[name] if phase == 0 else {}} for name in self.members if name in wanted},
                book=self._book,
                round_=self._round,
                attempt=self._attempt,
                header=self._about | dict(asked) | ({} if code is None else {"integers": code.terms}),
                tensors=tensors,
                limit_bytes=SMALL_BYTES + 4 * length,
            )
            for name, reply in uploads:
                masked = reply.tensors.get("masked")
                if masked is None or masked.shape != (length,):
                    self._book.failed(name, "refused", f"no masked vector of {length} words")
                elif self._took(name, lambda n, m: self._server.add_upload(n, masked, m.header.get("receipt")), reply):  # noqa: B023
                    self._book.well(name, reply.header.get("facts"))
            here, gone = self._server.survivors()
            told = {"survivors": here, "dropped": gone}
            agreed = self._ask("secure-agree", here, "agreement", self._server.add_agreement, header=told)
            signed = {"agreements": self._server.agreements()}
            self._ask("secure-unmask", agreed, "unmasked", self._server.add_unmask, header=signed)
            found = self._server.result()
        except SecureError as error:
            self._book.failures.append(str(error))
            return {}, {}
        for name in here:
            # In the sum, even where it was not there any more to unmask it.
            self._book.well(name)
        self.members, self._phase = list(found.clients), phase + 1
        total = found.total if code is None else code.decode(found.total, size)
        return {"sum": unflat(total / found.weight, shapes)}, {"sum": 1.0}

    def _ask(
        self,
        kind: str,
        names: Sequence[str],
        field: str,
        add: Any,
        *,
        own: Mapping[str, Any] | None = None,
        header: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """One step with those names; those whose message the state machine took."""
        replies = self._exchange.ask(
            kind,
            {name: own[name] if own else {} for name in names},
            book=self._book,
            round_=self._round,
            attempt=self._attempt,
            header={"phase": self._phase, **(header or {})},
        )
        took = []
        for name, reply in replies:
            said = reply.header.get("revealed")
            for phase, members in said.items() if isinstance(said, dict) else ():
                self._claims.setdefault(phase, Counter())[tuple(sorted(map(str, members)))] += 1
            if self._took(name, lambda n, m: add(n, m.header.get(field)), reply):
                took.append(name)
        return sorted(took)

    def _took(self, name: str, add: Any, reply: Any) -> bool:
        from deltaw.federated.secure import SecureError

        try:
            add(name, reply)
        except SecureError as error:
            self._book.failed(name, "refused", str(error))
            return False
        return True
