"""Explicit random generators, derived by name, so that one more draw in one place changes nothing elsewhere."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed from a run's seed and a path of names (a site's name, a step), by SHA-256."""
    text = "\x1f".join([str(int(seed)), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device`, seeded from the run's seed and a path of names."""
    made = torch.Generator(device=device)
    made.manual_seed(derived_seed(seed, *names))
    return made
