"""flwr's own commands with two doors closed that version 1.41 leaves open. Run as `python -m`; `launch` does.

*SuperLink.* One port serves the nodes' API, the operator's (register a node, start a run) and that of the server's
process; only the first asks who calls. Here the operator's API wants a bearer token, and everything that is neither of
the two is answered to this machine alone (the server's process also needs the secret that `launch` draws).

*SuperNode.* A node runs whatever app the SuperLink hands it. Here it runs deltaw's app and no other, compared file by
file with the one that this installation would have sent; what it then does is in this installation's code.
"""

from __future__ import annotations

import contextlib
import hmac
import importlib
import io
import ipaddress
import sys
import time
import warnings
import zipfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from deltaw import __version__
from deltaw.core.errors import RunError
from deltaw.federated.flower import require_flower

#: Between a node's looks for messages.
_POLL_S = 1.0
_NODES, _OPERATOR = "/v1/fleet/", "/v1/control/"
_PROJECT = """\
[project]
name = "deltaw-federation"
version = "{version}"
description = "deltaw's protocol over Flower"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "deltaw"

[tool.flwr.app.components]
serverapp = "deltaw_server_app:app"
clientapp = "deltaw_client_app:app"

[tool.flwr.app.config]
options = ""
"""
_SERVER = """\
from deltaw.federated.flower.apps import make_server_app
from {module} import {function}

app = make_server_app({function})
"""
_CLIENT = """\
from deltaw.federated.flower.apps import make_client_app

app = make_client_app()
"""


def app_bundle(server: str) -> bytes:
    """Flower's bundle of deltaw's app: two files of imports, no dependencies.

    Args:
        server: `package.module:function`, called on the server as `function(transport, options)`.
    """
    from flwr.cli.build import build_fab_from_files

    module, _, function = server.partition(":")
    files = {
        "pyproject.toml": _PROJECT.format(version=__version__).encode(),
        "deltaw_server_app.py": _SERVER.format(module=module, function=function).encode(),
        "deltaw_client_app.py": _CLIENT.encode(),
    }
    with warnings.catch_warnings():
        # flwr 1.41 names a pattern style that newer pathspec deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        return build_fab_from_files(files)[0]


def same_app(one: bytes, other: bytes) -> bool:
    """Whether two bundles hold the same files; their own bytes depend on the compressor's version."""

    def files(bundle: bytes) -> list[tuple[str, bytes]]:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
            return sorted((name, archive.read(name)) for name in archive.namelist())

    try:
        return files(one) == files(other)
    except (zipfile.BadZipFile, OSError, RuntimeError):
        return False


Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Gate:
    """ASGI middleware: nodes to the nodes' API, the operator with the token, this machine to the rest.

    Args:
        app: what stands behind.
        token: the operator's.
    """

    def __init__(self, app: Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]], token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request: passed on, or answered with 403."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and self._open(scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            head = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 403, "headers": head})
            await send({"type": "http.response.body", "body": b"not for this caller"})

    def _open(self, scope: MutableMapping[str, Any]) -> bool:
        path = scope["path"]
        if path.startswith(_NODES):
            return True
        if path.startswith(_OPERATOR):
            given = [value for key, value in scope["headers"] if key == b"authorization"]
            return len(given) == 1 and hmac.compare_digest(given[0], self._expected)
        caller = scope.get("client")
        return caller is not None and ipaddress.ip_address(caller[0]).is_loopback


def superlink(token_file: str) -> None:
    """`flower-superlink` behind `Gate`."""
    from flwr.superlink import extensions
    from flwr.superlink.cli.flower_superlink import flower_superlink
    from starlette.middleware import Middleware

    token = Path(token_file).read_text(encoding="ascii").strip()
    before = extensions.get_middleware()
    extensions.get_middleware = lambda: (Middleware(Gate, token=token), *before)
    flower_superlink()


def supernode(bundle_file: str) -> None:
    """`flower-supernode` that runs the app in `bundle_file` only."""
    from flwr.supercore import log
    from flwr.supercore.run import RunNotRunningException

    inside = importlib.import_module("flwr.supernode.start_client_internal")
    expected = Path(bundle_file).read_bytes()
    connect = inside._init_connection

    @contextlib.contextmanager
    def guarded(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, ...]]:
        with connect(*args, **kwargs) as connection:
            get_bundle = connection[4]

            def own_only(digest: str, run: int) -> Any:
                found = get_bundle(digest, run)
                if not same_app(found.content, expected):
                    log(40, "REFUSED run %s: its app is not that of deltaw %s on this node", run, __version__)
                    # The one exception after which the node drops the message and goes on.
                    raise RunNotRunningException
                return found

            yield (*connection[:4], own_only, *connection[5:])

    inside._init_connection = guarded  # type: ignore[attr-defined]
    # Flower looks for messages every 3 s, which each of a round's would wait for: five of them in a secure round.
    inside.time = SimpleNamespace(sleep=lambda s: time.sleep(min(s, _POLL_S)))  # type: ignore[attr-defined]
    from flwr.supernode.cli.flower_supernode import flower_supernode

    flower_supernode()


def main() -> None:
    """`superlink|supernode PARENT FILE flwr's own arguments...`; ends with the process PARENT."""
    from flwr.supercore.app_utils import start_parent_process_monitor

    command, parent, file = sys.argv[1:4]
    require_flower()
    start_parent_process_monitor(int(parent))
    sys.argv = [f"flower-{command}", *sys.argv[4:]]
    {"superlink": superlink, "supernode": supernode}[command](file)


if __name__ == "__main__":
    try:
        main()
    except (RunError, OSError) as error:
        sys.exit(f"deltaw: {error}")
