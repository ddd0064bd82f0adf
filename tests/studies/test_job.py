"""Whole jobs: every task on the models that suit it learns, leaves a complete folder, and loads again."""

from __future__ import annotations

import json

import pytest
import small_runs
import torch
import yaml
from safetensors.torch import load_file

import deltaw as dw
from deltaw.checkpoint.model_files import model_facts
from deltaw.core.errors import InputError
from deltaw.evaluate.task import TaskEvaluator
from deltaw.report import write_report
from deltaw.studies.job import resume, run_job
from deltaw.studies.job import run_training as train
from deltaw.studies.rows import run_rows
from deltaw.train.config import make_config

KEYS = {
    "epochs": 6, "batch_size": 8, "micro_batch_size": 8, "held_out": 16, "dtype": "float32", "device": "cpu",
    "max_length": 64, "eval_batch_size": 16,
}  # fmt: skip
LORA = {"r": 8, "learning_rate": 3e-2}
FULL = {"method": "full", "learning_rate": 3e-3}
LONG = {"epochs": 14}
CHAT = {"chat_template": "chatml"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    for family in ("llama", "bert", "t5"):
        small_runs.make_model(folder / family, family, std=0.15)
    for layout in ("label", "text", "tags", "prompt", "chat", "entity"):
        small_runs.write_rows(folder / f"{layout}.jsonl", small_runs.rows_of(layout, 80))
    return folder


def config_for(place, output, family, rows, **changes):
    given = {"model": str(place / family), "data": str(place / f"{rows}.jsonl"), "output": str(output)}
    return make_config(KEYS | given | changes)


# Model, rows, task, what it takes, and the metric that has to get better.
CASES = {
    "llama text": ("llama", "text", "causal-lm", LORA, "loss"),
    "llama text full": ("llama", "text", "causal-lm", FULL, "loss"),
    "llama prompts": ("llama", "prompt", "instruct", LORA, "accuracy"),
    "llama prompts, generated": ("llama", "prompt", "instruct", LORA | {"max_new_tokens": 6}, "exact_match"),
    "llama conversations": ("llama", "chat", "instruct", LORA | CHAT, "loss"),
    "llama labels": ("llama", "label", "instruct", LORA | LONG, "accuracy"),
    "llama labels full": ("llama", "label", "instruct", FULL | LONG, "accuracy"),
    "t5 prompts": ("t5", "prompt", "instruct", LORA, "accuracy"),
    "llama classes": ("llama", "label", "sequence-classification", LORA, "accuracy"),
    "bert classes": ("bert", "label", "sequence-classification", LORA, "accuracy"),
    "bert classes full": ("bert", "prompt", "sequence-classification", FULL, "accuracy"),
    "t5 classes": ("t5", "label", "sequence-classification", LORA, "accuracy"),
    "llama tags": ("llama", "tags", "token-classification", LORA, "f1"),
    "bert tags": ("bert", "tags", "token-classification", LORA, "f1"),
    "bert tags full": ("bert", "tags", "token-classification", FULL, "f1"),
    "bert entities": ("bert", "entity", "token-classification", LORA | {"layout": "entity"}, "f1"),
    "bert masked": ("bert", "text", "masked-lm", LORA, "loss"),
    "bert masked full": ("bert", "text", "masked-lm", FULL, "loss"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_task_from_rows_to_report(place, tmp_path, name):
    family, layout, task, changes, metric = CASES[name]
    config = config_for(place, tmp_path / "run", family, layout, task=task, **changes)
    lines = []
    run = run_job(config, command="test", say=lines.append)
    record = json.loads((run.path / "run.json").read_text())
    assert record["status"] == "done" and record["task"] == task
    before, after = record["metrics"]["before"], record["metrics"]["after"]
    if metric == "loss":
        assert after["loss"] < 0.8 * before["loss"]
    elif metric == "f1":
        assert after["f1"] > 0.9 > before["f1"]
    elif metric == "exact_match":
        assert after["exact_match"] > 0.9 > before["exact_match"] and after["accuracy"] > 0.9
    else:
        assert after["accuracy"] > 0.9 > record["metrics"]["baselines"]["majority"]["accuracy"]
        assert record["metrics"]["labels"] == ["bad", "good"]
        confusion = record["metrics"]["confusion"]["after"]
        assert sum(map(sum, confusion)) == record["data"]["eval"]["rows"]
    print(name, before, after)
    complete(run.path, config, record)
    loads_again(run.path, config, after)


def complete(run, config, record):
    """Every file of a run folder, with what belongs into it."""
    full = config.method == "full"
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept["task"] == config.task and kept["learning_rate"] == config.learning_rate
    names = {child.name for child in run.iterdir()}
    wanted = {"config.yaml", "run.json", "metrics.jsonl", "examples.jsonl", "report.html", "checkpoints"}
    assert wanted | {"model" if full else "adapter"} == names
    html = (run / "report.html").read_text()
    assert "<html" in html and config.model in html
    write_report(run)
    assert (run / "report.html").read_text() == html
    assert record["cost"]["steps"] == max(line["step"] for line in small_runs.logged(run))
    assert record["cost"]["tokens"] > 0 and record["cost"]["train_s"] > 0
    method = record["method"]
    assert method["name"] == config.method and 0 < method["share"] <= 1
    if not full:
        tensors = load_file(run / "adapter" / "adapter_model.safetensors")
        assert sum(tensor.numel() for tensor in tensors.values()) == method["trainable_parameters"]
        assert sum(site["parameters"] for site in method["sites"]) == method["trainable_parameters"]
    shown = [json.loads(line) for line in (run / "examples.jsonl").read_text().splitlines()]
    # Masked words are no answers to show.
    assert len(shown) == (0 if config.task == "masked-lm" else 10)
    assert all({"prompt", "reference", "before", "after"} == set(row) for row in shown)


def loads_again(run, config, after):
    """A fresh model with the folder's adapter (or weights) measures exactly the same."""
    rows = run_rows(config, generative=model_facts(config.model).generative)
    full = config.method == "full"
    model = dw.load_model(
        run / "model" if full else config.model,
        task=rows.task,
        labels=rows.labels if rows.task.endswith("classification") else None,
        dtype="float32",
        device="cpu",
        seed=99,
    )
    if not full:
        dw.load_adapter(model, run)
    evaluator = TaskEvaluator(
        rows.task,
        rows.test,
        dw.load_tokenizer(config.model),
        labels=rows.labels,
        template=config.rows_template,
        max_length=config.max_length,
        batch_size=config.eval_batch_size,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        encoder_decoder=model.config.is_encoder_decoder,
    )
    assert evaluator(model).metrics == after


# What a configuration can get wrong, and what goes on from another run.


def test_a_label_outside_the_set_names_its_line(place, tmp_path):
    bad = small_runs.write_rows(
        tmp_path / "eval.jsonl", [{"text": "aa", "label": "good"}, {"text": "bb", "label": "god"}]
    )
    for family, task in (("llama", "instruct"), ("bert", "sequence-classification")):
        config = config_for(place, tmp_path / "run", family, "label", task=task, held_out=None, eval_data=bad, **LORA)
        with pytest.raises(
            InputError, match=r"eval\.jsonl:2: label 'god' is not one of bad, good; did you mean 'good'"
        ):
            run_job(config, command="", say=print)
        assert not (tmp_path / "run").exists()


def test_a_label_that_only_held_out_rows_have(place, tmp_path):
    rows = small_runs.rows_of("label", 20)
    for seed in range(20):
        data = small_runs.write_rows(tmp_path / "rows.jsonl", [*rows, {"text": "dd ee", "label": "odd"}])
        config = config_for(
            place, tmp_path / "run", "bert", "label", **LORA | {"data": data, "held_out": 20, "seed": seed}
        )
        found = run_rows(config, generative=False)
        assert found.labels == ["bad", "good", "odd"]
        if all(row.label != "odd" for row in found.train):
            return
    raise AssertionError("no seed held the rare label out")


def test_settings_that_contradict_each_other(place, tmp_path):
    cases = [
        ("t5", "text", {"task": "causal-lm"}, "is an encoder-decoder and has no causal-lm"),
        ("t5", "prompt", {"pack": True}, "is an encoder-decoder, whose rows cannot be packed"),
        ("llama", "label", {"eval_data": str(place / "prompt.jsonl")}, "got held_out 16 and eval_data"),
        ("llama", "label", {"max_length": 300}, "max_length is 300 and .* has 256 positions: choose at most 256"),
        ("llama", "chat", {"task": "sequence-classification"}, "needs a small set of labels"),
        ("bert", "label", {"task": "instruct"}, "is an encoder and has no instruct"),
    ]
    for number, (family, rows, changes, message) in enumerate(cases):
        with pytest.raises(InputError, match=message):
            run_job(config_for(place, tmp_path / str(number), family, rows, **LORA | changes), command="", say=print)
        assert not (tmp_path / str(number)).exists()


def test_going_on_from_an_adapter(place, tmp_path):
    first = run_job(
        config_for(place, tmp_path / "first", "bert", "label", **LORA | {"epochs": 2}), command="", say=print
    )
    keys = {"adapter": str(first.path), "epochs": 1, "learning_rate": 1e-3}
    second = run_job(config_for(place, tmp_path / "second", "bert", "label", **keys), command="", say=print)
    assert second.record["metrics"]["before"] == first.record["metrics"]["after"]
    assert second.record["method"]["config"]["r"] == 8
    tensors = [load_file(run.path / "adapter" / "adapter_model.safetensors") for run in (first, second)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(not torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    with pytest.raises(InputError, match="method full trains the model itself"):
        run_job(config_for(place, tmp_path / "third", "bert", "label", **keys | FULL), command="", say=print)


def test_a_failed_run_keeps_what_was_measured(place, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("the disk\nis gone")

    monkeypatch.setattr("deltaw.studies.job.fit", fail)
    with pytest.raises(RuntimeError):
        run_job(config_for(place, tmp_path / "run", "llama", "label", **LORA), command="", say=print)
    record = small_runs.record(tmp_path / "run")
    assert record["status"] == "failed" and record["error"] == "the disk is gone"
    assert 0 <= record["metrics"]["before"]["accuracy"] <= 1
    write_report(tmp_path / "run")
    assert "the disk is gone" in (tmp_path / "run" / "report.html").read_text()


def test_every_process_has_its_device(monkeypatch):
    from deltaw.train.loop import is_first_process, local_device

    assert local_device("auto") == "auto" and is_first_process()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device("auto") == local_device("cuda") == "cuda:1"
    assert local_device("cpu") == "cpu" and not is_first_process()


def test_keys_instead_of_a_configuration(place, tmp_path):
    lines = []
    path = train(
        model=str(place / "llama"), data=str(place / "label.jsonl"), output=str(tmp_path / "run"), r=2, max_steps=1,
        max_length=64, device="cpu", dtype="float32", say=lines.append,
    )  # fmt: skip
    assert path == tmp_path / "run" and any("step 1/1" in line for line in lines)
    assert any("4 rows" in line or "72 rows" in line for line in lines)
    again = []
    assert resume(path, say=again.append).record["status"] == "done" and "is done already" in again[0]
