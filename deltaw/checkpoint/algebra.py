"""Adapters as vectors: cutting their rank, and weighted sums of several, from adapter folders alone, without the base.

The exact sum of updates is sum_i w_i scale_i B_i A_i. `cat` stacks the factors and is exact; `svd` is its best rank-r
form. The others change what is summed: `linear` sums A and B apart; `ties` (Yadav et al., "TIES-Merging", arXiv
2306.01708) trims each summand to its largest entries, elects a sign for every entry and averages those that agree;
`dare_*` (Yu et al., "Language Models are Super Mario", arXiv 2311.03099) drops entries at random with probability
1 - density and divides the rest by density; `magnitude_prune` trims and sums. Under these names they work on A and B,
each with sqrt(|w scale|); with `_svd` after the name on the dense updates, whose sum is cut to rank r. All are as
PEFT's `add_weighted_adapter` defines them, down to electing signs before the weights are applied.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.checkpoint.adapters import CONFIG_FILE, PREFIX, WEIGHTS_FILE, adapter_folder, read_adapter
from deltaw.checkpoint.factored import (
    distance,
    norm,
    rank_for_energy,
    singular_values,
    stacked,
    truncated,
    truncated_matrix,
)
from deltaw.core.errors import InputError, unknown_name
from deltaw.core.files import as_os_error, atomic_folder, write_json
from deltaw.core.generators import generator
from deltaw.core.protocols import LowRank
from deltaw.methods.lora import LoRA
from deltaw.methods.lora_peft import as_measured, whole_number
from deltaw.models.targets import pattern_value

#: Ways to combine that work on the factors, and those that work on the dense updates.
FACTORWISE = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
DENSE = tuple(f"{name}_svd" for name in FACTORWISE[1:])
COMBINATIONS = ("cat", "svd", *FACTORWISE, *DENSE)

_FACTOR_KEYS = {False: (".lora_A.weight", ".lora_B.weight"), True: (".lora_embedding_A", ".lora_embedding_B")}
_BIAS_KEY = ".lora_B.bias"
#: Below this share of its summands' norms a sum counts as nothing, and errors are relative to the summands.
_NOTHING = 1e-9


@dataclass(frozen=True)
class Fit:
    """How near a written update is to the exact one.

    Attributes:
        r_before: rank of the exact update's factors; r: of what was written.
        distance: Frobenius norm of the difference; norm: of the exact update.
        size: sum of the norms of the exact update's summands.
    """

    r_before: int
    r: int
    distance: float
    norm: float
    size: float

    @property
    def relative_error(self) -> float:
        """Distance over norm; over the summands' norms where they cancel each other."""
        whole = self.norm if self.norm > _NOTHING * self.size else self.size
        return self.distance / whole if whole else 0.0


