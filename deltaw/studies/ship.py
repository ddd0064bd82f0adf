"""After training: opening what a run made, and measuring it, or any model and adapter."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.checkpoint import load_adapter, load_tokenizer
from deltaw.checkpoint.adapters import CONFIG_FILE
from deltaw.checkpoint.model_files import model_facts
from deltaw.core.errors import DeltawError, InputError
from deltaw.core.files import sha256_file
from deltaw.data import RowSet
from deltaw.evaluate.task import Evaluation
from deltaw.federated.config import make_federation_config
from deltaw.methods import Full, set_adapter
from deltaw.models.sources import resolve
from deltaw.studies.job import evaluator_for, load_job_model, resolved
from deltaw.studies.rows import RunRows, rows_record, run_rows
from deltaw.train import RunFolder, TrainConfig
from deltaw.train.config import make_config, read_yaml
from deltaw.train.run_folder import peak_memory_bytes

Say = Callable[[str], None]

#: How an adapter was trained to be asked: what `evaluate --adapter` takes over from the run that made it.
_CLASSES = {"SEQ_CLS": "sequence-classification", "TOKEN_CLS": "token-classification"}


@dataclass(frozen=True)
class FinishedRun:
    """What a finished run left.

    Attributes:
        path: the run folder.
        config: its configuration.
        labels: its closed set of labels, in the order of their ids; None for free text.
        adapter: the folder of its adapter; None where the whole model was trained.
        model: the model to load: the base, or the trained model where there is no adapter.
        record: `run.json`.
    """

    path: Path
    config: TrainConfig
    labels: list[str] | None
    adapter: Path | None
    model: str
    record: Mapping[str, Any]

    @property
    def federated(self) -> bool:
        """Whether organisations made it whose rows are their own: `config.data` then names the shared test rows."""
        return self.record.get("kind") == "federation"


def open_run(folder: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> FinishedRun:
    """Reads a run folder; `changes` are keys that override its `config.yaml`.

    Raises:
        InputError: no run there, or one that has not finished.
    """
    for file, what in (
        ("config.json", "a model: give it as --model"),
        (CONFIG_FILE, "an adapter: give it as --adapter"),
    ):
        if (Path(folder) / file).is_file() and not (Path(folder) / "run.json").is_file():
            raise InputError(f"{folder} is no run but {what}")
    run = RunFolder.open(Path(folder), writes=False)
    path = run.path
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path} has no config.yaml: expected a folder that deltaw train wrote")
    keys = {**read_yaml(path / "config.yaml"), **(changes or {}), "output": str(path)}
    federated = run.record.get("kind") == "federation"
    if federated:
        config = make_federation_config(keys).train
        config = dataclasses.replace(config, data=config.test_data or "", held_out=0)
    else:
        config = make_config(keys)
    whole = isinstance(config.method_config, Full)
    made = path / ("model" if whole else "adapter")
    if not made.is_dir():
        raise InputError(
            f"the run at {path} has no {made.name} (its status is {run.record.get('status')!r}): "
            f"finish it with deltaw {'federate' if federated else 'train'} --resume {path}"
        )
    labels = run.record.get("metrics", {}).get("labels")
    if labels is None and config.labels is not None:
        labels = list(config.labels)
    return FinishedRun(path, config, labels, None if whole else made, str(made) if whole else config.model, run.record)


def run_of_adapter(adapter: str | os.PathLike[str]) -> Path | None:
    """The run folder that an adapter folder is part of, or is itself; None for one that stands alone."""
    folder = Path(adapter)
    for candidate in (folder, folder.parent):
        has_adapter = candidate == folder or folder.name == "adapter"
        if has_adapter and (candidate / "run.json").is_file() and (candidate / "config.yaml").is_file():
            return candidate
    return None


# Evaluating.


def evaluate_run(
    folder: str | os.PathLike[str],
    *,
    data: str | None = None,
    compare_base: bool = False,
    changes: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Measures what a run made, on its own test rows or on others.

    Args:
        folder: the run folder.
        data: rows to measure on; None means the run's test rows, read again and split as they were.
        compare_base: measure the bare base too.
        changes: keys of the configuration that differ from the run's (`model` where the base has moved, `device`, ...).
        say: takes lines of progress.

    Returns:
        A record as in `run.json`: task, model, data, `metrics` (`after`: what was measured; `before`: the bare base;
        `baselines`), cost.

    Raises:
        InputError: no finished run there, rows that cannot be read or have changed since, labels outside the run's.
    """
    run = open_run(folder, changes)
    given = (changes or {}).get("labels")
    if given is not None and list(given) != run.labels:
        raise InputError(f"labels are {list(given)!r} and the run at {run.path} has {run.labels!r}: leave them out")
    config = dataclasses.replace(run.config, labels=run.labels, early_stopping=0)
    facts = model_facts(run.model if run.adapter is None else config.model)
    if data is None:
        if not run.config.data:
            raise InputError(
                f"the federation at {run.path} has no test rows of its own: give some with data (--data FILE)"
            )
        check_unchanged(run)
        rows = run_rows(config, generative=facts.generative)
        if rows.test is None:
            raise InputError(f"the run at {run.path} held no rows out: give some with data (--data FILE)")
        train: RowSet | None = None if run.federated else rows.train
        held = dataclasses.replace(rows, train=rows.test)
    else:
        alone = dataclasses.replace(config, data=data, eval_data=None, test_data=None, held_out=0)
        held = run_rows(alone, generative=facts.generative)
        train = None if run.federated else _training_rows(config, facts.generative, say)
    if run.adapter is None:
        bare = config.model if compare_base else None
    else:
        bare = run.model if compare_base else None
    if run.adapter is None:
        config = dataclasses.replace(config, model=run.model)
    return _measure(resolved(config, held, facts), held, train, adapter=run.adapter, bare=bare, say=say)


