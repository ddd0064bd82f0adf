"""What a run is made of: one flat set of keys, the method's own among them, from YAML, flags or Python."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.core.configs import accepts, aliases_of, to_plain
from deltaw.core.errors import InputError, unknown_name
from deltaw.data import TASKS, Template
from deltaw.methods import METHODS
from deltaw.methods.lora import LoRA
from deltaw.quant.config import NF4

#: Names in use for a method with a setting, and what they stand for.
SHORTHANDS: dict[str, dict[str, Any]] = {
    "qlora": {"method": "lora", "quantize": "nf4"},
    "rslora": {"method": "lora", "rslora": True},
    "qdora": {"method": "dora", "quantize": "nf4"},
    "rsdora": {"method": "dora", "rslora": True},
}

OPTIMIZERS = ("adamw", "paged_adamw", "paged_adamw_8bit")


@accepts(lr="learning_rate", per_device_train_batch_size="micro_batch_size", max_seq_length="max_length")
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run, fully resolved.

    Attributes:
        model: an embedded name (`smollm2-135m`, `minilm`), a folder, a `.gguf` file or a hub id.
        data: training rows: a JSONL, CSV or Parquet file, or a hub data set's name.
        output: the run folder.
        eval_data: rows for evaluation during training; None means that `held_out` splits them off `data`.
        test_data: rows for the figures before and after; None means the evaluation rows.
        held_out: a share (float) or number (int) of `data`'s rows to hold out; 0 for none; None means 0.1 where neither
            `eval_data` nor `test_data` is given.
        layout: of the rows: `auto`, `text`, `prompt`, `chat`, `label`, `tags`, or `entity` (entity prompts turned into
            tokens and tags).
        columns: our field's name to the data's column, where they differ.
        split: of a hub data set.
        skip_bad_rows: count malformed rows instead of stopping at the first.
        task: one of `causal-lm`, `instruct`, `sequence-classification`, `token-classification`, `masked-lm`; None means
            what the layout and the model suggest.
        labels: the names of the labels; None means those of the training rows.
        template: `plain` or `chat`: how prompts are written out.
        chat_template: Jinja text or `chatml`, in place of the tokenizer's own.
        label_prompt: how a text with a label is asked; holds `{text}`.
        max_length: tokens a sequence; None means 512, or the model's positions where it has fewer.
        pack: put several short rows into one sequence, without attention across them.
        method: `lora`, `full`, ...; its own options stand beside these. `qlora` stands for lora with quantize nf4,
            `rslora` for lora with rslora.
        method_config: the method's configuration.
        adapter: an adapter folder to go on from.
        quantize: what the frozen base is held in: `none` (as `dtype` says) or `nf4` (4-bit NormalFloat).
        neftune_alpha: scale of the noise on input embeddings in training (NEFTune); 0: none, 5 to 15 are usual.
        double_quant: hold the 4-bit weights' scales in 8 bits: 4.127 bits a parameter instead of 4.5.
        merge_aware: share of the steps, the last ones, in which a 4-bit base computes with the adapter merged into it
            and quantised again, so that merging loses less.
        epochs: passes over the data.
        max_steps: optimizer steps, in place of epochs.
        batch_size: rows an optimizer step, over all processes.
        micro_batch_size: rows a forward pass; gradients are accumulated to `batch_size`.
        learning_rate: None means the method's usual one.
        warmup_ratio: share of the steps with a linearly rising rate, before the schedule.
        schedule: `cosine`, `linear` or `constant`.
        weight_decay: AdamW's.
        max_grad_norm: the norm that gradients are clipped to; 0: not at all. Under `dp` each unit's by itself.
        dp: differentially private training: units sampled at random, gradients clipped by unit, noise on their sum;
            `batch_size` is then the number of units that a step has on average.
        noise_multiplier: standard deviation of the noise over `max_grad_norm`.
        target_epsilon: in place of `noise_multiplier`: the least noise that keeps the run within this epsilon.
        delta: of the statement; None means 1e-5, or a tenth of one over the units where that is less.
        unit: the column that names whom a row is of (a customer), all of whose rows are hidden together; None: every
            row is one by itself.
        ledger: a file that sums up what all runs on these people's data cost, and refuses what would exceed its budget;
            in a federation a folder with one such file for each organisation.
        budget_epsilon: of a new ledger.
        optimizer: `adamw`, or with states in host memory that visit the device for the step `paged_adamw` and
            `paged_adamw_8bit` (states in 8 bits).
        seed: of everything that is random; a whole number from 0 to 4294967295.
        dtype: of the base: `auto` (bfloat16 where the device has it), `float32`, `bfloat16`.
        device: `auto`, `cpu`, `cuda`.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        fast: fused decoder layers: `auto` (on a GPU, where layers are of a kind that is known), `on` (an error where
            none is), `off`.
        memory_budget: the most that may be allocated on the GPU, in bytes or as "10.4GB": fused layers keep what fits
            and make the rest again. None: what the card has.
        fp8: fused layers' products with frozen weights in 8-bit floats: `none`, `backward` (gradients' alone, which
            lose next to nothing by it), `most` (of the forward pass o, gate and up too), `all`. Faster on GPUs from
            compute capability 8.9 on.
        attention: of fused layers, where it is causal and needs no mask: `sdpa` (torch's, cuDNN's kernels first) or
            `flash` (FlashAttention 4, the package flash-attn-4), which is faster for rows of many thousand tokens.
        log_every: optimizer steps between lines of `metrics.jsonl`.
        eval_every: optimizer steps between evaluations; 0: once an epoch.
        save_every: optimizer steps between checkpoints; 0: once an epoch.
        keep_checkpoints: how many to keep besides the best.
        early_stopping: evaluations without improvement after which to stop; 0: never.
        metric: what "best" means: a metric of the task such as `macro_f1`; None means `loss` (`f1` for entities).
        eval_batch_size: rows a forward pass in evaluation.
        max_new_tokens: of generated answers; 0: none are generated.
        evaluate_before: whether to measure the untrained model too.
        baselines: whether to measure the majority class and TF-IDF + logistic regression too (or a tag dictionary).
        tensorboard: also log to TensorBoard, into the run folder.
        sharding: `none` (under torchrun every process has the whole model) or `fsdp2` (in training each keeps a part of
            the base, and of all that full fine-tuning trains; an adapter stays whole. The base is still loaded whole by
            each, so it has to fit).
    """

    model: str = "smollm2-135m"
    data: str = ""
    output: str = ""
    eval_data: str | None = None
    test_data: str | None = None
    held_out: float | int | None = None
    layout: str = "auto"
    columns: Mapping[str, str] | None = None
    split: str = "train"
    skip_bad_rows: bool = False
    task: str | None = None
    labels: Sequence[str] | None = None
    template: str = "plain"
    chat_template: str | None = None
    label_prompt: str = Template().label_prompt
    max_length: int | None = None
    pack: bool = False
    method: str = "lora"
    method_config: Any = field(default_factory=LoRA)
    adapter: str | None = None
    quantize: str = "none"
    double_quant: bool = True
    neftune_alpha: float = 0.0
    merge_aware: float = 0.0
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 32
    micro_batch_size: int = 8
    learning_rate: float | None = None
    warmup_ratio: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dp: bool = False
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    delta: float | None = None
    unit: str | None = None
    ledger: str | None = None
    budget_epsilon: float | None = None
    optimizer: str = "adamw"
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    gradient_checkpointing: bool = False
    fast: str = "auto"
    memory_budget: str | float | None = None
    fp8: str = "none"
    attention: str = "sdpa"
    log_every: int = 5
    eval_every: int = 0
    save_every: int = 0
    keep_checkpoints: int = 2
    early_stopping: int = 0
    metric: str | None = None
    eval_batch_size: int = 16
    max_new_tokens: int = 0
    evaluate_before: bool = True
    baselines: bool = True
    tensorboard: bool = False
    sharding: str = "none"

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            known = METHODS[self.method].learning_rate if self.method in METHODS else 2e-4
            object.__setattr__(self, "learning_rate", known)
        assert self.learning_rate is not None
        _check_types(self)
        problems = []
        for name in ("batch_size", "micro_batch_size", "log_every", "keep_checkpoints", "eval_batch_size"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)!r}: expected at least 1")
        for name in ("eval_every", "save_every", "early_stopping", "max_new_tokens"):
            if getattr(self, name) < 0:
                problems.append(f"{name} is {getattr(self, name)!r}: expected 0 or more")
        for name in ("weight_decay", "max_grad_norm", "neftune_alpha"):
            if getattr(self, name) < 0:
                problems.append(f"{name} is {getattr(self, name)!r}: expected 0 or more")
        if self.max_length is not None and self.max_length < 2:
            problems.append(f"max_length is {self.max_length!r}: expected at least 2 tokens")
        if not 0 <= self.seed < 2**32:
            problems.append(f"seed is {self.seed!r}: expected a whole number from 0 to {2**32 - 1}")
        if isinstance(self.labels, str):
            problems.append(f"labels is {self.labels!r}: expected a list of names")
        if not self.epochs > 0:
            problems.append(f"epochs is {self.epochs!r}: expected a number above 0")
        if self.max_steps is not None and self.max_steps < 1:
            problems.append(f"max_steps is {self.max_steps!r}: expected at least 1")
        if not 0 < self.learning_rate < math.inf:
            problems.append(f"learning_rate is {self.learning_rate!r}: expected a number above 0")
        if not 0 <= self.warmup_ratio < 1:
            problems.append(f"warmup_ratio is {self.warmup_ratio!r}: expected a share in [0, 1)")
        if not 0 <= self.merge_aware <= 1:
            problems.append(f"merge_aware is {self.merge_aware!r}: expected a share in [0, 1]")
        if self.batch_size % self.micro_batch_size:
            problems.append(f"batch_size {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size}")
        if problems:
            raise InputError("; ".join(problems))
        _choice("schedule", self.schedule, ("cosine", "linear", "constant"))
        _choice("method", self.method, list(METHODS))
        _choice("sharding", self.sharding, ("none", "fsdp2"))
        _choice("quantize", self.quantize, ("none", "nf4"))
        _choice("optimizer", self.optimizer, OPTIMIZERS)
        _choice("fast", self.fast, ("auto", "on", "off"))
        _choice("fp8", self.fp8, ("none", "backward", "most", "all"))
        _choice("attention", self.attention, ("sdpa", "flash"))
        for key, asked in (("fp8", self.fp8 != "none"), ("attention flash", self.attention == "flash")):
            if asked and self.fast == "off":
                raise InputError(f"{key} is for fused layers, and fast is off: leave one of them out")
        if self.memory_budget is not None:
            bytes_of(self.memory_budget)
            for key, value in (
                ("fast off", self.fast == "off"),
                ("gradient_checkpointing", self.gradient_checkpointing),
            ):
                if value:
                    raise InputError(
                        f"memory_budget chooses what fused layers keep, which {key} settles: leave one of them out"
                    )
        for key, why in METHODS[self.method].not_with.items():
            if getattr(self, key):
                raise InputError(f"method {self.method} does not go with {key}, as {why}: leave it out")
        if self.quantize != "none" and METHODS[self.method].trains_base:
            raise InputError(f"method {self.method} trains the base itself, which 4 bits freeze: leave quantize out")
        if self.sharding != "none" and METHODS[self.method].control is not None:
            raise InputError(f"method {self.method} does not go with sharding {self.sharding} yet: leave it at none")
        if self.sharding != "none" and self.optimizer != "adamw":
            raise InputError(f"sharding {self.sharding} does not go with a paged optimizer yet: choose one of them")
        self._check_privacy()
        if self.task is not None:
            _choice("task", self.task, list(TASKS))
        if self.early_stopping and self.eval_data is None and self.held_out == 0:
            raise InputError("early_stopping needs evaluation rows: give eval_data, or hold some out with held_out")

    def _check_privacy(self) -> None:
        given = [
            name
            for name in ("noise_multiplier", "target_epsilon", "delta", "unit", "ledger", "budget_epsilon")
            if getattr(self, name) is not None
        ]
        if not self.dp:
            if given:
                raise InputError(f"{given[0]} is given and dp is off: turn dp on, or leave {given[0]} out")
            return
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise InputError("dp needs noise_multiplier or target_epsilon: give one of them")
        for name in ("noise_multiplier", "target_epsilon", "budget_epsilon"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf or (name == "noise_multiplier" and value == 0)):
                raise InputError(f"{name} is {value!r}: expected a number above 0")
        if self.delta is not None and not 0 < self.delta < 1:
            raise InputError(f"delta is {self.delta!r}: expected a probability between 0 and 1, such as 1e-5")
        if not self.max_grad_norm:
            raise InputError("max_grad_norm is 0, and under dp every unit's gradient is clipped: give a number above 0")
        for name, why in (
            ("pack", "packed rows share one gradient"),
            ("merge_aware", "its gradients are not known by example"),
        ):
            if getattr(self, name):
                raise InputError(f"{name} does not go with dp, as {why}: leave it out")
        if self.sharding != "none":
            raise InputError(f"sharding {self.sharding} does not go with dp yet: leave it at none")
        if self.budget_epsilon is not None and self.ledger is None:
            raise InputError("budget_epsilon is that of a ledger: name its file with ledger")

    @property
    def quantization(self) -> NF4 | None:
        """How the base is quantised while it is read; None: not at all."""
        return NF4(double_quant=self.double_quant) if self.quantize == "nf4" else None

    @property
    def rows_template(self) -> Template:
        """How rows are written out."""
        return Template(style=self.template, chat_template=self.chat_template, label_prompt=self.label_prompt)

    def plain(self) -> dict[str, Any]:
        """Every key with its value, the method's own beside the rest, as `config.yaml` has them."""
        keys = to_plain(self)
        del keys["method_config"]
        return {**keys, **to_plain(self.method_config)}


