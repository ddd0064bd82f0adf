"""A run that dies and is resumed gives what an uninterrupted one gives, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal

import dying
import pytest
import small_runs

from deltaw.core.errors import InputError
from deltaw.studies.job import resume
from deltaw.studies.job import run_training as train
from deltaw.train.trainer import DeltawTrainer

# 11 micro-batches an epoch, so 6 steps of which the last has one micro-batch; 12 steps in all.
KEYS = {
    "r": 2, "dropout": 0.2, "epochs": 2, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 5e-3,
    "warmup_ratio": 0.2, "weight_decay": 0.01, "log_every": 5, "eval_every": 4, "save_every": 2, "keep_checkpoints": 1,
    "dtype": "float32", "device": "cpu", "max_length": 48,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    for family in ("llama", "gpt2", "bert"):
        small_runs.make_model(folder / family, family, dropout=0.1)
    small_runs.write_rows(folder / "label.jsonl", small_runs.rows_of("label", 22))
    small_runs.write_rows(folder / "text.jsonl", small_runs.rows_of("text", 22))
    small_runs.write_rows(folder / "label-eval.jsonl", small_runs.rows_of("label", 6, seed=1))
    small_runs.write_rows(folder / "text-eval.jsonl", small_runs.rows_of("text", 6, seed=1))
    return folder


def keys_for(place, output, *, family="llama", rows="label", **changes):
    given = {
        "model": str(place / family), "data": str(place / f"{rows}.jsonl"),
        "eval_data": str(place / f"{rows}-eval.jsonl"), "output": str(output),
    }  # fmt: skip
    return KEYS | given | changes


@pytest.fixture(scope="module")
def processes():
    """Fresh processes that have imported what takes long, and have computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.trainer", "deltaw.studies.job", "sklearn.linear_model"])

    def run(target, *args):
        process = context.Process(target=target, args=args)
        process.start()
        process.join(120)
        assert process.exitcode is not None, "the process hangs"
        return process.exitcode

    return run


@pytest.fixture(scope="module")
def whole(place, processes):
    assert processes(dying.train_here, keys_for(place, place / "whole")) == 0
    return small_runs.outcome(place / "whole")


DRAW = random.Random(7)
MOMENTS = [
    ("micro-batch", 1),
    ("micro-batch", DRAW.randint(5, 10)),
    ("micro-batch", DRAW.randint(11, 22)),
    ("evaluating", 1),
    ("writing", 1),
    ("writing", 3),
    ("written", 2),
    ("renamed", 2),
    ("forgetting", 2),
    ("ended", 1),
    ("saved", 1),
    ("reporting", 1),
]


@pytest.mark.parametrize(("moment", "count"), MOMENTS, ids=lambda value: str(value))
def test_killed_and_resumed(place, processes, whole, tmp_path, moment, count):
    run = tmp_path / "run"
    assert processes(dying.train_and_die, keys_for(place, run), moment, count) == -signal.SIGKILL
    died = small_runs.record(run)
    assert died["status"] == ("done" if moment == "reporting" else "running")
    assert died["metrics"]["before"] == whole[2]["before"]
    assert processes(dying.resume_here, str(run)) == 0
    assert small_runs.outcome(run) == whole
    assert (run / "report.html").exists()
    left = sorted(child.name for child in (run / "checkpoints").iterdir())
    assert left == ["checkpoint-12"]


def test_killed_again_and_again(place, processes, whole, tmp_path):
    run = tmp_path / "run"
    assert processes(dying.train_and_die, keys_for(place, run), "micro-batch", 9) == -signal.SIGKILL
    for moment, count in [("micro-batch", 2), ("micro-batch", 5), ("writing", 2), ("evaluating", 1)]:
        assert processes(dying.resume_and_die, str(run), moment, count) == -signal.SIGKILL
    assert processes(dying.resume_here, str(run)) == 0
    assert small_runs.outcome(run) == whole


def test_killed_in_an_epochs_evaluation(place, processes, tmp_path):
    """Where checkpoints come by steps and evaluations by epochs, step 6 has both; neither may be lost."""
    changes = {"eval_every": 0, "save_every": 3}
    assert processes(dying.train_here, keys_for(place, tmp_path / "whole", **changes)) == 0
    for moment, count in [("evaluating", 1), ("renamed", 2), ("micro-batch", 12)]:
        run = tmp_path / moment
        assert processes(dying.train_and_die, keys_for(place, run, **changes), moment, count) == -signal.SIGKILL
        assert processes(dying.resume_here, str(run)) == 0
        assert small_runs.outcome(run) == small_runs.outcome(tmp_path / "whole")


