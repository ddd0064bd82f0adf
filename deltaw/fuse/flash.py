"""Causal attention by FlashAttention 4 (the package flash-attn-4), for fused layers that are asked to take it.

Dao et al., github.com/Dao-AILab/flash-attention, `flash_attn/cute`. It compiles its kernels when they are first used,
some seconds for each shape of heads.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Columns of a head up to which it has kernels on every card that it knows.
LARGEST_HEAD = 128


def objection(device: torch.device) -> str | None:
    """Why it cannot be had on a device; None where it can."""
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        return "it needs the package flash-attn-4, which is not installed: pip install 'deltaw[flash]'"
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"it runs on GPUs, and the model is on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 9 else f"it runs on GPUs from compute capability 9.0 on, and this one has {major}.{minor}"


def takes(q: Tensor, attn: Any, mask: Any) -> bool:
    """Whether a call is one for it: q (batch, heads, seq, head_dim) in 16 bits, causal, all tokens of one document."""
    plain = mask is None and attn.is_causal is True and getattr(attn, "sliding_window", None) is None
    return plain and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= LARGEST_HEAD


def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Causal softmax(scaling q k^T) v.

    Args:
        q: (batch, heads, seq, head_dim).
        k: likewise, of as many heads or a divisor of them.
        v: like k.
        scaling: 1/sqrt(head_dim) or its like.

    Returns:
        (batch, seq, heads, head_dim).
    """
    function: Callable[..., Any] = importlib.import_module("flash_attn.cute.interface").flash_attn_func
    out = function(*(t.transpose(1, 2) for t in (q, k, v)), softmax_scale=scaling, causal=True)
    made: Tensor = out[0] if isinstance(out, tuple) else out
    return made
