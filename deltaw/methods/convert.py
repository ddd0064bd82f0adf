"""From any adapter whose updates are plain products to LoRA, which everybody reads."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from deltaw.core.errors import InputError, unknown_name
from deltaw.core.protocols import LowRank
from deltaw.methods.companions import BiasPart, ModuleCopy, TokenRows
from deltaw.methods.host import _uninstall, book_of, parts_of, set_adapter, sites_of
from deltaw.methods.lora import LoRA, LoraPart
from deltaw.methods.lora_peft import as_measured
from deltaw.models.sites import Site, SiteWeight, kind_of

_COMPANIONS = (BiasPart, TokenRows, ModuleCopy)


def to_lora(model: nn.Module, name: str) -> nn.Module:
    """Replaces an adapter by the LoRA that computes the same, in place; its name and whether it is active stay.

    AdaLoRA's singular values go into B; ranks and scales are those that the sites have, in `rank_pattern` and
    `alpha_pattern`; sites of rank 0 are dropped. Trained biases, tokens and copies of modules stay as they are. A LoRA
    is left alone.

    Args:
        model: an adapted model.
        name: the adapter.

    Returns:
        The same model.

    Raises:
        InputError: no such adapter, a merged one, or one whose update is no plain product (DoRA's).
    """
    book = book_of(model)
    if name not in book.configs:
        raise unknown_name("adapter", name, book.configs)
    if book.merged is not None:
        raise InputError("the model holds a merged adapter: call dw.unmerge(model) first")
    config = book.configs[name]
    if type(config) is LoRA:
        return model
    lows = _products(model, name, type(config).__name__)
    shared = ("dropout", "bias", "modules_to_save", "trainable_tokens")
    kept: dict[str, Any] = {field: getattr(config, field) for field in shared if hasattr(config, field)}
    if kept.get("bias", "none") == "none":
        lows = {path: low for path, low in lows.items() if len(low.A)}
    # PEFT tells a trained bias by its site, which therefore stays one: of rank 1, with zeros.
    sizes = {path: (max(len(low.A), 1), low.scale) for path, low in lows.items()}
    if not any(len(low.A) for low in lows.values()):
        raise InputError(f"adapter {name!r} has rank 0 at every site: there is nothing to write as LoRA")
    plain = as_measured(LoRA(target_modules=list(lows), **kept), sizes)
    for path, module, site in list(sites_of(model)):
        if name not in site.parts:
            continue
        own = cast(nn.ModuleList, site.parts[name])
        parts = nn.ModuleList(part for part in own if isinstance(part, _COMPANIONS))
        if path in lows:
            parts.insert(0, _lora_part(path, module, lows[path], plain))
        if len(parts):
            site.parts[name] = parts.train(module.training)
            continue
        del site.parts[name]
        site.active.pop(name, None)
        if not len(site.parts):
            _uninstall(module, site)
    book.configs[name] = plain
    set_adapter(model, dict(book.active))
    return model


def _products(model: nn.Module, name: str, method: str) -> dict[str, LowRank]:
    """The adapter's low-rank parts by path."""
    found = {}
    for path, _, part in parts_of(model, name):
        if isinstance(part, _COMPANIONS):
            continue
        low = part.low_rank()
        if low is None or low.out_scale is not None or part.shift() is not None:
            raise InputError(
                f"adapter {name!r} is {method}, whose update of {path} is no plain product of two factors, as LoRA's "
                "is: merge it instead"
            )
        found[path] = low
    if not found:
        raise InputError(f"adapter {name!r} is {method}, which has no low-rank factors to write as LoRA")
    return found


def _lora_part(path: str, module: nn.Module, low: LowRank, config: LoRA) -> LoraPart:
    kind = kind_of(module)
    assert kind is not None
    site = Site(path, module, kind, SiteWeight(module, kind))
    options: dict[str, Any] = {"scale": config.scale_of(path), "dropout": config.dropout, "lora_bias": False}
    part = LoraPart(site, r=max(len(low.A), 1), dtype=low.A.dtype, **options)
    # Not filled in place: the site's memory may be elsewhere than the factors', or nowhere.
    A, B = low.A.detach(), low.B.detach()
    if not len(A):
        A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(len(B), 1)
    part.lora_A, part.lora_B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
    return part
