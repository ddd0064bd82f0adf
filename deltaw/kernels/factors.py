"""Low-rank factors written into the matrices that products take, those of a whole model in one launch.

A (r, in) and scale B (out, r) of hundreds of adapters are rounded to the arithmetic's dtype before every forward pass.
By themselves these are hundreds of copies, of 3 us each whatever their size: on an H100 2 ms of a step for the shape of
Llama-3.1-8B, where the bytes take 0.1. A `Writer` keeps where everything lies in a table on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.kernels.norm import triton_form


@dataclass(frozen=True)
class Factor:
    """One factor and its place, all of which is written.

    Attributes:
        source: (m, n); None: nothing but zeros.
        target: (m, N), rows contiguous, any stride between them.
        column: the target's columns from here on are scale source, all others 0.
        scale: a number.
    """

    source: Tensor | None
    target: Tensor
    column: int = 0
    scale: float = 1.0


def write_factors(factors: Sequence[Factor]) -> None:
    """Writes factors one after the other, in torch on any device."""
    for factor in factors:
        source, target = factor.source, factor.target
        if source is None or source.shape[1] < target.shape[1]:
            target.zero_()
        if source is not None:
            place = target[:, factor.column : factor.column + source.shape[1]]
            if factor.scale == 1.0:
                place.copy_(source)
            else:
                torch.mul(source, factor.scale, out=place)


class Writer:
    """Writes the same factors again and again; where Triton serves them, in one launch.

    The sources have to stay where they are as long as this is used, and so have the targets, or what they are parts of.

    Args:
        factors: what is written, one or more.
        base: targets are parts of this tensor, and in every call of the one that is given.
    """

    def __init__(self, factors: Sequence[Factor], base: Tensor | None = None) -> None:
        self._factors, self._base, self._table = factors, base, None
        first = factors[0].target
        sources = [factor.source for factor in factors if factor.source is not None]
        alike = all(
            (s.dtype, s.device) == (sources[0].dtype, first.device) and s.is_contiguous() for s in sources
        ) and all((f.target.dtype, f.target.device) == (first.dtype, first.device) for f in factors)
        kernels = triton_form(first, "factors_triton") if alike and sources else None
        if kernels is not None and sources[0].dtype != torch.float64:
            self._table = kernels.Table(factors, base)
            # Nothing is to be kept alive by a table of addresses in a base that changes.
            self._factors = factors if base is None else ()
            self._base = None

    def write(self, base: Tensor | None = None) -> None:
        """Writes all factors, in the parts of `base` that correspond to those of the first one."""
        if self._table is not None:
            self._table.write(base)
        elif base is None or self._base is None:
            write_factors(self._factors)
        else:
            write_factors([_moved(factor, self._base, base) for factor in self._factors])


def _moved(factor: Factor, old: Tensor, new: Tensor) -> Factor:
    target = factor.target
    place = target.storage_offset() - old.storage_offset() + new.storage_offset()
    return Factor(factor.source, new.as_strided(target.shape, target.stride(), place), factor.column, factor.scale)
