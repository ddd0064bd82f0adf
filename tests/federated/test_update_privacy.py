"""Federations whose clients clip and noise whole updates, alone and in secure sums; what a server can ask for."""

import json
import math
from dataclasses import replace

import federated_fakes
import pytest
import torch
from federated_fakes import BASE, NAMES, SHAPES, Rough, layout, make_config, start_state, trained_change, whole

from deltaw.core.errors import InputError, RunError
from deltaw.federated.config import make_federation_config
from deltaw.federated.messages import Message, pack, unpack
from deltaw.federated.secure import IdentityKey, write_roster
from deltaw.federated.store import ServerStore
from deltaw.federated.transport import LocalTransport, TransportFailure
from deltaw.federated.wire import layout_digest, state_tensors
from deltaw.privacy.accounting import epsilon
from deltaw.privacy.ledger import Ledger
from deltaw.studies.federate import make_client, resume_federation, run_federation, secure_settings, update_plan

FAKES = {"trainers": "federated_fakes:fake_trainer"}
FOUR = (*NAMES, "bank-d")
UPDATES = {"update_dp": True, "update_clip": 0.25, "update_noise_multiplier": 3.0, "weighting": "equal", "rounds": 2}
SECURE = {**UPDATES, "secure": True}


def configured(tmp_path, *, names=NAMES, **keys):
    clients = {name: {"data": str(tmp_path / f"{name}.log")} for name in names}
    return make_config(names, **{"clients": clients, "output": str(tmp_path / "run"), "test_data": "t.jsonl", **keys})


def lines(run):
    return [json.loads(line) for line in (run.path / "rounds.jsonl").read_text().splitlines()]


def flat(tensors):
    return torch.cat([tensors[key].double().reshape(-1) for key in sorted(SHAPES)])


def clipped_change(name, round_, clip=0.25):
    vector = flat({key: trained_change(name, round_, key, shape) for key, shape in SHAPES.items()})
    assert vector.norm() > clip
    return vector * clip / vector.norm()


def ended(run):
    return flat(ServerStore(run.path).load().state.tensors)


def expected_end(names_by_round):
    means = [sum(clipped_change(n, r) for n in names) / len(names) for r, names in enumerate(names_by_round)]
    return flat(start_state().tensors) + sum(means)


# Whole runs.


@pytest.mark.parametrize("keys", [UPDATES, SECURE, {**UPDATES, "compression": "bfloat16"}])
def test_without_noise_a_round_is_the_mean_of_changes_clipped_as_one(tmp_path, keys):
    run = run_federation(configured(tmp_path, **{**keys, "update_noise_multiplier": 0}), **FAKES)
    atol = 2e-3 if "compression" in keys else 2e-6
    torch.testing.assert_close(ended(run), expected_end([NAMES, NAMES]), rtol=0, atol=atol)
    told = json.loads((run.path / "run.json").read_text())["privacy"]["clients"]
    assert not any("epsilon" in one for one in told.values())


@pytest.mark.parametrize("keys", [UPDATES, SECURE])
def test_noise_has_the_stated_width_and_is_what_the_page_says(tmp_path, keys):
    run = run_federation(configured(tmp_path, **{**keys, "rounds": 4}), **FAKES)
    # Alone each of three has all of z; in the sum the three who stay have it together.
    sum_std = 3.0 * 0.25 * (1.0 if "secure" in keys else math.sqrt(3))
    expected = sum(sum(clipped_change(n, r) for n in NAMES) / 3 for r in range(4)) + flat(start_state().tensors)
    noise = (ended(run) - expected) * 3 / sum_std / 2
    n = len(noise)
    assert abs(float(noise.square().sum()) - n) < 5 * math.sqrt(2 * n)

    plan = update_plan(configured(tmp_path, **{**keys, "rounds": 4}), layout())
    record = json.loads((run.path / "run.json").read_text())
    privacy = record["privacy"]
    assert (privacy["level"], privacy["unit"], privacy["sampling"]) == ("update", "client", "full")
    assert (privacy["noise_multiplier"], privacy["max_grad_norm"], privacy["delta"]) == (3.0, 0.25, 1e-5)
    assert privacy["noise"] == ("skellam" if "secure" in keys else "gaussian")
    one = privacy["clients"]["bank-b"]
    assert one["epsilon"] == epsilon(plan.spec).epsilon and one["steps"] == 4
    grows = one["collusion"]["2"] > one["collusion"]["1"] > one["collusion"]["0"] == one["epsilon"]
    assert grows if "secure" in keys else set(one["collusion"].values()) == {one["epsilon"]}
    for line in lines(run)[1:]:
        spent = epsilon(replace(plan.spec, steps=line["round"])).epsilon
        assert all(silo["epsilon"] == spent and "loss" not in silo for silo in line["silos"].values())
    assert "update level" in (run.path / "report.html").read_text()
    for file in (run.path / "clients").rglob("*.message"):
        assert b'"loss"' not in file.read_bytes()


