"""What do organisations gain by learning together? Each alone, all rows in one place, and federations between the two.

The whole story is `run_study`. What is on the disk is the state: the same command goes on with what is missing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deltaw.core.errors import InputError
from deltaw.core.files import write_json, write_text
from deltaw.federated.config import FederationConfig
from deltaw.models.packages import Progress
from deltaw.studies.catalogue import fetch_model
from deltaw.studies.compare import _locked, cores, differing, run_cells
from deltaw.studies.consortium_cells import PLAN, WORKER, is_done, read_plan_record, run_here
from deltaw.studies.consortium_data import EXAMPLES, example
from deltaw.studies.consortium_page import study_page
from deltaw.studies.consortium_plan import (
    ALL_CELLS,
    ALONE,
    CENTRAL,
    SECURE,
    Plan,
    Study,
    make_plan,
    plan_record,
)
from deltaw.studies.consortium_results import collect, markdown, tables

Say = Callable[[str], None]

__all__ = ["EXAMPLES", "Study", "example", "points", "run_example", "run_study", "tables"]

RESULTS, TABLE, REPORT = "results.json", "table.md", "report.html"
#: Of the command alone: what two cores finish in about a quarter of an hour. Small batches make the most of few passes.
QUICK_CELLS = (ALONE, CENTRAL, "fedavg-ab", "dp-8", "tfidf", "majority")
QUICK_ROUNDS, QUICK_EPOCHS = 8, 0.5
QUICK_KEYS = {"batch_size": 8, "micro_batch_size": 8}
QUICK_FEDERATED = {"evaluate_every": 4}
#: Cells that run side by side, each on a core; more would be bound by memory.
MOST_AT_A_TIME = 8
#: Keys that the examples bring themselves.
_OWN = (
    "test_data", "labels", "layout", "columns", "split", "task", "skip_bad_rows", "clients", "ledger",
    "budget_epsilon", "noise_multiplier", "evaluate_clients", "sharding", "threshold", "secure_weight_bound",
)  # fmt: skip
_OF_STUDY = ("output", "seed", "rounds", "local_epochs", "local_steps", "parallel", "rule", "secure")
_OF_PRIVACY = ("target_epsilon", "delta", "unit")


def run_study(
    study: Study,
    *,
    command: str = "",
    say: Say = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Runs a study's unfinished cells and writes `results.json`, `table.md` and `report.html`.

    Args:
        study: what is asked.
        command: what was typed, for the record.
        say: takes lines of progress.
        progress: told of downloads.

    Returns:
        What `results.json` has, with `numbers`, `table` and `report`, the paths of the three files.

    Raises:
        InputError: settings that do not go together, before any cell runs; cells that were made with others.
    """
    folder = Path(study.output)
    with _locked(folder):
        known = read_plan_record(folder)["setups"] if (folder / PLAN).exists() else {}
        fetch_model(str({**study.example.keys, **study.options}["model"]), progress=progress)
        plan = make_plan(study, command=command or "dw.studies.consortium.run_study(...)")
        _settle(plan, known)
        waiting = {name: cell for name, cell in plan.cells.items() if not is_done(plan, cell)}
        say(f"{len(plan.cells)} cells, {len(waiting)} to run, {plan.parallel} at a time, in {folder}")
        if plan.parallel == 1:
            failed = run_here(plan, waiting, say=say)
        else:
            failed = _run_apart(plan, waiting, say)
        results = collect(study, plan, failed)
        files = {"numbers": folder / RESULTS, "table": folder / TABLE, "report": folder / REPORT}
        results |= {name: str(path) for name, path in files.items()}
        write_json(files["numbers"], results)
        write_text(files["table"], markdown(results))
        write_text(files["report"], study_page(results))
    return results


