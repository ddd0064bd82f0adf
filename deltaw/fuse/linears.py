"""Linears of a fused block: what a module and its adapters compute now, forward and backward as plain functions.

y = c (x W^T + scale (x A^T) B^T) + b for every linear of a group that shares its input x (M, in). Symbols, shapes:
W (out, in) frozen, A (r, in), B (out, r), c (out,) or none, b (out,) or none, h = x A^T (M, r), z (M, out) what c
multiplies, g = dL/dz (M, out), k = scale g B (M, r).

    dA = k^T x        dB = scale g^T h        dx = sum over the group of g W + k A        dc = sum over tokens of dy z

The low-rank product is made first, and the frozen one is added to it by its own GEMM: one pass over the output less
than the other way round. The group's A are one matrix, so that x is read once for all h, and once for all dA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.protocols import BaseWeight, LowRank
from deltaw.kernels.fp8 import matmul_fp8, quantize_nf4, quantize_rows, quantize_rows_and_columns
from deltaw.kernels.low_rank import outer_sum, project, project_and_sum
from deltaw.methods.host import AdaptedSite
from deltaw.models.sites import SiteWeight
from deltaw.quant.codebooks import nf4_code
from deltaw.quant.weight import NF4Weight

#: |c| is kept from 0, since what it multiplied is found again by dividing by it.
LEAST = 1e-6


@dataclass
class Fused:
    """One linear as it is in this forward pass.

    Attributes:
        weight: W.
        bias: (out,) in the input's dtype, frozen.
        low: factors, any dtype; None: no adapter is active.
        trained: which of A, B and c want gradients.
    """

    weight: BaseWeight
    bias: Tensor | None
    low: LowRank | None
    trained: list[Tensor] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """Of the update; 0 without one."""
        return 0 if self.low is None else self.low.A.shape[0]

    @property
    def factor(self) -> Tensor | None:
        """C (out,), or None."""
        return None if self.low is None else self.low.out_scale


def fused_linear(module: nn.Module) -> Fused | str:
    """What a linear computes now in training, or why only its own forward knows."""
    if type(module).forward is not nn.Linear.forward or hooked(module):
        return "a projection is not a plain linear"
    weight: Any = module.weight
    bias: Any = module.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "a projection's own weight is trained"
    site = module._modules.get("adapted")
    if site is None:
        if "forward" in module.__dict__:
            return "a projection's forward has been replaced"
        return Fused(SiteWeight(module, "linear"), bias, None)
    if not isinstance(site, AdaptedSite) or site.inner is not None or site.weight is None:
        return "a projection's forward has been replaced"
    if site.beside:
        return "something stands beside a projection's adapter"
    if site.merge_aware:
        return "it trains through merged weights"
    low = _combined(site)
    return low if isinstance(low, str) else Fused(site.weight, bias, low, _trained(low))


def _combined(site: AdaptedSite) -> LowRank | str | None:
    factors: list[tuple[LowRank, float]] = []
    for part, weight in site.chosen():
        if part.replaces or hasattr(part, "prepare") or part.shift() is not None:
            return "an adapter is more than low-rank factors"
        low = part.low_rank()
        if low is None or low.A.dim() != 2:
            return "an adapter has no low-rank factors"
        if part.training and part.dropout:
            return "an adapter has dropout"
        factors.append((low, weight))
    if not factors:
        return None
    if len(factors) == 1:
        low, weight = factors[0]
        if low.out_scale is not None and weight != 1:
            return "a DoRA is weighted"
        return LowRank(low.A, low.B, low.scale * weight, low.out_scale)
    if any(low.out_scale is not None for low, _ in factors):
        return "several adapters with magnitudes are active"
    A = torch.cat([low.A for low, _ in factors])
    B = torch.cat([low.B * (low.scale * weight) for low, weight in factors], dim=1)
    return LowRank(A, B, 1.0)


def _trained(low: LowRank | None) -> list[Tensor]:
    tensors = [] if low is None else [low.A, low.B, *([] if low.out_scale is None else [low.out_scale])]
    return [tensor for tensor in tensors if tensor.requires_grad]


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


#: W by rows and by columns in 8 bits with their scales, as `quantize_rows_and_columns` gives them.
Narrow = tuple[Tensor, Tensor, Tensor, Tensor]


class Group:
    """Linears that read one input, for one forward pass and its backward pass.

    Args:
        linears: of one input width.
        dtype: of the arithmetic's tensors.
        fp8: whether products with W are made in 8-bit floats; the group's weights are then one matrix.
        held: where the group's W in 8 bits stays from one call to the next, under `name`; None: nowhere.
        name: of the group there.
    """

    def __init__(
        self,
        linears: Sequence[Fused],
        dtype: torch.dtype,
        *,
        fp8: bool = False,
        held: dict[Any, Narrow] | None = None,
        name: Any = None,
    ) -> None:
        self.linears, self.fp8, self.held, self.name = linears, fp8, held, name
        lows = [linear.low for linear in linears if linear.low is not None]
        # Narrow copies, made once for both passes: the factors are small.
        self.A = torch.cat([low.A.detach().to(dtype) for low in lows]) if lows else None
        self.B = [None if linear.low is None else linear.low.B.detach().to(dtype) for linear in linears]
        self.c = [None if linear.factor is None else _apart(linear.factor.detach()) for linear in linears]
        #: K of all linears side by side (M, sum of ranks), after `backward`.
        self.k: Tensor | None = None

    def project(self, x: Tensor) -> Tensor | None:
        """H of all linears, side by side: (M, sum of ranks)."""
        return None if self.A is None else project(x, self.A)

    def outputs(self, x: Tensor, h: Tensor | None, *, onto: Tensor | None = None) -> list[Tensor]:
        """The linears' z (M, out) (with their bias where there is no c); of x (M, in) and h.

        Args:
            x: the shared input.
            h: as `project` gave it.
            onto: (M, out), added to the one linear's output in the same pass; not written to.
        """
        if self.fp8:
            return self._fp8_outputs(x, h, onto)
        return [
            self._output(x, part, linear, B, onto)
            for linear, B, part in zip(self.linears, self.B, self.parts(h), strict=True)
        ]

    def _fp8_outputs(self, x: Tensor, h: Tensor | None, onto: Tensor | None) -> list[Tensor]:
        """The same, views of one tensor: the 8-bit product cannot add to what is there."""
        W, scale, _, _ = self._narrow()
        whole = matmul_fp8(*quantize_rows(x), W, scale, out_dtype=x.dtype)
        outs = whole.split([linear.weight.shape[0] for linear in self.linears], dim=1)
        for out, linear, B, part in zip(outs, self.linears, self.B, self.parts(h), strict=True):
            if linear.low is not None and B is not None and part is not None:
                out.addmm_(part, B.t(), alpha=linear.low.scale)
            if linear.bias is not None and linear.factor is None:
                out.add_(linear.bias.to(out.dtype))
            if onto is not None:
                out.add_(onto)
        return list(outs)

    def _narrow(self) -> Narrow:
        if self.held is not None and self.name in self.held:
            return self.held[self.name]
        packed: list[Any] = [getattr(linear.weight, "packed", None) for linear in self.linears]
        if all(isinstance(weight, NF4Weight) for weight in packed):
            made = quantize_nf4(packed, nf4_code(packed[0].device))
        else:
            made = quantize_rows_and_columns([linear.weight.dequantize() for linear in self.linears])
        if self.held is not None:
            self.held[self.name] = made
        return made

    def _output(self, x: Tensor, h: Tensor | None, linear: Fused, B: Tensor | None, onto: Tensor | None) -> Tensor:
        W = linear.weight.dequantize(dtype=x.dtype)
        bias = None if linear.bias is None or linear.factor is not None else linear.bias.to(x.dtype)
        if h is None or B is None:
            if onto is None:
                return torch.mm(x, W.t()) if bias is None else torch.addmm(bias, x, W.t())
            out = torch.addmm(onto, x, W.t())
            return out if bias is None else out.add_(bias)
        assert linear.low is not None
        scale = linear.low.scale
        if onto is not None:
            out = torch.addmm(onto, h, B.t(), alpha=scale)
            if bias is not None:
                out.add_(bias)
        elif bias is not None:
            out = torch.addmm(bias, h, B.t(), alpha=scale)
        else:
            out = torch.mm(h * scale, B.t())
        return out.addmm_(x, W.t())

    def finish(self, outs: Sequence[Tensor]) -> list[Tensor]:
        """Y of z, in place: c z + b where there is a c."""
        for out, c, linear in zip(outs, self.c, self.linears, strict=True):
            if c is not None:
                out.mul_(c.to(out.dtype))
                if linear.bias is not None:
                    out.add_(linear.bias.to(out.dtype))
        return list(outs)

    def parts(self, h: Tensor | None) -> list[Tensor | None]:
        """H by linear."""
        if h is None:
            return [None] * len(self.linears)
        pieces = iter(h.split([linear.rank for linear in self.linears if linear.low is not None], dim=1))
        return [None if linear.low is None else next(pieces) for linear in self.linears]

    def scale_gradients(self, grads: Sequence[Tensor], ys: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Turns dL/dy into dL/dz in place, and gives dc (out,) float32 from y (c z + b); None where there is no c."""
        found: list[Tensor | None] = []
        for g, y, c, linear in zip(grads, ys, self.c, self.linears, strict=True):
            if c is None:
                found.append(None)
                continue
            assert y is not None
            total = products(g, y)
            if linear.bias is not None:
                total = total - linear.bias.to(total.dtype) * g.sum(0, dtype=total.dtype)
            found.append(total / c.to(total.dtype))
            g.mul_(c.to(g.dtype))
        return found

    def backward(
        self,
        grads: Sequence[Tensor],
        x: Tensor | None,
        h: Tensor | None,
        *,
        need_x: bool = True,
        known: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]]]:
        """Gradients of dL/dz (M, out) by linear.

        Args:
            grads: dL/dz; not written to.
            x: (M, in); None: `dA` is taken later, by `take_dA`.
            h: as `project` gave it.
            need_x: whether dx is wanted.
            known: (k, dB) by linear, where they have been made already.

        Returns:
            dx (M, in), and (dA, dB) by linear, float32 or wider.
        """
        ks: list[Tensor] = []
        dBs: list[Tensor | None] = []
        for index, (g, linear, B, part) in enumerate(zip(grads, self.linears, self.B, self.parts(h), strict=True)):
            if B is None or part is None:
                dBs.append(None)
                continue
            assert linear.low is not None
            k, dB = project_and_sum(g, B, part, scale=linear.low.scale) if known is None else known[index]
            ks.append(k)
            dBs.append(dB)
        self.k = None if not ks else ks[0] if len(ks) == 1 else torch.cat(ks, dim=1)
        dx: Tensor | None = None
        if need_x and self.fp8:
            _, _, W, scale = self._narrow()
            dx = matmul_fp8(*quantize_rows(side_by_side(grads)), W, scale, out_dtype=grads[0].dtype)
            if self.k is not None and self.A is not None:
                dx.addmm_(self.k, self.A)
        elif need_x:
            if self.k is not None and self.A is not None:
                dx = torch.mm(self.k, self.A)
            for g, linear in zip(grads, self.linears, strict=True):
                W = linear.weight.dequantize(dtype=g.dtype)
                dx = torch.mm(g, W) if dx is None else dx.addmm_(g, W)
        dAs = [None] * len(self.linears) if x is None else self.take_dA(x)
        return dx, list(zip(dAs, dBs, strict=True))

    def take_dA(self, x: Tensor) -> list[Tensor | None]:
        """DA by linear, (r, in), after `backward`."""
        if self.k is None:
            return [None] * len(self.linears)
        pieces = iter(outer_sum(self.k, x).split([linear.rank for linear in self.linears if linear.low is not None]))
        return [None if linear.low is None else next(pieces) for linear in self.linears]


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Matrices (M, n) as one (M, sum of n); without a copy where they are views of one that lie next to each other."""
    first, total, at = tensors[0], sum(t.shape[1] for t in tensors), tensors[0].storage_offset()
    for t in tensors:
        same = t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or t.stride() != (total, 1) or t.storage_offset() != at:
            return torch.cat(list(tensors), dim=1)
        at += t.shape[1]
    return first.as_strided((len(first), total), (total, 1), first.storage_offset())


def products(a: Tensor, b: Tensor) -> Tensor:
    """Sum over tokens of a b: two (M, out) to (out,), in float32 or wider."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.device.type == "cpu":
        return (a * b).sum(0, dtype=wide)
    total = torch.zeros(a.shape[1], device=a.device, dtype=wide)
    # A product of the whole would be as large as a.
    for start in range(0, len(a), 2048):
        total += (a[start : start + 2048] * b[start : start + 2048]).sum(0, dtype=wide)
    return total


def _apart(c: Tensor) -> Tensor:
    return torch.where(c.abs() < LEAST, torch.full_like(c, LEAST), c)
