"""A training job, from a configuration to a run folder with a report: the whole story in `run_job`."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from deltaw.checkpoint import load_model, load_tokenizer, save_adapter, save_model
from deltaw.checkpoint.adapters import adapter_state, write_state
from deltaw.checkpoint.model_files import ModelFacts, model_facts
from deltaw.checkpoint.quantized import quantized_bytes
from deltaw.core.configs import to_plain
from deltaw.core.errors import DeltawError, InputError
from deltaw.core.files import atomic_folder
from deltaw.data import Collator, RowSet, encode, pack
from deltaw.data.encode import Encoded
from deltaw.data.packing import check_packing
from deltaw.evaluate.task import (
    AnswerCollator,
    Evaluation,
    TaskEvaluator,
    masking_collator,
    metric_function,
    split_answers,
)
from deltaw.methods import Full, adapt, adapter_names, method_of, set_adapter, summary
from deltaw.methods.host import active_method, book_of
from deltaw.methods.summary import Summary
from deltaw.models.sites import task_heads
from deltaw.report import write_report
from deltaw.studies.private import charged_plan, throughput
from deltaw.studies.rows import RunRows, rows_record, run_rows
from deltaw.studies.starting import go_on, starting_points
from deltaw.train import RunFolder, TrainConfig
from deltaw.train.config import make_config, read_yaml
from deltaw.train.loop import check_setting, fit, is_first_process, local_device, optimizer_steps
from deltaw.train.run_folder import device_record, peak_memory_bytes
from deltaw.train.sharding import is_sharded, whole_state

Say = Callable[[str], None]


def _silent(line: str) -> None:
    pass


#: Tokens a sequence where nothing is given and the model has as many positions.
DEFAULT_LENGTH = 512


def run_training(config: TrainConfig | None = None, *, say: Say = _silent, **keys: Any) -> Path:
    """Trains, evaluates and reports: what `deltaw train` does.

    Args:
        config: the run.
        say: takes lines of progress.
        **keys: the run's keys, in place of `config` (`model=...`, `data=...`, `r=8`).

    Returns:
        The run folder.
    """
    return run_job(config or make_config(keys), command="dw.run_training(...)", say=say).path


def resume(folder: str | Path, *, command: str = "", say: Say = _silent) -> RunFolder:
    """Goes on with a run from its last whole checkpoint, with the configuration it was started with."""
    path = Path(folder)
    if not (path / "config.yaml").is_file():
        raise InputError(f"no run at {path}: expected a folder that deltaw train wrote (with config.yaml in it)")
    keys = read_yaml(path / "config.yaml")
    if "clients" in keys:
        raise InputError(f"{path} is a federation: go on with deltaw federate --resume {path}")
    return run_job(make_config({**keys, "output": str(path)}), command=command, say=say, resuming=True)


def run_job(config: TrainConfig, *, command: str, say: Say, resuming: bool = False) -> RunFolder:
    """Reads the data, loads the model, measures it, trains, measures again, saves and reports."""
    began = time.perf_counter()
    first = is_first_process()
    if not first:
        say = _silent
    if not config.output:
        raise InputError("no output: name the run folder to write")
    check_setting(config)
    facts = model_facts(config.model)
    rows = run_rows(config, generative=facts.generative)
    config = resolved(config, rows, facts)
    run = _open(config, command, first, resuming)
    if resuming and run.record.get("status") == "done":
        say(f"{run.path} is done already")
        if first and not (run.path / "report.html").exists():
            write_report(run.path)
        return run
    run.save(status="running")
    with _recorded(run, fresh=not resuming):
        tokenizer = load_tokenizer(config.model)
        model = load_job_model(config, rows)
        encoded, collator = training_examples(config, rows, tokenizer, model)
        examples = encoded.examples
        name = add_adapter(model, config, **starting_points(config, model, examples, collator))
        private = charged_plan(run, config, rows, encoded, say) if config.dp else None
        control = active_method(model, name).control
        if control is not None:
            # Made for its checks: a schedule that cannot work is told before anything is measured.
            control(model, name, optimizer_steps(config, len(examples)))
        sites = summary(model, name)
        evaluators = _evaluators(config, rows, tokenizer, encoder_decoder=model.config.is_encoder_decoder)
        _describe(run, config, rows, model, sites, encoded.counts, evaluators)
        say(_plan_line(config, rows, sites, len(examples)))
        for set_name, record in run.record["data"].items():
            say(_counts_line(set_name, record))

        before, answers_before = _before(config, run, model, name, evaluators.get("test"), say)
        fitted = fit(
            model,
            name,
            examples,
            collator,
            config,
            run,
            evaluate=metric_function(evaluators["eval"]) if "eval" in evaluators else None,
            private=private,
            resume=resuming,
            say=say,
        )
        if control is not None:
            # What the method left, which is not what it began with.
            sites = summary(model, name)
            run.record["method"] |= _method_record(model, config, sites)
        _save(model, name, tokenizer, config, run)
        started = time.perf_counter()
        after, answers_after = _measure(model, evaluators.get("test"))
        eval_s = time.perf_counter() - started
        _finish(run, config, rows, evaluators.get("test"), before, after)
        if evaluators.get("test") is not None:
            run.write_examples(evaluators["test"].example_rows(answers_before, answers_after))
        run.record["cost"] = {
            "train_s": round(fitted.seconds, 3),
            "eval_s": round(eval_s, 3),
            "total_s": round(time.perf_counter() - began, 3),
            "steps": fitted.steps,
            **throughput(fitted, private),
            "peak_memory_bytes": max(fitted.peak_memory_bytes, peak_memory_bytes(model.device)),
            "adapter_bytes": sites.adapter_bytes,
        }
        if fitted.best_step is not None:
            run.record["cost"]["best_step"] = fitted.best_step
    if first:
        run.save(status="done")
        write_report(run.path)
    return run


def resolved(config: TrainConfig, rows: RunRows, facts: ModelFacts) -> TrainConfig:
    """The configuration with what the rows and the model decide filled in.

    Raises:
        InputError: a length beyond the model's positions.
    """
    length = config.max_length or min(DEFAULT_LENGTH, facts.positions or DEFAULT_LENGTH)
    if facts.positions is not None and length > facts.positions:
        raise InputError(
            f"max_length is {length} and {config.model} has {facts.positions} positions: "
            f"choose at most {facts.positions}"
        )
    metric = config.metric or ("f1" if rows.task == "token-classification" else "loss")
    return dataclasses.replace(config, task=rows.task, max_length=length, metric=metric)


def length_of(config: TrainConfig) -> int:
    """Tokens a sequence, of a resolved configuration."""
    assert config.max_length is not None
    return config.max_length


def load_job_model(config: TrainConfig, rows: RunRows) -> Any:
    """The model for a run's task, with classes named where the task has them."""
    whole = method_of(config.method_config).trains_base
    device = local_device(config.device)
    return load_model(
        config.model,
        task=rows.task,
        # Trained weights are kept in float32: small updates vanish in bfloat16.
        dtype="float32" if whole and config.dtype == "auto" else config.dtype,
        device=device,
        labels=rows.labels if rows.task.endswith("classification") else None,
        seed=config.seed,
        quantize=config.quantization,
    )


