"""Rounds over a local transport: the arithmetic, the log, sampling, evaluation, folding and the server optimizer."""

import json

import pytest
import torch
from federated_fakes import (
    NAMES,
    SHAPES,
    FakeTrainer,
    expected_product,
    make_client,
    make_config,
    secure_parts,
    start_state,
    trained_change,
    whole,
)

from deltaw.core.errors import InputError, RunError
from deltaw.federated.server import Server
from deltaw.federated.store import ServerStore
from deltaw.federated.transport import LocalTransport


def run(tmp_path, config, clients=None, *, secure=None, judge=None, said=None):
    clients = clients or {name: make_client(name, secure=secure, examples=10 * (i + 1)) for i, name in enumerate(NAMES)}
    roster = secure[1] if secure else None
    say = said.append if said is not None else (lambda line: None)
    server = Server(
        LocalTransport(clients), config, ServerStore(tmp_path), run="run-1", judge=judge, secure=roster, say=say
    )
    return server.run(), server


def averaged(weights, rounds, keys=tuple(SHAPES)):
    """What FedAvg of the fake clients' changes comes to, in float64."""
    state = {key: value.double() for key, value in start_state().tensors.items()}
    for round_ in range(rounds):
        for key in keys:
            changes = [
                w * trained_change(n, round_, key, SHAPES[key]).double() for n, w in zip(NAMES, weights, strict=True)
            ]
            state[key] = state[key] + sum(changes)
    return state


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("weighting", "weights"), [("examples", (1 / 6, 2 / 6, 3 / 6)), ("equal", (1 / 3, 1 / 3, 1 / 3))]
)
def test_rounds_are_the_weighted_mean_of_what_clients_did(tmp_path, weighting, weights):
    said = []
    progress, _ = run(tmp_path, make_config(NAMES, rounds=3, weighting=weighting), said=said)
    expected = averaged(weights, 3)
    for key, value in progress.state.tensors.items():
        torch.testing.assert_close(value.double(), expected[key], rtol=0, atol=1e-6)
    found = lines(tmp_path)
    assert [line["round"] for line in found] == [0, 1, 2, 3]
    assert {silo["status"] for line in found[1:] for silo in line["silos"].values()} == {"ok"}
    assert all(line["bytes_up"] == sum(s["bytes_up"] for s in line["silos"].values()) > 0 for line in found)
    assert len(said) == 4 and said[3].startswith("round 3/3  3 ok")


def test_a_line_tells_norms_cosines_and_drift_of_the_changes(tmp_path):
    run(tmp_path, make_config(NAMES, rounds=1, weighting="equal"))
    line = lines(tmp_path)[1]
    flat = {n: torch.cat([trained_change(n, 0, k, s).reshape(-1) for k, s in SHAPES.items()]).double() for n in NAMES}
    mean = sum(flat.values()) / 3
    for name, change in flat.items():
        silo = line["silos"][name]
        assert silo["update_norm"] == pytest.approx(float(change.norm()), rel=1e-5)
        assert silo["cosine"] == pytest.approx(float(change @ mean / change.norm() / mean.norm()), rel=1e-5)
        assert silo["epsilon"] == 1.0 and silo["seconds"] >= 0
    drift = sum(float((change - mean).norm()) for change in flat.values()) / 3 / float(mean.norm())
    assert line["drift"] == pytest.approx(drift, rel=1e-5)
    assert line["facts"]["product_error"] > 0


def test_the_product_rule_gives_the_dense_mean_of_products(tmp_path):
    progress, _ = run(tmp_path, make_config(NAMES, rounds=2, rule="product", weighting="equal"))
    assert not progress.folds
    # The last round alone, from where it began: the difference of two runs' products.
    first, _ = run(tmp_path / "one", make_config(NAMES, rounds=1, rule="product", weighting="equal"))
    from federated_fakes import layout

    from deltaw.core.generators import generator
    from deltaw.federated.rules import make_rule

    begun = make_rule("product").begin(first.state, layout(), 1, generator(3, "federated", "begin", 1))
    dense = torch.zeros(4, 5, dtype=torch.float64)
    for name in NAMES:
        B, A = (
            begun.tensors[f"layer:lora_{x}"] + trained_change(name, 1, f"layer:lora_{x}", SHAPES[f"layer:lora_{x}"])
            for x in "BA"
        )
        dense += 2.0 * B.double() @ A.double() / 3
    moved = whole(progress.state)["layer"] - whole(first.state)["layer"]
    assert float((moved - dense).norm() / dense.norm()) < 1e-6


