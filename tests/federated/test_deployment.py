"""A federation of real trainers as it is deployed: from the parties' files, in this process and over loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from command_line import process
from safetensors.torch import load_file
from small_runs import make_model, rows_of, write_rows

from deltaw.core.errors import InputError, RunError
from deltaw.federated.config import make_federation_config
from deltaw.federated.flower.credentials import make_credentials, make_node_credentials
from deltaw.federated.flower.launch import read_deployment
from deltaw.federated.transport import LocalTransport
from deltaw.studies.deployment import located_keys, node_factory, serve, server_options
from deltaw.studies.federate import run_federation

BANKS = ("bank-a", "bank-b", "bank-c")
KEYS = {"model": "model", "task": "sequence-classification", "labels": ["bad", "good"], "rounds": 2, "r": 2}
KEYS |= {"batch_size": 8, "learning_rate": 2e-2, "dtype": "float32", "device": "cpu", "max_length": 16}
KEYS |= {"min_clients": 3, "wait_s": 240}


@pytest.fixture
def parties(tmp_path):
    """A folder with a model, everybody's credentials, a server's rows, and beside each bank's rows its own file."""
    make_model(tmp_path / "model", "bert")
    make_credentials(tmp_path / "keys", nodes=BANKS)
    for place, name in enumerate(BANKS):
        write_rows(tmp_path / f"{name}.jsonl", rows_of("label", 24 + 8 * place, seed=place))
    write_rows(tmp_path / "test.jsonl", rows_of("label", 24, seed=9))
    return tmp_path


def write_files(folder, *, server=(), **changes):
    """The files of the banks and of the server; gives the configuration of the same rehearsed on one machine."""
    for name in BANKS:
        clients = {other: {"data": f"{name}.jsonl"} if other == name else None for other in BANKS}
        own = {**KEYS, "clients": clients, "model": str(folder / "model"), **changes}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(own))
    shared = {
        **KEYS,
        "model": str(folder / "model"),
        "test_data": str(folder / "test.jsonl"),
        **changes,
        **dict(server),
    }
    remote = {**shared, "clients": list(BANKS), "output": str(folder / "there")}
    (folder / "banks.yaml").write_text(yaml.safe_dump(remote))
    here = {name: {"data": str(folder / f"{name}.jsonl")} for name in BANKS}
    return make_federation_config({**shared, "clients": here, "output": str(folder / "here")})


def factory_of(folder, name):
    return node_factory(
        name, config=folder / f"{name}.yaml", credentials=folder / "keys" / name, state=folder / "state" / name
    )


