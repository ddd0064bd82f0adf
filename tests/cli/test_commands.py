"""train, evaluate, merge, report and models, end to end on a tiny model."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import transformers
import yaml
from command_line import QUICK, digest, process, tiny_model

from deltaw.models.embedded import MINILM, SMOLLM2


def record(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Tables are laid out for the terminal's width, which a test's process may inherit."""
    monkeypatch.setenv("COLUMNS", "160")


def test_train_needs_no_more_than_a_model_and_rows(here, deltaw):
    words = ["train", "--model", "model", "--data", "rows.jsonl", "--method", "lora", "--r", "16"]
    done = deltaw(*words, "--epochs", "1")
    assert done.code == 0, done.err
    folder = here / "runs" / "model-rows-lora-1"
    for name in ("Held-out rows", "Majority class", "TF-IDF + logistic regression", "Before", "After"):
        assert name in done.out
    for name in ("self_attn.q_proj", "Training time", "Peak memory", "Trainable parameters"):
        assert name in done.out
    facts = dict(re.findall(r"^(\w+)  +(\S+)$", done.out, re.M))
    assert (here / facts["Report"]).read_text().startswith("<!doctype html>")
    assert (here / facts["Adapter"] / "adapter_model.safetensors").is_file()
    assert record(folder)["command"] == shlex.join(["deltaw", *words, "--epochs", "1"])
    assert record(folder)["method"]["config"]["r"] == 16
    assert deltaw(*words, "--epochs", "1").code == 0
    assert (here / "runs" / "model-rows-lora-2" / "run.json").is_file()


def test_a_run_in_its_own_process_prints_only_its_own_lines(here):
    words = ["train", "--model", "model", "--data", "rows.jsonl", "--method", "full", "--output", "run", *QUICK[:-6]]
    with process(*words, "--device", "cpu", "--json", cwd=here) as running:
        out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert json.loads(out) == record(here / "run")
    known = r"(instruct with full on|(train|eval|test) rows:|before: loss|step \d+/\d+  |loss computed by)"
    assert err and all(re.match(known, line) for line in err.splitlines()), err


def test_a_file_gives_keys_and_flags_win(here, deltaw):
    keys = {"model": "model", "data": "rows.jsonl", "output": "run", "lr": 0.1, "lora_alpha": 4, "max_steps": 9}
    (here / "run.yaml").write_text(yaml.safe_dump({**keys, "batch_size": 4, "micro_batch_size": 4}))
    words = ["--config", "run.yaml", "--learning_rate=0.05", "--lora-alpha", "6", "--max-steps", "1", "--rslora"]
    done = deltaw("train", *words, "--columns", "text=text", "--rank-pattern", "q_proj=4", "--no-evaluate-before")
    assert done.code == 0, done.err
    made = yaml.safe_load((here / "run" / "config.yaml").read_text())
    wanted = {"learning_rate": 0.05, "alpha": 6.0, "max_steps": 1, "rslora": True, "rank_pattern": {"q_proj": 4}}
    wanted |= {"columns": {"text": "text"}, "evaluate_before": False, "batch_size": 4}
    assert {name: made[name] for name in wanted} == wanted


def test_resume_goes_on_and_a_finished_run_is_said_to_be_done(here, deltaw, finished):
    before = digest(finished)
    done = deltaw("train", "--resume", finished)
    assert done.code == 0
    assert done.err == f"{finished} is done already\n"
    assert digest(finished) == before
    assert "leave out --config, --r" in deltaw("train", "--resume", finished, "--config", "x.yaml", "--r", "2").error(2)


def test_evaluate_a_run_gives_its_own_figures_again(work, deltaw, finished, monkeypatch):
    monkeypatch.chdir(work)
    done = deltaw("evaluate", finished, "--compare-base", "--json")
    assert done.code == 0, done.err
    found, run = json.loads(done.out)["metrics"], record(finished)["metrics"]
    for when in ("before", "after"):
        assert found[when] == pytest.approx(run[when], rel=1e-6)
    assert found["baselines"] == run["baselines"]
    assert found["confusion"] == run["confusion"]
    shown = deltaw("evaluate", "finished", "--compare-base").out
    for name in ("Base", "Adapted", "Majority class", "2 of rows.jsonl", "finished/adapter"):
        assert name in shown


