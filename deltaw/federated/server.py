"""The server: rounds of a federation, each from a start to a checkpoint; the story is in `Server.run`."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from deltaw.core.errors import InputError, RunError
from deltaw.core.generators import generator
from deltaw.core.protocols import LowRank
from deltaw.federated.config import FederationConfig
from deltaw.federated.exchange import Book, Exchange
from deltaw.federated.gathering import Gathered, Gathering
from deltaw.federated.messages import MessageError
from deltaw.federated.rules import folded, make_rule
from deltaw.federated.secure_exchange import SecureRoster
from deltaw.federated.server_optimizer import ServerOptimizer
from deltaw.federated.state import GlobalState
from deltaw.federated.store import Progress, ServerStore
from deltaw.federated.transport import Transport
from deltaw.federated.validation import not_finite, numbers, wrong_examples, wrong_tensors
from deltaw.federated.wire import carried_tensors, layout_digest, layout_of, state_of, state_tensors

#: The most bytes of an adapter that the server takes from a client at the start.
_STATE_BYTES = 1 << 33


class Judge(Protocol):
    """What measures the global model on rows of the server's own; a `Trainer` does."""

    def evaluate(self, state: GlobalState) -> dict[str, float]:
        """Metrics of a state."""

    def fold(self, carried: Mapping[str, LowRank]) -> None:
        """Adds updates to the frozen base for good."""


