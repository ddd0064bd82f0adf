"""Merging: the active adapters go into the weights, in float32 arithmetic, rounded once to the form of the weights.

Into 4 bits a small update is easily lost: nearly every value is nearest to its old code. `mode="retain"` chooses codes
and scales by the layer's outputs instead (`deltaw.quant.retain`). Undoing a merge puts the original parameters back,
the very objects; nothing is ever subtracted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.checkpoint.calibration import Moments, on_device
from deltaw.core.errors import InputError, unknown_name
from deltaw.core.protocols import LowRank, packed_of
from deltaw.methods.companions import TokenRows
from deltaw.methods.host import AdaptedSite, _forward, _uninstall, book_of, forget, sites_of
from deltaw.methods.registry import method_of
from deltaw.models.sites import SiteWeight, base_modules, kind_of
from deltaw.quant.config import NF4
from deltaw.quant.model import quantizable, quantized_parameter, quantized_sites
from deltaw.quant.retain import OutputError, output_error, retain
from deltaw.quant.tensor import frozen
from deltaw.quant.weight import NF4Weight

#: Elements of W that are computed at a time: a float32 temporary of 64 MiB.
_ELEMENTS = 1 << 24


@dataclass
class Merged:
    """What undoes a merge: the original parameters, the sites, the config's tie."""

    originals: list[tuple[nn.Module, str, nn.Parameter]]
    sites: list[tuple[nn.Module, AdaptedSite]]
    tie: dict[str, bool] = field(default_factory=dict)


#: What a merge may write: its names and dtypes; `nf4` besides.
DENSE = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}
MODES = ("retain", "requantize")


@dataclass
class MergeReport:
    """What a merge into 4 bits cost; filled in by `merge`.

    Attributes:
        layers: each merged matrix' error.
        mode: `retain` or `requantize`.
        calibration_tokens: tokens that the layers' inputs were taken from; 0: errors count all inputs alike.
    """

    layers: dict[str, OutputError] = field(default_factory=dict)
    mode: str = ""
    calibration_tokens: int = 0


