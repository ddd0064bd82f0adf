"""`deltaw report`: the folder of a run or of a federation to its page."""

from __future__ import annotations

from typing import Annotated

import typer

from deltaw.cli.console import print_json
from deltaw.cli.pages import EPILOG, Page, new_app

app = new_app()


@app.command(name="report", epilog=EPILOG, cls=Page)
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="the folder of a run or a federation.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="print one JSON object.")] = False,
) -> None:
    """Write the report.html of a run or a federation again, from its JSON files, and print where it is."""
    from deltaw.report import write_report

    path = write_report(run)
    if json:
        print_json({"report": str(path)})
    else:
        print(path)