def in_all(fits: Iterable[Fit]) -> float:
    """The relative Frobenius error over all sites together, as if they were one matrix."""
    fits = list(fits)
    distance, norm, size = (math.hypot(*(getattr(fit, name) for fit in fits)) for name in ("distance", "norm", "size"))
    return Fit(0, 0, distance, norm, size).relative_error


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter folder holds, with a `LoRA` or `DoRA` configuration.

    Attributes:
        path: as it was named.
        fields: of `adapter_config.json`.
        config: read from them.
        sites: a module's path to its factors.
        embeddings: those of them that are embeddings.
        biases: a module's path to B's own bias.
        others: all other tensors by their key: trained biases, rows, copies of modules, magnitudes.
    """

    path: str
    fields: Mapping[str, Any]
    config: LoRA
    sites: Mapping[str, LowRank]
    embeddings: frozenset[str]
    biases: Mapping[str, Tensor]
    others: Mapping[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds all factors."""
        return functools.reduce(torch.promote_types, (t.dtype for low in self.sites.values() for t in (low.A, low.B)))

    @property
    def parameters(self) -> int:
        """Entries of the factors."""
        return sum(low.A.numel() + low.B.numel() for low in self.sites.values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under PEFT's keys."""
        found = dict(self.others)
        for path, low in self.sites.items():
            for key, tensor in zip(_FACTOR_KEYS[path in self.embeddings], (low.A, low.B), strict=True):
                found[f"{PREFIX}{path}{key}"] = tensor
        return found | {f"{PREFIX}{path}{_BIAS_KEY}": bias for path, bias in self.biases.items()}

    def with_sites(self, sites: Mapping[str, LowRank]) -> StoredAdapter:
        """The same adapter with other factors, and the configuration that says so."""
        config = as_measured(self.config, {path: (low.A.shape[0], low.scale) for path, low in sites.items()})
        fields = {
            **self.fields,
            "r": config.r,
            "lora_alpha": whole_number(config.alpha),
            "rank_pattern": dict(config.rank_pattern),
            "alpha_pattern": {pattern: whole_number(alpha) for pattern, alpha in config.alpha_pattern.items()},
        }
        return dataclasses.replace(self, fields=fields, config=config, sites=dict(sites))


def read_stored(path: str | os.PathLike[str]) -> StoredAdapter:
    """Reads the folder of a LoRA or DoRA adapter, or the one inside a run folder.

    Raises:
        InputError: no adapter, a damaged one, or one of a method whose factors are no plain A and B.
    """
    method, config, tensors = read_adapter(path)
    if not isinstance(config, LoRA):
        mend = "it has no A and B" if method.name != "adalora" else "convert it first (deltaw export RUN --to lora)"
        raise InputError(f"{path} is an adapter of {method.name}, not of LoRA or DoRA: {mend}")
    fields = json.loads((adapter_folder(path) / CONFIG_FILE).read_text(encoding="utf-8"))
    others, sites, biases, embeddings = dict(tensors), {}, {}, set()
    for embedding, (end_A, end_B) in _FACTOR_KEYS.items():
        for key in sorted(key for key in tensors if key.endswith(end_A)):
            site = key.removeprefix(PREFIX).removesuffix(end_A)
            A, B = others.pop(key), others.pop(key.removesuffix(end_A) + end_B, None)
            r = config.rank_of(site)
            if B is None or A.dim() != 2 or B.dim() != 2 or not A.shape[0] == B.shape[1] == r:
                got = "no B" if B is None else f"A {tuple(A.shape)} and B {tuple(B.shape)}"
                raise InputError(f"{path}: {site} has {got}: expected A ({r}, in) and B (out, {r}); copy it again")
            if not all(t.is_floating_point() and bool(torch.isfinite(t).all()) for t in (A, B)):
                raise InputError(f"{path}: the factors of {site} are no finite numbers: the adapter is broken")
            sites[site] = LowRank(A, B, config.scale_of(site))
            if embedding:
                embeddings.add(site)
            if (bias := others.pop(f"{PREFIX}{site}{_BIAS_KEY}", None)) is not None:
                biases[site] = bias
    if not sites:
        raise InputError(f"{path} holds no low-rank factors: expected tensors named lora_A and lora_B in it")
    return StoredAdapter(os.fspath(path), fields, config, sites, frozenset(embeddings), biases, others)


def write_stored(adapter: StoredAdapter, folder: str | os.PathLike[str]) -> int:
    """Writes an adapter in PEFT's layout, both files or none; gives the bytes of the tensors' file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_folder(folder, replaces=()) as temporary:
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in adapter.tensors().items()}
        try:
            save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:
            raise as_os_error(error) from error
        write_json(temporary / CONFIG_FILE, dict(adapter.fields))
    return (Path(folder) / WEIGHTS_FILE).stat().st_size


# Cutting ranks.


def cut(
    sites: Mapping[str, LowRank],
    *,
    r: int | None = None,
    energy: float | None = None,
    rank_pattern: Mapping[str, int] | None = None,
) -> tuple[dict[str, LowRank], dict[str, Fit]]:
    """Updates of lower rank, each the nearest of its rank; scales stay, so that alpha falls with the rank.

    Args:
        sites: a module's path to its factors; those whose rank does not fall are given back as they are.
        r: the highest rank.
        energy: instead, the share of each update's sum of squares to keep.
        rank_pattern: {name or regular expression: highest rank} for sites whose rank differs.

    Returns:
        The new factors, in the dtypes of the old, and how near they are as rounded to these.

    Raises:
        InputError: no rank or both, one below 1, an energy outside (0, 1], a pattern that names no site.
    """
    check_cut(list(sites), r, energy, rank_pattern)
    made, fits = {}, {}
    for path, low in sites.items():
        own = low.A.shape[0]
        wanted = int(pattern_value(dict(rank_pattern or {}), path, r or own))
        if energy is not None and not any(pattern_value({p: 1}, path, 0) for p in rank_pattern or ()):
            wanted = rank_for_energy(singular_values(low), energy)
        new = low if wanted >= own else _like(truncated(low, wanted, scale=low.scale), low)
        size = norm(low)
        made[path] = new
        fits[path] = Fit(own, new.A.shape[0], 0.0 if new is low else distance(new, low), size, size)
    return made, fits


def _like(new: LowRank, old: LowRank) -> LowRank:
    return LowRank(new.A.to(old.A), new.B.to(old.B), new.scale)


def check_cut(
    paths: Sequence[str], r: int | None, energy: float | None, rank_pattern: Mapping[str, int] | None
) -> None:
    """Raises what `cut` does for options that it cannot take."""
    if (r is None) == (energy is None) and (r is not None or not rank_pattern):
        got = "neither" if r is None else "both"
        raise InputError(
            f"which rank? got {got} of r (the highest rank) and energy (the share to keep, such as 0.99): give one"
        )
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"energy is {energy!r}: expected the share to keep, above 0 and at most 1")
    # The rules for ranks are those of the configuration.
    LoRA(r=1 if r is None else r, rank_pattern=dict(rank_pattern or {}))
    unused = [p for p in rank_pattern or () if not any(pattern_value({p: 1}, path, 0) for path in paths)]
    if unused:
        raise InputError(f"pattern {unused[0]!r} of rank_pattern names no site of the adapter")


# Combining.


def combined(
    adapters: Sequence[StoredAdapter],
    weights: Sequence[float],
    *,
    method: str = "cat",
    r: int | None = None,
    density: float | None = None,
    seed: int = 0,
    base_model: str | None = None,
) -> tuple[StoredAdapter, dict[str, Fit]]:
    """One plain LoRA adapter (scale 1) that stands for a weighted sum of several.

    Sites are those of all; one that an adapter lacks counts as zero there. What adapters bring along whole (biases,
    rows of embeddings, copies of modules) is summed likewise, which is exact where the weights of those that have it
    sum to 1, as the base's own values then cancel out.

    Args:
        adapters: plain LoRA adapters of one base; ranks and scales may differ.
        weights: one each; negative ones subtract.
        method: one of `COMBINATIONS`. Those on dense updates take a site at a time, measured at less than
            4 (n + 16) out in + 16 min(out, in)^2 bytes for n adapters.
        r: rank of `svd` and `*_svd`; None means the highest of the adapters'.
        density: share of the entries that TIES, DARE and magnitude pruning keep, in (0, 1].
        seed: of DARE's draws, with the site and the adapter's place.
        base_model: what `base_model_name_or_path` says; None means what the adapters say, which have to agree.

    Returns:
        The adapter, and how near each site is to the exact weighted sum.

    Raises:
        InputError: adapters that do not fit together, unequal ranks where factors are summed apart, a wrong option.
    """
    _check_options(adapters, weights, method, r, density)
    dtype = functools.reduce(torch.promote_types, (adapter.dtype for adapter in adapters))
    highest = max(low.A.shape[0] for adapter in adapters for low in adapter.sites.values())
    sites, fits, biases = {}, {}, {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.sites):
        having = [i for i, adapter in enumerate(adapters) if path in adapter.sites]
        lows, own = [adapters[i].sites[path] for i in having], [weights[i] for i in having]
        _check_site(path, [adapters[i] for i in having], method)
        exact = stacked(lows, own)

        def draws(kind: str, place: int, path: str = path, having: Sequence[int] = having) -> torch.Generator:
            return generator(seed, "dare", path, kind, having[place])

        made = _combined_site(exact, lows, own, method, r or highest, density or 1.0, draws)
        sites[path] = new = LowRank(made.A.to(dtype), made.B.to(dtype), 1.0)
        size = sum(abs(weight) * norm(low) for low, weight in zip(lows, own, strict=True))
        fits[path] = Fit(exact.A.shape[0], new.A.shape[0], distance(new, exact), norm(exact), size)
        if adapters[having[0]].config.lora_bias:
            scales = [weight * low.scale for low, weight in zip(lows, own, strict=True)]
            biases[path] = _weighted([adapters[i].biases[path] for i in having], scales)
    fields, config = _combined_fields(adapters, list(sites), base_model)
    embeddings = frozenset().union(*(adapter.embeddings for adapter in adapters))
    others = _combined_others(adapters, weights)
    start = StoredAdapter("", fields, config, {}, embeddings, biases, others)
    return start.with_sites(sites), fits


def _combined_site(
    exact: LowRank,
    lows: Sequence[LowRank],
    weights: Sequence[float],
    method: str,
    r: int,
    density: float,
    draws: Callable[[str, int], torch.Generator],
) -> LowRank:
    if method == "cat":
        return exact
    if method == "svd":
        return truncated(exact, r)
    if method in FACTORWISE:
        # A carries the sign: on both sides it would cancel out.
        roots = [math.sqrt(abs(weight * low.scale)) for low, weight in zip(lows, weights, strict=True)]
        signed = [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
        A = _merged([low.A for low in lows], signed, method, density, functools.partial(draws, "A"))
        return LowRank(A, _merged([low.B for low in lows], roots, method, density, functools.partial(draws, "B")), 1.0)
    # One after the other: only what is left of each after pruning is kept.
    deltas = ((low.B.float() @ low.A.float()) * low.scale for low in lows)
    kind = method.removesuffix("_svd")
    return truncated_matrix(_merged(deltas, weights, kind, density, functools.partial(draws, "delta")), r)


def _weighted(tensors: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    return functools.reduce(torch.add, (tensor * weight for tensor, weight in zip(tensors, weights, strict=True)))


def _merged(
    tensors: Iterable[Tensor],
    weights: Sequence[float],
    method: str,
    density: float,
    draw: Callable[[int], torch.Generator],
) -> Tensor:
    """Summands of one shape as one tensor in float32, pruned, weighted, and with `ties` averaged where signs agree."""
    if method.startswith("dare"):
        pruned = [dropped(tensor.float(), density, draw(place)) for place, tensor in enumerate(tensors)]
    elif method == "linear":
        pruned = [tensor.float() for tensor in tensors]
    else:
        pruned = [trimmed(tensor.float(), density) for tensor in tensors]
    if not method.endswith("ties"):
        return _weighted(pruned, weights)
    elected = torch.where(functools.reduce(torch.add, pruned) >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for tensor, weight in zip(pruned, weights, strict=True):
        agrees = tensor.sign() == elected
        total += tensor * weight * agrees
        count += agrees
    return total / count.clamp_min(1.0)


def trimmed(tensor: Tensor, density: float) -> Tensor:
    """Zeroes all but the int(density * count) entries of largest magnitude."""
    count = int(density * tensor.numel())
    if count >= tensor.numel():
        return tensor
    mask = torch.zeros_like(tensor).flatten()
    mask[tensor.abs().flatten().topk(count).indices] = 1
    return tensor * mask.view_as(tensor)


def dropped(tensor: Tensor, density: float, random: torch.Generator) -> Tensor:
    """Zeroes each entry with probability 1 - density and divides the others by density."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=random) / density


# What goes together.


def _check_options(
    adapters: Sequence[StoredAdapter],
    weights: Sequence[float],
    method: str,
    r: int | None,
    density: float | None,
) -> None:
    if method not in COMBINATIONS:
        raise unknown_name("way to combine", method, COMBINATIONS)
    if not adapters or len(weights) != len(adapters):
        raise InputError(f"got {len(adapters)} adapters and {len(weights)} weights: expected one weight each")
    if not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"weights are {', '.join(f'{weight:g}' for weight in weights)}: expected finite numbers")
    if r is not None and not method.endswith("svd"):
        raise InputError(f"{method} has no r of its own: leave r out, or take svd")
    if r is not None:
        LoRA(r=r)
    prunes = method not in ("cat", "svd", "linear")
    if prunes and (density is None or not 0 < density <= 1):
        got = "no density" if density is None else f"density is {density!r}"
        raise InputError(f"{got}: {method} needs the share of entries to keep, above 0 and at most 1")
    if not prunes and density is not None:
        raise InputError(f"{method} drops nothing: leave density out, or take ties, dare_ties or the like")
    dora = next((adapter for adapter in adapters if type(adapter.config) is not LoRA), None)
    if dora is not None:
        raise InputError(f"{dora.path} is a DoRA adapter, whose update is no sum: merge it into its base instead")


