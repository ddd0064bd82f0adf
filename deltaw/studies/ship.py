"""After training: measuring what a run made (or any model and adapter), and merging adapters into a model to ship."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaw.checkpoint import load_adapter, load_model, load_tokenizer, merge, save_model
from deltaw.checkpoint.adapters import CONFIG_FILE
from deltaw.checkpoint.merging import DENSE, MergeReport
from deltaw.checkpoint.model_files import model_facts, pick_dtype
from deltaw.core.errors import DeltawError, InputError, unknown_name
from deltaw.core.files import sha256_file, write_json
from deltaw.core.generators import generator
from deltaw.data import RowSet
from deltaw.evaluate.task import Evaluation
from deltaw.methods import Full, set_adapter, summary
from deltaw.models.sources import resolve
from deltaw.quant import NF4
from deltaw.studies.job import evaluator_for, load_job_model, resolved, training_examples
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
    config = make_config(keys)
    whole = isinstance(config.method_config, Full)
    made = path / ("model" if whole else "adapter")
    if not made.is_dir():
        raise InputError(
            f"the run at {path} has no {made.name} (its status is {run.record.get('status')!r}): "
            f"finish it with deltaw train --resume {path}"
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
        _check_unchanged(run)
        rows = run_rows(config, generative=facts.generative)
        if rows.test is None:
            raise InputError(f"the run at {run.path} held no rows out: give some with data (--data FILE)")
        train: RowSet | None = rows.train
        held = dataclasses.replace(rows, train=rows.test)
    else:
        alone = dataclasses.replace(config, data=data, eval_data=None, test_data=None, held_out=0)
        held = run_rows(alone, generative=facts.generative)
        train = _training_rows(config, facts.generative, say)
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
    task = config.task or (None if adapter is None else _adapter_task(Path(adapter)))
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


def _check_unchanged(run: FinishedRun) -> None:
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


def _adapter_task(folder: Path) -> str | None:
    """The task that an adapter's configuration names, where it is one that changes the model's class."""
    if (folder / "adapter" / CONFIG_FILE).is_file():
        folder = folder / "adapter"
    try:
        fields = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return _CLASSES.get(fields.get("task_type"))
    except (OSError, ValueError, AttributeError):
        return None


# Merging.


def merge_into(
    output: str | os.PathLike[str],
    *,
    adapters: Sequence[tuple[str, float]],
    model: str | None = None,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    dtype: str | None = None,
    into: str | None = None,
    mode: str = "retain",
    calibrate: int = 256,
    measure: bool = True,
    quantize: str | None = None,
    device: str = "auto",
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Writes a model with adapters merged into its weights, as a folder that plain transformers loads.

    Where 4 bits are involved, what was learnt is measured before and after: retention is (merged - base) / (adapter -
    base) of each metric on held-out rows.

    Args:
        output: the folder to write: new, or empty.
        adapters: adapter folders or run folders, with the weight of each.
        model: the base; None means the one that the adapters' run was trained on.
        task: what the model is for; None means what the run or the adapter says, else language modelling.
        labels: names of the classes of a classification model; None means the run's or the model's.
        dtype: `float32`, `bfloat16` or `float16`; None means the one that the base is stored in.
        into: `nf4`, `bf16`, `float16` or `float32`; None means `dtype`, in which a 4-bit base is written out too.
        mode: into 4 bits, `retain` or `requantize`, as for `dw.merge`.
        calibrate: rows of the run's training set that `retain` looks at; 0: it goes by the weights alone.
        measure: whether to measure retention, where 4 bits are involved and the run held rows out.
        quantize: `nf4` for a base that the adapters were trained on in 4 bits; None means as in their run.
        device: where to compute: `auto`, `cpu`, `cuda`.
        say: takes lines of progress.

    Returns:
        What was merged: model, dtype, into, adapters (with sites and parameters), output, bytes; with 4 bits also
        `mode`, `layers` (each one's errors) and, where measured, `metrics` and `retention`.

    Raises:
        InputError: a folder that is not empty, a run without an adapter, adapters of different bases.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder} {'is not empty' if folder.is_dir() else 'is a file'}: choose a new folder as output"
        )
    if into is not None and into != "nf4" and into not in DENSE:
        raise unknown_name("form to merge into", into, ["nf4", *DENSE])
    if quantize not in (None, "none", "nf4"):
        raise unknown_name("quantisation", quantize, ["none", "nf4"])
    if calibrate < 0:
        raise InputError(f"calibrate is {calibrate}: expected a number of rows, or 0 for none")
    runs = [open_run(run) for path, _ in adapters if (run := run_of_adapter(path) or _finished(path)) is not None]
    whole = next((run for run in runs if run.adapter is None), None)
    if whole is not None:
        raise InputError(
            f"the run at {whole.path} trained the whole model, which is at {whole.model}: nothing to merge"
        )
    source = _one_base(model, runs, adapters)
    task, names = _merged_task(source, task, labels, runs, adapters)
    base = _base_quantization(runs, quantize)
    four_bits = base is not None or into == "nf4" or is_4bit_folder(source)
    kept = _kept_dtype(source, dtype, into, runs, four_bits)
    say(f"loading {source} in {_name(kept)}" + (", in 4 bits" if base is not None else ""))
    # What a task's class has beyond the base's weights was drawn from the run's seed.
    seed = runs[0].config.seed if runs else 0
    place = device if four_bits else "cpu"
    loaded = load_model(source, task=task, dtype=kept, device=place, labels=names, seed=seed, quantize=base)
    weights = {}
    merged = []
    for number, (path, weight) in enumerate(adapters, 1):
        name = f"adapter-{number}"
        load_adapter(loaded, path, name=name)
        found = summary(loaded, name)
        weights[name] = weight
        merged.append(
            {"path": path, "weight": weight, "sites": len(found.sites), "parameters": found.trainable_parameters}
        )
    looks = calibrate if into == "nf4" and mode == "retain" else 0
    study = _Retention(runs, source, say) if four_bits and (measure or looks) else None
    metrics: dict[str, Any] = {}
    if study is not None and measure:
        metrics |= study.measured("base", loaded, active=None)
    set_adapter(loaded, weights)
    if study is not None and measure:
        metrics |= study.measured("adapter", loaded, active=weights)
    say(f"merging {len(adapters)} adapter{'s' if len(adapters) > 1 else ''}" + (" in float32" if not four_bits else ""))
    report = MergeReport()
    target = into or (_name(kept) if four_bits else None)
    batches = study.batches(loaded, looks) if study is not None else None
    merge(loaded, into=target, mode=mode, calibration=batches, keep_original=False, report=report)
    if study is not None and measure:
        metrics |= study.measured("merged", loaded, active=None)
    save_model(loaded, folder, tokenizer=load_tokenizer(source))
    done: dict[str, Any] = {
        "model": source,
        "class": type(loaded).__name__,
        "task": task,
        "dtype": _name(kept),
        "into": "nf4" if into == "nf4" else _name(DENSE[into] if into else kept),
        "adapters": merged,
        "output": str(folder),
        "output_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }
    if report.layers:
        done |= {
            "mode": report.mode,
            "calibration_tokens": report.calibration_tokens,
            "layers": {path: dataclasses.asdict(error) for path, error in report.layers.items()},
        }
    if metrics:
        done |= {"metrics": metrics, "retention": retention(metrics)}
    if four_bits:
        write_json(folder / "deltaw_merge.json", done)
    return done


def retention(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """(merged - base) / (adapter - base) of each metric; left out where the adapter changed nothing."""
    base, adapter, merged = metrics["base"], metrics["adapter"], metrics["merged"]
    return {
        name: (merged[name] - base[name]) / (adapter[name] - base[name])
        for name in base
        if name in adapter and name in merged and adapter[name] != base[name]
    }


class _Retention:
    """What a merge is measured and calibrated with: the rows of the adapters' run."""

    def __init__(self, runs: Sequence[FinishedRun], source: str, say: Say) -> None:
        self.say = say
        self.run = runs[0] if runs else None
        if self.run is None:
            say("no run beside the adapter: merged by the weights alone, and retention is not measured")
            return
        config = dataclasses.replace(self.run.config, model=source, labels=self.run.labels, early_stopping=0)
        facts = model_facts(source)
        try:
            _check_unchanged(self.run)
            self.rows = run_rows(config, generative=facts.generative)
        except DeltawError as error:
            say(f"merged by the weights alone, and retention is not measured: {error}")
            self.run = None
            return
        self.config = resolved(config, self.rows, facts)
        self.tokenizer = load_tokenizer(source)

    def measured(self, when: str, model: Any, active: Any) -> dict[str, dict[str, float]]:
        """{when: metrics on the run's test rows}, {} where it held none out."""
        if self.run is None or self.rows.test is None:
            return {}
        if when != "merged":
            set_adapter(model, active)
        evaluator = evaluator_for(
            self.config, self.rows, self.rows.test, self.tokenizer, encoder_decoder=model.config.is_encoder_decoder
        )
        subject = {"base": "the base", "adapter": "the base with its adapter", "merged": "the merged model"}[when]
        self.say(f"measuring {subject} on {len(self.rows.test.rows):,} held-out rows")
        found = evaluator(model).metrics
        return {when: {name: value for name, value in found.items() if math.isfinite(value)}}

    def batches(self, model: Any, count: int) -> list[dict[str, Any]] | None:
        """Some of the training rows, chosen by a fixed seed, as forward passes."""
        if self.run is None or not count:
            return None
        train = dataclasses.replace(self.rows.train, rows=_some(self.rows.train.rows, count))
        rows = dataclasses.replace(self.rows, train=train)
        examples, collate, _ = training_examples(
            dataclasses.replace(self.config, pack=False), rows, self.tokenizer, model
        )
        size = self.config.eval_batch_size
        examples = sorted(examples, key=lambda example: len(example["input_ids"]))
        return [collate(examples[start : start + size]) for start in range(0, len(examples), size)]


