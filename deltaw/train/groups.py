"""Which parameters are trained at which learning rate, and which decay."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from deltaw.methods.host import parts_of


def rate_ratios(model: nn.Module, adapter: str) -> dict[int, float]:
    """Learning rates over the run's, by the parameter's identity; {} where all have the run's own."""
    found: dict[int, float] = {}
    for _, _, part in parts_of(model, adapter):
        ratios = part.rate_ratios() if hasattr(part, "rate_ratios") else {}
        found |= {id(getattr(part, name)): ratio for name, ratio in ratios.items() if ratio != 1}
    return found


def parameter_groups(
    parameters: Mapping[str, nn.Parameter],
    ratios: Mapping[int, float],
    *,
    decayed: Collection[str],
    learning_rate: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """An optimizer's groups; the run's own rate comes first, since logs show that of the first.

    Args:
        parameters: what is trained, by name.
        ratios: as `rate_ratios` gives them.
        decayed: names of those that decay.
        learning_rate: the run's.
        weight_decay: of those that decay.
    """
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        found.setdefault((ratios.get(id(parameter), 1.0), name in decayed), []).append(parameter)
    in_order = sorted(found.items(), key=lambda item: (item[0][0] != 1, not item[0][1]))
    return [
        {"params": held, "weight_decay": weight_decay if decays else 0.0, "lr": learning_rate * ratio}
        for (ratio, decays), held in in_order
    ]