def evaluate_model(
    *,
    adapter: str | os.PathLike[str] | None = None,
    compare_base: bool = False,
    keys: Mapping[str, Any],
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Measures a model, alone or with an adapter, on rows.

    Args:
        adapter: an adapter folder; one that a run wrote brings its task, labels and template along.
        compare_base: measure the model without the adapter too.
        keys: of the configuration: `model`, `data`, and what else differs from the defaults.
        say: takes lines of progress.

    Returns:
        A record, as `evaluate_run` gives it, without baselines.

    Raises:
        InputError: as `evaluate_run`.
    """
    if adapter is not None and (run := run_of_adapter(adapter)) is not None:
        say(f"task, labels and template are those of the run at {run}")
        others = {name: value for name, value in keys.items() if name != "data"}
        return evaluate_run(run, data=keys["data"], compare_base=compare_base, changes=others, say=say)
    if compare_base and adapter is None:
        raise InputError("there is nothing to compare the base with: give an adapter, or a run")
    config = make_config({**keys, "held_out": 0, "early_stopping": 0})
    facts = model_facts(config.model)
    task = config.task or (None if adapter is None else adapter_task(Path(adapter)))
    labels = config.labels or (model_labels(config.model) if task is None or task.endswith("classification") else None)
    config = dataclasses.replace(config, task=task, labels=labels)
    rows = run_rows(config, generative=facts.generative)
    folder = None if adapter is None else Path(adapter)
    return _measure(
        resolved(config, rows, facts), rows, None, adapter=folder, bare=config.model if compare_base else None, say=say
    )


def _measure(
    config: TrainConfig, rows: RunRows, train: RowSet | None, *, adapter: Path | None, bare: str | None, say: Say
) -> dict[str, Any]:
    """Measures `config.model` with the adapter on `rows.train`, and the bare base where one is named."""
    began = time.perf_counter()
    model = load_job_model(config, rows)
    if adapter is not None:
        load_adapter(model, adapter, name="default", active=True)
    tokenizer = load_tokenizer(config.model)
    encoder_decoder = model.config.is_encoder_decoder
    evaluator = evaluator_for(config, rows, rows.train, tokenizer, encoder_decoder=encoder_decoder)
    counts = rows_record(evaluator.source, evaluator.counts)
    subject = f"{config.model} with {adapter}" if adapter else config.model
    say(f"measuring {subject} on {counts['rows']:,} rows of {counts['source']}")
    found = {"after": evaluator(model)}
    if bare is not None:
        say(f"measuring the bare base {bare}")
        if adapter is not None:
            set_adapter(model, None)
        else:
            model = load_job_model(dataclasses.replace(config, model=bare), rows)
        found["before"] = evaluator(model)
    record: dict[str, Any] = {
        "task": rows.task,
        "model": {"source": config.model, "class": type(model).__name__},
        "data": {"test": counts},
        "metrics": _metrics(found, rows.labels),
    }
    if adapter is not None:
        record["adapter"] = str(adapter)
    if train is not None and config.baselines:
        record["metrics"]["baselines"] = evaluator.baselines(train, seed=config.seed)
    record["cost"] = {
        "eval_s": round(time.perf_counter() - began, 3),
        "peak_memory_bytes": peak_memory_bytes(model.device),
    }
    return record


def _metrics(found: Mapping[str, Evaluation], labels: list[str] | None) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for when, evaluation in found.items():
        metrics[when] = {name: value for name, value in evaluation.metrics.items() if math.isfinite(value)}
        if evaluation.confusion is not None:
            metrics.setdefault("confusion", {})[when] = evaluation.confusion
    if labels is not None:
        metrics["labels"] = labels
    return metrics


def check_unchanged(run: FinishedRun) -> None:
    """The split follows from the rows: with others, rows that were trained on would count as held out."""
    for name, source in (("train", run.config.data), ("eval", run.config.eval_data), ("test", run.config.test_data)):
        known = run.record.get("data", {}).get(name, {}).get("sha256")
        if known and source and Path(source).expanduser().is_file():
            if sha256_file(Path(source).expanduser()) != known:
                raise InputError(f"{source} has changed since the run, so its held-out rows are not known: give --data")


def _training_rows(config: TrainConfig, generative: bool, say: Say) -> RowSet | None:
    if not config.baselines:
        return None
    try:
        return run_rows(config, generative=generative).train
    except DeltawError as error:
        say(f"no baselines, as the training rows cannot be read: {error}")
        return None


def model_labels(source: str | os.PathLike[str]) -> list[str] | None:
    """The class names that a classification model's configuration holds; None where it has none of its own."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(resolve(source).path_or_id, trust_remote_code=False)
    classifies = any("Classification" in name for name in config.architectures or ())
    names = [str(config.id2label[index]) for index in sorted(config.id2label or {})]
    return names if classifies and names != [f"LABEL_{index}" for index in range(len(names))] else None


def adapter_task(folder: Path) -> str | None:
    """The task that an adapter's configuration names, where it is one that changes the model's class."""
    if (folder / "adapter" / CONFIG_FILE).is_file():
        folder = folder / "adapter"
    try:
        fields = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return _CLASSES.get(fields.get("task_type"))
    except (OSError, ValueError, AttributeError):
        return None
