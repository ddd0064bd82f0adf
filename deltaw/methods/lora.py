"""LoRA, rsLoRA, LoRA+ and LoRA-FA.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3:

    W' = W + (alpha / r) B A        W (out, in), A (r, in), B (out, r)

Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732, theorem 3.2 replaces
alpha / r by alpha / sqrt(r), which keeps the update's size when the rank grows. A starts uniform in
(-1/sqrt(in), 1/sqrt(in)) and B at zero, so W' = W at first; for an embedding, whose W is (dim, vocab), A (r, vocab)
starts at zero and B (dim, r) normal, so that a token's column alone learns from that token. `initial.py` has the other
starts.

Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354, section 4: B learns at a rate
`loraplus_lr_ratio` times A's, and so does B's own bias. An embedding's factors keep the run's rate, since there A is
the one that starts at zero, and the paper's argument is of linears.

Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", arXiv 2308.03303,
section 3: A stays as it was drawn, and of x only A x (r numbers a token) is kept for the backward pass. With PiSSA or
OLoRA, B A - B0 A0 is then (B - B0) A0: a plain LoRA of rank r whose A is theirs. Of an embedding B is the random factor
and stays.
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
from deltaw.kernels.per_example import along, linear, lookup, spread
from deltaw.methods.companions import companions, configured_sites
from deltaw.methods.contract import Placed, Start
from deltaw.methods.initial import (
    INITS,
    check_loftq,
    eva_directions,
    is_init,
    is_taken_from_base,
    starting_factors,
)
from deltaw.models.sites import Site
from deltaw.models.targets import pattern_value


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
        init: `"default"` (or True), `"gaussian"` (A normal with deviation 1/r, an embedding's factors as ever),
            `"pissa"` or `"pissa_niter_N"` (the weight's principal part, exact or by N rounds), `"olora"` (an
            orthonormal basis of it), `"loftq"` (what 4 bits lost) or `"eva"` (the directions of the inputs).
        eva_rho: with `"eva"`, how many times its rank a site may get when ranks are shared out; 1 leaves them.
        freeze_a: trains B alone (LoRA-FA), which keeps less for the backward pass; of an embedding, A alone.
        loraplus_lr_ratio: learning rate of B over that of A (LoRA+); an embedding's factors keep A's.
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
    eva_rho: float = 2.0
    freeze_a: bool = False
    loraplus_lr_ratio: float = 1.0

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
        if not is_init(self.init):
            problems.append(f"{spelling(self, 'init')} is {self.init!r}: expected {INITS}")
        if not _is_number(self.eva_rho) or self.eva_rho < 1:
            problems.append(f"eva_rho is {self.eva_rho!r}: expected a number of at least 1")
        if not isinstance(self.freeze_a, bool):
            problems.append(f"freeze_a is {self.freeze_a!r}: expected True or False")
        if not _is_number(self.loraplus_lr_ratio, above=0):
            problems.append(f"loraplus_lr_ratio is {self.loraplus_lr_ratio!r}: expected a number above 0")
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
    """The factors of one site's update scale B A: A (r, in), B (out, r).

    Where the start is taken from the base (`start_A`, `start_B` are then its factors), `lora_A` and `lora_B` are how
    far the trained factors are from it, and the update is of rank 2r; see `initial.py`.
    """

    replaces = False
    lora_A: Tensor
    lora_B: Tensor
    start_A: Tensor | None
    start_B: Tensor | None
    _module: Any

    def __init__(
        self,
        site: Site,
        *,
        r: int,
        scale: float,
        dropout: float,
        lora_bias: bool,
        dtype: torch.dtype | None,
        freeze_a: bool = False,
        rate_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        out_features, in_features = site.shape
        device, dtype = site.weight.device, dtype or torch.float32
        self.kind = site.kind
        self.scale = scale
        self.dropout = dropout
        self.rate_ratio = rate_ratio
        self.init: str | bool = "default"
        for name, shape in (("lora_A", (r, in_features)), ("lora_B", (out_features, r))):
            zeros = torch.zeros(shape, device=device, dtype=dtype)
            if freeze_a and name == self._random:
                self.register_buffer(name, zeros)
            else:
                self.register_parameter(name, nn.Parameter(zeros))
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        bias = torch.zeros(out_features, device=device, dtype=dtype)
        self.lora_bias = nn.Parameter(bias) if lora_bias else None
        object.__setattr__(self, "_module", site.module)

    @property
    def _random(self) -> str:
        """The factor that does not start at zero."""
        return "lora_B" if self.kind == "embedding" else "lora_A"

    def initialise(self, generator: torch.Generator, init: str | bool) -> None:
        """Draws the starting values on the CPU, so that they do not depend on the device."""
        random: Tensor = getattr(self, self._random)
        if self.kind == "embedding":
            values = torch.randn(random.shape, generator=generator)
        elif init == "gaussian":
            values = torch.randn(random.shape, generator=generator) / random.shape[0]
        else:
            bound = 1.0 / math.sqrt(random.shape[1])
            values = torch.empty(random.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            random.copy_(values)

    def start_from(self, init: str, A: Tensor, B: Tensor | None = None) -> None:
        """Takes starting values: A (r, in), B (out, r), or None for zero."""
        self.init = init
        if is_taken_from_base(init) and all(isinstance(own, nn.Parameter) for own in (self.lora_A, self.lora_B)):
            assert B is not None
            self.start_A, self.start_B = A.to(self.lora_A).contiguous(), B.to(self.lora_B).contiguous()
            return
        with torch.no_grad():
            for name, values in (("lora_A", A), ("lora_B", B)):
                # With one factor held at its start, what counts from there is the other's way from zero.
                if values is not None and (not is_taken_from_base(init) or name == self._random):
                    getattr(self, name).copy_(values)

    def train_as(self, *, freeze_a: bool, rate_ratio: float) -> None:
        """Takes up how it is trained, which no file says: the options of the constructor."""
        self.rate_ratio = rate_ratio
        if freeze_a and isinstance(held := getattr(self, self._random), nn.Parameter):
            delattr(self, self._random)
            self.register_buffer(self._random, held.detach())

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of the update; of twice the rank where the start is taken from the base."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.start_A, self.lora_A]), torch.cat([self.lora_B, self.start_B + self.lora_B], dim=1)

    def low_rank(self) -> LowRank | None:
        """A, B and the scale."""
        return LowRank(*self.factors(), self.scale)

    def shift(self) -> Tensor | None:
        """The constant that the branch adds to every output: scale times B's own bias, (out,)."""
        if self.lora_bias is None:
            return None
        return self.lora_bias.to(torch.promote_types(self.lora_bias.dtype, torch.float32)) * self.scale

    def update(self, x: Tensor, base_out: Tensor) -> Tensor:
        """Scale B A x in `base_out`'s dtype; for an embedding x holds token ids."""
        dtype, A, B = base_out.dtype, spread(self.lora_A), spread(self.lora_B)
        if self.kind == "embedding":
            return self._embedded(x, A, B, dtype)
        dropped = F.dropout(x, self.dropout, training=self.training)
        if self.start_A is None or self.start_B is None or (A is self.lora_A and B is self.lora_B):
            A, B = (A, B) if self.start_A is None else self.factors()
            out = linear(linear(dropped, A.to(x.dtype)), B.to(x.dtype))
        else:
            # The same sum with the start apart from what is spread over the batch.
            h = linear(dropped, A.to(x.dtype))
            at_start = F.linear(dropped, self.start_A.to(x.dtype))
            out = linear(h + at_start, B.to(x.dtype)) + F.linear(h, self.start_B.to(x.dtype))
        if self.lora_bias is not None:
            out = out + along(spread(self.lora_bias).to(x.dtype), out, 1)
        return (out * self.scale).to(dtype)

    def _embedded(self, ids: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
        padding: int | None = self._module.padding_idx
        if self.start_A is None or self.start_B is None or (A is self.lora_A and B is self.lora_B):
            A, B = (A, B) if self.start_A is None else self.factors()
            out = linear(_looked_up(ids, A.mT, padding).to(dtype), B.to(dtype)) * self.scale
        else:
            rows = _looked_up(ids, A.mT, padding).to(dtype)
            at_start = _looked_up(ids, self.start_A.mT, padding).to(dtype)
            out = (linear(rows + at_start, B.to(dtype)) + F.linear(rows, self.start_B.to(dtype))) * self.scale
        embed_scale = getattr(self._module, "embed_scale", None)
        return out if embed_scale is None else out * torch.as_tensor(embed_scale, dtype=dtype, device=out.device)

    def delta(self, rows: slice | None = None) -> Tensor | None:
        """Scale B A, in float32 or wider."""
        A, B = (factor.detach() for factor in self.factors())
        B = B[rows or slice(None)]
        wide = torch.promote_types(A.dtype, torch.float32)
        return (B.to(wide) @ A.to(wide)).mul_(self.scale)

    def replacements(self) -> dict[str, Tensor]:
        """None of the module's parameters is replaced whole."""
        return {}

    @property
    def _factor_keys(self) -> tuple[str, str]:
        if self.kind == "embedding":
            return ".lora_embedding_A", ".lora_embedding_B"
        return ".lora_A.weight", ".lora_B.weight"

    def _keys(self) -> dict[str, Tensor]:
        keys = dict(zip(self._factor_keys, (self.lora_A, self.lora_B), strict=True))
        if self.lora_bias is not None:
            keys[".lora_B.bias"] = self.lora_bias
        return keys

    def tensors(self) -> dict[str, Tensor]:
        """The factors under PEFT's keys."""
        own = self._keys() | dict(zip(self._factor_keys, self.factors(), strict=True))
        return {key: tensor.detach() for key, tensor in own.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes the factors back."""
        A, B = (tensors[key] for key in self._factor_keys)
        if self.start_A is not None and self.start_B is not None:
            half = len(self.start_A)
            (start_A, A), (B, whole_B) = A.split(half), B.split(half, dim=1)
            self.start_A.copy_(start_A)
            # What made the sum, to the last bit, where this start is the one that it was saved with.
            if not torch.equal(self.start_B + B.to(self.start_B), whole_B.to(self.start_B)):
                self.start_B.copy_(whole_B.to(self.start_B) - B.to(self.start_B))
        given = tensors | dict(zip(self._factor_keys, (A, B), strict=True))
        with torch.no_grad():
            for key, own in self._keys().items():
                own.copy_(given[key])

    def rate_ratios(self) -> dict[str, float]:
        """LoRA+: B's learning rate over the run's."""
        names = [] if self.kind == "embedding" else ["lora_B"] if self.lora_bias is None else ["lora_B", "lora_bias"]
        return dict.fromkeys(names, self.rate_ratio)

    def described(self) -> dict[str, Any]:
        """Rank and scale, and where it started, if not at random."""
        start = {} if self.init == "default" else {"init": self.init}
        return {"r": self.lora_A.shape[0], "scale": self.scale, **start}


def _looked_up(ids: Tensor, W: Tensor, padding: int | None) -> Tensor:
    """Rows of W (n, d), or (batch, n, d), by number; those of padding pass no gradient on."""
    if W.dim() == 2:
        return F.embedding(ids, W, padding_idx=padding)
    found = lookup(ids, W)
    return found if padding is None else torch.where((ids == padding).unsqueeze(-1), found.detach(), found)


def attach(model: nn.Module, config: LoRA, start: Start) -> list[Placed]:
    """The factors of every site that the targets name, and what comes along with them."""
    return attach_parts(model, config, start, LoraPart)


def attach_parts(model: nn.Module, config: LoRA, start: Start, part_type: type[LoraPart]) -> list[Placed]:
    """`attach` for LoRA and what is a LoRA with more to it."""
    sites = configured_sites(model, config)
    if config.init == "loftq":
        check_loftq(sites, start)
    directions = None
    if config.init == "eva":
        ranks = {site.name: config.rank_of(site.name) for site in sites}
        directions = eva_directions(model, sites, ranks, rho=config.eva_rho, batches=start.batches)
    placed = []
    for site in sites:
        part = _part(site, config, start, None if directions is None else directions[site.name], part_type)
        if part is not None:
            placed.append(Placed(site.name, part))
    adapted = {item.path for item in placed}
    placed += companions(
        model,
        [site for site in sites if site.name in adapted],
        bias=config.bias,
        modules_to_save=config.modules_to_save,
        trainable_tokens=config.trainable_tokens,
        dtype=start.dtype,
    )
    return placed


def _part(
    site: Site, config: LoRA, start: Start, directions: Tensor | None, part_type: type[LoraPart]
) -> LoraPart | None:
    """The part of one site at its start; None where EVA (`directions` for A) has left it no rank."""
    if config.lora_bias and site.kind == "embedding":
        raise InputError(f"lora_bias: {site.name} is an embedding, which has no bias; leave it out of the targets")
    r, scale = config.rank_of(site.name), config.scale_of(site.name)
    if directions is not None:
        # Alpha goes with the rank, as in PEFT: the scale stays, and rsLoRA's grows with the rank's root.
        scale *= math.sqrt(len(directions) / r) if config.rslora else 1
        r = len(directions)
        if not r:
            return None
    part = part_type(
        site,
        r=r,
        scale=scale,
        dropout=config.dropout,
        lora_bias=config.lora_bias,
        dtype=start.dtype,
        freeze_a=config.freeze_a,
        rate_ratio=config.loraplus_lr_ratio,
    )
    factors = starting_factors(config.init, site, r, scale, start) if directions is None else (directions, None)
    if factors is None:
        part.initialise(start.generator(site.name), config.init)
    else:
        part.start_from(str(config.init), *factors)
    return part


def param_count(config: LoRA, kind: str, shape: tuple[int, int]) -> int:
    """N = r (in + out), and out more where B has a bias; without A, or an embedding's B, where that is frozen."""
    bias = shape[0] if config.lora_bias else 0
    frozen = 0 if not config.freeze_a else shape[0] if kind == "embedding" else shape[1]
    return config.r * (sum(shape) - frozen) + bias
