"""What lets floors meet without importing each other: a frozen weight and a low-rank update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class BaseWeight(Protocol):
    """A frozen weight as methods see it: always the matrix W of shape (out, in), however it is stored.

    A dense linear, GPT-2's transposed Conv1D, an embedding (whose W is (dim, vocab)) and a 4-bit weight look alike.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which values are computed; not the storage's."""

    @property
    def device(self) -> torch.device:
        """Where the storage lives."""

    @property
    def nbytes(self) -> int:
        """Bytes of storage, scales and codes included."""

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X W^T + bias: (..., in) to (..., out)."""

    def t_matmul(self, grad: Tensor) -> Tensor:
        """G W: (..., out) to (..., in)."""

    def dequantize(self, rows: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The rows of W as a dense tensor (rows, in); all rows when None. May share memory: never write to it."""


@dataclass(frozen=True)
class LowRank:
    """An update W' = diag(out_scale) (W + scale * B A); out_scale None means ones.

    Attributes:
        A: (r, in), or (experts, r, in).
        B: (out, r), or (experts, out, r).
        scale: alpha/r or its like, a number.
        out_scale: (out,), DoRA's m / ||W + scale B A||; None for every method whose update is a plain product.
    """

    A: Tensor
    B: Tensor
    scale: float
    out_scale: Tensor | None = None
