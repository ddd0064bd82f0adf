"""A frozen matrix in 4-bit NormalFloat: codes, scales, and what methods and merging ask of a base weight.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, equations 5 and 6. W (out, in) is
taken row by row as one flat sequence of blocks of 64, which may straddle rows:

    W_j = code[q_j] absmax_i,  i = j // 64        absmax_i = map[q8_i] absmax2_k + offset,  k = i // 256

4 bits a value, and for the scales 32/64 = 0.5 more, or with double quantisation 8/64 + 32/(64 256) = 0.127.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.core.errors import InputError
from deltaw.kernels.nf4 import NestedScales, dequantize_4bit, quantize_4bit, quantize_8bit
from deltaw.quant.codebooks import dynamic_code, nf4_code


@dataclass(frozen=True)
class NF4Weight:
    """W (out, in) in 4 bits; a `BaseWeight`.

    Attributes:
        codes: (ceil(out in / 2),) uint8, two indices a byte, the earlier in the high half.
        scales: (blocks,) float32, or their 8-bit form.
        shape: (out, in).
        dtype: of the values; float32 arithmetic is rounded to it once.
        block_size: values that share a scale.
    """

    codes: Tensor
    scales: Tensor | NestedScales
    shape: tuple[int, int]
    dtype: torch.dtype
    block_size: int = 64

    @classmethod
    def quantize(
        cls,
        W: Tensor,
        *,
        double_quant: bool = True,
        block_size: int = 64,
        dtype: torch.dtype | None = None,
        name: str = "the weight",
    ) -> NF4Weight:
        """The nearest codes, with the largest magnitude of each block as its scale.

        Args:
            W: (out, in), of a floating dtype, contiguous or not.
            double_quant: whether the scales are stored in 8 bits.
            block_size: values that share a scale.
            dtype: of the values later; None means W's.
            name: for the error.

        Raises:
            InputError: W is no matrix, or holds a NaN or an infinity.
        """
        if W.dim() != 2:
            raise InputError(f"cannot quantise {name} of shape {tuple(W.shape)}: expected a matrix (out, in)")
        codes, absmax = quantize_4bit(W.detach(), nf4_code(W.device), block_size=block_size)
        if not bool(torch.isfinite(absmax).all()):
            bad = int((~torch.isfinite(W)).sum())
            raise InputError(f"cannot quantise {name}: {bad:,} of its {W.numel():,} values are NaN or infinite")
        scales = nested_scales(absmax) if double_quant else absmax
        return cls(codes, scales, (W.shape[0], W.shape[1]), dtype or W.dtype, block_size)

    @classmethod
    def from_codes(
        cls, q: Tensor, scales: Tensor | NestedScales, *, dtype: torch.dtype, block_size: int = 64
    ) -> NF4Weight:
        """A weight from chosen indices (out, in), any integer dtype below 16, and scales."""
        flat = q.reshape(-1).to(torch.uint8)
        if len(flat) % 2:
            # The unused half of the last byte holds the code of 0, as quantising leaves it.
            flat = F.pad(flat, (0, 1), value=7)
        return cls((flat[::2] << 4) | flat[1::2], scales, (q.shape[0], q.shape[1]), dtype, block_size)

    @property
    def device(self) -> torch.device:
        """Where the codes live."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales; the codebooks are shared by all weights of a device."""
        return sum(tensor.nbytes for tensor in self.tensors().values()) - (
            self.scales.code.nbytes if isinstance(self.scales, NestedScales) else 0
        )

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return isinstance(self.scales, NestedScales)

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name."""
        if not isinstance(self.scales, NestedScales):
            return {"codes": self.codes, "absmax": self.scales}
        nested = self.scales
        return {
            "codes": self.codes,
            "absmax": nested.q,
            "nested_code": nested.code,
            "nested_absmax": nested.absmax,
            "offset": nested.offset,
        }

    def with_tensors(self, tensors: dict[str, Tensor]) -> NF4Weight:
        """The same weight of other tensors, named as `tensors` names them."""
        scales: Tensor | NestedScales = tensors["absmax"]
        if "offset" in tensors:
            scales = NestedScales(
                tensors["absmax"], tensors["nested_code"], tensors["nested_absmax"], tensors["offset"]
            )
        return replace(self, codes=tensors["codes"], scales=scales)

    def absmax(self) -> Tensor:
        """The scales as they count: (blocks,), float32."""
        return self.scales.values() if isinstance(self.scales, NestedScales) else self.scales

    def indices(self) -> Tensor:
        """The codes' indices: (out, in), uint8."""
        rows, columns = self.shape
        return torch.stack([self.codes >> 4, self.codes & 15], dim=1).flatten()[: rows * columns].view(rows, columns)

    def dequantize(
        self, rows: slice | None = None, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The rows of W (rows, in) in `dtype`; bit for bit what bitsandbytes makes of them.

        Args:
            rows: consecutive ones; None means all.
            dtype: of the result; None means `out`'s or else the weight's.
            out: (rows, in) of `dtype`, to write to, such as some rows and columns of a larger matrix: values side by
                side within rows, which lie any distance apart. None makes it, contiguous.

        Raises:
            InputError: an `out` that does not fit.
        """
        start, stop, step = (rows or slice(None)).indices(self.shape[0])
        assert step == 1, "rows are taken one after the other"
        columns = self.shape[1]
        count = max(stop - start, 0)
        dtype = dtype or (self.dtype if out is None else out.dtype)
        if out is not None and out.shape != (count, columns):
            raise InputError(f"out has shape {tuple(out.shape)}: expected ({count}, {columns})")
        values = dequantize_4bit(
            self.codes,
            nf4_code(self.device),
            self.scales,
            start=start * columns,
            stop=(start + count) * columns,
            dtype=dtype,
            block_size=self.block_size,
            out=out,
        )
        return values.view(count, columns) if out is None else out

    def take(self, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Chosen rows of W: index (...), integers, to (..., in)."""
        columns = self.shape[1]
        flat = index.reshape(-1, 1).long() * columns + torch.arange(columns, device=index.device)
        byte = self.codes[flat // 2]
        q = torch.where(flat % 2 == 0, byte >> 4, byte & 15)
        blocks = flat // self.block_size
        scales = self.scales.at(blocks) if isinstance(self.scales, NestedScales) else self.scales[blocks]
        values = nf4_code(self.device)[q.int()] * scales
        return values.to(dtype or self.dtype).view(*index.shape, columns)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X W^T + bias in x's dtype: (..., in) to (..., out). The dense W lives as long as the product takes."""
        return F.linear(x, self.dequantize(dtype=x.dtype), bias)

    def t_matmul(self, grad: Tensor) -> Tensor:
        """G W in the gradient's dtype: (..., out) to (..., in)."""
        return grad @ self.dequantize(dtype=grad.dtype)

    def absorbed(self, A: Tensor, B: Tensor, scale: float, out_scale: Tensor | None = None) -> NF4Weight:
        """W + scale B A, its rows times out_scale, quantised again in float32 arithmetic; W as it is computed with.

        Shapes: A (r, in), B (out, r), out_scale (out,).
        """
        total = self.dequantize().float()
        total.addmm_(B.detach().float(), A.detach().float(), alpha=scale)
        if out_scale is not None:
            total.mul_(out_scale.detach().float()[:, None])
        return NF4Weight.quantize(
            total, double_quant=self.double_quant, block_size=self.block_size, dtype=self.dtype, name="a merged weight"
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> NF4Weight:
        """On another device, or with values of another dtype; the codes are the same."""
        moved = self
        if device is not None and torch.device(device) != self.device:
            tensors = {name: tensor.to(device) for name, tensor in self.tensors().items() if name != "nested_code"}
            if isinstance(self.scales, NestedScales):
                tensors["nested_code"] = _shared(self.scales.code, tensors["codes"].device)
            moved = self.with_tensors(tensors)
        return moved if dtype is None else replace(moved, dtype=dtype)


def dequantize_all(weights: Sequence[NF4Weight], out: Tensor) -> Tensor:
    """The rows of several weights under one another in one buffer, for one product with an input that they share.

    Args:
        weights: each (rows_i, in).
        out: (sum of rows_i, in), as for `NF4Weight.dequantize`; the values are in its dtype.

    Raises:
        InputError: an `out` that does not fit.
    """
    columns = {weight.shape[1] for weight in weights}
    total = sum(weight.shape[0] for weight in weights)
    if out.dim() != 2 or columns != {out.shape[1]} or len(out) != total:
        shapes = ", ".join(str(weight.shape) for weight in weights)
        raise InputError(f"out of shape {tuple(out.shape)} for weights {shapes}: expected all rows, equally long")
    for weight, rows in zip(weights, out.split([weight.shape[0] for weight in weights]), strict=True):
        weight.dequantize(out=rows)
    return out


def nested_scales(absmax: Tensor) -> NestedScales:
    """Double quantisation: (blocks,) float32 scales less their mean, in 8 bits and blocks of 256."""
    offset = absmax.mean() if len(absmax) else absmax.new_zeros(())
    code = dynamic_code(True, absmax.device)
    q, nested = quantize_8bit(absmax - offset, code)
    return NestedScales(q, code, nested, offset)


def _shared(code: Tensor, device: torch.device) -> Tensor:
    """The map on a device: the one that all weights share where it is the format's own."""
    return dynamic_code(True, device) if torch.equal(code, dynamic_code(True, code.device)) else code.to(device)
