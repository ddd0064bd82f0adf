"""What stays between passes of fused layers: weights as products take them, and the matrices that they are parts of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.fuse.directions import Directions
from deltaw.fuse.narrow import Narrow
from deltaw.fuse.thin import Factors
from deltaw.kernels.memory import with_room

#: Columns of low-rank factors are padded to multiples of this: kernels then know that rows begin at whole vectors.
ALIGNED = 16


@dataclass
class Store:
    """What the groups of a model keep between calls, each by its name.

    Attributes:
        joined: dense weights as parts of one matrix with room for the factors, by `join`.
        decoded: the same of weights in 4 bits, where what was decoded stays, with the weights that it was made of.
        holds: layers (the first of a name) of which it may.
        bridged: what was decoded for a backward pass, until the next forward pass takes it.
        bridges: layers of which that may stay: of the first ones, when what all layers kept is not there.
        factors: those of all groups.
        narrow: weights in 8 bits, with those that they were made of; None: they are made at every use.
        directions: of groups with 8-bit products forward, those of their input, once they have been learned.
        turn: optimizer steps that were made.
    """

    joined: dict[Any, Tensor] = field(default_factory=dict)
    decoded: dict[Any, tuple[Tensor, list[Any]]] = field(default_factory=dict)
    holds: range = range(0)
    bridged: dict[Any, tuple[Tensor, list[Any]]] = field(default_factory=dict)
    bridges: range = range(0)
    factors: Factors = field(default_factory=Factors)
    narrow: dict[Any, tuple[Narrow, list[Any]]] | None = None
    directions: dict[Any, Directions] = field(default_factory=dict)
    turn: int = 0

    @property
    def held_bytes(self) -> int:
        """Of what `hold` lets stay."""
        narrow = [t for made, _ in (self.narrow or {}).values() for t in made if t is not None]
        decoded = [whole for kept in (self.decoded, self.bridged) for whole, _ in kept.values()]
        return sum(t.untyped_storage().nbytes() for t in (*narrow, *decoded))

    def hold(self, count: int, layers: int, *, narrow: bool, bridged: int = 0) -> None:
        """Lets decoded weights of the last `count` of the layers stay; with 8-bit ones, of all or of none.

        Those of the first `bridged` stay from their backward pass to their next forward pass.
        """
        if narrow:
            count = count if count >= layers else 0
            self.narrow = None if not count else {} if self.narrow is None else self.narrow
        self.holds = range(max(0, layers - count), layers)
        self.factors.forget([name for name in self.decoded if name[0] not in self.holds])
        self.decoded = {name: kept for name, kept in self.decoded.items() if name[0] in self.holds}
        self.bridges = range(min(bridged, self.holds.start))
        self.bridged = {name: kept for name, kept in self.bridged.items() if name[0] in self.bridges}


def join(weights: Sequence[nn.Parameter], ranks: int) -> Tensor | None:
    """Makes dense weights (out_i, in) parts of one matrix (sum of out + P, in + P), P the padded sum of ranks.

    Their values stay what they are. None, and nothing is done, for weights that are no plain, unshared parameters.
    """
    first = weights[0]
    for weight in weights:
        plain = type(weight) is nn.Parameter and weight.dim() == 2 and weight.is_contiguous()
        if not plain or (weight.dtype, weight.device, weight.shape[1]) != (first.dtype, first.device, first.shape[1]):
            return None
        if weight.untyped_storage().nbytes() != weight.nbytes:
            return None
    room = padded(ranks)
    rows = sum(len(weight) for weight in weights)
    whole = with_room(first.data, rows + room, first.shape[1], room)
    at = 0
    for weight in weights:
        own = whole[at : at + len(weight), : first.shape[1]]
        own.copy_(weight.data)
        weight.data = own
        at += len(own)
    return whole


def part(weights: Iterable[nn.Parameter]) -> None:
    """Gives weights that `join` has joined memory of their own again."""
    for weight in weights:
        weight.data = weight.data.clone(memory_format=torch.contiguous_format)


def padded(ranks: int) -> int:
    """Columns of factors of so many ranks together."""
    return -(-ranks // ALIGNED) * ALIGNED
