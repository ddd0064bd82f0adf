"""Turns a run folder's JSON into one self-contained HTML page, and its numbers into tables for a terminal."""

from __future__ import annotations

import os
from pathlib import Path

from deltaw.report import page
from deltaw.report.federation import write_federation
from deltaw.report.folder import read_run
from deltaw.report.tables import cost_table, data_table, headline, metrics_table, sites_table

__all__ = ["cost_table", "data_table", "headline", "metrics_table", "sites_table", "write_report"]


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Writes `report.html` into the folder of a run or of a federation, which its run.json's `kind` tells apart.

    Args:
        run_folder: the folder that a run or a federation wrote.

    Returns:
        The path of the page.

    Raises:
        InputError: the folder or its run.json is missing or malformed, or the page may not be written there.
        RunError: the page could not be written.
    """
    recorded = Path(run_folder) / "run.json"
    federation = recorded.is_file() and read_run(recorded).get("kind") == "federation"
    return write_federation(run_folder) if federation else page.write_report(run_folder)
