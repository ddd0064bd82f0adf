"""What goes wrong: spoilt replies and requests, deaths of clients, and 200 rounds of random dropouts."""

import json

import pytest
import torch
from federated_fakes import (
    BASE,
    NAMES,
    SHAPES,
    Mortal,
    Rough,
    changed,
    dropper,
    layout,
    make_client,
    make_config,
    secure_parts,
    start_state,
    trained_change,
    whole,
)

from deltaw.core.errors import RunError
from deltaw.federated.messages import Message, pack, unpack
from deltaw.federated.server import Server
from deltaw.federated.store import ServerStore
from deltaw.federated.transport import Factory, LocalTransport, ProcessTransport, TransportFailure
from deltaw.federated.wire import layout_digest, state_tensors


def federation(tmp_path, config, transport, *, secure=None):
    return Server(transport, config, ServerStore(tmp_path), run="run-1", secure=secure[1] if secure else None)


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]


def from_lines(found):
    """The state that equal means of those silos' changes give that the log calls ok, in float64."""
    state = {key: value.double() for key, value in start_state().tensors.items()}
    for line in found[1:]:
        names = [name for name, silo in line["silos"].items() if silo.get("status") == "ok"]
        for key, shape in SHAPES.items():
            changes = [trained_change(name, line["round"] - 1, key, shape).double() for name in names]
            state[key] = state[key] + sum(changes) / len(names)
    return state


def assert_near(state, expected, atol):
    for key, value in expected.items():
        torch.testing.assert_close(state.tensors[key].double(), value, rtol=0, atol=atol)


def _tensors(reply, **replaced):
    return {**unpack(reply).tensors, **replaced}


def _spoilt(reply, change):
    """The reply with its one vector of values changed."""
    return changed(reply, tensors={"values": change(unpack(reply).tensors["values"].clone())})


