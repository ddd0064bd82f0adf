"""Attention's graph without the tensors that it keeps: they wait in host memory, or are made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from deltaw.core.errors import RunError
from deltaw.fuse.host_memory import Held, HostMemory

#: Values from which on a tensor of attention's graph is worth moving.
LEAST_AWAY = 1024


class _Enter(torch.autograd.Function):
    """Where a graph begins that does not hold what it begins with."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        raise RunError("gradients are taken where the graph begins, not behind it")


class Away:
    """Attention's graph with what it keeps in host memory, but for q, k and v, which are made again.

    Attributes:
        held: what is there.
        begins: q, k and v, for the backward pass.
    """

    def __init__(self, host: HostMemory) -> None:
        self.host, self.held, self.begins = host, list[Held](), list[Tensor]()
        self._places: dict[int, tuple[int | Held, int]] = {}
        self._back: dict[Held, Tensor] = {}
        self._output: tuple[Any, ...] = ()

    def attend(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], *qkv: Tensor) -> dict[str, Any]:
        """Attention's output as (M, heads head_dim), and between which edges its graph lies."""
        self._places = {t.data_ptr(): (index, t.numel()) for index, t in enumerate(qkv)}
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            begins = _Enter.apply(qkv[0].new_empty((), requires_grad=True), *qkv)
            out = attend(*(t.transpose(1, 2) for t in begins))
        edges = [get_gradient_edge(t) for t in begins]
        a = out.detach().reshape(-1, out.shape[-2] * out.shape[-1])
        return {"edges": edges, "graph": get_gradient_edge(out), "a": a}

    def keep(self, a: Tensor) -> None:
        """Keeps the output too, mostly what the graph keeps anyway."""
        self._output = self._pack(a)
        self._places = {}

    def output(self) -> Tensor:
        """The output again."""
        return self._unpack(self._output)

    def _pack(self, t: Tensor) -> Any:
        where, count = self._places.get(t.data_ptr(), (None, 0))
        dense = t.numel() == 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        if count != t.numel() or where is None:
            if t.numel() < LEAST_AWAY or not dense:
                return t
            where = self.host.put(t.as_strided((t.numel(),), (1,)))
            self.held.append(where)
            self._places[t.data_ptr()] = where, t.numel()
        return where, t.shape, t.stride()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        where, shape, strides = packed
        if isinstance(where, Held) and where not in self._back:
            self._back[where] = self.host.take(where)
        values = self._back[where] if isinstance(where, Held) else self.begins[where]
        return values.as_strided(shape, strides)
