"""A client: one organisation's side of the protocol. It answers messages, trains by its `Trainer`, and keeps books.

What a client sends for a round is made once and kept before it is sent: asked again after a lost reply, after its own
restart or the server's, it gives the same update, and spends no privacy a second time. What travels is always the
change, upload(trained) - upload(start), so that an update that did nothing is zero under every rule.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from deltaw.core.errors import DeltawError, InputError
from deltaw.core.protocols import LowRank
from deltaw.federated.compression import Compressor
from deltaw.federated.messages import Message, MessageError, pack, unpack
from deltaw.federated.rules import make_rule
from deltaw.federated.state import GlobalState, Layout
from deltaw.federated.store import ClientStore
from deltaw.federated.validation import ECHOED, not_finite, numbers, too_large, wrong_tensors
from deltaw.federated.wire import digest, flat, layout_digest, layout_plain, owned, state_of, state_tensors

if TYPE_CHECKING:
    from deltaw.federated.secure import SecureClient

_LOG = logging.getLogger("deltaw.federated")


#: Errors whose messages hold nothing of a client's data.
_TOLD = ("SecureError", "BudgetError")


class RefusalError(DeltawError):
    """A request that a client will not serve; the reason holds nothing of its data, and is told to the server.

    Args:
        reason: one line.
        **told: further header entries of the reply.
    """

    def __init__(self, reason: str, **told: Any) -> None:
        super().__init__(reason)
        self.told = told


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

    def train(self, start: GlobalState, *, trained: frozenset[str], round_: int, rounds: int, run: str) -> LocalResult:
        """Trains the keys of `trained`, from `start`; `round_` counts from 0, and `run` names the federation's run."""

    def evaluate(self, state: GlobalState) -> dict[str, float]:
        """Metrics on the organisation's own test rows; empty where it has none."""

    def fold(self, carried: Mapping[str, LowRank]) -> None:
        """Adds updates to the frozen base for good, by site; states then stand on the new base.

        Raises:
            InputError: a base in 4 bits.
        """


class UpdatePrivacy(Protocol):
    """What stands between a trained update and its leaving, where privacy is by update and not by example.

    A round has one release, whatever the server asks for.
    """

    @property
    def terms(self) -> str:
        """A hash of what is done to updates: equal for clients whose noise protects each other."""

    def charge(self, *, run: str, round_: int) -> None:
        """Charges the organisation's ledger for a round, once.

        Raises:
            BudgetError: the organisation's budget does not allow it.
        """

    def release(self, change: Mapping[str, Tensor], *, run: str, round_: int) -> dict[str, Tensor]:
        """The change, charged for, clipped jointly and noised."""

    def release_integers(self, vector: Tensor, *, run: str, round_: int) -> Tensor:
        """The same of a flat change (n,), as integers (n,) for a ring: where masked vectors are integers."""

    def facts(self, round_: int) -> dict[str, float]:
        """Numbers for the round's log, such as epsilon."""

    def record(self) -> dict[str, Any]:
        """What is promised, for `run.json`."""


