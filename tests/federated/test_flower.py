"""Flower: credentials, the doors that `guard` closes, the transport, the silo, and a whole run over loopback."""

import asyncio
import datetime
import importlib
import os
import shutil
import ssl
import stat
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import flower_parts
import flwr.app
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.torch import load_file

from deltaw.core.errors import InputError, MissingExtraError, RunError
from deltaw.federated.flower import apps, credentials, guard, launch, require_flower
from deltaw.federated.flower.node import Silo, ask
from deltaw.federated.secure.keys import IdentityKey, read_roster
from deltaw.federated.transport import Factory, LocalTransport, TransportFailure

BANKS = ["bank-a", "bank-b", "bank-c"]


# Credentials


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("credentials")
    return folder, credentials.make_credentials(folder, server_names=["fed.example.org", "10.1.2.3"], nodes=BANKS)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_private_files_are_their_owners_alone_and_stand_once(made):
    folder, rows = made
    files = contents(folder)
    assert sorted(files) == sorted({str(row.path.relative_to(folder)) for row in rows})
    private = {str(row.path.relative_to(folder)) for row in rows if row.private}
    expected = {"authority/ca.key", "server/server.key", "server/operator.token"}
    assert private == expected | {f"{bank}/{key}" for bank in BANKS for key in ("node.key", "identity.key")}
    for name, data in files.items():
        assert (b"PRIVATE KEY" in data or name.endswith(".token")) == (name in private)
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600 or name not in private
    assert len({files[name] for name in private}) == len(private)
    for row in rows:
        assert row.path.relative_to(folder).parts[0] == row.holder


def test_the_servers_certificate_is_signed_and_names_the_server(made):
    folder, rows = made
    authority = x509.load_pem_x509_certificate((folder / "authority/ca.pem").read_bytes())
    server = x509.load_pem_x509_certificate((folder / "server/server.pem").read_bytes())
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "fed.example.org"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["127.0.0.1", "::1", "10.1.2.3"]
    key = serialization.load_pem_private_key((folder / "server/server.key").read_bytes(), None)
    assert key.public_key() == server.public_key()
    expires = datetime.date.today() + datetime.timedelta(days=730)
    stated = {row.expires for row in rows if row.expires}
    assert all(abs((day - expires).days) <= 1 for day in stated) and str(stated.pop()) in credentials.table(rows)