def add_adapter(model: Any, config: TrainConfig, **start: Any) -> str:
    """Puts the run's adapter on the model: a new one, or the one to go on from; a new head is trained along.

    `start` is what `starting_points` gives.
    """
    if config.adapter is not None:
        if isinstance(config.method_config, Full):
            raise InputError("method full trains the model itself and goes on with no adapter: give adapter or full")
        return go_on(model, config)
    method_config = config.method_config
    heads = [*task_heads(model), *_drawn_poolers(model, config)]
    if heads and not isinstance(method_config, Full):
        wanted = list(method_config.modules_to_save or ())
        missing = [head for head in heads if head not in wanted]
        method_config = dataclasses.replace(method_config, modules_to_save=[*wanted, *missing])
    adapt(model, method_config, name="default", seed=config.seed, **start)
    return adapter_names(model)[-1]


def _drawn_poolers(model: Any, config: TrainConfig) -> list[str]:
    """A pooler that the model's folder lacks (a masked language model's has none): new, so it goes with the head.

    What another seed changes was drawn, not read.
    """
    path = f"{model.base_model_prefix}.pooler"
    pooler = getattr(model.base_model, "pooler", None)
    if not task_heads(model) or pooler is None:
        return []
    weights = [f"{path}.{key}" for key, parameter in pooler.named_parameters() if parameter.dim() > 1]
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    dtype, seed = model.dtype, config.seed + 1
    other = load_model(config.model, task="sequence-classification", dtype=dtype, device="cpu", labels=names, seed=seed)
    own, others = dict(model.named_parameters()), dict(other.named_parameters())
    return [] if all(torch.equal(own[key].cpu(), others[key]) for key in weights) else [path]