@pytest.mark.parametrize("rule", ["fedavg-ab", "sketch", "rolora"])
@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_secure_rounds_give_what_plain_ones_do(tmp_path, rule, weighting):
    plain, _ = run(tmp_path / "plain", make_config(NAMES, rounds=2, rule=rule, weighting=weighting))
    config = make_config(NAMES, rounds=2, rule=rule, weighting=weighting, secure=True, secure_weight_bound=30)
    secure = secure_parts(NAMES, config, phases=2 if rule == "sketch" else 1)
    masked, _ = run(tmp_path / "secure", config, secure=secure)
    for key, value in whole(plain.state).items():
        torch.testing.assert_close(whole(masked.state)[key], value, rtol=0, atol=2e-5)
    line = lines(tmp_path / "secure")[2]
    assert [s["status"] for s in line["silos"].values()] == ["ok"] * 3
    assert "drift" not in line and not any({"update_norm", "cosine", "loss"} & set(s) for s in line["silos"].values())
    assert all(s["epsilon"] == 2.0 for s in line["silos"].values())


def test_a_secure_upload_is_not_the_vector(tmp_path):
    from federated_fakes import Rough

    from deltaw.federated.messages import unpack

    config = make_config(NAMES, rounds=1, secure=True, weighting="equal")
    secure, seen = secure_parts(NAMES, config), []

    def look(name, request, reply):
        message = unpack(reply)
        if request.kind == "train":
            assert set(message.tensors) == {"masked"} and "examples" not in message.header
            assert set(message.header["facts"]) == {"seconds", "epsilon"}
            seen.append(message.tensors["masked"])
        return reply

    clients = {name: make_client(name, secure=secure) for name in NAMES}
    Server(Rough(LocalTransport(clients), look), config, ServerStore(tmp_path), run="r", secure=secure[1]).run()
    words = torch.stack(seen).long()
    assert int(words.abs().min(dim=1).values.max()) > 2**10 and int(words.abs().max()) > 2**29


def test_a_client_that_masks_sends_nothing_plain(tmp_path):
    config = make_config(NAMES, rounds=1, secure=True)
    secure = secure_parts(NAMES, config)
    with pytest.raises(RunError, match="sends masked updates only"):
        run(tmp_path, make_config(NAMES, rounds=1, attempts=1), {n: make_client(n, secure=secure) for n in NAMES})


@pytest.mark.parametrize(("sample", "count"), [(2, 2), (0.34, 1), (1.0, 3)])
def test_sampling_asks_that_many_and_is_the_same_for_a_seed(tmp_path, sample, count):
    chosen = []
    for attempt in range(2):
        run(tmp_path / str(attempt), make_config(NAMES, rounds=6, sample=sample, min_clients=1, evaluate_clients=False))
        found = lines(tmp_path / str(attempt))[1:]
        chosen.append([tuple(n for n, s in line["silos"].items() if "status" in s) for line in found])
    assert chosen[0] == chosen[1] and all(len(names) == count for names in chosen[0])
    assert count == 3 or len(set(chosen[0])) > 1


def test_silos_and_the_server_measure_the_same_model(tmp_path):
    run(tmp_path, make_config(NAMES, rounds=3, evaluate_every=2), judge=FakeTrainer("server"))
    found = lines(tmp_path)
    assert ["metrics" in line for line in found] == [True, False, True, True]
    for line in (found[0], found[2], found[3]):
        assert {silo["metrics"]["norm"] for silo in line["silos"].values()} == {line["metrics"]["norm"]}
    run(tmp_path / "off", make_config(NAMES, rounds=1, evaluate_clients=False))
    assert not any("metrics" in silo for line in lines(tmp_path / "off") for silo in line["silos"].values())


