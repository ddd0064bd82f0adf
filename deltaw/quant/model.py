"""Which modules of a model are held in 4 bits, and quantising a model that is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from deltaw.core.errors import InputError
from deltaw.models.sites import base_modules, kind_of, output_head, task_heads
from deltaw.quant.config import NF4
from deltaw.quant.tensor import NF4Tensor, frozen
from deltaw.quant.weight import NF4Weight


def quantizable(model: nn.Module, config: NF4) -> dict[str, nn.Module]:
    """The modules that `config` puts into 4 bits, by path.

    Linears and Conv1Ds, but for the output head, heads of a task (new, and trained), poolers, and what `skip_modules`
    names; embeddings and the output head where they are asked for. What shares its tensor with a module that stays as
    it is stays as well.

    Raises:
        InputError: `skip_modules` names nothing, or nothing is left to quantise.
    """
    modules = dict(base_modules(model))
    skipped = set()
    for wanted in config.skip_modules:
        matched = {path for path in modules if path == wanted or path.endswith("." + wanted)}
        if not matched:
            raise InputError(f"skip_modules {wanted!r} matches no module of {type(model).__name__}")
        skipped |= {path for path in modules for top in matched if path == top or path.startswith(top + ".")}
    heads = (*task_heads(model), "pooler")
    getter: Any = getattr(model, "get_input_embeddings", None)
    embedding, head = getter() if getter is not None else None, output_head(model)
    chosen: dict[str, nn.Module] = {}
    for path, module in modules.items():
        kind = kind_of(module)
        names = path.split(".")
        if kind is None or path in skipped or any(name in heads for name in names):
            continue
        if module is head:
            asked = config.head or (config.embeddings and _same_weight(head, embedding))
        elif kind == "embedding":
            asked = module is embedding and (config.embeddings or (config.head and _same_weight(head, embedding)))
        else:
            asked = True
        if asked:
            chosen[path] = module
    kept = {id(module._parameters.get("weight")) for path, module in modules.items() if path not in chosen}
    chosen = {path: module for path, module in chosen.items() if id(module._parameters.get("weight")) not in kept}
    if not chosen:
        raise InputError(f"{type(model).__name__} has no linear module to quantise: leave quantisation out")
    return chosen


def _same_weight(a: Any, b: Any) -> bool:
    return a is not None and b is not None and getattr(a, "weight", None) is getattr(b, "weight", 0)


def quantize_model(model: nn.Module, config: NF4 | None = None) -> nn.Module:
    """Puts a model that is in memory into 4 bits, in place, matrix by matrix; what shares a matrix goes on sharing it.

    Raises:
        InputError: a NaN or an infinity, with the tensor's name; adapters are on the model; nothing to quantise.
    """
    config = config or NF4()
    if any("adapted" in module._modules for module in model.modules()):
        raise InputError("the model carries adapters: quantise it before adapting, or merge them first")
    made: dict[int, nn.Parameter] = {}
    for path, module in quantizable(model, config).items():
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        if isinstance(weight, NF4Tensor):
            continue
        if id(weight) not in made:
            made[id(weight)] = quantized_parameter(weight, kind_of(module) == "conv1d", config, f"{path}.weight")
        module.weight = made[id(weight)]
    return model


def quantized_parameter(weight: torch.Tensor, transposed: bool, config: NF4, name: str) -> nn.Parameter:
    """A stored weight in 4 bits: what takes its place. A Conv1D's (in, out) is quantised as its W (out, in)."""
    packed = NF4Weight.quantize(
        weight.detach().t() if transposed else weight,
        double_quant=config.double_quant,
        block_size=config.block_size,
        name=name,
    )
    return frozen(packed, transposed=transposed)


def quantized_sites(model: nn.Module) -> Iterator[tuple[str, nn.Module, NF4Tensor]]:
    """(path, module, weight) of every module whose weight is held in 4 bits."""
    for path, module in base_modules(model):
        weight = module._parameters.get("weight")
        if isinstance(weight, NF4Tensor):
            yield path, module, weight


def is_quantized(model: nn.Module) -> bool:
    """Whether any of the model's weights is held in 4 bits."""
    return any(True for _ in quantized_sites(model))