def merge(
    model: nn.Module,
    *,
    into: str | None = None,
    mode: str = "retain",
    calibration: Sequence[Mapping[str, Any]] | None = None,
    quantize: NF4 | None = None,
    keep_original: bool = True,
    report: MergeReport | None = None,
) -> nn.Module:
    """Writes the active adapters' updates into the weights and takes the adapters off, in place.

    Where a tied weight changes on one side only (an adapter on the output head of a model whose embedding is the same
    tensor), the two are untied and the configuration says so, so that the saved model loads as what it is.

    Args:
        model: a model with active adapters.
        into: what the weights are held in afterwards: `nf4`, `bf16`, `float16` or `float32` for all of the model; None
            means each weight as it is held now. A 4-bit base is merged as the values that it computed with in training.
        mode: into 4 bits, `retain` (codes and scales chosen so as to keep each layer's outputs) or `requantize` (the
            nearest codes). The result is plain NF4 either way.
        calibration: for `retain`, keyword arguments of forward passes (`input_ids`, `attention_mask`) made of training
            rows; their activations say which outputs count. None: from the weights alone.
        quantize: for `into="nf4"`, which modules of a 16-bit base are quantised, and how; None means `NF4()`.
        keep_original: keeps the original parameters in memory, so that `unmerge` restores them exactly; without, the
            model is a plain one afterwards, to be saved or adapted anew.
        report: takes what each layer's outputs lost in 4 bits.

    Returns:
        The same model: plain modules again, with the adapters' effect inside.

    Raises:
        InputError: nothing is active, a method cannot be merged, or the architecture cannot be untied.
    """
    rounding = _Rounding(model, into, mode, calibration, quantize, report if report is not None else MergeReport())
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
                plan += _merged_parameters(path, module, site, chosen, changed, rounding)
        plan += _same_biases(model, plan)
        plan += rounding.others(plan)
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
    rounding: _Rounding,
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
                changed[shared] = nn.Parameter(value.to(rounding.dtype_of(old), copy=True), requires_grad=False)
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
            changed[key] = rounding.merged(path, module, site.weight, with_delta)
        plan.append((module, "weight", changed[key]))
    if shifts:
        bias = module._parameters.get("bias")
        if bias is None:
            raise InputError(f"cannot merge a bias into {path}, which has none: leave the adapter unmerged")
        total = bias.detach().to(_wide(bias.dtype))
        for shift, weight in shifts:
            total = total + shift.to(total.dtype) * weight
        plan.append((module, "bias", nn.Parameter(total.to(rounding.dtype_of(bias)), requires_grad=False)))
    return plan


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _sums(weight: SiteWeight, parts: list[tuple[Any, float]]) -> Iterator[tuple[slice, Tensor]]:
    """(rows, W + sum of weighted deltas at these rows of (out, in)), in float32 or wider."""
    step = max(1, _ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        # The values that the model computed with: a packed weight's are rounded to its dtype first.
        total = weight.dequantize(rows).to(_wide(weight.dtype), copy=True)
        for part, scale in parts:
            low = part.low_rank()
            if low is not None and low.out_scale is None:
                total.addmm_(
                    low.B.detach()[rows].to(total.dtype), low.A.detach().to(total.dtype), alpha=low.scale * scale
                )
            else:
                total.add_(part.delta(rows), alpha=scale)
        yield rows, total


class _Rounding:
    """What merged and other weights are rounded to."""

    def __init__(
        self,
        model: nn.Module,
        into: str | None,
        mode: str,
        calibration: Sequence[Mapping[str, Any]] | None,
        quantize: NF4 | None,
        report: MergeReport,
    ) -> None:
        if into is not None and into != "nf4" and into not in DENSE:
            raise unknown_name("form to merge into", into, ["nf4", *DENSE])
        if mode not in MODES:
            raise unknown_name("mode of merging", mode, MODES)
        self.model, self.into, self.report = model, into, report
        self.dtype = DENSE.get(into or "")
        self.config = quantize or NF4()
        report.mode = mode
        sites = {path: site for path, _, site in sites_of(model) if site.active}
        # A packed weight that is not asked to become dense is packed again; what a 4-bit base left out stays out.
        self.four_bits = {path for path, _, _ in quantized_sites(model)} if self.dtype is None else set()
        if into == "nf4" and (quantize is not None or not self.four_bits):
            self.four_bits |= set(quantizable(model, self.config))
        rounded = [
            path
            for path, site in sites.items()
            if path in self.four_bits and site.weight is not None and site.weight.kind != "embedding"
        ]
        device = next(model.parameters()).device
        self.moments = None
        if calibration is not None and rounded:
            self.moments = Moments(model, rounded, on_device(model, calibration, device))

    def dtype_of(self, parameter: Tensor) -> torch.dtype:
        """The dtype of a dense parameter afterwards."""
        return self.dtype or parameter.dtype

    def merged(self, path: str, module: nn.Module, weight: SiteWeight, parts: list[tuple[Any, float]]) -> nn.Parameter:
        """The parameter that holds W + the updates."""
        if path in self.four_bits:
            return self._packed(path, weight, parts)
        out, columns = weight.shape
        stored = (out, columns) if weight.kind == "linear" else (columns, out)
        new = torch.empty(stored, dtype=self.dtype_of(weight.stored), device=weight.device)
        target = new if weight.kind == "linear" else new.t()
        for rows, total in _sums(weight, parts):
            target[rows] = total.to(new.dtype)
        return nn.Parameter(new, requires_grad=False)

    def _packed(self, path: str, weight: SiteWeight, parts: list[tuple[Any, float]]) -> nn.Parameter:
        old: Any = packed_of(weight.stored)
        how: dict[str, Any] = {"dtype": weight.dtype, "name": f"{path}.weight"}
        how |= dict(
            double_quant=old.double_quant if old is not None else self.config.double_quant,
            block_size=old.block_size if old is not None else self.config.block_size,
        )
        total = torch.cat([part.float() for _, part in _sums(weight, parts)])
        if weight.kind == "embedding":
            # What a row of an embedding outputs is the row: its nearest codes.
            return frozen(NF4Weight.quantize(total.t(), **how))
        H = self.moments[path] if self.moments is not None else None
        if self.report.mode == "retain":
            made = retain(total, H=H, base=old, low_rank=_joint(parts), **how)
        else:
            made = NF4Weight.quantize(total, **how)
        update = total - weight.dequantize().float()
        values = made.dequantize().float()
        self.report.layers[path] = output_error(values, total, H, update=update)
        self.report.calibration_tokens = self.moments.tokens if self.moments is not None else 0
        return frozen(made, transposed=weight.kind == "conv1d")

    def others(self, plan: list[tuple[nn.Module, str, nn.Parameter]]) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """The parameters that no adapter changed, where the form of the whole model changes."""
        if self.into is None:
            return []
        planned = {(id(owner), name) for owner, name, _ in plan}
        made: dict[int, nn.Parameter] = {}
        found = []
        for path, module in base_modules(self.model):
            for name, parameter in module._parameters.items():
                if parameter is None or (id(module), name) in planned:
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = self._other(path, module, name, parameter)
                if made[id(parameter)] is not parameter:
                    found.append((module, name, made[id(parameter)]))
        return found

    def _other(self, path: str, module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        packed = packed_of(parameter) is not None
        if self.dtype is not None:
            if not packed and (parameter.dtype == self.dtype or not parameter.is_floating_point()):
                return parameter
            values = parameter.dequantize() if packed else parameter.detach()
            return nn.Parameter(values.to(self.dtype).contiguous(), requires_grad=False)
        if packed or name != "weight" or path not in self.four_bits:
            return parameter
        return quantized_parameter(parameter, kind_of(module) == "conv1d", self.config, f"{path}.weight")


def _joint(parts: list[tuple[Any, float]]) -> LowRank | None:
    """The updates that are plain products, as one; their scales are in B."""
    lows = [(low, weight) for part, weight in parts if (low := part.low_rank()) is not None]
    if not lows:
        return None
    A = torch.cat([low.A.detach().float() for low, _ in lows])
    B = torch.cat([low.B.detach().float() * (low.scale * weight) for low, weight in lows], dim=1)
    return LowRank(A, B, 1.0)


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
