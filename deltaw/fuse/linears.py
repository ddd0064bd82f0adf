"""Linears of a fused block: what a module and its adapters compute now, forward and backward as plain functions.

y = c (x W^T + scale (x A^T) B^T) + b for every linear of a group that shares its input x (M, in). Symbols, shapes:
W (out, in) frozen, A (r, in), B (out, r), c (out,) or none, b (out,) or none, h = x A^T (M, r), z (M, out) what c
multiplies, g = dL/dz (M, out), k = scale g B (M, r).

    dA = k^T x        dB = scale g^T h        dx = sum over the group of g W + k A        dc = sum over tokens of dy z

Groups of them that read one input are computed by `group.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.protocols import BaseWeight, LowRank
from deltaw.methods.host import AdaptedSite
from deltaw.models.sites import SiteWeight


@dataclass
class Fused:
    """One linear as it is in this forward pass.

    Attributes:
        weight: W.
        bias: (out,) in the input's dtype, frozen.
        low: factors, any dtype; None: no adapter is active.
        trained: which of A, B and c want gradients; of a part that is to be normed its magnitude in the place of c.
        part: a DoRA whose norm is not known yet, and c neither.
        magnitude: of the part.
        norm: of the part, (out,), once it is known.
    """

    weight: BaseWeight
    bias: Tensor | None
    low: LowRank | None
    trained: list[Tensor] = field(default_factory=list)
    part: Any = None
    magnitude: Tensor | None = None
    norm: Tensor | None = None

    @property
    def scaled(self) -> bool:
        """Whether there is a c."""
        return self.part is not None or (self.low is not None and self.low.out_scale is not None)

    def known_norm(self, U: Tensor) -> None:
        """Settles the part's norm, and c, by U = W A^T (out, r)."""
        self.norm = self.part.norm(U)

    @property
    def rank(self) -> int:
        """Of the update; 0 without one."""
        return 0 if self.low is None else self.low.A.shape[0]

    @property
    def factor(self) -> Tensor | None:
        """C (out,), or None; asked for once the norm is known."""
        if self.magnitude is not None:
            assert self.norm is not None
            return self.magnitude.detach().to(self.norm.dtype) / self.norm
        return None if self.low is None else self.low.out_scale

    def gradients(self, dA: Tensor | None, dB: Tensor | None, dc: Tensor | None) -> list[Tensor]:
        """Of what is trained, in its order and dtypes, given those of A, B and c."""
        if self.low is None:
            return []
        last = self.low.out_scale
        if self.norm is not None and dc is not None:
            last, dc = self.magnitude, dc / self.norm
        result = []
        for tensor, gradient in zip((self.low.A, self.low.B, last), (dA, dB, dc), strict=True):
            # Whether it is trained may have changed since.
            if any(tensor is one for one in self.trained):
                assert tensor is not None and gradient is not None
                result.append(gradient.to(tensor.dtype))
        return result


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
    found = _combined(site)
    if isinstance(found, str):
        return found
    low, part = found
    if low is None:
        return Fused(site.weight, bias, None)
    magnitude = None if part is None else part.magnitude
    scale = low.out_scale if part is None else magnitude
    tensors = [low.A, low.B, *([] if scale is None else [scale])]
    return Fused(site.weight, bias, low, [tensor for tensor in tensors if tensor.requires_grad], part, magnitude)


def _combined(site: AdaptedSite) -> tuple[LowRank | None, Any] | str:
    """What is active as one, and the part that is still to be normed."""
    factors: list[tuple[LowRank, float, Any]] = []
    for part, weight in site.chosen():
        if part.replaces or hasattr(part, "prepare") or part.shift() is not None:
            return "an adapter is more than low-rank factors"
        unnormed = part.factors_to_norm() if hasattr(part, "factors_to_norm") else None
        low = unnormed or part.low_rank()
        if low is None or low.A.dim() != 2:
            return "an adapter has no low-rank factors"
        if part.training and part.dropout:
            return "an adapter has dropout"
        factors.append((low, weight, part if unnormed is not None else None))
    if not factors:
        return None, None
    scaled = [low.out_scale is not None or part is not None for low, _, part in factors]
    if len(factors) == 1:
        low, weight, part = factors[0]
        if scaled[0] and weight != 1:
            return "a DoRA is weighted"
        return LowRank(low.A, low.B, low.scale * weight, low.out_scale), part
    if any(scaled):
        return "several adapters with magnitudes are active"
    A = torch.cat([low.A for low, _, _ in factors])
    B = torch.cat([low.B * (low.scale * weight) for low, weight, _ in factors], dim=1)
    return LowRank(A, B, 1.0), None


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
