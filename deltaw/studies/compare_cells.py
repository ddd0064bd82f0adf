"""One cell of a comparison: trains its run, then measures what came of it. Runs in a process of its own.

Each measurement is kept in the cell's `cell.json` with the mark of what it is of, so that a cell that was cut short
measures only what is missing, and one whose comparison has grown measures only what is new.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from deltaw.checkpoint import load_adapter, load_tokenizer, merge
from deltaw.checkpoint.model_files import model_facts
from deltaw.core.errors import DeltawError, InputError
from deltaw.core.files import write_json, write_text
from deltaw.core.generators import generator
from deltaw.data import read_rows
from deltaw.data.example_data import vader_rows
from deltaw.data.rows import row_input
from deltaw.data.templates import special_affixes
from deltaw.evaluate.likelihood import perplexity
from deltaw.evaluate.running import evaluating
from deltaw.evaluate.task import Evaluation, TaskEvaluator
from deltaw.methods import METHODS
from deltaw.studies.compare_plan import Cell, Plan, Probe, plan_of, transfer_rows
from deltaw.studies.job import evaluator_for, load_job_model, resolved, run_job
from deltaw.studies.rows import run_rows
from deltaw.train import TrainConfig
from deltaw.train.config import make_config
from deltaw.train.run_folder import device_record, peak_memory_bytes

Say = Callable[[str], None]

PLAN = "plan.json"
CELL = "cell.json"
PREDICTIONS = "predictions.jsonl"
#: Passes over the prompt, and generations, that a latency is the median of; one more of each goes before. Where they
#: take long their times vary little, and fewer do.
_PASSES, _GENERATIONS = 7, 3
_ENOUGH_S = 10.0


def run_cell(output: str | Path, name: str, *, say: Say = lambda line: None) -> dict[str, Any]:
    """Brings one cell of a planned comparison to its end, from wherever it was.

    Args:
        output: the comparison's folder, with its `plan.json`.
        name: the cell's.
        say: takes lines of progress.

    Returns:
        The cell's record, as `cell.json` has it.

    Raises:
        InputError: no such plan or cell, and what a run raises.
    """
    plan = read_plan_file(output)
    if name not in plan.cells:
        raise InputError(f"no cell {name} in {output}: expected one of its {PLAN}")
    cell = plan.cells[name]
    folder = plan.folder(cell)
    record = cell_record(folder) or {"format": 1, "cell": name, "measured": {}}
    if not cell.bare:
        _train(cell, folder, f"{plan.command} --only {name}", say)
    record["parallel"] = max(plan.parallel, record.get("parallel", 1))
    missing = missing_measurements(plan, cell, record)
    if missing:
        _measure(plan, cell, folder, record, missing, say)
    # Optimizer states of many cells would fill a disk, and a cell that is done resumes from nothing.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return record


def read_plan_file(output: str | Path) -> Plan:
    """The plan of a comparison's folder."""
    file = Path(output) / PLAN
    try:
        return plan_of({**json.loads(file.read_text(encoding="utf-8")), "output": str(output)})
    except FileNotFoundError:
        raise InputError(f"no {PLAN} in {output}: expected the folder of a comparison") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged ({error}): choose another --output") from None


def cell_record(folder: Path) -> dict[str, Any] | None:
    """What `cell.json` says; None where there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / CELL).read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return None


def missing_measurements(plan: Plan, cell: Cell, record: Mapping[str, Any]) -> list[str]:
    """Measurements that a cell's record lacks, or has of something else."""
    measured = record.get("measured", {})
    return [name for name, mark in plan.wanted(cell).items() if measured.get(name, {}).get("of") != mark]