def test_evaluate_an_adapter_alone_takes_over_its_runs_task(here, deltaw, finished):
    words = [
        "evaluate",
        "--model",
        "model",
        "--adapter",
        finished / "adapter",
        "--data",
        "rows.jsonl",
        "--no-baselines",
    ]
    done = deltaw(*words, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["data"]["test"]["rows"] == 24
    assert found["metrics"]["labels"] == ["bad", "good"]
    assert "baselines" not in found["metrics"]
    bare = json.loads(deltaw("evaluate", "--model", "model", "--data", "rows.jsonl", "--json").out)
    assert bare["metrics"]["after"] != found["metrics"]["after"]
    assert list(bare["metrics"]["after"]) == list(found["metrics"]["after"])


def test_merge_writes_what_plain_transformers_loads(here, deltaw, finished):
    done = deltaw("merge", finished / "adapter", "--model", "model", "--output", "merged")
    assert done.code == 0, done.err
    assert "Merged" in done.out and "float32" in done.out
    transformers.AutoModelForCausalLM.from_pretrained("merged")
    assert transformers.AutoTokenizer.from_pretrained("merged").eos_token == "<|end|>"
    before = digest(here / "merged")
    again = deltaw("merge", finished, "--model", "model", "--output", "merged")
    assert "merged is not empty: choose a new folder as output" in again.error(2)
    assert digest(here / "merged") == before
    words = ["--model", "model", "--adapter", f"{finished}=0.5", "--adapter", finished / "adapter"]
    both = json.loads(deltaw("merge", *words, "--output", "both", "--dtype", "bfloat16", "--json").out)
    assert [found["weight"] for found in both["adapters"]] == [0.5, 1.0]
    assert both["dtype"] == "bfloat16"


def test_report_is_written_again(deltaw, finished):
    page = (finished / "report.html").read_bytes()
    (finished / "report.html").unlink()
    done = deltaw("report", finished)
    assert (done.code, done.out) == (0, f"{finished / 'report.html'}\n")
    assert (finished / "report.html").read_bytes() == page
    assert json.loads(deltaw("report", finished, "--json").out) == {"report": str(finished / "report.html")}


def test_models_lists_what_is_embedded_and_cached(deltaw, monkeypatch, tmp_path):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path))
    folder = tmp_path / "models" / "anything"
    folder.mkdir(parents=True)
    (folder / "deltaw.json").write_text(json.dumps({"made_from": {"wheel": MINILM.sha256}}))
    (tmp_path / "models" / "broken").mkdir()
    (tmp_path / "models" / "broken" / "deltaw.json").write_text("{")
    found = json.loads(deltaw("models", "--json").out)
    by_package = {model["package"]: model for model in found["embedded"]}
    assert by_package[f"{SMOLLM2.project} {SMOLLM2.version}"]["cached"] is None
    assert by_package[f"{MINILM.project} {MINILM.version}"]["cached"] == str(folder)
    assert found["families"]["gpt2"]["attn.c_attn"] == ["query", "key", "value"]
    shown = deltaw("models").out
    assert "smollm2-135m" in shown and "88.6 MiB" in shown and "SmolLM2-135M-Instruct (Apache-2.0)" in shown
    assert "query+key+value: attn.c_attn" in shown


def test_sites_of_a_model_are_counted_without_its_weights(here, deltaw):
    words = ["models", "--sites", "model", "--r", "4", "--target-modules", "lm_head,embed_tokens"]
    found = json.loads(deltaw(*words, "--json").out)
    linear = 2 * (4 * 4 * (32 + 32) + 3 * 4 * (32 + 48))
    assert found["groups"]["all-linear"] == {"sites": 14, "parameters": linear}
    assert found["groups"]["qv"] == {"sites": 4, "parameters": 2 * 2 * 4 * 64}
    assert found["groups"]["lm_head"] == {"sites": 1, "parameters": 4 * (258 + 32)}
    query = next(site for site in found["sites"] if site["name"] == "model.layers.1.self_attn.q_proj")
    assert query["shape"] == [32, 32]
    assert query["roles"] == ["query"]
    assert query["groups"] == ["all-linear", "attention", "qv"]
    shown = deltaw(*words).out
    assert re.search(r"self_attn\.q_proj +0–1 +query .* all-linear, attention, qv", shown)
    assert re.search(r"embed_tokens .*embedding", shown)
    assert "lm_headd" in deltaw("models", "--sites", "model", "--target-modules", "lm_headd").error(2)


def test_sites_of_an_encoder_depend_on_the_task(here, deltaw):
    tiny_model(here / "bert", kind="Bert")
    names = {}
    for task in ("masked-lm", "sequence-classification"):
        found = json.loads(deltaw("models", "--sites", "bert", "--task", task, "--json").out)
        names[task] = {site["name"] for site in found["sites"]}
    assert names["masked-lm"] - names["sequence-classification"] == {"cls.predictions.transform.dense"}
    assert names["sequence-classification"] - names["masked-lm"] == {"bert.pooler.dense"}
    assert "unknown task 'x'" in deltaw("models", "--sites", "bert", "--task", "x").error(2)