def bytes_of(size: str | float) -> int:
    """A number of bytes, also as "10.4GB" or "8GiB".

    Raises:
        InputError: something else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?\s*", str(size).lower())
    if found is None or float(found[1]) <= 0:
        raise InputError(f"memory_budget is {size!r}: expected bytes, such as 10.4GB or 8GiB")
    prefix = (found[2] or "b").removesuffix("b")
    power = "kmgt".find(prefix[:1]) + 1 if prefix else 0
    return int(float(found[1]) * (1024 if prefix.endswith("i") else 1000) ** power)


def _choice(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise unknown_name(what, value, known)


def _check_types(config: TrainConfig) -> None:
    """YAML gives strings where a number was meant ("2e-4" has no dot): say so instead of failing far away."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        kind = str(item.type)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        optional = value is None and "None" in kind
        if kind.startswith(("int", "float")) and not number and not optional:
            raise InputError(f"{item.name} is {value!r}: expected a number")
        if kind.startswith("int") and "float" not in kind and number and not isinstance(value, int):
            raise InputError(f"{item.name} is {value!r}: expected a whole number")
        if kind == "bool" and not isinstance(value, bool):
            raise InputError(f"{item.name} is {value!r}: expected true or false")
        text = isinstance(value, str) or (number and "float" in kind)
        if kind.startswith("str") and not text and not optional:
            raise InputError(f"{item.name} is {value!r}: expected text")


