"""A federation from its configuration to a run folder: what is written, saved, resumed and reported."""

import json
import shutil
import stat

import pytest
import torch
from federated_fakes import NAMES, make_config, start_state, trained_change, whole

from deltaw.checkpoint.algebra import read_stored
from deltaw.core.errors import InputError, RunError
from deltaw.federated.store import ServerStore
from deltaw.studies.federate import make_client, resume_federation, run_federation

FAKES = {"trainers": "federated_fakes:fake_trainer"}


def configured(tmp_path, **keys):
    clients = {name: {"data": str(tmp_path / f"{name}.log")} for name in NAMES}
    return make_config(NAMES, **{"clients": clients, "output": str(tmp_path / "run"), "test_data": "t.jsonl", **keys})


def test_a_run_folder_holds_what_the_page_reads(tmp_path):
    said = []
    run = run_federation(configured(tmp_path, rounds=2), say=said.append, command="deltaw federate", **FAKES)
    record = json.loads((run.path / "run.json").read_text())
    assert (record["kind"], record["status"], record["command"]) == ("federation", "done", "deltaw federate")
    assert record["task"] == "sequence-classification" and record["model"]["family"] == "bert"
    federation = record["federation"]
    assert (federation["rule"], federation["rounds"], federation["transport"]) == ("fedavg-ab", 2, "local")
    assert federation["clients"]["bank-a"] == {"examples": 10, "base": "ab" * 32, "versions": {"torch": "x"}}
    lines = ServerStore(run.path).lines()
    assert record["metrics"]["before"] == lines[0]["metrics"] and record["metrics"]["after"] == lines[2]["metrics"]
    assert record["metrics"]["silos"]["bank-b"]["after"] == lines[2]["silos"]["bank-b"]["metrics"]
    assert record["metrics"]["labels"] == ["good", "bad"]
    assert record["cost"]["bytes_up"] == sum(line["bytes_up"] for line in lines) and record["cost"]["total_s"] > 0
    privacy = record["privacy"]
    assert (privacy["level"], privacy["delta"]) == ("example", 1e-5)
    assert privacy["clients"]["bank-c"] == {"epsilon": 8.0, "steps": 4}
    assert "<html" in (run.path / "report.html").read_text() and len(said) == 3
    assert not (run.path / "clients" / "bank-a" / "books" / "trained.message").exists()


@pytest.mark.parametrize("rule", ["fedavg-ab", "product", "fedex"])
def test_the_saved_adapter_computes_what_the_state_does(tmp_path, rule):
    merge = {"merge_every": 2} if rule != "fedavg-ab" else {}
    run = run_federation(configured(tmp_path, rounds=3, rule=rule, **merge), **FAKES)
    progress = ServerStore(run.path).load()
    low = read_stored(run.path / "adapter").sites["layer"]
    product = low.scale * low.B.double() @ low.A.double()
    expected = whole(progress.state, progress.folds)["layer"]
    torch.testing.assert_close(product, expected, rtol=0, atol=1e-6)
    assert low.A.shape[0] == 2 if rule == "fedavg-ab" else low.A.shape[0] > 2


def test_secure_runs_make_keys_that_only_the_user_reads(tmp_path):
    run = run_federation(configured(tmp_path, rounds=1, secure=True, weighting="equal"), **FAKES)
    for name in NAMES:
        assert stat.S_IMODE((run.path / "clients" / name / "identity.pem").stat().st_mode) == 0o600
    state = ServerStore(run.path).load().state
    expected = sum(trained_change(name, 0, "head:bias", (3,)).double() for name in NAMES) / 3
    moved = state.tensors["head:bias"].double() - start_state().tensors["head:bias"].double()
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)


def test_worker_processes_give_what_one_process_does(tmp_path):
    for name, parallel in (("one", 0), ("workers", 1)):
        keys = {"output": str(tmp_path / name), "rounds": 1, "secure": True, "weighting": "equal", "parallel": parallel}
        run_federation(configured(tmp_path, **keys), **FAKES)
    one, workers = (ServerStore(tmp_path / name).load().state.tensors for name in ("one", "workers"))
    for key, value in one.items():
        assert torch.equal(workers[key], value)


