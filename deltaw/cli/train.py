"""`deltaw train`: flags and a file to a configuration, and a finished run to tables."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from deltaw.cli.console import Say, print_json, prints, show_run
from deltaw.cli.options import Flag, dashed, flags_of, given_values, joined, merged_keys, with_flags
from deltaw.cli.pages import EPILOG, Page, new_app
from deltaw.core.configs import aliases_of
from deltaw.core.errors import InputError
from deltaw.methods import METHODS
from deltaw.train.config import TrainConfig, expanded, make_config, read_yaml

PANELS = {
    "Model and data": (
        "model data eval_data test_data held_out layout columns split skip_bad_rows task labels template chat_template "
        "label_prompt max_length pack"
    ),
    "Method": "method adapter quantize double_quant merge_aware neftune_alpha",
    "Optimisation": (
        "epochs max_steps batch_size micro_batch_size learning_rate warmup_ratio schedule weight_decay max_grad_norm "
        "optimizer seed dtype device gradient_checkpointing fast memory_budget fp8 attention sharding"
    ),
    "Privacy": "dp noise_multiplier target_epsilon delta unit ledger budget_epsilon",
    "Evaluation": "eval_every early_stopping metric eval_batch_size max_new_tokens evaluate_before baselines",
    "Output": "output log_every save_every keep_checkpoints tensorboard",
}
_PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names.split()}


_RATES = ", ".join(f"{METHODS[name].learning_rate:g} for {name}" for name in METHODS)
#: What a key's default is here, where the configuration leaves it open.
_HELP = {
    "learning_rate": f"of AdamW, at its highest; by default {_RATES}",
    "output": "the run folder; by default a new runs/<model>-<data>-<method>-<n>",
}


def run_flags() -> list[Flag]:
    """The flags of a run, without the method's."""
    return flags_of(TrainConfig, lambda name: _PANEL_OF.get(name, "Other"), leave_out=("method_config",))


def train_flags() -> list[Flag]:
    """Every flag of `deltaw train`, by panel, each method's own among them."""
    own = run_flags()
    methods = joined(
        flag for name in METHODS for flag in flags_of(METHODS[name].config, lambda _: "Method", owner=name)
    )
    order = list(PANELS)
    own = [dataclasses.replace(flag, help=_HELP.get(flag.name, flag.help)) for flag in own]
    return sorted([*own, *methods], key=lambda flag: order.index(flag.panel) if flag.panel in order else len(order))


FLAGS = train_flags()
app = new_app()


def train(
    ctx: typer.Context,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="a YAML file of these keys (with underscores); flags win.", show_default=False
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="go on with a run from its last checkpoint, as it was started.", show_default=False
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print the run's record as one JSON object.")] = False,
    **given: Any,
) -> None:
    """Train an adapter (or the whole model) on your rows, measured before and after.

    deltaw train --model M --data rows.jsonl --method lora --r 16 --output runs/x

    Rows are JSON lines, CSV or Parquet with text; prompt and completion; messages; text and label; or tokens and tags.
    """
    values = given_values(FLAGS, given)
    if resume is not None and (values or config is not None):
        extra = ", ".join([*(["--config"] if config else []), *map(dashed, values)])
        raise InputError(f"--resume goes on with the run's own configuration: leave out {extra}")
    made = None if resume is not None else _configuration(config, values)
    from deltaw.studies.catalogue import fetch_model
    from deltaw.studies.job import resume as resume_job
    from deltaw.studies.job import run_job

    command = shlex.join(["deltaw", *ctx.obj])
    folder = Path(resume or "") if made is None else Path(made.output)
    try:
        with Say() as say:
            if made is None:
                run = resume_job(folder, command=command, say=say)
            else:
                fetch_model(made.model, progress=say.bytes)
                run = run_job(made, command=command, say=say)
    except KeyboardInterrupt as stopped:
        if (folder / "run.json").is_file():
            stopped.add_note(f"go on with deltaw train --resume {shlex.quote(str(folder))}")
        raise
    if prints():
        if json:
            print_json(run.record)
        else:
            show_run(run.record, run.path)


def _configuration(file: str | None, values: dict[str, Any]) -> TrainConfig:
    keys = expanded(read_yaml(file) if file is not None else {})
    values = expanded(values)
    method = values.get("method", keys.get("method", "lora"))
    foreign = [flag for flag in FLAGS if flag.name in values and flag.owners and method not in flag.owners]
    if foreign and method in METHODS:
        owners = ", ".join(foreign[0].owners)
        raise InputError(f"{foreign[0].option} is an option of {owners}, and the method is {method}: leave it out")
    aliases = dict(aliases_of(TrainConfig))
    if method in METHODS:
        aliases |= aliases_of(METHODS[method].config)
    keys = merged_keys(keys, values, aliases)
    keys.setdefault("output", "")
    made = make_config(keys)
    if not made.data:
        raise InputError("no training data: give --data (a JSONL, CSV or Parquet file, or a hub data set's name)")
    return made if made.output else make_config({**keys, "output": str(free_output(made))})


def free_output(config: TrainConfig) -> Path:
    """`runs/<model>-<data>-<method>-<n>` with the first free n.

    Raises:
        InputError: several processes run, which could choose different names.
    """
    from deltaw.train.loop import world_size

    if world_size() > 1:
        raise InputError("several processes must write to one folder: name it with --output")
    words = [Path(config.model).name, Path(config.data).stem, config.method]
    name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", word).strip("-.") or "x" for word in words).lower()
    count = 1
    while (path := Path("runs") / f"{name}-{count}").exists():
        count += 1
    return path


app.command(name="train", epilog=EPILOG, cls=Page)(with_flags(train, FLAGS))
