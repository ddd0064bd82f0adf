"""One cell of a consortium study, in this process or in one of its own, and the baselines beside the cells."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deltaw.core.errors import EXIT_FAILED, DeltawError, InputError
from deltaw.core.files import write_json
from deltaw.data import read_rows
from deltaw.data.rows import LabelRow, PromptRow
from deltaw.evaluate.baselines import majority, tfidf_logreg
from deltaw.federated.config import make_federation_config
from deltaw.studies.consortium_plan import Cell, Plan, plan_of
from deltaw.studies.federate import run_federation
from deltaw.studies.job import run_job
from deltaw.studies.silo import forget_models
from deltaw.train.config import make_config

Say = Callable[[str], None]

PLAN = "plan.json"
#: How a cell's process is started; the cell's name and the study's folder follow.
WORKER = (sys.executable, "-c", "from deltaw.studies.consortium_cells import work; work()")
#: What a finished run needs no more: many cells of optimizer states would fill a disk.
_SCAFFOLD = ("checkpoints", "state", "clients")
_SHOWN = ("macro_auroc", "accuracy", "macro_f1")


def read_plan(output: str | Path) -> Plan:
    """The plan of a study's folder.

    Raises:
        InputError: none there, or a damaged one.
    """
    return plan_of(read_plan_record(output))


def read_plan_record(output: str | Path) -> dict[str, Any]:
    """The plan as its file has it."""
    file = Path(output) / PLAN
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the study's plan {file}: {error}") from None
    if found.get("kind") != "consortium":
        raise InputError(f"{output} holds something else than a consortium study: choose another output")
    return found


def cell_run(folder: Path) -> dict[str, Any] | None:
    """What a cell's `run.json` says; None where there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return None


def is_done(plan: Plan, cell: Cell) -> bool:
    """Whether a cell has come to its end."""
    record = cell_run(plan.folder(cell))
    return record is not None and record.get("status") == "done"


def run_cell(plan: Plan, name: str, *, say: Say = lambda line: None) -> None:
    """Brings a cell to its end, from wherever it was.

    Raises:
        InputError: no such cell, and what a run raises.
    """
    if name not in plan.cells:
        raise InputError(f"no cell {name} in {plan.output}: expected one of its {PLAN}")
    cell = plan.cells[name]
    folder = plan.folder(cell)
    if cell.kind == "baseline":
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", {"status": "done", "metrics": {"after": baseline(cell)}})
        return
    record = cell_run(folder)
    federation = cell.kind not in ("alone", "central")
    # Cut short before there was anything to go on from.
    begun = record is not None and (not federation or "run" in record.get("federation", {}))
    if folder.exists() and not begun:
        shutil.rmtree(folder)
    keys = {**cell.keys, "output": str(folder)}
    try:
        if federation:
            run_federation(make_federation_config(keys), command=plan.command, say=say, resuming=begun)
        else:
            run_job(make_config(keys), command=plan.command, say=say, resuming=begun)
    finally:
        forget_models()
        gc.collect()
    for part in _SCAFFOLD:
        shutil.rmtree(folder / part, ignore_errors=True)


def baseline(cell: Cell) -> dict[str, float]:
    """Metrics of a baseline that learns from all organisations' rows, on the shared test rows."""
    (texts, given), (asked, wanted) = (_texts(str(cell.keys[name])) for name in ("data", "test_data"))
    labels = cell.keys["labels"]
    if cell.name.endswith("/majority"):
        found = majority(given, wanted, labels)
    else:
        found = tfidf_logreg(texts, given, asked, wanted, labels, seed=cell.seed)
    return {name: float(found[name]) for name in _SHOWN if name in found}


def _texts(file: str) -> tuple[list[str], list[str]]:
    texts, labels = [], []
    for row in read_rows(file):
        if isinstance(row, LabelRow):
            texts.append(row.text)
            labels.append(row.label)
        elif isinstance(row, PromptRow):
            texts.append(row.prompt)
            labels.append(row.completion.strip())
        else:
            raise InputError(f"{file} has rows without labels: expected text and label, or prompt and completion")
    return texts, labels


def failure(error: Exception) -> dict[str, Any]:
    """What is recorded of a cell that failed."""
    line = " ".join(str(error).split())
    if isinstance(error, DeltawError):
        return {"error": line, "exit_code": error.exit_code}
    return {"error": f"{type(error).__name__}: {line}", "exit_code": EXIT_FAILED}


def run_here(plan: Plan, names: Mapping[str, Cell], *, say: Say) -> dict[str, dict[str, Any]]:
    """Runs cells one after another in this process; one that fails does not stop the others.

    Returns:
        What failed: its `error` and `exit_code` by name.
    """
    failed = {}
    for number, name in enumerate(names, 1):
        say(f"[{number}/{len(names)}] {name}: {plan.cells[name].label}")
        try:
            run_cell(plan, name, say=say)
        except Exception as error:
            failed[name] = failure(error)
            say(f"{name} failed: {failed[name]['error']}")
    return failed


def work() -> None:
    """Runs the cell that this process was started for, and ends with the process that started it."""
    name, output = sys.argv[1:3]

    def ends_with_parent() -> None:
        # Nothing is ever written to the pipe: it closes when the study's process is gone, however it went.
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ends_with_parent, daemon=True).start()

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    try:
        run_cell(read_plan(output), name, say=say)
    except DeltawError as error:
        told = failure(error)
        say(f"deltaw: {told['error']}")
        sys.exit(told["exit_code"])
