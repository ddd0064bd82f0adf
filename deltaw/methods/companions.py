"""Parts that any adapter can bring along: trained biases, rows of an embedding, whole trained copies of modules.

All are kept beside the base, never in it, so that several adapters share one base and unloading leaves it untouched.
What starts as a copy of the base's values is never of a narrower dtype than theirs, lest the start be rounded.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltaw.core.errors import InputError, near
from deltaw.core.protocols import LowRank, packed_of
from deltaw.kernels.per_example import along, linear, lookup, spread
from deltaw.methods.contract import Placed
from deltaw.models.sites import Site, base_modules, kind_of, site_of
from deltaw.models.targets import pattern_value, resolve_targets


class BiasPart(nn.Module):
    """A trained bias b' in place of the module's b: adds b' - b to the output."""

    replaces = False
    dropout = 0.0

    _module: Any

    def __init__(self, module: nn.Module, *, on_site: bool, dtype: torch.dtype | None) -> None:
        super().__init__()
        bias = module.bias
        assert isinstance(bias, Tensor)
        self.bias = nn.Parameter(bias.detach().to(_wider(dtype or torch.float32, bias), copy=True))
        # PEFT finds the bias of an adapted module one level down, under its wrapper's `base_layer`.
        self.key = ".base_layer.bias" if on_site else ".bias"
        object.__setattr__(self, "_module", module)

    def low_rank(self) -> LowRank | None:
        """None: a bias is no product."""
        return None

    def shift(self) -> Tensor | None:
        """The trained bias less the module's: (out,)."""
        base: Tensor = self._module.bias
        return self.bias - base.detach()

    def update(self, x: Tensor, base_out: Tensor) -> Tensor:
        """The shift, broadcast over tokens."""
        base: Tensor = self._module.bias
        shift = spread(self.bias) - base.detach()
        return along(shift.to(base_out.dtype), base_out, 1).expand_as(base_out)

    def delta(self, rows: slice | None = None) -> Tensor | None:
        """None: the matrix stays."""
        return None

    def replacements(self) -> dict[str, Tensor]:
        """None: a merge adds the shift."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The bias under PEFT's key."""
        return {self.key: self.bias.detach()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes the bias back."""
        with torch.no_grad():
            self.bias.copy_(tensors[self.key])

    def described(self) -> dict[str, Any]:
        """What it is."""
        return {"part": "bias"}


class TokenRows(nn.Module):
    """New values for chosen rows of an embedding (vocab, dim), or of the output head tied to it.

    With S selecting the rows, W' = W + S (T - S^T W): a low-rank update whose one factor is fixed.
    """

    replaces = False
    dropout = 0.0
    index: Tensor
    _site: Any

    def __init__(
        self, site: Site, indices: Sequence[int], *, dtype: torch.dtype | None, tied_to: TokenRows | None = None
    ) -> None:
        super().__init__()
        count = site.weight.stored.shape[0]
        wanted = list(indices)
        whole = all(isinstance(i, int) and 0 <= i < count for i in wanted)
        if not wanted or not whole or len(set(wanted)) < len(wanted):
            raise InputError(f"trainable tokens {wanted!r}: expected distinct row numbers of {site.name} below {count}")
        # The order is kept: PEFT's files hold the rows in the order of the configuration.
        index = torch.tensor(wanted, dtype=torch.long, device=site.weight.device)
        values = site.weight.take(index)
        self.kind = site.kind
        self.register_buffer("index", index, persistent=False)
        if tied_to is None:
            self.rows = nn.Parameter(values.to(_wider(dtype or torch.float32, values), copy=True))
        else:
            self.rows = tied_to.rows
        self.tied = tied_to is not None
        object.__setattr__(self, "_site", site)

    def low_rank(self) -> LowRank | None:
        """None: one of its factors is fixed, and it is no dense product."""
        return None

    def shift(self) -> Tensor | None:
        """None: the bias stays as it is."""
        return None

    def _shift(self, rows: Tensor) -> Tensor:
        values: Tensor = self._site.weight.take(self.index)
        return rows - values

    def update(self, x: Tensor, base_out: Tensor) -> Tensor:
        """Adds T - W at chosen tokens (embedding), or h (T - W)^T at chosen logits (head)."""
        shift = self._shift(spread(self.rows)).to(base_out.dtype)
        if self.kind == "embedding":
            slot = torch.full((self._site.shape[1],), -1, dtype=torch.long, device=x.device)
            slot[self.index] = torch.arange(len(self.index), device=x.device)
            found = slot[x]
            padded = torch.cat([shift, torch.zeros_like(shift[..., :1, :])], dim=-2)
            scale = getattr(self._site.module, "embed_scale", None)
            rows = lookup(found, padded)
            return rows if scale is None else rows * torch.as_tensor(scale, dtype=rows.dtype, device=rows.device)
        out = torch.zeros_like(base_out)
        return out.index_add(-1, self.index, linear(x.to(shift.dtype), shift))

    def delta(self, rows: slice | None = None) -> Tensor | None:
        """T - W at the chosen rows of the stored matrix, zero elsewhere: (out, in) rows, at least float32."""
        out_features, in_features = self._site.shape
        start, stop, _ = (rows or slice(None)).indices(out_features)
        shift = self._shift(self.rows).detach()
        shift = shift.to(torch.promote_types(shift.dtype, torch.float32))
        part = shift.new_zeros(stop - start, in_features)
        if self.kind == "embedding":
            part[:, self.index] = shift.t()[start:stop]
        else:
            inside = (self.index >= start) & (self.index < stop)
            part[self.index[inside] - start] = shift[inside]
        return part

    def replacements(self) -> dict[str, Tensor]:
        """None of the module's parameters is replaced whole."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The rows under PEFT's key; nothing for the tied twin."""
        return {} if self.tied else {".token_adapter.trainable_tokens_delta": self.rows.detach()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes the rows back."""
        if not self.tied:
            with torch.no_grad():
                self.rows.copy_(tensors[".token_adapter.trainable_tokens_delta"])

    def described(self) -> dict[str, Any]:
        """What it is."""
        return {"part": "tokens", "rows": len(self.index), "tied": self.tied}


class ModuleCopy(nn.Module):
    """A whole trained copy of a module, used in its place (`modules_to_save`: a new classifier, a norm, a head).

    It computes in its own dtype; where that is not the module's, what goes in and comes out is cast.
    """

    replaces = True
    dropout = 0.0
    _module: Any

    def __init__(self, module: nn.Module, *, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.copy = copy.deepcopy(module)
        for inner in self.copy.modules():
            # Another adapter may already sit on the module; its copy starts from the bare base.
            if inner._modules.pop("adapted", None) is not None:
                del inner.__dict__["forward"]
            for name, parameter in inner._parameters.items():
                # A copy is trained, so its values are dense however the base keeps them.
                if parameter is not None and packed_of(parameter) is not None:
                    inner._parameters[name] = nn.Parameter(parameter.dequantize().contiguous())
        for parameter in self.copy.parameters():
            if dtype is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(_wider(dtype, parameter))
            parameter.requires_grad_(True)
        object.__setattr__(self, "_module", module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the copy computes in the module's place."""
        own, base = _float_dtype(self.copy), _float_dtype(self._module)
        if own == base or own is None or base is None:
            return self.copy(*args, **kwargs)
        return _cast(self.copy(*_cast(args, own), **_cast(kwargs, own)), base)

    def low_rank(self) -> LowRank | None:
        """None: a copy has no factors."""
        return None

    def shift(self) -> Tensor | None:
        """None: the bias stays as it is."""
        return None

    def update(self, x: Tensor, base_out: Tensor) -> Tensor:
        """The copy's output less the module's."""
        replaced: Tensor = self(x)
        return replaced - base_out

    def delta(self, rows: slice | None = None) -> Tensor | None:
        """None: the parameters are replaced, not changed."""
        return None

    def replacements(self) -> dict[str, Tensor]:
        """Every parameter of the copy."""
        named = self.copy.named_parameters(remove_duplicate=False)
        return {name: parameter.detach() for name, parameter in named}

    def tensors(self) -> dict[str, Tensor]:
        """The copy's state under the module's own keys."""
        return {f".{name}": tensor.detach() for name, tensor in self.copy.state_dict().items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes the state back."""
        self.copy.load_state_dict({name.removeprefix("."): tensor for name, tensor in tensors.items()})

    def described(self) -> dict[str, Any]:
        """What it is."""
        return {"part": "copy"}


def _wider(dtype: torch.dtype, values: Tensor) -> torch.dtype:
    return torch.promote_types(dtype, values.dtype)


def _float_dtype(module: nn.Module) -> torch.dtype | None:
    own = (p.dtype for name, p in module.named_parameters() if "adapted" not in name.split("."))
    return next((dtype for dtype in own if dtype.is_floating_point), None)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(item, dtype) for item in value)
    if type(value) is dict:
        return {key: _cast(item, dtype) for key, item in value.items()}
    return value


def _adds_bias(module: nn.Module) -> bool:
    """Whether the module's `bias` is added to the last axis of its output, so that a shift of it can be."""
    return kind_of(module) in ("linear", "conv1d") or "LayerNorm" in type(module).__name__


def saved_modules(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Paths of the modules that `modules_to_save` names (a path or the end of one).

    Raises:
        InputError: a name matches nothing.
    """
    found: list[str] = []
    modules = [name for name, _ in base_modules(model) if name]
    for wanted in names or ():
        matched = [name for name in modules if name == wanted or name.endswith("." + wanted)]
        if not matched:
            ends = {name.rsplit(".", 1)[-1] for name in modules} - {str(i) for i in range(1000)}
            hint = near(wanted, ends) or sorted(ends)[:12]
            raise InputError(
                f"modules_to_save {wanted!r} matches no module of {type(model).__name__}: "
                f"near names are {', '.join(hint)}"
            )
        found.extend(matched)
    return [name for name in dict.fromkeys(found) if not any(name.startswith(other + ".") for other in found)]


def configured_sites(model: nn.Module, config: Any, targets: Any = None) -> list[Site]:
    """The sites that a configuration's fields name (`target_modules` to `layers_pattern`), saved modules left out.

    Args:
        model: the model.
        config: with these fields and `modules_to_save`.
        targets: in place of its `target_modules`.

    Raises:
        InputError: a target that matches nothing; a pattern of ranks or alphas that names none of the sites.
    """
    sites = resolve_targets(
        model,
        config.target_modules if targets is None else targets,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        reserved=saved_modules(model, config.modules_to_save),
    )
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field, {}):
            if not any(pattern_value({pattern: 1}, site.name, 0) for site in sites):
                raise InputError(f"pattern {pattern!r} of {field} names no adapted module")
    return sites


def companions(
    model: nn.Module,
    sites: Sequence[Site],
    *,
    bias: Literal["none", "all", "lora_only"],
    modules_to_save: Sequence[str] | None,
    trainable_tokens: Sequence[int] | dict[str, list[int]] | None,
    dtype: torch.dtype | None,
) -> list[Placed]:
    """The parts that come along with an adapter on `sites`."""
    placed: list[Placed] = []
    on_site = {site.name for site in sites}
    copied = saved_modules(model, modules_to_save)
    modules = dict(base_modules(model))
    for path in copied:
        placed.append(Placed(path, ModuleCopy(modules[path], dtype=dtype)))
    outside = {p: m for p, m in modules.items() if not any(p == c or p.startswith(c + ".") for c in copied)}
    if bias != "none":
        chosen = outside if bias == "all" else {path: outside[path] for path in outside if path in on_site}
        for path, module in _biased(chosen):
            placed.append(Placed(path, BiasPart(module, on_site=path in on_site, dtype=dtype)))
    if trainable_tokens is not None:
        placed.extend(_token_parts(model, modules, trainable_tokens, dtype))
    if both := {item.path for item in placed[len(copied) :]} - set(outside):
        raise InputError(f"trainable tokens are rows of {min(both)}, which modules_to_save trains whole: choose one")
    return placed


def _biased(modules: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """Modules whose bias is to be trained; of several that share one bias, the one that adds it."""
    found: dict[int, tuple[str, nn.Module]] = {}
    lacking: dict[int, str] = {}
    for path, module in modules.items():
        bias = module._parameters.get("bias")
        if bias is not None and _adds_bias(module):
            if id(bias) in found:
                raise InputError(f"{found[id(bias)][0]} and {path} share a bias, which cannot be trained: bias='none'")
            found[id(bias)] = (path, module)
        elif bias is not None:
            lacking.setdefault(id(bias), f"{path}.bias of a {type(module).__name__}")
    for key, what in lacking.items():
        if key not in found:
            raise InputError(f"bias='all' cannot train {what}: use bias='lora_only', or 'none'")
    return list(found.values())


def _token_parts(
    model: nn.Module,
    modules: dict[str, nn.Module],
    tokens: Sequence[int] | dict[str, list[int]],
    dtype: torch.dtype | None,
) -> list[Placed]:
    getter: Any = getattr(model, "get_input_embeddings", None)
    embedding = getter() if getter is not None else None
    source = next((path for path, module in modules.items() if module is embedding), "")
    if isinstance(tokens, dict):
        chosen = {}
        for wanted, indices in tokens.items():
            paths = [path for path in modules if path == wanted or path.endswith("." + wanted)]
            if not paths:
                raise InputError(f"trainable tokens name {wanted!r}, which is no module of {type(model).__name__}")
            chosen.update(dict.fromkeys(paths, indices))
    else:
        if not source:
            raise InputError(
                f"{type(model).__name__} has no input embedding: give trainable tokens as {{module: rows}}"
            )
        chosen = {source: list(tokens)}
    # As in PEFT: what is tied to the input embedding follows it, unless it is given rows of its own.
    twins = _tied_to(modules, source) if source in chosen else []
    if any(chosen.get(path, chosen[source]) != chosen[source] for path in twins):
        twins = []
    placed: list[Placed] = []
    for path, indices in chosen.items():
        if path in twins:
            continue
        part = TokenRows(site_of(path, modules[path]), indices, dtype=dtype)
        placed.append(Placed(path, part))
        if path == source:
            placed += [
                Placed(twin, TokenRows(site_of(twin, modules[twin]), indices, dtype=dtype, tied_to=part))
                for twin in twins
            ]
    return placed


def _tied_to(modules: dict[str, nn.Module], source: str) -> list[str]:
    """Paths of the other linears and embeddings whose weight is the very parameter of `source`'s."""
    weight = modules[source].weight
    return [
        path
        for path, module in modules.items()
        if path != source and kind_of(module) is not None and module._parameters.get("weight") is weight
    ]