def training_examples(config: TrainConfig, rows: RunRows, tokenizer: Any, model: Any) -> tuple[Encoded, Collator]:
    """Encoded training rows, and the collator for them."""
    encoded = encode(
        rows.train,
        tokenizer,
        rows.task,
        max_length=length_of(config),
        labels=rows.labels,
        template=config.rows_template,
    )
    if rows.task == "masked-lm":
        return encoded, masking_collator(tokenizer, config.seed)
    if model.config.is_encoder_decoder and rows.task == "causal-lm":
        raise InputError(f"{config.model} is an encoder-decoder and has no causal-lm: use instruct, with prompts")
    if model.config.is_encoder_decoder and rows.task == "instruct":
        if config.pack:
            raise InputError(f"{config.model} is an encoder-decoder, whose rows cannot be packed: leave pack out")
        apart = split_answers(encoded.examples, tokenizer)
        return dataclasses.replace(encoded, examples=apart), AnswerCollator(tokenizer.pad_token_id)
    if config.pack:
        check_packing(model)
        packed = pack(encoded.examples, length_of(config))
        packing = dataclasses.replace(encoded, examples=packed, kept=())
        return packing, Collator(rows.task, tokenizer.pad_token_id, packed=True)
    return encoded, Collator(rows.task, tokenizer.pad_token_id)


def _open(config: TrainConfig, command: str, first: bool, resuming: bool) -> RunFolder:
    if resuming:
        run = RunFolder.open(config.output, writes=first)
        run.record.pop("error", None)
        return run
    return RunFolder.create(config.output, config=config.plain(), command=command, writes=first)


@contextlib.contextmanager
def _recorded(run: RunFolder, *, fresh: bool) -> Iterator[None]:
    """Writes into `run.json` how the run failed, if it did.

    A fresh run that wrong input kept from beginning leaves nothing, so that the mended command may use its folder.
    """
    try:
        yield
    except BaseException as error:
        if fresh and isinstance(error, InputError) and "data" not in run.record:
            _withdraw(run)
            raise
        line = "interrupted" if isinstance(error, KeyboardInterrupt) else " ".join(str(error).split())
        with contextlib.suppress(DeltawError, OSError):
            run.save(status="failed", error=line or type(error).__name__)
        raise


def _withdraw(run: RunFolder) -> None:
    if run.writes:
        with contextlib.suppress(OSError):
            (run.path / "config.yaml").unlink()
            (run.path / "run.json").unlink()
            run.path.rmdir()


def _evaluators(
    config: TrainConfig, rows: RunRows, tokenizer: Any, *, encoder_decoder: bool
) -> dict[str, TaskEvaluator]:
    found: dict[str, TaskEvaluator] = {}
    for name, held in (("eval", rows.evaluation), ("test", rows.test)):
        if held is None:
            continue
        if name == "test" and held is rows.evaluation:
            found[name] = found["eval"]
            continue
        found[name] = evaluator_for(config, rows, held, tokenizer, encoder_decoder=encoder_decoder)
    return found


def evaluator_for(
    config: TrainConfig, rows: RunRows, held: RowSet, tokenizer: Any, *, encoder_decoder: bool
) -> TaskEvaluator:
    """What measures a model on `held`, with the task, labels and prompts of a resolved configuration's run."""
    return TaskEvaluator(
        rows.task,
        held,
        tokenizer,
        labels=rows.labels,
        template=config.rows_template,
        max_length=length_of(config),
        batch_size=config.eval_batch_size,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        encoder_decoder=encoder_decoder,
    )


def _describe(
    run: RunFolder,
    config: TrainConfig,
    rows: RunRows,
    model: Any,
    sites: Any,
    counts: Any,
    evaluators: dict[str, TaskEvaluator],
) -> None:
    data = {"train": rows_record(rows.train, counts)}
    if config.dp:
        # Anything else is an exact function of the rows.
        data["train"] = {key: data["train"][key] for key in ("source", "layout", "rows")}
    for name, evaluator in evaluators.items():
        if name == "eval" or evaluator is not evaluators.get("eval"):
            data[name] = rows_record(evaluator.source, evaluator.counts)
    head = model.get_output_embeddings()
    dtype = next(model.parameters()).dtype
    run.save(
        task=rows.task,
        device=device_record(model.device, dtype),
        model={
            "source": config.model,
            "family": model.config.model_type,
            "class": type(model).__name__,
            "parameters": sites.base_parameters,
            "tied": head is not None and head.weight is model.get_input_embeddings().weight,
            "weights_bytes": sites.base_bytes,
            **_four_bits(model),
        },
        data=data,
        method=_method_record(model, config, sites),
    )


