"""Clipping by example: the sum of gradients that no single example, or customer, moves by more than a bound.

Abadi et al., "Deep Learning with Differential Privacy", arXiv 1607.00133, algorithm 1. With G_i the gradient of all
trained parameters together that example i alone gives,

    sum_i G_i min(1, C / ||G_i||)        C = max_grad_norm

For low-rank factors G_i is small, rows r (in + out) numbers a site, so it is kept for a micro-batch and its norm is
exact: one backward pass, no second one, no bound on the norm in its place (Li et al., arXiv 2110.05679, avoid keeping
it for whole weight matrices). Several rows of one customer are one example: their gradients are averaged first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deltaw.core.errors import InputError, RunError


class ExampleGradients:
    """The sink for one optimizer step: takes gradients by row, gives the clipped sum.

    A micro-batch is `begin`, a backward pass that feeds, `end`. A customer's rows may lie in several micro-batches, one
    after another; it is clipped after its last.

    Args:
        parameters: everything that is trained, by name.
        max_grad_norm: C, the most that one example's whole gradient may be long.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, max_grad_norm: float) -> None:
        if not max_grad_norm > 0:
            raise InputError(f"max_grad_norm is {max_grad_norm!r}: expected a number above 0 under privacy")
        self.max_grad_norm = max_grad_norm
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self._names = {id(p): name for name, p in self.parameters.items()}
        #: Parameters that a backward pass has fed so far.
        self.fed: set[str] = set()
        #: Norms before clipping of the examples of the last micro-batch that were complete: never to be let out.
        self.norms = torch.zeros(0)
        self._held: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._carried: dict[str, Tensor] = {}
        self._weights = torch.zeros(0)
        self._units: Tensor | None = None
        self._alone, self._open = True, False

    def begin(self, weights: Tensor, *, units: Tensor | None = None, stays_open: bool = False) -> None:
        """A micro-batch.

        Args:
            weights: (rows,), what each row's gradient is multiplied by before anything else.
            units: (rows,), the number of each row's unit, from 0 in order of appearance; None: every row is one.
                Where the last micro-batch left a unit open, number 0 is that one.
            stays_open: the last unit has more rows in the next micro-batch.
        """
        self._weights = weights.float()
        self._alone = units is None and not self._carried and not stays_open
        self._units, self._open = units, stays_open
        self._held = {}

    def feed(self, parameter: Tensor, gradients: Tensor) -> None:
        """A share of a parameter's gradient by row: (rows, *parameter.shape)."""
        name = self._names.get(id(parameter))
        if name is None:
            raise RunError("a gradient by example came for a parameter that is not trained: please report this")
        if len(gradients) != len(self._weights):
            raise RunError(f"gradients of {len(gradients)} rows came for {name}: expected {len(self._weights)}")
        self.fed.add(name)
        held = self._held.get(name)
        self._held[name] = gradients.detach() if held is None else held + gradients.detach()

    def end(self) -> None:
        """Clips what the micro-batch completed and adds it to the sum."""
        if not self._alone:
            self._gather()
        found = list(self._held.values())
        if not found:
            return
        flat = [gradients.flatten(1) for gradients in found]
        squares = [torch.linalg.vector_norm(g, dim=1, dtype=_wide(g)).square() for g in flat]
        norms = torch.stack(squares).sum(0).sqrt()
        if self._alone:
            norms = norms * self._weights
        closed = len(norms) - self._open
        factors = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        if self._alone:
            factors = factors * self._weights
        # One broken example must move the sum by no more than any other: it counts as absent.
        good = torch.isfinite(norms)[:closed]
        factors, broken = torch.where(good, factors[:closed], 0.0), not bool(good.all())
        for name, g in zip(self._held, flat, strict=True):
            rows = g[:closed].to(_wide(g))
            if broken:
                rows = torch.where(good[:, None], rows, 0.0)
            added = (factors.to(rows.dtype) @ rows).view(self.parameters[name].shape)
            self._sums[name] = added if name not in self._sums else self._sums[name].add_(added)
        self.norms = norms[:closed]
        self._carried = {name: g[closed].clone() for name, g in self._held.items()} if self._open else {}
        self._held = {}

    def _gather(self) -> None:
        """Rows to units, with the unit that the last micro-batch left open as number 0."""
        rows = torch.arange(len(self._weights), device=self._weights.device)
        units = rows if self._units is None else self._units
        count = int(units.max()) + 1
        for name in {**self._held, **self._carried}:
            shape = self.parameters[name].shape
            wide = _wide(self._held.get(name, self._carried.get(name)))
            made = torch.zeros(count, *shape, device=self._weights.device, dtype=wide)
            if name in self._held:
                weighted = self._held[name].to(wide) * self._weights.view(-1, *[1] * len(shape))
                made.index_add_(0, units, weighted)
            if name in self._carried:
                made[0] += self._carried[name]
            self._held[name] = made

    def take(self) -> dict[str, Tensor]:
        """The sum over the step's examples for every parameter, in float32 or wider; starts anew."""
        if self._open:
            raise RunError("a step ended within a customer's rows: please report this")
        sums = {
            name: self._sums[name] if name in self._sums else torch.zeros(p.shape, device=p.device, dtype=_wide(p))
            for name, p in self.parameters.items()
        }
        self._sums = {}
        return sums


def _wide(tensor: Tensor | None) -> torch.dtype:
    assert tensor is not None
    return torch.promote_types(tensor.dtype, torch.float32)
