"""What a comparison may say of its numbers: means with spreads over seeds, and paired bootstrap intervals.

B. Efron and R. Tibshirani, "An Introduction to the Bootstrap" (1993), chapters 13 (percentile intervals) and 16;
for systems on one test set: P. Koehn, "Statistical Significance Tests for Machine Translation Evaluation" (2004).

The statistic is the mean over seeds s of d_s = m(A_s) - m(B_s), where a metric m is the ratio of two sums over test
rows (right answers over rows; twice the right entities over true and predicted ones; nats over tokens). Each resample
draws test rows with replacement, the same ones for both methods and, where the seeds share their rows, for all seeds;
and with two seeds or more it draws seeds with replacement, both methods' runs of a seed together.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltaw.core.errors import InputError

RESAMPLES = 10_000
#: Below so many seeds a spread over seeds is itself little known.
FEW_SEEDS = 5
_CHUNK = 500

Shares = Sequence[tuple[float, float]]


def summarized(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (absent for one value), number, and the values themselves."""
    found: dict[str, Any] = {"mean": statistics.fmean(values), "n": len(values), "values": list(values)}
    if len(values) > 1:
        found["sd"] = statistics.stdev(values)
    return found


def paired_bootstrap(
    own: Mapping[int, Shares],
    reference: Mapping[int, Shares],
    *,
    generator: torch.Generator,
    same_rows: bool,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """The difference of a metric between two methods, with a 95 % interval and a two-sided p.

    Args:
        own: seed to each test row's (numerator, denominator) of the metric.
        reference: the same of the method to compare with: the same seeds, row for row.
        generator: of the resamples.
        same_rows: every seed was measured on the same rows; else each seed's rows are drawn apart.
        resamples: how many.

    Returns:
        `difference`, `low`, `high` (the 2.5th and 97.5th percentiles), `p` (twice the smaller share of resamples on
        either side of 0, the observed sample counted in, at most 1), `seeds`, `rows` (a seed), `resamples`.

    Raises:
        InputError: different seeds or numbers of rows, or none.
    """
    seeds = sorted(own)
    if not seeds or seeds != sorted(reference):
        raise InputError(f"got seeds {seeds} and {sorted(reference)}: expected the same ones, at least one")
    counts = [len(own[seed]) for seed in seeds]
    if counts != [len(reference[seed]) for seed in seeds] or not all(counts) or (same_rows and len(set(counts)) > 1):
        raise InputError(f"got {counts} and {[len(reference[seed]) for seed in seeds]} rows: expected as many of each")
    pairs = [(_table(own[seed]), _table(reference[seed])) for seed in seeds]
    observed = statistics.fmean(float(_ratio(a.sum(0)) - _ratio(b.sum(0))) for a, b in pairs)
    drawn = []
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        times = _times(counts[0], size, generator) if same_rows else None
        differences = []
        for count, (a, b) in zip(counts, pairs, strict=True):
            chosen = times if times is not None else _times(count, size, generator)
            differences.append(_ratio(chosen @ a) - _ratio(chosen @ b))
        table = torch.stack(differences, 1)
        if len(seeds) > 1:
            picked = torch.randint(len(seeds), (size, len(seeds)), generator=generator)
            table = table.gather(1, picked)
        drawn.append(table.mean(1))
    found = torch.cat(drawn)
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=found.dtype)).tolist()
    # A ratio of sums taken in another order may miss 0 by a rounding error.
    near_zero = 1e-12
    below, above = int((found <= near_zero).sum()), int((found >= -near_zero).sum())
    p = min(1.0, 2 * (min(below, above) + 1) / (resamples + 1))
    return {
        "difference": observed,
        "low": low,
        "high": high,
        "p": p,
        "seeds": len(seeds),
        "rows": counts[0],
        "resamples": resamples,
    }


def _table(shares: Shares) -> Tensor:
    return torch.tensor([[above, below] for above, below in shares], dtype=torch.float64)


def _times(count: int, size: int, generator: torch.Generator) -> Tensor:
    """How often each of `count` rows is drawn, in each of `size` resamples: (size, count)."""
    drawn = torch.randint(count, (size, count), generator=generator)
    return torch.zeros(size, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(size, count, dtype=torch.float64)
    )


def _ratio(sums: Tensor) -> Tensor:
    """First over second; a ratio over nothing is 0, as in the metrics."""
    above, below = sums.unbind(-1)
    return torch.where(below > 0, above / below.clamp(min=1e-300), torch.zeros_like(above))
