"""The host: puts adapters on a model, switches and combines them, and takes them off without a trace.

Adapting changes no module's class and no key of the base: a module that carries adapters gets a child `adapted` (an
`AdaptedSite`) and, on the instance, a `forward` that asks it. Taking the last adapter off removes both.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltaw.core.contexts import sink_context
from deltaw.core.errors import InputError, unknown_name
from deltaw.core.generators import generator
from deltaw.core.protocols import AbsorbingWeight, LowRank
from deltaw.kernels.lora_linear import absorbed_linear, lora_linear
from deltaw.methods.contract import Method, Placed, Start
from deltaw.methods.registry import method_of
from deltaw.models.sites import SiteWeight, base_modules, kind_of

#: A set of active adapters: None (the bare base), one name, several (weights 1), or weights by name.
Active = str | Sequence[str] | Mapping[str, float] | None


class AdaptedSite(nn.Module):
    """All adapters of one module. `parts[name]` holds what the adapter called `name` put there."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        self.active: dict[str, float] = {}
        #: Names of what is in force beside the active adapters (noise).
        self.beside: list[str] = []
        #: Whether training computes with the update rounded into a weight of few bits (`set_merge_aware`).
        self.merge_aware = False
        kind = kind_of(module)
        self.weight = SiteWeight(module, kind) if kind is not None else None
        # Only a module whose forward is exactly x W^T + b may be computed by the fused product.
        plain = type(module).forward in (nn.Linear.forward, _conv1d_forward())
        self.fusable = plain and "forward" not in module.__dict__
        self.inner: Callable[..., Any] | None = module.__dict__.get("forward")

    def chosen(self) -> Iterator[tuple[Any, float]]:
        """The parts of the active adapters with their weights."""
        for name, weight in self.active.items():
            if name in self.parts:
                for part in cast(nn.ModuleList, self.parts[name]):
                    yield part, weight

    def base_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the module computes without adapters."""
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module's output with the active adapters' updates added up."""
        chosen = list(self.chosen())
        around: list[Any] = [part for name in self.beside for part in cast(nn.ModuleList, self.parts[name])]
        adding: list[tuple[Any, float]] = []
        for part, weight in chosen:
            if not hasattr(part, "prepare"):
                adding.append((part, weight))
            elif weight == 1:
                around.append(part)
            else:
                raise InputError(f"an active adapter has weight {weight:g}, and its kind knows none but 1")
        for part in around:
            args, kwargs = part.prepare(module, args, kwargs)
        out = self._added(module, adding, args, kwargs)
        for part in reversed(around):
            out = part.conclude(out)
        return out

    def _added(self, module: nn.Module, chosen: list[tuple[Any, float]], args: Any, kwargs: Any) -> Any:
        if not chosen:
            return self.base_forward(module, *args, **kwargs)
        if any(part.replaces for part, _ in chosen):
            return self._replaced(chosen)(*args, **kwargs)
        if self.fusable and len(args) == 1 and not kwargs and not module.weight.requires_grad:
            fused = self._fused(module, args[0], chosen)
            if fused is not None:
                return fused
        base_out = self.base_forward(module, *args, **kwargs)
        out = base_out
        x = args[0] if args else next(iter(kwargs.values()))
        for part, weight in chosen:
            update = part.update(x, base_out)
            out = out + (update if weight == 1 else update * weight)
        return out

    def _replaced(self, chosen: list[tuple[Any, float]]) -> Callable[..., Any]:
        copies = [(part, weight) for part, weight in chosen if part.replaces]
        if len(copies) > 1 or len(chosen) > 1 or copies[0][1] != 1:
            names = ", ".join(self.active)
            raise InputError(
                f"the active adapters {names} train a whole copy of the same module (modules_to_save): "
                "activate one of them, with weight 1"
            )
        whole: Callable[..., Any] = copies[0][0]
        return whole

    def _fused(self, module: nn.Module, x: Tensor, chosen: list[tuple[Any, float]]) -> Tensor | None:
        """The one-function path, or None where the parts have no common low-rank form."""
        factors: list[tuple[LowRank, float]] = []
        bias: Any = module.bias
        dropouts = set()
        assert self.weight is not None
        absorbing = self.weight.packed if self.merge_aware and self.training else None
        if sink_context() is not None and not _feeds(chosen):
            return None
        if len(chosen) == 1 and chosen[0][1] == 1 and hasattr(chosen[0][0], "alone") and absorbing is None:
            whole: Tensor = chosen[0][0].alone(x, self.weight, bias)
            return whole
        for part, weight in chosen:
            low, shift = part.low_rank(), part.shift()
            if low is None and shift is None:
                return None
            if low is not None:
                if low.out_scale is not None and (absorbing is None or len(chosen) > 1 or weight != 1):
                    return None
                factors.append((low, weight))
                dropouts.add(part.dropout if part.training else 0.0)
            if shift is not None:
                shift = shift.to(x.dtype) * weight
                bias = shift if bias is None else bias + shift
        if len(dropouts) > 1 or (len(factors) > 1 and dropouts != {0.0}):
            return None
        if not factors:
            return self.weight.matmul(x, bias)
        out_scale = None
        if len(factors) == 1:
            low, weight = factors[0]
            A, B, scale, out_scale = low.A, low.B, low.scale * weight, low.out_scale
        else:
            # Several adapters are one of the summed rank, their scales taken into B.
            A = torch.cat([low.A.to(x.dtype) for low, _ in factors])
            B = torch.cat([low.B.to(x.dtype) * (low.scale * weight) for low, weight in factors], dim=1)
            scale = 1.0
        if absorbing is not None:
            packed = cast(AbsorbingWeight, absorbing)
            return absorbed_linear(x, packed, A, B, scale=scale, out_scale=out_scale, bias=bias)
        return lora_linear(x, self.weight, A, B, scale=scale, bias=bias, dropout=dropouts.pop())


