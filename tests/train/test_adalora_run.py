"""Runs of AdaLoRA move the ranks by themselves, cut the factors at the end, and resume bit for bit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

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

HERE = Path(__file__).parent
KEYS = {
    "method": "adalora", "init_r": 4, "target_r": 2, "epochs": 3, "batch_size": 8, "micro_batch_size": 4,
    "learning_rate": 5e-3, "log_every": 4, "eval_every": 4, "save_every": 2, "keep_checkpoints": 9, "dtype": "float32",
    "device": "cpu", "max_length": 48, "baselines": False, "evaluate_before": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adalora")
    small_runs.make_model(folder / "llama", "llama")
    small_runs.make_model(folder / "gpt2", "gpt2", dropout=0.1)
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
    assert len(ranks) == 14 and sum(ranks.values()) == 28 and len(set(ranks.values())) > 1
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
    expected = {step: int(28 * (1 - (step - 1) / 5) ** 3 + 28) for step in (2, 4)}
    assert sums == expected | dict.fromkeys((6, 8, 10, 12), 28)
    assert checkpoint_ranks(whole, 6) == checkpoint_ranks(whole, 12)


class Stopped(BaseException):
    """Stands for the death of the process."""


@pytest.mark.parametrize("micro_batch", [3, 9, 23])
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


@pytest.mark.parametrize("where", ["_save", "_finish"])
def test_resumed_at_its_end(place, whole, tmp_path, monkeypatch, where):
    def stopping(*args, **kwargs):
        raise Stopped

    monkeypatch.setattr(job, where, stopping)
    with pytest.raises(Stopped):
        train(**keys_for(place, tmp_path / "run", dropout=0.1))
    monkeypatch.undo()
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
    assert sum(ranks.values()) == int(28 * (1 - 3 / 5) ** 3 + 28)


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
    with pytest.raises(RunError, match=r"no rank has fallen: all 56 .* step 6 to step 8.*give a smaller tinit"):
        train(**keys_for(place, tmp_path / "run", early_stopping=2, eval_every=2, tinit=5, tfinal=4))
    assert small_runs.record(tmp_path / "run")["status"] == "failed"


def test_too_few_steps_are_refused_before_the_first(place, tmp_path):
    with pytest.raises(InputError, match="no rank could fall: of 1 steps"):
        train(**keys_for(place, tmp_path / "run", max_steps=1))
    with pytest.raises(InputError, match="target_r is 4 and init_r 4"):
        train(**keys_for(place, tmp_path / "other", target_r=4))
    assert not (tmp_path / "other").exists()


def test_going_on_from_a_pruned_adapter_is_refused(place, whole, tmp_path):
    with pytest.raises(InputError, match=r"14 sites have 28 in all, and target_r 2 asks for 28.*--to lora"):
        train(**keys_for(place, tmp_path / "run", adapter=str(whole / "adapter")))


SETTINGS = {
    "paged": {"optimizer": "paged_adamw"},
    "paged-8bit": {"optimizer": "paged_adamw_8bit"},
    "four-bits": {"quantize": "nf4", "merge_aware": 0.5},
    "conv1d-and-dropout": {"family": "gpt2", "dropout": 0.2},
    "seldom": {"delta_t": 2, "tinit": 2, "tfinal": 3, "orth_reg_weight": 0.0},
    "checkpointing": {"gradient_checkpointing": True, "neftune_alpha": 5.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(place, tmp_path, name):
    run = train(**keys_for(place, tmp_path / "run", save_every=6, **SETTINGS[name]))
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
        train(**keys_for(place, tmp_path / name, micro_batch_size=rows, max_steps=6))
    for got, expected in zip(seen["four"], seen["one"], strict=True):
        assert expected.any()
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3 * float(expected.max()))


def test_two_processes_choose_alike(place, tmp_path):
    jobs = [{"keys": keys_for(place, tmp_path / "two", micro_batch_size=2)}]
    (tmp_path / "jobs.json").write_text(json.dumps({"root": str(tmp_path), "jobs": jobs}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
        "--master_port", str(port), str(HERE / "processes.py"), str(tmp_path / "jobs.json"),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert all("error" not in json.loads((tmp_path / f"log-{rank}.json").read_text())[0] for rank in (0, 1))
    train(**keys_for(place, tmp_path / "one", micro_batch_size=2))
    two, one = (small_runs.logged(tmp_path / name) for name in ("two", "one"))
    for line, other in zip(two, one, strict=True):
        (key,) = {"loss", "eval_loss"} & line.keys()
        assert line[key] == pytest.approx(other[key], rel=1e-3)
    assert ranks_of(tmp_path / "two") == ranks_of(tmp_path / "one")
