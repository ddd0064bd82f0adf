"""BitFit: the biases alone are trained.

Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models", arXiv
2106.10199:

    y = W x + b'        b' (out,), starting at b; likewise the biases of layer norms

Many decoders have no bias at all; `add_missing` gives their linears one that starts at 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.configs import accepts
from deltaw.core.errors import InputError
from deltaw.core.protocols import LowRank
from deltaw.kernels.per_example import along, spread
from deltaw.methods.companions import companions, configured_sites
from deltaw.methods.contract import Method, Placed, Start
from deltaw.models.sites import Site


@accepts()
@dataclass(frozen=True)
class BitFit:
    """Trained biases of every module that has one.

    Attributes:
        add_missing: also give the linears of target_modules that have no bias a new one, which starts at 0.
        target_modules: for add_missing: `"all-linear"`, `"attention"`, `"qv"`, `"mlp"`, names, regular expressions, or
            several.
        exclude_modules: for add_missing: names or a regular expression to leave out.
        layers_to_transform: for add_missing: indices of the only layers that get new biases.
        layers_pattern: name of the list of layers, where it is not the first numbered one.
        modules_to_save: modules trained whole and saved with the adapter (a new classifier).
    """

    add_missing: bool = False
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None


class NewBias(nn.Module):
    """A bias b' of a linear that has none."""

    replaces = False
    dropout = 0.0

    def __init__(self, site: Site, *, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(site.shape[0], device=site.weight.device, dtype=dtype or torch.float32))

    def low_rank(self) -> LowRank | None:
        """None: a bias is no product."""
        return None

    def shift(self) -> Tensor | None:
        """The bias: (out,)."""
        return self.bias

    def update(self, x: Tensor, base_out: Tensor) -> Tensor:
        """The bias, broadcast over tokens."""
        return along(spread(self.bias).to(base_out.dtype), base_out, 1).expand_as(base_out)

    def delta(self, rows: slice | None = None) -> Tensor | None:
        """None: the matrix stays."""
        return None

    def replacements(self) -> dict[str, Tensor]:
        """None: there is no parameter to replace."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The bias, under the key that it would have in the model."""
        return {".bias": self.bias.detach()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes the bias back."""
        with torch.no_grad():
            self.bias.copy_(tensors[".bias"])

    def described(self) -> dict[str, Any]:
        """What it is."""
        return {"bias": "new"}


def _attach(model: nn.Module, config: BitFit, start: Start) -> list[Placed]:
    placed = companions(
        model, [], bias="all", modules_to_save=config.modules_to_save, trainable_tokens=None, dtype=start.dtype
    )
    if config.add_missing:
        sites = configured_sites(model, config)
        if wrong := [site.name for site in sites if site.kind == "embedding"]:
            raise InputError(f"add_missing: {wrong[0]} is an embedding, which has no bias; leave it out of the targets")
        placed += [Placed(site.name, NewBias(site, dtype=start.dtype)) for site in sites if site.module.bias is None]
    elif all(item.part.replaces for item in placed):
        raise InputError(f"{type(model).__name__} has no bias to train: give add_missing=True for new ones, from 0 on")
    return placed


def _param_count(config: BitFit, kind: str, shape: tuple[int, int]) -> int:
    return shape[0]


def _to_peft(config: BitFit, model: nn.Module, parts: Mapping[str, Any]) -> dict[str, Any]:
    sites = configured_sites(model, config) if config.add_missing else []
    new = [site.name for site in sites if site.module.bias is None]
    return {"peft_type": "DELTAW_BITFIT", "add_missing": bool(new), "target_modules": new}


def _from_peft(fields: dict[str, Any]) -> BitFit:
    add_missing, targets = fields.get("add_missing"), fields.get("target_modules")
    if not isinstance(add_missing, bool) or not isinstance(targets, list):
        raise InputError("adapter_config.json is damaged: expected add_missing and target_modules")
    copies = fields.get("modules_to_save") or None
    return BitFit(add_missing=bool(targets), target_modules=targets or "all-linear", modules_to_save=copies)


BITFIT = Method(
    name="bitfit",
    config=BitFit,
    scope="site",
    attach=_attach,
    param_count=_param_count,
    to_peft=_to_peft,
    from_peft=_from_peft,
    peft_type="DELTAW_BITFIT",
    learning_rate=1e-3,
)
