"""Attention on CPUs in 16 bits: torch's own forward pass, and a backward pass made of matrix products.

Dao, "FlashAttention-2", arXiv 2307.08691, section 3.1. For each head, queries q (T, d), keys k (S, d), values v (S, d),
out o = P v with P = softmax(scale q k^T), g = dL/do, and l the rows' log-sum-exp that the forward pass leaves:

    P = exp(scale q k^T - l)    dV = P^T g    dS = P * (g v^T - rowsum(g * o))    dq = scale dS k    dk = scale dS^T q

torch's kernel works tile by tile and thread by head, which leaves the processor's 16-bit matrix units idle: for 16
sequences of 64 tokens and 9 heads its backward pass takes 19 ms, this one 4; for 4 of 256 tokens 16 ms and 8; from a
thousand tokens on they are even. Scores are rounded to 16 bits once on the way: gradients are 0.45 % off float64's,
torch's 0.3 %.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Rows of queries that are worked through at once; keys after the last of them are left out where attention is causal.
_ROWS = 64
#: Tokens above which torch's own backward pass is no slower.
LONGEST = 512


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = made(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.causal, ctx.scale = causal, scale
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse, mask = ctx.saved_tensors
        batch, heads, length, width = q.shape
        flat = (batch * heads, -1, width)
        q3, k3, v3, g3 = (t.reshape(flat) for t in (q * ctx.scale, k, v, grad))
        delta = (grad.float() * out.float()).sum(-1).reshape(-1, length, 1)
        # A row that may look at nothing has no sum: its probabilities are all 0.
        lse = torch.where(torch.isfinite(lse), lse, torch.inf).reshape(-1, length, 1)
        dq, dk, dv = torch.empty_like(q3), torch.zeros_like(k3), torch.zeros_like(v3)
        shown = None if mask is None else mask.expand(batch, heads, length, k.shape[2])
        for start in range(0, length, _ROWS):
            rows = slice(start, min(start + _ROWS, length))
            end = rows.stop if ctx.causal else k.shape[2]
            keys, values, g = k3[:, :end], v3[:, :end], g3[:, rows]
            P = torch.bmm(q3[:, rows], keys.transpose(1, 2)).float().sub_(lse[:, rows]).exp_()
            if ctx.causal:
                P.tril_(start)
            if shown is not None:
                P.view(batch, heads, -1, end).masked_fill_(~shown[:, :, rows, :end], 0.0)
            dv[:, :end].baddbmm_(P.to(q.dtype).transpose(1, 2), g)
            dS = torch.bmm(g, values.transpose(1, 2)).float().sub_(delta[:, rows]).mul_(P).to(q.dtype)
            dq[:, rows] = torch.bmm(dS, keys)
            dk[:, :end].baddbmm_(dS.transpose(1, 2), q3[:, rows])
        dq.mul_(ctx.scale)
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), None, None, None


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Scaled dot-product attention, differentiable in q, k and v; the forward pass is torch's to the bit.

    Args:
        q: (batch, heads, T, d), bfloat16 or float16, on the CPU.
        k: (batch, heads, S, d).
        v: (batch, heads, S, d).
        mask: True where a query may look, broadcastable to (batch, heads, T, S); not together with `causal`.
        causal: query i sees keys 0 ... i; T and S are then equal.
        scale: 1/sqrt(d) or its like.

    Returns:
        (batch, heads, T, d).
    """
    result: Tensor = _Attention.apply(q, k, v, mask, causal, scale)
    return result
