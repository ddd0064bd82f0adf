"""A 4-bit weight that stands where a parameter stood: the module around it keeps its class and its forward.

An `NF4Tensor` looks like the matrix it stands for (shape, dtype, device, count of elements) and holds an `NF4Weight`.
Products with it go through one autograd function each, which keep no dequantised weight between forward and backward.
Any other operation that only reads it gets the dequantised matrix; one that would write to it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from deltaw.core.errors import InputError
from deltaw.kernels.nf4 import NestedScales
from deltaw.quant.weight import NF4Weight

_aten = torch.ops.aten


class NF4Tensor(torch.Tensor):
    """A matrix in 4-bit NormalFloat, frozen.

    Attributes:
        packed: the weight. For a linear its W (out, in) is the tensor itself; an embedding's is (vocab, dim).
        transposed: the tensor is the packed matrix' transpose, as GPT-2's Conv1D stores its weight (in, out).
    """

    packed: NF4Weight
    transposed: bool

    @staticmethod
    def __new__(cls, packed: NF4Weight, transposed: bool = False) -> NF4Tensor:
        """Wraps a weight; nothing is copied."""
        shape = packed.shape[::-1] if transposed else packed.shape
        made: NF4Tensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=packed.dtype, device=packed.device, requires_grad=False
        )
        return made

    def __init__(self, packed: NF4Weight, transposed: bool = False) -> None:
        self.packed = packed
        self.transposed = transposed

    def dequantize(self) -> Tensor:
        """The dense matrix, in the tensor's dtype and layout."""
        matrix = self.packed.dequantize()
        return matrix.t() if self.transposed else matrix

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape, dtype and bytes instead of values."""
        return f"NF4Tensor({tuple(self.shape)}, {self.dtype}, {self.packed.nbytes:,} bytes on {self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """The names of the inner tensors, for torch's tools that take subclasses apart."""
        return list(self.packed.tensors()), (self.packed, self.transposed)

    def __getattr__(self, name: str) -> Tensor:
        # Only reached for what is no attribute: the inner tensors by the names `__tensor_flatten__` gives.
        packed: NF4Weight | None = self.__dict__.get("packed")
        inner = packed.tensors() if packed is not None else {}
        if name in inner:
            return inner[name]
        raise AttributeError(f"'NF4Tensor' object has no attribute {name!r}")

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any) -> NF4Tensor:
        """Puts inner tensors together again."""
        packed, transposed = context
        return NF4Tensor(packed.with_tensors(inner), transposed)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Products and lookups have ways of their own; all else goes on to `__torch_dispatch__`."""
        own = _FUNCTIONS.get(func)
        if own is not None:
            found = own(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What moves, copies or views the whole tensor keeps it in 4 bits; what reads it gets dense values."""
        kwargs = kwargs or {}
        own = _OPERATIONS.get(func)
        if own is not None and isinstance(args[0], NF4Tensor):
            return own(func, *args, **kwargs)
        if func._schema.is_mutable and any(isinstance(a, NF4Tensor) for a in _written(func, args, kwargs)):
            raise NotImplementedError(f"{func} would write into a 4-bit weight, which is frozen: dequantise it first")
        return func(*tree_map(dense, args), **tree_map(dense, kwargs))


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """The arguments that an operation writes to."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from value if isinstance(value, (list, tuple)) else [value]


def dense(value: Any) -> Any:
    """The dense matrix of an `NF4Tensor`, laid out as its strides say; any other value as it is."""
    return value.dequantize().contiguous() if isinstance(value, NF4Tensor) else value


# Products, below which autograd sees one function.


class _Product(torch.autograd.Function):
    """X W^T + b, or X W for a weight that is used the other way round; W frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: NF4Weight, forwards: bool) -> Tensor:  # type: ignore[override]
        ctx.weight, ctx.forwards = weight, forwards
        if forwards:
            return weight.matmul(x, bias)
        out = weight.t_matmul(x)
        return out if bias is None else out + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = ctx.weight.t_matmul(grad) if ctx.forwards else ctx.weight.matmul(grad)
        if ctx.needs_input_grad[1]:
            db = grad.reshape(-1, grad.shape[-1]).sum(0)
        return dx, db, None, None


def _product(x: Tensor, weight: NF4Tensor, bias: Tensor | None, *, forwards: bool) -> Tensor:
    """X M^T + b (forwards) or X M + b, where M is the tensor as it looks."""
    if weight.requires_grad and torch.is_grad_enabled():
        raise InputError(
            "a weight held in 4 bits is frozen and cannot want a gradient: adapt it, or load it in 16 bits"
        )
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    made: Tensor = _Product.apply(x, bias, weight.packed, forwards != weight.transposed)
    return made


# Arguments have torch's names, since they may be given by name.