def test_worker_processes_and_rolora_know_the_same_plan(tmp_path):
    keys = {**SECURE, "rule": "rolora", "update_noise_multiplier": 0, "parallel": 1}
    run = run_federation(configured(tmp_path, **keys), **FAKES)
    state = ServerStore(run.path).load().state.tensors
    # B in the first round, A in the second, the loose bias in both; clipped together with what is trained.
    keys_of = [[key for key in SHAPES if not key.endswith(rests)] for rests in ("lora_A", "lora_B")]
    expected = dict(start_state().tensors)
    for round_, trained in enumerate(keys_of):
        for name in NAMES:
            changes = {key: trained_change(name, round_, key, SHAPES[key]).double() for key in trained}
            norm = math.sqrt(sum(float(value.square().sum()) for value in changes.values()))
            for key, value in changes.items():
                expected[key] = expected[key] + value * min(1, 0.25 / norm) / 3
    for key, value in expected.items():
        torch.testing.assert_close(state[key].double(), value.double(), rtol=0, atol=2e-6)
    plan = update_plan(configured(tmp_path, **keys), layout())
    assert plan.integer.dim == max(sum(math.prod(SHAPES[key]) for key in trained) for trained in keys_of)


def test_a_client_that_drops_out_leaves_the_others_sum_and_their_noise(tmp_path):
    keys = {**SECURE, "names": FOUR, "threshold": 3, "update_noise_multiplier": 0}
    config = configured(tmp_path, **keys)
    assert secure_settings(config).threshold == 3 and update_plan(config, layout()).integer.clients == 3
    clients, public = {}, {}
    for name in FOUR:
        identity = IdentityKey.make()
        identity.save(tmp_path / f"{name}.pem")
        public[name] = identity.public
    write_roster(tmp_path / "roster.txt", public)
    for name in FOUR:
        parts = {"identity": str(tmp_path / f"{name}.pem"), "roster": str(tmp_path / "roster.txt")}
        clients[name] = make_client(name, keys=config.plain(), folder=str(tmp_path / "books" / name), **parts, **FAKES)

    def spoil(name, request, reply):
        gone = name == "bank-c" and request.kind == "train" and request.header["round"] == 1
        return TransportFailure("lost on the way back") if gone else reply

    transport = Rough(LocalTransport(clients), spoil)
    run = run_federation(config, transport=transport, roster=tmp_path / "roster.txt", **FAKES)
    stayed = [name for name in FOUR if name != "bank-c"]
    assert lines(run)[2]["silos"]["bank-c"]["status"] == "crashed"
    torch.testing.assert_close(ended(run), expected_end([FOUR, stayed]), rtol=0, atol=2e-6)


def test_two_thirds_are_counted_on_where_no_threshold_is_given(tmp_path):
    config = configured(tmp_path, **SECURE, names=FOUR)
    assert config.stay == 3 == secure_settings(config).threshold == update_plan(config, layout()).integer.clients
    assert secure_settings(config).clip is None and secure_settings(config).weight_bound == 1


# Ledgers.


@pytest.mark.parametrize("keys", [{"min_clients": 2}, {"names": FOUR, "secure": True, "threshold": 3}])
def test_a_spent_budget_refuses_at_its_client_and_the_others_go_on(tmp_path, keys):
    config = configured(tmp_path, **{**UPDATES, **keys, "update_ledger": str(tmp_path / "ledgers")})
    one = epsilon(replace(update_plan(config, layout()).spec, steps=1)).epsilon
    for name in config.clients:
        budget = one * 1.01 if name == "bank-b" else 100.0
        Ledger.open(tmp_path / "ledgers" / f"{name}.jsonl", budget, 1e-5, unit="client")
    run = run_federation(config, **FAKES)
    first, second = lines(run)[1:]
    assert {silo["status"] for silo in first["silos"].values()} == {"ok"}
    statuses = {name: silo["status"] for name, silo in second["silos"].items()}
    assert statuses == {name: "refused" if name == "bank-b" else "ok" for name in config.clients}
    assert "over the budget" in second["silos"]["bank-b"]["reason"]
    id_ = run.record["federation"]["run"]
    for name in config.clients:
        charged = [entry.key for entry in Ledger.open(tmp_path / "ledgers" / f"{name}.jsonl").entries()]
        assert charged == [f"{id_}/{name}/{round_}" for round_ in range(1 if name == "bank-b" else 2)]
    # No training whose result may not leave.
    assert ["bank-b", "train", 1] not in [json.loads(x) for x in (tmp_path / "bank-b.log").read_text().splitlines()]


