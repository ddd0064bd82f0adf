"""The contract that methods share. There is no parent class: a method is whatever has these members.

A method turns a configuration into *parts*. A part is an `nn.Module` that sits on one module of the model and holds
the parameters of one adapter there: LoRA's factors, a trained bias, the rows of an embedding, a whole trained copy.
The host (`host.py`) adds up what the parts of the active adapters say; no part knows of another, nor of how the frozen
weight is stored.

What a part trains are its parameters; what it keeps and does not train (LoRA-FA's A) are buffers. Members that only
some parts have, found by `getattr`:

- `alone(x, base, bias) -> Tensor`: the output of a linear whose only active part this is, in one function.
- `prepare(module, args, kwargs) -> (args, kwargs)` and `conclude(out) -> out`, both or neither: change what the module
  is called with and what it gives, and add no update (prefixes, noise).
- `rate_ratios() -> {parameter's name in the part: factor}`: learning rates over the run's (LoRA+).
- `steady(on)` and `is_steady`: whether W and the part's tensors stay as they are until it is called again, so that what
  depends on them alone may be kept (DoRA's norms).
- `extra_loss() -> Tensor`: a term of the training loss, a number (AdaLoRA's orthogonality).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
class Start:
    """What new parts may start from.

    Attributes:
        generator: a site's path to its random generator.
        dtype: of new parameters; None means float32.
        batches: keyword arguments of forward passes over training rows, for starts made from activations; None: none.
        original: a site's path to its weight (out, in) as it was before it was quantised; None: not at hand.
    """

    generator: Callable[[str], torch.Generator]
    dtype: torch.dtype | None = None
    batches: Sequence[Mapping[str, Any]] | None = None
    original: Callable[[str], Tensor] | None = None


class Controller(Protocol):
    """Follows a training from outside the parts: AdaLoRA's budget."""

    def after_update(self, step: int) -> None:
        """Called after optimizer step number `step` (from 1), while the gradients are still there."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors, numbers, and lists and dicts of them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""

    def finish(self) -> None:
        """Called once training has ended, with the weights that are kept; raises `RunError` where it was in vain."""


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: what users type.
        config: its configuration's type.
        scope: what one part sees: a site, a block, or the whole model.
        attach: (model, config, start) to the parts, which the host installs.
        trains_base: the method trains the model's own parameters, so that there is nothing to switch, merge or unload.
        trains_nothing: the method only changes how others train: it stands beside adapters, full fine-tuning among
            them, is not one of them, and is neither merged nor saved.
        identity_at_start: the adapted model computes exactly what the base does until training moves it.
        param_count: trainable parameters that one site of shape (out, in) gets.
        to_peft: (configuration, model, the adapter's low-rank parts by path) to the fields of PEFT's
            `adapter_config.json`. The parts have the last word on ranks and scales.
        from_peft: those fields to a configuration; a field that cannot be honoured is an `InputError` naming it.
        peft_type: PEFT's name of the method; None where PEFT has none, or another method reads its files
            (`from_peft` may give another method's configuration).
        control: (model, adapter's name, optimizer steps in all) to what follows the training; None: nothing does.
        learning_rate: AdamW's where none is given.
        mergeable: whether the parts can be written into the weights.
        not_with: keys of a run that the method does not go with, which a run is refused for, to the reason.
    """

    name: str
    config: type
    scope: Scope
    attach: Callable[[nn.Module, Any, Start], list[Placed]]
    param_count: Callable[[Any, str, tuple[int, int]], int]
    to_peft: Callable[[Any, nn.Module, Mapping[str, Any]], dict[str, Any]] | None = None
    from_peft: Callable[[dict[str, Any]], Any] | None = None
    peft_type: str | None = None
    trains_base: bool = False
    trains_nothing: bool = False
    identity_at_start: bool = True
    control: Callable[[nn.Module, str, int], Controller] | None = None
    learning_rate: float = 2e-4
    mergeable: bool = True
    not_with: Mapping[str, str] = field(default_factory=dict)