SPOILT = {
    "nan": (lambda r: _spoilt(r, lambda v: v.index_fill_(0, torch.tensor([3]), torch.nan)), "holds NaN or infinity"),
    "infinity": (lambda r: _spoilt(r, lambda v: v.index_fill_(0, torch.tensor([0]), torch.inf)), "holds NaN"),
    "shape": (lambda r: _spoilt(r, lambda v: v[1:]), "payload of"),
    "dtype": (lambda r: _spoilt(r, lambda v: v.double()), "payload of"),
    "keys": (lambda r: changed(r, tensors=_tensors(r, more=torch.zeros(1))), "payload of"),
    "compression": (lambda r: changed(r, compression={"compression": "nf4"}), "expected 'none'"),
    "no header": (lambda r: changed(r, compression=7), "expected 'none'"),
    "huge": (lambda r: _spoilt(r, lambda v: v * 1e6), "the update's norm is"),
    "corrupted": (lambda r: r[:100] + bytes([r[100] ^ 1]) + r[101:], "checksum differs"),
    "cut": (lambda r: r[:-20], "checksum differs"),
    "nothing": (lambda r: b"", "is damaged"),
    "oversized": (lambda r: r + bytes(70 << 20), "expected at most"),
    "stale round": (lambda r: changed(r, round=0), "its round is 0, expected 1"),
    "stale attempt": (lambda r: changed(r, attempt=9), "its attempt is 9, expected 0"),
    "another run": (lambda r: changed(r, run="run-0"), "its run is 'run-0'"),
    "another client": (lambda r: changed(r, client="bank-a"), "it says that it is from 'bank-a'"),
    "another kind": (lambda r: changed(r, kind="evaluate"), "of kind 'evaluate'"),
    "no rows": (lambda r: changed(r, examples=0), "examples is 0"),
    "no number": (lambda r: changed(r, examples="many"), "examples is 'many'"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_reply_is_refused_with_the_reason_and_the_round_completes(tmp_path, fault):
    spoil, reason = SPOILT[fault]
    config = make_config(NAMES, rounds=3, weighting="equal", max_update_norm=5.0)

    def at_b(name, request, reply):
        spoils = name == "bank-b" and request.kind == "train" and request.header["round"] == 1
        return spoil(reply) if spoils else reply

    transport = Rough(LocalTransport({name: make_client(name) for name in NAMES}), at_b)
    progress = federation(tmp_path, config, transport).run()
    found = lines(tmp_path)
    silo = found[2]["silos"]["bank-b"]
    assert silo["status"] == "refused" and reason in silo["reason"] and "\n" not in silo["reason"]
    assert [line["silos"]["bank-b"]["status"] for line in found[1:]] == ["ok", "refused", "ok"]
    assert_near(progress.state, from_lines(found), 1e-6)


def test_a_replayed_reply_is_refused(tmp_path):
    kept = []

    def replay(name, request, reply):
        if name != "bank-b" or request.kind != "train":
            return reply
        kept.append(reply)
        return kept[0]

    config = make_config(NAMES, rounds=2, weighting="equal")
    progress = federation(tmp_path, config, Rough(LocalTransport({n: make_client(n) for n in NAMES}), replay)).run()
    assert "stale or replayed" in lines(tmp_path)[2]["silos"]["bank-b"]["reason"]
    assert_near(progress.state, from_lines(lines(tmp_path)), 1e-6)


def test_nan_and_norms_are_found_by_the_client_itself(tmp_path):
    clients = {name: make_client(name) for name in NAMES}
    clients["bank-b"] = make_client("bank-b", poison="nan")
    clients["bank-c"] = make_client("bank-c", poison="raise")
    progress = federation(tmp_path, make_config(NAMES, rounds=1, min_clients=1), LocalTransport(clients)).run()
    silos = lines(tmp_path)[1]["silos"]
    assert silos["bank-b"]["reason"] == "its training failed: head:bias holds NaN or infinity"
    # What a training raises may quote rows: the server learns its kind.
    assert silos["bank-c"]["status"] == "crashed"
    assert silos["bank-c"]["reason"] == "ValueError; the client's own log says more"
    assert_near(progress.state, from_lines(lines(tmp_path)), 1e-6)
    small = make_config(NAMES, rounds=1, max_update_norm=1e-3, attempts=1)
    with pytest.raises(RunError, match=r"bank-a refused: the update's norm is .* at most 0.001 is accepted"):
        federation(tmp_path / "small", small, LocalTransport({n: make_client(n) for n in NAMES})).run()


def test_too_few_updates_are_tried_again_and_then_the_run_stops_and_can_go_on(tmp_path):
    lost = {"on": True}

    def before(name, request):
        gone = lost["on"] and request.kind == "train" and request.header["round"] == 1 and name != "bank-a"
        return TransportFailure("no line") if gone else None

    clients = {name: make_client(name, log=tmp_path / "log") for name in NAMES}
    config = make_config(NAMES, rounds=3, weighting="equal", attempts=2)
    transport = Rough(LocalTransport(clients), lambda n, q, r: r, before=before)
    with pytest.raises(RunError, match=r"round 2 had fewer than 2 updates in 2 attempts .*bank-b crashed: no line"):
        federation(tmp_path / "run", config, transport).run()
    assert [line["round"] for line in lines(tmp_path / "run")] == [0, 1]
    lost["on"] = False
    progress = federation(tmp_path / "run", config, transport).run()
    assert_near(progress.state, from_lines(lines(tmp_path / "run")), 1e-6)
    # bank-a was asked three times for round 1 (counted from 0), and trained once.
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert log.count(["bank-a", "train", 1]) == 1
    assert json.loads((tmp_path / "run" / "state" / "attempt.json").read_text())["round"] == 2


def test_a_failed_attempt_is_recorded_and_the_next_one_completes(tmp_path):
    def before(name, request):
        gone = request.kind == "train" and request.header["attempt"] == 0 and name != "bank-a"
        return TransportFailure("no line", late=True) if gone else None

    clients = LocalTransport({name: make_client(name) for name in NAMES})
    config = make_config(NAMES, rounds=1, weighting="equal")
    federation(tmp_path, config, Rough(clients, lambda n, q, r: r, before=before)).run()
    line = lines(tmp_path)[1]
    assert line["attempts"] == 2 and "bank-b late: no line" in line["failed_attempts"][0]
    assert {silo["status"] for silo in line["silos"].values()} == {"ok"}


# Requests that a client refuses.


def request_of(kind="train", *, tensors=None, **header):
    about = {
        "run": "run-1", "round": 0, "attempt": 0, "request": "r", "rounds": 9, "rule": "fedavg-ab", "options": {},
        "base": BASE, "layout": layout_digest(layout()), "folds": 0, "weighting": "equal", "compression": "none",
        "compression_share": 0.01, "max_update_norm": None, "phase": 0, "start": "",
    }  # fmt: skip
    return pack(Message(kind, {**about, **header}, state_tensors(start_state()) if tensors is None else tensors))


def _without(key):
    found = state_tensors(start_state())
    del found[key]
    return found


REFUSED = {
    "another run": (lambda: request_of(run="run-2"), "of run 'run-2', while this client is in 'run-1'"),
    "an older round": (lambda: request_of(round=2), "round 2, after this client trained in round 3"),
    "another start": (
        lambda: request_of(round=3, tensors=state_tensors(start_state()) | {"tensors/head:bias": torch.ones(3)}),
        "from another start",
    ),
    "another base": (lambda: request_of(round=4, base="ef" * 32), "the base is efefefefefef, this client's abab"),
    "another adapter": (lambda: request_of(round=4, layout="x"), "another adapter"),
    "folds": (lambda: request_of(round=4, folds=2), "2 folds are expected in the base, 0 are known"),
    "no tensor": (lambda: request_of(round=4, tensors=_without("tensors/head:bias")), "head:bias is missing"),
    "nan": (
        lambda: request_of(round=4, tensors=_without("tensors/head:bias") | {"tensors/head:bias": torch.ones(3) / 0}),
        "the round's start: head:bias holds NaN",
    ),
    "no kind": (lambda: request_of("dance"), "of kind 'dance': unknown"),
    "no round": (lambda: request_of(round="4"), "round is '4': expected a whole number"),
    "a phase out of nowhere": (lambda: request_of("phase", round=4, phase=1), "did not train in"),
    "secure": (lambda: request_of("secure-advertise", round=4), "secure aggregation is not set up"),
    "a rule": (lambda: request_of(round=4, rule="guess"), "InputError"),
    "oversized": (lambda: bytes(1 << 21), "expected at most 1048576"),
    "corrupted": (lambda: request_of()[:-1] + b"x", "checksum differs"),
    "empty": (lambda: b"", "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_a_client_refuses_with_the_reason_and_goes_on(fault):
    made, reason = REFUSED[fault]
    client = make_client("bank-a")
    client._limit = 1 << 20
    assert unpack(client.handle(request_of(round=3))).kind == "train"
    reply = unpack(client.handle(made()))
    assert reply.kind == "error" and reason in reply.header["reason"], reply.header
    assert reply.header["client"] == "bank-a" and not reply.tensors
    assert unpack(client.handle(request_of(round=4))).kind == "train"


def test_asked_again_a_client_gives_the_same_update_and_trains_once(tmp_path):
    log = tmp_path / "log"

    def client():
        return make_client("bank-a", folder=tmp_path / "books", log=log)

    first = client()
    replies = [unpack(first.handle(request_of(round=5, compression="topk"))) for _ in range(2)]
    replies += [unpack(client().handle(request_of(round=5, attempt=3, compression="topk")))]
    assert len(log.read_text().splitlines()) == 1
    for reply in replies[1:]:
        for name, value in replies[0].tensors.items():
            assert torch.equal(reply.tensors[name], value)
    assert replies[2].header["attempt"] == 3


def test_an_update_is_released_once_however_often_it_is_asked_for(tmp_path):
    charged = []

    class Privacy:
        def charge(self, *, run, round_):
            pass

        def facts(self, round_):
            return {}

        def record(self):
            return {}

        def release(self, change, *, run, round_):
            charged.append((run, round_))
            return {name: value + len(charged) for name, value in change.items()}

    replies = []
    for attempt in range(3):
        client = make_client("bank-a", folder=tmp_path)
        client._privacy = Privacy()
        replies.append(unpack(client.handle(request_of(attempt=attempt))).tensors["values"])
    assert len(charged) == 1 and all(torch.equal(reply, replies[0]) for reply in replies)


# Deaths of clients.

PLAIN_STEPS = ["train", "phase", "evaluate"]
SECURE_STEPS = ["secure-advertise", "secure-share", "train", "secure-agree", "secure-unmask", "phase", "evaluate"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", SECURE_STEPS)
@pytest.mark.parametrize("threshold", [3, 4])
def test_a_client_that_dies_in_a_secure_round_changes_no_sum(tmp_path, kind, when, threshold):
    names = (*NAMES, "bank-d")
    config = make_config(names, rounds=3, rule="sketch", weighting="equal", secure=True, threshold=threshold)
    secure = secure_parts(names, config, phases=2)
    clients = {name: make_client(name, folder=tmp_path, secure=secure, log=tmp_path / "log") for name in names}
    clients["bank-b"] = Mortal(
        lambda: make_client("bank-b", folder=tmp_path, secure=secure, log=tmp_path / "log"),
        kind=kind, round_=1, when=when, dies=lambda: None,
    )  # fmt: skip
    progress = federation(tmp_path / "run", config, LocalTransport(clients), secure=secure).run()
    plain = make_config(names, rounds=3, rule="sketch", weighting="equal", min_clients=3)
    # The same rounds without masks, of those whose updates were in the sums.
    inside = [[n for n, s in line["silos"].items() if s.get("status") == "ok"] for line in lines(tmp_path / "run")]

    class Only(LocalTransport):
        def clients(self, *, wait_for, timeout_s):
            done = len(lines(tmp_path / "plain")) if (tmp_path / "plain" / "rounds.jsonl").exists() else 1
            return inside[min(done, 3)]

    expected = federation(tmp_path / "plain", plain, Only({name: make_client(name) for name in names})).run()
    for key, value in whole(expected.state).items():
        torch.testing.assert_close(whole(progress.state)[key], value, rtol=0, atol=2e-5)
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert all(log.count([name, "train", round_]) == 1 for name in names if name != "bank-b" for round_ in range(3))


def test_workers_killed_in_every_phase_lose_no_round(tmp_path):
    config = make_config(NAMES, rounds=4, rule="sketch", weighting="equal", min_clients=2)
    deaths = {
        "bank-a": [("train", 0, "before", str(tmp_path / "1"))],
        "bank-b": [("train", 1, "after", str(tmp_path / "2"))],
        "bank-c": [("phase", 2, "after", str(tmp_path / "3"))],
    }
    books = {"folder": str(tmp_path / "books")}
    factories = {n: Factory("federated_fakes:make_mortal", {"deaths": deaths[n], **books}) for n in NAMES}
    transport = ProcessTransport(factories, workers=1, threads=1)
    try:
        federation(tmp_path / "run", config, transport).run()
    finally:
        transport.close()
    found = lines(tmp_path / "run")
    assert [line["round"] for line in found] == [0, 1, 2, 3, 4]
    for round_, name in enumerate(NAMES, 1):
        assert found[round_]["silos"][name]["status"] == "crashed", found[round_]
        assert found[round_]["silos"][name]["reason"] == "its process ended (signal SIGKILL)"
    assert {silo["status"] for silo in found[4]["silos"].values()} == {"ok"}


def test_a_value_beyond_the_clip_is_named_by_its_key_alone(tmp_path):
    config = make_config(NAMES, rounds=1, secure=True, weighting="equal", attempts=2, secure_clip=0.01)
    secure = secure_parts(NAMES, config)
    clients = LocalTransport({name: make_client(name, secure=secure) for name in NAMES})
    with pytest.raises(
        RunError, match=r"expected at least 3.*bank-a refused: a value or the weight is beyond secure_clip"
    ):
        federation(tmp_path, config, clients, secure=secure).run()


# Dropouts.


@pytest.fixture
def quick_disk(monkeypatch):
    """Not a test of the disk: waiting for it takes half of the time."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


def test_200_plain_rounds_with_random_dropouts(tmp_path, quick_disk):
    names = [f"bank-{letter}" for letter in "abcde"]
    config = make_config(names, rounds=200, weighting="equal", attempts=20, min_clients=2, evaluate_every=0)
    spoil, before = dropper(11, 0.15)
    transport = Rough(LocalTransport({name: make_client(name) for name in names}), spoil, before=before)
    progress = federation(tmp_path, config, transport).run()
    found = lines(tmp_path)
    assert [line["round"] for line in found] == list(range(201))
    present = [sum(silo["status"] == "ok" for silo in line["silos"].values()) for line in found[1:]]
    assert min(present) >= 2 and max(present) == 5 and sum(present) < 900
    assert_near(progress.state, from_lines(found), 2e-5)


def test_200_secure_rounds_with_random_dropouts(tmp_path, quick_disk):
    names = [f"bank-{letter}" for letter in "abcde"]
    keys = {"weighting": "equal", "secure": True, "threshold": 3, "min_clients": 3, "evaluate_every": 0}
    config = make_config(names, rounds=200, attempts=60, **keys)
    secure = secure_parts(names, config)
    spoil, before = dropper(5, 0.03)
    clients = {name: make_client(name, secure=secure) for name in names}
    transport = Rough(LocalTransport(clients), spoil, before=before)
    progress = federation(tmp_path, config, transport, secure=secure).run()
    found = lines(tmp_path)
    assert [line["round"] for line in found] == list(range(201))
    present = [sum(silo.get("status") == "ok" for silo in line["silos"].values()) for line in found[1:]]
    assert min(present) >= 3 and sum(present) < 990 and any(line["attempts"] > 1 for line in found[1:])
    # Fixed point: each round is right to half a step of its grid, and steps add up.
    step = 2.0 ** -secure[1].settings.fraction_bits(5)
    assert_near(progress.state, from_lines(found), 200 * step + 2e-5)
