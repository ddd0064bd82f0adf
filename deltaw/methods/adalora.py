"""AdaLoRA.

Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512, equation 3:

    W' = W + s P diag(E) Q        W (out, in), P = lora_B (out, r), E = lora_E (r, 1), Q = lora_A (r, in)

with s = alpha / (init_r + 1e-5), the number that PEFT's files imply; s keeps init_r while ranks fall. Training adds
orth_reg_weight times the mean, over the P and Q of all sites, of

    |P^T P - I|_F        |Q Q^T - I|_F

(equation 4 squares the norms; PEFT does not). E starts at zero and P and Q normal with deviation 0.02, so W' = W at
first. Which entries of E are zeroed while training is `adalora_budget.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.configs import accepts, spelling
from deltaw.core.errors import InputError
from deltaw.core.protocols import LowRank
from deltaw.kernels.per_example import linear, spread
from deltaw.methods.companions import companions, configured_sites
from deltaw.methods.contract import Placed, Start
from deltaw.methods.lora import LoRA
from deltaw.models.sites import Site
from deltaw.models.targets import pattern_value


@accepts(
    lora_alpha="alpha",
    lora_dropout="dropout",
    trainable_token_indices="trainable_tokens",
    deltaT="delta_t",
    total_step="total_steps",
)
@dataclass(frozen=True)
class AdaLoRA:
    """What an AdaLoRA adapter is made of, and how its ranks fall.

    PEFT's spellings `lora_alpha`, `lora_dropout`, `trainable_token_indices`, `deltaT` and `total_step` are accepted.
    The shares of the steps that `tinit` and `tfinal` have by default are about the medians of those that the paper's
    authors used on the eight tasks of GLUE (0.13 and 0.47).

    Attributes:
        init_r: rank that every site begins with.
        target_r: mean rank that the sites end with, from 1 to init_r - 1.
        alpha: numerator of the scale; None means 2 init_r.
        dropout: probability of dropping an entry of the input of the low-rank branch in training.
        target_modules: `"all-linear"`, `"attention"`, `"qv"`, `"mlp"`, names, regular expressions, or several.
        exclude_modules: names or a regular expression to leave out.
        rank_pattern: {name or regular expression: rank} for sites whose rank differs.
        bias: `"none"`, `"lora_only"` (train the adapted modules' biases) or `"all"`.
        modules_to_save: modules trained whole and saved with the adapter (a new classifier).
        layers_to_transform: indices of the only layers to adapt.
        layers_pattern: name of the list of layers, where it is not the first numbered one.
        trainable_tokens: rows of the input embedding to train, or {module: rows}.
        tinit: optimizer steps before ranks begin to fall; None means an eighth of all.
        tfinal: the last steps, in which ranks stay; None means half of all.
        delta_t: steps between two choices of ranks; 1 gives weights kept from any step the ranks of that step.
        total_steps: steps in all that the ranks' schedule is for; None means the run's.
        beta1: how much of the averaged importance a step keeps.
        beta2: the same for its uncertainty.
        orth_reg_weight: weight of the term that keeps P and Q orthogonal.
    """

    init_r: int = 12
    target_r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    trainable_tokens: Sequence[int] | dict[str, list[int]] | None = None
    tinit: int | None = None
    tfinal: int | None = None
    delta_t: int = 1
    total_steps: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5

    def __post_init__(self) -> None:
        problems = []
        for name, least in (("init_r", 1), ("target_r", 1), ("tinit", 0), ("tfinal", 0), ("delta_t", 1)):
            value = getattr(self, name)
            if not _is_whole(value, least) and not (value is None and name in ("tinit", "tfinal")):
                problems.append(f"{spelling(self, name)} is {value!r}: expected a whole number of at least {least}")
        if self.total_steps is not None and not _is_whole(self.total_steps, 1):
            given = spelling(self, "total_steps")
            problems.append(f"{given} is {self.total_steps!r}: expected a whole number of at least 1")
        for name in ("beta1", "beta2"):
            if not isinstance(value := getattr(self, name), float) or not 0 < value < 1:
                problems.append(f"{name} is {value!r}: expected a number between 0 and 1")
        weight = self.orth_reg_weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            problems.append(f"orth_reg_weight is {weight!r}: expected 0 or more")
        if not problems and self.target_r >= max(self.init_r, 2):
            problems.append(
                f"target_r is {self.target_r} and init_r {self.init_r}, so no rank could fall: choose target_r below "
                "init_r, or method lora for ranks that stay"
            )
        if problems:
            raise InputError("; ".join(problems))
        # LoRA says what is wrong with what both have.
        same = {spelling(self, name): getattr(self, name) for name in ("alpha", "dropout", "bias")}
        ranks = self.rank_pattern
        plain = LoRA(r=self.init_r, rank_pattern={name: r or 1 for name, r in ranks.items()}, **same)
        object.__setattr__(self, "alpha", plain.alpha)
        if any(not _is_whole(r, 0) or r > self.init_r for r in ranks.values()):
            raise InputError(f"rank_pattern is {ranks!r}: expected ranks from 0 to init_r ({self.init_r})")

    def rank_of(self, path: str) -> int:
        """The rank at a site."""
        return int(pattern_value(self.rank_pattern, path, self.init_r))

    @property
    def scale(self) -> float:
        """Alpha / (init_r + 1e-5), the same at every site and rank."""
        assert self.alpha is not None
        return self.alpha / (self.init_r + 1e-5)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


class AdaLoraPart(nn.Module):
    """P, E and Q of one site.

    Args:
        site: where it sits.
        r: rank to begin with.
        config: the adapter's.
        sites: of the whole adapter, over which the orthogonality term is a mean.
        dtype: of the factors; None means float32.
    """

    replaces = False
    lora_A: Tensor
    lora_B: Tensor
    lora_E: Tensor

    def __init__(self, site: Site, *, r: int, config: AdaLoRA, sites: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        out_features, in_features = site.shape
        self.dropout = config.dropout
        self.scale = config.scale
        self.init_r = config.init_r
        self.orth_weight = config.orth_reg_weight / (2 * sites)
        options: dict[str, Any] = {"device": site.weight.device, "dtype": dtype or torch.float32}
        A, B = torch.zeros(r, in_features, **options), torch.zeros(out_features, r, **options)
        self._hold(A, B, torch.zeros(r, 1, **options), trained=True)

    def _hold(self, A: Tensor, B: Tensor, E: Tensor, *, trained: bool) -> None:
        for name, value in (("lora_A", A), ("lora_B", B), ("lora_E", E)):
            if hasattr(self, name):
                delattr(self, name)
            if len(E):
                self.register_parameter(name, nn.Parameter(value, requires_grad=trained))
            else:
                # Nothing is left to train, and optimizers dislike parameters without elements.
                self.register_buffer(name, value)

    def initialise(self, generator: torch.Generator) -> None:
        """Draws P and Q on the CPU, so that they do not depend on the device."""
        with torch.no_grad():
            for factor in (self.lora_A, self.lora_B):
                factor.copy_(0.02 * torch.randn(factor.shape, generator=generator))

    def low_rank(self) -> LowRank | None:
        """Q, P diag(E) in float32 or wider, and the scale."""
        wide = torch.promote_types(self.lora_B.dtype, torch.float32)
        return LowRank(self.lora_A, self.lora_B.to(wide) * self.lora_E.to(wide).t(), self.scale)

    def shift(self) -> Tensor | None:
        """None: the bias stays."""
        return None

    def update(self, x: Tensor, base_out: Tensor) -> Tensor:
        """Scale P diag(E) Q x in `base_out`'s dtype."""
        wide = torch.promote_types(self.lora_B.dtype, torch.float32)
        A, B = spread(self.lora_A), spread(self.lora_B).to(wide) * spread(self.lora_E).to(wide).mT
        dropped = F.dropout(x, self.dropout, training=self.training)
        return (linear(linear(dropped, A.to(x.dtype)), B.to(x.dtype)) * self.scale).to(base_out.dtype)

    def extra_loss(self) -> Tensor:
        """The site's share of the orthogonality term, its weight included."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        A, B = self.lora_A.to(wide), self.lora_B.to(wide)
        one = torch.eye(len(A), device=A.device, dtype=wide)
        total: Tensor = (A @ A.t() - one).norm() + (B.t() @ B - one).norm()
        return self.orth_weight * total

    def prune(self, keep: Tensor) -> None:
        """Leaves the triplets that `keep` (r,) says, in new parameters of that rank."""
        keep, trained = keep.to(self.lora_E.device), self.lora_E.requires_grad
        A, B, E = self.lora_A.detach()[keep], self.lora_B.detach()[:, keep].contiguous(), self.lora_E.detach()[keep]
        self._hold(A, B, E, trained=trained)

    def delta(self, rows: slice | None = None) -> Tensor | None:
        """Scale P diag(E) Q, in float32 or wider."""
        low = self.low_rank()
        assert low is not None
        A, B = low.A.detach(), low.B.detach()[rows or slice(None)]
        return (B @ A.to(B.dtype)).mul_(self.scale)

    def replacements(self) -> dict[str, Tensor]:
        """None of the module's parameters is replaced whole."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Q, P and E under PEFT's keys, which end without `.weight`."""
        return {f".{name}": getattr(self, name).detach() for name in ("lora_A", "lora_B", "lora_E")}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes the factors back."""
        with torch.no_grad():
            for name in ("lora_A", "lora_B", "lora_E"):
                getattr(self, name).copy_(tensors[f".{name}"])

    def described(self) -> dict[str, Any]:
        """The rank that is left, the one it began with, and the scale."""
        return {"r": len(self.lora_E), "init_r": self.init_r, "scale": self.scale}


def attach(model: nn.Module, config: AdaLoRA, start: Start) -> list[Placed]:
    """The factors of every site that the targets name, and what comes along with them."""
    sites = configured_sites(model, config)
    embedding = next((site.name for site in sites if site.kind == "embedding"), None)
    if embedding is not None:
        raise InputError(f"AdaLoRA does not adapt embeddings, and {embedding} is one: leave it out of target_modules")
    placed = []
    for site in sites:
        r = config.rank_of(site.name)
        part = AdaLoraPart(site, r=r, config=config, sites=len(sites), dtype=start.dtype)
        part.initialise(start.generator(site.name))
        placed.append(Placed(site.name, part))
    placed += companions(
        model,
        sites,
        bias=config.bias,
        modules_to_save=config.modules_to_save,
        trainable_tokens=config.trainable_tokens,
        dtype=start.dtype,
    )
    return placed


def param_count(config: AdaLoRA, kind: str, shape: tuple[int, int]) -> int:
    """N = init_r (in + out + 1), before any rank has fallen."""
    return config.init_r * (shape[0] + shape[1] + 1)
