"""What all fused layers of a model share, what was found out about each, and what each keeps of a batch."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from deltaw.core.protocols import packed_of
from deltaw.fuse.call import Norm, Passed
from deltaw.fuse.host_memory import HostMemory, rates
from deltaw.fuse.keep import KEEPS, Keep, Room, bridges, kept_bytes, planned, told
from deltaw.fuse.store import Store
from deltaw.kernels.memory import ROW_BYTES

PROJECTIONS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
#: What layers keep, of how many decoded weights stay, and of how many until the next pass.
_Plan = tuple[list[Keep], int, int]
#: Of a layer's products forward, what attention has to cost for its output to be worth the bus and host memory.
LEAST_SHARE = 0.1


@dataclass
class Fusion:
    """What all fused layers of a model share.

    Attributes:
        keep: the same for all layers; None: chosen by `room`.
        room: the memory there is.
        layers: how many are fused.
        say: takes a line about the plan of each batch longer than those before.
        host: where inputs go that are kept in host memory.
        fp8: names of the linears whose products are made in 8-bit floats, backward.
        fp8_forward: those of which forward too.
        by_flash: whether attention goes to FlashAttention 4 where that takes it.
        store: weights and factors as the linears' products take them.
        handed: see `Call`.
        passed: see `Call`.
        firsts: by layer, the norm that it begins with.
        plans: by tokens of a batch, what each layer keeps.
        far: by tokens of a batch and of a row, whether attention's output goes where inputs go.
        held_layers: of how many layers decoded weights may stay, whatever the batch.
        bridged: of how many until the next forward pass.
    """

    keep: Keep | None
    room: Room
    layers: int = 0
    say: Callable[[str], None] = lambda line: None
    fp8: frozenset[str] = frozenset()
    fp8_forward: frozenset[str] = frozenset()
    by_flash: bool = False
    store: Store = field(default_factory=Store)
    handed: list[Tensor] = field(default_factory=list)
    passed: list[Passed] = field(default_factory=list)
    firsts: dict[int, Norm] = field(default_factory=dict)
    host: HostMemory = field(default_factory=HostMemory)
    plans: dict[int, list[Keep]] = field(default_factory=dict)
    far: dict[tuple[int, int], bool] = field(default_factory=dict)
    held_layers: int = sys.maxsize
    bridged: int = sys.maxsize

    def of(self, layer: Layer, x: Tensor, *, masked: bool = False) -> Keep:
        """What a layer keeps of this batch; a mask is among what attention keeps."""
        if self.keep is not None:
            return self.keep
        if not x.is_cuda:
            return "all"
        tokens = x.numel() // x.shape[-1]
        if tokens not in self.plans:
            # As if nothing were held: what is kept saves more for its bytes.
            again, along = (
                self.room.left(x.device, layer.working_bytes(tokens, again=again)) + self.store.held_bytes
                for again in (True, False)
            )
            plan, self.held_layers, bridged = self._best(layer, tokens, again, along, x.device)
            self.plans[tokens], self.bridged = plan, min(self.bridged, bridged)
            self.store.hold(self.held_layers, self.layers, narrow=bool(self.fp8), bridged=self.bridged)
            # Of shorter batches nobody wants to hear.
            if tokens == max(self.plans):
                kept = self.layers if self.store.narrow is not None else len(self.store.holds)
                held = f"; decoded weights of {kept} stay" if kept else ""
                if self.store.bridges:
                    held += f"{',' if kept else '; decoded weights'} of {len(self.store.bridges)} until the next pass"
                words = told([self._where(keep, layer, x, masked) for keep in plan])
                self.say(f"batches of {tokens:,} tokens: {words}{held}")
        return self._where(self.plans[tokens][layer.index], layer, x, masked)

    def _best(self, layer: Layer, tokens: int, again: int, along: int, device: torch.device) -> _Plan:
        """A plan with the most saved.

        With host memory for products that would be made again; copies cost too much to save less than that.
        """
        cost = {keep: layer.bytes_of(keep, tokens) for keep in KEEPS}.__getitem__
        best = self._plan(layer, tokens, cost, again, along, ())
        if "host" in best[0] or _wide(best[0]) == self.layers:
            return best
        spots = layer.spots(tokens, device)
        # The products of one layer are on the card beside what is counted, leaving or back early.
        again, along = (left - layer.products_bytes(tokens) for left in (again, along))
        for count in range(1, len(spots) + 1):
            best = max(best, self._plan(layer, tokens, cost, again, along, spots[-count:]), key=_saved)
            if _wide(best[0]) == self.layers:
                break
        return best

    def _plan(
        self,
        layer: Layer,
        tokens: int,
        cost: Callable[[Keep], int],
        again: int,
        along: int,
        away: Container[int],
    ) -> _Plan:
        for moved in (0, layer.moved_bytes(tokens)):
            plan, left = planned(self.layers, again - moved, along - moved, cost, away)
            if "host" not in plan:
                break
        holds, each = self.room.holds and layer.decodes, layer.held_bytes
        if self.fp8:
            # 8-bit weights stay of all layers or of none.
            return plan, self.layers if holds and self.layers <= min(self.held_layers, left // each) else 0, 0
        if not holds:
            return plan, 0, 0
        held = max(0, min(self.held_layers, left // each, self.layers))
        room = along if _wide(plan) == self.layers else min(again, along) - moved
        return plan, held, bridges([cost(keep) for keep in plan], each, room - held * each)

    def _where(self, keep: Keep, layer: Layer, x: Tensor, masked: bool) -> Keep:
        """Whether what goes to the host goes alone."""
        if keep != "host" or masked:
            return keep
        length, tokens = x.shape[1], x.numel() // x.shape[-1]
        if (tokens, length) not in self.far:
            self.far[tokens, length] = self._far(layer, tokens, length)
        return "host-attention" if self.far[tokens, length] else "host"

    def _far(self, layer: Layer, tokens: int, length: int) -> bool:
        """Whether making attention again would take long, and there is host memory for its output."""
        shapes = layer.shapes
        attention = length * shapes["q"][0]
        taken = self.layers * tokens * shapes["q"][0] * layer.norms[0].weight.element_size()
        enough = attention >= LEAST_SHARE * sum(rows * columns for rows, columns in shapes.values())
        return enough and taken <= _host_bytes()


@dataclass
class Layer:
    """What was found out about one layer."""

    module: Any
    index: int
    head_dim: int
    activation: str
    norms: tuple[Norm, Norm]
    head_norms: tuple[Norm, Norm] | None
    fusion: Fusion

    def bytes_of(self, keep: Keep, tokens: int) -> int:
        """Bytes of what is kept."""
        shapes = self.shapes
        return kept_bytes(
            keep,
            tokens,
            width=shapes["q"][1],
            inner=shapes["gate"][0],
            heads=shapes["q"][0] // self.head_dim,
            kv_heads=shapes["k"][0] // self.head_dim,
            head_dim=self.head_dim,
            itemsize=self.norms[0].weight.element_size(),
            scaled=_has_magnitudes(self.module),
            head_norms=self.head_norms is not None,
        )

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) by projection."""
        return {name: tuple(self.module.get_submodule(path).weight.shape) for name, path in PROJECTIONS.items()}

    @property
    def decodes(self) -> bool:
        """Whether weights are decoded, or made narrower, to be multiplied."""
        packed = (packed_of(self.module.get_submodule(path).weight) for path in PROJECTIONS.values())
        return bool(self.fusion.fp8) or any(weight is not None for weight in packed)

    @property
    def held_bytes(self) -> int:
        """Of the weights as products take them: in 8 bits by rows or by columns, or decoded; with room behind rows."""
        itemsize, total = self.norms[0].weight.element_size(), 0
        for name, (rows, columns) in self.shapes.items():
            packed = packed_of(self.module.get_submodule(PROJECTIONS[name]).weight) is not None
            forward = 1 if name in self.fusion.fp8_forward else itemsize if packed else 0
            if forward:
                total += rows * (columns * forward + ROW_BYTES)
            if name in self.fusion.fp8:
                total += columns * (rows + ROW_BYTES)
        return total

    def moved_bytes(self, tokens: int) -> int:
        """Of what one layer keeps on the host: some of another layer's is on the card, on its way."""
        shapes = self.shapes
        return (shapes["q"][1] + shapes["q"][0]) * tokens * self.norms[0].weight.element_size()

    def products_bytes(self, tokens: int) -> int:
        """Of gate and up."""
        return 2 * self.shapes["gate"][0] * tokens * self.norms[0].weight.element_size()

    def spots(self, tokens: int, device: torch.device) -> range:
        """Layers whose gate and up may wait in host memory: as far apart as a copy takes, and as many as have room."""
        weight, bytes_each = self.norms[0].weight, self.products_bytes(tokens)
        moved, computed = rates(device, weight.dtype)
        passes = sum(
            rows * columns / (2 if name in self.fusion.fp8_forward else 1)
            for name, (rows, columns) in self.shapes.items()
        )
        step = math.ceil(bytes_each / moved / (2 * passes * tokens / computed))
        # Pinned memory comes in powers of two.
        most = _host_bytes() >> (bytes_each - 1).bit_length()
        # The last layer's backward pass comes at once.
        found = range((self.fusion.layers - 2) % step, self.fusion.layers - 1, step)
        return found[max(0, len(found) - most) :]

    def working_bytes(self, tokens: int, *, again: bool = True) -> int:
        """Of the backward pass of one layer beside what it kept: its input alone, or with `again` False all wide ones.

        The second writes gradients over what was kept; dact, partial sums (up to rank 32 at most half of dact's bytes)
        and what passes between layers are new.
        """
        shapes = self.shapes
        inner, width = shapes["gate"]
        attention = 2 * (shapes["q"][0] + 2 * shapes["k"][0])
        columns = 3 * inner + 6 * width + attention if again else inner + inner // 2 + 4 * width
        # Gate and up are decoded together.
        total = columns * tokens + 2 * inner * width
        if self.fusion.fp8:
            # The widest group's weights by rows and by columns, and its input and gradient, a byte each.
            return total * self.norms[0].weight.element_size() + 4 * inner * width + (2 * inner + width) * tokens
        return total * self.norms[0].weight.element_size()


def _saved(plan: _Plan) -> tuple[int, ...]:
    """By which plans are compared: what is not made again, from the dearest on."""
    keeps, held, bridged = plan
    return _wide(keeps), keeps.count("attention"), held, bridged


def _wide(plan: Sequence[Keep]) -> int:
    """Layers that keep their wide products somewhere."""
    return sum(keep in ("all", "host-products") for keep in plan)


def _host_bytes() -> int:
    """Of host memory that may be taken: half of what is there, for all processes of a run on this machine."""
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return int(psutil.virtual_memory().available) // 2 // processes


def _has_magnitudes(module: Any) -> bool:
    """Whether a projection's adapter is a DoRA."""
    for path in PROJECTIONS.values():
        site = module.get_submodule(path)._modules.get("adapted")
        if site is not None and any(hasattr(part, "magnitude") for part, _ in site.chosen()):
            return True
    return False
