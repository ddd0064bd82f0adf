"""Numerics of low-rank updates from their factors alone; no (out, in) product is ever formed.

With B = Q_B R_B and A^T = Q_A R_A (thin QR), the update scale B A is Q_B C Q_A^T with the small core

    C = scale R_B R_A^T,    C = U S V^T,    scale B A = (Q_B U) S (Q_A V)^T

whose singular values and Frobenius norm are the update's own. A weighted sum of updates is one of the summed rank, so
the distance of two updates is the norm of a difference that has factors too. (|X|^2 - 2 <X, Y> + |Y|^2 would be cheaper
and lose half of the digits where X is close to Y.) Everything is computed in float64 on the CPU.

Symbols: A (r, in), B (out, r), s the singular values, falling. `LowRank.out_scale` is left aside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaw.core.protocols import LowRank


def wide(tensor: Tensor) -> Tensor:
    """The values in float64 on the CPU."""
    return tensor.detach().to("cpu", torch.float64)


def of_matrix(W: Tensor) -> LowRank:
    """A dense matrix (out, in) as a trivial product, for the functions below."""
    return LowRank(W, torch.eye(W.shape[0], dtype=W.dtype, device=W.device), 1.0)


def stacked(lows: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The weighted sum of updates of one shape, exactly, as one of the summed rank; scales and weights go into A."""
    A = torch.cat([wide(low.A) * (low.scale * weight) for low, weight in zip(lows, weights, strict=True)])
    return LowRank(A, torch.cat([wide(low.B) for low in lows], dim=1), 1.0)


def _core(low: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    Q_B, R_B = torch.linalg.qr(wide(low.B))
    Q_A, R_A = torch.linalg.qr(wide(low.A).T)
    return Q_B, low.scale * (R_B @ R_A.T), Q_A


def svd(low: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), s (k,) and V (in, k) of scale B A = U diag(s) V^T, k = min(r, out, in)."""
    Q_B, core, Q_A = _core(low)
    U, s, Vh = torch.linalg.svd(core, full_matrices=False)
    return Q_B @ U, s, Q_A @ Vh.T


def singular_values(low: LowRank) -> Tensor:
    """The singular values of scale B A, falling: (min(r, out, in),)."""
    s: Tensor = torch.linalg.svdvals(_core(low)[1])
    return s


def norm(low: LowRank) -> float:
    """The Frobenius norm of scale B A."""
    return float(_core(low)[1].norm())


def inner(first: LowRank, second: LowRank) -> float:
    """The sum of the products of two updates' entries, as tr((B1^T B2) (A2 A1^T)) times their scales."""
    small = (wide(first.B).T @ wide(second.B)) * (wide(first.A) @ wide(second.A).T)
    return first.scale * second.scale * float(small.sum())


def distance(first: LowRank, second: LowRank) -> float:
    """The Frobenius norm of the difference of two updates, to nearly all digits of float64."""
    return norm(stacked([first, second], [1.0, -1.0]))


def truncated(low: LowRank, r: int, *, scale: float = 1.0) -> LowRank:
    """The nearest update of rank r at most (Eckart and Young), its factors balanced: sqrt(s / scale) on both sides.

    Returns:
        Factors in float64 of exactly rank min(r, out, in, low's), for the given scale.
    """
    U, s, V = svd(low)
    return _balanced(U[:, :r], s[:r], V[:, :r], scale)


def truncated_matrix(W: Tensor, r: int) -> LowRank:
    """`truncated` of a dense matrix (out, in), by the eigenvectors of its smaller Gram matrix.

    Several times faster than an SVD. What is given up, singular values below 1e-8 of the largest, is no part of a
    truncation that matters. Takes 8 (out in + 2 min(out, in)^2) bytes beside the matrix.
    """
    if W.shape[0] > W.shape[1]:
        low = truncated_matrix(W.T, r)
        return LowRank(low.B.T, low.A.T, 1.0)
    W = wide(W)
    U = torch.linalg.eigh(W @ W.T).eigenvectors.flip(1)[:, :r]
    rows = U.T @ W
    s = rows.norm(dim=1)
    return _balanced(U, s, (rows / s.clamp_min(torch.finfo(s.dtype).tiny)[:, None]).T, 1.0)


def _balanced(U: Tensor, s: Tensor, V: Tensor, scale: float) -> LowRank:
    root = (s / scale).sqrt()
    return LowRank((V * root).T.contiguous(), (U * root).contiguous(), scale)


def rank(low: LowRank) -> int:
    """How many singular values are above float64's rounding of the largest, as `matrix_rank` counts them."""
    s = singular_values(low)
    return int((s > s[0] * max(low.B.shape[0], low.A.shape[1]) * torch.finfo(s.dtype).eps).sum())


def effective_rank(s: Tensor) -> float:
    """exp(H(p)), p = s^2 / sum s^2: how many directions share the update's energy; 0 for no update at all.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, with shares of the
    energy for theirs of the singular values.
    """
    energy = s.square()
    if not energy.sum() > 0:
        return 0.0
    return float(torch.special.entr(energy / energy.sum()).sum().exp())


def stable_rank(s: Tensor) -> float:
    """Sum s^2 / max s^2; 0 for no update at all."""
    return float(s.square().sum() / s[0].square()) if s[0] > 0 else 0.0


def energy_kept(s: Tensor, r: int) -> float:
    """The share of sum s^2 that the first r singular values hold; 1 for no update at all."""
    energy = s.square()
    return float(energy[:r].sum() / energy.sum()) if energy.sum() > 0 else 1.0


def rank_for_energy(s: Tensor, share: float) -> int:
    """The smallest rank, at least 1, that keeps a share of sum s^2."""
    energy = s.square().cumsum(0)
    # The last sum is the whole, so a share of 1 is reached whatever the rounding.
    return min(int((energy < share * energy[-1]).sum()) + 1, len(s))
