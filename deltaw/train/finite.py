"""Losses and gradients that are not finite, counted on the device, of which the host hears without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


class Breaks:
    """How many losses and gradients were not finite up to each step, and what the host has heard of it.

    Args:
        device: where they are counted.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2, dtype=torch.long, device=device)
        self._told: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def add(self, step: int, found: Tensor) -> None:
        """Counts step number `step`: how many losses and how many gradients of it were broken, (2,) int64."""
        self.counts += found
        event = None
        # Into pinned memory; a copy on the CPU as well, where the same tensor would be counted on in.
        told = self.counts.to("cpu", non_blocking=True, copy=True)
        if self.counts.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.counts.device))
        self._told.append((step, told, event))

    def any(self) -> Tensor:
        """1.0 where anything was ever broken, else 0.0: (), float32, what torch's fused optimizers call `found_inf`."""
        return self.counts.any().float()

    def first(self, *, behind: int) -> tuple[str, int] | None:
        """What was broken first (`loss is`, `gradient is`) and in which step, the last `behind` steps left out.

        Waits for the device to have come to the steps that it asks for.
        """
        while len(self._told) > behind:
            step, told, event = self._told.pop(0)
            if event is not None:
                event.synchronize()
            losses, gradients = told.tolist()
            if losses or gradients:
                return ("loss is" if losses else "gradient is"), step
        return None