class Client:
    """Answers the server's requests; see `handle`.

    Args:
        name: of the organisation, as the server knows it.
        trainer: the local model and data.
        store: the client's books; None keeps them in memory, so that a restart trains a round in flight again.
        secure: masks updates; the client then sends no plain ones, whatever the server asks for.
        privacy: clips and noises whole updates; nothing else of a training is then told but how long it took.
        max_message_bytes: a larger request is refused before it is read.
        explain: whether the reason of any failure is told to the server. False tells refusals by the protocol only, as
            other errors may quote data; they are logged here.
    """

    def __init__(
        self,
        name: str,
        trainer: Trainer,
        store: ClientStore | None = None,
        *,
        secure: SecureClient | None = None,
        privacy: UpdatePrivacy | None = None,
        max_message_bytes: int = 1 << 31,
        explain: bool = False,
    ) -> None:
        self.name = name
        self.trainer = trainer
        self.store = store or ClientStore()
        self._secure = secure
        self._privacy = privacy
        self._limit = max_message_bytes
        self._explain = explain
        self._folded = 0
        # Of the secure attempt in hand: replies to requests, since no step may be done twice, and who survived.
        self._said: dict[bytes, bytes] = {}
        self._survivors: dict[int, list[str]] = {}
        self._known: tuple[dict[str, Any], Layout] | None = None
        self._kinds: dict[str, Callable[[Message], tuple[dict[str, Any], dict[str, Tensor]]]] = {
            "hello": self._hello,
            "initial": self._initial,
            "fold": self._fold,
            "train": self._train,
            "phase": self._phase,
            "evaluate": self._evaluate,
            "finish": self._finish,
            "secure-advertise": self._advertise,
            "secure-share": self._share,
            "secure-agree": self._agree,
            "secure-unmask": self._unmask,
        }

    def handle(self, request: bytes) -> bytes:
        """The reply to a request; never raises for a bad one, but answers with kind `error` and a reason."""
        echo: dict[str, Any] = {"client": self.name}
        asked = hashlib.sha256(request).digest()
        if asked in self._said:
            return self._said[asked]
        try:
            message = unpack(request, limit_bytes=self._limit)
            echo |= {name: message.header.get(name) for name in ECHOED}
            if message.kind not in self._kinds:
                raise RefusalError(f"a request of kind {message.kind[:100]!r}: unknown")
            self._bind(message)
            header, tensors = self._kinds[message.kind](message)
            reply = pack(Message(message.kind, {**header, **echo}, tensors))
        except Exception as error:
            return pack(Message("error", {**self._excuse(error), **echo}))
        if self._secure is not None and message.kind.startswith(("secure-", "train", "phase")):
            self._said[asked] = reply
        return reply

    def _excuse(self, error: Exception) -> dict[str, Any]:
        told = error.told if isinstance(error, RefusalError) else {}
        refusal = isinstance(error, RefusalError | MessageError) or type(error).__name__ in _TOLD
        _LOG.warning("%s: %s: %s", self.name, type(error).__name__, error, exc_info=not isinstance(error, DeltawError))
        said = str(error) if isinstance(error, DeltawError) else f"{type(error).__name__}: {error}"
        if not refusal and not self._explain:
            said = f"{type(error).__name__}; the client's own log says more"
        return {"reason": " ".join(said.split())[:500], "refused": refusal, **told}

    # Books: which run this client is in, and what it did in it.

    def _bind(self, message: Message) -> None:
        """Holds the client to one run: another one begins with a hello."""
        run = message.header.get("run")
        if not isinstance(run, str):
            raise RefusalError("a request that names no run")
        current = self.store.load("client", "run")
        if current is not None and current.header["run"] == run:
            return
        if current is not None and (message.kind != "hello" or self._folded):
            raise RefusalError(f"of run {run[:100]!r}, while this client is in {current.header['run']!r}")
        self.store.save("client", "run", Message("run", {"run": run}))

    def _book(self, run: str) -> dict[str, Any]:
        found = self.store.load(run, "book")
        return dict(found.header) if found is not None else {"folds": 0}

    def _described(self) -> dict[str, Any]:
        promised = {} if self._privacy is None else {"privacy": self._privacy.record()}
        return {**self.trainer.describe(), **promised}

    def _own(self) -> tuple[dict[str, Any], Layout]:
        if self._known is None:
            self._known = self._described(), self.trainer.initial()[1]
        return self._known

    def _prepared(self, message: Message) -> Layout:
        """Refuses another base, layout or number of folds; folds what is kept and not yet in this process' base."""
        header = message.header
        described, layout = self._own()
        if header["base"] != described["base"]:
            raise RefusalError(f"the base is {str(header['base'])[:12]}, this client's {described['base'][:12]}")
        if header["layout"] != layout_digest(layout):
            raise RefusalError("another adapter: its tensors, method or options differ from this client's")
        have = self._book(header["run"])["folds"]
        if header["folds"] != have:
            raise RefusalError(f"{header['folds']} folds are expected in the base, {have} are known", folds=have)
        for number in range(self._folded, have):
            kept = self.store.load(header["run"], f"fold-{number}")
            assert kept is not None
            self.trainer.fold(state_of(kept.tensors).carried)
            self._folded = number + 1
        return layout

    def _hello(self, message: Message) -> tuple[dict[str, Any], dict[str, Tensor]]:
        described, layout = self._own()
        plain = layout_plain(layout)
        return {**described, "layout": plain, "folds": self._book(message.header["run"])["folds"]}, {}

    def _initial(self, message: Message) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, state_tensors(self.trainer.initial()[0])

    def _fold(self, message: Message) -> tuple[dict[str, Any], dict[str, Tensor]]:
        run, number = message.header["run"], _whole(message.header, "number")
        book = self._book(run)
        if number > book["folds"]:
            raise RefusalError(f"fold {number} before fold {book['folds']}", folds=book["folds"])
        if number == book["folds"]:
            self.store.save(run, f"fold-{number}", Message("fold", {}, owned(message.tensors)))
            self.store.save(run, "book", Message("book", book | {"folds": number + 1}))
        return {"folds": max(book["folds"], number + 1)}, {}

    def _evaluate(self, message: Message) -> tuple[dict[str, Any], dict[str, Tensor]]:
        self._prepared(message)
        return {"metrics": numbers(self.trainer.evaluate(state_of(message.tensors)))}, {}

    def _finish(self, message: Message) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The last request of a run: what was kept of its last round goes, and what there is to report is told."""
        run = message.header["run"]
        if (kept := self.store.load(run, "trained")) is not None:
            # Without what was kept the round would be trained, and released, anew.
            self.store.save(run, "book", Message("book", self._book(run) | {"done": kept.header["round"]}))
        self.store.drop(run, "trained", "upload-0", "upload-1")
        return {"described": self._described()}, {}

    # A round.

    def _train(self, message: Message) -> tuple[dict[str, Any], dict[str, Tensor]]:
        header, layout = message.header, self._prepared(message)
        start = state_of(message.tensors)
        expected = {key: torch.empty(shape, device="meta") for key, shape in layout.shapes.items()}
        if reason := wrong_tensors(start.tensors, expected) or not_finite(start.tensors):
            raise RefusalError(f"the round's start: {reason}")
        kept = self._trained(header, digest(state_tensors(start)))
        if kept is None:
            kept = self._train_now(header, start, layout)
        return self._answered(message, 0, kept, layout)

    def _phase(self, message: Message) -> tuple[dict[str, Any], dict[str, Tensor]]:
        header, layout = message.header, self._prepared(message)
        if self._privacy is not None:
            raise RefusalError("a second upload in a round: this client is accounted for one, by update_dp")
        kept = self._trained(header, header["start"])
        if kept is None:
            raise RefusalError(f"a later phase of round {header['round']}, which this client did not train in")
        return self._answered(message, _whole(header, "phase"), kept, layout)

    def _trained(self, header: Mapping[str, Any], start: str) -> Message | None:
        """What was trained from this start; None for a newer round.

        Raises:
            RefusalError: an older round, or the same one from another start.
        """
        round_ = _whole(header, "round")
        kept = self.store.load(header["run"], "trained")
        if kept is None and round_ <= (done := self._book(header["run"]).get("done", -1)):
            raise RefusalError(f"round {round_}, after this client has ended the run with round {done}")
        if kept is None or kept.header["round"] < round_:
            return None
        if kept.header["round"] > round_:
            raise RefusalError(f"round {round_}, after this client trained in round {kept.header['round']}")
        if kept.header["start"] != start:
            raise RefusalError(f"round {round_} from another start than the one that this client trained from")
        return kept

    def _train_now(self, header: Mapping[str, Any], start: GlobalState, layout: Layout) -> Message:
        rule = make_rule(header["rule"], **header["options"])
        rule.check(layout)
        keys = rule.trained(header["round"], layout)
        if self._privacy is not None:
            # Now, as a training whose result may not leave would be in vain.
            self._privacy.charge(run=header["run"], round_=header["round"])
        began = time.monotonic()
        result = self.trainer.train(
            start, trained=keys, round_=header["round"], rounds=header["rounds"], run=header["run"]
        )
        local = {key: result.tensors[key].detach().to("cpu", torch.float32) for key in sorted(keys)}
        if reason := not_finite(local):
            raise RefusalError(f"its training failed: {reason}")
        tensors = state_tensors(start)
        facts = {"seconds": round(time.monotonic() - began, 3)}
        facts |= numbers(result.facts) if self._privacy is None else self._privacy.facts(header["round"])
        about = {"round": header["round"], "start": digest(tensors), "examples": result.examples, "facts": facts}
        kept = Message("trained", about, owned(tensors | {f"local/{key}": value for key, value in local.items()}))
        self.store.save(header["run"], "trained", kept)
        return kept

    def _answered(
        self, message: Message, phase: int, kept: Message, layout: Layout
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The reply of a phase: the one that was made before, or a new one, kept before it leaves."""
        header, about = message.header, kept.header
        if self._secure is not None and not isinstance(header.get("secure"), Mapping):
            raise RefusalError("this client sends masked updates only, and was asked for a plain one")
        # The first phase follows no broadcast; were one taken, each would have a release made of its own.
        broadcast = _below("broadcast/", message.tensors) if phase else {}
        key = f"{about['round']}-{about['start']}-{phase}-{digest(broadcast)}"
        made = self.store.load(header["run"], f"upload-{phase}")
        if made is None or made.header["key"] != key:
            made = self._made(header, phase, kept, layout, broadcast, key, made)
            self.store.save(header["run"], f"upload-{phase}", made)
        payload = _below("wire/", made.tensors)
        if self._secure is not None:
            return self._masked(header, phase, payload["vector"], about)
        told = {"examples": about["examples"], "facts": about["facts"], "compression": made.header["compression"]}
        return told, payload

    def _made(
        self,
        header: Mapping[str, Any],
        phase: int,
        kept: Message,
        layout: Layout,
        broadcast: Mapping[str, Tensor],
        key: str,
        before: Message | None,
    ) -> Message:
        """What leaves: checked, as a server that sees a sum cannot; noised; then compressed, or ready to be masked."""
        rule = make_rule(header["rule"], **header["options"])
        start, trained = state_of(kept.tensors), _below("local/", kept.tensors)
        still = {name: start.tensors[name] for name in trained}
        unmoved = rule.upload(phase, start, still, layout, broadcast)
        upload = rule.upload(phase, start, trained, layout, broadcast)
        change = {name: (value - unmoved[name]).to(torch.float32) for name, value in upload.items()}
        # Clipping bounds a private change; a refusal would tell its norm.
        bound = header["max_update_norm"] if self._privacy is None else None
        if reason := not_finite(change) or too_large(change, bound):
            raise RefusalError(reason)
        release = {"run": header["run"], "round_": kept.header["round"]}
        if self._secure is not None and self._secure.settings.clip is None:
            if self._privacy is None:
                raise RefusalError("masked vectors are integers, and nothing here makes any")
            if header.get("integers") != self._privacy.terms:
                raise RefusalError("another clip, noise, delta or number of rounds under update_dp than this client's")
            vector = self._privacy.release_integers(flat(change), **release)
            return Message("upload", {"key": key}, owned({"wire/vector": vector}))
        if self._privacy is not None:
            change = self._privacy.release(change, **release)
        if self._secure is not None:
            return Message("upload", {"key": key}, owned({"wire/vector": flat(change)}))
        # What an earlier round's compression lost goes with this one's change, where changes add up over rounds.
        compressor = Compressor(header["compression"], error_feedback=rule.additive, share=header["compression_share"])
        memory = {} if before is None else _below("memory/", before.tensors)
        done = compressor.compress(change, memory)
        tensors = {f"wire/{name}": value for name, value in done.tensors.items()}
        tensors |= {f"memory/{name}": value for name, value in done.memory.items()}
        return Message("upload", {"key": key, "compression": done.header}, owned(tensors))

    # Secure aggregation: the state machine is `deltaw.federated.secure`'s; what is added is memory over attempts.

    def _machine(self) -> SecureClient:
        if self._secure is None:
            raise RefusalError("secure aggregation is not set up at this client")
        return self._secure

    def _advertise(self, message: Message) -> tuple[dict[str, Any], dict[str, Tensor]]:
        from deltaw.federated.secure import attempt_context

        header = message.header
        round_, attempt = _whole(header, "round"), _whole(header, "attempt")
        kept = self.store.load(header["run"], "trained")
        if kept is not None and kept.header["round"] > round_:
            raise RefusalError(f"round {round_}, after this client trained in round {kept.header['round']}")
        self._said.clear()
        self._survivors.clear()
        advert = self._machine().advertise(attempt_context(header["run"], round_, attempt))
        return {"advert": advert, "revealed": self._revealed(header)}, {}

    def _share(self, message: Message) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"shares": self._machine().share(message.header["adverts"])}, {}

    def _masked(
        self, header: Mapping[str, Any], phase: int, vector: Tensor, about: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        machine = self._machine()
        weight = about["examples"] if header["weighting"] == "examples" else 1
        try:
            words = machine.mask(header["secure"].get("shares", {}), vector, phase=phase, weight=weight)
        except InputError as error:
            _LOG.warning("%s: %s", self.name, error)
            raise RefusalError(
                "a value or the weight is beyond secure_clip or secure_weight_bound: raise them"
            ) from error
        # The loss and the number of examples would tell what the masks hide.
        facts = {
            name: value for name, value in about["facts"].items() if name == "seconds" or name.startswith("epsilon")
        }
        return {"receipt": machine.receipt(phase=phase), "facts": facts}, {"masked": words}

    def _agree(self, message: Message) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Signs the survivors; refuses another set than one whose sum this client helped to unmask in this round.

        The difference of two sums over the same updates would show the updates of those that are in one of them.
        """
        header, phase = message.header, _whole(message.header, "phase")
        survivors = sorted(map(str, header["survivors"]))
        before = self._revealed(header)
        if before.get(str(phase), survivors) != survivors:
            raise RefusalError("the sum of other clients was unmasked in this round before", revealed=before)
        signed = self._machine().agree(survivors, list(header["dropped"]), phase=phase)
        self._survivors[phase] = survivors
        return {"agreement": signed}, {}

    def _unmask(self, message: Message) -> tuple[dict[str, Any], dict[str, Tensor]]:
        header, phase = message.header, _whole(message.header, "phase")
        told = self._machine().unmask(header["agreements"], phase=phase)
        before = self._revealed(header) | {str(phase): self._survivors[phase]}
        book = self._book(header["run"]) | {"revealed": {"round": header["round"], "sets": before}}
        self.store.save(header["run"], "book", Message("book", book))
        return {"unmasked": told}, {}

    def _revealed(self, header: Mapping[str, Any]) -> dict[str, list[str]]:
        """By phase, of whom this client helped to unmask the sum in this round."""
        found = self._book(header["run"]).get("revealed", {})
        return dict(found["sets"]) if found.get("round") == header["round"] else {}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _whole(header: Mapping[str, Any], name: str) -> int:
    value = header.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RefusalError(f"{name} is {str(value)[:50]!r}: expected a whole number")
    return value
