"""What a site cannot see of the pass it is part of: how a batch divides into examples, and who asks for gradients.

One context is in force at a time, for the whole process: autograd runs backward passes, and the forward passes that
checkpointing repeats in them, on threads of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from deltaw.core.errors import InputError


class GradSink(Protocol):
    """Takes gradients by example; a backward pass that feeds it gives autograd none for that parameter."""

    def feed(self, parameter: Tensor, gradients: Tensor) -> None:
        """A share of a parameter's gradient: (rows, *parameter.shape), one entry for each row of the batch."""


@dataclass(frozen=True)
class ForwardContext:
    """What holds during one forward pass and its backward pass.

    Attributes:
        rows: examples in the batch.
        positions: tokens of each, padding included.
        sink: who takes gradients by example; None: nobody.
    """

    rows: int
    positions: int
    sink: GradSink | None = None

    def by_row(self, x: Tensor) -> Tensor:
        """A module's input or output with one entry of the first axis for each example.

        Raises:
            InputError: a layout in which examples cannot be told apart (tokens routed to experts).
        """
        if x.dim() and len(x) == self.rows:
            return x
        if x.dim() and len(x) == self.rows * self.positions:
            return x.view(self.rows, self.positions, *x.shape[1:])
        raise InputError(
            f"a trained module sees a tensor {tuple(x.shape)}, of which {self.rows} examples of {self.positions} "
            "tokens cannot be told apart: leave that module out of what is trained under differential privacy"
        )


_current: list[ForwardContext] = []


def current() -> ForwardContext | None:
    """The context in force, if there is one."""
    return _current[-1] if _current else None


def sink_context() -> ForwardContext | None:
    """The context in force where somebody asks for gradients by example."""
    context = current()
    return context if context is not None and context.sink is not None else None


@contextlib.contextmanager
def in_context(context: ForwardContext) -> Iterator[None]:
    """Puts a context in force while the block lasts."""
    _current.append(context)
    try:
        yield
    finally:
        _current.pop()
