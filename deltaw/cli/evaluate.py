"""`deltaw evaluate`: a run, a model or an adapter to a table of metrics."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from deltaw.cli.console import Say, print_facts, print_json, print_table, prints
from deltaw.cli.options import flags_of, given_values, with_flags
from deltaw.cli.pages import EPILOG, Page, new_app
from deltaw.core.errors import InputError
from deltaw.train.config import TrainConfig

#: Keys of a run that change how rows are read and measured.
PANELS = {
    "Model and data": (
        "model data layout columns split skip_bad_rows task labels template chat_template label_prompt max_length"
    ),
    "Measuring": "eval_batch_size max_new_tokens baselines seed dtype device",
}
_PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names.split()}
#: What a key means here, where that is not what it means in training.
_HELP = {
    "model": "an embedded name, a folder, a .gguf file or a hub id; with a run: where its base is now",
    "data": "rows to measure on; by default the run's test rows",
    "labels": "the names of the labels; by default those of the run or the model, else of the rows",
    "seed": "of everything that is random",
}
_OTHERS = [item.name for item in dataclasses.fields(TrainConfig) if item.name not in _PANEL_OF]
FLAGS = [
    dataclasses.replace(
        flag, help=_HELP.get(flag.name, flag.help), default="" if flag.name == "model" else flag.default
    )
    for flag in flags_of(TrainConfig, _PANEL_OF.__getitem__, leave_out=_OTHERS)
]
app = new_app()


def evaluate(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="a run folder, in place of --model.", show_default=False)
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="an adapter to put on the model (a run folder, PEFT's too).", show_default=False
        ),
    ] = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="measure the bare base too, without what was trained.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object.")] = False,
    **given: Any,
) -> None:
    """Measure a run, a model or an adapter on held-out rows.

    deltaw evaluate runs/x
    deltaw evaluate --model M --adapter A --data rows.jsonl

    A run brings its model, task, labels and template along; a flag that is given wins.
    """
    values = given_values(FLAGS, given)
    if run is not None and adapter is not None:
        raise InputError(f"both the run {run} and --adapter {adapter} were given: give one")
    if run is None and "model" not in values:
        raise InputError("nothing to evaluate: give a run folder, or --model with --data")
    if run is None and "data" not in values:
        raise InputError("no rows to measure on: give --data (a JSONL, CSV or Parquet file, or a hub data set's name)")
    from deltaw.studies.catalogue import fetch_model
    from deltaw.studies.ship import evaluate_model, evaluate_run

    with Say() as say:
        if "model" in values:
            fetch_model(values["model"], progress=say.bytes)
        if run is not None:
            data = values.pop("data", None)
            record = evaluate_run(run, data=data, compare_base=compare_base, changes=values, say=say)
        else:
            record = evaluate_model(adapter=adapter, compare_base=compare_base, keys=values, say=say)
    if not prints():
        return
    if json:
        print_json(record)
    else:
        _show(record)


def _show(record: dict[str, Any]) -> None:
    from deltaw.report import metrics_table
    from deltaw.report.tables import format_bytes, format_seconds

    table = metrics_table(record)
    names = {"Before": "Base", "After": "Adapted" if "adapter" in record else "Model"}
    if table:
        table[0] = [names.get(name, name) for name in table[0]]
    print_table("Held-out rows", table)
    rows, cost = record["data"]["test"], record["cost"]
    counts = [f"{rows[key]:,} {key}" for key in ("truncated", "dropped", "empty", "bad") if rows.get(key)]
    facts = [
        ("Task", record["task"]),
        ("Model", record["model"]["source"]),
        ("Adapter", record.get("adapter", "")),
        ("Rows", ", ".join([f"{rows['rows']:,} of {rows['source']}", *counts])),
        ("Time", format_seconds(cost["eval_s"])),
        ("Peak memory", format_bytes(cost["peak_memory_bytes"])),
    ]
    print_facts([(name, value) for name, value in facts if value])


app.command(name="evaluate", epilog=EPILOG, cls=Page)(with_flags(evaluate, FLAGS))
