"""The contract that methods share. There is no parent class: a method is whatever has these members.

A method turns a configuration into *parts*. A part is an `nn.Module` that sits on one module of the model and holds
the parameters of one adapter there: LoRA's factors, a trained bias, the rows of an embedding, a whole trained copy.
The host (`host.py`) adds up what the parts of the active adapters say; no part knows of another, nor of how the frozen
weight is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from deltaw.core.protocols import LowRank

Scope = Literal["site", "block", "model"]


@runtime_checkable
class Part(Protocol):
    """One adapter's share of one module. Always an `nn.Module` too.

    Attributes:
        replaces: True when the part is called in the module's place instead of adding to its output.
        dropout: probability of dropping an entry of the input of `low_rank`'s product in training.
    """

    replaces: bool
    dropout: float

    def low_rank(self) -> LowRank | None:
        """The update as factors of the module's (out, in) matrix, or None where it has no such form."""

    def shift(self) -> Tensor | None:
        """What the part adds to the module's bias: (out,), or None."""

    def update(self, x: Tensor, base_out: Tensor) -> Tensor:
        """What the part adds to the module's output, in its shape and dtype, given the module's input and output."""

    def delta(self, rows: slice | None = None) -> Tensor | None:
        """W' - W for rows of the (out, in) matrix, in float32 or wider; None where the part leaves the matrix."""

    def replacements(self) -> dict[str, Tensor]:
        """Parameters of the module that a merge replaces whole, by name; {} for a part that adds."""

    def tensors(self) -> dict[str, Tensor]:
        """What is saved: PEFT's key after the module's path, to the tensor. {} for a part tied to another."""

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes what `tensors` gave; keys and shapes have been checked."""

    def described(self) -> dict[str, Any]:
        """Rank, scale and their like, for summaries; shapes and parameter counts are the host's."""


@dataclass(frozen=True)
class Placed:
    """A part and the path of the module it sits on."""

    path: str
    part: nn.Module


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: what users type.
        config: its configuration's type.
        scope: what one part sees: a site, a block, or the whole model.
        attach: (model, config, generator for a path, dtype of new parameters) to the parts, which the host installs.
        trains_base: the method trains the model's own parameters, so that there is nothing to switch, merge or unload.
        identity_at_start: the adapted model computes exactly what the base does until training moves it.
        param_count: trainable parameters that one site of shape (out, in) gets.
        to_peft: (configuration, model, paths of the adapter's sites) to the fields of PEFT's `adapter_config.json`.
        from_peft: those fields to a configuration; a field that cannot be honoured is an `InputError` naming it.
        peft_type: PEFT's name of the method; None where PEFT has none, so that it cannot be written for it.
    """

    name: str
    config: type
    scope: Scope
    attach: Callable[[nn.Module, Any, Callable[[str], torch.Generator], torch.dtype | None], list[Placed]]
    param_count: Callable[[Any, str, tuple[int, int]], int]
    to_peft: Callable[[Any, nn.Module, list[str]], dict[str, Any]] | None = None
    from_peft: Callable[[dict[str, Any]], Any] | None = None
    peft_type: str | None = None
    trains_base: bool = False
    identity_at_start: bool = True
