"""Reading a run folder's files. `run.json` must be right; the others may be absent, or end in half a line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.core.errors import InputError
from deltaw.core.files import explain_os_error

FORMAT = 1


@dataclass(frozen=True)
class RunFolder:
    """A run folder's contents.

    Attributes:
        run: run.json.
        config: the text of config.yaml, empty when there is none.
        metrics: the objects of metrics.jsonl, in the file's order.
        examples: the objects of examples.jsonl, in the file's order.
        output: the run folder as config.yaml names it, else its name.
        notes: one sentence for each thing that could not be read.
    """

    run: dict[str, Any]
    config: str = ""
    output: str = "."
    metrics: list[dict[str, Any]] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_run(path: Path) -> dict[str, Any]:
    """run.json as a dictionary.

    Raises:
        InputError: it is missing, is not a JSON object, or has another format's number.
    """
    try:
        run = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"no {path.name} in {path.parent}: expected the folder that a run wrote (--output)") from None
    except OSError as error:
        raise explain_os_error(error, path) from error
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is not valid JSON ({reason}): restore it or run the training again") from None
    if not isinstance(run, dict):
        raise InputError(f"{path} holds a {type(run).__name__}, expected a JSON object: is this a run folder?")
    if run.get("format", FORMAT) != FORMAT:
        raise InputError(f"{path} has format {run['format']!r}, expected {FORMAT}: install the deltaw that wrote it")
    return run


def read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; other lines (a killed run leaves half a one) are counted in `notes`."""
    found: list[dict[str, Any]] = []
    bad = 0
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    value = None
                if isinstance(value, dict):
                    found.append(value)
                else:
                    bad += 1
    except FileNotFoundError:
        return []
    except OSError as error:
        raise explain_os_error(error, path) from error
    if bad:
        notes.append(f"{path.name}: {bad} unreadable line{'s' if bad > 1 else ''} left out.")
    return found


def named_output(config: str) -> str | None:
    """The run folder that config.yaml names, None where it names none or is no YAML."""
    import yaml

    try:
        found = yaml.safe_load(config)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    output = found.get("output") if isinstance(found, dict) else None
    return output if isinstance(output, str) and output else None


def read_folder(folder: Path) -> RunFolder:
    """Everything the report needs from a run folder.

    Raises:
        InputError: the folder or its run.json is missing or malformed.
    """
    if not folder.is_dir():
        raise InputError(f"no run folder at {folder}: expected the folder that a run wrote (--output)")
    run = read_run(folder / "run.json")
    notes: list[str] = []
    try:
        config = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        config = ""
    except OSError as error:
        raise explain_os_error(error, folder / "config.yaml") from error
    metrics = read_lines(folder / "metrics.jsonl", notes)
    examples = read_lines(folder / "examples.jsonl", notes)
    return RunFolder(
        run=run,
        config=config,
        output=named_output(config) or folder.resolve().name,
        metrics=metrics,
        examples=examples,
        notes=notes,
    )
