"""What an adapter changes, as a table: sites, shapes, parameters and their share, bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from deltaw.core.errors import InputError
from deltaw.core.protocols import stored_bytes
from deltaw.methods.host import adapter_parameters, book_of, parts_of
from deltaw.methods.registry import method_of
from deltaw.models.sites import SiteWeight, fused_experts, kind_of


@dataclass(frozen=True)
class SiteSummary:
    """One adapted module: its matrix's shape (out, in), what sits on it, and the parameters that this trains."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    details: dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """What is adapted. `str()` gives a table.

    Attributes:
        adapter: name; method: its method.
        sites: one entry a part.
        trainable_parameters: of this adapter.
        base_parameters: of the model without adapters.
        adapter_bytes: of the tensors that are saved, what is not trained included (LoRA-FA's A, PiSSA's start).
        base_bytes: the model's without adapters.
        left_out: parameters that targets of modules cannot reach (fused experts).
    """

    adapter: str
    method: str
    sites: list[SiteSummary]
    trainable_parameters: int
    base_parameters: int
    adapter_bytes: int
    base_bytes: int
    left_out: list[str]

    @property
    def share(self) -> float:
        """Trainable parameters over all parameters, the adapter's included."""
        total = self.base_parameters + (0 if self.method == "full" else self.trainable_parameters)
        return self.trainable_parameters / total if total else 0.0

    def __str__(self) -> str:
        lines = [f"adapter {self.adapter!r} ({self.method})"]
        width = max((len(site.name) for site in self.sites), default=4)
        for site in self.sites:
            shape = " x ".join(map(str, site.shape))
            pairs = site.details.items()
            details = " ".join(
                f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in pairs
            )
            lines.append(f"  {site.name:<{width}}  {site.kind:<9} {shape:<15} {details:<16} {site.parameters:>12,}")
        lines.append(
            f"  {self.trainable_parameters:,} trainable of {self.base_parameters:,} in the base ({self.share:.2%}), "
            f"{self.adapter_bytes:,} bytes beside {self.base_bytes:,}"
        )
        if self.left_out:
            lines.append(f"  not adapted: {len(self.left_out)} fused-expert parameters ({self.left_out[0]}, ...)")
        return "\n".join(lines)


def summary(model: nn.Module, name: str | None = None) -> Summary:
    """What an adapter changes: sites, shapes, parameters and their share, bytes.

    Args:
        model: an adapted model.
        name: the adapter; None means the only active one.
    """
    book = book_of(model)
    if name is None:
        if len(book.active) != 1:
            raise InputError(
                f"{len(book.active)} adapters are active: say which of {', '.join(book.configs) or 'none'}"
            )
        (name,) = book.active
    parameters = adapter_parameters(model, name)
    seen: set[int] = set()
    sites = []
    for path, module, part in parts_of(model, name):
        fresh = [p for p in part.parameters() if id(p) not in seen]
        seen.update(map(id, fresh))
        kind = kind_of(module)
        shape = SiteWeight(module, kind).shape if kind else ()
        sites.append(
            SiteSummary(path, kind or type(module).__name__, shape, sum(p.numel() for p in fresh), part.described())
        )
    base = {key: p for key, p in model.named_parameters() if "adapted" not in key.split(".")}
    return Summary(
        adapter=name,
        method=method_of(book.configs[name]).name,
        sites=sites,
        trainable_parameters=sum(p.numel() for p in parameters.values()),
        base_parameters=sum(p.numel() for p in base.values()),
        adapter_bytes=_saved_bytes(model, name),
        base_bytes=sum(stored_bytes(p) for p in base.values()),
        left_out=fused_experts(model),
    )


def _saved_bytes(model: nn.Module, name: str) -> int:
    if method_of(book_of(model).configs[name]).trains_base:
        return sum(stored_bytes(p) for p in adapter_parameters(model, name).values())
    tensors = [tensor for _, _, part in parts_of(model, name) for tensor in part.tensors().values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
