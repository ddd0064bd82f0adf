"""Printing: results on stdout, progress on stderr (a bar on a terminal, plain lines elsewhere)."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Columns of a table that goes to a file or a pipe, where COLUMNS does not say otherwise.
_WIDE = 160
#: Characters up to which the first column of a table is never folded.
_NAME = 34
_STEP = re.compile(r"step (\d+)/(\d+)\s*(.*)")
_NUMBER = re.compile(r"[-+−~]?[\d.,]+(\s|$)|–$|no change$")


def _stdout() -> Any:
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE
    return Console(width=width, highlight=False, markup=False, emoji=False)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(title: str, table: Sequence[Sequence[str]]) -> None:
    """A table on stdout, the header first; nothing where it has no rows. Columns of numbers are set right."""
    if len(table) < 2:
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    header, *rows = table
    made = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(header):
        numeric = place > 0 and all(_NUMBER.match(row[place]) for row in rows if row[place])
        # The first column names the row: it is folded last.
        whole = place == 0 and max(len(row[0]) for row in rows) <= _NAME
        made.add_column(Text(name), justify="right" if numeric else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    _stdout().print(made)


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Names and values on stdout, a line each; values are never wrapped, so that a path can be copied."""
    width = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        print(f"{name:<{width}}  {value}")


def prints() -> bool:
    """Whether this process prints: the first one under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def show_run(record: dict[str, Any], folder: Path) -> None:
    """What a run came to, on stdout."""
    from deltaw.report import headline, metrics_table, sites_table

    metrics = metrics_table(record)
    print_table("Held-out rows", metrics)
    print_table("What was adapted", sites_table(record))
    facts = [(name, f"{value}, {note}" if note else value) for name, value, note in headline(record)]
    made = next((part for part in ("adapter", "model") if (folder / part).is_dir()), None)
    if made:
        facts.append((made.capitalize(), str(folder / made)))
    facts.append(("Report", str(folder / "report.html")))
    if not metrics:
        facts.insert(0, ("Held-out rows", "none, so nothing was measured"))
    print_facts(facts)


class Say:
    """Takes lines of progress. On a terminal `step 3/90 ...` moves a bar instead of adding a line.

    Used as a context: the bar is gone when it ends, so that an error's line stands alone.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._downloads: set[str] = set()

    def __enter__(self) -> Say:
        if prints() and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                Progress,
                SpinnerColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TimeRemainingColumn(compact=True),
                console=Console(stderr=True, highlight=False, markup=False, emoji=False),
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=None)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, line: str) -> None:
        """Shows one line."""
        if not prints():
            return
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
            return
        step = _STEP.match(line)
        if step:
            self._bar.update(self._task, completed=int(step[1]), total=int(step[2]), description=line)
        else:
            self._bar.console.print(line, soft_wrap=True)
            self._bar.update(self._task, description="working", completed=0, total=None)

    def bytes(self, what: str, done: int, total: int) -> None:
        """Shows how far a download or a conversion has come."""
        if not prints():
            return
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=done, total=total or None)
        elif what not in self._downloads:
            self._downloads.add(what)
            self(what)
