"""Sums of adapters as one adapter folder, with the error against the exact sum."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from deltaw.checkpoint.adapters import WEIGHTS_FILE, adapter_folder
from deltaw.checkpoint.algebra import Fit, combined, in_all, read_stored, write_stored
from deltaw.studies.merged import new_folder


def combine(
    adapters: Sequence[tuple[str | os.PathLike[str], float]],
    output: str | os.PathLike[str],
    *,
    method: str | None = None,
    r: int | None = None,
    density: float | None = None,
    seed: int = 0,
    model: str | None = None,
) -> dict[str, Any]:
    """Adds, subtracts and scales adapters: a weighted sum of them as one plain LoRA adapter, without their base.

    Args:
        adapters: adapter folders or run folders, with the weight of each; negative weights subtract.
        output: the folder to write, in PEFT's layout: new, or empty.
        method: `cat` (exact: ranks add up), `svd` (the nearest of rank r), `linear`, `ties`, `dare_linear`,
            `dare_ties`, `magnitude_prune` (on the factors), or the last four with `_svd` (on the dense updates, cut to
            rank r); None means `svd` where r is given, else `cat`. `deltaw.checkpoint.algebra` says what each does.
        r: rank of `svd` and of `*_svd`; None means the highest of the adapters'.
        density: share of the entries to keep, in (0, 1], where entries are dropped.
        seed: of the draws of `dare_*`.
        model: the base to name in the configuration; None means what the adapters name.

    Returns:
        `method`, `adapters` (path, weight, sites, parameters, bytes), `output`, `output_bytes`, `parameters`, `r` (the
        highest), `relative_error` against the exact sum over all sites, and `sites`, each with its `r_before` (of the
        exact sum), `r`, `relative_error`.

    Raises:
        InputError: adapters that do not fit together, a wrong option, a folder that is not empty.
    """
    folder = new_folder(output)
    method = method or ("cat" if r is None else "svd")
    stored = [read_stored(path) for path, _ in adapters]
    weights = [float(weight) for _, weight in adapters]
    made, fits = combined(stored, weights, method=method, r=r, density=density, seed=seed, base_model=model)
    output_bytes = write_stored(made, folder)
    return {
        "method": method,
        "adapters": [
            {
                "path": one.path,
                "weight": weight,
                "sites": len(one.sites),
                "parameters": one.parameters,
                "bytes": stored_size(one.path),
            }
            for one, weight in zip(stored, weights, strict=True)
        ],
        "output": str(folder),
        "output_bytes": output_bytes,
        "parameters": made.parameters,
        "r": max(fit.r for fit in fits.values()),
        "relative_error": in_all(fits.values()),
        "sites": sites_record(fits),
    }


def stored_size(path: str | os.PathLike[str]) -> int:
    """Bytes of an adapter's tensors on the disk."""
    return (adapter_folder(path) / WEIGHTS_FILE).stat().st_size


def sites_record(fits: dict[str, Fit]) -> dict[str, dict[str, float]]:
    """Ranks and errors by site, as plain numbers."""
    return {
        path: {"r_before": fit.r_before, "r": fit.r, "relative_error": fit.relative_error} for path, fit in fits.items()
    }