def adapter(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def rounds(run):
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("changes", [{}, {"secure": True}, {"rule": "product", "compression": "nf4"}])
def test_the_parties_files_give_what_one_machine_does(parties, changes):
    run_federation(write_files(parties, **changes))
    made = make_federation_config(located_keys(parties / "banks.yaml"))
    options = json.loads(json.dumps(server_options(made, credentials=parties / "keys" / "server", command="c")))
    serve(LocalTransport({name: factory_of(parties, name).make(name) for name in BANKS}), options)
    torch.testing.assert_close(adapter(parties / "there"), adapter(parties / "here"), rtol=0, atol=0)
    here, there = rounds(parties / "here"), rounds(parties / "there")
    assert [line["metrics"] for line in there] == [line["metrics"] for line in here] and len(there) == 3
    record = json.loads((parties / "there" / "run.json").read_text())
    assert (record["status"], record["federation"]["transport"], record["command"]) == ("done", "flower", "c")
    assert all((parties / "state" / name / "books").is_dir() for name in BANKS)


def test_a_server_without_rows_measures_nothing_and_saves_the_same(parties):
    run_federation(write_files(parties, server={"test_data": None}))
    made = make_federation_config(located_keys(parties / "banks.yaml"))
    options = server_options(made, credentials=parties / "keys" / "server", command="c")
    serve(LocalTransport({name: factory_of(parties, name).make(name) for name in BANKS}), options)
    torch.testing.assert_close(adapter(parties / "there"), adapter(parties / "here"), rtol=0, atol=0)
    assert not any("metrics" in line for line in rounds(parties / "there"))


@pytest.mark.parametrize("lacking", [{"task": None}, {"labels": None}])
def test_a_server_has_to_be_told_the_task(parties, lacking):
    made = write_files(parties, server={"test_data": None, **lacking})
    with pytest.raises(InputError, match=r"nothing tells the server the task: give test_data, .* or task"):
        server_options(made, credentials=parties, command="c")


def test_what_the_server_is_told_names_no_rows_and_no_ledger(parties):
    private = {"dp": True, "target_epsilon": 3.0, "ledger": "books", "budget_epsilon": 8.0}
    told = server_options(write_files(parties, **private), credentials=parties / "keys", command="c")
    text = json.dumps(told)
    assert not any(f"{name}.jsonl" in text for name in BANKS) and "books" not in text
    assert told["keys"]["clients"] == {name: {} for name in BANKS} and told["roster"] is None
    assert Path(told["keys"]["output"]).is_absolute() and Path(told["keys"]["model"]).is_absolute()
    make_federation_config(told["keys"])


def test_a_banks_files_are_found_from_where_its_configuration_is(parties, monkeypatch):
    write_files(parties, dp=True, target_epsilon=3.0, ledger="books", budget_epsilon=8.0)
    (parties / "elsewhere").mkdir()
    monkeypatch.chdir(parties / "elsewhere")
    made = factory_of(parties, "bank-b")
    keys = made.options["keys"]
    assert keys["clients"]["bank-b"]["data"] == str(parties / "bank-b.jsonl") and not keys["clients"]["bank-a"]
    assert keys["ledger"] == str(parties / "books")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("bank-z", {}, r"bank-a\.yaml does not say where bank-z's rows are: expected clients: \{bank-z: \{data: FILE"),
        ("bank-b", {}, "does not say where bank-b's rows are"),
        ("bank-a", {"clients": {"bank-a": {"data": "bank-x.jsonl"}}, "min_clients": 1}, "no such file: bank-x.jsonl"),
        ("bank-a", {"local_stesp": 3}, "did you mean 'local_steps'"),
    ],
)
def test_a_banks_file_is_checked_before_it_calls_anybody(parties, name, changes, said, monkeypatch):
    write_files(parties)
    file = parties / "bank-a.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))
    monkeypatch.chdir(parties)
    with pytest.raises(InputError, match=said):
        node_factory(name, config=file, credentials=parties, state=parties)


def test_a_private_client_trains_no_more_rounds_than_its_noise_is_for(parties):
    write_files(parties, dp=True, noise_multiplier=1.0)
    made = make_federation_config(located_keys(parties / "banks.yaml") | {"rounds": 3, "min_clients": 1, "attempts": 1})
    options = server_options(made, credentials=parties, command="c")
    with pytest.raises(RunError, match="round 1 of 3: this client's noise is for 2 rounds"):
        serve(LocalTransport({name: factory_of(parties, name).make(name) for name in BANKS}), options)


def test_the_yaml_of_the_documentation_is_read(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "federation.md").read_text(encoding="utf-8")
    rehearsal, link, node, bank = re.findall(r"```yaml\n(.*?)```", page, re.S)
    made = make_federation_config(yaml.safe_load(rehearsal))
    assert list(made.clients) == list(BANKS) and made.rule == "fedavg-ab"
    for kind, text in (("superlink", link), ("supernode", node)):
        (tmp_path / "file.yaml").write_text(text)
        assert read_deployment(tmp_path / "file.yaml", kind)["credentials"]
    own = yaml.safe_load(bank)
    assert own["clients"]["bank-a"] and make_federation_config(own).secure
    told = {"clients": list(BANKS), "output": "out"} | {
        key: own[key] for key in own if key not in ("clients", "ledger")
    }
    assert make_federation_config({key: told[key] for key in told if key != "budget_epsilon"}).rounds == 20


