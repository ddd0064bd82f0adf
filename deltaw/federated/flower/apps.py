"""The two ends of a Flower run: a transport for the server over the grid, and a client app that only passes bytes on.

The client app holds no model. Flower starts a process for every message; the silo (the base model, the data, the
client's store) lives in a process that stays (`node.Silo`), and the app hands it each request over a Unix socket.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from deltaw.core.errors import RunError
from deltaw.federated.transport import Transport, TransportFailure

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp

#: The node's configuration has the socket's path under this key.
SOCKET_KEY = "deltaw-socket"
#: Of a request without a deadline; Flower needs some end.
_NO_DEADLINE_S = 30 * 86400.0


class FlowerTransport:
    """deltaw's server over Flower's grid.

    A client's name is the one that its key was registered under at the SuperLink, not one that it gives itself. A
    payload of any size passes: Flower cuts it to objects of 5 MB, of which each must arrive within three minutes of
    the one before.

    Args:
        grid: of the `ServerApp`.
        poll_s: between looks for replies.
    """

    def __init__(self, grid: Grid, *, poll_s: float = 0.5) -> None:
        self._grid = grid
        self._poll_s = poll_s

    def _nodes(self) -> dict[str, int]:
        """Node ids of registered nodes that are connected, by name."""
        found: dict[str, int] = {}
        for node in self._grid.get_nodes():
            if node.name in found:
                raise RunError(f"two nodes are registered as {node.name!r}: expected one key a name")
            if node.name:
                found[node.name] = node.node_id
        return found

    def clients(self, *, wait_for: int, timeout_s: float) -> list[str]:
        """Names of the nodes that are connected, sorted; see `Transport`."""
        end = time.monotonic() + timeout_s
        while len(found := sorted(self._nodes())) < wait_for and time.monotonic() < end:
            time.sleep(self._poll_s)
        return found

    def exchange(
        self, requests: Mapping[str, bytes], *, deadline_s: float | None
    ) -> Iterator[tuple[str, bytes | TransportFailure]]:
        """See `Transport`. A request expires with its deadline, so that a node that comes back does not begin on it."""
        from flwr.app import Message, MessageType

        started = time.monotonic()
        limit_s = _NO_DEADLINE_S if deadline_s is None else deadline_s
        nodes = self._nodes()
        waiting: dict[str, str] = {}
        for name, request in requests.items():
            left = limit_s - (time.monotonic() - started)
            if name not in nodes or left <= 0:
                yield name, TransportFailure("not connected") if name not in nodes else _late(deadline_s)
                continue
            message = Message(to_content(request), nodes[name], MessageType.QUERY, ttl=left)
            sent = [number for number in self._grid.push_messages([message]) if number]
            if sent:
                waiting[sent[0]] = name
            else:
                yield name, TransportFailure("the SuperLink did not take the message")
        while waiting:
            for reply in self._grid.pull_messages(list(waiting)):
                name = waiting.pop(reply.metadata.reply_to_message_id)
                out_of_time = time.monotonic() - started >= limit_s
                yield name, _late(deadline_s) if out_of_time else _answer(reply)
            if not waiting or time.monotonic() - started >= limit_s:
                break
            time.sleep(min(self._poll_s, max(0.0, limit_s - (time.monotonic() - started))))
        for name in waiting.values():
            yield name, _late(deadline_s)

    def close(self) -> None:
        """Nothing to end: nodes stay connected for the next run."""


def _answer(reply: Message) -> bytes | TransportFailure:
    if reply.has_error():
        reason = " ".join((reply.error.reason or "no reason given").split())[:300]
        return TransportFailure(f"{reason} (Flower's error {reply.error.code})")
    try:
        return from_content(reply.content)
    except (KeyError, TypeError, AttributeError):
        return TransportFailure("its reply is not of deltaw's app")


def _late(deadline_s: float | None) -> TransportFailure:
    return TransportFailure(f"no reply within {deadline_s:g} s" if deadline_s is not None else "no reply", late=True)


def to_content(data: bytes) -> RecordDict:
    """Bytes as a message's content: an array, since Flower cuts arrays, and only them, into objects of 5 MB."""
    from flwr.app import Array, ArrayRecord, RecordDict

    return RecordDict({"deltaw": ArrayRecord({"bytes": Array("uint8", (len(data),), "bytes", data)})})


def from_content(content: RecordDict) -> bytes:
    """The bytes of `to_content`.

    Raises:
        KeyError, TypeError: another app's content.
    """
    data = content.array_records["deltaw"]["bytes"].data
    if not isinstance(data, bytes):
        raise TypeError(f"{type(data).__name__}: expected bytes")
    return data


def make_server_app(run: Callable[[Transport, Mapping[str, Any]], object]) -> ServerApp:
    """A `ServerApp` that calls `run(transport, options)`; `options` are what `launch.start_run` was given."""
    from flwr.app import Context
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        transport = FlowerTransport(grid)
        try:
            run(transport, json.loads(str(context.run_config["options"])))
        finally:
            transport.close()

    return app


def make_client_app() -> ClientApp:
    """A `ClientApp` that hands each request to the node's silo and returns its reply."""
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp

    from deltaw.federated.flower.node import ask

    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        reply = ask(str(context.node_config[SOCKET_KEY]), from_content(message.content))
        return Message(to_content(reply), reply_to=message)

    return app
