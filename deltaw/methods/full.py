"""Full fine-tuning, the baseline: every parameter of the model is trained, nothing is added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from deltaw.core.configs import accepts
from deltaw.core.errors import InputError
from deltaw.core.protocols import packed_of
from deltaw.methods.contract import Method, Placed, Start


@accepts()
@dataclass(frozen=True)
class Full:
    """Trains all of the model's own parameters. Has no options; the learning rate wants to be 1e-5 to 5e-5."""


def _attach(model: nn.Module, config: Full, start: Start) -> list[Placed]:
    if any(packed_of(parameter) is not None for parameter in model.parameters()):
        raise InputError("full fine-tuning trains the weights themselves, and these are held in 4 bits: use an adapter")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return []


def _param_count(config: Any, kind: str, shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


FULL = Method(
    name="full",
    config=Full,
    scope="model",
    attach=_attach,
    param_count=_param_count,
    trains_base=True,
    learning_rate=2e-5,
)
