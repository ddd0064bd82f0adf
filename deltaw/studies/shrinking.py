"""Which rank: what guides advise, what the singular values of a trained adapter say, and cutting it to that."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltaw.checkpoint.adapters import adapter_folder
from deltaw.checkpoint.algebra import Fit, check_cut, cut, in_all, read_stored, write_stored
from deltaw.checkpoint.factored import (
    effective_rank,
    energy_kept,
    rank_for_energy,
    singular_values,
    stable_rank,
)
from deltaw.checkpoint.model_files import model_facts
from deltaw.core.errors import InputError, unknown_name
from deltaw.core.protocols import LowRank
from deltaw.methods.convert import to_lora
from deltaw.methods.host import active_method, adapter_names, book_of, parts_of
from deltaw.methods.lora import LoraPart
from deltaw.methods.lora_peft import as_measured
from deltaw.models.sources import resolve
from deltaw.studies.combining import sites_record, stored_size
from deltaw.studies.merged import new_folder
from deltaw.studies.rows import run_rows
from deltaw.studies.ship import check_unchanged, open_run, run_of_adapter

Say = Callable[[str], None]

# Cutting ranks.


@dataclass(frozen=True)
class ShrinkReport:
    """What became of an adapter's ranks. For DoRA the errors are those of the change of direction, scale B A.

    Attributes:
        sites: a module's path to `r_before`, `r`, and the error (`distance`, `norm`, `relative_error`).
    """

    sites: dict[str, Fit]

    @property
    def relative_error(self) -> float:
        """The Frobenius error over the update's norm, over all sites as if they were one matrix."""
        return in_all(self.sites.values())


def shrink(
    model: nn.Module,
    name: str | None = None,
    *,
    r: int | None = None,
    energy: float | None = None,
    rank_pattern: Mapping[str, int] | None = None,
) -> ShrinkReport:
    """Cuts the rank of an adapter on a model, in place: each site's update becomes the nearest one of lower rank.

    The factors become smaller parameters of the same scale (alpha falls with the rank), with the singular values' roots
    on both sides; an optimizer made before holds the old ones. Trained biases, modules and DoRA's magnitudes stay. An
    AdaLoRA becomes a LoRA first.

    Args:
        model: an adapted model.
        name: the adapter; None means the only one.
        r: the highest rank.
        energy: instead, the share of each update's sum of squares to keep: every site gets a rank of its own.
        rank_pattern: {name or regular expression: highest rank} for sites whose rank differs.

    Returns:
        The ranks and the errors.

    Raises:
        InputError: no such adapter, one without low-rank updates, a merged model, a wrong rank or energy.
    """
    names = adapter_names(model)
    if name is None and len(names) == 1:
        (name,) = names
    if name not in names:
        raise InputError(f"which adapter? got {name!r}, and the model has {', '.join(names) or 'none'}")
    assert name is not None
    if book_of(model).merged is not None:
        raise InputError("the model holds a merged adapter: call dw.unmerge(model) first")
    parts = _low_rank_parts(model, name)
    if not parts:
        raise InputError(f"{name!r} is {active_method(model, name).name}, without low-rank updates: nothing to shrink")
    check_cut(list(parts), r, energy, rank_pattern)
    if not all(isinstance(part, LoraPart) for part in parts.values()):
        parts = _low_rank_parts(to_lora(model, name), name)
    sites = {}
    for path, part in parts.items():
        A, B = part.factors()
        sites[path] = LowRank(A.detach(), B.detach(), part.scale)
    made, fits = cut(sites, r=r, energy=energy, rank_pattern=rank_pattern)
    for path, low in made.items():
        if low is not sites[path] or parts[path].start_A is not None:
            _replace(parts[path], low)
    book = book_of(model)
    measured = {path: (low.A.shape[0], low.scale) for path, low in made.items()}
    book.configs[name] = as_measured(book.configs[name], measured)
    return ShrinkReport(fits)


def _low_rank_parts(model: nn.Module, name: str) -> dict[str, Any]:
    return {path: part for path, _, part in parts_of(model, name) if part.low_rank() is not None}


