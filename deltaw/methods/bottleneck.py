"""Bottleneck adapters: two small networks in every layer.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751, section 2.1. Behind the attention's
output projection and behind the feed-forward's second linear, before the residual addition:

    y' = y + U act(D y + d) + u        y (out,), D (k, out), d (k,), U (out, k), u (out,), k the bottleneck

U and u start at zero, so y' = y at first. The update depends on the output through `act` and cannot be merged. Beside
another active adapter on the same linear, y is the base's output without that adapter's update.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.configs import accepts
from deltaw.core.errors import InputError
from deltaw.core.protocols import LowRank
from deltaw.kernels.per_example import linear, spread
from deltaw.methods.companions import companions, configured_sites
from deltaw.methods.contract import Method, Placed, Start
from deltaw.models.families import names_of, roles_of
from deltaw.models.sites import Site
from deltaw.models.targets import model_type, resolve_targets

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@accepts()
@dataclass(frozen=True)
class Bottleneck:
    """Bottleneck adapters behind the attention and behind the MLP of every layer.

    Attributes:
        bottleneck_dim: width k of the bottleneck; None means 64, or what reduction_factor gives.
        reduction_factor: the linear's outputs over k, in place of bottleneck_dim.
        activation: `gelu`, `relu`, `silu` or `tanh`.
        dropout: probability of dropping an entry of the bottleneck's input in training.
        target_modules: linears to put one behind each: groups, names or regular expressions; None means the attention's
            output projection and the MLP's second linear of every layer.
        exclude_modules: names or a regular expression to leave out.
        layers_to_transform: indices of the only layers to adapt.
        layers_pattern: name of the list of layers, where it is not the first numbered one.
        modules_to_save: modules trained whole and saved with the adapter (a new classifier).
    """

    bottleneck_dim: int | None = None
    reduction_factor: float | None = None
    activation: str = "gelu"
    dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        problems = []
        width, factor = self.bottleneck_dim, self.reduction_factor
        if width is None and factor is None:
            object.__setattr__(self, "bottleneck_dim", 64)
        elif width is not None and factor is not None:
            problems.append(f"bottleneck_dim is {width!r} and reduction_factor {factor!r}: give one of them")
        elif width is not None and (not isinstance(width, int) or isinstance(width, bool) or width < 1):
            problems.append(f"bottleneck_dim is {width!r}: expected a whole number of at least 1")
        elif factor is not None and (not _is_number(factor) or factor < 1):
            problems.append(f"reduction_factor is {factor!r}: expected a number of at least 1")
        if self.activation not in ACTIVATIONS:
            problems.append(f"activation is {self.activation!r}: expected one of {', '.join(ACTIVATIONS)}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout!r}: expected a probability in [0, 1)")
        if problems:
            raise InputError("; ".join(problems))

    def width_of(self, outputs: int) -> int:
        """The bottleneck k behind a linear with so many outputs."""
        if self.reduction_factor is not None:
            return max(1, int(outputs / self.reduction_factor))
        assert self.bottleneck_dim is not None
        return self.bottleneck_dim


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class BottleneckPart(nn.Module):
    """D (k, out), d (k,), U (out, k) and u (out,) behind one linear."""

    replaces = False

    def __init__(self, site: Site, config: Bottleneck, *, dtype: torch.dtype | None) -> None:
        super().__init__()
        out = site.shape[0]
        width = config.width_of(out)
        made: dict[str, Any] = {"device": site.weight.device, "dtype": dtype or torch.float32}
        self.activation = config.activation
        self.dropout = config.dropout
        self.down_weight = nn.Parameter(torch.zeros(width, out, **made))
        self.down_bias = nn.Parameter(torch.zeros(width, **made))
        self.up_weight = nn.Parameter(torch.zeros(out, width, **made))
        self.up_bias = nn.Parameter(torch.zeros(out, **made))

    def initialise(self, generator: torch.Generator) -> None:
        """Draws D on the CPU, so that it does not depend on the device, as `nn.Linear` draws its weight."""
        bound = 1.0 / math.sqrt(self.down_weight.shape[1])
        values = torch.empty(self.down_weight.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.down_weight.copy_(values)

    def low_rank(self) -> LowRank | None:
        """None: the update is no product of matrices."""
        return None

    def shift(self) -> Tensor | None:
        """None: what it adds depends on the output."""
        return None

    def update(self, x: Tensor, base_out: Tensor) -> Tensor:
        """U act(D y + d) + u in `base_out`'s dtype: (..., out)."""
        dtype = base_out.dtype
        y = F.dropout(base_out, self.dropout, training=self.training)
        down, d, up, u = (spread(p).to(dtype) for p in (self.down_weight, self.down_bias, self.up_weight, self.up_bias))
        return linear(ACTIVATIONS[self.activation](linear(y, down, d)), up, u)

    def delta(self, rows: slice | None = None) -> Tensor | None:
        """None: the matrix stays."""
        return None

    def replacements(self) -> dict[str, Tensor]:
        """None of the module's parameters is replaced whole."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The four tensors."""
        return {f".bottleneck.{name}": parameter.detach() for name, parameter in self.named_parameters()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes them back."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(tensors[f".bottleneck.{name}"])

    def described(self) -> dict[str, Any]:
        """The bottleneck's width."""
        return {"bottleneck_dim": self.down_weight.shape[0]}


def _sites(model: nn.Module, config: Bottleneck) -> list[Site]:
    sites = configured_sites(model, config, _two_per_layer(model) if config.target_modules is None else None)
    if wrong := [site.name for site in sites if site.kind == "embedding"]:
        raise InputError(f"bottleneck adapters sit behind linears, and {wrong[0]} is an embedding: leave it out")
    return sites


def _two_per_layer(model: nn.Module) -> list[str]:
    """Paths of the attention's output projections and the MLP's second linears.

    Raises:
        InputError: a layer has not one or more of the former and exactly one of the latter.
    """
    names, _ = names_of(model_type(model))
    layers: dict[str, dict[str, list[str]]] = {}
    for site in resolve_targets(model, "all-linear"):
        layer = re.match(r"(.*?\.\d+)\.", site.name)
        roles = roles_of(site.name, names)
        if layer is not None:
            found = layers.setdefault(layer[1], {"output": [], "down": []})
            for role in set(roles) & set(found):
                found[role].append(site.name)
    for layer_name, found in layers.items():
        if not found["output"] or len(found["down"]) != 1:
            has = ", ".join([*found["output"], *found["down"]]) or "none that is known"
            raise InputError(
                f"bottleneck adapters sit behind the attention's output projection and the MLP's second linear, and "
                f"{layer_name} of {type(model).__name__} has {has}: name the linears in target_modules"
            )
    if not layers:
        raise InputError(f"{type(model).__name__} has no numbered layers: name the linears in target_modules")
    return [path for found in layers.values() for paths in found.values() for path in paths]


def _attach(model: nn.Module, config: Bottleneck, start: Start) -> list[Placed]:
    placed = []
    for site in _sites(model, config):
        part = BottleneckPart(site, config, dtype=start.dtype)
        part.initialise(start.generator(site.name))
        placed.append(Placed(site.name, part))
    return placed + companions(
        model, [], bias="none", modules_to_save=config.modules_to_save, trainable_tokens=None, dtype=start.dtype
    )


def _param_count(config: Bottleneck, kind: str, shape: tuple[int, int]) -> int:
    width = config.width_of(shape[0])
    return 2 * width * shape[0] + width + shape[0]


#: Fields of the configuration that the file has under their own names.
_SAVED = ("bottleneck_dim", "reduction_factor", "activation", "dropout")


def _to_peft(config: Bottleneck, model: nn.Module, parts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "peft_type": "DELTAW_BOTTLENECK",
        **{name: getattr(config, name) for name in _SAVED},
        "target_modules": [site.name for site in _sites(model, config)],
    }


def _from_peft(fields: dict[str, Any]) -> Bottleneck:
    missing = [name for name in (*_SAVED, "target_modules") if name not in fields]
    if missing:
        raise InputError(f"adapter_config.json is damaged: expected {missing[0]}, as deltaw writes it")
    return Bottleneck(
        **{name: fields[name] for name in (*_SAVED, "target_modules")},
        modules_to_save=fields.get("modules_to_save") or None,
    )


BOTTLENECK = Method(
    name="bottleneck",
    config=Bottleneck,
    scope="block",
    attach=_attach,
    param_count=_param_count,
    to_peft=_to_peft,
    from_peft=_from_peft,
    peft_type="DELTAW_BOTTLENECK",
    learning_rate=1e-3,
    mergeable=False,
)
