"""Tensors of layers in host memory between the forward and the backward pass, moved beside the computation.

A layer's products take the card for longer than a copy of its input takes the bus, so on a stream of its own that costs
next to nothing (a bus that is busy throughout does cost, see `docs/performance.md`); on the way back the copy of the
next one that will be asked for is under way while the present one is used. Buffers are pinned once and used again.

Device memory is always that of the stream that computes, which waits for a copy before what was copied is let go, some
tensors later. So it can be used again at once, however far the host is ahead of the device; memory recorded for another
stream would come back only when the device gets there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Tensors whose copies to the host may be under way.
LEAVING = 3

#: Bytes of the copy, and width of the product, by which `rates` measures.
PROBE_BYTES, PROBE_WIDTH = 1 << 26, 4096


@dataclass(eq=False)
class Held:
    """One tensor: its copy in host memory; and while it leaves, or on its way back, the one on the device."""

    host: Tensor
    device: torch.device
    done: Any = None
    here: Tensor | None = None


class HostMemory:
    """Takes tensors in the order of the forward pass, and gives them back in any, fastest in the reverse one."""

    def __init__(self) -> None:
        self._free: dict[tuple[Any, ...], list[Tensor]] = {}
        self._held: list[Held] = []
        self._leaving: list[Held] = []
        self._streams: dict[torch.device, Any] = {}

    def put(self, tensor: Tensor, leaving: int = LEAVING) -> Held:
        """Starts copying a contiguous tensor, which nobody may write to any more.

        Args:
            tensor: the device may have it until its copy is done.
            leaving: tensors whose copies may be under way then.
        """
        key = (tensor.shape, tensor.dtype, tensor.device)
        spare = self._free.get(key)
        host = spare.pop() if spare else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        held = Held(host, tensor.device)
        if tensor.is_cuda:
            while len(self._leaving) >= leaving:
                self._let_go(self._leaving.pop(0))
            self._copy(held, host, tensor)
            held.here = tensor
            self._leaving.append(held)
        else:
            host.copy_(tensor)
        self._held.append(held)
        return held

    def take(self, held: Held) -> Tensor:
        """The tensor, on its device again."""
        if held in self._leaving:
            self._leaving.remove(held)
        self._fetch(held)
        result = held.here
        assert result is not None
        self.drop(held)
        self._free.setdefault((held.host.shape, held.host.dtype, held.device), []).append(held.host)
        # What is asked for next stays, or comes.
        while self._leaving and self._leaving[0] is not self._held[-1]:
            self._let_go(self._leaving.pop(0))
        if self._held:
            self._fetch(self._held[-1])
        return result

    def drop(self, held: Held) -> None:
        """Forgets a tensor that nobody will take any more, if it is still here."""
        if held in self._leaving:
            self._leaving.remove(held)
        self._let_go(held)
        if held in self._held:
            self._held.remove(held)

    def _let_go(self, held: Held) -> None:
        """Of the tensor on the device, once its copy is done."""
        if held.done is not None:
            torch.cuda.current_stream(held.device).wait_event(held.done)
        held.here = None

    def _fetch(self, held: Held) -> None:
        if held.here is not None:
            return
        if held.device.type == "cuda":
            held.here = torch.empty_like(held.host, device=held.device)
            self._copy(held, held.here, held.host)
        else:
            held.here = held.host.clone()

    def _copy(self, held: Held, target: Tensor, source: Tensor) -> None:
        if held.device not in self._streams:
            self._streams[held.device] = torch.cuda.Stream(held.device)
        stream = self._streams[held.device]
        stream.wait_stream(torch.cuda.current_stream(held.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            held.done = stream.record_event()


@functools.cache
def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """What copies to host memory move, in bytes per second, and what products compute, in FLOPs per second."""
    here = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
    host = torch.empty(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    square = torch.randn(PROBE_WIDTH, PROBE_WIDTH, dtype=dtype, device=device)
    copy = _seconds(lambda: host.copy_(here, non_blocking=True), device)
    product = _seconds(lambda: square @ square, device)
    return PROBE_BYTES / copy, 2 * PROBE_WIDTH**3 / product


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The least of three times, after one that does not count."""
    times: list[float] = []
    for _ in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            start.record()
            work()
            end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times[1:])
