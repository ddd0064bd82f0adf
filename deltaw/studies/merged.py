"""Merging the adapters of runs into a model to ship, into 16 bits or 4, and measuring what is kept."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deltaw.checkpoint import load_adapter, load_model, load_tokenizer, merge, save_model
from deltaw.checkpoint.merging import DENSE, MODES, MergeReport
from deltaw.checkpoint.model_files import model_facts, pick_dtype
from deltaw.checkpoint.quantized import saved_quantization
from deltaw.core.errors import DeltawError, InputError, unknown_name
from deltaw.core.files import write_json
from deltaw.core.generators import generator
from deltaw.methods import set_adapter, summary
from deltaw.models.sources import resolve
from deltaw.quant import NF4
from deltaw.studies.job import evaluator_for, resolved, training_examples
from deltaw.studies.rows import run_rows
from deltaw.studies.ship import FinishedRun, adapter_task, check_unchanged, model_labels, open_run, run_of_adapter

Say = Callable[[str], None]


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
    folder = new_folder(output)
    if into is not None and into != "nf4" and into not in DENSE:
        raise unknown_name("form to merge into", into, ["nf4", *DENSE])
    if mode not in MODES:
        raise unknown_name("mode of merging", mode, MODES)
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
    source = one_base(model, runs, adapters)
    task, names = _merged_task(source, task, labels, runs, adapters)
    base = _base_quantization(runs, quantize)
    four_bits = base is not None or into == "nf4" or is_4bit_folder(source)
    kept = _kept_dtype(source, dtype, into, runs, four_bits)
    say(f"loading {source} in {_name(kept)}" + (", in 4 bits" if base is not None else ""))
    # What a task's class has beyond the base's weights was drawn from the run's seed.
    seed = runs[0].config.seed if runs else 0
    place = device if four_bits else "cpu"
    loaded = load_model(source, task=task, dtype=kept, device=place, labels=names, seed=seed, quantize=base)
    weights, merged = _put_on(loaded, adapters)
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


def _put_on(model: Any, adapters: Sequence[tuple[str, float]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Loads the adapters beside each other: their weights by name, and what each is."""
    weights, merged = {}, []
    for number, (path, weight) in enumerate(adapters, 1):
        name = f"adapter-{number}"
        load_adapter(model, path, name=name)
        found = summary(model, name)
        weights[name] = weight
        merged.append(
            {"path": path, "weight": weight, "sites": len(found.sites), "parameters": found.trainable_parameters}
        )
    return weights, merged


def new_folder(output: str | os.PathLike[str]) -> Path:
    """The folder to write, which has to be new or empty."""
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{folder} {'is not empty' if folder.is_dir() else 'is a file'}: choose a new folder as output"
        )
    return folder


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
            check_unchanged(self.run)
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
        # Of a federation there are the test rows alone, which a merge is measured on.
        if self.run is None or self.run.federated or not count:
            return None
        train = dataclasses.replace(self.rows.train, rows=_some(self.rows.train.rows, count))
        rows = dataclasses.replace(self.rows, train=train)
        encoded, collate = training_examples(dataclasses.replace(self.config, pack=False), rows, self.tokenizer, model)
        size = self.config.eval_batch_size
        examples = sorted(encoded.examples, key=lambda example: len(example["input_ids"]))
        return [collate(examples[start : start + size]) for start in range(0, len(examples), size)]


def _some(rows: Sequence[Any], count: int) -> list[Any]:
    order = torch.randperm(len(rows), generator=generator(0, "calibration")).tolist()
    return [rows[index] for index in order[:count]]


def is_4bit_folder(source: str | os.PathLike[str]) -> bool:
    """Whether a model's folder holds 4-bit weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(resolve(source).path_or_id, trust_remote_code=False)
    return saved_quantization(config, source) is not None


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


def one_base(model: str | None, runs: Sequence[FinishedRun], adapters: Sequence[tuple[str, float]]) -> str:
    """The base of all the adapters: the one named, or that of their runs."""
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
    named = [run.config.task for run in runs] + [adapter_task(Path(path)) for path, _ in adapters]
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
