"""`deltaw merge`: adapters into the weights of their base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.console import Say, print_facts, print_json, print_table
from deltaw.cli.pages import EPILOG, Page, new_app
from deltaw.core.errors import InputError

app = new_app()


@app.command(name="merge", epilog=EPILOG, cls=Page)
def merge(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="a run folder: its base and its adapter.", show_default=False)
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="the folder to write: new, or empty.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="the base; by default the one the run was trained on.", show_default=False),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER[=WEIGHT]",
            help="an adapter (or a run folder) and its weight, 1 by default; give it again for several",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="float32, bfloat16 or float16; by default the base's own.", show_default=False
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="what the model is for; by default what the run or the adapter says, else language modelling",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B,...", help="the classes of a classification model, in order.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object.")] = False,
) -> None:
    """Write adapters into the weights of their base: a folder that plain transformers loads.

    deltaw merge runs/x --output merged
    deltaw merge --model M --adapter A --adapter B=0.3 --output merged

    Sums are taken in float32 and rounded once.
    """
    from deltaw.cli.options import split_commas

    named = [_weighted(run)] if run is not None else []
    named += [_weighted(text) for text in adapter or ()]
    if not named:
        raise InputError("nothing to merge: give a run folder, or --model with --adapter")
    if output is None:
        raise InputError("no output: name the folder to write with --output")
    names = [part.strip() for text in labels for part in split_commas(text)] if labels else None
    from deltaw.studies.catalogue import fetch_model
    from deltaw.studies.ship import merge_into

    with Say() as say:
        if model is not None:
            fetch_model(model, progress=say.bytes)
        done = merge_into(output, adapters=named, model=model, task=task, labels=names, dtype=dtype, say=say)
    if json:
        print_json(done)
        return
    from deltaw.report.tables import format_bytes

    rows = [["Adapter", "Weight", "Modules", "Parameters"]]
    rows += [[a["path"], f"{a['weight']:g}", f"{a['sites']:,}", f"{a['parameters']:,}"] for a in done["adapters"]]
    print_table("Merged", rows)
    print_facts(
        [
            ("Base", done["model"]),
            ("Class", done["class"]),
            ("Dtype", done["dtype"]),
            ("Output", done["output"]),
            ("Size", format_bytes(done["output_bytes"])),
        ]
    )


def _weighted(text: str) -> tuple[str, float]:
    """`FOLDER=0.3` as a folder and a weight; a folder whose own name has an `=` is taken as it is."""
    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", weight):
        raise InputError(f"--adapter is {text!r}: expected FOLDER or FOLDER=WEIGHT, with a number as weight")
    return path, float(weight)