def test_a_run_that_goes_on_charges_no_round_twice(tmp_path, monkeypatch):
    keys = {**UPDATES, "rounds": 3, "attempts": 1, "update_ledger": str(tmp_path / "ledgers")}
    config = configured(tmp_path, **keys, update_budget_epsilon=50.0)
    train = federated_fakes.FakeTrainer.train

    def failing(self, start, *, round_, **about):
        if round_ == 1 and self.name != "bank-a":
            raise ValueError("power cut")
        return train(self, start, round_=round_, **about)

    monkeypatch.setattr(federated_fakes.FakeTrainer, "train", failing)
    with pytest.raises(RunError, match="round 2 had fewer"):
        run_federation(config, **FAKES)
    monkeypatch.setattr(federated_fakes.FakeTrainer, "train", train)
    run = resume_federation(tmp_path / "run", **FAKES)
    for name in NAMES:
        ledger = Ledger.open(tmp_path / "ledgers" / f"{name}.jsonl")
        assert [entry.key.rpartition("/")[2] for entry in ledger.entries()] == ["0", "1", "2"]
        assert ledger.spent().epsilon == pytest.approx(run.record["privacy"]["clients"][name]["epsilon"], rel=1e-9)


# What a server can ask of one client.


def request_of(kind="train", *, tensors=None, **header):
    about = {
        "run": "run-1", "round": 0, "attempt": 0, "request": "r", "rounds": 9, "rule": "fedavg-ab", "options": {},
        "base": BASE, "layout": layout_digest(layout()), "folds": 0, "weighting": "equal", "compression": "none",
        "compression_share": 0.01, "max_update_norm": None, "phase": 0, "start": "",
    }  # fmt: skip
    return pack(Message(kind, {**about, **header}, state_tensors(start_state()) if tensors is None else tensors))


@pytest.fixture
def client(tmp_path):
    keys = configured(tmp_path, **UPDATES, update_ledger=str(tmp_path / "ledgers"), update_budget_epsilon=50.0).plain()
    return make_client("bank-a", keys=keys, folder=str(tmp_path / "books"), **FAKES)


def entries(tmp_path):
    return Ledger.open(tmp_path / "ledgers" / "bank-a.jsonl").entries()


def test_no_request_draws_a_second_release_of_a_round(tmp_path, client):
    client.handle(request_of("hello"))
    first = unpack(client.handle(request_of()))
    assert first.kind == "train" and set(first.header["facts"]) == {"seconds", "epsilon"}
    beside = state_tensors(start_state()) | {"broadcast/x": torch.ones(2)}
    for asked in (
        {"attempt": 1},
        {"request": "s", "tensors": beside},
        {"rule": "sketch"},
        {"max_update_norm": 1e-9},
        {"weighting": "examples"},
    ):
        again = unpack(client.handle(request_of(**asked)))
        for name, value in first.tensors.items():
            assert torch.equal(again.tensors[name], value), asked
    refused = unpack(client.handle(request_of("phase", phase=1, start="x")))
    assert refused.header["refused"] and "a second upload" in refused.header["reason"]
    client.handle(request_of("finish"))
    refused = unpack(client.handle(request_of(request="t")))
    assert refused.header["refused"] and "has ended the run with round 0" in refused.header["reason"]
    assert len(entries(tmp_path)) == 1


def test_a_norm_is_no_reason_to_refuse_and_rounds_are_counted(tmp_path, client):
    client.handle(request_of("hello"))
    assert unpack(client.handle(request_of(max_update_norm=1e-9))).kind == "train"
    assert unpack(client.handle(request_of(round=1))).kind == "train"
    beyond = unpack(client.handle(request_of(round=2)))
    assert beyond.header["refused"] and "round 3" in beyond.header["reason"] and "2 rounds" in beyond.header["reason"]
    assert [entry.key for entry in entries(tmp_path)] == ["run-1/bank-a/0", "run-1/bank-a/1"]


