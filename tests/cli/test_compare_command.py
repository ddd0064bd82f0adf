"""`deltaw compare` with its cells in real processes: a failure, what is kept, and an end that nobody announced."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import yaml
from command_line import process

from deltaw.studies import compare as told

COMMON = {
    "batch_size": 4, "micro_batch_size": 4, "r": 2, "device": "cpu", "dtype": "float32", "max_steps": 3, "log_every": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def write(here, **changes):
    (here / "general.txt").write_text("The sun rose over the hills. " * 8)
    keys = {
        "model": "model", "output": "out", "data": {"days": {"data": "rows.jsonl", "test_data": "rows.jsonl"}},
        "methods": {"base": {}, "lora": {}, "wild": {"method": "lora", "learning_rate": 1e30}}, "common": COMMON,
        "forgetting": {"text": "general.txt"}, "latency": {"prompt": 8, "tokens": 3},
    }  # fmt: skip
    (here / "c.yaml").write_text(yaml.safe_dump({**keys, **changes}, sort_keys=False))


def test_a_comparison_with_a_failed_cell(here, deltaw, monkeypatch):
    write(here)
    done = deltaw("compare", "c.yaml", "--parallel", "3")
    assert done.code == 1
    assert "deltaw: 1 of 3 cells failed; days/wild/seed-0: " in done.line() and "the loss is NaN" in done.line()
    for shown in ("days: quality", "days: cost and latency", "days: forgetting", "Against lora", "Failed cells"):
        assert shown in done.out
    assert "One seed: there is no spread" in done.out and "Up to 3 cells ran at a time" in done.out
    found = json.loads((here / "out/results.json").read_text())
    assert found["cells"] == {"all": 3, "done": 2} and found["command"] == "deltaw compare c.yaml --parallel 3"
    assert [item["exit_code"] for item in found["failed"]] == [1]
    (group,) = [group for group in found["groups"] if group["label"] == "lora"]
    assert set(group["metrics"]) >= {"accuracy", "loss"} and set(group["latency"]) == {"unmerged", "merged"}
    run = json.loads((here / "out/cells/days/lora/seed-0/run.json").read_text())
    assert run["command"].endswith("--only days/lora/seed-0") and run["status"] == "done"
    assert "# Comparison on model" in (here / "out/table.md").read_text()
    assert (here / "out/report.html").read_text().startswith("<!doctype html>")

    failure = {"error": "x", "exit_code": 1}
    # From here on nothing runs: what is done is kept, and the failure is still told of.
    monkeypatch.setattr(told, "run_cells", lambda plan, names, say: {name: failure for name in names})
    again = deltaw("compare", "c.yaml", "--report", "--json")
    assert again.code == 1 and json.loads(again.out)["cells"]["done"] == 2
    assert deltaw("compare", "c.yaml", "--only", "lora").code == 1
    write(here, methods={"base": {}, "lora": {}})
    kept = deltaw("compare", "c.yaml")
    assert (kept.code, "Failed" in kept.out) == (0, False)
    assert "2 cells, 0 to run" in kept.err


def test_wrong_input_is_one_line_before_any_cell_runs(here, deltaw):
    write(here, methods={"lora": {"rank": 3}})
    assert "unknown key in methods.lora 'rank'" in deltaw("compare", "c.yaml").error(2)
    write(here)
    assert "--only nothing matches no cell" in deltaw("compare", "c.yaml", "--only", "nothing").error(2)
    assert "cannot read the configuration gone.yaml" in deltaw("compare", "gone.yaml").error(2)
    assert "missing argument 'FILE'" in deltaw("compare").error(2)
    assert not (here / "out" / "cells").exists()


def test_cells_end_with_a_comparison_that_was_killed(here):
    write(here, methods={"lora": {"max_steps": 100_000, "save_every": 5}}, forgetting=False, latency=False)
    (here / "out").mkdir()
    log = here / "out/cells/days/lora/seed-0/metrics.jsonl"
    with process("compare", "c.yaml", "--only", "lora", cwd=here) as running:
        deadline = time.monotonic() + 90
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(running.pid, signal.SIGKILL)
    assert log.exists()

    def state():
        return json.loads((log.parent / "run.json").read_text())

    deadline = time.monotonic() + 60
    while state()["status"] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (state()["status"], state()["error"]) == ("failed", "interrupted")