@pytest.mark.parametrize("rule", ["product", "fedex"])
def test_folding_changes_no_result(tmp_path, rule):
    plain, _ = run(tmp_path / "plain", make_config(NAMES, rounds=5, rule=rule, weighting="equal"))
    clients = {name: make_client(name) for name in NAMES}
    judge = FakeTrainer("server")
    config = make_config(NAMES, rounds=5, rule=rule, weighting="equal", merge_every=2)
    progress, _ = run(tmp_path / "folded", config, clients, judge=judge)
    assert (
        len(progress.folds) == 2 and all(len(c.trainer.folds) == 2 for c in clients.values()) and len(judge.folds) == 2
    )
    for key, value in whole(plain.state).items():
        torch.testing.assert_close(whole(progress.state, progress.folds)[key], value, rtol=0, atol=1e-6)
    for carried in progress.folds:
        assert all(float(expected_product(low).norm()) > 0 for low in carried.values())


def test_server_momentum_steps_on_the_mean_change(tmp_path):
    config = make_config(NAMES, rounds=3, weighting="equal", server_optimizer="momentum", server_momentum=0.5)
    progress, _ = run(tmp_path, config)
    state, m = {k: v.double() for k, v in start_state().tensors.items()}, {k: 0.0 for k in SHAPES}
    for round_ in range(3):
        for key, shape in SHAPES.items():
            m[key] = 0.5 * m[key] + sum(trained_change(n, round_, key, shape).double() for n in NAMES) / 3
            state[key] = state[key] + m[key]
    for key, value in progress.state.tensors.items():
        torch.testing.assert_close(value.double(), state[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "nf4", "topk"])
def test_compressed_uploads_with_error_feedback_come_near_the_mean(tmp_path, kind):
    options = {"compression": kind} | ({"compression_share": 0.5} if kind == "topk" else {})
    progress, _ = run(tmp_path, make_config(NAMES, rounds=8, weighting="equal", **options))
    expected = averaged((1 / 3,) * 3, 8)
    # What is still owed is one round's loss, however many rounds there were.
    for key, value in progress.state.tensors.items():
        assert (
            float((value.double() - expected[key]).abs().max())
            < {"bfloat16": 2e-3, "int8": 2e-3, "nf4": 0.06, "topk": 0.25}[kind]
        )


def test_clients_with_other_bases_or_adapters_are_left_out(tmp_path):
    clients = {name: make_client(name) for name in NAMES}
    clients["bank-b"] = make_client("bank-b", base="cd" * 32)
    progress, _ = run(tmp_path, make_config(NAMES, rounds=1, weighting="equal"), clients)
    silo = lines(tmp_path)[1]["silos"]["bank-b"]
    assert silo["status"] == "refused" and silo["reason"].startswith("its base is cdcdcdcdcdcd, the run's abababababab")
    assert lines(tmp_path)[0]["silos"]["bank-b"]["status"] == "refused"
    others = [trained_change(n, 0, "head:bias", (3,)) for n in ("bank-a", "bank-c")]
    expected = start_state().tensors["head:bias"] + sum(others) / 2
    torch.testing.assert_close(progress.state.tensors["head:bias"], expected)


def test_all_bases_different_is_refused_by_name(tmp_path):
    clients = {name: make_client(name, base=str(i) * 64) for i, name in enumerate(NAMES)}
    with pytest.raises(InputError, match=r"different bases .bank-a 000000000000, bank-b 111111111111, bank-c"):
        run(tmp_path, make_config(NAMES, rounds=1), clients)


def test_a_client_that_joins_late_takes_part_from_then_on(tmp_path):
    class Late(LocalTransport):
        def clients(self, *, wait_for, timeout_s):
            done = len(lines(tmp_path)) if (tmp_path / "rounds.jsonl").exists() else 0
            return [
                name for name in super().clients(wait_for=wait_for, timeout_s=timeout_s) if name != "bank-c" or done > 3
            ]

    clients = {name: make_client(name) for name in NAMES}
    config = make_config(NAMES, rounds=5, rule="product", merge_every=2)
    progress = Server(Late(clients), config, ServerStore(tmp_path), run="r").run()
    statuses = [line["silos"]["bank-c"]["status"] for line in lines(tmp_path)[1:]]
    assert statuses == ["absent"] * 3 + ["ok"] * 2 and len(clients["bank-c"].trainer.folds) == len(progress.folds) == 2


