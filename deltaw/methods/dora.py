"""DoRA: a magnitude by rows, trained beside a low-rank change of direction.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, equations 5 and 11:

    W' = m (W + scale B A) / ||W + scale B A||        m (out,), norms by rows of W (out, in)

Its columns are the rows here: a linear's weight is stored (out, in), as PEFT takes it too, so that m has one entry for
each output. An embedding's W is (dim, vocab), and m (dim,). The norm is a constant in the backward pass (section 4.3).
It comes from the factored identity in `kernels/dora_linear.py`; neither B A nor W + B A is ever built. m starts at
||W||, so W' = W at first. With rsLoRA's scale it is rsDoRA, on a base in 4 bits QDoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltaw.core.configs import accepts, aliases_of
from deltaw.core.errors import InputError
from deltaw.core.protocols import BaseWeight, LowRank
from deltaw.kernels.dora_linear import dora_linear, row_norms, squared_row_norms
from deltaw.kernels.per_example import along, spread
from deltaw.methods.contract import Placed, Start
from deltaw.methods.lora import LoRA, LoraPart, attach_parts
from deltaw.models.sites import SiteWeight

#: Rows of an embedding that are read at a time.
_ROWS = 4096


@accepts(**aliases_of(LoRA))
@dataclass(frozen=True)
class DoRA(LoRA):
    """What a DoRA adapter is made of: LoRA's fields, and a magnitude for every output of every site."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_bias:
            raise InputError(
                "lora_bias does not go with DoRA, whose scale by rows is of the weight alone: leave it out"
            )


def _recomputes(out: int, columns: int) -> bool:
    """Whether a linear's output is computed again in the backward pass instead of being kept for m's gradient.

    Of a widening one, what follows keeps it anyway; of one that narrows to half or less, it is small and dear. Between
    the two stand the projections around attention and into the residual stream, which nothing else keeps.
    """
    return out <= columns < 2 * out


class _EmbeddingWeight:
    """An embedding's (dim, vocab) for norms: reads the stored (vocab, dim) in blocks of its own rows."""

    def __init__(self, weight: SiteWeight) -> None:
        self.weight = weight

    def _blocks(self) -> list[tuple[slice, Tensor]]:
        count = self.weight.shape[1]
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        spans = [slice(i, min(i + _ROWS, count)) for i in range(0, count, _ROWS)]
        device = self.weight.device
        return [(s, self.weight.take(torch.arange(s.start, s.stop, device=device)).to(wide)) for s in spans]

    def squared(self) -> Tensor:
        """||W||^2 by rows of (dim, vocab): (dim,)."""
        return torch.stack([block.square().sum(0) for _, block in self._blocks()]).sum(0)

    def times(self, A: Tensor) -> Tensor:
        """W A^T: A (r, vocab) to (dim, r)."""
        return torch.stack([block.t() @ A[:, s].t().to(block.dtype) for s, block in self._blocks()]).sum(0)