def test_clients_of_one_sum_must_noise_alike(tmp_path):
    config = configured(tmp_path, **SECURE)
    secure = {}
    for name in NAMES:
        identity = IdentityKey.make()
        identity.save(tmp_path / f"{name}.pem")
        secure[name] = identity.public
    write_roster(tmp_path / "roster.txt", secure)
    clients = {}
    for name in NAMES:
        keys = config.plain() | ({"update_noise_multiplier": 2.0} if name == "bank-c" else {})
        parts = {"identity": str(tmp_path / f"{name}.pem"), "roster": str(tmp_path / "roster.txt")}
        clients[name] = make_client(name, keys=keys, folder=str(tmp_path / "books" / name), **parts, **FAKES)
    with pytest.raises(RunError, match="bank-c refused: another clip, noise"):
        run_federation(config, transport=LocalTransport(clients), roster=tmp_path / "roster.txt", **FAKES)


# Configurations.


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"dp": True, "noise_multiplier": 1.0}, ["dp and update_dp are both on"]),
        ({"update_target_epsilon": 3.0}, ["update_noise_multiplier or update_target_epsilon"]),
        ({"update_noise_multiplier": None}, ["update_noise_multiplier or update_target_epsilon"]),
        ({"update_dp": False}, ["update_noise_multiplier is given and update_dp is false"]),
        ({"update_dp": "yes"}, ["update_dp is 'yes'"]),
        ({"update_clip": 0}, ["update_clip is 0"]),
        ({"update_delta": 0.4}, ["update_delta is 0.4", "3 clients"]),
        ({"rule": "sketch"}, ["rule sketch", "two uploads a round"]),
        ({"rule": "product"}, ["rule product", "noise of A by the noise of B"]),
        ({"rule": "fedex"}, ["rule fedex", "use fedavg-ab, ffa or rolora"]),
        ({"rule": "median", "secure": True, "weighting": "equal"}, ["rule median does not go with secure"]),
        ({"secure": True}, ["weighting examples", "set weighting equal"]),
        ({"max_update_norm": 1.0}, ["max_update_norm", "update_clip"]),
        ({"update_budget_epsilon": 3.0}, ["update_budget_epsilon", "update_ledger"]),
        ({"target_epsilon": 3.0}, ["target_epsilon is given and belongs to dp", "update_target_epsilon"]),
        ({"ledger": "x"}, ["update_ledger"]),
        ({"unit": "name"}, ["the unit of update_dp is a client"]),
    ],
)
def test_what_does_not_go_with_noise_on_updates_is_refused(keys, words):
    with pytest.raises(InputError) as error:
        make_federation_config({"clients": list(NAMES), "update_dp": True, "update_noise_multiplier": 1, **keys})
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("rule", ["fedavg-ab", "ffa", "rolora", "median", "trimmed-mean", "norm-bound", "multi-krum"])
def test_rules_that_work_on_noised_updates_are_taken_and_keys_read_back(rule):
    keys = {"clients": list("abcdefg"), "update_dp": True, "update_noise_multiplier": 1, "rule": rule}
    config = make_federation_config(keys)
    assert (config.update_clip, config.update_delta) == (1.0, 1e-5)
    assert make_federation_config(config.plain()) == config
    plan = update_plan(config, layout())
    assert plan.integer is None and plan.clients == 7


# Runs that came to nothing.


@pytest.mark.parametrize("rule", ["fedavg-ab", "product", "fedex"])
def test_a_run_that_moved_nothing_fails(tmp_path, monkeypatch, rule):
    monkeypatch.setattr(federated_fakes, "trained_change", lambda name, round_, key, shape: torch.zeros(shape))
    config = configured(tmp_path, rounds=2, rule=rule)
    with pytest.raises(RunError, match=r"where it began after 2 rounds: no client moved it") as error:
        run_federation(config, **FAKES)
    assert "\n" not in str(error.value)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed" and "no client moved it" in record["error"]
    assert len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "run" / "adapter").exists() and (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("rule", ["product", "fedex"])
def test_a_run_that_only_carries_has_moved(tmp_path, rule):
    run = run_federation(configured(tmp_path, rounds=1, rule=rule), **FAKES)
    assert run.record["status"] == "done"
    assert whole(ServerStore(run.path).load().state)["layer"].any()
