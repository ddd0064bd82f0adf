"""What travels between a server and its clients: the trained tensors by key, and updates that are carried beside them.

A key is `<path of the module>:<name of the tensor in its part>`, such as
`model.layers.0.self_attn.q_proj:lora_A` or `classifier:out_proj.weight`. A *site* is a path that has both
`:lora_A` (r, in) and `:lora_B` (out, r).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from deltaw.core.protocols import LowRank


@dataclass(frozen=True)
class GlobalState:
    """The server's model between rounds, and what clients begin a round with.

    Attributes:
        tensors: every tensor of the adapter by key, frozen factors among them, float32 on the CPU.
        carried: by site, an update of the frozen weight that stands beside the adapter and is not trained.
    """

    tensors: Mapping[str, Tensor]
    carried: Mapping[str, LowRank] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """What the tensors of a state are.

    Attributes:
        shapes: of every tensor by key.
        scales: by site, the factor of its product B A (alpha/r or its like).
        method: the adapter's method (`lora`, `dora`, ...).
        config: the method's configuration as plain values.
        frozen: keys that no client trains (LoRA-FA's A).
    """

    shapes: Mapping[str, tuple[int, ...]]
    scales: Mapping[str, float]
    method: str
    config: Mapping[str, object]
    frozen: frozenset[str] = frozenset()

    def sites(self) -> Iterator[tuple[str, str, str, float]]:
        """(path, key of A, key of B, scale) of every site, in the order of `scales`."""
        for path, scale in self.scales.items():
            yield path, f"{path}:lora_A", f"{path}:lora_B", scale
