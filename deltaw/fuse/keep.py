"""What fused layers keep for the backward pass, chosen by how much memory there is.

Every layer keeps at least its input, on the device or in host memory. What more there is room for buys time: first the
MLP's two wide products with all before them, layer by layer from the last one on, whose backward pass comes first; what
is left over then, attention's tensors. The wide products are the most of it, and of some layers they may wait in host
memory: of as many as the bus can move while the others compute.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch

from deltaw.kernels.linear_cross_entropy import CHUNK_BYTES_CUDA

#: See `block.py`.
Keep = Literal["all", "attention", "host-products", "input", "host", "host-attention"]
KEEPS: tuple[Keep, ...] = ("all", "attention", "host-products", "input", "host", "host-attention")
#: Of the card's memory, what allocators lose to gaps; and of a budget, what nobody counted.
SLACK, BUDGET_SLACK = 0.02, 0.01
#: What the loss takes: a chunk of logits, which becomes its gradient in place, and hidden states.
HEAD_BYTES = CHUNK_BYTES_CUDA * 5 // 4


@dataclass(frozen=True)
class Room:
    """How much memory there is for what layers keep.

    Attributes:
        budget_bytes: that the process may have allocated at its peak; None: whatever the card has.
        later_bytes: that will be allocated after the first forward pass and stay: gradients and optimizer states.
        head_bytes: the loss takes at its peak.
        holds: whether weights as products take them, decoded or in 8 bits, may stay where room is left over.
    """

    budget_bytes: int | None = None
    later_bytes: int = 0
    head_bytes: int = 0
    holds: bool = False

    def left(self, device: torch.device, working_bytes: int) -> int:
        """Bytes for kept tensors, where the backward pass of one layer takes `working_bytes` beside them."""
        held = torch.cuda.memory_allocated(device)
        if self.budget_bytes is None:
            free, _ = torch.cuda.mem_get_info(device)
            budget = int((free + torch.cuda.memory_reserved(device)) * (1 - SLACK))
        else:
            budget = int(self.budget_bytes * (1 - BUDGET_SLACK))
        return budget - held - self.later_bytes - max(working_bytes, self.head_bytes)


def choose(layers: int, left_bytes: int, cost: Callable[[Keep], int], away: Container[int] = ()) -> list[Keep]:
    """What each layer keeps.

    Args:
        layers: how many there are.
        left_bytes: for all that is kept.
        cost: bytes of a layer's kept tensors.
        away: layers whose wide products wait in host memory, where they are kept.

    Returns:
        By layer, from the first. Where not even all inputs fit, they are in host memory, but for layers that keep more.
    """
    fits = layers * cost("input") <= left_bytes
    least: Keep = "input" if fits else "host"
    left = left_bytes - layers * cost(least)
    chosen: list[Keep] = [least] * layers
    levels: tuple[Keep, ...] = ("all", "attention")
    for level in levels:
        for index in reversed(range(layers)):
            wanted: Keep = "host-products" if level == "all" and index in away else level
            more = cost(wanted) - cost(least)
            if chosen[index] == least and more <= left:
                chosen[index] = wanted
                left -= more
    return chosen


def planned(
    layers: int, again_bytes: int, along_bytes: int, cost: Callable[[Keep], int], away: Container[int] = ()
) -> tuple[list[Keep], int]:
    """What each layer keeps, and how many bytes are left over.

    Layers that make much again need more memory in their backward pass; but those that keep most are the last ones,
    and what they kept is gone by then.

    Args:
        layers: how many there are.
        again_bytes: for all that is kept, during the backward pass of a layer that makes everything again.
        along_bytes: the same of one that keeps its wide products.
        cost: bytes of a layer's kept tensors.
        away: as for `choose`.
    """

    def left(plan: Sequence[Keep]) -> int:
        others = [index for index, keep in enumerate(plan) if keep not in ("all", "host-products")]
        before = sum(map(cost, plan[: others[-1] + 1])) if others else 0
        return min(along_bytes - sum(map(cost, plan)), again_bytes - before if others else along_bytes)

    plan = choose(layers, along_bytes, cost, away)
    if left(plan) < 0:
        plan = choose(layers, again_bytes, cost, away)
    return plan, left(plan)


def bridges(kept: Sequence[int], held_bytes: int, room_bytes: int) -> int:
    """Of how many layers, from the first, decoded weights may stay from a backward pass to the next forward pass.

    In both passes they take the place of what layers keep that have gone back already, or are still to come.

    Args:
        kept: bytes that each layer keeps.
        held_bytes: of a layer's decoded weights.
        room_bytes: for both.
    """
    before = list(accumulate(kept))
    for count in range(len(kept) - 1, 0, -1):
        if all(before[index] + (count - index) * held_bytes <= room_bytes for index in range(count)):
            return count
    return 0


def told(chosen: Sequence[Keep]) -> str:
    """A plan in words."""
    words = {
        "all": "keep all", "host-products": "keep gate and up on the host",
        "attention": "make the MLP again", "input": "keep their input", "host": "keep it on the host",
        "host-attention": "keep it and what attention made on the host",
    }  # fmt: skip
    counts = {level: chosen.count(level) for level in words if level in chosen}
    if len(counts) == 1:
        return f"all {len(chosen)} layers {words[next(iter(counts))]}"
    return ", ".join(f"{count} layers {words[level]}" for level, count in counts.items())


def kept_bytes(
    keep: Keep, tokens: int, *, width: int, inner: int, heads: int, kv_heads: int, head_dim: int, itemsize: int,
    scaled: bool = False, head_norms: bool = False,
) -> int:  # fmt: skip
    """Bytes of a layer's kept tensors on the device, the low-rank h's left out.

    Args:
        keep: what is kept.
        tokens: M.
        width: d.
        inner: of the MLP.
        heads: of the queries.
        kv_heads: of keys and values.
        head_dim: columns of a head.
        itemsize: bytes of a value.
        scaled: whether o and down have a c, whose z is kept.
        head_norms: whether queries and keys are kept unnormed too.
    """
    columns = width if keep == "input" else 0
    if keep in KEEPS[:3]:
        columns = 2 * width + 2 * (heads + kv_heads) * head_dim
        columns += 2 * width if scaled else 0
        columns += (heads + kv_heads) * head_dim if head_norms else 0
        columns += 2 * inner if keep == "all" else 0
    return columns * tokens * itemsize
