"""Transports: replies by name, deadlines, workers that die or hang, and what is left when the parent goes."""

import os
import signal
import subprocess
import sys
import time

import pytest
from federated_echo import Echo

from deltaw.core.errors import InputError
from deltaw.federated.transport import Factory, LocalTransport, ProcessTransport, TransportFailure

ECHO = Factory("federated_echo:make_echo")


@pytest.fixture
def workers():
    made = []

    def make(names, **options):
        made.append(ProcessTransport({name: ECHO for name in names}, threads=1, **options))
        return made[-1]

    yield make
    for transport in made:
        transport.close()


def asked(transport, requests, deadline_s=20.0):
    return dict(transport.exchange(requests, deadline_s=deadline_s))


def test_local_clients_answer_by_name_and_a_crash_is_a_failure():
    transport = LocalTransport({name: Echo(name) for name in "ab"})
    assert transport.clients(wait_for=5, timeout_s=0) == ["a", "b"]
    found = asked(transport, {"a": b"x", "b": b"raise"})
    assert found["a"] == f"a {os.getpid()} x".encode()
    assert found["b"] == TransportFailure("crashed: RuntimeError: no way")


def test_a_local_deadline_is_looked_at_between_clients():
    transport = LocalTransport({name: Echo(name) for name in "abc"})
    found = asked(transport, {"a": b"x", "b": b"sleep 0.2", "c": b"x"}, deadline_s=0.1)
    assert isinstance(found["a"], bytes)
    assert found["b"].late and found["c"].late and found["b"].reason == "no reply within 0.1 s"


def test_workers_live_on_and_are_grouped(workers):
    transport = workers("abc", workers=2)
    first = asked(transport, {name: b"x" for name in "abc"})
    second = asked(transport, {name: b"y" for name in "abc"})
    pids = {name: reply.split()[1] for name, reply in first.items()}
    assert {name: reply.split()[1] for name, reply in second.items()} == pids
    assert pids["a"] == pids["c"] != pids["b"] and str(os.getpid()).encode() not in pids.values()
    assert {name: str(pid).encode() for name, pid in transport.pids().items()} == pids


def test_a_killed_worker_fails_its_client_only_and_comes_back(workers):
    transport = workers("abc", workers=2)
    found = asked(transport, {"a": b"die", "b": b"x", "c": b"x"})
    assert found["a"] == TransportFailure("its process ended (signal SIGKILL)")
    assert found["b"].endswith(b"x") and found["c"].endswith(b"x")
    os.kill(transport.pids()["b"], signal.SIGKILL)
    again = asked(transport, {"a": b"z", "b": b"z"})
    assert again["a"].endswith(b"z")
    # Killed between two exchanges: its death is met by the next request, or found before it.
    assert again["b"] == TransportFailure("its process ended (signal SIGKILL)") or again["b"].endswith(b"z")
    assert asked(transport, {"b": b"w"})["b"].endswith(b"w")


def test_a_raising_client_is_told_and_its_worker_goes_on(workers):
    transport = workers("a")
    assert asked(transport, {"a": b"raise"})["a"] == TransportFailure("crashed: RuntimeError: no way")
    pid = transport.pids()["a"]
    assert asked(transport, {"a": b"x"})["a"] == f"a {pid} x".encode()


def test_deadlines_hold_and_a_late_reply_is_dropped(workers):
    transport = workers("ab")
    asked(transport, {"a": b"x", "b": b"x"})
    began = time.monotonic()
    found = asked(transport, {"a": b"sleep 1.0", "b": b"x"}, deadline_s=0.3)
    assert time.monotonic() - began < 0.9 and found["a"].late and found["b"].endswith(b"x")
    pid = transport.pids()["a"]
    # The worker finishes what it was at, its reply is nobody's, and the next request is answered by the same process.
    assert asked(transport, {"a": b"y"})["a"] == f"a {pid} y".encode()


def test_a_hanging_worker_is_ended_at_the_second_deadline(workers):
    transport = workers("a")
    pid = asked(transport, {"a": b"x"})["a"].split()[1]
    assert asked(transport, {"a": b"sleep 600"}, deadline_s=0.2)["a"].late
    assert asked(transport, {"a": b"y"}, deadline_s=0.2)["a"].late
    assert asked(transport, {"a": b"z"})["a"].split()[1] != pid


def test_messages_of_many_megabytes_pass(workers):
    transport = workers("ab")
    large = b"q" * (40 << 20)
    assert {len(reply) > len(large) for reply in asked(transport, {"a": large, "b": large}).values()} == {True}


def test_a_factory_that_fails_is_told(workers):
    transport = ProcessTransport({"a": Factory("federated_echo:nothing")}, threads=1)
    found = asked(transport, {"a": b"x"})["a"]
    transport.close()
    assert found.reason.startswith("crashed: AttributeError") and not found.late


def test_nobody_or_no_workers_is_refused():
    for clients, workers_ in (({}, None), ({"a": ECHO}, 0)):
        with pytest.raises(InputError, match="at least one of each"):
            ProcessTransport(clients, workers=workers_)


def test_workers_end_with_a_killed_parent(tmp_path):
    code = (
        "import os, signal\n"
        "from deltaw.federated.transport import Factory, ProcessTransport\n"
        "t = ProcessTransport({'a': Factory('federated_echo:make_echo')}, threads=1)\n"
        "list(t.exchange({'a': b'x'}, deadline_s=60)); print(t.pids()['a'], flush=True)\n"
        "list(t.exchange({'a': b'sleep 600'}, deadline_s=0.1)); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    end = time.monotonic() + 10
    while _runs(int(done.stdout)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not _runs(int(done.stdout))


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"
