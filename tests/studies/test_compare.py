"""Whole comparisons of tiny models: cells, their measurements, what is kept, and what the tables are made of."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import pytest
import small_runs
import torch
import yaml

from deltaw.checkpoint import load_adapter, load_model, load_tokenizer, merge
from deltaw.core.errors import InputError
from deltaw.data import Template, read_rows
from deltaw.evaluate.task import TaskEvaluator
from deltaw.studies import compare as told
from deltaw.studies.compare import compare, run_cells
from deltaw.studies.compare_cells import latency, run_cell, text_perplexity
from deltaw.studies.compare_plan import read_plan
from deltaw.train.config import make_config
from deltaw.train.trainer import DeltawTrainer

COMMON = {
    "epochs": 2, "batch_size": 8, "max_length": 96, "dtype": "float32", "device": "cpu", "eval_batch_size": 16,
    "log_every": 1,
}  # fmt: skip
METHODS = {"lora": {"r": 4, "lr": 0.03}, "full": {"learning_rate": 0.003}}
SENTENCE = "The sun rose over the hills and a river ran down to the sea. "


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    small_runs.make_model(folder / "llama", "llama", std=0.15)
    for seed, (name, layout) in enumerate((("a", "label"), ("b", "prompt"))):
        small_runs.write_rows(folder / f"{name}-train.jsonl", small_runs.rows_of(layout, 32, seed=seed))
        small_runs.write_rows(folder / f"{name}-test.jsonl", small_runs.rows_of(layout, 20, seed=seed + 10))
    small_runs.write_rows(folder / "transfer.jsonl", small_runs.rows_of("label", 12, seed=20))
    (folder / "general.txt").write_text(SENTENCE * 12)
    return folder


def entry(name, **more):
    return {"data": f"{name}-train.jsonl", "test_data": f"{name}-test.jsonl", **more}


def write(place, output, **changes):
    keys = {
        "model": "llama", "output": str(output), "seeds": [0, 1], "common": COMMON, "methods": METHODS,
        "data": {"a": entry("a", transfer={"t": "transfer.jsonl"})},
        "forgetting": {"text": "general.txt", "tokens": 400}, "latency": {"prompt": 8, "tokens": 3},
    }  # fmt: skip
    file = output.parent / "c.yaml"
    file.write_text(yaml.safe_dump({**keys, **changes}, sort_keys=False))
    return file


def here(plan, names, *, say):
    """The cells one by one in this process."""
    for name in names:
        run_cell(plan.output, name, say=say)
    return {}


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(told, "run_cells", here)


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """A finished comparison: its file and its folder."""
    output = tmp_path_factory.mktemp("finished") / "out"
    file = write(place, output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(told, "run_cells", here)
        compare(file, data_root=str(place), command="deltaw compare c.yaml")
    return file, output


def results(output):
    return json.loads((output / "results.json").read_text())


def group_of(found, label, data="a"):
    return next(group for group in found["groups"] if (group["label"], group["data"]) == (label, data))


def test_every_number_of_the_table_is_what_the_cells_left(place, finished):
    _, output = finished
    found = results(output)
    assert found["cells"] == {"all": 5, "done": 5} and not found["failed"] and not found["missing"]
    assert [group["label"] for group in found["groups"]] == ["base", "lora", "full"]
    for label in ("lora", "full"):
        group = group_of(found, label)
        runs = [small_runs.record(output / "cells" / "a" / label / f"seed-{seed}") for seed in (0, 1)]
        for name, summary in group["metrics"].items():
            values = [run["metrics"]["after"][name] for run in runs]
            assert summary["values"] == pytest.approx(values, rel=1e-5)
            assert summary["mean"] == pytest.approx(statistics.fmean(values), rel=1e-5)
            assert summary["sd"] == pytest.approx(statistics.stdev(values), rel=1e-3, abs=1e-6)
        assert group["cost"]["train_s"]["values"] == [run["cost"]["train_s"] for run in runs]
        assert group["cost"]["trainable_parameters"]["mean"] == runs[0]["method"]["trainable_parameters"]
        assert group["cost"]["peak_memory_bytes"]["mean"] > 1e8
        assert "before" not in runs[0]["metrics"] and "baselines" not in runs[0]["metrics"]
        folders = [output / "cells" / "a" / label / f"seed-{seed}" for seed in (0, 1)]
        losses = [[line["loss"] for line in small_runs.logged(folder)] for folder in folders]
        assert [loss for _, loss in found["curves"]["a"][label]] == pytest.approx(
            [statistics.fmean(pair) for pair in zip(*losses, strict=True)]
        )
    base = group_of(found, "base")
    assert base["seeds"] == [0] and base["cost"] == {} and "sd" not in base["metrics"]["accuracy"]
    assert set(group_of(found, "lora")["latency"]) == {"unmerged", "merged"}
    assert set(group_of(found, "full")["latency"]) == set(base["latency"]) == {"unmerged"}
    assert "checkpoints" not in {entry.name for entry in (output / "cells/a/lora/seed-0").iterdir()}


def test_forgetting_is_measured_with_the_saved_adapter_and_before_with_the_bare_base(place, finished):
    _, output = finished
    model = load_model(str(place / "llama"), dtype="float32", device="cpu")
    tokenizer = load_tokenizer(str(place / "llama"))
    rows = read_rows(str(place / "transfer.jsonl"))
    ask = TaskEvaluator("instruct", rows, tokenizer, labels=["bad", "good"], template=Template(), max_length=96)
    group = group_of(results(output), "lora")
    other, text = group["others"]["t"], group["text"]

    def general():
        """Each token after those before it in its window, one window at a time."""
        ids = tokenizer((place / "general.txt").read_text())["input_ids"][:400]
        nats = []
        for start in range(0, len(ids), 96):
            window = torch.tensor([ids[start : start + 96]])
            with torch.no_grad():
                logits = model(input_ids=window).logits[0, :-1].double().log_softmax(-1)
            nats += (-logits.gather(1, window[0, 1:, None])).flatten().tolist()
        return math.exp(statistics.fmean(nats))

    assert other["metric"] == "accuracy"
    assert (other["before"]["n"], text["before"]["n"]) == (1, 1)
    assert other["before"]["mean"] == ask(model).metrics["accuracy"]
    assert text["before"]["mean"] == pytest.approx(general(), rel=1e-4)
    for seed in (0, 1):
        load_adapter(model, output / f"cells/a/lora/seed-{seed}/adapter", name=f"seed-{seed}", active=True)
        assert other["after"]["values"][seed] == ask(model).metrics["accuracy"]
        assert text["after"]["values"][seed] == pytest.approx(general(), rel=1e-4)


def test_predictions_are_kept_row_by_row_and_give_the_metric_and_the_intervals(place, finished):
    _, output = finished
    found = results(output)
    labels = [row["label"] for row in map(json.loads, (place / "a-test.jsonl").read_text().splitlines())]
    rights = {}
    for label, seeds in (("base", [0]), ("lora", [0, 1]), ("full", [0, 1])):
        for seed in seeds:
            file = output / f"cells/a/{label}/seed-{seed}/predictions.jsonl"
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            assert [line["reference"] for line in lines] == labels
            assert [line["correct"] for line in lines] == [line["answer"] == line["reference"] for line in lines]
            rights[label, seed] = statistics.fmean(line["share"][0] for line in lines)
            values = group_of(found, label)["metrics"]["accuracy"]["values"]
            assert rights[label, seed] == pytest.approx(values[seeds.index(seed)])
    rows = {row["label"]: row for row in found["significance"]}
    assert set(rows) == {"base", "full"} and found["reference"] == "lora"
    mean = statistics.fmean(rights["full", seed] - rights["lora", seed] for seed in (0, 1))
    assert rows["full"]["difference"] == pytest.approx(mean)
    assert rows["full"]["low"] <= mean <= rows["full"]["high"] and 0 < rows["full"]["p"] <= 1
    mean = statistics.fmean(rights["base", 0] - rights["lora", seed] for seed in (0, 1))
    assert rows["base"]["difference"] == pytest.approx(mean) and rows["base"]["seeds"] == 2
    assert any("2 seeds are few" in note for note in found["notes"])


def test_finished_cells_are_kept_and_only_what_is_new_is_measured(place, finished, tmp_path, in_process, monkeypatch):
    file, output = finished
    kept = {path: path.stat().st_mtime_ns for path in output.glob("cells/*/*/*/run.json")}
    before = json.loads((output / "cells/a/lora/seed-0/cell.json").read_text())["measured"]
    asked = []
    monkeypatch.setattr(told, "run_cells", lambda plan, names, say: asked.extend(names) or here(plan, names, say=say))
    compare(file, data_root=str(place))
    assert asked == []
    # Another data set and another method: new cells, and new rows to be asked in the old ones.
    wider = write(place, output, data={"a": entry("a", transfer={"t": "transfer.jsonl"}), "b": entry("b")}, seeds=[0])
    compare(wider, data_root=str(place), only=["a/lora", "base"])
    assert asked == ["b/base/seed-0", "a/lora/seed-0"]
    after = json.loads((output / "cells/a/lora/seed-0/cell.json").read_text())["measured"]
    assert set(after) - set(before) == {"task:b"}
    assert {name: after[name] for name in before} == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    found = results(output)
    assert found["missing"] == ["b/lora/seed-0", "a/full/seed-0", "b/full/seed-0"]
    before = group_of(found, "lora")["others"]["b"]["before"]
    assert before["mean"] == group_of(found, "base", "b")["metrics"]["accuracy"]["mean"]
    assert group_of(found, "base")["others"].keys() == {"t", "b"}
    assert group_of(found, "base", "b")["others"].keys() == {"a", "t"}
    # As it was, so that other tests find it.
    write(place, output)


def test_a_cell_made_with_another_configuration_is_refused_until_it_is_begun_anew(place, finished, in_process):
    file, output = finished
    write(place, output, methods={**METHODS, "lora": {"r": 2, "lr": 0.03}})
    with pytest.raises(InputError, match="cell a/lora/seed-0 was made with r 4, and the comparison now says 2"):
        compare(file, data_root=str(place))
    (place / "other-train.jsonl").write_bytes((place / "b-train.jsonl").read_bytes())
    write(place, output, data={"a": entry("a") | {"data": "other-train.jsonl"}})
    with pytest.raises(InputError, match="made with other rows in data"):
        compare(file, data_root=str(place), report_only=False)
    # A method that the file lost for a while is still known when it is back.
    write(place, output, methods={"full": METHODS["full"]})
    compare(file, data_root=str(place), only=["base"])
    write(place, output, methods={**METHODS, "lora": {"r": 2, "lr": 0.03}})
    with pytest.raises(InputError, match="made with r 4"):
        compare(file, data_root=str(place))
    old = (output / "cells/a/lora/seed-1/run.json").read_bytes()
    write(place, output)
    compare(file, data_root=str(place), only=["lora/seed-1"], fresh=True)
    assert (output / "cells/a/lora/seed-1/run.json").read_bytes() != old
    assert results(output)["cells"]["done"] == 5
    with pytest.raises(InputError, match="--only nothing matches no cell"):
        compare(file, data_root=str(place), only=["nothing"])


def test_a_folder_of_something_else_and_one_in_use_are_refused(place, tmp_path, in_process):
    output = tmp_path / "out"
    file = write(place, output, methods={"base": {}}, forgetting=False, latency=False)
    output.mkdir()
    (output / "mine.txt").write_text("")
    with pytest.raises(InputError, match="is not empty and holds no comparison"):
        compare(file, data_root=str(place))
    (output / "mine.txt").unlink()
    with told._locked(output), pytest.raises(InputError, match="another process is at the comparison"):
        compare(file, data_root=str(place))
    assert compare(file, data_root=str(place))["cells"] == {"all": 1, "done": 1}


def test_a_cell_that_was_cut_short_ends_as_an_uninterrupted_one(place, finished, tmp_path, in_process, monkeypatch):
    _, whole = finished
    output = tmp_path / "out"
    file = write(place, output, seeds=[0], methods={"lora": METHODS["lora"] | {"save_every": 2}})
    left, own = 5, DeltawTrainer.training_step

    def dying(self, *args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return own(self, *args, **kwargs)

    monkeypatch.setattr(DeltawTrainer, "training_step", dying)
    with pytest.raises(KeyboardInterrupt):
        compare(file, data_root=str(place))
    cell = output / "cells/a/lora/seed-0"
    assert small_runs.record(cell)["status"] == "failed" and (cell / "checkpoints/checkpoint-4").is_dir()
    assert compare(file, data_root=str(place), report_only=True)["missing"] == ["a/lora/seed-0"]
    lines = []
    compare(file, data_root=str(place), say=lines.append)
    assert "resuming from step 4" in lines
    assert small_runs.adapter_bytes(cell) == small_runs.adapter_bytes(whole / "cells/a/lora/seed-0")
    assert (cell / "predictions.jsonl").read_bytes() == (whole / "cells/a/lora/seed-0/predictions.jsonl").read_bytes()


def test_a_run_that_died_before_its_first_record_is_begun_again(place, tmp_path, in_process):
    output = tmp_path / "out"
    file = write(place, output, seeds=[0], methods={"lora": METHODS["lora"]}, forgetting=False, latency=False)
    compare(file, data_root=str(place), only=["base"])
    cell = output / "cells/a/lora/seed-0"
    cell.mkdir(parents=True)
    (cell / "config.yaml").write_text("half")
    assert compare(file, data_root=str(place))["cells"]["done"] == 2


# Processes.


@pytest.fixture
def planned(place, tmp_path):
    """A plan of three bare and trained cells, whose processes are to be played."""
    file = write(place, tmp_path / "out", seeds=[0, 1], methods={"lora": {}, "base": {}})
    return read_plan(file, data_root=str(place))


def played(code):
    """A worker that runs `code` with the cell's name as `name`."""
    return [sys.executable, "-S", "-c", f"import os, sys, time; name = sys.argv[1]\n{code}"]


