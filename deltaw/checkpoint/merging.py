"""Merging: the active adapters go into the weights, in float32 arithmetic, rounded once to the base's dtype.

Undoing a merge puts the original parameters back, the very objects; nothing is ever subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.errors import InputError
from deltaw.methods.companions import TokenRows
from deltaw.methods.host import AdaptedSite, _forward, _uninstall, book_of, forget, sites_of
from deltaw.methods.registry import method_of
from deltaw.models.sites import SiteWeight, base_modules

#: Elements of W that are computed at a time: a float32 temporary of 64 MiB.
_ELEMENTS = 1 << 24


@dataclass
class Merged:
    """What undoes a merge: the original parameters, the sites, the config's tie."""

    originals: list[tuple[nn.Module, str, nn.Parameter]]
    sites: list[tuple[nn.Module, AdaptedSite]]
    tie: dict[str, bool] = field(default_factory=dict)


def merge(model: nn.Module, *, keep_original: bool = True) -> nn.Module:
    """Writes the active adapters' updates into the weights and takes the adapters off, in place.

    Where a tied weight changes on one side only (an adapter on the output head of a model whose embedding is the same
    tensor), the two are untied and the configuration says so, so that the saved model loads as what it is.

    Args:
        model: a model with active adapters.
        keep_original: keeps the original parameters in memory, so that `unmerge` restores them exactly; without, the
            model is a plain one afterwards, to be saved or adapted anew.

    Returns:
        The same model: plain modules again, with the adapters' effect inside.

    Raises:
        InputError: nothing is active, a method cannot be merged, or the architecture cannot be untied.
    """
    book = book_of(model)
    if book.merged is not None:
        raise InputError("the model's adapters are merged already")
    if not book.active:
        raise InputError("no adapter is active: nothing to merge")
    if any(method_of(book.configs[name]).trains_base for name in book.active):
        raise InputError("full fine-tuning is in the weights already: save the model with dw.save_model")
    with torch.no_grad():
        changed: dict[Any, nn.Parameter] = {}
        plan: list[tuple[nn.Module, str, nn.Parameter]] = []
        for path, module, site in sites_of(model):
            chosen = list(site.chosen())
            if chosen:
                plan += _merged_parameters(path, module, site, chosen, changed)
        plan += _same_biases(model, plan)
        tie = _untie(model, plan)
        if tie:
            plan = _parted(model, plan)
        originals = [(owner, name, owner._parameters[name]) for owner, name, _ in plan]
        for owner, name, new in plan:
            owner._parameters[name] = new
    taken = [(module, site) for _, module, site in sites_of(model)]
    for module, site in taken:
        _uninstall(module, site)
    if keep_original:
        book.merged = Merged([(o, n, p) for o, n, p in originals if p is not None], taken, tie)
    else:
        forget(model)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Puts the original parameters and the adapters back; the weights are exactly what they were.

    Raises:
        InputError: nothing is merged, or the originals were not kept (`keep_original=False`).
    """
    book = book_of(model)
    merged: Merged | None = book.merged
    if merged is None:
        raise InputError("nothing to undo: the model was not merged, or with keep_original=False; load it again")
    for owner, name, original in merged.originals:
        owner._parameters[name] = original
    from types import MethodType

    for module, site in merged.sites:
        module.adapted = site
        module.forward = MethodType(_forward, module)
    for key, value in merged.tie.items():
        setattr(_text_config(model), key, value)
    book.merged = None
    return model


def _merged_parameters(
    path: str,
    module: nn.Module,
    site: AdaptedSite,
    chosen: list[tuple[Any, float]],
    changed: dict[Any, nn.Parameter],
) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(owner, parameter name, new parameter) for one module."""
    plan: list[tuple[nn.Module, str, nn.Parameter]] = []
    for part, weight in chosen:
        replaced = part.replacements()
        if replaced and (weight != 1 or len(chosen) > 1):
            raise InputError(f"{path} is trained whole by an adapter: merge that adapter alone, with weight 1")
        for name, value in replaced.items():
            inner, _, leaf = name.rpartition(".")
            owner = module.get_submodule(inner)
            old = owner._parameters[leaf]
            assert old is not None
            # Parameters that the copy shares among its own modules go on being shared.
            shared = (value.data_ptr(), value.shape)
            if shared not in changed:
                changed[shared] = nn.Parameter(value.to(old.dtype, copy=True), requires_grad=False)
            plan.append((owner, leaf, changed[shared]))
    updates = [(part, weight) for part, weight in chosen if not part.replaces]
    with_delta = [(part, weight) for part, weight in updates if part.delta(slice(0, 1)) is not None]
    shifts = [(part.shift(), weight) for part, weight in updates if part.shift() is not None]
    if len(with_delta) + len(shifts) < len(updates):
        raise InputError(f"an active adapter on {path} depends on the input and cannot be merged")
    if with_delta:
        assert site.weight is not None
        # Rows trained for a tied pair must go on being shared: both have the same parts, by the rows that they hold.
        same = [(id(part.rows) if isinstance(part, TokenRows) else id(part), weight) for part, weight in with_delta]
        key = (id(module.weight), *same)
        if key not in changed:
            changed[key] = nn.Parameter(_sum(site.weight, with_delta), requires_grad=False)
        plan.append((module, "weight", changed[key]))
    if shifts:
        bias = module._parameters.get("bias")
        if bias is None:
            raise InputError(f"cannot merge a bias into {path}, which has none: leave the adapter unmerged")
        total = bias.detach().to(_wide(bias.dtype))
        for shift, weight in shifts:
            total = total + shift.to(total.dtype) * weight
        plan.append((module, "bias", nn.Parameter(total.to(bias.dtype), requires_grad=False)))
    return plan


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _sum(weight: SiteWeight, parts: list[tuple[Any, float]]) -> Tensor:
    """W + sum of weighted deltas in the stored layout, computed by rows in float32."""
    stored = weight.stored.detach()
    new = torch.empty_like(stored)
    target = new if weight.kind == "linear" else new.t()
    step = max(1, _ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        total = weight.dequantize(rows, _wide(stored.dtype)).clone()
        for part, scale in parts:
            low = part.low_rank()
            if low is not None and low.out_scale is None:
                total.addmm_(
                    low.B.detach()[rows].to(total.dtype), low.A.detach().to(total.dtype), alpha=low.scale * scale
                )
            else:
                total.add_(part.delta(rows), alpha=scale)
        target[rows] = total.to(stored.dtype)
    return new


def _same_biases(
    model: nn.Module, plan: list[tuple[nn.Module, str, nn.Parameter]]
) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The new bias for the other owners of a bias that changes: one bias under two names is no tie to be undone."""
    new = {id(owner._parameters[name]): value for owner, name, value in plan if name == "bias"}
    planned = {(id(owner), name) for owner, name, _ in plan}
    return [
        (module, "bias", new[id(bias)])
        for _, module in base_modules(model)
        if (bias := module._parameters.get("bias")) is not None
        and id(bias) in new
        and (id(module), "bias") not in planned
    ]


def _parted(
    model: nn.Module, plan: list[tuple[nn.Module, str, nn.Parameter]]
) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The plan with a parameter of its own for every name: an untied model is read back with nothing tied."""
    planned = {(id(owner), name): new for owner, name, new in plan}
    seen: set[int] = set()
    whole = list(plan)
    for _, module in base_modules(model):
        for name, parameter in module._parameters.items():
            result = planned.get((id(module), name), parameter)
            if result is not None and id(result) in seen:
                own = nn.Parameter(result.detach().clone(), requires_grad=False)
                whole = [item for item in whole if item[0] is not module or item[1] != name] + [(module, name, own)]
            seen.add(id(result))
    return whole


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    return getter() if getter is not None else config


def _untie(model: nn.Module, plan: list[tuple[nn.Module, str, nn.Parameter]]) -> dict[str, bool]:
    """Marks the configuration untied where only some owners of a shared parameter change; gives what to restore."""
    planned = {(id(owner), name): new for owner, name, new in plan}
    split = []
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((path, module, name))
    for shared in owners.values():
        results = {id(planned.get((id(module), name))) for _, module, name in shared}
        if len(shared) > 1 and len(results) > 1:
            split.append([path for path, _, _ in shared])
    if not split:
        return {}
    config = _text_config(model)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        raise InputError(f"merging would change one of {', '.join(split[0])}, which share a tensor: adapt all or none")
    config.tie_word_embeddings = False
    again = type(config).from_dict(config.to_dict())
    if again.tie_word_embeddings:
        config.tie_word_embeddings = True
        raise InputError(
            f"merging would untie {' and '.join(split[0])}, which {type(model).__name__} always ties: "
            "leave the adapter unmerged, or do not adapt the embedding"
        )
    return {"tie_word_embeddings": True}
