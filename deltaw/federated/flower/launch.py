"""Runs Flower's processes in the foreground: the SuperLink, a bank's SuperNode, and a run over them.

Everything that flwr would send or fetch by itself is off (telemetry, update checks, installing what an app asks for),
and its home folder is one of ours. Processes stand in sessions of their own and are ended by their ids.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.core.errors import InputError, RunError, unknown_name
from deltaw.federated.flower import require_flower
from deltaw.federated.transport import Factory

if TYPE_CHECKING:
    from flwr.supercore.control import ControlHttpClient

#: The SuperLink's port where none is given.
PORT = 9092
_START_S, _END_S = 60.0, 10.0
Say = Callable[[str], None]
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


_WORDS: dict[type, str] = {str: "text", int: "a whole number", dict: "a mapping"}
#: Keys of a YAML file for each of the two processes, with their types; `silo` is for the client's factory.
_KEYS: dict[str, dict[str, type]] = {
    "superlink": {"credentials": str, "state": str, "host": str, "port": int},
    "supernode": {"name": str, "superlink": str, "credentials": str, "state": str, "threads": int, "silo": dict},
}


def read_deployment(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """The keys of a `superlink`'s or `supernode`'s YAML file: the arguments of `run_superlink` or `run_supernode`.

    A node's `silo` is a mapping for the client's factory: what the bank trains on and with.

    Raises:
        InputError: no such file, an unknown key (with near ones), a value of another type, a key missing.
    """
    from deltaw.train.config import read_yaml

    keys = read_yaml(Path(path))
    known = _KEYS[kind]
    for name, value in keys.items():
        if name not in known:
            raise unknown_name(f"key of a {kind}'s file", str(name), known)
        if not isinstance(value, known[name]) or isinstance(value, bool):
            raise InputError(f"{path}: {name} is {value!r}: expected {_WORDS[known[name]]}")
    needed = [name for name in known if name not in ("host", "port", "threads")]
    if missing := [name for name in needed if name not in keys]:
        raise InputError(f"{path} lacks {', '.join(missing)}: a {kind} needs {', '.join(needed)}")
    return keys


def environment(home: Path) -> dict[str, str]:
    """What flwr's processes run with: nothing sent home, nothing installed, `home` for its files."""
    return {
        **os.environ,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOG_LEVEL": os.environ.get("FLWR_LOG_LEVEL", "WARNING"),
        "FLWR_HOME": os.fspath(home),
        # flwr starts its own commands by name; they stand beside this interpreter.
        "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", os.defpath),
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
    }


def run_superlink(
    *,
    credentials: str | os.PathLike[str],
    state: str | os.PathLike[str],
    host: str = "0.0.0.0",
    port: int = PORT,
    say: Say = print,
    stop: threading.Event | None = None,
) -> None:
    """Runs a SuperLink with TLS until it is ended by Ctrl-C or SIGTERM; admits the nodes of `credentials/nodes/`.

    Args:
        credentials: the server's folder of `make_credentials`.
        state: a folder for its database, log and Flower's files; a SuperLink that is started again goes on from it.
        host: of the interface that it listens on; every one of them by default.
        port: where nodes and the operator reach it.
        say: gets lines for the user.
        stop: ends it when set, where there is no Ctrl-C.

    Raises:
        InputError: credentials are missing, or the port is taken.
        RunError: it did not start, or ended by itself.
    """
    require_flower()
    folder, home = Path(credentials).absolute(), _private_folder(state)
    nodes = sorted((folder / "nodes").glob("*.pub"))
    needed = [folder / name for name in ("ca.pem", "server.pem", "server.key", "operator.token")]
    _check_files(needed)
    if not nodes:
        raise InputError(f"{folder / 'nodes'} holds no node's NAME.pub: put those in that may join")
    _check_port(host, port)
    with tempfile.TemporaryDirectory(prefix="deltaw-") as private, _Children(stop) as children:
        secret = _secret(Path(private))
        tls = ["--ssl-ca-certfile", needed[0], "--ssl-certfile", needed[1], "--ssl-keyfile", needed[2]]
        place = ["--host", host, "--port", port, "--database", home / "superlink.db"]
        alone = ["--isolation", "process", "--superexec-auth-secret-file", secret, "--enable-supernode-auth"]
        alone += ["--disable-runtime-dependency-installation"]
        link = children.start("superlink", [*_guarded("superlink", needed[3]), *tls, *place, *alone], home)
        here = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        here = here.replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:")
        with _operator(here, folder) as control:
            _wait(lambda: control.ListNodes(_request("ListNodes")), children, f"the SuperLink at {here}")
            _admit(control, nodes, say)
        children.start("superexec", [*_executor(here, secret, link.pid), "--root-certificates", needed[0]], home)
        say(f"SuperLink at {host}:{port}, nodes: {', '.join(path.stem for path in nodes)}")
        children.wait()


