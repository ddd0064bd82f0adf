"""Sites: the modules of a model that an adapter can sit on, seen as matrices W of shape (out, in).

A site's weight is reached through its module at every use, never kept, so that moving, casting or sharding the model
afterwards leaves nothing stale behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core.errors import InputError
from deltaw.core.protocols import BaseWeight, packed_of, stored_bytes

Kind = Literal["linear", "conv1d", "embedding"]


class SiteWeight:
    """A module's weight as a `BaseWeight`: W (out, in) of a linear, a Conv1D (stored (in, out)) or an embedding.

    An embedding with weight (vocab, dim) is the matrix (dim, vocab) applied to one-hot columns. How the weight is
    stored is the parameter's own affair: a packed one (4 bits) answers for itself.
    """

    def __init__(self, module: nn.Module, kind: Kind) -> None:
        self.module = module
        self.kind = kind

    @property
    def stored(self) -> Tensor:
        """The parameter as the module stores it."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def matrix(self) -> Tensor:
        """W (out, in), a view of the parameter."""
        return self.stored if self.kind == "linear" else self.stored.t()

    @property
    def packed(self) -> BaseWeight | None:
        """The weight behind a packed parameter of a linear or Conv1D."""
        return None if self.kind == "embedding" else packed_of(self.stored)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.stored.shape
        return (rows, columns) if self.kind == "linear" else (columns, rows)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.stored.dtype

    @property
    def device(self) -> torch.device:
        """The parameter's device."""
        return self.stored.device

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter's storage."""
        return stored_bytes(self.stored)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X W^T + bias: (..., in) to (..., out)."""
        packed = self.packed
        return F.linear(x, self.matrix, bias) if packed is None else packed.matmul(x, bias)

    def t_matmul(self, grad: Tensor) -> Tensor:
        """G W: (..., out) to (..., in)."""
        packed = self.packed
        return grad @ self.matrix if packed is None else packed.t_matmul(grad)

    def dequantize(self, rows: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The rows of W (rows, in), cast when `dtype` is given; may share memory with the parameter."""
        packed = self.packed
        if packed is not None:
            return packed.dequantize(rows, dtype)
        matrix = self.values().t() if self.kind != "linear" else self.values()
        matrix = matrix if rows is None else matrix[rows]
        return matrix if dtype is None else matrix.to(dtype)

    def values(self) -> Tensor:
        """The parameter's values in its own layout, detached; dense also where it is packed."""
        stored = self.stored.detach()
        return stored if packed_of(stored) is None else stored.dequantize()

    def take(self, index: Tensor) -> Tensor:
        """Chosen rows of the parameter as it is stored: (n,) to (n, columns), detached."""
        packed: Any = packed_of(self.stored)
        if packed is None or self.kind == "conv1d":
            return self.values()[index]
        rows: Tensor = packed.take(index)
        return rows


@dataclass(frozen=True)
class Site:
    """One module that can be adapted.

    Attributes:
        name: its path in the model, as `named_modules` gives it.
        module: the module itself.
        kind: what it is; a linear's input is (..., in), an embedding's are token ids (...).
        weight: its frozen weight.
    """

    name: str
    module: nn.Module = field(repr=False)
    kind: Kind
    weight: SiteWeight = field(repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape


def kind_of(module: nn.Module) -> Kind | None:
    """What an adapter would see in `module`, or None where no adapter can sit."""
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return "conv1d"
    # The output projection of torch's own multi-head attention is read by its parent and never called itself.
    if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return None


def site_of(name: str, module: nn.Module) -> Site:
    """The site of one module.

    Raises:
        InputError: the module is not of a kind that can be adapted.
    """
    kind = kind_of(module)
    if kind is None:
        children = [child for child, _ in module.named_children()]
        inside = f"; name one of its parts instead: {', '.join(children[:8])}" if children else ""
        raise InputError(
            f"cannot adapt {name!r}: it is a {type(module).__name__}, not a linear, Conv1D or embedding{inside}"
        )
    if not isinstance(module.weight, Tensor) or not module.weight.is_floating_point():
        raise InputError(f"cannot adapt {name!r}: the weight of its {type(module).__name__} is not of a floating type")
    if kind == "embedding":
        assert isinstance(module, nn.Embedding)
        custom = type(module).forward is not nn.Embedding.forward and not hasattr(module, "embed_scale")
        if custom or module.max_norm is not None or module.sparse:
            raise InputError(
                f"cannot adapt {name!r}: {type(module).__name__} with a forward of its own, max_norm or sparse weights"
            )
    return Site(name, module, kind, SiteWeight(module, kind))


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without the modules that adapters have added."""
    for name, module in model.named_modules():
        if "adapted" not in name.split("."):
            yield name, module


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that maps hidden states to logits of the vocabulary, where the model has one."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if getter is not None else None
    except NotImplementedError:
        return None
    return head if isinstance(head, nn.Module) else None


def fused_experts(model: nn.Module) -> list[str]:
    """Names of 3-D expert parameters, which no target of linear modules reaches."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and "adapted" not in name.split(".") and ".experts." in f".{name}"
    ]


#: Names of the modules on top of a model that are new for a task and so are trained whole.
TASK_HEADS = ("score", "pre_classifier", "classifier", "qa_outputs", "classification_head")


def task_heads(model: nn.Module) -> list[str]:
    """Paths of a classification model's freshly initialised head, [] for a language model."""
    if not any(part in type(model).__name__ for part in ("ForSequenceClassification", "ForTokenClassification")):
        return []
    return [name for name, _ in model.named_children() if name in TASK_HEADS]