def _settle(plan: Plan, known: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks that cells on the disk are those of this plan, and writes the plan for the cells' processes.

    Raises:
        InputError: a cell that was made with other settings.
    """
    for name, cell in plan.cells.items():
        difference = differing(known[name], cell.setup) if name in known and plan.folder(cell).exists() else ""
        if difference:
            raise InputError(
                f"{plan.folder(cell)} was made with {difference.replace('comparison', 'study')}: choose another "
                "output, or delete that folder"
            )
    setups = {**known, **{name: cell.setup for name, cell in plan.cells.items()}}
    write_json(Path(plan.output) / PLAN, {**plan_record(plan), "setups": setups})


def _run_apart(plan: Plan, waiting: Mapping[str, Any], say: Say) -> dict[str, dict[str, Any]]:
    """Trained cells in processes of their own; baselines here, as starting a process takes longer than they do."""
    quick = {name: cell for name, cell in waiting.items() if cell.kind == "baseline"}
    # The longest first, so that none of them is left alone at the end.
    order = sorted(waiting.keys() - quick.keys(), key=lambda name: (waiting[name].kind in (ALONE,), name))
    failed = run_here(plan, quick, say=say)
    anything: Any = plan
    return failed | run_cells(anything, order, say=say, worker=WORKER)


def points(**knobs: Any) -> dict[str, dict[str, Any]]:
    """Every combination of the values of some knobs, by a name that says them.

    Args:
        **knobs: a knob of the example's rows to its values.
    """
    found = {}
    for values in itertools.product(*knobs.values()):
        point = dict(zip(knobs, values, strict=True))
        found["_".join(f"{name.replace('_', '-')}-{value}" for name, value in point.items())] = point
    return found


def run_example(
    name: str,
    values: Mapping[str, Any],
    *,
    full: bool = False,
    command: str,
    say: Say = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """An example as the command runs it: one seed, and in short few rounds and the cells that tell most.

    Args:
        name: of the example.
        values: flags that were given: `output`, `seed`, `rounds`, `local_epochs` or `local_steps`, `parallel` (cells at
            a time), `rule` (several with commas), `secure`, `dp`, `target_epsilon`, `unit`, and keys of a training or
            a federation.
        full: every rule, epsilons 8, 3 and 1, and the example's own number of rounds.
        command: what was typed.
        say: takes lines of progress.
        progress: told of downloads.

    Returns:
        What `run_study` returns.

    Raises:
        InputError: an unknown example, or a flag that has no meaning here.
    """
    study = _asked(name, values, full)
    if not full:
        say("the example in short; --full has all rules, epsilons 8, 3 and 1, and more rounds")
    return run_study(study, command=command, say=say, progress=progress)


def _asked(name: str, values: Mapping[str, Any], full: bool) -> Study:
    chosen = example(name)
    for key in values:
        if key in _OWN:
            raise InputError(
                f"--{key.replace('_', '-')} has no meaning for --example, which brings its own: leave it out"
            )
    known = ALL_CELLS if full else QUICK_CELLS
    cells = [cell for cell in known if not cell.startswith("dp-")]
    private = [cell for cell in known if cell.startswith("dp-")]
    if "rule" in values:
        rules = [rule.strip() for rule in str(values["rule"]).split(",")]
        cells = [ALONE, CENTRAL, *rules, "tfidf", "majority"]
    if values.get("secure"):
        cells = [*(cell for cell in cells if cell != SECURE), SECURE]
    if "target_epsilon" in values:
        private = [f"dp-{values['target_epsilon']:g}"]
    if values.get("dp", True):
        cells += private
    federation = {item.name for item in dataclasses.fields(FederationConfig)}
    rest = {key: value for key, value in values.items() if key not in (*_OF_STUDY, *_OF_PRIVACY, "dp")}
    options = {key: value for key, value in rest.items() if key not in federation}
    epochs, steps = values.get("local_epochs"), values.get("local_steps")
    if epochs is not None and steps is not None:
        raise InputError("both local_steps and local_epochs are given: leave one of them out")
    return Study(
        example=chosen,
        # Always the same folder, so that the same command goes on.
        output=str(values.get("output") or Path("runs") / f"example-{name}{'-full' if full else ''}"),
        cells=cells,
        seeds=(values.get("seed", 0),),
        rounds=values.get("rounds", None if full else QUICK_ROUNDS),
        local_epochs=epochs if epochs is not None else 1.0 if full else QUICK_EPOCHS,
        local_steps=steps,
        parallel=values.get("parallel") or min(cores(), MOST_AT_A_TIME),
        options=options if full else QUICK_KEYS | options,
        federated=({} if full else QUICK_FEDERATED) | {key: value for key, value in rest.items() if key in federation},
        # What is said of batches and rates holds for private runs too.
        private={key: value for key, value in values.items() if key in options or key in ("delta", "unit")},
    )
