"""LoRA's and DoRA's configurations in PEFT's terms, both ways; PEFT has them as one.

A field that cannot be honoured is an error that names it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from deltaw.core.errors import InputError
from deltaw.methods import dora
from deltaw.methods.contract import Method
from deltaw.methods.dora import DoRA
from deltaw.methods.lora import LoRA, attach, param_count
from deltaw.models.targets import shortest_names

#: PEFT's field to ours, where the value carries over as it is.
_SAME = {
    "r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target_modules",
    "exclude_modules": "exclude_modules",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "use_rslora": "rslora",
    "bias": "bias",
    "modules_to_save": "modules_to_save",
    "layers_to_transform": "layers_to_transform",
    "layers_pattern": "layers_pattern",
    "trainable_token_indices": "trainable_tokens",
    "lora_bias": "lora_bias",
}

#: Fields that do not change what a trained adapter computes (`fan_in_fan_out` follows from the module's type).
_INERT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}

#: Initialisations after which the base is what it was; the others leave the base changed as well.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def _names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, int) for item in value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


#: What the values of PEFT's fields look like; `LoRA` itself checks the numbers and the patterns.
_SHAPES: dict[str, Callable[[Any], bool]] = {
    "target_modules": _names,
    "exclude_modules": _names,
    "modules_to_save": _names,
    "layers_to_transform": lambda value: isinstance(value, int) or _rows(value),
    "layers_pattern": _names,
    "trainable_token_indices": lambda value: (
        _rows(value) or (isinstance(value, dict) and all(map(_rows, value.values())))
    ),
    "use_dora": _flag,
    "use_rslora": _flag,
    "lora_bias": _flag,
}


def from_peft(fields: dict[str, Any]) -> LoRA:
    """PEFT's `LoraConfig` fields as a `LoRA`, or as a `DoRA` where they say so.

    Raises:
        InputError: a field whose value would change the result and is not supported here, by name; all are listed.
    """
    refused = []
    init = fields.get("init_lora_weights", True)
    if init not in _INITS:
        refused.append(
            f"init_lora_weights={init!r} (it changes the base: save from PEFT with "
            "path_initial_model_for_weight_conversion)"
        )
    for key, value in fields.items():
        if key in _SAME or key in _INERT or key in ("init_lora_weights", "use_dora"):
            continue
        if value not in (None, False, [], {}, ""):
            refused.append(f"{key}={value!r}")
    wrong = [
        f"{key}={fields[key]!r}"
        for key, fits in _SHAPES.items()
        if fields.get(key) is not None and not fits(fields[key])
    ]
    if wrong:
        raise InputError(f"adapter_config.json is damaged: {'; '.join(wrong)} is not of a type that PEFT writes")
    if refused:
        raise InputError(f"adapter_config.json asks for what deltaw does not have: {'; '.join(refused)}")
    given = {ours: fields[theirs] for theirs, ours in _SAME.items() if fields.get(theirs) is not None}
    if "target_modules" not in given:
        raise InputError(
            "adapter_config.json names no target_modules: expected a list of names or a regular expression"
        )
    if "alpha" not in given:
        given["alpha"] = 8
    if "r" not in given:
        given["r"] = 8
    if given.get("exclude_modules") in ([], ""):
        del given["exclude_modules"]
    if given.get("modules_to_save") == []:
        del given["modules_to_save"]
    if given.get("layers_to_transform") == []:
        del given["layers_to_transform"]
    return DoRA(**given) if fields.get("use_dora") else LoRA(**given)


def to_peft(config: LoRA, model: nn.Module, parts: Mapping[str, Any]) -> dict[str, Any]:
    """A `LoRA` as PEFT's `LoraConfig` fields, its targets spelt so that PEFT finds exactly the same modules."""
    from transformers.pytorch_utils import Conv1D

    config = as_measured(config, {path: (part.factors()[0].shape[0], part.scale) for path, part in parts.items()})
    sites = list(parts)
    return {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": whole_number(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": shortest_names(model, sites),
        "exclude_modules": None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {pattern: whole_number(alpha) for pattern, alpha in config.alpha_pattern.items()},
        "use_rslora": config.rslora,
        "use_dora": isinstance(config, DoRA),
        "bias": config.bias,
        "layers_to_transform": None,
        "layers_pattern": None,
        "trainable_token_indices": _plain(config.trainable_tokens),
        "lora_bias": config.lora_bias,
        "fan_in_fan_out": any(isinstance(model.get_submodule(site), Conv1D) for site in sites),
        "init_lora_weights": True,
    }


def as_measured(config: LoRA, sites: Mapping[str, tuple[int, float]]) -> LoRA:
    """The configuration with the ranks and scales that the sites really have, by their full paths where they differ.

    Ranks chosen by data or cut after training, and factors that were joined, are not what the user's own patterns say.
    """
    if not sites or all(
        config.rank_of(path) == r and config.scale_of(path) == scale for path, (r, scale) in sites.items()
    ):
        return config
    alphas = {path: scale * (math.sqrt(r) if config.rslora else r) for path, (r, scale) in sites.items()}
    r = Counter(r for r, _ in sites.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return dataclasses.replace(
        config,
        r=r,
        alpha=alpha,
        rank_pattern={path: own for path, (own, _) in sites.items() if own != r},
        alpha_pattern={path: own for path, own in alphas.items() if own != alpha},
    )


def whole_number(number: float | None) -> float | None:
    """An int where it is one: that is what PEFT declares, and what stricter readers of its files take."""
    return int(number) if number is not None and float(number).is_integer() else number


def _plain(tokens: Any) -> Any:
    if tokens is None:
        return None
    return {name: list(rows) for name, rows in tokens.items()} if isinstance(tokens, dict) else list(tokens)


LORA = Method(
    name="lora",
    config=LoRA,
    scope="site",
    attach=attach,
    param_count=param_count,
    to_peft=to_peft,
    from_peft=from_peft,
    peft_type="LORA",
)

DORA = Method(
    name="dora",
    config=DoRA,
    scope="site",
    attach=dora.attach,
    param_count=dora.param_count,
    to_peft=to_peft,
    from_peft=from_peft,
)
