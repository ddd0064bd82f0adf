"""What lets floors meet without importing each other: a frozen weight and a low-rank update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

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


class AbsorbingWeight(BaseWeight, Protocol):
    """A weight stored in few bits, which an update is rounded into."""

    def absorbed(self, A: Tensor, B: Tensor, scale: float, out_scale: Tensor | None = None) -> BaseWeight:
        """W + scale B A, its rows times out_scale, rounded to what W is stored in: A (r, in), B (out, r)."""


def packed_of(parameter: Any) -> BaseWeight | None:
    """The weight behind a parameter that is stored in some other way than by its values; None for a plain one.

    Such a parameter is a tensor subclass with an attribute `packed`, the matrix (out, in) of the module that it is the
    weight of (an embedding's is (vocab, dim)), and with `dequantize()`, its values in its own layout.
    """
    packed: BaseWeight | None = getattr(parameter, "packed", None)
    return packed


def stored_bytes(parameter: Tensor) -> int:
    """Bytes that a parameter's storage takes."""
    packed = packed_of(parameter)
    return parameter.numel() * parameter.element_size() if packed is None else packed.nbytes


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