def _train(cell: Cell, folder: Path, command: str, say: Say) -> None:
    resuming = (folder / "run.json").is_file()
    if folder.exists() and not resuming:
        # Cut short before its first record: nothing to go on from.
        shutil.rmtree(folder)
    run_job(make_config({**cell.keys, "output": str(folder)}), command=command, say=say, resuming=resuming)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _measure(plan: Plan, cell: Cell, folder: Path, record: dict[str, Any], missing: list[str], say: Say) -> None:
    """Makes the missing measurements one by one; each is written before the next begins."""
    began = time.perf_counter()
    model, config = _load(cell, folder)
    tokenizer = load_tokenizer(config.model)
    marks = plan.wanted(cell)
    record["device"] = device_record(model.device, next(model.parameters()).dtype)
    for name in missing:
        kind, _, probe_name = name.partition(":")
        say(f"measuring {name.replace(':', ' ')}")
        if kind == "task":
            probe = next(probe for probe in cell.probes if probe.name == probe_name)
            evaluator, found = _asked(model, tokenizer, probe)
            result = {
                "metrics": {key: value for key, value in found.metrics.items() if math.isfinite(value)},
                "main": found.main,
                "rows": len(evaluator.rows),
            }
            if probe is cell.probes[0]:
                _write_predictions(folder / PREDICTIONS, evaluator, found)
        elif kind == "text":
            assert plan.text is not None
            result = text_perplexity(model, tokenizer, plan.text, config)
        else:
            assert plan.latency is not None
            result = _latencies(model, cell, plan.latency, say)
        record["measured"][name] = {"of": marks[name], **result}
        write_json(folder / CELL, record)
    record["measure_s"] = round(time.perf_counter() - began, 3)
    record.setdefault("peak_memory_bytes", peak_memory_bytes(model.device))
    write_json(folder / CELL, record)


def _load(cell: Cell, folder: Path) -> tuple[Any, TrainConfig]:
    """The cell's model as a user would load it: the base, with the adapter that the run wrote, or the trained model."""
    config = make_config(cell.keys)
    whole = not cell.bare and METHODS[config.method].trains_base
    facts = model_facts(config.model)
    rows = run_rows(config, generative=facts.generative)
    config = resolved(config, rows, facts)
    if whole:
        config = dataclasses.replace(config, model=str(folder / "model"))
    model = load_job_model(config, rows)
    if not cell.bare and not whole:
        load_adapter(model, folder / "adapter", name="default", active=True)
    return model, config


def _asked(model: Any, tokenizer: Any, probe: Probe) -> tuple[TaskEvaluator, Evaluation]:
    config = make_config(probe.keys)
    facts = model_facts(config.model)
    rows = run_rows(config, generative=facts.generative)
    config = resolved(config, rows, facts)
    held = rows.test
    if probe.file is not None:
        rows = transfer_rows(config, rows, probe.file, facts)
        held = rows.train
    assert held is not None
    encoder_decoder = model.config.is_encoder_decoder
    evaluator = evaluator_for(config, rows, held, tokenizer, encoder_decoder=encoder_decoder)
    return evaluator, evaluator(model)


def _write_predictions(file: Path, evaluator: TaskEvaluator, found: Evaluation) -> None:
    """A line for each test row: which it is, the right answer, the model's, and its share of the main metric."""
    assert found.shares is not None
    lines = []
    for index, (row, reference) in enumerate(zip(evaluator.rows, evaluator.references(), strict=True)):
        above, below = found.shares[index]
        line: dict[str, Any] = {"row": hashlib.sha256(row_input(row).encode()).hexdigest()[:16]}
        line |= {"reference": reference}
        if found.answers is not None:
            line["answer"] = found.answers[index]
        if found.main in ("accuracy", "exact_match"):
            line["correct"] = above == below
        lines.append(json.dumps({**line, "share": [above, below]}, ensure_ascii=False))
    write_text(file, "\n".join(lines) + "\n")


# General text.