# Over loopback, each party by its own commands.


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Deployment:
    """A superlink and nodes as processes of the command, ended by their ids."""

    def __init__(self, folder):
        self.folder, self.port, self.running = folder, free_port(), {}
        link = {"credentials": "keys/server", "state": "state/superlink", "host": "127.0.0.1", "port": self.port}
        (folder / "superlink.yaml").write_text(yaml.safe_dump(link))

    def begin(self, name, *words):
        self.running[name] = process("federate", *words, cwd=self.folder, start_new_session=True)
        return self.running[name]

    def node(self, name):
        own = {"name": name, "superlink": f"localhost:{self.port}", "credentials": f"keys/{name}", "threads": 1}
        own |= {"state": f"state/{name}", "silo": {"config": f"{name}.yaml"}}
        (self.folder / f"node-{name}.yaml").write_text(yaml.safe_dump(own))
        return self.begin(name, "supernode", f"node-{name}.yaml")

    def start(self, *words):
        known = ["--superlink", f"localhost:{self.port}", "--credentials", "keys/server"]
        return process("federate", "start", "--config", "banks.yaml", *known, *words, cwd=self.folder)

    def __enter__(self):
        link = self.begin("superlink", "superlink", "superlink.yaml")
        assert "SuperLink at 127.0.0.1" in link.stderr.readline()
        return self

    def __exit__(self, *_):
        for running in self.running.values():
            if running.poll() is None:
                running.send_signal(signal.SIGTERM)
        for running in self.running.values():
            with ExitStack() as streams:
                streams.enter_context(running)
                try:
                    running.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    running.kill()
        time.sleep(1)
        marks = [
            line for path in Path("/proc").glob("[0-9]*/cmdline") if os.fsencode(self.folder) in (line := read(path))
        ]
        assert not marks, marks


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


@contextmanager
def ended(running, timeout):
    """A process that is over at the end of the block, with what it wrote."""
    try:
        out, err = running.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        running.kill()
        raise
    yield running.returncode, out, err


@pytest.mark.slow
def test_a_deployment_equals_the_rehearsal_refuses_strangers_and_outlives_a_killed_node(parties):
    run_federation(write_files(parties))
    make_node_credentials(parties / "keys" / "stranger", name="stranger")
    shutil.copy(parties / "keys" / "server" / "ca.pem", parties / "keys" / "stranger" / "ca.pem")
    own = yaml.safe_load((parties / "bank-a.yaml").read_text())
    (parties / "stranger.yaml").write_text(
        yaml.safe_dump(own | {"clients": own["clients"] | {"stranger": {"data": "bank-a.jsonl"}}})
    )
    with Deployment(parties) as there:
        for name in (*BANKS, "stranger"):
            there.node(name)
        with ended(there.start("--json"), 400) as (code, out, err):
            assert code == 0, err
        assert json.loads(out)["status"] == "done" and "round 2/2  3 ok" in err
        torch.testing.assert_close(adapter(parties / "there"), adapter(parties / "here"))
        with ended(there.running.pop("stranger"), 60) as (code, out, err):
            assert code == 1 and "Failed to activate SuperNode" in err
        assert not (parties / "state" / "stranger" / "books").exists()

        # The same again, with a node that dies in the midst of its training.
        bank = there.running.pop("bank-c")
        bank.send_signal(signal.SIGTERM)
        with ended(bank, 30) as (code, out, err):
            assert code == 0, err
        own = yaml.safe_load((parties / "bank-c.yaml").read_text())
        (parties / "bank-c.yaml").write_text(yaml.safe_dump(own | {"local_steps": 1_000_000}))
        told = yaml.safe_load((parties / "banks.yaml").read_text())
        told |= {"min_clients": 2, "rounds": 1, "deadline_s": 120, "output": str(parties / "killed")}
        (parties / "banks.yaml").write_text(yaml.safe_dump(told))
        bank, run = there.node("bank-c"), there.start()
        with bank, run:
            while not (line := run.stderr.readline()).startswith("round 0/1  "):
                assert line, "the run ended"
            time.sleep(15)
            bank.kill()
            with ended(run, 200) as (code, out, err):
                assert code == 0, err
        silos = rounds(parties / "killed")[1]["silos"]
        assert {name: silos[name]["status"] for name in BANKS} == {"bank-a": "ok", "bank-b": "ok", "bank-c": "crashed"}
        assert json.loads((parties / "killed" / "run.json").read_text())["status"] == "done"


@pytest.mark.slow
def test_a_secure_deployment_equals_the_rehearsal(parties):
    run_federation(write_files(parties, secure=True))
    with Deployment(parties) as there:
        for name in BANKS:
            there.node(name)
        with ended(there.start(), 400) as (code, _, err):
            assert code == 0, err
    torch.testing.assert_close(adapter(parties / "there"), adapter(parties / "here"))
    assert "update_norm" not in rounds(parties / "there")[1]["silos"]["bank-a"]
