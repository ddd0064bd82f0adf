"""The server's side of one request to many clients: what came back, what it cost, who failed and why."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deltaw.federated.messages import Message, MessageError, pack, unpack
from deltaw.federated.transport import Transport, TransportFailure
from deltaw.federated.validation import numbers, wrong_echo

#: The most bytes of a reply without tensors.
SMALL_BYTES = 64 << 20


#: Entries of a round's line that a client has no say in.
_MEASURED = ("status", "reason", "bytes_up", "bytes_down", "update_norm", "cosine", "metrics", "_folds", "_revealed")

#: Requests between rounds, for which a client may have to load its model.
_UNHURRIED = ("hello", "initial", "fold", "finish")


@dataclass
class Book:
    """What one round has to say of each client.

    Attributes:
        silos: by name, the client's entry of the round's line.
        failures: reasons of attempts that came to nothing.
    """

    silos: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def of(self, name: str) -> dict[str, Any]:
        """The entry of a client."""
        return self.silos.setdefault(name, {"bytes_up": 0, "bytes_down": 0})

    def failed(self, name: str, status: str, reason: str) -> None:
        """Records that a client's update does not count."""
        self.of(name).update(status=status, reason=" ".join(reason.split())[:500])

    def well(self, name: str, facts: Any = None) -> None:
        """Records that a client's update counts, and what it told; that replaces nothing that is measured here."""
        entry = self.of(name)
        entry.pop("reason", None)
        entry.update({key: value for key, value in numbers(facts).items() if key not in _MEASURED}, status="ok")

    def total(self, key: str) -> int:
        """Bytes of all clients together."""
        return sum(entry[key] for entry in self.silos.values())

    def why(self) -> str:
        """Who failed, in one line."""
        failed = (
            f"{name} {entry['status']}: {entry['reason']}"
            for name, entry in sorted(self.silos.items())
            if "reason" in entry
        )
        return "; ".join(failed) or "nobody else was there"


class Exchange:
    """Asks clients by a transport, one kind of request at a time.

    Args:
        transport: to the clients.
        run: the run's id, which every message carries.
        deadline_s: for each request.
        wait_s: in its place for requests between rounds, if that is longer: clients may have to load a model.
    """

    def __init__(self, transport: Transport, *, run: str, deadline_s: float | None, wait_s: float) -> None:
        self._transport = transport
        self.run = run
        self._deadline_s, self._wait_s = deadline_s, wait_s

    def ask(
        self,
        kind: str,
        asked: Mapping[str, Mapping[str, Any]],
        *,
        book: Book,
        round_: int = 0,
        attempt: int = 0,
        header: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        limit_bytes: int = SMALL_BYTES,
    ) -> Iterator[tuple[str, Message]]:
        """Yields (name, reply) of those that answered as they should; the others are in the book, with the reason.

        Args:
            kind: of the requests.
            asked: by client, header entries of its own.
            book: counts bytes and records failures.
            round_: from 0.
            attempt: at the round.
            header: entries for all.
            tensors: for all.
            limit_bytes: a larger reply is refused before it is read.
        """
        echo = {"run": self.run, "round": round_, "attempt": attempt, "request": secrets.token_hex(16)}
        same = None if any(asked.values()) else pack(Message(kind, {**(header or {}), **echo}, tensors or {}))
        requests = {}
        for name, own in asked.items():
            data = same or pack(Message(kind, {**(header or {}), **own, **echo}, tensors or {}))
            book.of(name)["bytes_down"] += len(data)
            requests[name] = data
        waiting = set(requests)
        if not requests:
            return
        deadline_s = self._deadline_s
        if deadline_s is not None and kind in _UNHURRIED:
            deadline_s = max(deadline_s, self._wait_s)
        for name, answer in self._transport.exchange(requests, deadline_s=deadline_s):
            if name not in waiting:
                continue
            waiting.discard(name)
            if isinstance(answer, TransportFailure):
                book.failed(name, "late" if answer.late else "crashed", answer.reason)
                continue
            book.of(name)["bytes_up"] += len(answer)
            reply = self._read(name, answer, kind, echo, book, limit_bytes)
            if reply is not None:
                yield name, reply
        for name in waiting:
            book.failed(name, "crashed", "the transport gave no reply")

    @staticmethod
    def _read(
        name: str, answer: bytes, kind: str, echo: Mapping[str, Any], book: Book, limit_bytes: int
    ) -> Message | None:
        try:
            reply = unpack(answer, limit_bytes=limit_bytes)
        except MessageError as error:
            book.failed(name, "refused", str(error))
            return None
        if reply.kind == "error" and reply.header.get("client") == name:
            status = "refused" if reply.header.get("refused") else "crashed"
            book.failed(name, status, str(reply.header.get("reason", "no reason")))
            for told in ("revealed", "folds"):
                if told in reply.header:
                    book.of(name)[f"_{told}"] = reply.header[told]
            return None
        if reason := wrong_echo(reply, echo, name, kind):
            book.failed(name, "refused", reason)
            return None
        return reply