def _check_site(path: str, having: Sequence[StoredAdapter], method: str) -> None:
    shapes = [(adapter.sites[path].B.shape[0], adapter.sites[path].A.shape[1]) for adapter in having]
    other = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
    if other is not None or len({path in adapter.embeddings for adapter in having}) > 1:
        last = -1 if other is None else other
        raise InputError(
            f"{having[0].path} and {having[last].path} are of different bases: "
            f"{path} is {shapes[0]} in one and {shapes[last]} in the other"
        )
    ranks = [adapter.sites[path].A.shape[0] for adapter in having]
    if method in FACTORWISE and len(set(ranks)) > 1:
        raise InputError(
            f"{method} sums A and B apart and needs equal ranks, and {path} has {' and '.join(map(str, ranks))}: "
            "take cat or svd"
        )


#: Fields that choose the sites.
_CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def _combined_fields(
    adapters: Sequence[StoredAdapter], sites: Sequence[str], base_model: str | None
) -> tuple[dict[str, Any], LoRA]:
    bases = sorted({str(name) for adapter in adapters if (name := adapter.fields.get("base_model_name_or_path"))})
    if base_model is None and len(bases) > 1:
        raise InputError(f"the adapters name different bases ({', '.join(bases)}): name the one to write with --model")
    said: dict[str, list[Any]] = {
        "bias": [adapter.config.bias for adapter in adapters],
        "lora_bias": [adapter.config.lora_bias for adapter in adapters],
        "task_type": [kind for adapter in adapters if (kind := adapter.fields.get("task_type"))],
        "trainable_token_indices": [t for adapter in adapters if (t := adapter.fields.get("trainable_token_indices"))],
    }
    for field, values in said.items():
        other = next((value for value in values if value != values[0]), None)
        if other is not None:
            raise InputError(f"{field} is {values[0]!r} and {other!r} in the adapters: combine those of a kind")
    first = adapters[0]
    fields = {
        **first.fields,
        "base_model_name_or_path": base_model or (bases[0] if bases else None),
        "task_type": next(iter(said["task_type"]), None),
        "use_rslora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": any(adapter.fields.get("fan_in_fan_out") for adapter in adapters),
        "trainable_token_indices": next(iter(said["trainable_token_indices"]), None),
        "modules_to_save": sorted({m for adapter in adapters for m in adapter.fields.get("modules_to_save") or ()})
        or None,
    }
    if any(_chooses(adapter) != _chooses(first) for adapter in adapters):
        fields |= {**dict.fromkeys(_CHOICE), "target_modules": sorted(sites)}
    chosen = {"target_modules": fields["target_modules"], "rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return fields, dataclasses.replace(first.config, **chosen)


def _chooses(adapter: StoredAdapter) -> list[Any]:
    values = [adapter.fields.get(name) for name in _CHOICE]
    return [sorted(value) if isinstance(value, list) else value or None for value in values]


def _combined_others(adapters: Sequence[StoredAdapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sum of what is saved whole; base weights that PEFT writes along are kept once."""
    found: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for adapter in adapters for key in adapter.others):
        having = [i for i, adapter in enumerate(adapters) if key in adapter.others]
        tensors = [adapters[i].others[key] for i in having]
        same = all(t.shape == tensors[0].shape and torch.equal(t, tensors[0]) for t in tensors)
        total = math.fsum(weights[i] for i in having)
        trained = _is_trained(adapters[having[0]], key)
        if same and (math.isclose(total, 1.0) or not trained):
            found[key] = tensors[0]
            continue
        names = " and ".join(adapters[i].path for i in having)
        if not trained or any(t.shape != tensors[0].shape or not t.is_floating_point() for t in tensors):
            raise InputError(f"{key.removeprefix(PREFIX)} differs in {names}: combine adapters of a kind")
        if not math.isclose(total, 1.0):
            raise InputError(
                f"{names} train {key.removeprefix(PREFIX)} whole, which can only be combined where their weights sum "
                f"to 1, and they sum to {total:g}: choose others, or merge into the base with deltaw merge"
            )
        mixed = _weighted((t.double() for t in tensors), (weights[i] for i in having))
        found[key] = mixed.to(functools.reduce(torch.promote_types, (t.dtype for t in tensors)))
    return found


def _is_trained(adapter: StoredAdapter, key: str) -> bool:
    """Whether a key is more than a copy of the base's embeddings that PEFT wrote along."""
    module, _, parameter = key.removeprefix(PREFIX).rpartition(".")
    saved = adapter.fields.get("modules_to_save") or ()
    return parameter != "weight" or any(f".{name}." in f".{module}." for name in saved)