def test_a_nodes_keys_are_what_flower_and_the_peers_read(made):
    folder, _ = made
    for bank in BANKS:
        key = serialization.load_ssh_private_key((folder / bank / "node.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        listed = serialization.load_ssh_public_key((folder / f"server/nodes/{bank}.pub").read_bytes())
        assert listed == key.public_key()
        roster = read_roster(folder / bank / "peers.txt")
        assert roster == {peer: IdentityKey.load(folder / peer / "identity.key").public for peer in BANKS}


def test_what_is_there_is_never_written_over(made, tmp_path):
    folder, _ = made
    before = contents(folder)
    rows = credentials.make_credentials(folder, server_names=["fed.example.org"], nodes=BANKS)
    assert contents(folder) == before and not any(row.made for row in rows if row.private)
    with pytest.raises(InputError, match=r"is not for elsewhere\.org"):
        credentials.make_credentials(folder, server_names=["elsewhere.org"], nodes=BANKS)


def test_a_node_may_make_its_own_keys_and_join_later(tmp_path):
    folder = tmp_path / "all"
    credentials.make_credentials(folder, nodes=["bank-a"])
    own = {row.path.name for row in credentials.make_node_credentials(tmp_path / "own", name="bank-b")}
    assert own == {"node.key", "node.pub", "identity.key", "identity.pub"}
    before = contents(folder)
    # The authority's key is offline by now.
    (folder / "authority/ca.key").unlink()
    credentials.make_credentials(folder, nodes=["bank-b"])
    after = contents(folder)
    assert {name for name in before if name in after and before[name] != after[name]} == {
        "bank-a/peers.txt",
        "server/peers.txt",
    }
    assert set(read_roster(folder / "bank-a/peers.txt")) == {"bank-a", "bank-b"}


@pytest.mark.parametrize("nodes", [[], ["a", "a"], ["server"], ["../x"], [""]])
def test_names_that_cannot_be_folders_are_refused(nodes, tmp_path):
    with pytest.raises(InputError):
        credentials.make_credentials(tmp_path, nodes=nodes)
    assert not any(tmp_path.iterdir())


# What guard closes


async def status(scope):
    sent = []

    async def app(scope, receive, send):
        sent.append({"status": 200})

    async def send(message):
        sent.append(message)

    await guard.Gate(app, token="secret")({"type": "http", **scope}, None, send)
    return sent[0]["status"]


@pytest.mark.parametrize(
    ("path", "caller", "header", "expected"),
    [
        ("/v1/fleet/pull-messages", "10.0.0.9", b"", 200),
        ("/v1/control/register-node", "10.0.0.9", b"", 403),
        ("/v1/control/register-node", "127.0.0.1", b"", 403),
        ("/v1/control/start-run", "127.0.0.1", b"Bearer secre", 403),
        ("/v1/control/start-run", "10.0.0.9", b"Bearer secret", 200),
        ("/v1/runtime/acquire-task", "10.0.0.9", b"Bearer secret", 403),
        ("/v1/runtime/acquire-task", "127.0.0.1", b"", 200),
        ("/v1/runtime/acquire-task", "::1", b"", 200),
        ("/v1/responses", "10.0.0.9", b"", 403),
        ("/docs", "10.0.0.9", b"", 403),
    ],
)
def test_the_gate_lets_nodes_to_their_interface_only(path, caller, header, expected):
    headers = [(b"authorization", header)] if header else []
    assert asyncio.run(status({"path": path, "headers": headers, "client": (caller, 1)})) == expected


def test_a_caller_of_no_address_is_not_this_machine():
    assert asyncio.run(status({"path": "/v1/runtime/acquire-task", "headers": [], "client": None})) == 403


def test_a_node_runs_its_own_app_and_no_other(tmp_path, monkeypatch):
    from flwr.supercore.run import RunNotRunningException

    own, other = guard.app_bundle("flower_parts:serve_nothing"), guard.app_bundle("os:system")
    assert guard.same_app(own, guard.app_bundle("flower_parts:serve_nothing"))
    assert not guard.same_app(own, other) and not guard.same_app(own, b"no archive")
    inside = importlib.import_module("flwr.supernode.start_client_internal")
    command = importlib.import_module("flwr.supernode.cli.flower_supernode")
    bundles = {"own": own, "other": other}

    @contextmanager
    def connect(address):
        yield (*range(4), lambda digest, run: SimpleNamespace(content=bundles[digest]), *range(5, 8))

    def started():
        with inside._init_connection("address") as connection:
            assert connection[:4] == (0, 1, 2, 3) and connection[5:] == (5, 6, 7)
            assert connection[4]("own", 1).content == own
            with pytest.raises(RunNotRunningException):
                connection[4]("other", 1)
            ran.append(True)

    ran = []
    monkeypatch.setattr(inside, "_init_connection", connect)
    monkeypatch.setattr(command, "flower_supernode", started)
    (tmp_path / "app.fab").write_bytes(own)
    guard.supernode(str(tmp_path / "app.fab"))
    assert ran


# The transport


class Grid:
    """What a transport asks of Flower's grid; nodes answer with `answers`, or never."""

    def __init__(self, nodes, answers):
        self.nodes, self.answers, self.sent = nodes, answers, {}

    def get_nodes(self):
        return [SimpleNamespace(node_id=number, name=name) for number, name in self.nodes]

    def push_messages(self, messages):
        numbers = []
        for message in messages:
            numbers.append(f"m{len(self.sent)}")
            self.sent[numbers[-1]] = message
        return numbers

    def pull_messages(self, numbers):
        return [
            SimpleNamespace(
                metadata=SimpleNamespace(reply_to_message_id=number),
                has_error=lambda answer=answer: not callable(answer), error=answer,
                content=answer(self.sent[number].content) if callable(answer) else None,
            )
            for number in numbers
            if (answer := self.answers.get(self.sent[number].metadata.dst_node_id)) is not None
        ]  # fmt: skip


@pytest.fixture
def in_a_run(monkeypatch):
    identity = importlib.import_module("flwr.supercore.task_identity").TaskIdentity
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(identity, name, 1)


def echo(content):
    return apps.to_content(b"re:" + apps.from_content(content))


def test_replies_come_by_the_registered_names(in_a_run):
    grid = Grid([(7, "bank-b"), (5, "bank-a"), (9, "")], {5: echo, 7: echo})
    transport = apps.FlowerTransport(grid, poll_s=0.01)
    assert transport.clients(wait_for=2, timeout_s=1) == ["bank-a", "bank-b"]
    replies = dict(transport.exchange({"bank-a": b"1", "bank-b": b"2"}, deadline_s=5))
    assert replies == {"bank-a": b"re:1", "bank-b": b"re:2"}
    assert all(0 < message.metadata.ttl <= 5 for message in grid.sent.values())


def test_each_kind_of_silence_is_a_failure_with_its_reason(in_a_run):
    broken = SimpleNamespace(code=2, reason="it\nraised")
    foreign = flwr.app.RecordDict({"other": flwr.app.ConfigRecord({"x": 1})})
    grid = Grid([(1, "a"), (2, "b"), (3, "c"), (4, "d")], {1: echo, 2: broken, 3: lambda content: foreign})
    transport = apps.FlowerTransport(grid, poll_s=0.01)
    assert transport.clients(wait_for=9, timeout_s=0.05) == ["a", "b", "c", "d"]
    replies = dict(transport.exchange(dict.fromkeys("abcde", b"x"), deadline_s=0.2))
    assert replies == {
        "a": b"re:x",
        "b": TransportFailure("it raised (Flower's error 2)"),
        "c": TransportFailure("its reply is not of deltaw's app"),
        "d": TransportFailure("no reply within 0.2 s", late=True),
        "e": TransportFailure("not connected"),
    }


def test_two_nodes_of_one_name_are_an_error():
    with pytest.raises(RunError, match="two nodes are registered as 'a'"):
        apps.FlowerTransport(Grid([(1, "a"), (2, "a")], {})).clients(wait_for=1, timeout_s=0)


# The silo


def test_a_silo_answers_and_survives_its_workers_death(tmp_path):
    address = str(tmp_path / "s")
    with Silo("bank-a", Factory("flower_parts:Echo"), address, threads=1):
        assert ask(address, b"x" * 3_000_000) == b"bank-a:" + b"x" * 3_000_000
        with pytest.raises(RunError, match="SIGKILL"):
            ask(address, b"die")
        assert ask(address, b"again") == b"bank-a:again"
    with pytest.raises(RunError, match="does not answer"):
        ask(str(tmp_path / "nobody"), b"x")


# Launching


def test_flower_of_another_version_is_refused(monkeypatch):
    require_flower()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.42.0")
    with pytest.raises(InputError, match=r"flwr 1\.42\.0 is installed: expected 1\.41"):
        require_flower()

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    with pytest.raises(MissingExtraError, match=r"deltaw\[federated\]"):
        require_flower()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("credentials: c\nstat: s", "did you mean 'state'"),
        ("credentials: c", "lacks state"),
        ("credentials: c\nstate: s\nport: many", "port is 'many': expected a whole number"),
        ("credentials: c\nstate: s\nport: true", "port is True"),
    ],
)
def test_a_wrong_file_for_a_process_is_one_line(text, said, tmp_path):
    (tmp_path / "link.yaml").write_text(text)
    with pytest.raises(InputError, match=said):
        launch.read_deployment(tmp_path / "link.yaml", "superlink")


