"""What is looked at before a reply counts. Pure functions: None where all is well, else the reason in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltaw.federated.messages import Message

#: What a reply must repeat of its request; `request` is drawn anew for each, so that a replayed reply is recognised.
ECHOED = ("run", "round", "attempt", "request")


def wrong_echo(reply: Message, request: Mapping[str, Any], client: str, kind: str) -> str | None:
    """Whether `reply` answers this request of this client, and not another one's."""
    for name in ECHOED:
        if reply.header.get(name) != request[name]:
            return f"stale or replayed: its {name} is {reply.header.get(name)!r}, expected {request[name]!r}"
    if reply.header.get("client") != client:
        return f"it says that it is from {reply.header.get('client')!r}"
    if reply.kind != kind:
        return f"a reply of kind {reply.kind!r}: expected {kind!r}"
    return None


def wrong_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Whether keys, shapes and dtypes are the expected ones; a reason for the first that is not."""
    for key in expected:
        if key not in tensors:
            return f"{key} is missing ({len(tensors)} tensors, expected {len(expected)})"
    for key, tensor in tensors.items():
        if key not in expected:
            return f"{key[:200]} is not asked for"
        if tensor.shape != expected[key].shape:
            return f"{key} has shape {tuple(tensor.shape)}: expected {tuple(expected[key].shape)}"
        if tensor.dtype != expected[key].dtype:
            return f"{key} has dtype {tensor.dtype}: expected {expected[key].dtype}"
    return None


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Whether a value is NaN or infinite."""
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            return f"{key} holds NaN or infinity"
    return None


def joint_norm(tensors: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all values together, in float64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def too_large(change: Mapping[str, Tensor], bound: float | None) -> str | None:
    """Whether an update's joint norm is above the run's bound."""
    if bound is not None and (norm := joint_norm(change)) > bound:
        return f"the update's norm is {norm:.4g}: at most {bound:g} is accepted"
    return None


def wrong_examples(value: Any) -> str | None:
    """Whether a weight by examples is a number of rows; a round's empty batches are no reason to refuse."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**40:
        return f"examples is {value!r}: expected a number of rows"
    return None


def numbers(found: Any) -> dict[str, float]:
    """Those entries of what a client told that are finite numbers under a short name; JSON has no others."""
    if not isinstance(found, Mapping):
        return {}
    return {
        str(key): value
        for key, value in list(found.items())[:200]
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and len(str(key)) < 100
    }