def _feeds(chosen: list[tuple[Any, float]]) -> bool:
    """Whether the one-function path knows the gradients by example: of factors that are themselves what is trained."""
    if len(chosen) > 1 or chosen[0][1] != 1 or chosen[0][0].shift() is not None:
        return False
    factors = getattr(chosen[0][0], "factors", None)
    return factors is not None and all(factor.is_leaf for factor in factors())


def _conv1d_forward() -> Any:
    from transformers.pytorch_utils import Conv1D

    return Conv1D.forward


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    site: Any = self.adapted
    return site.run(self, *args, **kwargs)


@dataclass
class Book:
    """What a model knows of its adapters.

    `beside` has the names of what trains nothing, to the adapter that it goes with; None: it is always in force.
    """

    configs: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, str | None] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    trainable: set[str] = field(default_factory=set)
    was_trainable: set[str] | None = None
    merged: Any = None


def book_of(model: nn.Module) -> Book:
    """The model's book; an empty one, which the model does not keep, where it has no adapter."""
    found = model.__dict__.get("_deltaw", None) or Book()
    assert isinstance(found, Book)
    return found


def sites_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, AdaptedSite]]:
    """(path, module, site) of every module that carries adapters."""
    for path, module in base_modules(model):
        site = module._modules.get("adapted")
        if isinstance(site, AdaptedSite):
            yield path, module, site


def parts_of(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, Any]]:
    """(path, module, part) of everything that one adapter put on the model."""
    for path, module, site in sites_of(model):
        if name in site.parts:
            for part in cast(nn.ModuleList, site.parts[name]):
                yield path, module, part