class DoraPart(LoraPart):
    """The factors A (r, in), B (out, r) and the magnitude m (out,) of one site."""

    def __init__(self, site: Any, *, dtype: torch.dtype | None, **options: Any) -> None:
        super().__init__(site, dtype=dtype, **options)
        # Never narrower than float32: m starts at the norm, and their ratio at exactly 1.
        wide = torch.promote_types(dtype or torch.float32, torch.promote_types(site.weight.dtype, torch.float32))
        self.magnitude = nn.Parameter(torch.ones(site.shape[0], device=site.weight.device, dtype=wide))
        self._squared: tuple[Any, ...] | None = None
        self._kept: Tensor | None = None
        self.is_steady = False

    def start_magnitude(self) -> None:
        """M as the norm of what the factors make of W now."""
        with torch.no_grad():
            self.magnitude.copy_(self.norm())

    def steady(self, on: bool) -> None:
        """Whether W, A and B stay as they are until this is called again, so that their norm may be kept."""
        self.is_steady, self._kept = on, None

    @property
    def _weight(self) -> SiteWeight:
        return SiteWeight(self._module, self.kind)

    def squared(self) -> Tensor:
        """||W||^2 by rows, (out,); kept as long as the module's weight is the one that it was made from."""
        weight = self._weight
        stored = weight.stored
        key = (stored, stored._version, stored.dtype, stored.device)
        known = self._squared
        if known is None or known[0] is not stored or known[1:4] != key[1:]:
            with torch.no_grad():
                made = _EmbeddingWeight(weight).squared() if self.kind == "embedding" else squared_row_norms(weight)
            self._squared = known = (*key, made)
        return cast(Tensor, known[4])

    def _factors(self) -> LowRank:
        low = super().low_rank()
        assert low is not None
        return low

    @torch.no_grad()
    def norm(self, U: Tensor | None = None) -> Tensor:
        """||W + scale B A|| by rows: (out,), float32 or wider; U is W A^T (out, r), where somebody has it."""
        if self._kept is not None:
            return self._kept
        low, weight, squared = self._factors(), self._weight, self.squared()
        A = low.A.detach()
        if U is None and self.kind == "embedding":
            U = _EmbeddingWeight(weight).times(A)
        elif U is None:
            U = weight.matmul(A.to(weight.dtype)).t()
        made = row_norms(squared, U, A, low.B, low.scale)
        self._kept = made if self.is_steady else None
        return made

    def factors_to_norm(self) -> LowRank | None:
        """A, B and the scale, where the norm is still to be computed: `norm` takes W A^T of who reads W anyway."""
        return self._factors() if self._kept is None else None

    def low_rank(self) -> LowRank | None:
        """A, B, the scale, and m over the norm by rows."""
        low = self._factors()
        norm = self.norm()
        return LowRank(low.A, low.B, low.scale, self.magnitude.to(norm.dtype) / norm)

    def alone(self, x: Tensor, base: BaseWeight, bias: Tensor | None) -> Tensor:
        """The whole output of a linear: (..., in) to (..., out)."""
        low = self._factors()
        y, norm = dora_linear(
            x,
            base,
            low.A,
            low.B,
            self.magnitude,
            self.squared(),
            scale=low.scale,
            norm=self._kept,
            bias=bias,
            dropout=self.dropout if self.training else 0.0,
            recompute=_recomputes(*base.shape),
        )
        if self.is_steady:
            self._kept = norm
        return y

    def update(self, x: Tensor, base_out: Tensor) -> Tensor:
        """(c - 1) W x + c scale B A x with c = m / norm, in `base_out`'s dtype."""
        norm = self.norm()
        c = along(spread(self.magnitude).to(norm.dtype) / norm, base_out, 1)
        bias = getattr(self._module, "bias", None)
        product = base_out if bias is None else base_out - bias
        low = super().update(x, base_out)
        return ((c - 1) * product + c * low).to(base_out.dtype)

    def delta(self, rows: slice | None = None) -> Tensor | None:
        """C (W + scale B A) - W, in float32 or wider."""
        low = super().delta(rows)
        assert low is not None
        part = rows or slice(None)
        c = (self.magnitude.detach() / self.norm())[part].to(low.dtype)
        W = self._weight.dequantize(part).to(low.dtype)
        return low.mul_(c[:, None]).add_(W * (c[:, None] - 1))

    def _keys(self) -> dict[str, Any]:
        return {**super()._keys(), ".lora_magnitude_vector": self.magnitude}


def attach(model: nn.Module, config: DoRA, start: Start) -> list[Placed]:
    """LoRA's parts with magnitudes, and what comes along with them."""
    placed = attach_parts(model, config, start, DoraPart)
    for item in placed:
        if isinstance(item.part, DoraPart):
            item.part.start_magnitude()
    return placed


def param_count(config: DoRA, kind: str, shape: tuple[int, int]) -> int:
    """N = r (in + out) + out."""
    return config.r * (shape[0] + shape[1]) + shape[0]
