"""A faster backward pass of attention on CPUs, for as long as a `with` block lasts."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deltaw.kernels.attention import LONGEST, cpu_attention


class FastCpuAttention(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` on a CPU in 16 bits takes `cpu_attention` where that is faster.

    No model and no library is changed. Calls that it does not fit go their usual way: other devices and dtypes, long
    sequences, dropout, masks that are no booleans, and those that need no gradient.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of a torch function."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            found = _attention(*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """The arguments of `scaled_dot_product_attention`; None where its own way is to be gone."""
    plain = type(query) is type(key) is type(value) is Tensor and query.dim() == key.dim() == value.dim() == 4
    if not plain or query.device.type != "cpu" or query.dtype not in (torch.bfloat16, torch.float16):
        return None
    wanted = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    sizes = query.shape[2], key.shape[2]
    if not wanted or max(sizes) > LONGEST or dropout_p or torch.is_autocast_enabled("cpu"):
        return None
    if {key.dtype, value.dtype} != {query.dtype} or not query.shape[-1] == key.shape[-1] == value.shape[-1]:
        return None
    if is_causal and (attn_mask is not None or sizes[0] != sizes[1]):
        return None
    if attn_mask is not None and (attn_mask.dtype != torch.bool or attn_mask.dim() not in (2, 4)):
        return None
    groups = query.shape[1] // max(key.shape[1], 1)
    if groups != 1:
        if not enable_gqa or query.shape[1] % key.shape[1]:
            return None
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if key.shape[1] != query.shape[1] or value.shape[1] != query.shape[1] or not query.numel():
        return None
    mask = None if attn_mask is None else attn_mask if attn_mask.dim() == 4 else attn_mask[None, None]
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    return cpu_attention(query, key, value, mask=mask, causal=is_causal, scale=scale)
