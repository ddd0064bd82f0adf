"""Gradients by example for whatever plain operations make of a parameter.

`spread(p, x)` gives p once for each example of the batch, without copying it, and its backward pass hands what arrives,
which is then the gradient by example, to the sink in force. Whoever computes with p has to treat its new first axis as
the batch's; without a sink nothing changes and there is no such axis.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.core.contexts import GradSink, sink_context


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, rows: int, sink: GradSink) -> Tensor:  # type: ignore[override]
        ctx.parameter, ctx.sink = parameter, sink
        return parameter.expand(rows, *parameter.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        ctx.sink.feed(ctx.parameter, grad)
        return None, None, None


def spread(parameter: Tensor, rows: int | None = None) -> Tensor:
    """The parameter itself, or where gradients are asked for by example, (rows, *parameter.shape).

    Args:
        parameter: a leaf; one that wants no gradient is given back as it is.
        rows: entries of the first axis of what it is used with; None means the batch's examples.
    """
    context = sink_context()
    if context is None or not parameter.requires_grad or not torch.is_grad_enabled():
        return parameter
    assert context.sink is not None
    made: Tensor = _Spread.apply(parameter, context.rows if rows is None else rows, context.sink)
    return made


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """X W^T + bias with x (..., in) and W (out, in), or W (rows, out, in) with the batch's rows first in x."""
    if W.dim() == 2:
        out = F.linear(x, W)
    else:
        flat = _rows_first(x, len(W))
        out = torch.bmm(flat, W.mT).view(*x.shape[:-1], W.shape[1])
    return out if bias is None else out + along(bias, out, 1)


def along(values: Tensor, out: Tensor, axes: int) -> Tensor:
    """Values that belong to the last `axes` axes of `out`, with axes for what lies between them and the rows.

    Args:
        values: with `axes` axes, given back as it is, or with one more for the rows.
        out: whose shape they are to be broadcast to, rows first.
        axes: how many.
    """
    if values.dim() == axes:
        return values
    return values.view(len(values), *[1] * (out.dim() - axes - 1), *values.shape[1:])


def lookup(ids: Tensor, W: Tensor) -> Tensor:
    """Rows of W by number: ids (rows, ...) and W (n, d), or W (rows, n, d), to (rows, ..., d)."""
    if W.dim() == 2:
        return W[ids]
    first = torch.arange(len(W), device=ids.device).view(-1, *[1] * (ids.dim() - 1))
    return W[first, ids]


def _rows_first(x: Tensor, rows: int) -> Tensor:
    context = sink_context()
    apart = x if len(x) == rows or context is None else context.by_row(x)
    return apart.reshape(rows, -1, x.shape[-1])
