"""How requests reach clients and replies come back: bytes both ways, and nothing of what they say.

A transport knows names, bytes and time. `LocalTransport` calls clients in this process, `ProcessTransport` keeps them
in worker processes; a deployment over a network implements the same three functions.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Protocol

from deltaw.core.errors import InputError

_ANSWERED, _FAILED = b"answered", b"failed"


@dataclass(frozen=True)
class TransportFailure:
    """A client that gave no reply.

    Attributes:
        reason: one line for the log.
        late: whether its time was up; else it crashed, or could not be reached.
    """

    reason: str
    late: bool = False


class Handler(Protocol):
    """What stands at the other end: `deltaw.federated.client.Client` in every real run."""

    def handle(self, request: bytes) -> bytes:
        """The reply to a request."""


class Transport(Protocol):
    """What the server needs of a network."""

    def clients(self, *, wait_for: int, timeout_s: float) -> list[str]:
        """Names of those that are there, sorted, after waiting until at least `wait_for` are or the time is up."""

    def exchange(
        self, requests: Mapping[str, bytes], *, deadline_s: float | None
    ) -> Iterator[tuple[str, bytes | TransportFailure]]:
        """Sends each client its request; yields (name, reply or failure) as they come, each name once.

        Ends when every client has answered or failed. Those that are not through `deadline_s` after the call fail as
        late; None waits for ever. A reply that comes after its deadline is dropped.
        """

    def close(self) -> None:
        """Ends what the transport began."""


class LocalTransport:
    """Clients in this process, one after another.

    A deadline is looked at between clients only: the one that is working when it passes is waited for and then fails
    as late, and those after it are not asked. For deadlines that hold, take `ProcessTransport`.

    Args:
        handlers: clients by name.
    """

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = dict(handlers)

    def clients(self, *, wait_for: int, timeout_s: float) -> list[str]:
        """All names: there is nobody to wait for."""
        return sorted(self._handlers)

    def exchange(
        self, requests: Mapping[str, bytes], *, deadline_s: float | None
    ) -> Iterator[tuple[str, bytes | TransportFailure]]:
        """See `Transport`. What a client raises, other than Ctrl-C, is its crash."""
        end = _end(deadline_s)
        for name, request in requests.items():
            if time.monotonic() > end:
                yield name, _late(deadline_s)
                continue
            answer: bytes | TransportFailure
            try:
                answer = self._handlers[name].handle(request)
            except Exception as error:
                answer = TransportFailure(f"crashed: {_one_line(error)}")
            yield name, answer if time.monotonic() <= end else _late(deadline_s)

    def close(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True)
class Factory:
    """How a worker process makes a client: a function by its module path, and plain values for it.

    Attributes:
        path: `package.module:function`, called as `function(name, **options)`; gives an object with `handle`.
        options: JSON-able.
    """

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, name: str) -> Handler:
        """The client of that name."""
        module, _, function = self.path.partition(":")
        made: Handler = getattr(importlib.import_module(module), function)(name, **self.options)
        return made


class ProcessTransport:
    """Clients in worker processes that live as long as the transport; deadlines hold.

    Each worker is a fresh interpreter with one client, or a group of them that it serves one after another. A worker
    that dies fails the client it was working for, and is started anew for the next request. One that is still at an
    old request is left to finish it (a client stores its result, and gives it when it is asked again); when a
    further deadline passes without its coming back, it is ended.

    Args:
        factories: by client's name.
        workers: how many processes; None means one for each client.
        threads: torch's threads a worker; None divides the machine's processors among workers.

    Raises:
        InputError: no clients, or fewer than one worker.
    """

    def __init__(
        self, factories: Mapping[str, Factory], *, workers: int | None = None, threads: int | None = None
    ) -> None:
        if not factories or (workers is not None and workers < 1):
            raise InputError(f"{len(factories)} clients in {workers} workers: expected at least one of each")
        names = sorted(factories)
        count = min(len(names), workers or len(names))
        threads = threads or max(1, (os.cpu_count() or 1) // count)
        self._workers = [
            _Worker({name: factories[name] for name in names[start::count]}, threads) for start in range(count)
        ]
        self._of = {name: worker for worker in self._workers for name in worker.factories}

    def clients(self, *, wait_for: int, timeout_s: float) -> list[str]:
        """All names: a worker that is not there yet is started by its first request."""
        return sorted(self._of)

    def pids(self) -> dict[str, int]:
        """By client's name the process that serves it, of those that run."""
        return {name: worker.pid for name, worker in self._of.items() if worker.pid is not None}

    def exchange(
        self, requests: Mapping[str, bytes], *, deadline_s: float | None
    ) -> Iterator[tuple[str, bytes | TransportFailure]]:
        """See `Transport`."""
        end = _end(deadline_s)
        for worker in self._workers:
            worker.waiting = deque((name, requests[name]) for name in requests if self._of[name] is worker)
            worker.late_since = worker.busy
        open_ = [worker for worker in self._workers if worker.waiting]
        try:
            while open_:
                for worker in open_:
                    yield from worker.advance()
                open_ = [worker for worker in open_ if worker.waiting or worker.asked]
                left = end - time.monotonic()
                if not open_ or left <= 0:
                    break
                wait([worker.pipe for worker in open_ if worker.pipe is not None], min(left, 3600.0))
            for worker in open_:
                yield from worker.give_up(_late(deadline_s))
        finally:
            for worker in open_:
                list(worker.give_up(_late(deadline_s)))

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            worker.end()


