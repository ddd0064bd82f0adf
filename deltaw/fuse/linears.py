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
