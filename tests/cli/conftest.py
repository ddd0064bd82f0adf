"""Fixtures: a tiny model folder, rows for it, one finished run, and the command in this process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import QUICK, Result, tiny_model, write_rows

from deltaw.cli.main import main


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with `model` and `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture
def here(work, tmp_path, monkeypatch):
    """An empty working folder with links to the model and the rows, so that paths are short and outputs fresh."""
    (tmp_path / "model").symlink_to(work / "model")
    (tmp_path / "rows.jsonl").symlink_to(work / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def deltaw(capfd):
    """Runs a command line in this process."""

    def call(*words: object) -> Result:
        capfd.readouterr()
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture(scope="session")
def finished(work):
    """A finished run."""
    folder = work / "finished"
    before = Path.cwd()
    os.chdir(work)
    try:
        assert main(["train", "--model", "model", "--data", "rows.jsonl", "--output", "finished", *QUICK]) == 0
    finally:
        os.chdir(before)
    return folder