def make_config(keys: Mapping[str, Any]) -> TrainConfig:
    """A configuration from flat keys; numbers written as text (YAML's `2e-4`) are read as numbers.

    Raises:
        InputError: an unknown key, with near ones, or a value out of range.
    """
    keys = expanded(keys)
    method = keys.get("method", "lora")
    if not isinstance(method, str) or method not in METHODS:
        raise unknown_name("method", str(method), [*METHODS, *SHORTHANDS])
    config_type = METHODS[method].config
    own = {item.name for item in dataclasses.fields(TrainConfig)} - {"method_config"} | set(aliases_of(TrainConfig))
    theirs = {item.name for item in dataclasses.fields(config_type)} | set(aliases_of(config_type))
    for name in keys:
        if name not in own | theirs:
            raise unknown_name("configuration key", str(name), own | theirs)
    values = {name: _number(value) for name, value in keys.items()}
    return TrainConfig(
        **{name: value for name, value in values.items() if name in own},
        method_config=config_type(**{name: value for name, value in values.items() if name in theirs}),
    )


def expanded(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys with a method's shorthand written out.

    Raises:
        InputError: a key says the opposite of what the shorthand stands for.
    """
    name = keys.get("method")
    meant = SHORTHANDS.get(name, {}) if isinstance(name, str) else {}
    for key, value in meant.items():
        if key != "method" and keys.get(key, value) != value:
            raise InputError(f"method {name} means {key} {value!r}, and {key} is {keys[key]!r}: leave one of them out")
    return {**keys, **meant}


def _number(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _number(item) for key, item in value.items()}
    if isinstance(value, str):
        try:
            return float(value) if set(value) <= set("0123456789.eE+-") and value[:1].isdigit() else value
        except ValueError:
            return value
    return value


def read_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """A configuration from a YAML file, `overrides` (the flags) winning.

    Raises:
        InputError: no such file, not a mapping of keys, an unknown key.
    """
    keys: dict[str, Any] = {}
    if path is not None:
        keys = read_yaml(path)
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    return make_config({**keys, **given})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys of a YAML file."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the configuration {path}: {error}") from None
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InputError(
            f"{path} holds a {type(found).__name__}: expected keys and values, such as 'model: smollm2-135m'"
        )
    return {str(key): value for key, value in found.items()}