def run_supernode(
    *,
    name: str,
    superlink: str,
    credentials: str | os.PathLike[str],
    state: str | os.PathLike[str],
    client: Factory,
    server: str,
    threads: int | None = None,
    say: Say = print,
    stop: threading.Event | None = None,
) -> None:
    """Runs a bank's node until it is ended by Ctrl-C or SIGTERM: its silo's process, and a SuperNode that relays to it.

    The node calls the SuperLink and is called by nobody: it needs no open port.

    Args:
        name: the client's.
        superlink: `host:port`, a name that the server's certificate has.
        credentials: the node's folder of `make_credentials`.
        state: a folder for Flower's files.
        client: makes the client, in the silo's process; its store is its own business.
        server: the server's function, as `start_run` is given it: only this app is run.
        threads: torch's, in the silo.
        say: gets lines for the user.
        stop: ends it when set, where there is no Ctrl-C.

    Raises:
        InputError: credentials are missing.
        RunError: the SuperLink does not know the node's key, or a process ended by itself.
    """
    from deltaw.federated.flower.apps import SOCKET_KEY
    from deltaw.federated.flower.guard import app_bundle
    from deltaw.federated.flower.node import Silo

    require_flower()
    folder, home = Path(credentials).absolute(), _private_folder(state)
    _check_files([folder / "ca.pem", folder / "node.key"])
    host, port = "127.0.0.1", _free_port()
    with tempfile.TemporaryDirectory(prefix="deltaw-") as private, contextlib.ExitStack() as open_:
        secret, address, bundle = _secret(Path(private)), Path(private) / "silo", Path(private) / "app.fab"
        bundle.write_bytes(app_bundle(server))
        open_.enter_context(Silo(name, client, os.fspath(address), threads=threads))
        children = open_.enter_context(_Children(stop))
        known = ["--superlink", superlink, "--root-certificates", folder / "ca.pem"]
        known += ["--auth-supernode-private-key", folder / "node.key"]
        place = ["--host", host, "--port", port, "--node-config", f"{SOCKET_KEY}={json.dumps(os.fspath(address))}"]
        alone = ["--isolation", "process", "--superexec-auth-secret-file", secret]
        node = children.start("supernode", [*_guarded("supernode", bundle), *known, *place, *alone], home)
        children.start("superexec", [*_executor(f"{host}:{port}", secret, node.pid), "--insecure"], home)
        say(f"node {name} calls {superlink}")
        children.wait()


