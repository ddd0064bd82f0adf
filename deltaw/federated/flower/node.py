"""A node's silo: the process with the model and the data, which outlives Flower's processes, behind a Unix socket."""

from __future__ import annotations

import contextlib
import threading
from multiprocessing.connection import Client, Listener
from types import TracebackType

from deltaw.core.errors import RunError
from deltaw.federated.transport import Factory, ProcessTransport, TransportFailure

_DONE, _FAILED = b"\0", b"\1"


class Silo:
    """Answers requests at a socket with a client that lives in a worker process, started anew when it dies.

    Args:
        name: of the client.
        client: makes it, in the worker.
        address: of the socket; its folder must be the user's alone, as whoever reaches it speaks to the client.
        threads: torch's, in the worker; None takes the machine's processors.
    """

    def __init__(self, name: str, client: Factory, address: str, *, threads: int | None = None) -> None:
        self._name = name
        self._workers = ProcessTransport({name: client}, threads=threads)
        self._listener = Listener(address, family="AF_UNIX")
        self._thread = threading.Thread(target=self._serve, name="silo", daemon=True)

    def __enter__(self) -> Silo:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listener.close()
        self._workers.close()

    def _serve(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                return
            # The asking process may be gone before its answer is there; the client has stored what it did.
            with connection, contextlib.suppress(OSError, EOFError):
                request = connection.recv_bytes()
                for _, answer in self._workers.exchange({self._name: request}, deadline_s=None):
                    failed = isinstance(answer, TransportFailure)
                    connection.send_bytes(_FAILED if failed else _DONE)
                    connection.send_bytes(answer.reason.encode() if isinstance(answer, TransportFailure) else answer)


def ask(address: str, request: bytes) -> bytes:
    """The reply of the silo at `address`.

    Raises:
        RunError: nobody is there, or the silo's process died.
    """
    try:
        with Client(address, family="AF_UNIX") as connection:
            connection.send_bytes(request)
            state, answer = connection.recv_bytes(), connection.recv_bytes()
    except (OSError, EOFError) as error:
        raise RunError(f"the silo's process does not answer ({type(error).__name__}): is the node ending?") from error
    if state != _DONE:
        raise RunError(f"the silo: {answer.decode(errors='replace')}")
    return answer
