"""Whole runs with fused layers: the same losses as without, memory budgets, and what is refused."""

from __future__ import annotations

import gc

import pytest
import small_runs
import torch

from deltaw.core.errors import InputError
from deltaw.data import Collator
from deltaw.fuse import decoder, narrow
from deltaw.studies.job import resume, run_job
from deltaw.train import loop
from deltaw.train.config import bytes_of, make_config
from deltaw.train.trainer import DeltawTrainer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fast")
    for family in ("llama", "gpt2"):
        small_runs.make_model(folder / family, family, std=0.3)
    small_runs.write_rows(folder / "rows.jsonl", small_runs.rows_of("prompt", 24))
    return folder


def train(place, output, family="llama", **changes):
    said = []
    keys = {
        "model": str(place / family), "data": str(place / "rows.jsonl"), "output": str(output), "device": "cpu",
        "dtype": "float32", "batch_size": 8, "micro_batch_size": 4, "epochs": 2, "log_every": 1, "r": 4, "held_out": 0,
        "evaluate_before": False, "baselines": False, "max_length": 48, "dropout": 0.0, "learning_rate": 1e-2,
        **changes,
    }  # fmt: skip
    run_job(make_config(keys), command="test", say=said.append)
    return [line["loss"] for line in small_runs.logged(output) if "loss" in line], said


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "dora"},
        {"method": "qlora"},
        {"gradient_checkpointing": True},
        {"pack": True, "max_length": 64, "batch_size": 4, "epochs": 6},
        {"neftune_alpha": 5.0},
    ],
    ids=str,
)
def test_a_run_with_fused_layers_is_the_run_without(changes, place, tmp_path):
    plain, _ = train(place, tmp_path / "plain", fast="off", **changes)
    fused, said = train(place, tmp_path / "fused", fast="on", **changes)
    assert "2 of 2 layers fused" in said
    assert len(fused) > 3 and fused == pytest.approx(plain, rel=1e-3)


def test_fused_layers_are_not_made_again_by_transformers_too(place, tmp_path, monkeypatch):
    calls = []
    run = decoder.run_block
    monkeypatch.setattr(decoder, "run_block", lambda x, call: calls.append(call.keep) or run(x, call))
    train(place, tmp_path / "keeps", fast="on", max_steps=2)
    kept = len(calls)
    calls.clear()
    train(place, tmp_path / "again", fast="on", max_steps=2, gradient_checkpointing=True)
    assert calls == ["input"] * kept and kept > 0


def test_eight_bit_weights_are_rounded_by_the_step_also_after_a_resume(place, tmp_path, monkeypatch):
    monkeypatch.setattr(narrow, "TURNS", 2)
    keys = {"fast": "on", "fp8": "all", "max_steps": 5, "save_every": 2}
    whole, _ = train(place, tmp_path / "whole", **keys)
    log = DeltawTrainer.log

    def stop(trainer, logs, start_time=None):
        log(trainer, logs, start_time)
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(DeltawTrainer, "log", stop)
        with pytest.raises(KeyboardInterrupt):
            train(place, tmp_path / "run", **keys)
    resume(tmp_path / "run")
    again = [line["loss"] for line in small_runs.logged(tmp_path / "run") if "loss" in line]
    assert again == whole
    monkeypatch.setattr(narrow, "TURNS", 0)
    other, _ = train(place, tmp_path / "same", **keys)
    assert other[0] == whole[0] and other[1] != whole[1]


def test_directions_are_learned_once_from_the_first_rows(place, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "learn_directions", lambda model, **inputs: seen.append(inputs))
    train(place, tmp_path / "eight", fast="on", fp8="most", max_steps=2)
    train(place, tmp_path / "sixteen", fast="on", max_steps=2)
    (inputs,) = seen
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape

    def shape(*lengths):
        rows = [{"input_ids": [7] * n, "labels": [7] * n} for n in lengths]
        found = loop._sample(rows, Collator("causal-lm", 0), torch.device("cpu"))
        return tuple(found["input_ids"].shape)

    assert shape(9000, 10) == (1, 4096)
    assert shape(3000, 900, 10) == (1, 3000)
    assert shape(900, 1000, 900, 10, 10) == (4, 1000)
    assert shape(*[10] * 1000) == (409, 10)


def test_by_itself_a_cpu_trains_with_the_layers_own_modules(place, tmp_path):
    _, said = train(place, tmp_path / "auto", max_steps=1)
    assert not any("fused" in line for line in said)


def test_what_cannot_be(place, tmp_path):
    with pytest.raises(InputError, match="fast on needs layers that can be fused, and none can: it has no list of dec"):
        train(place, tmp_path / "a", family="gpt2", fast="on")
    with pytest.raises(InputError, match="memory_budget is a GPU's, and the model is on cpu"):
        train(place, tmp_path / "b", memory_budget="1GB")
    with pytest.raises(InputError, match=r"attention flash: it (needs the package|runs on GPUs)"):
        train(place, tmp_path / "c", attention="flash")
    for keys, said in (
        ({"fast": "off", "memory_budget": "1GB"}, "memory_budget chooses what fused layers keep, which fast off"),
        ({"gradient_checkpointing": True, "memory_budget": "1GB"}, "which gradient_checkpointing settles"),
        ({"memory_budget": "ten"}, "memory_budget is 'ten': expected bytes, such as 10.4GB"),
        ({"fast": "yes"}, "unknown fast 'yes'"),
        ({"fp8": "some"}, "unknown fp8 'some'"),
        ({"fp8": "all", "fast": "off"}, "fp8 is for fused layers, and fast is off"),
        ({"attention": "eager"}, "unknown attention 'eager'"),
        ({"attention": "flash", "fast": "off"}, "attention flash is for fused layers, and fast is off"),
    ):
        with pytest.raises(InputError, match=said):
            make_config({"model": "m", "data": "d", "output": "o", **keys})


def test_what_lives_before_training_is_not_walked_through_by_the_collector(place, tmp_path, monkeypatch):
    counts = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda *args, **kw: counts.append(gc.get_freeze_count()) or step(*args, **kw)
    )
    train(place, tmp_path / "a", max_steps=2)
    assert len(counts) == 2 and min(counts) > 10_000
    assert gc.get_freeze_count() == 0
    gc.freeze()
    mine = gc.get_freeze_count()
    train(place, tmp_path / "b", max_steps=1)
    assert gc.get_freeze_count() > 0.9 * mine, "somebody else's stay where they are"
    gc.unfreeze()


def test_sizes_in_bytes():
    for size in (1834747862, 8e9, "8GB"):
        config = make_config({"model": "m", "data": "d", "output": "o", "memory_budget": size})
        assert config.memory_budget == size
    assert [bytes_of(x) for x in ("10.4GB", "8GiB", " 512 mb", "1.5KiB", 1000, "7")] == [
        10_400_000_000, 8 << 30, 512_000_000, 1536, 1000, 7
    ]  # fmt: skip
    for wrong in ("", "GB", "-1GB", "0", "1XB", "nan", True):
        with pytest.raises(InputError, match="expected bytes"):
            bytes_of(wrong)