def _some(rows: Sequence[Any], count: int) -> list[Any]:
    order = torch.randperm(len(rows), generator=generator(0, "calibration")).tolist()
    return [rows[index] for index in order[:count]]


def is_4bit_folder(source: str | os.PathLike[str]) -> bool:
    """Whether a model's folder holds 4-bit weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(resolve(source).path_or_id, trust_remote_code=False)
    return bool(getattr(config, "quantization_config", None))


def _base_quantization(runs: Sequence[FinishedRun], quantize: str | None) -> NF4 | None:
    """How the base was held in training; the runs have to agree."""
    if quantize is not None:
        return NF4() if quantize == "nf4" else None
    held = {run.config.quantization for run in runs}
    if len(held) > 1:
        raise InputError("the adapters were trained on bases held in different ways (4 bits or not): merge them apart")
    return held.pop() if held else None


def _kept_dtype(
    source: str, dtype: str | None, into: str | None, runs: Sequence[FinishedRun], four_bits: bool
) -> torch.dtype:
    """The dtype of the values: as asked for, as in training on 4 bits, or as stored."""
    if dtype is not None:
        return pick_dtype(dtype, torch.device("cpu"))
    if into in DENSE and not four_bits:
        return DENSE[into]
    if four_bits:
        recorded = runs[0].record.get("device", {}).get("dtype") if runs else None
        return pick_dtype(recorded, torch.device("cpu")) if recorded else torch.bfloat16
    return stored_dtype(source)


def _finished(path: str) -> Path | None:
    """A folder with a run in it that has no adapter: `open_run` says what it lacks."""
    return Path(path) if (Path(path) / "run.json").is_file() else None


def _one_base(model: str | None, runs: Sequence[FinishedRun], adapters: Sequence[tuple[str, float]]) -> str:
    if model is not None:
        return model
    bases = sorted({run.model for run in runs})
    if len(bases) > 1:
        raise InputError(f"the runs were trained on different models ({', '.join(bases)}): name the base with --model")
    missing = next((path for path, _ in adapters if not Path(path).exists()), None)
    if missing is not None:
        raise InputError(f"no such folder: {missing}; give a run folder, or an adapter with --model")
    if not bases:
        raise InputError(f"{adapters[0][0]} is no run folder, so the base is not known: name it with --model")
    return bases[0]


def _merged_task(
    source: str,
    task: str | None,
    labels: Sequence[str] | None,
    runs: Sequence[FinishedRun],
    adapters: Sequence[tuple[str, float]],
) -> tuple[str, list[str] | None]:
    """The task to load the base for, and its class names."""
    named = [run.config.task for run in runs] + [_adapter_task(Path(path)) for path, _ in adapters]
    task = task or next((name for name in named if name), None)
    if task is None:
        task = "causal-lm" if model_facts(source).generative else "masked-lm"
    if not task.endswith("classification"):
        return task, None
    names = list(labels) if labels is not None else next((run.labels for run in runs if run.labels), None)
    names = names or model_labels(source)
    if names is None:
        raise InputError(f"the adapter is for {task}: name its classes with --labels, in the order of its head's rows")
    return task, names


def stored_dtype(source: str | os.PathLike[str]) -> torch.dtype:
    """The dtype that most of a model's parameters are stored in; float32 for one on the hub that does not say."""
    import transformers
    from safetensors import SafetensorError, safe_open

    place = resolve(source).path_or_id
    sizes: dict[str, int] = {}
    for file in sorted(Path(place).glob("*.safetensors")) if Path(place).is_dir() else []:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():
                    part = tensors.get_slice(key)
                    sizes[part.get_dtype()] = sizes.get(part.get_dtype(), 0) + math.prod(part.get_shape())
        except SafetensorError as error:
            raise InputError(f"{file} is damaged ({' '.join(str(error).split())}): copy the model again") from None
    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    usable = {name: size for name, size in sizes.items() if name in known}
    if usable:
        return known[max(usable, key=lambda name: usable[name])]
    if Path(place).is_dir():
        return torch.float32
    config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