def start_run(
    *,
    superlink: str,
    credentials: str | os.PathLike[str],
    server: str,
    options: Mapping[str, Any],
    say: Say = print,
) -> None:
    """Starts a run on a SuperLink and waits for its end, with its log; ended by Ctrl-C it stops the run.

    Args:
        superlink: `host:port`.
        credentials: a folder with `ca.pem` and `operator.token` (the server's of `make_credentials`).
        server: `package.module:function`, called in the server's process as `function(transport, options)`.
        options: JSON-able; nodes see them too, so no secrets.
        say: gets the log's lines.

    Raises:
        InputError: credentials are missing, or nobody answers there.
        RunError: the run failed; with its reason.
    """
    from flwr.common.serde import fab_to_proto, user_config_to_proto
    from flwr.supercore.fab import Fab

    from deltaw.federated.flower.guard import app_bundle

    require_flower()
    folder = Path(credentials).absolute()
    _check_files([folder / "ca.pem", folder / "operator.token"])
    fab = fab_to_proto(Fab("", app_bundle(server), {}))
    given = user_config_to_proto({"options": json.dumps(dict(options))})
    with _operator(superlink, folder) as control, _ended_by_signals():
        run = _call(superlink, lambda: control.StartRun(_request("StartRun", fab=fab, override_config=given))).run_id
        if not run:
            raise RunError(f"the SuperLink at {superlink} did not take the run: see its log")
        # A traceback is held back until it is clear whether the error tells by itself what there is to do.
        traceback: list[str] = []
        try:
            for part in control.StreamLogs(_request("StreamLogs", run_id=run, after_timestamp=0.0)):
                for line in part.log_output.splitlines():
                    if traceback or "ServerApp raised an exception" in line:
                        traceback.append(line)
                    else:
                        say(line)
        except KeyboardInterrupt:
            control.StopRun(_request("StopRun", run_id=run))
            raise
        status = control.ListRuns(_request("ListRuns", run_id=run)).run_dict[run].status
    if status.sub_status != "completed":
        if not any(line.startswith("deltaw.") for line in traceback):
            for line in traceback:
                say(line)
        reason = " ".join(status.details.split()).removeprefix("ServerApp failed with exception: ")
        raise RunError(f"the run is {status.sub_status or status.status}: {reason or 'no reason given'}")


def _admit(control: ControlHttpClient, keys: Sequence[Path], say: Say) -> None:
    """Makes the registered nodes those of `keys`, under their files' names."""
    from flwr.cli.supernode.register import try_load_public_key

    wanted = {try_load_public_key(path): path.stem for path in keys}
    if len(wanted) < len(keys):
        raise InputError(f"two of {', '.join(path.name for path in keys)} hold one key: expected one a node")
    there = {}
    for node in control.ListNodes(_request("ListNodes")).nodes_info:
        if node.status == "unregistered":
            continue
        if wanted.get(node.public_key) == node.name:
            there[node.public_key] = node.node_id
        else:
            control.UnregisterNode(_request("UnregisterNode", node_id=node.node_id))
            say(f"node {node.name or node.node_id} is no longer admitted")
    for key, name in wanted.items():
        if key not in there:
            control.RegisterNode(_request("RegisterNode", public_key=key, name=name))


