"""The low-rank factors of a group of linears as products take them, and when they are written.

They are read anew in every forward pass, as whoever trains them need not say that they changed (a fused optimizer does
not even count it as a change). Those that lie in matrices joined with dense weights have places of their own for good:
the first group of a pass finds that its factors were used since they were written, and all groups' are, in one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltaw.kernels.factors import Factor, Writer, write_factors


@dataclass
class Thin:
    """The factors of a group's linears as one, in the dtype of the arithmetic.

    Attributes:
        A: (P, in), all A under one another, zeros below; P is the sum of ranks, padded.
        B: (sum of out, P): every linear's scale B in its own rows and columns, zeros elsewhere.
    """

    A: Tensor
    B: Tensor


@dataclass
class _Place:
    """Where a group's factors lie, what they are made of, and how often that had changed when they were written."""

    thin: Thin
    key: Hashable
    factors: list[Factor]
    versions: list[int] = field(default_factory=list)

    def changes(self) -> list[int]:
        return [factor.source._version for factor in self.factors if factor.source is not None]


class Factors:
    """The factors of a model's groups."""

    def __init__(self) -> None:
        self._places: dict[Any, _Place] = {}
        self._unused: set[Any] = set()
        self._writers: list[Writer] = []
        self._apart: dict[Any, tuple[Hashable, Writer | None]] = {}

    def placed(self, name: Any, key: Hashable, thin: Thin, make: Callable[[], list[Factor]]) -> Thin:
        """Factors at a place that stays, written since they were last asked for.

        Args:
            name: of the group.
            key: where the sources lie and what is done with them; equal for equal lists of factors.
            thin: the place.
            make: lists what is to be written there.
        """
        key = key, thin.A.data_ptr()
        place = self._places.get(name)
        if place is None or place.key != key:
            place = self._places[name] = _Place(thin, key, make())
            write_factors(place.factors)
            self._writers = []
        elif name not in self._unused or place.versions != place.changes():
            self._write()
        self._unused.discard(name)
        return place.thin

    def is_placed(self, name: Any, thin: Thin | None) -> bool:
        """Whether these are the ones that lie there now."""
        place = self._places.get(name)
        return place is not None and place.thin is thin

    def forget(self, names: Sequence[Any]) -> None:
        """Lets go of places, and of the matrices that they are in."""
        for name in names:
            if self._places.pop(name, None) is not None:
                self._writers = []
            self._unused.discard(name)

    def made(self, name: Any, key: Hashable, memory: Tensor, make: Callable[[], list[Factor]]) -> None:
        """Writes factors into the memory of one pass, which their targets are parts of; arguments as of `placed`."""
        known, writer = self._apart.get(name, (None, None))
        # Sources that were there before will be there again: only then a table of where they lie is worth making.
        if name is None or known != key:
            write_factors(make())
            self._apart[name] = key, None
            return
        if writer is None:
            writer = Writer(make(), memory)
            self._apart[name] = key, writer
        writer.write(memory)

    def trained(self) -> None:
        """Says that a backward pass ran, after which all factors may change."""
        self._unused.clear()

    def _write(self) -> None:
        if not self._writers:
            by_device: dict[torch.device, list[Factor]] = {}
            for place in self._places.values():
                by_device.setdefault(place.thin.A.device, []).extend(place.factors)
            self._writers = [Writer(factors) for factors in by_device.values()]
        for writer in self._writers:
            writer.write()
        for place in self._places.values():
            place.versions = place.changes()
        self._unused = set(self._places)