def test_a_failed_cell_is_told_of_and_the_others_finish(planned):
    names, lines = list(planned.cells), []
    code = "print('deltaw: the loss is not finite', file=sys.stderr); sys.exit(1)"
    worker = played(f"if name.endswith('seed-1'):\n {code}\nif 'base' in name: os.kill(os.getpid(), 9)")
    failed = run_cells(planned, names, say=lines.append, worker=worker)
    assert failed == {
        "a/base/seed-0": {"error": failed["a/base/seed-0"]["error"], "exit_code": -9},
        "a/lora/seed-1": {"error": "the loss is not finite", "exit_code": 1},
    }
    assert "ended by signal 9" in failed["a/base/seed-0"]["error"]
    assert any(line.startswith("[3/3]") for line in lines) and any("lora/seed-0: done" in line for line in lines)
    assert "not finite" in next((planned_folder(planned) / "logs").glob("*seed-1.log")).read_text()


def planned_folder(plan):
    return plan.folder(next(iter(plan.cells.values()))).parents[3]


def test_cells_run_side_by_side_and_divide_the_cores(planned, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(told.os, "sched_getaffinity", lambda pid: set(range(12)))
    code = f"open({str(tmp_path)!r} + '/' + name.replace('/', '-'), 'w').write(os.environ['OMP_NUM_THREADS'])"
    wait = f"\nwhile len([n for n in os.listdir({str(tmp_path)!r}) if n.startswith('a-')]) < 3: time.sleep(0.01)"
    plan = dataclasses.replace(planned, parallel=3)
    # Each one waits for all: run one after the other, they would wait for ever.
    assert run_cells(plan, list(plan.cells), worker=played(code + wait)) == {}
    assert {file.read_text() for file in tmp_path.glob("a-*")} == {"4"}


def test_an_interruption_ends_the_processes(planned, tmp_path):
    ready = tmp_path / "ready"
    worker = played(f"open({str(ready)!r}, 'w').close(); time.sleep(600)")

    def say(line):
        if "started" in line:
            return
        raise AssertionError(line)

    def interrupt():
        while not ready.exists():
            time.sleep(0.02)
        import _thread

        _thread.interrupt_main()

    threads = threading.Thread(target=interrupt)
    # Where the tests themselves were started in the background, interruptions are ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threads.start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_cells(planned, list(planned.cells), say=say, worker=worker)
    finally:
        signal.signal(signal.SIGINT, before)
    threads.join()
    assert time.monotonic() - began < 20


# Measurements.


def test_latency_is_the_model_s_own_and_leaves_it_as_it_was(place):
    model = load_model(str(place / "llama"), dtype="float32", device="cpu")
    settings = model.generation_config
    lengths = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = latency(model, batch=2, prompt=9, tokens=4)
    handle.remove()
    assert set(found) == {"prompt_s", "token_s"} and all(0 < value < 5 for value in found.values())
    # Eight passes over the prompt alone, then four generations of a prompt and three more tokens.
    assert lengths == [(2, 9)] * 8 + [(2, 9), (2, 1), (2, 1), (2, 1)] * 4
    assert model.generation_config is settings
    heads = load_model(str(place / "llama"), task="sequence-classification", labels=["a", "b"], device="cpu")
    assert set(latency(heads, batch=1, prompt=5, tokens=4)) == {"prompt_s"}


def test_general_text_in_rows_and_too_little_of_it(place, tmp_path):
    model = load_model(str(place / "llama"), dtype="float32", device="cpu")
    tokenizer = load_tokenizer(str(place / "llama"))
    config = make_config({"model": "x", "max_length": 50})
    rows = small_runs.write_rows(tmp_path / "rows.jsonl", [{"text": SENTENCE.strip()}] * 3)
    (tmp_path / "plain.txt").write_text("\n".join([SENTENCE.strip()] * 3))
    first, second = (
        text_perplexity(model, tokenizer, {"text": str(file), "tokens": 120}, config)
        for file in (rows, tmp_path / "plain.txt")
    )
    assert first == second and first["tokens"] == 120 - 3
    (tmp_path / "empty.txt").write_text("a")
    with pytest.raises(InputError, match="the general text has 1 tokens"):
        text_perplexity(model, tokenizer, {"text": str(tmp_path / "empty.txt"), "tokens": 9}, config)


ASKED = {
    "labels": ("llama", "label", "instruct", {"labels": ["bad", "good"]}, "accuracy"),
    "classes": ("llama", "label", "sequence-classification", {"labels": ["bad", "good"]}, "accuracy"),
    "tags": ("llama", "tags", "token-classification", {"labels": ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]}, "f1"),
    "text": ("llama", "text", "causal-lm", {}, "loss"),
    "answers": ("llama", "prompt", "instruct", {"max_new_tokens": 2}, "exact_match"),
    "t5": ("t5", "prompt", "instruct", {}, "loss"),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_main_metric_is_the_ratio_of_its_rows_shares(place, tmp_path, name):
    family, layout, task, keys, main = ASKED[name]
    folder = place / family
    if not folder.exists():
        small_runs.make_model(folder, family, std=0.15)
    names = keys.get("labels") if task.endswith("classification") else None
    model = load_model(str(folder), task=task, dtype="float32", device="cpu", labels=names)
    rows = read_rows(small_runs.write_rows(tmp_path / "rows.jsonl", small_runs.rows_of(layout, 15)))
    tokenizer = load_tokenizer(str(folder))
    found = TaskEvaluator(task, rows, tokenizer, max_length=64, batch_size=4, encoder_decoder=family == "t5", **keys)(
        model
    )
    assert found.main == main and len(found.shares) == 15
    above, below = (sum(share[side] for share in found.shares) for side in (0, 1))
    assert found.metrics[main] == pytest.approx(above / below if below else 0.0, rel=1e-6)
    if main == "loss":
        alone = TaskEvaluator(
            task, dataclasses.replace(rows, rows=rows.rows[3:4]), tokenizer, encoder_decoder=family == "t5"
        )(model)
        assert found.shares[3][0] / found.shares[3][1] == pytest.approx(alone.metrics["loss"], rel=1e-4)


def test_a_merged_cell_is_the_adapter_s_model(place, finished):
    _, output = finished
    model = load_model(str(place / "llama"), dtype="float32", device="cpu")
    load_adapter(model, output / "cells/a/lora/seed-0/adapter", active=True)
    ids = torch.tensor([[5, 9, 20, 7]])
    with torch.no_grad():
        beside = model(input_ids=ids).logits
        merge(model, mode="requantize", keep_original=False)
        assert torch.allclose(model(input_ids=ids).logits, beside, atol=1e-5)


def test_the_shipped_comparison_runs_on_rows_of_its_names(place, tmp_path, in_process):
    shipped = Path(__file__).parents[2] / "examples" / "compare-financial.yaml"
    keys = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    keys |= {"model": str(place / "llama"), "output": str(tmp_path / "out")}
    # What comes with the package index in real life.
    keys["forgetting"]["text"] = str(place / "general.txt")
    for name, count in (("tfns/train", 32), ("tfns/test", 8), ("ner/train", 32), ("ner/test", 8), ("fpb/test", 8)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        small_runs.write_rows(tmp_path / f"{name}.jsonl", small_runs.rows_of("prompt", count, seed=count))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    found = compare(tmp_path / "c.yaml", only=["tfns/base/*", "tfns/lora/seed-0"])
    assert found["cells"] == {"all": 2 + 2 * 3 * (len(keys["methods"]) - 1), "done": 2}
    assert group_of(found, "lora", "tfns")["others"].keys() == {"fpb", "ner"}
    assert [row["label"] for row in found["significance"]] == ["base"]