def test_flower_is_kept_from_calling_home(tmp_path):
    told = launch.environment(tmp_path)
    assert told["FLWR_TELEMETRY_ENABLED"] == "0" and told["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert told["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1" and told["FLWR_HOME"] == str(tmp_path)


def test_missing_credentials_and_a_taken_port_are_told_before_anything_starts(made, tmp_path):
    folder, _ = made
    with pytest.raises(InputError, match=r"operator\.token"):
        launch.run_superlink(credentials=tmp_path, state=tmp_path / "s")
    with launch.socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen at 127.0.0.1:{port}"):
            launch.run_superlink(credentials=folder / "server", state=tmp_path / "s", host="127.0.0.1", port=port)
    with pytest.raises(InputError, match="nobody answers as the SuperLink"):
        launch.start_run(
            superlink=f"127.0.0.1:{port}",
            credentials=folder / "server",
            server="flower_parts:serve_nothing",
            options={},
        )


# A whole run, over loopback


class Loopback:
    """A SuperLink and nodes, each in a thread that waits for its processes; `errors` by name when one ended in one."""

    def __init__(self, folder, *, client, server):
        self.folder, self.client, self.server = folder, client, server
        self.stop, self.errors, self.lines, self.threads = threading.Event(), {}, [], []
        self.port = launch._free_port()
        self.credentials = folder / "credentials"
        credentials.make_credentials(self.credentials, nodes=BANKS)

    def begin(self, name, run, /, **options):
        def work():
            try:
                run(state=self.folder / "state" / name, say=self.lines.append, stop=self.stop, **options)
            except Exception as error:
                self.errors[name] = error

        self.threads.append(threading.Thread(target=work, name=name))
        self.threads[-1].start()
        return self.threads[-1]

    def node(self, name, **options):
        client = Factory(self.client, options)
        known = {"superlink": f"127.0.0.1:{self.port}", "credentials": self.credentials / name}
        return self.begin(name, launch.run_supernode, name=name, client=client, server=self.server, threads=1, **known)

    def start(self, **options):
        known = {"superlink": f"127.0.0.1:{self.port}", "credentials": self.credentials / "server"}
        launch.start_run(server=self.server, options=options, say=self.lines.append, **known)

    def __enter__(self):
        link = {"credentials": self.credentials / "server", "host": "127.0.0.1", "port": self.port}
        self.begin("superlink", launch.run_superlink, **link)
        end = time.monotonic() + 60
        while not self.lines and not self.errors and time.monotonic() < end:
            time.sleep(0.05)
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join(timeout=30)
        alive = [
            line for path in Path("/proc").glob("[0-9]*/cmdline") if os.fsencode(self.folder) in (line := _read(path))
        ]
        assert not alive

    def status(self, path, **headers):
        """What the SuperLink answers to a bare request."""
        context = ssl.create_default_context(cafile=str(self.credentials / "server/ca.pem"))
        request = urllib.request.Request(f"https://localhost:{self.port}{path}", data=b"", headers=headers)
        request.add_header("accept", "application/protobuf")
        request.add_header("content-type", "application/protobuf")
        try:
            with urllib.request.urlopen(request, context=context, timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_two_rounds_over_loopback_equal_those_in_process_and_a_stranger_is_refused(tmp_path):
    options = {"names": BANKS, "out": str(tmp_path / "here")}
    flower_parts.serve(LocalTransport({name: flower_parts.make_client(name) for name in BANKS}), options)
    there = Loopback(tmp_path, client="flower_parts:make_client", server="flower_parts:serve")
    with there:
        credentials.make_node_credentials(there.credentials / "stranger", name="stranger")
        shutil.copy(there.credentials / "server/ca.pem", there.credentials / "stranger/ca.pem")
        for name in [*BANKS, "stranger"]:
            there.node(name, store=str(tmp_path / "stores" / name))
        # Without the token, and without the secret that only this SuperLink's own processes have.
        assert there.status("/v1/control/register-node") == 403
        assert there.status("/v1/control/start-run", authorization="Bearer guess") == 403
        assert there.status("/v1/runtime/acquire-task") in (401, 403)
        there.start(**options | {"out": str(tmp_path / "there")})
        refused = there.errors.pop("stranger")
        assert not there.errors
    assert isinstance(refused, RunError) and "Failed to activate SuperNode" in str(refused)
    state, expected = (load_file(tmp_path / place / "state.safetensors") for place in ("there", "here"))
    torch.testing.assert_close(state, expected)
    assert all(any((tmp_path / "stores" / name).rglob("*")) for name in BANKS)
    assert not (tmp_path / "stores/stranger").exists()


@pytest.mark.slow
def test_a_payload_of_100_megabytes_passes_both_ways(tmp_path):
    with Loopback(tmp_path, client="flower_parts:Echo", server="flower_parts:serve_large") as there:
        there.node("bank-a")
        there.start(bytes=100_000_000)


@pytest.mark.slow
def test_a_run_that_fails_says_why(tmp_path):
    with Loopback(tmp_path, client="flower_parts:Echo", server="flower_parts:serve_failing") as there:
        with pytest.raises(RunError, match=r"^the run is failed: the rows ran out$"):
            there.start()
        assert not any("Traceback" in line for line in there.lines)
