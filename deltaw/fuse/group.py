"""Linears of a fused block that share an input, as one: forward and backward as plain functions.

Symbols and formulas are those of `linears.py`. W and A lie under one another, B in the diagonal blocks of one matrix,
outputs side by side. So x is read once for all h and once for all dA, and frozen products are as large as they can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaw.fuse.linears import Fused
from deltaw.fuse.narrow import Narrow, narrowed, turn_of
from deltaw.fuse.store import Store, padded
from deltaw.fuse.thin import Thin
from deltaw.kernels.factors import Factor
from deltaw.kernels.fp8 import matmul_fp8, quantize_rows, write_columns
from deltaw.kernels.low_rank import add_product, outer_sum, project, project_and_sum, project_and_sum_blocks
from deltaw.kernels.memory import with_room
from deltaw.kernels.scaled import scale_and_sum
from deltaw.quant.weight import NF4Weight, dequantize_all

#: |c| of several linears is kept from 0, since what it multiplied is found again by dividing by it.
LEAST = 1e-6


class Group:
    """Linears that read one input, for one forward pass and its backward pass.

    Where W is decoded from 4 bits or has been joined, a product with it takes the low-rank part along: [x, h] [W, sB]^T
    forward and [g, k] [W; A] back, so that nothing is added in passes of its own. x and g are then given with `spare`
    more columns behind them, which are written to.

    Args:
        linears: of one input width.
        dtype: of the arithmetic's tensors.
        fp8: whether products with W are made in 8-bit floats, backward.
        fp8_forward: whether forward too.
        store: what stays between calls.
        name: of the group there.
    """

    def __init__(
        self,
        linears: Sequence[Fused],
        dtype: torch.dtype,
        *,
        fp8: bool = False,
        fp8_forward: bool = False,
        store: Store | None = None,
        name: Any = None,
    ) -> None:
        self.linears, self.dtype, self.name = linears, dtype, name
        self.fp8, self.fp8_forward = fp8 or fp8_forward, fp8_forward
        self.store = Store() if store is None else store
        self.widths = [linear.weight.shape[0] for linear in linears]
        self.rows, self.columns = sum(self.widths), linears[0].weight.shape[1]
        self.P = padded(sum(linear.rank for linear in linears))
        self.bias = self._one([linear.bias for linear in linears], 0.0)
        self.packed: list[Any] = [getattr(linear.weight, "packed", None) for linear in linears]
        self.decoded = all(isinstance(weight, NF4Weight) for weight in self.packed)
        self.joined = None if fp8_forward else self._held() if self.decoded else self._joined()
        #: Columns that x and g may have behind them.
        self.spare = self.P if self.joined is not None or (self.decoded and not fp8_forward) else 0
        #: Directions of the input, of products in 8 bits forward.
        self.along = self.store.directions.get(name) if fp8_forward else None
        self._thin: Thin | None = None
        #: A and below it the directions, where there are some, so that x is read once for both.
        self._projections: Tensor | None = None
        #: What `project` found along them, for the `outputs` of the same x that follow.
        self._coordinates: Tensor | None = None
        self._c: Tensor | None = None
        #: What was decoded for the norms, for the product that comes next.
        self._decoded: Tensor | None = None
        #: Of products in 8 bits, whether k A is left to whoever reads dx; else the product takes it along.
        self.lean = False
        #: K of all linears side by side (M, P), after `backward`.
        self.k: Tensor | None = None

    def _one(self, parts: Sequence[Tensor | None], otherwise: float) -> Tensor | None:
        """Vectors one after the other; None where all are missing."""
        known = [part for part in parts if part is not None]
        if not known:
            return None
        if len(parts) == 1:
            return known[0]
        filled = zip(parts, self.widths, strict=True)
        return torch.cat([known[0].new_full((n,), otherwise) if part is None else part for part, n in filled])

    def _fits(self, whole: Tensor) -> bool:
        return whole.dtype == self.dtype and whole.shape == (self.rows + self.P, self.columns + self.P)

    @property
    def _source(self) -> list[Any]:
        """What weights that stay were made of: the packed ones, or where dense ones lie and how often they changed."""
        if self.decoded:
            return list(self.packed)
        return [(W.data_ptr(), W._version) for W in (linear.weight.dequantize() for linear in self.linears)]

    def _held(self) -> Tensor | None:
        """W decoded for good, where that may stay."""
        if self.name is None or self.name[0] not in self.store.holds:
            return None
        whole, source = self.store.decoded.get(self.name, (None, []))
        if whole is None or not self._fits(whole) or not _same(source, self._source):
            whole = self._matrix(self.P, self.P)
            dequantize_all(self.packed, whole[: self.rows, : self.columns])
            self.store.decoded[self.name] = whole, self._source
        return whole

    def _joined(self) -> Tensor | None:
        """The matrix that the weights are parts of, where they still are."""
        whole = self.store.joined.get(self.name)
        if whole is None or not self._fits(whole):
            return None
        at = whole.data_ptr()
        for linear, width in zip(self.linears, self.widths, strict=True):
            W = linear.weight.dequantize()
            if W.data_ptr() != at or W.stride() != whole.stride():
                return None
            at += width * whole.stride(0) * whole.element_size()
        return whole

    # Factors.

    @property
    def c(self) -> Tensor | None:
        """C of all linears side by side (out,), or None."""
        if self._c is None and any(linear.scaled for linear in self.linears):
            self._settle()
            factors = [linear.factor for linear in self.linears]
            c = self._one([None if factor is None else factor.detach() for factor in factors], 1.0)
            # Of several linears dc is found by dividing by it, see `scale_gradients`.
            self._c = c if c is None or len(self.linears) == 1 else _apart(c)
        return self._c

    def _settle(self) -> None:
        """The norms of those that have none yet, with one reading of W for all."""
        if all(linear.part is None for linear in self.linears):
            return
        W = self._weight(B=True)
        U = None if W is None else W[:, : self.columns] @ self.thin.A.t()
        if self.joined is None and not self.fp8_forward:
            self._decoded = W
        row = at = 0
        for linear, width in zip(self.linears, self.widths, strict=True):
            if linear.part is not None and U is not None:
                linear.known_norm(U[row : row + width, at : at + linear.rank])
            elif linear.part is not None and linear.low is not None:
                linear.known_norm(linear.weight.matmul(linear.low.A.detach().to(self.dtype)).t())
            row, at = row + width, at + linear.rank

    @property
    def thin(self) -> Thin:
        """All factors as one, read once. There has to be one."""
        # Another pass's factors may have taken the place in a joined matrix since.
        taken = self.joined is not None and not self.store.factors.is_placed(self.name, self._thin)
        if self._thin is None or taken:
            self._thin = self._made()
        return self._thin

    def _made(self) -> Thin:
        if (whole := self.joined) is not None:
            thin = Thin(whole[self.rows :, : self.columns], whole[: self.rows, self.columns :])
        else:
            like = next(linear.low.A for linear in self.linears if linear.low is not None)
            count = 0 if self.along is None else self.along.P.shape[1]
            sizes = [(self.P + count) * self.columns, self.P * self.rows]
            memory = like.new_empty(sum(sizes), dtype=self.dtype)
            A, B = memory.split(sizes)
            A = A.view(self.P + count, -1)
            if self.along is not None:
                A[self.P :].copy_(self.along.P.t())
                self._projections = A
            thin = Thin(A[: self.P], B.view(-1, self.P))
        lows = [linear.low for linear in self.linears]
        key = tuple(
            low and (low.A.data_ptr(), low.B.data_ptr(), low.A.shape, low.A.dtype, low.B.dtype, low.scale)
            for low in lows
        )
        if whole is not None:
            return self.store.factors.placed(self.name, key, thin, lambda: self._factors(thin))
        self.store.factors.made(self.name, (key, count), memory, lambda: self._factors(thin))
        return thin

    def _factors(self, thin: Thin) -> list[Factor]:
        """What is written where, the zeros too."""
        found, at, row = [], 0, 0
        for linear, width in zip(self.linears, self.widths, strict=True):
            rows = thin.B[row : row + width]
            if (low := linear.low) is not None:
                found.append(Factor(low.A.detach(), thin.A[at : at + linear.rank]))
                found.append(Factor(low.B.detach(), rows, at, low.scale))
                at += linear.rank
            else:
                found.append(Factor(None, rows))
            row += width
        return found if at == self.P else [*found, Factor(None, thin.A[at:])]

    # Products with W.

    def _weight(self, *, B: bool = False, A: bool = False) -> Tensor | None:
        """W (rows, in), with sB behind it or A below it; None where it is no one matrix."""
        below, behind = self.P * A, self.P * B
        thin = self.thin if below or behind else None
        if self.joined is not None:
            # The factors are in it, once they have been read.
            return self.joined[: self.rows + below, : self.columns + behind]
        if not self.decoded:
            return None
        if self._decoded is not None and not A:
            whole, self._decoded = self._decoded, None
            return whole[:, : self.columns + behind]
        stays = A and self.name is not None and self.name[0] in self.store.bridges
        made = self._bridged(stays=stays)
        if made is None:
            made = self._matrix(self.P if stays else below, self.P if stays else behind)
            dequantize_all(self.packed, made[: self.rows, : self.columns])
        if stays:
            self.store.bridged[self.name] = made, self._source
        if thin is not None and below:
            made[self.rows :, : self.columns].copy_(thin.A)
        if thin is not None and behind:
            made[: self.rows, self.columns :].copy_(thin.B)
        return made[: self.rows + below, : self.columns + behind]

    def _bridged(self, *, stays: bool) -> Tensor | None:
        """What a backward pass decoded, if it is still that; `stays`: for another one, else it is not there after."""
        kept = self.store.bridged
        whole, source = (kept.get if stays else kept.pop)(self.name, (None, []))
        return whole if whole is not None and self._fits(whole) and _same(source, self._source) else None

    def _matrix(self, below: int, behind: int) -> Tensor:
        """Memory for W with so many rows below it and columns behind it."""
        like = torch.empty(0, dtype=self.dtype, device=self.packed[0].device)
        return with_room(like, self.rows + below, self.columns, behind)

    def _times(self, x: Tensor, out: Tensor, *, transposed: bool, add: bool) -> Tensor:
        """X W^T, or x W where not `transposed`, into or onto `out`."""
        W = self._weight()
        if W is not None:
            factor = W.t() if transposed else W
            return out.addmm_(x, factor) if add else torch.mm(x, factor, out=out)
        at = 0
        for linear, width in zip(self.linears, self.widths, strict=True):
            W, columns = linear.weight.dequantize(dtype=self.dtype), slice(at, at + width)
            left, right = (x, W.t()) if transposed else (x[:, columns], W)
            target = out[:, columns] if transposed else out
            if add or (at and not transposed):
                target.addmm_(left, right)
            else:
                torch.mm(left, right, out=target)
            at += width
        return out

    # Forward.

    def project(self, x: Tensor, *, inside: bool = False) -> Tensor | None:
        """H of all linears, side by side: (M, P); `inside`: where x has columns to spare, in those."""
        if not self.P:
            return None
        if inside and x.shape[1] == self.columns + self.P:
            return torch.mm(x[:, : self.columns], self.thin.A.t(), out=x[:, self.columns :])
        thin = self.thin
        if self._projections is None:
            return project(x[:, : self.columns], thin.A)
        h, self._coordinates = project(x, self._projections).tensor_split([self.P], 1)
        return h

    def outputs(
        self,
        x: Tensor,
        h: Tensor | None,
        *,
        onto: Tensor | None = None,
        spare: int = 0,
        lean: bool = False,
        ready: bool = False,
    ) -> Tensor:
        """The linears' z (M, rows), side by side, with their bias where there is no c.

        Args:
            x: (M, in) or (M, in + spare), the shared input.
            h: as `project` gave it.
            onto: (M, rows), added in the same pass; not written to.
            spare: columns of memory behind the result.
            lean: of products in 8 bits, whether the low-rank part is left to whoever reads z.
            ready: whether h stands in x's spare columns already.
        """
        scaled = self.c is not None
        B = None if h is None or lean else self.thin.B
        # A product that adds to what is there is slower by more than a pass that adds, and copies `onto` first.
        if self.fp8_forward:
            W, scale, _, _ = self._narrow(forward=True)
            assert W is not None and scale is not None
            along, self._coordinates = self._coordinates, None
            if along is None and self.along is not None:
                along = x @ self.along.P
            q = quantize_rows(x, behind=along)
            z = matmul_fp8(*q, W, scale, out_dtype=x.dtype, fast_accumulation=True)
        elif h is not None and x.shape[1] == self.columns + self.P:
            whole, B = self._weight(B=True), None
            assert whole is not None
            room = x[:, self.columns :]
            if not ready and room.data_ptr() != h.data_ptr():
                room.copy_(h)
            z = torch.mm(x, whole.t(), out=self._empty(x, spare))
        elif h is not None and B is not None and onto is None:
            z = torch.mm(h, B.t(), out=self._empty(x, spare))
            z, B = self._times(x[:, : self.columns], z, transposed=True, add=True), None
        else:
            z = self._times(x[:, : self.columns], self._empty(x, spare), transposed=True, add=False)
        if B is not None and h is not None:
            z = z.addmm_(h, B.t()) if onto is None else add_product(onto, h, B, z=z, out=z)
        elif onto is not None:
            z.add_(onto)
        return z if self.bias is None or scaled else z.add_(self.bias.to(z.dtype))

    def _empty(self, x: Tensor, spare: int) -> Tensor:
        return with_room(x, len(x), self.rows, spare)[:, : self.rows]

    def _narrow(self, *, forward: bool) -> Narrow:
        """W in 8 bits, the same in both directions of a step."""
        held, turn, along = self.store.narrow, 0, None
        if self.fp8_forward and self.name is not None:
            turn = turn_of(self.store.turn, self.name[0])
            along = self.along if forward or held is not None else None
        room = 0 if self.lean else self.P
        source = [*self._source, (turn, room), along]
        if held is not None and self.name in held:
            if _same(held[self.name][1], source):
                return held[self.name][0]
            del held[self.name]
        parts = self.packed if self.decoded else [linear.weight.dequantize() for linear in self.linears]
        made = narrowed(parts, forward=self.fp8_forward, turn=turn, along=along, room=room)
        if held is not None:
            held[self.name] = made, source
        return made

    def finish(self, z: Tensor) -> Tensor:
        """Y of z, in place: c z + b where there is a c."""
        if self.c is not None:
            z.mul_(self.c.to(z.dtype))
            if self.bias is not None:
                z.add_(self.bias.to(z.dtype))
        return z

    def parts(self, h: Tensor | None) -> list[Tensor | None]:
        """H by linear."""
        found: list[Tensor | None] = []
        at = 0
        for linear in self.linears:
            found.append(None if linear.low is None or h is None else h[:, at : at + linear.rank])
            at += linear.rank
        return found

    # Backward.

    def scale_gradients(self, g: Tensor, y: Tensor) -> list[Tensor | None]:
        """Turns dL/dy (M, rows) into dL/dz in place; gives dc (out,) float32 of y = c z + b by linear, or None."""
        if self.c is None:
            return [None] * len(self.linears)
        offset = None if self.bias is None else self.bias * g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32))
        _, total = scale_and_sum(g, y, self.c, out=g)
        return self.factor_gradients(total if offset is None else total - offset)

    def factor_gradients(self, total: Tensor) -> list[Tensor | None]:
        """Dc by linear, or None, of the sums over rows of dL/d(c z) times c z (rows,)."""
        assert self.c is not None
        found = (total / self.c.to(total.dtype)).split(self.widths)
        return [one if linear.scaled else None for linear, one in zip(self.linears, found, strict=True)]

    def backward(
        self,
        g: Tensor,
        x: Tensor | None,
        h: Tensor | None,
        *,
        need_x: bool = True,
        known: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    ) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
        """Gradients of dL/dz.

        Args:
            g: (M, rows) or (M, rows + spare); the spare columns are written to.
            x: (M, in); None: `dA` is taken later, by `take_dA`.
            h: as `project` gave it.
            need_x: whether dx is wanted.
            known: k and dB by linear, where they have been made already.

        Returns:
            dx (M, in), and (dA, dB) by linear, float32 or wider.
        """
        wide = g.shape[1] > self.rows
        whole, g = g, g[:, : self.rows]
        dBs: list[Tensor | None] = [None] * len(self.linears)
        if h is not None:
            room = whole[:, self.rows :] if wide else g.new_empty(len(g), self.P)
            dBs = self._low_rank(g, h, room, known)
            self.k = room
        dx: Tensor | None = None
        if need_x and self.fp8:
            _, _, W, scale = self._narrow(forward=False)
            if self.k is None or self.lean:
                q = quantize_rows(g)
            else:
                behind = W[:, self.rows : self.rows + self.P]
                q = quantize_rows(g, behind=self.k, factor=write_columns(self.thin.A, behind, scale))
            dx = matmul_fp8(*q, W, scale, out_dtype=g.dtype)
        elif need_x and wide:
            weight = self._weight(A=True)
            assert weight is not None
            dx = torch.mm(whole, weight)
        elif need_x:
            dx = g.new_empty(len(g), self.columns)
            if self.k is not None:
                torch.mm(self.k, self.thin.A, out=dx)
            self._times(g, dx, transposed=False, add=self.k is not None)
        dAs = [None] * len(self.linears) if x is None else self.take_dA(x)
        return dx, list(zip(dAs, dBs, strict=True))

    def _low_rank(
        self, g: Tensor, h: Tensor, k: Tensor, known: tuple[Sequence[Tensor], Sequence[Tensor]] | None
    ) -> list[Tensor | None]:
        """Fills in k (M, P), and gives dB by linear."""
        if known is not None:
            at = 0
            for one in known[0]:
                place = k[:, at : at + one.shape[1]]
                if place.data_ptr() != one.data_ptr():
                    place.copy_(one)
                at += one.shape[1]
            if at < self.P:
                k[:, at:].zero_()
            return [*known[1]]
        if len(self.linears) == 1:
            low = self.linears[0].low
            assert low is not None
            _, total = project_and_sum(g, self.thin.B, h, scale=1.0, sum_scale=low.scale, out=k)
            return [total[:, : self.linears[0].rank]]
        first = self.linears[0].low
        alike = {None if one.low is None else (one.rank, one.low.scale) for one in self.linears}
        if first is not None and len(alike) == 1:
            used = self.linears[0].rank * len(self.linears)
            total = project_and_sum_blocks(
                g, self.thin.B[:, :used], h[:, :used], widths=self.widths, sum_scale=first.scale, out=k[:, :used]
            )
            k[:, used:].zero_()
            return [*total.split(self.widths)]
        # Reading g twice, but in two products for all linears.
        torch.mm(g, self.thin.B, out=k)
        total = outer_sum(g, h)
        found: list[Tensor | None] = []
        at = row = 0
        for linear, width in zip(self.linears, self.widths, strict=True):
            block = total[row : row + width, at : at + linear.rank]
            found.append(None if linear.low is None else block * linear.low.scale)
            at, row = at + linear.rank, row + width
        return found

    def take_dA(self, x: Tensor) -> list[Tensor | None]:
        """DA by linear, (r, in), after `backward`."""
        if self.k is None:
            return [None] * len(self.linears)
        total, found, at = outer_sum(self.k, x), [], 0
        for linear in self.linears:
            found.append(None if linear.low is None else total[at : at + linear.rank])
            at += linear.rank
        return found


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether both hold the same objects, or equal tuples."""
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(a is b or (isinstance(a, tuple) and a == b) for a, b in pairs)


def _apart(c: Tensor) -> Tensor:
    return c.masked_fill(c.abs() < LEAST, LEAST)