def test_a_failed_run_says_why_and_goes_on(tmp_path, monkeypatch):
    import federated_fakes

    config = configured(tmp_path, rounds=3, attempts=1)
    train = federated_fakes.FakeTrainer.train

    def failing(self, start, *, round_, **about):
        if round_ == 1 and self.name != "bank-a":
            raise InputError("row 7 is 'quoted'")
        return train(self, start, round_=round_, **about)

    monkeypatch.setattr(federated_fakes.FakeTrainer, "train", failing)
    with pytest.raises(RunError, match=r"round 2 had fewer than 2 updates .*row 7 is 'quoted'"):
        run_federation(config, **FAKES)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed" and "round 2 had fewer" in record["error"]
    assert (tmp_path / "run" / "report.html").exists()
    monkeypatch.setattr(federated_fakes.FakeTrainer, "train", train)
    run = resume_federation(tmp_path / "run", **FAKES)
    assert run.record["status"] == "done" and "error" not in json.loads((run.path / "run.json").read_text())
    whole_run = run_federation(configured(tmp_path, rounds=3, output=str(tmp_path / "whole")), **FAKES)
    ended, expected = (ServerStore(path).load().state.tensors for path in (run.path, whole_run.path))
    for key, value in expected.items():
        assert torch.equal(ended[key], value)
    assert resume_federation(run.path, **FAKES).record["status"] == "done"


def test_what_cannot_begin_says_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="no output"):
        run_federation(make_config(NAMES), **FAKES)
    with pytest.raises(InputError, match="client bank-b has no data"):
        clients = {"bank-a": {"data": "x"}, "bank-b": {}}
        run_federation(make_config((), clients=clients, output=str(tmp_path / "x")), **FAKES)
    with pytest.raises(InputError, match="no run at"):
        resume_federation(tmp_path / "nowhere")
    keys = configured(tmp_path, secure=True).plain()
    with pytest.raises(InputError, match="no client 'bank-z'"):
        make_client("bank-z", keys=keys, folder=str(tmp_path), **FAKES)
    with pytest.raises(InputError, match="identity key"):
        make_client("bank-a", keys=keys, folder=str(tmp_path), **FAKES)


@pytest.mark.parametrize(
    "keys", [{}, {"rule": "product", "secure": False, "compression": "nf4"}, {"rule": "sketch", "secure": True}]
)
def test_a_tiny_encoder_learns_from_three_silos_and_the_saved_adapter_is_what_was_measured(tmp_path, keys):
    from small_runs import labelled_texts, make_model, write_rows

    from deltaw.studies.ship import evaluate_model

    def rows(name, **options):
        return write_rows(tmp_path / f"{name}.jsonl", [{"text": t, "label": s} for t, s in labelled_texts(**options)])

    clients = {name: {"data": rows(name, count=24 + 8 * i, seed=i)} for i, name in enumerate(NAMES)}
    clients["bank-a"]["test_data"] = rows("own", count=12, seed=8)
    model = make_model(tmp_path / "model", "bert")
    config = make_config(
        NAMES, clients=clients, model=model, task="sequence-classification", labels=["bad", "good"],
        test_data=rows("test", count=40, seed=9), output=str(tmp_path / "run"), rounds=4, local_epochs=2,
        batch_size=8, learning_rate=2e-2, dtype="float32", max_length=16, device="cpu", **keys,
    )  # fmt: skip
    run = run_federation(config)
    metrics = run.record["metrics"]
    assert metrics["after"]["accuracy"] > max(0.9, metrics["before"]["accuracy"])
    assert set(metrics["silos"]) == {"bank-a"} and metrics["labels"] == ["bad", "good"]
    adapter = shutil.copytree(run.path / "adapter", tmp_path / "adapter")
    measured = {"model": model, "data": config.train.test_data, "labels": ["bad", "good"], "max_length": 16}
    measured |= {"task": "sequence-classification", "dtype": "float32", "device": "cpu"}
    found = evaluate_model(adapter=adapter, keys=measured)["metrics"]["after"]
    assert found["accuracy"] == metrics["after"]["accuracy"]
    assert found["loss"] == pytest.approx(metrics["after"]["loss"], rel=1e-5)
