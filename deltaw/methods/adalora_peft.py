"""AdaLoRA's configuration in PEFT's terms, both ways.

PEFT keeps ranks as `rank_pattern`: a site's path and `.lora_E` to init_r booleans, of which it counts the true ones
when it loads; the tensors are cut already. Here the first ones are true.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from deltaw.core.errors import InputError
from deltaw.methods import lora_peft
from deltaw.methods.adalora import AdaLoRA, attach, param_count
from deltaw.methods.adalora_budget import control
from deltaw.methods.contract import Method
from deltaw.methods.lora import LoRA
from deltaw.models.targets import shortest_names

#: PEFT's field to ours, where the value carries over as it is and LoRA has none such.
_OWN = {
    "init_r": "init_r",
    "target_r": "target_r",
    "tinit": "tinit",
    "tfinal": "tfinal",
    "deltaT": "delta_t",
    "beta1": "beta1",
    "beta2": "beta2",
    "orth_reg_weight": "orth_reg_weight",
    "total_step": "total_steps",
}

#: LoRA's fields that PEFT's AdaLoRA passes over.
_UNREAD = ("r", "alpha_pattern", "use_rslora", "lora_bias", "init_lora_weights")

_SHARED = (
    "alpha", "dropout", "target_modules", "exclude_modules", "bias", "modules_to_save", "layers_to_transform",
    "layers_pattern", "trainable_tokens",
)  # fmt: skip


def from_peft(fields: dict[str, Any]) -> AdaLoRA:
    """PEFT's `AdaLoraConfig` fields as an `AdaLoRA`.

    Raises:
        InputError: a field that cannot be honoured, by name, or one of a type that PEFT does not write.
    """
    left_out = (*_OWN, *_UNREAD, "rank_pattern")
    common = lora_peft.from_peft({key: value for key, value in fields.items() if key not in left_out})
    if type(common) is not LoRA:
        raise InputError("adapter_config.json asks for what deltaw does not have: use_dora with AdaLoRA")
    given = {ours: fields[theirs] for theirs, ours in _OWN.items() if fields.get(theirs) is not None}
    # A schedule that could move no rank says nothing of the adapter.
    init_r, target_r = (given.get(name, getattr(AdaLoRA, name)) for name in ("init_r", "target_r"))
    if isinstance(init_r, int) and isinstance(target_r, int):
        given["target_r"] = max(min(target_r, init_r - 1), 1)
    given |= {name: getattr(common, name) for name in _SHARED}
    return AdaLoRA(rank_pattern=_ranks(fields.get("rank_pattern") or {}), **given)


def _ranks(pattern: Any) -> dict[str, int]:
    found = {}
    for key, kept in pattern.items() if isinstance(pattern, dict) else [("", None)]:
        path, ending, _ = key.partition(".lora_E")
        if not ending or not isinstance(kept, list) or not all(isinstance(one, bool) for one in kept):
            raise InputError(
                f"adapter_config.json is damaged: rank_pattern has {key!r}, where PEFT's AdaLoRA writes a module's "
                "path, .lora_E and a list of true and false"
            )
        found[path] = sum(kept)
    return found


def to_peft(config: AdaLoRA, model: nn.Module, parts: Mapping[str, Any]) -> dict[str, Any]:
    """An `AdaLoRA` as PEFT's `AdaLoraConfig` fields, its targets spelt so that PEFT finds exactly the same modules."""
    from transformers.pytorch_utils import Conv1D

    ranks = {path: part.low_rank().A.shape[0] for path, part in parts.items()}
    patterns = {f"{path}.lora_E": [i < r for i in range(config.init_r)] for path, r in ranks.items()}
    tinit, tfinal = config.tinit or 0, config.tfinal or 0
    return {
        "peft_type": "ADALORA",
        "init_r": config.init_r,
        "target_r": config.target_r,
        "lora_alpha": lora_peft.whole_number(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": shortest_names(model, list(parts)),
        "exclude_modules": None,
        "rank_pattern": patterns if any(r != config.init_r for r in ranks.values()) else None,
        "tinit": tinit,
        "tfinal": tfinal,
        "deltaT": config.delta_t,
        # PEFT takes no schedule without steps in which ranks fall.
        "total_step": max(config.total_steps or 0, tinit + tfinal + 1),
        "beta1": config.beta1,
        "beta2": config.beta2,
        "orth_reg_weight": config.orth_reg_weight,
        "bias": config.bias,
        "layers_to_transform": None,
        "layers_pattern": None,
        "trainable_token_indices": lora_peft._plain(config.trainable_tokens),
        "fan_in_fan_out": any(isinstance(model.get_submodule(site), Conv1D) for site in parts),
        "init_lora_weights": True,
    }


ADALORA = Method(
    name="adalora",
    config=AdaLoRA,
    scope="site",
    attach=attach,
    param_count=param_count,
    to_peft=to_peft,
    from_peft=from_peft,
    peft_type="ADALORA",
    control=control,
    learning_rate=5e-3,
)
