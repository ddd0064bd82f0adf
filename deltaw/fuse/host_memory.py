"""Layers' inputs in host memory between the forward and the backward pass, moved beside the computation.

A copy to pinned memory takes the bus for as long as a layer's products take the card many times over, so on a stream of
its own it costs nothing; on the way back the copy of the next one that will be asked for is under way while the present
one is used. Buffers are pinned once and used again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Held:
    """One tensor: its copy in host memory, and on its way back the one on the device."""

    host: Tensor
    device: torch.device
    done: Any = None
    back: Tensor | None = None


class HostMemory:
    """Takes tensors in the order of the forward pass, and gives them back in any, fastest in the reverse one."""

    def __init__(self) -> None:
        self._free: dict[tuple[Any, ...], list[Tensor]] = {}
        self._held: list[Held] = []
        self._streams: dict[torch.device, Any] = {}

    def put(self, tensor: Tensor) -> Held:
        """Starts copying a contiguous tensor, whose device memory is free once that is done and nobody else has it."""
        key = (tensor.shape, tensor.dtype, tensor.device)
        spare = self._free.get(key)
        cuda = tensor.is_cuda
        host = spare.pop() if spare else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda)
        held = Held(host, tensor.device)
        if cuda:
            stream = self._stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                host.copy_(tensor, non_blocking=True)
                held.done = stream.record_event()
            tensor.record_stream(stream)
        else:
            host.copy_(tensor)
        self._held.append(held)
        return held

    def take(self, held: Held) -> Tensor:
        """The tensor, on its device again."""
        self._fetch(held)
        result = held.back
        assert result is not None
        if held.device.type == "cuda":
            current = torch.cuda.current_stream(held.device)
            current.wait_event(held.done)
            result.record_stream(current)
        self.drop(held)
        self._free.setdefault((held.host.shape, held.host.dtype, held.device), []).append(held.host)
        if self._held:
            self._fetch(self._held[-1])
        return result

    def drop(self, held: Held) -> None:
        """Forgets a tensor that nobody will take any more, if it is still here."""
        held.back = None
        if held in self._held:
            self._held.remove(held)

    def _fetch(self, held: Held) -> None:
        if held.back is not None:
            return
        if held.device.type != "cuda":
            held.back = held.host.clone()
            return
        stream = self._stream(held.device)
        with torch.cuda.stream(stream):
            stream.wait_event(held.done)
            held.back = held.host.to(held.device, non_blocking=True)
            held.done = stream.record_event()

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