def adapt(
    model: nn.Module,
    config: Any,
    *,
    name: str = "default",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    trainable: bool = True,
    batches: Sequence[Mapping[str, Any]] | None = None,
    original: Callable[[str], Tensor] | None = None,
) -> nn.Module:
    """Puts a new adapter on `model`, in place, and makes it the active one.

    Args:
        model: any module; transformers' models are known by name, others are inspected.
        config: a method's configuration (`dw.LoRA(...)`, `dw.Full()`). `dw.NEFTune(...)` is put beside the adapters,
            in force until it is deleted; as a further entry of a list, whenever the list's first is active.
        name: the adapter's name: letters, digits, `_` and `-`.
        seed: with the site's name, decides the starting values; the global generator is not used.
        dtype: of the new parameters; None means float32, and for `modules_to_save` the module's. Copies of the base's
            values (trained biases, tokens, modules) are of no narrower dtype than the base's.
        trainable: whether the new parameters want gradients.
        batches: for starts made from activations (`init="eva"`): keyword arguments of forward passes, such as
            `{"input_ids": ..., "attention_mask": ...}`, made of training rows.
        original: for starts made from what quantising lost (`init="loftq"`): a module's path to its weight (out, in)
            before it was quantised.

    Returns:
        The same model.

    Raises:
        InputError: a target that matches nothing, a name in use, an adapter on a merged model.
    """
    if isinstance(config, (list, tuple)):
        return _adapt_with(
            model, config, name=name, seed=seed, dtype=dtype, trainable=trainable, batches=batches, original=original
        )
    method = method_of(config)
    book = book_of(model)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise InputError(f"adapter name {name!r}: expected letters, digits, _ and -")
    if hasattr(nn.ModuleDict(), name):
        raise InputError(f"adapter name {name!r} means something to torch's modules: choose another")
    if name in book.configs or name in book.beside:
        raise InputError(f"the model already has an adapter named {name!r}: choose another name, or delete it first")
    if book.merged is not None:
        raise InputError("the model holds a merged adapter: call dw.unmerge(model) before adding another")
    if not method.trains_nothing and book.configs and any(m.trains_base for m in (method, *_methods(book))):
        raise InputError("full fine-tuning trains the base itself and stands alone: use a fresh model for an adapter")
    start = Start(lambda path: generator(seed, "init", path), dtype, batches, original)
    placed = method.attach(model, config, start)
    if method.trains_nothing:
        _stand_beside(model, book, name, placed, None)
        return model
    if book.was_trainable is None:
        book.was_trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    if not method.trains_base:
        _freeze_base(model)
    model.__dict__["_deltaw"] = book
    for item in placed:
        _install(model.get_submodule(item.path), name, item)
    book.configs[name] = config
    if trainable:
        book.trainable.add(name)
    set_adapter(model, name)
    return model


def _adapt_with(model: nn.Module, configs: Sequence[Any], *, name: str, **options: Any) -> nn.Module:
    """The first configuration's adapter, and beside it what the others say, whenever it is active."""
    methods = [method_of(config) for config in configs]
    if not methods or methods[0].trains_nothing or not all(method.trains_nothing for method in methods[1:]):
        listed = ", ".join(method.name for method in methods) or "an empty list"
        raise InputError(f"adapt was given {listed}: expected one adapter first, and after it only what trains nothing")
    start = Start(lambda path: generator(options["seed"], "init", path))
    others = [(m.name, m.attach(model, config, start)) for m, config in zip(methods[1:], configs[1:], strict=True)]
    adapt(model, configs[0], name=name, **options)
    for kind, placed in others:
        _stand_beside(model, book_of(model), f"{name}-{kind}", placed, name)
    return model


def _stand_beside(model: nn.Module, book: Book, name: str, placed: list[Placed], owner: str | None) -> None:
    model.__dict__["_deltaw"] = book
    for item in placed:
        _install(model.get_submodule(item.path), name, item)
    book.beside[name] = owner
    set_adapter(model, dict(book.active))


def _methods(book: Book) -> list[Method]:
    return [method_of(config) for config in book.configs.values()]


def _freeze_base(model: nn.Module) -> None:
    for key, parameter in model.named_parameters():
        if "adapted" not in key.split("."):
            parameter.requires_grad_(False)


def _install(module: nn.Module, name: str, item: Placed) -> None:
    site = module._modules.get("adapted")
    if site is None:
        site = AdaptedSite(module)
        module.adapted = site
        module.forward = MethodType(_forward, module)
        site.train(module.training)
    assert isinstance(site, AdaptedSite)
    if name not in site.parts:
        site.parts[name] = nn.ModuleList()
    item.part.train(module.training)
    cast(nn.ModuleList, site.parts[name]).append(item.part)


def _uninstall(module: nn.Module, site: AdaptedSite) -> None:
    del module._modules["adapted"]
    del module.__dict__["forward"]
    if site.inner is not None:
        module.__dict__["forward"] = site.inner


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the model's adapters, in the order they came."""
    return list(book_of(model).configs)