def text_perplexity(model: Any, tokenizer: Any, text: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Perplexity of running text, in windows of the run's length that do not overlap.

    The tokens of all documents stand one after the other; each window begins with what the tokenizer puts before a
    text (BOS), and every token but a window's first is predicted from those before it in the window.

    Args:
        model: a causal language model.
        tokenizer: the model's.
        text: `text`, a file or None for the editorials of the example data, and `tokens`, how many are read.
        config: resolved, of the run.

    Returns:
        `loss` (nats a token), `perplexity`, `tokens`; {} for an encoder-decoder, which continues no text.
    """
    if model.config.is_encoder_decoder:
        return {}
    assert config.max_length is not None
    ids = tokenizer("\n".join(general_documents(text["text"])), add_special_tokens=False, verbose=False)["input_ids"]
    ids = ids[: int(text["tokens"])]
    before = special_affixes(tokenizer)[0]
    size = config.max_length - len(before)
    windows = [ids[start : start + size] for start in range(0, len(ids), size)]
    examples = [
        {"input_ids": before + window, "labels": [-100] * len(before) + window} for window in windows if len(window) > 1
    ]
    if not examples:
        raise InputError(f"the general text has {len(ids)} tokens: give more, or forgetting: false")
    return dict(perplexity(model, examples, batch_size=config.eval_batch_size, pad_token_id=tokenizer.pad_token_id))


def general_documents(file: str | None) -> list[str]:
    """The general text: a file's (rows with `text`, or plain text), else newspaper editorials of the example data."""
    if file is None:
        return [row["text"] for row in vader_rows("editorials", classes=3)]
    if Path(file).suffix.lower() in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"):
        return [row_input(row) for row in read_rows(file, layout="text")]
    try:
        return [Path(file).read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the general text {file}: {error}") from None


# Latency.


def _latencies(model: Any, cell: Cell, asked: Mapping[str, int], say: Say) -> dict[str, Any]:
    """With the adapter beside the base, then merged into it; the model is of no further use."""
    found = {"unmerged": latency(model, **asked)}
    if cell.mergeable and not cell.bare:
        try:
            # Codes of a 4-bit base decide no time: the quick way of rounding does.
            merge(model, mode="requantize", keep_original=False)
        except DeltawError as error:
            say(f"not merged: {error}")
        else:
            found["merged"] = latency(model, **asked)
    return found


def latency(model: Any, *, batch: int, prompt: int, tokens: int) -> dict[str, float]:
    """How long a model takes, after one pass to warm up: medians, in seconds.

    Args:
        model: in evaluation mode, on its device.
        batch: prompts at a time.
        prompt: tokens a prompt, drawn at random.
        tokens: to generate greedily after it.

    Returns:
        `prompt_s`, one forward pass over the prompts; `token_s`, a generated token (of the whole batch) after the
        first, absent where the model generates none.
    """
    size = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(size, (batch, prompt), generator=generator(0, "latency")).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with evaluating(model):
        found = {"prompt_s": _median(lambda: [_timed(model, inputs)], _PASSES)}
        if tokens > 1 and model.can_generate() and model.get_output_embeddings() is not None:
            found["token_s"] = _median(lambda: _generation(model, inputs, tokens), _GENERATIONS)
    return found


def _median(measure: Callable[[], list[float]], times: int) -> float:
    """Of what `measure` gives, after one call to warm up, in `times` calls or as many as go into `_ENOUGH_S`."""
    measure()
    began = time.perf_counter()
    found: list[float] = []
    for _ in range(times):
        found += measure()
        if time.perf_counter() - began > _ENOUGH_S:
            break
    return statistics.median(found)


def _timed(model: Any, inputs: Mapping[str, Any]) -> float:
    more = {}
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = inputs["input_ids"][:, :1]
    _synchronize(model.device)
    began = time.perf_counter()
    model(**inputs, **more)
    _synchronize(model.device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _generation(model: Any, inputs: Mapping[str, Any], tokens: int) -> list[float]:
    """Seconds between one generated token and the next: `tokens` - 1 of them."""
    from transformers import GenerationConfig
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):  # type: ignore[misc]
        """`generate` hands each token over once it is on the CPU."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    own, clock = model.generation_config, Clock()
    start = getattr(own, "decoder_start_token_id", None)
    settings = GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, decoder_start_token_id=start
    )
    try:
        # generate() fills what its settings leave open from the model's own: penalties, lengths, end tokens.
        model.generation_config = settings
        model.generate(**inputs, generation_config=settings, streamer=clock)
    finally:
        model.generation_config = own
    # The first time is the prompt's, the second one the first token's.
    return [late - early for early, late in zip(clock.times[1:], clock.times[2:], strict=False)]