def _method_record(model: Any, config: TrainConfig, sites: Summary) -> dict[str, Any]:
    """What `run.json` says of the method and of what it trains."""
    return {
        "name": sites.method,
        "config": to_plain(book_of(model).configs[sites.adapter]),
        "sites": [
            {
                "name": site.name,
                "kind": site.kind,
                "shape": list(site.shape),
                "parameters": site.parameters,
                **site.details,
            }
            for site in sites.sites
        ],
        "trainable_parameters": sites.trainable_parameters,
        "total_parameters": sites.base_parameters
        + (0 if isinstance(config.method_config, Full) else sites.trainable_parameters),
        "share": sites.share,
        "adapter_bytes": sites.adapter_bytes,
    }


def _four_bits(model: Any) -> dict[str, Any]:
    """What `run.json` says of a base held in 4 bits; {} for others."""
    held = quantized_bytes(model)
    return {"four_bit_parameters": held.parameters, "four_bit_bits": round(held.bits, 4)} if held.parameters else {}


def _before(
    config: TrainConfig,
    run: RunFolder,
    model: Any,
    name: str,
    evaluator: TaskEvaluator | None,
    say: Say,
) -> tuple[Evaluation | None, list[str] | None]:
    """The untrained model's figures: the bare base, or the model as it is where the base itself is trained."""
    if evaluator is None or not config.evaluate_before:
        return None, None
    if not isinstance(config.method_config, Full) and config.adapter is None:
        set_adapter(model, None)
    try:
        found = _measure(model, evaluator)
    finally:
        set_adapter(model, name)
    assert found[0] is not None
    # At once, so that a run that fails later has them too.
    run.save(metrics=_measured(before=found[0]))
    say("before: " + metrics_line(found[0].metrics))
    return found


def _measured(**evaluations: Evaluation | None) -> dict[str, Any]:
    """What `run.json` says of evaluations."""
    metrics: dict[str, Any] = {}
    for when, found in evaluations.items():
        if found is not None:
            metrics[when] = {k: v for k, v in found.metrics.items() if math.isfinite(v)}
            if found.confusion is not None:
                metrics.setdefault("confusion", {})[when] = found.confusion
    return metrics


def _measure(model: Any, evaluator: TaskEvaluator | None) -> tuple[Evaluation | None, list[str] | None]:
    if evaluator is None:
        return None, None
    found = evaluator(model)
    return found, evaluator.example_answers(model, found)


def _finish(
    run: RunFolder,
    config: TrainConfig,
    rows: RunRows,
    evaluator: TaskEvaluator | None,
    before: Evaluation | None,
    after: Evaluation | None,
) -> None:
    metrics = _measured(before=before, after=after)
    if evaluator is not None and config.baselines and not config.dp:
        metrics["baselines"] = evaluator.baselines(rows.train, seed=config.seed)
    if rows.labels is not None:
        metrics["labels"] = rows.labels
    run.record["metrics"] = metrics


def _save(model: Any, name: str, tokenizer: Any, config: TrainConfig, run: RunFolder) -> None:
    whole = isinstance(config.method_config, Full)
    if not is_sharded(model):
        if run.writes and whole:
            save_model(model, run.path / "model", tokenizer=tokenizer)
        elif run.writes:
            save_adapter(model, run.path / "adapter", name=name, base_model=config.model)
        return
    # Every process brings its part; the first one writes.
    state = whole_state(model) if whole else adapter_state(model, name)
    if not run.writes:
        return
    with atomic_folder(run.path / ("model" if whole else "adapter")) as folder:
        if whole:
            model.save_pretrained(folder, state_dict=state, safe_serialization=True)
            tokenizer.save_pretrained(folder)
        else:
            write_state(model, name, state, folder, base_model=config.model)


def metrics_line(metrics: dict[str, float]) -> str:
    """Metrics on one line."""
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items())


def _plan_line(config: TrainConfig, rows: RunRows, sites: Any, examples: int) -> str:
    trained = f"{sites.trainable_parameters:,} of {sites.base_parameters:,} parameters ({sites.share:.2%})"
    where = f"{len(sites.sites)} sites, {examples:,} sequences"
    return f"{rows.task} with {sites.method} on {config.model}: {trained} in {where}"


def _counts_line(name: str, record: dict[str, Any]) -> str:
    parts = [
        f"{record[key]:,} {key}" for key in ("rows", "tokens", "truncated", "dropped", "empty", "bad") if key in record
    ]
    parts += [f"{record[key]:,} {key}" for key in ("unmatched", "conflicts") if record.get(key)]
    return f"{name} rows: " + ", ".join(parts)
