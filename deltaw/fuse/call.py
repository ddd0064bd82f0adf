"""What a fused layer's forward pass is given: `block.py` says what it does with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltaw.fuse.group import Group
from deltaw.fuse.host_memory import HostMemory
from deltaw.fuse.keep import Keep
from deltaw.fuse.linears import Fused
from deltaw.fuse.store import Store


@dataclass(frozen=True)
class Norm:
    """A frozen RMS norm: its module, its epsilon, how its weight (d,) meets the values, whether it can be undone."""

    module: Any
    eps: float
    style: Any
    invertible: bool

    @property
    def weight(self) -> Tensor:
        """Read at every use, as a sharded module has it only then."""
        weight: Tensor = self.module.weight.detach()
        return weight


@dataclass
class Passed:
    """A layer's output normed for the next one, in the pass that made it.

    Attributes:
        of: the output, as long as it is there.
        version: of it.
        norm: that was computed.
        normed: (M, d and some room).
        rstd: its reciprocal norms.
    """

    of: weakref.ref[Tensor]
    version: int
    norm: Norm
    normed: Tensor
    rstd: Tensor


@dataclass
class Call:
    """A layer's forward pass: what it computes with.

    Attributes:
        head_dim: columns of a head.
        activation: of the gated MLP.
        norms: before attention and before the MLP.
        head_norms: of queries and keys, or None.
        linears: q, k, v, o, gate, up, down.
        cos, sin: (batch or 1, seq, rotated columns); None: no rotation.
        attend: (q, k, v), each (batch, heads, seq, head_dim), to (batch, seq, heads, head_dim), differentiable.
        keep: what stays for the backward pass.
        host: where "host" and "host-attention" put what they keep.
        fp8: names of the linears whose products with W are made in 8-bit floats, backward.
        fp8_forward: those of which forward too.
        store: what stays between calls.
        handed: the last gradient that a fused layer handed on, with the room behind it.
        index: of the layer.
        following: the norm that the next layer begins with, where that is fused too.
        passed: what the last layer made of its output for the next one.
    """

    head_dim: int
    activation: Any
    norms: tuple[Norm, Norm]
    head_norms: tuple[Norm, Norm] | None
    linears: dict[str, Fused]
    cos: Tensor | None
    sin: Tensor | None
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    keep: Keep = "all"
    host: HostMemory | None = None
    fp8: frozenset[str] = frozenset()
    fp8_forward: frozenset[str] = frozenset()
    store: Store = field(default_factory=Store)
    handed: list[Tensor] = field(default_factory=list)
    index: int = 0
    following: Norm | None = None
    passed: list[Passed] = field(default_factory=list)

    def group(self, names: str, dtype: torch.dtype) -> Group:
        """The group of some linears, by their names with blanks between."""
        parts = names.split()
        return Group(
            [self.linears[name] for name in parts],
            dtype,
            fp8=self.fp8.issuperset(parts),
            fp8_forward=self.fp8_forward.issuperset(parts),
            store=self.store,
            name=(self.index, names),
        )


QKV, OUT, GATE_UP, DOWN = GROUPS = "q k v", "o", "gate up", "down"
