"""Runs of AdaLoRA move the ranks by themselves, cut the factors at the end, and resume bit for bit."""

from __future__ import annotations

import json

import pytest
import small_runs
import torch
from safetensors.torch import load_file

import deltaw as dw
from deltaw.core.errors import InputError, RunError
from deltaw.methods.adalora_budget import Budget
from deltaw.studies import job
from deltaw.studies.job import resume
from deltaw.studies.job import run_training as train
from deltaw.train.trainer import DeltawTrainer

KEYS = {
    "method": "adalora", "init_r": 4, "target_r": 2, "epochs": 3, "batch_size": 8, "micro_batch_size": 4,
    "learning_rate": 5e-3, "log_every": 4, "eval_every": 12, "save_every": 2, "keep_checkpoints": 9, "dtype": "float32",
    "device": "cpu", "max_length": 48, "baselines": False, "evaluate_before": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adalora")
    small_runs.make_model(folder / "llama", "llama", layers=1)
    small_runs.make_model(folder / "gpt2", "gpt2", layers=1, dropout=0.1)
    small_runs.write_rows(folder / "rows.jsonl", small_runs.rows_of("label", 32))
    small_runs.write_rows(folder / "eval.jsonl", small_runs.rows_of("label", 6, seed=1))
    return folder


def keys_for(place, output, *, family="llama", **changes):
    data = {"data": str(place / "rows.jsonl"), "eval_data": str(place / "eval.jsonl")}
    return KEYS | {"model": str(place / family), "output": str(output)} | data | changes


def ranks_of(run):
    """{site: (r, init_r)} as run.json says, and what the file's tensors say."""
    sites = {site["name"]: site["r"] for site in small_runs.record(run)["method"]["sites"] if "r" in site}
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    stored = {
        key.removeprefix("base_model.model.").removesuffix(".lora_E"): len(tensor)
        for key, tensor in tensors.items()
        if key.endswith(".lora_E")
    }
    assert sites == stored
    return sites


@pytest.fixture(scope="module")
def whole(place):
    run = place / "whole"
    train(**keys_for(place, run, dropout=0.1))
    return run


def test_a_run_moves_the_ranks_by_itself(place, whole):
    ranks = ranks_of(whole)
    assert len(ranks) == 7 and sum(ranks.values()) == 14 and len(set(ranks.values())) > 1
    done = small_runs.record(whole)
    assert done["status"] == "done" and done["method"]["name"] == "adalora"
    schedule = {key: done["method"]["config"][key] for key in ("tinit", "tfinal", "delta_t", "total_steps")}
    assert schedule == {"tinit": 1, "tfinal": 6, "delta_t": 1, "total_steps": 12}
    parameters = sum(t.numel() for t in load_file(whole / "adapter" / "adapter_model.safetensors").values())
    assert done["method"]["trainable_parameters"] == parameters
    assert done["method"]["adapter_bytes"] == done["cost"]["adapter_bytes"] == 4 * parameters
    pattern = json.loads((whole / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert {key.removesuffix(".lora_E"): sum(kept) for key, kept in pattern.items()} == ranks
    # What was measured last is the model that was saved.
    model = dw.load_adapter(dw.load_model(place / "llama", device="cpu", dtype="float32"), whole)
    lines = [line for line in small_runs.logged(whole) if "eval_loss" in line]
    assert done["metrics"]["after"]["loss"] == pytest.approx(lines[-1]["eval_loss"], rel=1e-5)
    assert dw.summary(model).trainable_parameters == parameters
    assert "Rank of every layer" in (whole / "report.html").read_text()


def checkpoint_ranks(run, step):
    tensors = load_file(run / "checkpoints" / f"checkpoint-{step}" / "adapter" / "adapter_model.safetensors")
    return {key: int((t != 0).sum()) for key, t in tensors.items() if key.endswith(".lora_E")}


def test_the_budget_falls_and_then_stays(whole):
    sums = {step: sum(checkpoint_ranks(whole, step).values()) for step in range(2, 13, 2)}
    expected = {step: int(14 * (1 - (step - 1) / 5) ** 3 + 14) for step in (2, 4)}
    assert sums == expected | dict.fromkeys((6, 8, 10, 12), 14)
    assert checkpoint_ranks(whole, 6) == checkpoint_ranks(whole, 12)


class Stopped(BaseException):
    """Stands for the death of the process."""


@pytest.mark.parametrize("micro_batch", [9, 23], ids=["while ranks fall", "after"])
def test_resumed_bit_for_bit(place, whole, tmp_path, monkeypatch, micro_batch):
    own, left = DeltawTrainer.training_step, micro_batch

    def stopping(self, *args, **kwargs):
        nonlocal left
        left -= 1
        if left < 0:
            raise Stopped
        return own(self, *args, **kwargs)

    monkeypatch.setattr(DeltawTrainer, "training_step", stopping)
    with pytest.raises(Stopped):
        train(**keys_for(place, tmp_path / "run", dropout=0.1))
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert small_runs.outcome(tmp_path / "run") == small_runs.outcome(whole)
    assert ranks_of(tmp_path / "run") == ranks_of(whole)


def test_resumed_at_its_end(place, whole, tmp_path, monkeypatch):
    def stopping(*args, **kwargs):
        raise Stopped

    # Before the adapter is saved, and then after it.
    for where in ("_save", "_finish"):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(job, where, stopping)
            if where == "_save":
                train(**keys_for(place, tmp_path / "run", dropout=0.1))
            else:
                resume(tmp_path / "run")
    lines = []
    resume(tmp_path / "run", say=lines.append)
    assert any("training had ended" in line for line in lines)
    assert small_runs.outcome(tmp_path / "run") == small_runs.outcome(whole)
    assert small_runs.record(tmp_path / "run")["method"] == small_runs.record(whole)["method"]


def test_early_stopping_keeps_the_ranks_of_the_best_weights(place, tmp_path, monkeypatch):
    own, losses = DeltawTrainer.evaluate, iter([3.0, 1.0, *[2.0] * 9])

    def evaluate(self, *args, **kwargs):
        kept = self.evaluate_fn
        self.evaluate_fn = lambda model: kept(model) | {"loss": next(losses)}
        try:
            return own(self, *args, **kwargs)
        finally:
            self.evaluate_fn = kept

    monkeypatch.setattr(DeltawTrainer, "evaluate", evaluate)
    train(**keys_for(place, tmp_path / "run", early_stopping=2, eval_every=2))
    assert small_runs.record(tmp_path / "run")["cost"]["best_step"] == 4
    ranks = checkpoint_ranks(tmp_path / "run", 4)
    got = ranks_of(tmp_path / "run")
    assert {f"base_model.model.{site}.lora_E": r for site, r in got.items()} == ranks
    assert sum(ranks.values()) == int(14 * (1 - 3 / 5) ** 3 + 14)


def test_best_weights_from_before_any_choice_are_an_error(place, tmp_path, monkeypatch):
    own, losses = DeltawTrainer.evaluate, iter([1.0, *[2.0] * 9])

    def evaluate(self, *args, **kwargs):
        kept = self.evaluate_fn
        self.evaluate_fn = lambda model: kept(model) | {"loss": next(losses)}
        try:
            return own(self, *args, **kwargs)
        finally:
            self.evaluate_fn = kept

    monkeypatch.setattr(DeltawTrainer, "evaluate", evaluate)
    says = r"no rank has fallen: all 28 .* step 6 to step 8.*give a smaller tinit.*weights are in .*/checkpoint-6$"
    with pytest.raises(RunError, match=says):
        train(**keys_for(place, tmp_path / "run", early_stopping=2, eval_every=2, tinit=5, tfinal=4))
    assert small_runs.record(tmp_path / "run")["status"] == "failed"


def test_what_cannot_work_is_refused_before_anything_is_measured(place, whole, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(job, "_measure", lambda *args: measured.append(args))
    pruned = str(whole / "adapter")
    for changes, says in (
        ({"max_steps": 1}, "no rank could fall: of 1 steps"),
        ({"epochs": 0.25, "evaluate_before": True}, "no rank could fall: of 1 steps"),
        ({"target_r": 4}, "target_r is 4 and init_r 4"),
        ({"total_steps": 13}, "total_steps is 13 and the run has 12 steps"),
        ({"adapter": pruned}, r"7 sites have 14 in all, and target_r 2 asks for 14.*--to lora"),
        ({"method": "lora", "adapter": pruned}, "is of method adalora, and method is lora: give method adalora"),
    ):
        given = keys_for(place, tmp_path / "run", **changes)
        if given["method"] == "lora":
            given = {key: value for key, value in given.items() if key not in ("init_r", "target_r")}
        with pytest.raises(InputError, match=says):
            train(**given)
        assert not (tmp_path / "run").exists() and not measured


SETTINGS = {
    "paged, 4 bits": {"optimizer": "paged_adamw", "quantize": "nf4", "merge_aware": 0.5},
    "paged in 8 bits, Conv1D": {"optimizer": "paged_adamw_8bit", "family": "gpt2", "dropout": 0.2},
    "seldom, recomputed, noisy": {
        "delta_t": 2, "tinit": 2, "tfinal": 3, "orth_reg_weight": 0.0, "gradient_checkpointing": True,
        "neftune_alpha": 5.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(place, tmp_path, name):
    run = train(**keys_for(place, tmp_path / "run", save_every=12, **SETTINGS[name]))
    ranks = ranks_of(run)
    assert sum(ranks.values()) == 2 * len(ranks) and len(set(ranks.values())) > 1


def test_accumulated_gradients_give_the_same_importance(place, tmp_path, monkeypatch):
    own, seen = Budget.after_update, {}

    def noting(self, step):
        own(self, step)
        if step == 4:
            seen[name] = [values.clone() for values in (*self.sensitivity, *self.uncertainty)]

    monkeypatch.setattr(Budget, "after_update", noting)
    for name, rows in (("one", 8), ("four", 2)):
        changes = {"micro_batch_size": rows, "max_steps": 6, "save_every": 6, "eval_data": None, "held_out": 0}
        train(**keys_for(place, tmp_path / name, **changes))
    for got, expected in zip(seen["four"], seen["one"], strict=True):
        assert expected.any()
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3 * float(expected.max()))
