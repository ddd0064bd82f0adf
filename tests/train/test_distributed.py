"""Several processes through torchrun: the same curve as one, one writer, exact resuming, one fate."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_steps
import small_runs
import torch
from safetensors.torch import load_file

from deltaw.core.errors import InputError
from deltaw.studies.job import resume
from deltaw.studies.job import run_training as train
from deltaw.train.trainer import DeltawTrainer

HERE = Path(__file__).parent
# 32 rows, so 4 steps an epoch: one process accumulates 4 micro-batches, two processes 2 each.
KEYS = {
    "r": 2, "dropout": 0.0, "epochs": 2, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 5e-3, "log_every": 1,
    "eval_every": 4, "save_every": 2, "dtype": "float32", "device": "cpu", "max_length": 48, "baselines": False,
}  # fmt: skip
#: Nothing is due for a while.
SKIPPED = {"log_every": 100, "eval_every": 100, "save_every": 100}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    small_runs.make_model(folder / "llama", "llama")
    small_runs.make_model(folder / "bert", "bert")
    small_runs.write_rows(folder / "rows.jsonl", small_runs.rows_of("label", 32))
    small_runs.write_rows(folder / "eval.jsonl", small_runs.rows_of("label", 6, seed=1))
    return folder


def keys_for(place, output, **changes):
    data = {"data": str(place / "rows.jsonl"), "eval_data": str(place / "eval.jsonl")}
    return KEYS | {"model": str(place / "llama"), "output": str(output)} | data | changes


def torchrun(root, jobs, *, gpus=False):
    """Runs the jobs on two processes; gives their logs."""
    (root / "jobs.json").write_text(json.dumps({"root": str(root), "jobs": jobs}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
        "--master_port", str(port), str(HERE / "processes.py"), str(root / "jobs.json"),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((root / f"log-{rank}.json").read_text()) for rank in (0, 1)]


def ranks_fall(place, output):
    """Keys of a run of AdaLoRA."""
    keys = keys_for(place, output, method="adalora", init_r=3, target_r=2, eval_every=8, save_every=8)
    del keys["r"]
    return keys


def assert_same_run(got, want, *, tolerance, rounded=False):
    """Curves and weights of two runs, up to the order of sums, or `rounded` to 16 bits by kernels that may differ.

    There of six rows' scores two may be one rounding apart, and their order is an eighth of the AUROC: of evaluations
    the loss alone is compared, and each tensor of weights as a whole.
    """
    curve, wanted = small_runs.logged(got), small_runs.logged(want)
    assert [line.keys() for line in curve] == [line.keys() for line in wanted]
    for line, other in zip(curve, wanted, strict=True):
        for key in line:
            if not (rounded and key.startswith("eval_") and "loss" not in key):
                assert line[key] == pytest.approx(other[key], rel=tolerance), (line["step"], key)
    mine, theirs = (load_file(next(run.glob("*/*model.safetensors"))) for run in (got, want))
    assert mine.keys() == theirs.keys()
    for key in theirs:
        if rounded:
            assert (mine[key] - theirs[key]).norm() <= tolerance * theirs[key].norm(), key
            continue
        # Adam divides by the gradient's own size: where that is rounding, the update is as well.
        torch.testing.assert_close(mine[key], theirs[key], rtol=tolerance, atol=KEYS["learning_rate"] * 1e-2, msg=key)
    assert small_runs.record(got)["cost"]["tokens"] == small_runs.record(want)["cost"]["tokens"]


def test_two_processes_are_one_with_twice_the_accumulation(place, tmp_path):
    whole = keys_for(place, tmp_path / "whole", dropout=0.2)
    half = whole | {"output": str(tmp_path / "half")}
    bert = {"model": str(place / "bert"), "task": "sequence-classification"}
    jobs = [
        {"keys": keys_for(place, tmp_path / "two")},
        {"keys": whole},
        {"keys": half, "stop_at": 5},
        {"resume": str(tmp_path / "half")},
        {"keys": keys_for(place, tmp_path / "nan"), "poison": [1, 3]},
        {"keys": keys_for(place, tmp_path / "two-bert", **bert)},
        {"keys": keys_for(place, tmp_path / "odd", batch_size=6, micro_batch_size=2)},
        {"keys": ranks_fall(place, tmp_path / "two-adalora")},
        # Its start is in buffers, which DDP sends to all before every forward pass.
        {"keys": keys_for(place, tmp_path / "two-pissa", init="pissa")},
        {"keys": keys_for(place, tmp_path / "skip", **SKIPPED), "poison": [1, 2], "fused": True},
    ]
    first, second = torchrun(tmp_path, jobs)

    train(**keys_for(place, tmp_path / "one"))
    assert_same_run(tmp_path / "two", tmp_path / "one", tolerance=1e-4)
    train(**keys_for(place, tmp_path / "one-bert", **bert))
    assert_same_run(tmp_path / "two-bert", tmp_path / "one-bert", tolerance=1e-4)
    train(**ranks_fall(place, tmp_path / "one-adalora"))
    assert_same_run(tmp_path / "two-adalora", tmp_path / "one-adalora", tolerance=1e-3)
    train(**keys_for(place, tmp_path / "one-pissa", init="pissa"))
    assert_same_run(tmp_path / "two-pissa", tmp_path / "one-pissa", tolerance=1e-4)
    assert not any("error" in log[job] for log in (first, second) for job in (0, 5, 7, 8))

    # The second process is silent, and writes its random state alone.
    assert first[0]["said"] and not any(job["said"] for job in second)
    for job in second:
        assert all(Path(file).name == "rng_state_1.pth" for file in job["written"]), job["written"]
    names = {file.name for file in (tmp_path / "one").iterdir()}
    assert {file.name for file in (tmp_path / "two").iterdir()} == names

    assert first[2]["error"] == second[2]["error"] == "Stopped: "
    assert "resuming from step 4" in first[3]["said"]
    assert small_runs.outcome(tmp_path / "half") == small_runs.outcome(tmp_path / "whole")

    assert first[4]["error"] == second[4]["error"]
    assert "NaN or infinite at step 4" in first[4]["error"] and "checkpoint-2" in first[4]["error"]
    assert small_runs.record(tmp_path / "nan")["status"] == "failed"
    for log in (first, second):
        assert "NaN or infinite at step 3" in log[9]["error"] and log[9]["steps"] == 4

    assert "6 is no multiple of micro_batch_size 2 x 2 processes" in first[6]["error"]
    assert not (tmp_path / "odd").exists()


def test_sharded_processes_are_one_too(place, tmp_path):
    whole = keys_for(place, tmp_path / "whole", dropout=0.2, sharding="fsdp2", early_stopping=9, eval_every=2)
    half = whole | {"output": str(tmp_path / "half")}
    full = {"method": "full", "learning_rate": 1e-3}
    # What is frozen of it stays whole, and what depends on data is the same in all processes.
    dora = {"method": "dora", "init": "eva", "freeze_a": True, "loraplus_lr_ratio": 4.0}
    full_keys = {key: value for key, value in KEYS.items() if key not in ("r", "dropout")}
    data = {"model": str(place / "llama"), "data": str(place / "rows.jsonl"), "eval_data": str(place / "eval.jsonl")}
    jobs = [
        {"keys": keys_for(place, tmp_path / "two", sharding="fsdp2")},
        {"keys": whole},
        {"keys": half, "stop_at": 5},
        {"resume": str(tmp_path / "half")},
        {"keys": full_keys | data | full | {"output": str(tmp_path / "two-full"), "sharding": "fsdp2"}},
        {"keys": keys_for(place, tmp_path / "two-dora", sharding="fsdp2", **dora)},
        {"keys": keys_for(place, tmp_path / "skip", sharding="fsdp2", **SKIPPED), "poison": [1, 2], "fused": True},
        {"keys": keys_for(place, tmp_path / "fused", sharding="fsdp2"), "fused": True},
    ]
    first, second = torchrun(tmp_path, jobs)
    errors = [job.get("error") for job in first]
    assert errors[:6] + errors[7:] == [None, None, "Stopped: ", None, None, None, None]
    for log in (first, second):
        for number, job in enumerate(log):
            assert job["share"] == pytest.approx(0.5, abs=0.05)
            # An adapter stays whole in every process, and what full fine-tuning trains does not.
            assert job["trained share"] == (pytest.approx(0.5, abs=0.05) if number == 4 else 1.0)
    for log in (first, second):
        assert "NaN or infinite at step 3" in log[6]["error"] and log[6]["steps"] == 4
    train(**keys_for(place, tmp_path / "one"))
    for name in ("two", "fused"):
        assert_same_run(tmp_path / name, tmp_path / "one", tolerance=1e-4)
    assert small_runs.outcome(tmp_path / "half") == small_runs.outcome(tmp_path / "whole")
    train(**full_keys | data | full | {"output": str(tmp_path / "one-full")})
    assert_same_run(tmp_path / "two-full", tmp_path / "one-full", tolerance=1e-4)
    train(**keys_for(place, tmp_path / "one-dora", **dora))
    assert_same_run(tmp_path / "two-dora", tmp_path / "one-dora", tolerance=1e-4)
    for job in second:
        assert not job["said"]
        assert all(Path(file).name == "rng_state_1.pth" for file in job["written"]), job["written"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_one(place, tmp_path):
    def on_gpus(name, **changes):
        return keys_for(place, tmp_path / name, device="cuda", dropout=0.0, **changes)

    given = on_gpus("", method="full", dtype="auto")
    full_keys = {key: value for key, value in given.items() if key not in ("r", "dropout")}
    full = full_keys | {"learning_rate": 1e-3}
    half = on_gpus("half", sharding="fsdp2", early_stopping=9, eval_every=2)
    jobs = [
        {"keys": on_gpus("two")},
        {"keys": on_gpus("sharded", sharding="fsdp2")},
        {"keys": on_gpus("sharded-bfloat16", sharding="fsdp2", dtype="bfloat16")},
        {"keys": half | {"output": str(tmp_path / "whole")}},
        {"keys": half, "stop_at": 5},
        {"resume": str(tmp_path / "half")},
        {"keys": full | {"output": str(tmp_path / "two-full")}},
        {"keys": full | {"output": str(tmp_path / "sharded-full"), "sharding": "fsdp2"}},
    ]
    first, second = torchrun(tmp_path, jobs, gpus=True)
    assert [job.get("error") for job in first] == [None] * 4 + ["Stopped: "] + [None] * 3
    shares = [1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 1.0, 0.5]
    assert [job["share"] for job in second] == pytest.approx(shares, abs=0.05)
    train(**on_gpus("one"))
    train(**on_gpus("one-bfloat16", dtype="bfloat16"))
    train(**full | {"output": str(tmp_path / "one-full")})
    for name in ("two", "sharded"):
        assert_same_run(tmp_path / name, tmp_path / "one", tolerance=1e-3)
    # One process multiplies by a group's weights joined, two by each that was gathered.
    assert_same_run(tmp_path / "sharded-bfloat16", tmp_path / "one-bfloat16", tolerance=2e-2, rounded=True)
    for name in ("two-full", "sharded-full"):
        assert_same_run(tmp_path / name, tmp_path / "one-full", tolerance=2e-2)
    assert small_runs.outcome(tmp_path / "half") == small_runs.outcome(tmp_path / "whole")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_on_a_gpu_resumes_exactly(place, tmp_path, monkeypatch, method):
    small_runs.make_model(tmp_path / "gpt2", "gpt2", dropout=0.1)
    keys = {"model": str(tmp_path / "gpt2"), "device": "cuda", "dtype": "auto"}
    keys |= {"dropout": 0.2} if method == "lora" else {"method": "full", "learning_rate": 1e-3}
    base = {key: value for key, value in keys_for(place, "").items() if key not in ("r", "dropout")} | keys
    train(**base | {"output": str(tmp_path / "whole")})
    own = DeltawTrainer.training_step

    def stopping(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return own(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(DeltawTrainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(**base | {"output": str(tmp_path / "run")})
    resume(tmp_path / "run")
    assert small_runs.outcome(tmp_path / "run") == small_runs.outcome(tmp_path / "whole")


def test_gradients_are_averaged_where_any_process_has_one(tmp_path):
    torch.multiprocessing.spawn(sharded_steps.averaged, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"averaged-{rank}.pt")
        for i, grad in enumerate(found):
            of = [1.0 + i + 10 * process for process in (0, 1) if i // 2 in (0, 1 + process)]
            if not of:
                assert grad is None
                continue
            assert grad.dtype == (torch.float32, torch.bfloat16)[i % 2] and grad.shape == (2, 3)
            assert (grad == sum(of) / 2).all()


def test_sharding_needs_processes(place, tmp_path):
    with pytest.raises(InputError, match="start several with torchrun"):
        train(**keys_for(place, tmp_path / "run", sharding="fsdp2"))
    assert not (tmp_path / "run").exists()