class _Worker:
    """One process and what it is at. `asked`: the client whose reply this exchange waits for."""

    def __init__(self, factories: Mapping[str, Factory], threads: int) -> None:
        self.factories = dict(factories)
        self.threads = threads
        self.process: subprocess.Popen[bytes] | None = None
        self.pipe: Connection | None = None
        self.waiting: deque[tuple[str, bytes]] = deque()
        self.asked: str | None = None
        self.busy = False  # with a request of this or an earlier exchange
        self.late_since = False  # busy with an earlier one when this exchange began

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None and self.process.poll() is None else None

    def advance(self) -> Iterator[tuple[str, bytes | TransportFailure]]:
        """Takes a reply that is there, and hands over the next request."""
        if self.busy and self.pipe is not None and self.pipe.poll():
            reply: bytes | TransportFailure
            try:
                failed, reply = self.pipe.recv_bytes() == _FAILED, self.pipe.recv_bytes()
                if failed:
                    reply = TransportFailure(reply.decode(errors="replace"))
            except (EOFError, OSError):
                reply = TransportFailure(f"its process ended ({self.end()})")
            self.busy, self.late_since, asked, self.asked = False, False, self.asked, None
            if asked is not None:
                yield asked, reply
        if not self.busy and self.waiting:
            name, request = self.waiting.popleft()
            try:
                self._start()
                assert self.pipe is not None
                self.pipe.send_bytes(name.encode())
                self.pipe.send_bytes(request)
                self.busy, self.asked = True, name
            except OSError as error:
                self.end()
                yield name, TransportFailure(f"its process cannot be reached: {_one_line(error)}")

    def give_up(self, failure: TransportFailure) -> Iterator[tuple[str, TransportFailure]]:
        """Fails what this exchange still waits for, and ends a process that has been at an older request throughout."""
        names = [*([self.asked] if self.asked is not None else []), *(name for name, _ in self.waiting)]
        self.asked = None
        self.waiting.clear()
        if names and self.late_since:
            self.end()
        for name in names:
            yield name, failure

    def _start(self) -> None:
        if self.pid is not None:
            return
        self.end()
        ours, theirs = Pipe(duplex=True)
        paths = os.pathsep.join([entry or os.getcwd() for entry in sys.path])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(self.threads)}
        code = f"from deltaw.federated.transport import _work; _work({theirs.fileno()}, {os.getpid()})"
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
            )
        self.pipe = ours
        told = {name: [factory.path, dict(factory.options)] for name, factory in self.factories.items()}
        ours.send_bytes(json.dumps(told).encode())

    def end(self) -> str:
        """Ends the process if there is one; says how it ended."""
        said = "it was never started"
        self.busy = self.late_since = False
        if self.pipe is not None:
            self.pipe.close()
            self.pipe = None
        if self.process is not None:
            # A process whose end of the pipe is gone is on its way out; one at work does not look at it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=0.2)
            if self.process.poll() is None:
                self.process.kill()
            code = self.process.wait()
            said = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            self.process = None
        return said


def _work(descriptor: int, parent: int) -> None:
    """A worker's whole life: makes clients when they are first asked, answers until the pipe closes."""
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    pipe = Connection(descriptor)
    made: dict[str, Handler] = {}
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        factories = {name: Factory(*told) for name, told in json.loads(pipe.recv_bytes()).items()}
        while True:
            name, request = pipe.recv_bytes().decode(), pipe.recv_bytes()
            try:
                if name not in made:
                    made[name] = factories[name].make(name)
                status, reply = _ANSWERED, made[name].handle(request)
            except Exception as error:
                status, reply = _FAILED, f"crashed: {_one_line(error)}".encode()
            pipe.send_bytes(status)
            pipe.send_bytes(reply)


def _leave_with(parent: int) -> None:
    """Ends this process with its parent, in the midst of a training too."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _end(deadline_s: float | None) -> float:
    return float("inf") if deadline_s is None else time.monotonic() + deadline_s


def _late(deadline_s: float | None) -> TransportFailure:
    return TransportFailure(f"no reply within {deadline_s:g} s" if deadline_s is not None else "given up", late=True)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
