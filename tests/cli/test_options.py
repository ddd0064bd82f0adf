"""Flags come from the configuration classes: names, help, defaults, conversion, spellings."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from deltaw.cli import evaluate as evaluate_module
from deltaw.cli import train as train_module
from deltaw.cli.options import attribute_docs, given_values, merged_keys, split_commas
from deltaw.core.configs import aliases_of
from deltaw.core.errors import InputError
from deltaw.methods import METHODS, LoRA
from deltaw.train.config import TrainConfig, make_config

FLAGS = train_module.FLAGS


def test_every_key_of_a_run_and_of_the_methods_is_a_flag():
    fields = {item.name for item in dataclasses.fields(TrainConfig)} - {"method_config"}
    for name in METHODS:
        fields |= {item.name for item in dataclasses.fields(METHODS[name].config)}
    assert {flag.name for flag in FLAGS} == fields
    assert len(FLAGS) == len(fields)


def test_every_flag_is_shown_with_its_help_and_default(deltaw, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    shown = " ".join(deltaw("train", "--help").out.split())
    for flag in FLAGS:
        option = f"--[no-]{flag.option[2:]} " if flag.kind == "bool" else f"{flag.option} "
        assert option in shown, flag
        assert " ".join(flag.help.split()) in shown, flag
        if flag.default:
            assert f"[default: {flag.default}]" in shown, flag
        for alias in flag.aliases:
            assert f"--{alias.replace('_', '-')} " not in shown
    for panel in train_module.PANELS:
        assert panel in deltaw("train", "--help").out.splitlines()


def test_help_is_what_the_docstring_says():
    docs = attribute_docs(LoRA)
    assert docs["rslora"] == "scale by alpha/sqrt(r) instead of alpha/r"
    assert docs["alpha"].endswith("by default 2 r")


def test_a_line_of_the_docstring_may_speak_of_several_fields():
    @dataclasses.dataclass
    class Config:
        """Words.

        Attributes:
            a, b: of both: 1
                and more.
            c: first; d: second. None means that e.
        """

        a: int
        b: int
        c: int
        d: int

    assert attribute_docs(Config) == {
        "a": "of both: 1 and more",
        "b": "of both: 1 and more",
        "c": "first",
        "d": "second. None means that e",
    }


def test_a_field_without_a_line_is_noticed():
    @dataclasses.dataclass
    class Config:
        """Attributes:
        a: something.
        """

        a: int
        b: int

    with pytest.raises(AssertionError, match="says nothing of"):
        attribute_docs(Config)


#: A value as typed, and as the configuration must have it.
TYPED: dict[str, tuple[object, object]] = {
    "held_out": ("50", 50),
    "columns": (["text=sentence,label=class"], {"text": "sentence", "label": "class"}),
    "labels": (["no, yes", "maybe"], ["no", "yes", "maybe"]),
    "label_prompt": ("Say {text}\\nSo:", "Say {text}\nSo:"),
    "task": ("instruct", "instruct"),
    "template": ("chat", "chat"),
    "schedule": ("linear", "linear"),
    "sharding": ("fsdp2", "fsdp2"),
    "fast": ("off", "off"),
    "memory_budget": ("10.4GB", "10.4GB"),
    "fp8": ("all", "all"),
    "attention": ("flash", "flash"),
    "quantize": ("nf4", "nf4"),
    "optimizer": ("paged_adamw", "paged_adamw"),
    "method": ("lora", "lora"),
    "batch_size": ("64", 64),
    "micro_batch_size": ("2", 2),
    "warmup_ratio": ("0.2", 0.2),
    "dropout": ("0.1", 0.1),
    "target_modules": (["q_proj", "v_proj,k_proj"], ["q_proj", "v_proj", "k_proj"]),
    "rank_pattern": (["q_proj=4", r".*\.(k|v)_proj=2"], {"q_proj": 4, r".*\.(k|v)_proj": 2}),
    "alpha_pattern": (["q_proj=4.5"], {"q_proj": 4.5}),
    "bias": ("all", "all"),
    "layers_to_transform": (["0,2"], [0, 2]),
    "trainable_tokens": (["5,7"], [5, 7]),
    "init": ("gaussian", "gaussian"),
    "eva_rho": ("1.5", 1.5),
    "init_r": ("16", 16),
    "reduction_factor": ("2.5", 2.5),
    "activation": ("relu", "relu"),
}
#: Flags that mean something with `dp` alone.
PRIVATE = ("dp", "noise_multiplier", "target_epsilon", "delta", "unit", "ledger", "budget_epsilon")
BY_KIND = {
    "bool": (True, True),
    "int": ("3", 3),
    "float": ("0.5", 0.5),
    "text": ("word", "word"),
    "list": (["a"], ["a"]),
}


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_a_typed_value_reaches_the_configuration(flag):
    typed, wanted = TYPED.get(flag.name) or BY_KIND[flag.kind]
    if flag.kind == "bool":
        config = TrainConfig if not flag.owners else METHODS[flag.owners[0]].config
        wanted = typed = not next(item.default for item in dataclasses.fields(config) if item.name == flag.name)
    values = given_values(FLAGS, {flag.name: typed})
    assert values == {flag.name: wanted}
    base = {"data": "x", "method": flag.owners[0] if flag.owners else "lora"}
    base |= {"batch_size": 64, "micro_batch_size": 1} if "batch" in flag.name else {}
    if flag.name in PRIVATE:
        base |= {"dp": True} | (
            {} if flag.name in ("noise_multiplier", "target_epsilon") else {"noise_multiplier": 1.0}
        )
        base |= {"ledger": "l.jsonl"} if flag.name == "budget_epsilon" else {}
    made = make_config({**base, **values})
    holder = made.method_config if flag.owners else made
    assert getattr(holder, flag.name) == wanted


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.aliases], ids=lambda flag: flag.name)
def test_other_spellings_work_and_both_at_once_do_not(flag):
    typed, wanted = TYPED.get(flag.name) or BY_KIND[flag.kind]
    for alias in flag.aliases:
        assert given_values(FLAGS, {alias: typed}) == {flag.name: wanted}
        with pytest.raises(InputError, match="mean the same: give one"):
            given_values(FLAGS, {alias: typed, flag.name: typed})


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"learning_rate": "abc"}, "--learning-rate is 'abc': expected a number"),
        ({"lr": "abc"}, "--lr is 'abc': expected a number"),
        ({"epochs": ""}, "--epochs is '': expected a number"),
        ({"r": "1.5"}, "--r is '1.5': expected a whole number"),
        ({"columns": ["text"]}, "--columns is 'text': expected KEY=VALUE"),
        ({"columns": ["=text"]}, "--columns is '=text': expected KEY=VALUE"),
        ({"rank_pattern": ["q_proj=x"]}, "--rank-pattern is 'x': expected a whole number"),
        ({"layers_to_transform": ["1,b"]}, "--layers-to-transform is 'b': expected a whole number"),
    ],
)
def test_a_wrong_value_is_named_as_it_was_typed(given, wanted):
    with pytest.raises(InputError) as error:
        given_values(FLAGS, given)
    assert str(error.value) == wanted


def test_one_target_is_text_and_a_regular_expression_keeps_its_commas():
    assert given_values(FLAGS, {"target_modules": ["all-linear"]}) == {"target_modules": "all-linear"}
    assert split_commas(r"q_proj,.*\.[a,b]_(x|y){1,2},z") == ["q_proj", r".*\.[a,b]_(x|y){1,2}", "z"]


def test_tokens_of_named_embeddings():
    values = given_values(FLAGS, {"trainable_tokens": ["embed_tokens=5,7", "other=1"]})
    assert values == {"trainable_tokens": {"embed_tokens": [5, 7], "other": [1]}}


def test_flags_win_over_a_file_in_any_spelling():
    aliases = {**aliases_of(TrainConfig), **aliases_of(LoRA)}
    file = {"lr": 0.1, "lora_alpha": 4, "epochs": 2}
    keys = merged_keys(file, {"learning_rate": 0.2, "alpha": 8.0}, aliases)
    assert keys == {"epochs": 2, "learning_rate": 0.2, "alpha": 8.0}
    made = make_config({"data": "x", **keys})
    assert (made.learning_rate, made.method_config.alpha, made.epochs) == (0.2, 8.0, 2)


def test_evaluate_has_the_keys_that_matter_to_it():
    names = {flag.name for flag in evaluate_module.FLAGS}
    assert names == {name for names in evaluate_module.PANELS.values() for name in names.split()}
    hints = typing.get_type_hints(TrainConfig)
    assert names <= set(hints)