def set_adapter(model: nn.Module, active: Active) -> None:
    """Chooses what the model computes with: one adapter, the sum of several, a weighted sum, or the bare base (None).

    Base weights are not touched. Only trainable adapters that are active want gradients.

    Raises:
        InputError: an unknown name, or a model whose adapter is merged.
    """
    book = book_of(model)
    if active is None:
        weights: dict[str, float] = {}
    elif isinstance(active, str):
        weights = {active: 1.0}
    elif isinstance(active, Mapping):
        weights = {name: float(weight) for name, weight in active.items()}
    else:
        weights = dict.fromkeys(active, 1.0)
    for name in weights:
        if name not in book.configs:
            raise unknown_name("adapter", name, book.configs)
    if book.merged is not None:
        raise InputError("the model holds a merged adapter: call dw.unmerge(model) first")
    if any(method_of(config).trains_base for config in book.configs.values()) and not weights:
        raise InputError("full fine-tuning changed the base itself: there is no bare base to go back to")
    book.active = weights
    beside = [name for name, owner in book.beside.items() if owner is None or owner in weights]
    for _, _, site in sites_of(model):
        site.beside = [name for name in beside if name in site.parts]
        site.active = {name: weight for name, weight in weights.items() if name in site.parts}
        for name, parts in site.parts.items():
            for parameter in parts.parameters():
                parameter.requires_grad_(name in weights and name in book.trainable)


def set_merge_aware(model: nn.Module, on: bool) -> None:
    """Whether training computes, on weights of few bits, with the update merged and rounded as a merge will round it.

    Takes effect on linears whose active parts are low-rank, in training mode; dropout is left out there.
    """
    for _, _, site in sites_of(model):
        site.merge_aware = on


def steady_parts(model: nn.Module) -> list[Any]:
    """The parts that may keep what depends on them alone while nothing changes (DoRA's norms)."""
    found = [
        part for _, _, site in sites_of(model) for parts in site.parts.values() for part in cast(Iterable[Any], parts)
    ]
    return [part for part in found if hasattr(part, "steady")]


@contextlib.contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """While a `with` block lasts, adapters' parameters stay as they are; whoever changes one calls `part.steady`."""
    before = [(part, part.is_steady) for part in steady_parts(model)]
    for part, _ in before:
        part.steady(True)
    try:
        yield
    finally:
        for part, on in before:
            part.steady(on)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Takes one adapter off; with the last one, the model is again exactly what it was."""
    book = book_of(model)
    if name not in book.configs and name not in book.beside:
        raise unknown_name("adapter", name, [*book.configs, *book.beside])
    if book.merged is not None:
        raise InputError("the model holds a merged adapter: call dw.unmerge(model) first")
    if name in book.configs and method_of(book.configs[name]).trains_base:
        raise InputError("full fine-tuning changed the base itself and cannot be taken off: load the model again")
    gone = [name, *(other for other, owner in book.beside.items() if owner == name)]
    for _, module, site in list(sites_of(model)):
        for other in set(gone) & set(site.parts):
            del site.parts[other]
            site.active.pop(other, None)
        site.beside = [other for other in site.beside if other not in gone]
        if not len(site.parts):
            _uninstall(module, site)
    for other in gone:
        book.beside.pop(other, None)
    if book.configs.pop(name, None) is not None:
        book.active.pop(name, None)
        book.trainable.discard(name)
    if not book.configs:
        forget(model)
        if book.beside:
            book.was_trainable = None
            model.__dict__["_deltaw"] = book


def forget(model: nn.Module) -> None:
    """Closes the book of a model that carries no adapter any more: its parameters want gradients as they did before."""
    book = book_of(model)
    if book.was_trainable is not None:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key in book.was_trainable)
    del model.__dict__["_deltaw"]


def unload(model: nn.Module) -> nn.Module:
    """Takes every adapter off; the base is bit-identical to what it was before."""
    for name in adapter_names(model):
        delete_adapter(model, name)
    for name in list(book_of(model).beside):
        delete_adapter(model, name)
    model.__dict__.pop("_deltaw", None)
    return model


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters by their path in the model; the model's own for full fine-tuning."""
    config = book_of(model).configs.get(name)
    if config is None:
        raise unknown_name("adapter", name, book_of(model).configs)
    if method_of(config).trains_base:
        return {key: p for key, p in model.named_parameters() if p.requires_grad}
    marker = f"adapted.parts.{name}."
    return {key: p for key, p in model.named_parameters() if marker in key}


def active_method(model: nn.Module, name: str) -> Method:
    """The method of one adapter."""
    return method_of(book_of(model).configs[name])
