"""Whole runs of the baselines and of NEFTune: they learn, are reported, and go on exactly where they were cut off."""

import json

import pytest
import small_runs
import torch
from safetensors.torch import load_file

import deltaw as dw
from deltaw.checkpoint import load_model
from deltaw.core.errors import InputError
from deltaw.methods.host import book_of, parts_of
from deltaw.studies.job import resume
from deltaw.studies.job import run_training as train
from deltaw.train.trainer import DeltawTrainer

KEYS = {
    "epochs": 2, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 5e-3, "log_every": 1, "dtype": "float32",
    "device": "cpu", "max_length": 48, "eval_every": 4, "save_every": 2, "keep_checkpoints": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    for family in ("llama", "bert", "gpt2", "t5"):
        small_runs.make_model(folder / family, family, std=0.1, dropout=0.1 if family == "gpt2" else 0.0)
    small_runs.write_rows(folder / "label.jsonl", small_runs.rows_of("label", 22))
    small_runs.write_rows(folder / "prompt.jsonl", small_runs.rows_of("prompt", 22))
    small_runs.write_rows(folder / "label-eval.jsonl", small_runs.rows_of("label", 6, seed=1))
    small_runs.write_rows(folder / "prompt-eval.jsonl", small_runs.rows_of("prompt", 6, seed=1))
    return folder


def keys_for(place, output, family, rows="label", **changes):
    given = {
        "model": str(place / family), "data": str(place / f"{rows}.jsonl"),
        "eval_data": str(place / f"{rows}-eval.jsonl"), "output": str(output),
    }  # fmt: skip
    return KEYS | given | changes


#: Model and keys; a causal model is asked for the label (instruct), an encoder gets a new head for it.
RUNS = {
    "bitfit-llama": ("llama", {"method": "bitfit", "add_missing": True}),
    "bitfit-bert": ("bert", {"method": "bitfit"}),
    "bottleneck-llama": ("llama", {"method": "bottleneck", "bottleneck_dim": 8, "dropout": 0.2}),
    "bottleneck-bert": ("bert", {"method": "bottleneck", "reduction_factor": 4}),
    "bottleneck-t5": ("t5", {"method": "bottleneck", "bottleneck_dim": 8, "rows": "prompt"}),
    "prefix-llama": ("llama", {"method": "prefix", "num_virtual_tokens": 5, "learning_rate": 2e-2}),
    "prefix-gpt2": ("gpt2", {"method": "prefix", "num_virtual_tokens": 5, "learning_rate": 0.2, "max_new_tokens": 3}),
    "prefix-bert": ("bert", {"method": "prefix", "num_virtual_tokens": 5}),
    "prefix-on-four-bits": ("llama", {"method": "prefix", "num_virtual_tokens": 5, "quantize": "nf4"}),
    "neftune-lora": ("gpt2", {"r": 2, "dropout": 0.1, "neftune_alpha": 5.0}),
    "neftune-full": ("llama", {"method": "full", "neftune_alpha": 5.0, "learning_rate": 1e-3}),
    "neftune-bert": ("bert", {"r": 2, "neftune_alpha": 5.0}),
    "neftune-t5": ("t5", {"r": 2, "neftune_alpha": 5.0, "rows": "prompt"}),
}
#: Those cut off in the middle of an epoch and between two checkpoints.
RESUMED = ["bitfit-bert", "bottleneck-llama", "prefix-gpt2", "neftune-lora", "neftune-full"]


@pytest.fixture(scope="module")
def whole(place):
    """Each run, made once."""
    made = {}

    def run(key):
        if key not in made:
            family, keys = RUNS[key]
            made[key] = train(**keys_for(place, place / key, family, **keys))
        return made[key]

    return run


@pytest.mark.parametrize("key", RUNS)
def test_a_run_learns_and_is_reported(whole, key):
    run = whole(key)
    record = small_runs.record(run)
    assert record["status"] == "done"
    losses = [line["loss"] for line in small_runs.logged(run) if "loss" in line]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
    before, after = record["metrics"]["before"], record["metrics"]["after"]
    assert before.keys() == after.keys() and before != after
    wanted = RUNS[key][1].get("method", "lora")
    assert record["method"]["name"] == wanted
    page = (run / "report.html").read_text()
    assert f"{record['method']['trainable_parameters']:,}" in page
    if wanted != "full":
        assert sum(site["parameters"] for site in record["method"]["sites"]) == record["method"]["trainable_parameters"]


@pytest.mark.parametrize("key", [key for key in RUNS if "full" not in key and "four" not in key])
def test_what_a_run_wrote_is_what_it_measured(whole, key):
    """The folder goes onto a fresh model, and a classifier's answers there are those that were counted."""
    run = whole(key)
    record = small_runs.record(run)
    task = record["task"]
    labels = record["metrics"].get("labels") if task == "sequence-classification" else None
    model = load_model(record["model"]["source"], task=task, dtype="float32", device="cpu", labels=labels)
    dw.load_adapter(model, run)
    assert dw.adapter_names(model) == [run.name] and book_of(model).beside == {}
    if key.startswith("neftune"):
        kinds = {type(part).__name__ for _, _, part in parts_of(model, run.name)}
        assert kinds <= {"LoraPart", "ModuleCopy"}
    if task == "sequence-classification":
        from deltaw.checkpoint import load_tokenizer

        tokenizer = load_tokenizer(record["model"]["source"])
        rows = small_runs.rows_of("label", 6, seed=1)
        right = 0
        for row in rows:
            with torch.no_grad():
                logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
            right += labels[int(logits.argmax())] == row["label"]
        assert right / len(rows) == pytest.approx(record["metrics"]["after"]["accuracy"])


@pytest.mark.parametrize("key", RESUMED)
@pytest.mark.parametrize("micro_batches", [3, 15])
def test_cut_off_and_resumed_it_is_the_same_run(place, whole, tmp_path, monkeypatch, key, micro_batches):
    expected = small_runs.outcome(whole(key))
    family, keys = RUNS[key]
    own, left = DeltawTrainer.training_step, micro_batches

    def step(self, *args, **kwargs):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return own(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DeltawTrainer, "training_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(**keys_for(place, tmp_path / "run", family, **keys))
    assert small_runs.record(tmp_path / "run")["status"] == "failed"
    # Whatever is drawn in between must not matter.
    torch.rand(7)
    resume(tmp_path / "run")
    assert small_runs.outcome(tmp_path / "run") == expected


def test_noise_changes_the_training_and_nothing_around_it(place, whole, tmp_path):
    noisy, quiet = whole("neftune-lora"), tmp_path / "quiet"
    train(**keys_for(place, quiet, "gpt2", **RUNS["neftune-lora"][1] | {"neftune_alpha": 0.0}))
    first, second = (small_runs.record(run)["metrics"] for run in (noisy, quiet))
    assert first["before"] == second["before"] and first["after"] != second["after"]
    assert small_runs.logged(noisy)[0]["loss"] != small_runs.logged(quiet)[0]["loss"]
    configs = [json.loads((run / "adapter" / "adapter_config.json").read_text()) for run in (noisy, quiet)]
    assert configs[0] == configs[1]
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (noisy, quiet))
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in second.items()}


@pytest.mark.parametrize("more", [{"pack": True}, {"gradient_checkpointing": True}], ids=["packed", "recomputed"])
def test_noise_goes_with_packing_and_recomputation(place, tmp_path, more):
    run = train(**keys_for(place, tmp_path / "run", "llama", "prompt", r=2, neftune_alpha=5.0, **more))
    assert small_runs.record(run)["status"] == "done"
    assert all(line["loss"] > 0 for line in small_runs.logged(run) if "loss" in line)


def test_what_methods_do_not_go_with_is_told_before_anything_is_written(place, tmp_path):
    for key in ("pack", "gradient_checkpointing"):
        with pytest.raises(InputError, match=f"method prefix does not go with {key}, as .*: leave it out"):
            train(**keys_for(place, tmp_path / key, "llama", "prompt", method="prefix", **{key: True}))
        assert not (tmp_path / key).exists()
    with pytest.raises(InputError, match="has no bias to train: give add_missing=True"):
        train(**keys_for(place, tmp_path / "none", "llama", method="bitfit"))