def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, NF4Tensor) or isinstance(input, NF4Tensor):
        return NotImplemented
    return _product(input, weight, bias, forwards=True)


def _matmul(input: Any, other: Any = None, *, mat2: Any = None, out: Any = None) -> Any:
    other = mat2 if other is None else other
    if isinstance(input, NF4Tensor) or not isinstance(other, NF4Tensor) or input.dim() < 2 or out is not None:
        return NotImplemented
    return _product(input, other, None, forwards=False)


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1, out: Any = None) -> Any:
    plain = isinstance(mat1, Tensor) and not isinstance(mat1, NF4Tensor) and not isinstance(input, NF4Tensor)
    if not plain or not isinstance(mat2, NF4Tensor) or input.dim() != 1 or (beta, alpha, out) != (1, 1, None):
        return NotImplemented
    return _product(mat1, mat2, input, forwards=False)


def _embedding(
    input: Any, weight: Any, padding_idx: Any = None, max_norm: float | None = None, *args: Any, **kwargs: Any
) -> Any:
    if not isinstance(weight, NF4Tensor) or weight.transposed:
        return NotImplemented
    # Padding and frequency matter to the gradient alone, and there is none; a maximal norm would rewrite the weight.
    if max_norm is not None:
        raise NotImplementedError("an embedding with max_norm rewrites its weight, which is frozen in 4 bits")
    if input.is_cpu and input.numel() and not 0 <= int(input.min()) <= int(input.max()) < len(weight):
        raise IndexError(f"got ids from {int(input.min())} to {int(input.max())}: expected 0 to {len(weight) - 1}")
    return weight.packed.take(input)


def _transpose(input: Any, dim0: int = 0, dim1: int = 1) -> Any:
    if {dim0 % 2, dim1 % 2} != {0, 1}:
        return NotImplemented
    return NF4Tensor(input.packed, not input.transposed)


def _set_item(weight: Any, *args: Any) -> Any:
    if not isinstance(weight, NF4Tensor):
        return NotImplemented
    raise NotImplementedError("a 4-bit weight is frozen: dequantise it to change values")


def _share_memory(weight: NF4Tensor) -> NF4Tensor:
    for inner in weight.packed.tensors().values():
        inner.share_memory_()
    return weight


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    Tensor.t: _transpose,
    torch.t: _transpose,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.T.__get__: _transpose,  # type: ignore[attr-defined]
    Tensor.__setitem__: _set_item,
    Tensor.share_memory_: _share_memory,
}


# Operations below autograd.


def _same(func: Any, weight: NF4Tensor, *args: Any, **kwargs: Any) -> NF4Tensor:
    return NF4Tensor(weight.packed, weight.transposed)


def _clone(func: Any, weight: NF4Tensor, *args: Any, **kwargs: Any) -> NF4Tensor:
    packed = weight.packed
    return NF4Tensor(packed.with_tensors({n: t.clone() for n, t in packed.tensors().items()}), weight.transposed)


def _to(func: Any, weight: NF4Tensor, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
    if dtype is not None and not dtype.is_floating_point:
        return weight.dequantize().to(device=device, dtype=dtype)
    return NF4Tensor(weight.packed.to(device, dtype), weight.transposed)


def _copy(func: Any, weight: NF4Tensor, source: Any, *args: Any, **kwargs: Any) -> NF4Tensor:
    if not isinstance(source, NF4Tensor) or _kind(source) != _kind(weight):
        raise NotImplementedError(f"a 4-bit weight takes the values of one of its own kind, not of {source!r:.80}")
    for name, inner in source.packed.tensors().items():
        if name != "nested_code":
            weight.packed.tensors()[name].copy_(inner)
    return weight


def _as_strided(func: Any, weight: NF4Tensor, size: Any, stride: Any, offset: int | None = None) -> Tensor:
    # FSDP2 asks for the whole of a gathered weight in this way.
    if (tuple(size), tuple(stride), offset or 0) == (tuple(weight.shape), weight.stride(), 0):
        return _same(func, weight)
    found: Tensor = func(dense(weight), size, stride, offset)
    return found


def _kind(weight: NF4Tensor) -> Any:
    packed = weight.packed
    return packed.shape, weight.transposed, packed.block_size, packed.double_quant


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    _aten.copy_.default: _copy,
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.as_strided.default: _as_strided,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to,
}


# What `torch.save` wrote of these, `torch.load` reads again without being told to trust the file.
torch.serialization.add_safe_globals([NF4Tensor, NF4Weight, NestedScales])


def frozen(packed: NF4Weight, *, transposed: bool = False) -> nn.Parameter:
    """The parameter to put into a module."""
    return nn.Parameter(NF4Tensor(packed, transposed), requires_grad=False)
