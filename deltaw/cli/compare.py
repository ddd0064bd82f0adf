"""`deltaw compare`: methods side by side, from one YAML file."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from typing import Annotated, Any

import typer

from deltaw.cli.console import Say, print_facts, print_json, print_table
from deltaw.cli.pages import EPILOG, Page, new_app
from deltaw.core.errors import RunError

app = new_app()


@app.command(name="compare", epilog=EPILOG, cls=Page)
def compare(
    ctx: typer.Context,
    config: Annotated[str, typer.Argument(metavar="FILE", help="the comparison's YAML file.", show_default=False)],
    output: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="the folder to write; by default the file's output.", show_default=False),
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="cells at a time; by default the file's, or 1.", show_default=False),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="run these cells only, such as 'lora/*' or tfns/lora/seed-0; may be given again.",
            show_default=False,
        ),
    ] = None,
    data_root: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="where relative paths of rows start; by default the file's folder.",
            show_default=False,
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="begin the cells anew instead of keeping what is done.")
    ] = False,
    report: Annotated[bool, typer.Option("--report", help="run nothing; write the tables of what is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="print the results as one JSON object.")] = False,
    cell: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare methods over data sets and seeds, each run in a process of its own.

    deltaw compare comparison.yaml --parallel 2

    Finished cells are kept, interrupted ones go on from their last checkpoint, a failed one is told of and the rest
    finished: the same command again does what is missing. Writes table.md, results.json and report.html.
    """
    if cell is not None:
        _one_cell(config, cell)
        return
    from deltaw.studies.compare import compare as work

    try:
        with Say() as say:
            results = work(
                config,
                output=output,
                parallel=parallel,
                only=only or (),
                fresh=fresh,
                report_only=report,
                data_root=data_root,
                command=shlex.join(["deltaw", *ctx.obj]),
                say=say,
                progress=say.bytes,
            )
    except KeyboardInterrupt as stopped:
        stopped.add_note("the same command goes on with what is missing")
        raise
    if json:
        print_json(results)
    else:
        _show(results)
    if failed := results["failed"]:
        first = f"{failed[0]['cell']}: {failed[0]['error']}"
        raise RunError(f"{len(failed)} of {results['cells']['all']} cells failed; {first}")


def _show(results: dict[str, Any]) -> None:
    from deltaw.report import comparison_tables as tables

    for data in results["data"]:
        print_table(f"{data}: quality", tables.quality_table(results, data))
        print_table(f"{data}: cost and latency", tables.expense_table(results, data))
        print_table(f"{data}: forgetting, before → after", tables.forgetting_table(results, data))
    print_table(f"Against {results['reference']}", tables.significance_table(results))
    print_table("Failed cells", tables.failed_table(results))
    for note in results["notes"]:
        print(f"- {note}")
    count = results["cells"]
    folder = results["output"]
    print()
    print_facts(
        [
            ("Cells", f"{count['done']} of {count['all']} done"),
            ("Table", os.path.join(folder, "table.md")),
            ("Numbers", os.path.join(folder, "results.json")),
            ("Report", os.path.join(folder, "report.html")),
        ]
    )


def _one_cell(output: str, name: str) -> None:
    """Runs a cell for the comparison that started this process, and ends with it."""

    def ends_with_parent() -> None:
        # The pipe is never written to: it closes when the comparison's process is gone, however it went. A read by
        # way of `sys.stdin` would hold a lock that the interpreter wants when it ends.
        while os.read(sys.stdin.fileno(), 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ends_with_parent, daemon=True).start()
    from deltaw.studies.compare_cells import run_cell

    with Say() as say:
        run_cell(output, name, say=say)