def test_a_rule_that_the_method_does_not_go_with_stops_before_any_round(tmp_path):
    with pytest.raises(InputError, match="rule ffa"):
        run(tmp_path, make_config(NAMES, rounds=1, rule="ffa"))
    assert not (tmp_path / "rounds.jsonl").exists()


def test_finish_gives_what_clients_say_of_themselves(tmp_path):
    _, server = run(tmp_path, make_config(NAMES, rounds=1))
    assert {name: told["examples"] for name, told in server.finish().items()} == dict(
        zip(NAMES, (10, 20, 30), strict=True)
    )


def test_integers_with_noise_of_their_own_go_under_the_masks(tmp_path):
    """Settings without a clip: clients make integers, the server undoes the code of their sum."""
    from dataclasses import replace

    from deltaw.federated.secure import SecureClient

    class Code:
        terms = "thousandths"

        def length(self, size):
            return size + 3

        def decode(self, total, size):
            assert torch.equal(total[size:], torch.full((3,), 3.0 * len(NAMES), dtype=torch.float64))
            return total[:size] / 1024

        def charge(self, *, run, round_):
            assert (run, round_) == ("run-1", 0)

        def release_integers(self, vector, *, run, round_):
            return torch.cat([(vector * 1024).round().long(), torch.full((3,), 3)])

        def facts(self, round_):
            return {}

        def record(self):
            return {}

    config = make_config(NAMES, rounds=1, secure=True, weighting="equal")
    identities, roster = secure_parts(NAMES, config)
    roster = replace(roster, settings=replace(roster.settings, clip=None), integers=Code())
    clients = {}
    for name in NAMES:
        clients[name] = make_client(name)
        clients[name]._secure = SecureClient(name, identities[name], roster.peers, settings=roster.settings)
        clients[name]._privacy = Code()
    progress, _ = run(tmp_path, config, clients, secure=(identities, roster))
    for key, value in averaged((1 / 3,) * 3, 1).items():
        torch.testing.assert_close(progress.state.tensors[key].double(), value, rtol=0, atol=1 / 1024)


def test_a_clients_facts_do_not_replace_what_the_server_measured(tmp_path):
    class Boasting(FakeTrainer):
        def train(self, start, **about):
            result = super().train(start, **about)
            facts = {"bytes_up": 1, "status": 7, "cosine": 1.0, "name": 1, "nan": float("inf"), "loss": 0.25}
            return type(result)(result.tensors, result.examples, facts)

    clients = {name: make_client(name) for name in NAMES}
    clients["bank-b"].trainer = Boasting("bank-b")
    run(tmp_path, make_config(NAMES, rounds=1, weighting="equal"), clients)
    found = lines(tmp_path)[1]["silos"]
    assert found["bank-b"]["bytes_up"] == pytest.approx(found["bank-a"]["bytes_up"], rel=0.2)
    assert found["bank-b"]["status"] == "ok" and found["bank-b"]["cosine"] < 0.99 and found["bank-b"]["loss"] == 0.25
    assert found["bank-b"]["name"] == 1 and "nan" not in found["bank-b"]


def test_a_short_deadline_leaves_clients_time_to_load_their_models(tmp_path):
    seen = {}

    class Timed(LocalTransport):
        def exchange(self, requests, *, deadline_s):
            from deltaw.federated.messages import unpack

            seen.setdefault(unpack(next(iter(requests.values()))).kind, deadline_s)
            return super().exchange(requests, deadline_s=deadline_s)

    config = make_config(NAMES, rounds=1, deadline_s=5, wait_s=60)
    Server(Timed({name: make_client(name) for name in NAMES}), config, ServerStore(tmp_path), run="r").run()
    assert seen == {"hello": 60, "initial": 60, "train": 5, "evaluate": 5}