def test_the_same_twice_and_another_seed(place, processes, whole, tmp_path):
    assert processes(dying.train_here, keys_for(place, tmp_path / "again")) == 0
    assert small_runs.outcome(tmp_path / "again") == whole
    assert processes(dying.train_here, keys_for(place, tmp_path / "other", seed=1)) == 0
    other = small_runs.outcome(tmp_path / "other")
    assert other[0] != whole[0] and other[1] != whole[1]


class Stopped(BaseException):
    """Stands for the death of the process."""


CASES = {
    "at an epoch's end": (dict(save_every=3), 11),
    "once an epoch": (dict(save_every=0, eval_every=0), 15),
    "after one step": (dict(save_every=1), 2),
    "full": (dict(method="full", r=None, dropout=None, learning_rate=1e-3), 9),
    "the model's own dropout": (dict(family="gpt2"), 13),
    "masked-lm": (dict(family="bert", task="masked-lm", rows="text"), 14),
    "packing": (dict(rows="text", task="causal-lm", pack=True, max_length=64, batch_size=2, micro_batch_size=1), 5),
    "gradient checkpointing": (dict(gradient_checkpointing=True), 9),
    "max_steps inside an epoch": (dict(max_steps=8, save_every=3), 14),
}


@pytest.mark.parametrize("name", CASES)
def test_resumed_in_every_setting(place, tmp_path, monkeypatch, name):
    changes, micro_batches = CASES[name]
    keys = {key: value for key, value in keys_for(place, "", **changes).items() if value is not None}
    train(**keys | {"output": str(tmp_path / "whole")})
    own, left = DeltawTrainer.training_step, micro_batches

    def stopping(self, *args, **kwargs):
        nonlocal left
        left -= 1
        if left < 0:
            raise Stopped
        return own(self, *args, **kwargs)

    monkeypatch.setattr(DeltawTrainer, "training_step", stopping)
    with pytest.raises(Stopped):
        train(**keys | {"output": str(tmp_path / "run")})
    assert small_runs.record(tmp_path / "run")["status"] == "failed"
    monkeypatch.undo()
    lines = []
    resume(tmp_path / "run", say=lines.append)
    assert small_runs.outcome(tmp_path / "run") == small_runs.outcome(tmp_path / "whole")
    assert any("resuming from step" in line for line in lines)


def test_masks_differ_between_epochs(place, tmp_path):
    """Else the resumed masks above could be right by accident."""
    import torch

    from deltaw.data import read_rows
    from deltaw.data.encode import encode
    from deltaw.evaluate.task import masking_collator

    tokenizer = small_runs.word_tokenizer(encoder=True)
    rows = encode(read_rows(str(place / "text.jsonl")), tokenizer, "masked-lm", max_length=48)
    collator = masking_collator(tokenizer, 0)
    first = collator(rows.examples)
    collator.set_epoch(1)
    assert not torch.equal(first["labels"], collator(rows.examples)["labels"])


def test_a_finished_run_is_left_alone(place, tmp_path):
    run = train(**keys_for(place, tmp_path / "run", max_steps=2))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    lines = []
    resume(run, say=lines.append)
    assert any("done already" in line for line in lines)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_fresh_run_does_not_overwrite_one(place, tmp_path):
    run = train(**keys_for(place, tmp_path / "run", max_steps=1))
    with pytest.raises(InputError, match="holds a run already"):
        train(**keys_for(place, tmp_path / "run"))
    with pytest.raises(InputError, match="no run at"):
        resume(tmp_path / "nothing")
    (run / "run.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        resume(run)


def test_a_cut_line_is_forgotten(place, tmp_path, monkeypatch):
    """The process can die while it writes a line."""
    keys = keys_for(place, tmp_path / "whole")
    train(**keys)
    own = DeltawTrainer.training_step

    def stopping(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise Stopped
        return own(self, *args, **kwargs)

    monkeypatch.setattr(DeltawTrainer, "training_step", stopping)
    with pytest.raises(Stopped):
        train(**keys | {"output": str(tmp_path / "run")})
    monkeypatch.undo()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "epoch": 0.8, "loss": 1.0})[:-4])
    resume(tmp_path / "run")
    assert small_runs.outcome(tmp_path / "run") == small_runs.outcome(tmp_path / "whole")
