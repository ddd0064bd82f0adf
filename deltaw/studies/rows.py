"""From a configuration to the rows of a run: reading, splitting, the task and its labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltaw.core.errors import InputError
from deltaw.data import RowSet, derive_tags, label_set, read_rows, split_rows
from deltaw.train.config import TrainConfig

#: What a layout suggests to a decoder and to an encoder.
_TASKS = {
    "text": ("causal-lm", "masked-lm"),
    "prompt": ("instruct", "sequence-classification"),
    "chat": ("instruct", "instruct"),
    "label": ("instruct", "sequence-classification"),
    "tags": ("token-classification", "token-classification"),
}


@dataclass(frozen=True)
class RunRows:
    """The rows of a run.

    Attributes:
        task: what is trained.
        train: the rows to train on.
        evaluation: the rows measured during training; None: none.
        test: the rows measured before and after; None: none.
        labels: the closed set of labels, sorted; None for free text.
    """

    task: str
    train: RowSet
    evaluation: RowSet | None
    test: RowSet | None
    labels: list[str] | None


def run_rows(config: TrainConfig, *, generative: bool) -> RunRows:
    """Reads and splits the rows of a run; `generative` says what a layout means to the model.

    Raises:
        InputError: rows that cannot be read, do not suit the task, or have labels outside the set.
    """
    if not config.data:
        raise InputError("no training data: give data (a JSONL, CSV or Parquet file, or a hub data set's name)")
    train = read(config, config.data)
    task = config.task or _TASKS[train.layout][0 if generative else 1]
    train = _for_task(train, task)
    if config.unit is not None and not train.groups:
        raise InputError(f"unit {config.unit!r} does not go with rows that are put together anew: give tokens and tags")
    evaluation = None if config.eval_data is None else _for_task(read(config, config.eval_data), task)
    test = None if config.test_data is None else _for_task(read(config, config.test_data), task)
    labels = None if config.labels is None else list(config.labels)
    if labels is None and (task != "instruct" or train.layout in ("label", "prompt")):
        # Of all rows: a label may well be rare enough to stand in the held-out ones alone.
        labels = label_set(train)
    held_out = config.held_out
    if held_out is None:
        held_out = 0.1 if evaluation is None and test is None else 0
    if held_out and evaluation is not None:
        raise InputError(f"got held_out {held_out} and eval_data {config.eval_data}: give one of them")
    if held_out:
        train, evaluation = split_rows(train, held_out=held_out, seed=config.seed)
    if task.endswith("classification") and labels is None:
        raise InputError(
            f"{train.source}: {task} needs a small set of labels, and the rows have none: name them with labels"
        )
    return RunRows(task, train, evaluation, test if test is not None else evaluation, labels)


def read(config: TrainConfig, source: str) -> RowSet:
    """The rows of one source, as the configuration says to read them."""
    layout = "prompt" if config.layout == "entity" else config.layout
    rows = read_rows(
        source,
        layout=layout,
        columns=config.columns,
        split=config.split,
        skip_bad_rows=config.skip_bad_rows,
        group=config.unit if source == config.data else None,
    )
    return derive_tags(rows) if config.layout == "entity" else rows


def _for_task(rows: RowSet, task: str) -> RowSet:
    return derive_tags(rows) if task == "token-classification" and rows.layout == "prompt" else rows


def rows_record(rows: RowSet, counts: Any) -> dict[str, Any]:
    """What `run.json` says of a set of rows."""
    record = {"source": rows.source, "layout": rows.layout, **counts.as_dict()}
    if rows.sha256:
        record["sha256"] = rows.sha256
    return record