class Server:
    """Runs a federation over a transport.

    Args:
        transport: to the clients.
        config: of the federation.
        store: where checkpoints and the log go; with a checkpoint in it the run goes on from there.
        run: the run's id, letters, digits, - and _; the same when a run goes on.
        judge: measures the global model; None where the server has no rows.
        secure: the participants of secure aggregation; needed where the configuration asks for it.
        say: takes a line a round.

    Raises:
        InputError: secure aggregation without participants, or a server optimizer that the rule does not go with.
    """

    def __init__(
        self,
        transport: Transport,
        config: FederationConfig,
        store: ServerStore,
        *,
        run: str,
        judge: Judge | None = None,
        base: str | None = None,
        secure: SecureRoster | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        if config.secure != (secure is not None):
            raise InputError("secure aggregation needs the participants' public keys, and nothing else does")
        self.config, self.store = config, store
        self.rule = make_rule(config.rule, **config.rule_options)
        self.optimizer = ServerOptimizer(
            kind=config.server_optimizer,
            learning_rate=config.server_learning_rate,
            beta1=config.server_momentum,
            beta2=config.server_beta2,
            tau=config.server_tau,
        )
        self.optimizer.check(self.rule)
        self._transport, self._judge, self._secure, self._say = transport, judge, secure, say
        #: The server's own, which has to be the clients': it measures by it.
        self._base = base
        self._exchange = Exchange(transport, run=run, deadline_s=config.deadline_s, wait_s=config.wait_s)
        self._judged_folds = 0
        #: What clients said of themselves, and how many folds each has, by name.
        self.known: dict[str, dict[str, Any]] = {}
        self._folds: dict[str, int] = {}

    def run(self) -> Progress:
        """All rounds, from the last checkpoint on.

        Raises:
            RunError: a round had too few updates in all its attempts; what was done before is kept.
            InputError: clients that do not fit together, or a method that the rule is not right for.
        """
        progress = self.store.load() or self._begin()
        self.rule.check(progress.layout)
        while progress.done < self.config.rounds:
            began, book, round_ = time.monotonic(), Book(), progress.done
            draw = generator(self.config.train.seed, "federated", "begin", round_)
            start = self.rule.begin(progress.state, progress.layout, round_, draw)
            gathered, attempts = self._gathered(start, progress, book)
            state, memory = self.optimizer.step(
                start, gathered.state, progress.optimizer, trained=self.rule.trained(round_, progress.layout)
            )
            folds = list(progress.folds)
            if self.config.merge_every and (round_ + 1) % self.config.merge_every == 0 and state.carried:
                state, carried = folded(state)
                folds.append(carried)
            progress = dataclasses.replace(progress, state=state, optimizer=memory, folds=folds, done=round_ + 1)
            metrics = self._metrics(progress, book) if self._measures(progress.done) else {}
            progress.line = self._line(progress.done, metrics, book, gathered, began, attempts)
            progress.totals = _summed(progress.totals, progress.line)
            self.store.save(progress)
            self._say(_told(progress.line, self.config.rounds))
        return progress

    def finish(self) -> dict[str, dict[str, Any]]:
        """Tells the clients that the run is over; what they then say of themselves, by name."""
        asked: dict[str, dict[str, Any]] = {name: {} for name in self._there(0)}
        replies = self._exchange.ask("finish", asked, book=Book())
        for name, reply in replies:
            if isinstance(reply.header.get("described"), dict):
                self.known[name] = {**self.known.get(name, {}), **reply.header["described"]}
        return self.known

    # Clients.

    def _there(self, wait_for: int) -> list[str]:
        found = self._transport.clients(wait_for=wait_for, timeout_s=self.config.wait_s)
        return [name for name in found if name in self.config.clients]

    def _begin(self) -> Progress:
        """Meets the clients, takes the adapter's start from one of them, and measures it."""
        book, began = Book(), time.monotonic()
        told: dict[str, dict[str, Any]] = {}
        asked: dict[str, dict[str, Any]] = {name: {} for name in self._there(self.config.least)}
        for name, reply in self._exchange.ask("hello", asked, book=book):
            told[name] = dict(reply.header)
        if len(told) < self.config.least:
            raise RunError(f"{len(told)} clients answered, expected at least {self.config.least} ({book.why()})")
        bases = Counter(str(header.get("base")) for header in told.values())
        base, count = bases.most_common(1)[0]
        if count < self.config.least:
            listed = ", ".join(f"{name} {str(header.get('base'))[:12]}" for name, header in sorted(told.items()))
            raise InputError(f"clients have different bases ({listed}): give all the same model, quantize and dtype")
        if self._base not in (None, base):
            raise InputError(
                f"the clients' base is {base[:12]} and the server's {str(self._base)[:12]}: give all the same model, "
                "quantize and dtype"
            )
        first = min(name for name in told if told[name].get("base") == base)
        layout = layout_of(told[first]["layout"])
        self.rule.check(layout)
        for _, reply in self._exchange.ask("initial", {first: {}}, book=book, limit_bytes=_STATE_BYTES):
            progress = Progress(state_of(reply.tensors), layout, base)
            break
        else:
            raise RunError(f"{first} did not give the adapter's start ({book.why()})")
        expected = {key: torch.empty(shape, device="meta") for key, shape in layout.shapes.items()}
        if reason := wrong_tensors(progress.state.tensors, expected) or not_finite(progress.state.tensors):
            raise RunError(f"the adapter's start, from {first}: {reason}")
        self._meet(progress, book)
        line = self._line(0, self._metrics(progress, book), book, None, began, 1)
        progress.line, progress.totals = line, _summed({}, line)
        self.store.save(progress)
        self._say(_told(line, self.config.rounds))
        return progress

    def _meet(self, progress: Progress, book: Book) -> list[str]:
        """Names of the clients that can take part: those that are there and have the run's base, adapter and folds."""
        # A sum of fewer than three hides nothing from those who are in it.
        there = self._there(max(self.config.least, 3) if self.config.secure else self.config.least)
        layout = layout_digest(progress.layout)
        for name, reply in self._exchange.ask("hello", {n: {} for n in there if n not in self.known}, book=book):
            if reason := _unfit(reply.header, progress, layout):
                book.failed(name, "refused", reason)
                continue
            self.known[name] = {k: reply.header.get(k) for k in ("base", "examples", "versions", "privacy")}
            have = reply.header.get("folds")
            self._folds[name] = have if isinstance(have, int) else 0
        for number, carried in enumerate(progress.folds):
            behind = [name for name in there if name in self.known and self._folds[name] == number]
            tensors, header = carried_tensors(carried), {"number": number}
            for name, _ in self._exchange.ask(
                "fold", {n: {} for n in behind}, book=book, header=header, tensors=tensors
            ):
                self._folds[name] = number + 1
        for name in self.config.clients:
            if name not in there:
                book.failed(name, "absent", "not connected")
        return [name for name in there if name in self.known and self._folds[name] == len(progress.folds)]

    # A round.

    def _gathered(self, start: GlobalState, progress: Progress, book: Book) -> tuple[Gathered, int]:
        """The round's result, by as many attempts as it takes; each has a number that was never given before."""
        layout, round_ = progress.layout, progress.done
        about = self._about(progress)
        gathering = Gathering(self._exchange, self.config, self.rule, layout, about, start, round_, book, self._secure)
        for tried in range(1, self.config.attempts + 1):
            ready = self._meet(progress, book)
            names, noted = self._sampled(ready, round_, book, gathering.revealed), len(book.failures)
            if len(names) >= self.config.least:
                gathered = gathering.attempt(names, self.store.attempt(round_))
                self._forget(book)
                if gathered is not None:
                    return gathered, tried
            said = "; ".join(book.failures[noted:]) or "too few updates"
            book.failures[noted:] = [f"{said} ({book.why()})"]
        raise RunError(
            f"round {round_ + 1} had fewer than {self.config.least} updates in {self.config.attempts} attempts "
            f"({book.failures[-1]}); the rounds before are kept in {self.store.folder}: mend what failed and resume"
        )

    def _about(self, progress: Progress) -> dict[str, Any]:
        config = self.config
        return {
            "rounds": config.rounds,
            "rule": config.rule,
            "options": dict(config.rule_options),
            "base": progress.base,
            "layout": layout_digest(progress.layout),
            "folds": len(progress.folds),
            "weighting": config.weighting,
            "compression": config.compression,
            "compression_share": config.compression_share,
            "max_update_norm": config.max_update_norm,
        }

    def _forget(self, book: Book) -> None:
        """Has clients say hello again that may have been started anew, or lack a fold."""
        for name, entry in book.silos.items():
            if "_folds" in entry or entry.get("status") == "crashed":
                entry.pop("_folds", None)
                self.known.pop(name, None)

    def _sampled(self, ready: list[str], round_: int, book: Book, revealed: list[str] | None) -> list[str]:
        """Who is asked: the first of a permutation by seed and round, those that failed in this round at its end.

        Where the sum of some clients was unmasked in an earlier attempt at the round, it is those or nobody.
        """
        if revealed is not None:
            return revealed if set(revealed) <= set(ready) else []
        every = sorted(self.config.clients)
        order = torch.randperm(len(every), generator=generator(self.config.train.seed, "federated", "sample", round_))
        drawn = [every[place] for place in order.tolist() if every[place] in ready]
        drawn.sort(key=lambda name: book.silos.get(name, {}).get("status") in ("late", "crashed", "refused"))
        return drawn[: self.config.sampled]

    # Measuring and telling.

    def _measures(self, done: int) -> bool:
        every = self.config.evaluate_every
        return done == self.config.rounds or (every > 0 and done % every == 0)

    def _metrics(self, progress: Progress, book: Book) -> dict[str, float]:
        """The global model on the server's rows; on clients' own rows into the book."""
        if self.config.evaluate_clients:
            own = Book()
            replies = self._exchange.ask(
                "evaluate",
                {name: {} for name in self._meet(progress, own)},
                book=own,
                round_=progress.done,
                header=self._about(progress),
                tensors=state_tensors(progress.state),
            )
            for name, reply in replies:
                if found := numbers(reply.header.get("metrics")):
                    book.of(name)["metrics"] = found
            for name, entry in own.silos.items():
                book.of(name)["bytes_up"] += entry["bytes_up"]
                book.of(name)["bytes_down"] += entry["bytes_down"]
        if self._judge is None:
            return {}
        for carried in progress.folds[self._judged_folds :]:
            self._judge.fold(carried)
        self._judged_folds = len(progress.folds)
        return numbers(self._judge.evaluate(progress.state))

    def _line(
        self,
        round_: int,
        metrics: Mapping[str, float],
        book: Book,
        gathered: Gathered | None,
        began: float,
        attempts: int,
    ) -> dict[str, Any]:
        silos = {
            name: {key: value for key, value in entry.items() if not key.startswith("_")}
            for name, entry in sorted(book.silos.items())
        }
        line: dict[str, Any] = {"round": round_, "silos": silos}
        line |= {"metrics": dict(metrics)} if metrics else {}
        line |= {"bytes_up": book.total("bytes_up"), "bytes_down": book.total("bytes_down")}
        line["seconds"] = round(time.monotonic() - began, 3)
        if gathered is not None:
            line |= {"facts": numbers(gathered.facts), "attempts": attempts}
            line |= {"drift": gathered.drift} if gathered.drift is not None else {}
            line |= {"failed_attempts": book.failures} if book.failures else {}
        return line


def _unfit(header: Mapping[str, Any], progress: Progress, layout: str) -> str | None:
    """Why a client cannot take part in the run; None if it can."""
    if header.get("base") != progress.base:
        return f"its base is {str(header.get('base'))[:12]}, the run's {progress.base[:12]}: give it the same model"
    try:
        same = layout_digest(layout_of(header.get("layout") or {})) == layout
    except MessageError as error:
        return str(error)
    if not same:
        return "another adapter: its tensors, method or options differ from the run's"
    return wrong_examples(header.get("examples"))


def _summed(totals: Mapping[str, float], line: Mapping[str, Any]) -> dict[str, float]:
    return {key: totals.get(key, 0) + line[key] for key in ("bytes_up", "bytes_down", "seconds")}


def _told(line: Mapping[str, Any], rounds: int) -> str:
    """One line about a round."""
    counted = Counter(entry.get("status", "ok") for entry in line["silos"].values())
    parts = [f"round {line['round']}/{rounds}", ", ".join(f"{count} {status}" for status, count in counted.items())]
    parts += [f"{key} {value:.4g}" for key, value in list(line.get("metrics", {}).items())[:3]]
    parts += [f"{key} {value:.3g}" for key, value in list(line.get("facts", {}).items())[:2]]
    up, down = line["bytes_up"] / 1e6, line["bytes_down"] / 1e6
    return "  ".join([*parts, f"{up:.1f} MB up, {down:.1f} MB down", f"{line['seconds']:.1f} s"])
