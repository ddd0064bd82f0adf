"""LoRA and rsLoRA.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3:

    W' = W + (alpha / r) B A        W (out, in), A (r, in), B (out, r)

Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732, theorem 3.2 replaces
alpha / r by alpha / sqrt(r), which keeps the update's size when the rank grows. A starts uniform in
(-1/sqrt(in), 1/sqrt(in)) and B at zero, so W' = W at first; for an embedding, whose W is (dim, vocab), A (r, vocab)
starts at zero and B (dim, r) normal, so that a token's column alone learns from that token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.configs import accepts, spelling
from deltaw.core.errors import InputError
from deltaw.core.protocols import LowRank
from deltaw.methods.companions import companions, saved_modules
from deltaw.methods.contract import Placed, Start
from deltaw.models.sites import Site
from deltaw.models.targets import pattern_value, resolve_targets


@accepts(
    lora_alpha="alpha",
    lora_dropout="dropout",
    use_rslora="rslora",
    trainable_token_indices="trainable_tokens",
    init_lora_weights="init",
)
@dataclass(frozen=True)
class LoRA:
    """What a LoRA adapter is made of.

    PEFT's spellings `lora_alpha`, `lora_dropout`, `use_rslora`, `trainable_token_indices` and `init_lora_weights` are
    accepted too.

    Attributes:
        r: rank, at least 1.
        alpha: numerator of the scale; None means 2 r.
        dropout: probability of dropping an entry of the input of the low-rank branch in training.
        target_modules: `"all-linear"`, `"attention"`, `"qv"`, `"mlp"`, names, regular expressions, or several.
        exclude_modules: names or a regular expression to leave out.
        rank_pattern: {name or regular expression: rank} for sites whose rank differs.
        alpha_pattern: the same for alpha.
        rslora: scale by alpha/sqrt(r) instead of alpha/r.
        bias: `"none"`, `"lora_only"` (train the adapted modules' biases) or `"all"`.
        modules_to_save: modules trained whole and saved with the adapter (a new classifier).
        layers_to_transform: indices of the only layers to adapt.
        layers_pattern: name of the list of layers, where it is not the first numbered one.
        trainable_tokens: rows of the input embedding to train, or {module: rows}.
        lora_bias: gives B a bias of its own.
        init: `"default"` (or True), or `"gaussian"` (A normal with deviation 1/r, an embedding's factors as ever).
    """

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rslora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    trainable_tokens: Sequence[int] | dict[str, list[int]] | None = None
    lora_bias: bool = False
    init: str | bool = "default"

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            problems.append(f"r is {self.r!r}: expected a whole number of at least 1")
        elif self.alpha is None:
            object.__setattr__(self, "alpha", float(2 * self.r))
        if self.alpha is not None and not _is_number(self.alpha, above=0):
            problems.append(f"{spelling(self, 'alpha')} is {self.alpha!r}: expected a number above 0")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            problems.append(f"{spelling(self, 'dropout')} is {self.dropout!r}: expected a probability in [0, 1)")
        if self.bias not in ("none", "all", "lora_only"):
            problems.append(f"bias is {self.bias!r}: expected 'none', 'all' or 'lora_only'")
        if self.init is True:
            object.__setattr__(self, "init", "default")
        if self.init not in ("default", "gaussian"):
            problems.append(f"{spelling(self, 'init')} is {self.init!r}: expected 'default' or 'gaussian'")
        ranks, alphas = self.rank_pattern, self.alpha_pattern
        if not _is_pattern(ranks) or any(not isinstance(v, int) or v is True or v < 1 for v in ranks.values()):
            problems.append(f"rank_pattern is {ranks!r}: expected {{name or regular expression: rank of at least 1}}")
        if not _is_pattern(alphas) or any(not _is_number(v, above=0) for v in alphas.values()):
            problems.append(f"alpha_pattern is {alphas!r}: expected {{name or regular expression: number above 0}}")
        if problems:
            raise InputError("; ".join(problems))

    def rank_of(self, path: str) -> int:
        """The rank at a site."""
        return int(pattern_value(self.rank_pattern, path, self.r))

    def scale_of(self, path: str) -> float:
        """Alpha/r, or alpha/sqrt(r), at a site; rank and alpha are looked up independently."""
        assert self.alpha is not None
        alpha = pattern_value(self.alpha_pattern, path, self.alpha)
        rank = self.rank_of(path)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _is_number(value: Any, *, above: float | None = None) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return False
    return above is None or value > above


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, dict) and all(re.compile(key) for key in value)
    except (re.error, TypeError):
        return False


class LoraPart(nn.Module):
    """The factors A (r, in) and B (out, r) of one site."""

    replaces = False
    _module: Any

    def __init__(
        self, site: Site, *, r: int, scale: float, dropout: float, lora_bias: bool, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        out_features, in_features = site.shape
        device, dtype = site.weight.device, dtype or torch.float32
        self.kind = site.kind
        self.scale = scale
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.zeros(r, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=device, dtype=dtype))
        bias = torch.zeros(out_features, device=device, dtype=dtype)
        self.lora_bias = nn.Parameter(bias) if lora_bias else None
        object.__setattr__(self, "_module", site.module)

    def initialise(self, generator: torch.Generator, init: str | bool) -> None:
        """Draws the starting values on the CPU, so that they do not depend on the device."""
        random = self.lora_B if self.kind == "embedding" else self.lora_A
        if self.kind == "embedding":
            values = torch.randn(random.shape, generator=generator)
        elif init == "gaussian":
            values = torch.randn(random.shape, generator=generator) / random.shape[0]
        else:
            bound = 1.0 / math.sqrt(random.shape[1])
            values = torch.empty(random.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            random.copy_(values)

    def low_rank(self) -> LowRank | None:
        """A, B and the scale."""
        return LowRank(self.lora_A, self.lora_B, self.scale)

    def shift(self) -> Tensor | None:
        """The constant that the branch adds to every output: scale times B's own bias, (out,)."""
        if self.lora_bias is None:
            return None
        return self.lora_bias.to(torch.promote_types(self.lora_bias.dtype, torch.float32)) * self.scale

    def update(self, x: Tensor, base_out: Tensor) -> Tensor:
        """Scale B A x in `base_out`'s dtype; for an embedding x holds token ids."""
        dtype = base_out.dtype
        if self.kind == "embedding":
            padding: int | None = self._module.padding_idx
            rows = F.embedding(x, self.lora_A.t(), padding_idx=padding).to(dtype)
            out = F.linear(rows, self.lora_B.to(dtype)) * self.scale
            embed_scale = getattr(self._module, "embed_scale", None)
            if embed_scale is not None:
                out = out * torch.as_tensor(embed_scale, dtype=dtype, device=out.device)
            return out
        dropped = F.dropout(x, self.dropout, training=self.training)
        out = F.linear(F.linear(dropped, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        if self.lora_bias is not None:
            out = out + self.lora_bias.to(x.dtype)
        return (out * self.scale).to(dtype)

    def delta(self, rows: slice | None = None) -> Tensor | None:
        """Scale B A, in float32 or wider."""
        A, B = self.lora_A.detach(), self.lora_B.detach()[rows or slice(None)]
        wide = torch.promote_types(A.dtype, torch.float32)
        return (B.to(wide) @ A.to(wide)).mul_(self.scale)

    def replacements(self) -> dict[str, Tensor]:
        """None of the module's parameters is replaced whole."""
        return {}

    def _keys(self) -> dict[str, nn.Parameter]:
        if self.kind == "embedding":
            return {".lora_embedding_A": self.lora_A, ".lora_embedding_B": self.lora_B}
        keys = {".lora_A.weight": self.lora_A, ".lora_B.weight": self.lora_B}
        if self.lora_bias is not None:
            keys[".lora_B.bias"] = self.lora_bias
        return keys

    def tensors(self) -> dict[str, Tensor]:
        """A and B under PEFT's keys."""
        return {key: parameter.detach() for key, parameter in self._keys().items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes A and B back."""
        with torch.no_grad():
            for key, parameter in self._keys().items():
                parameter.copy_(tensors[key])

    def described(self) -> dict[str, Any]:
        """Rank and scale."""
        return {"r": self.lora_A.shape[0], "scale": self.scale}


def attach(model: nn.Module, config: LoRA, start: Start) -> list[Placed]:
    """The factors of every site that the targets name, and what comes along with them."""
    return attach_parts(model, config, start, LoraPart)


def attach_parts(model: nn.Module, config: LoRA, start: Start, part_type: type[LoraPart]) -> list[Placed]:
    """`attach` for LoRA and what is a LoRA with more to it."""
    sites = resolve_targets(
        model,
        config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        reserved=saved_modules(model, config.modules_to_save),
    )
    placed = []
    for site in sites:
        if config.lora_bias and site.kind == "embedding":
            raise InputError(f"lora_bias: {site.name} is an embedding, which has no bias; leave it out of the targets")
        part = part_type(
            site,
            r=config.rank_of(site.name),
            scale=config.scale_of(site.name),
            dropout=config.dropout,
            lora_bias=config.lora_bias,
            dtype=start.dtype,
        )
        part.initialise(start.generator(site.name), config.init)
        placed.append(Placed(site.name, part))
    unused = [p for p in (*config.rank_pattern, *config.alpha_pattern) if not _names_any(p, sites)]
    if unused:
        raise InputError(f"pattern {unused[0]!r} of rank_pattern or alpha_pattern names no adapted module")
    placed += companions(
        model,
        sites,
        bias=config.bias,
        modules_to_save=config.modules_to_save,
        trainable_tokens=config.trainable_tokens,
        dtype=start.dtype,
    )
    return placed


def _names_any(pattern: str, sites: Sequence[Site]) -> bool:
    return any(pattern_value({pattern: 1}, site.name, 0) for site in sites)


def param_count(config: LoRA, kind: str, shape: tuple[int, int]) -> int:
    """N = r (in + out), and out more where B has a bias."""
    bias = shape[0] if config.lora_bias else 0
    return config.r * (shape[0] + shape[1]) + bias