def _replace(part: Any, low: LowRank) -> None:
    for key, value in (("lora_A", low.A), ("lora_B", low.B)):
        old = getattr(part, key)
        setattr(part, key, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)
    # A start taken from the base is in the factors now.
    part.start_A = part.start_B = None
    if hasattr(part, "steady"):
        part.steady(False)


def shrink_adapter(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    r: int | None = None,
    energy: float | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    measure: bool = False,
    changes: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Writes an adapter of lower rank as a folder in PEFT's layout; the base is needed only to measure.

    Args:
        source: an adapter folder or a run folder.
        output: the folder to write: new, or empty.
        r: the highest rank.
        energy: instead, the share of each update's sum of squares to keep.
        rank_pattern: {name or regular expression: highest rank} for sites whose rank differs.
        measure: measure the adapter before and after on the run's held-out rows.
        changes: keys that override the run's configuration for that (`model`, `device`).
        say: takes lines of progress.

    Returns:
        `adapter`, `method`, `output`, `r_before`, `r` (the highest), `parameters_before`, `parameters`, `bytes_before`,
        `bytes`, `relative_error` over all sites, `sites`, and `metrics` (`before`, `after`) where measured.

    Raises:
        InputError: no adapter, or one whose factors are no plain A and B; a wrong rank or energy; a folder that is not
            empty; nothing to measure on.
    """
    folder = new_folder(output)
    run = _measurable(source, changes) if measure else None
    stored = read_stored(source)
    sites, fits = cut(stored.sites, r=r, energy=energy, rank_pattern=rank_pattern)
    made = stored.with_sites(sites)
    written = write_stored(made, folder)
    done: dict[str, Any] = {
        "adapter": os.fspath(source),
        "method": type(stored.config).__name__.lower(),
        "output": str(folder),
        "r_before": max(fit.r_before for fit in fits.values()),
        "r": max(fit.r for fit in fits.values()),
        "parameters_before": stored.parameters,
        "parameters": made.parameters,
        "bytes_before": stored_size(source),
        "bytes": written,
        "relative_error": in_all(fits.values()),
        "sites": sites_record(fits),
    }
    if run is not None:
        done["metrics"] = run({"before": adapter_folder(source), "after": folder}, say)
    return done


def _measurable(source: str | os.PathLike[str], changes: Mapping[str, Any] | None) -> Callable[..., dict[str, Any]]:
    """What measures adapters on the held-out rows of a run; all that can be wrong with them is found here."""
    from deltaw.checkpoint import load_adapter, load_tokenizer
    from deltaw.methods import set_adapter
    from deltaw.studies.job import evaluator_for, load_job_model, resolved

    where = run_of_adapter(source)
    if where is None:
        raise InputError(f"{source} is no run folder, so there are no held-out rows to measure on: leave out --measure")
    run = open_run(where, changes)
    config = dataclasses.replace(run.config, labels=run.labels, early_stopping=0)
    facts = model_facts(config.model)
    check_unchanged(run)
    rows = run_rows(config, generative=facts.generative)
    if rows.test is None:
        raise InputError(f"the run at {where} held no rows out: leave out --measure")
    test = rows.test
    config = resolved(config, dataclasses.replace(rows, train=test), facts)

    def measured(adapters: Mapping[str, Any], say: Say) -> dict[str, Any]:
        model = load_job_model(config, rows)
        for name, path in adapters.items():
            load_adapter(model, path, name=name, active=False)
        tokenizer = load_tokenizer(config.model)
        evaluator = evaluator_for(config, rows, test, tokenizer, encoder_decoder=model.config.is_encoder_decoder)
        metrics = {}
        for name in adapters:
            say(f"measuring the adapter {name} on {len(test.rows):,} held-out rows")
            set_adapter(model, name)
            found = evaluator(model).metrics
            metrics[name] = {key: value for key, value in found.items() if math.isfinite(value)}
        return metrics

    return measured


# Advice before training.

#: What guides to LoRA commonly advise: (what for, task, lowest r, highest r).
HEURISTICS = (
    ("light tasks (classification, extraction), below 7B", "light", 4, 8),
    ("instruction tuning, up to 30B", "instruct", 8, 16),
    ("reasoning, or 70B and more", "reasoning", 16, 64),
)
TASKS = tuple(task for _, task, _, _ in HEURISTICS)


def rank_heuristics(*, parameters: int | None = None, task: str | None = None) -> list[dict[str, Any]]:
    """The ranks that guides advise, as a table of rows.

    A size between two rows takes the higher one. Sizes count in whole billions, as models are called.

    Args:
        parameters: of the base model; None: any.
        task: `light`, `instruct` or `reasoning`; None: any.

    Returns:
        Rows of `for`, `task`, `r_low`, `r_high`, and `fits`: whether the row is the one for this model and task, or
        could be where one of them is not given.
    """
    if task is not None and task not in TASKS:
        raise unknown_name("task", task, TASKS)
    billions = None if parameters is None else round(parameters / 1e9)
    wanted = set()
    for asked in TASKS if task is None else (task,):
        for size in (1, 20, 70) if billions is None else (billions,):
            lowest = 0 if size < 7 else 1 if size <= 30 else 2
            wanted.add(max(lowest, TASKS.index(asked)))
    return [
        {"for": what, "task": own, "r_low": low, "r_high": high, "fits": place in wanted}
        for place, (what, own, low, high) in enumerate(HEURISTICS)
    ]


def parameter_count(source: str | os.PathLike[str]) -> int:
    """A model's parameters, from its configuration alone; tied ones count once.

    Raises:
        InputError: no such model.
    """
    import transformers

    model_facts(source)
    config = transformers.AutoConfig.from_pretrained(resolve(source).path_or_id, trust_remote_code=False)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config) if named is None else named(config)
    return sum(parameter.numel() for parameter in model.parameters())


# Advice after training.


def rank_advice(source: str | os.PathLike[str], *, energy: float = 0.99) -> dict[str, Any]:
    """What the singular values of a trained adapter's updates say about the rank it needed.

    Args:
        source: an adapter folder or a run folder.
        energy: the share of the sum of squares to keep.

    Returns:
        `sites`: for each its `r`, `norm`, `effective_rank` (exp of the entropy of the energy's shares), `stable_rank`,
        `energy_half` and `energy_quarter` (kept at r/2 and r/4), `r_needed` (keeps `energy` there); `r` (the highest),
        `r_recommended`, the lowest that keeps `energy` of all sites together, `parameters` and those at that rank and
        with ranks by site; `fills_rank`: the updates spread over all their directions, so that more might be used.

    Raises:
        InputError: no adapter, or one whose factors are no plain A and B.
    """
    if not 0 < energy <= 1:
        raise InputError(f"energy is {energy!r}: expected the share to keep, above 0 and at most 1")
    stored = read_stored(source)
    values = {path: singular_values(low) for path, low in stored.sites.items()}
    sites = {}
    for path, s in values.items():
        own = stored.sites[path].A.shape[0]
        sites[path] = {
            "r": own,
            "norm": float(s.norm()),
            "effective_rank": effective_rank(s),
            "stable_rank": stable_rank(s),
            "energy_half": energy_kept(s, max(1, own // 2)),
            "energy_quarter": energy_kept(s, max(1, own // 4)),
            "r_needed": rank_for_energy(s, energy),
        }
    highest = max(int(site["r"]) for site in sites.values())
    # All sites' first squares, second squares, ... summed: cutting all to one rank keeps the first ones' sum.
    pooled = torch.zeros(highest, dtype=torch.float64)
    for s in values.values():
        pooled[: len(s)] += s.square()
    recommended = rank_for_energy(pooled.sqrt(), energy)
    widths = {path: low.A.shape[1] + low.B.shape[0] for path, low in stored.sites.items()}
    trained = [site["effective_rank"] / site["r"] for site in sites.values() if site["norm"] > 0]
    return {
        "adapter": os.fspath(source),
        "energy": energy,
        "sites": sites,
        "r": highest,
        "r_recommended": recommended,
        "energy_at_recommended": energy_kept(pooled.sqrt(), recommended),
        "parameters": stored.parameters,
        "parameters_at_recommended": sum(
            width * min(recommended, int(sites[path]["r"])) for path, width in widths.items()
        ),
        "parameters_by_site": sum(width * int(sites[path]["r_needed"]) for path, width in widths.items()),
        "fills_rank": recommended == highest and bool(trained) and statistics.fmean(trained) > 0.75,
    }
