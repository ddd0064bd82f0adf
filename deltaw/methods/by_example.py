"""Gradients by example where a method trains whole modules: copies of them, or the model itself.

Parts compute with `kernels/per_example.py` themselves. A module that is trained as it is knows nothing of that, so
while a block lasts each one that holds trained parameters gets, on the instance, a `forward` that runs it under
`torch.vmap` with the parameters spread over the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.contexts import sink_context
from deltaw.core.errors import InputError
from deltaw.kernels.per_example import spread
from deltaw.methods.companions import ModuleCopy
from deltaw.methods.host import active_method, parts_of


@contextlib.contextmanager
def whole_modules_by_example(model: nn.Module, adapter: str) -> Iterator[None]:
    """Lets the modules that an adapter trains whole feed the sink in force, while the block lasts."""
    if active_method(model, adapter).trains_base:
        inside = list(model.modules())
    else:
        copies = [part.copy for _, _, part in parts_of(model, adapter) if isinstance(part, ModuleCopy)]
        inside = [module for copied in copies for module in copied.modules()]
    found = [module for module in dict.fromkeys(inside) if _trains(module) and "forward" not in module.__dict__]
    for module in found:
        module.__dict__["forward"] = MethodType(_forward, module)
    try:
        yield
    finally:
        for module in found:
            del module.__dict__["forward"]


def _trains(module: nn.Module) -> bool:
    return any(p is not None and p.requires_grad for p in module._parameters.values())


def _forward(self: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
    context = sink_context()
    if context is None or not torch.is_grad_enabled():
        return type(self).forward(self, x, *args, **kwargs)
    if args or kwargs or not isinstance(x, Tensor):
        raise InputError(
            f"{type(self).__name__} takes more than one tensor, so that its gradients by example are not known: "
            "leave it out of what is trained under differential privacy"
        )
    # What is the same for all rows (positions) comes once.
    rows_first = x.expand(context.rows, *x.shape[1:]) if len(x) == 1 else context.by_row(x)
    bare = _bare(self)
    trained = {name: p for name, p in self._parameters.items() if p is not None and p.requires_grad}

    def one(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(bare, parameters, (row.unsqueeze(0),))
        return out.squeeze(0)

    out = torch.vmap(one)({name: spread(p) for name, p in trained.items()}, rows_first)
    return out if rows_first.shape[: x.dim()] == x.shape or len(x) == 1 else out.flatten(0, 1)


def _bare(module: nn.Module) -> nn.Module:
    """The module with its class' own forward and without hooks; it shares buffers, not the dict of parameters."""
    made = type(module).__new__(type(module))
    nn.Module.__init__(made)
    made.__dict__.update({k: v for k, v in module.__dict__.items() if k != "forward" and not k.endswith("_hooks")})
    made.__dict__["_parameters"] = dict(module._parameters)
    return made