class _Children:
    """Processes that end together: when one does, which is an error, or by Ctrl-C, SIGTERM or `stop`, which is none."""

    def __init__(self, stop: threading.Event | None) -> None:
        self._stop = stop
        self._running: list[tuple[str, subprocess.Popen[bytes], Path, int]] = []
        self._signals = contextlib.ExitStack()

    def start(self, what: str, words: Iterable[object], home: Path) -> subprocess.Popen[bytes]:
        """Starts one; what it writes is appended to `home/flwr.log`."""
        log = home / "flwr.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                [str(word) for word in words],
                env=environment(home),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running.append((what, process, log, log.stat().st_size))
        return process

    def check(self) -> None:
        """Raises when one has ended."""
        if self._stop is not None and self._stop.is_set():
            raise KeyboardInterrupt
        for what, process, log, start in self._running:
            if process.poll() is not None:
                hint = "; is this node's node.pub still admitted at the SuperLink?" if what == "supernode" else ""
                raise RunError(f"flwr's {what} ended by itself: {_last_words(log, start)} (log: {log}){hint}")

    def wait(self) -> None:
        """Until one ends, or it is ended."""
        while True:
            self.check()
            time.sleep(0.2)

    def __enter__(self) -> _Children:
        self._signals.enter_context(_ended_by_signals())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        # By group, as superexec's own children outlive it for a while.
        started = [process for _, process, _, _ in reversed(self._running)]
        try:
            for process in started:
                _signal_group(process, signal.SIGTERM)
            end = time.monotonic() + _END_S
            for process in started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, end - time.monotonic()))
        finally:
            for process in started:
                _signal_group(process, signal.SIGKILL)
                process.wait()
            self._signals.close()
        return kind is KeyboardInterrupt


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """To the process and those that it started; its session is one of ours."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _last_words(log: Path, start: int) -> str:
    """What flwr gave as the reason: its last error, else its last lines."""
    said = _ANSI.sub("", log.read_bytes()[start:].decode(errors="replace"))
    lines = [line.strip() for line in said.splitlines() if line.strip() and "For more information" not in line]
    errors = [place for place, line in enumerate(lines) if line.startswith("ERROR")]
    if errors:
        after = lines[errors[-1] + 1 :]
        lines = [lines[errors[-1]], *itertools.takewhile(lambda line: not line.startswith(("INFO", "WARNING")), after)]
    return " ".join(" ".join(lines[-6:]).split())[:400] or "it said nothing"


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM is Ctrl-C inside the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _guarded(command: str, file: Path) -> list[object]:
    return [sys.executable, "-m", "deltaw.federated.flower.guard", command, os.getpid(), file]


def _executor(address: str, secret: Path, parent: int) -> list[object]:
    program = shutil.which("flower-superexec", path=environment(secret.parent)["PATH"])
    if program is None:
        raise RunError("flwr's command flower-superexec is not beside this Python: install 'deltaw[federated]' again")
    own = ["--runtime-api-address", address, "--superexec-auth-secret-file", secret, "--parent-pid", parent]
    return [program, *own]


@contextlib.contextmanager
def _operator(address: str, folder: Path) -> Iterator[ControlHttpClient]:
    """A client of the operator's API that has the token."""
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    token = (folder / "operator.token").read_text(encoding="ascii").strip()

    class Bearer:
        def intercept(self, context: Any, call_next: Any) -> Any:
            context.request.headers["authorization"] = f"Bearer {token}"
            return call_next(context)

    made = ControlHttpClient.from_server_address(
        server_address=address,
        insecure=False,
        root_certificates=(folder / "ca.pem").read_bytes(),
        interceptors=[Bearer(), RuntimeVersionHttpInterceptor(component_name="deltaw")],
    )
    with made:
        yield made


def _request(message: str, /, **fields: Any) -> Any:
    from flwr.proto import control_pb2

    return getattr(control_pb2, f"{message}Request")(**fields)


def _call(address: str, call: Callable[[], Any]) -> Any:
    import httpx

    try:
        return call()
    except httpx.HTTPStatusError as error:
        said = " ".join(error.response.text.split())[:300]
        raise RunError(f"the SuperLink at {address} answered {error.response.status_code}: {said}") from None
    except (httpx.TransportError, ssl.SSLError) as error:
        raise InputError(
            f"nobody answers as the SuperLink at {address} ({error}): is it up, is ca.pem its own?"
        ) from None


def _wait(call: Callable[[], Any], children: _Children, what: str) -> None:
    import httpx

    end = time.monotonic() + _START_S
    while True:
        children.check()
        try:
            call()
            return
        except httpx.TransportError as error:
            if time.monotonic() > end:
                raise RunError(f"{what} does not answer after {_START_S:g} s: {error}") from None
            time.sleep(0.1)


def _private_folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path).absolute()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _secret(folder: Path) -> Path:
    file = folder / "secret"
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(secrets.token_bytes(32))
    return file


def _check_files(files: Iterable[Path]) -> None:
    if missing := [os.fspath(file) for file in files if not file.is_file()]:
        raise InputError(f"no {', '.join(missing)}: give the folder of credentials that was made for this party")


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"cannot listen at {host}:{port} ({error.strerror}): choose another port") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
