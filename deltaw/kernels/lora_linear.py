"""The low-rank linear as one autograd function: y = x W^T + b + scale (x A^T) B^T with W frozen.

LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3.

Symbols, T tokens in all: x (..., in), W (out, in), A (r, in), B (out, r), b (out,), y (..., out), g = dL/dy
(..., out).
With h = x A^T (T, r) and k = scale g B (T, r):

    dA = k^T x        dB = scale g^T h        dx = g W + k A        db = sum of g over tokens

Autograd over the plain expression would keep x twice (once as the dropout's output), the product before scaling, and
build a (..., out) and a (..., in) temporary to add; here x and h are kept, and both additions accumulate in place into
the frozen product's own output.

Where gradients are asked for by example (`core/contexts.py`), the backward pass hands the sink those of A and B,
k_i^T x_i and scale g_i^T h_i over example i's tokens, for the price of the sums in their place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.core.contexts import ForwardContext, sink_context
from deltaw.core.protocols import AbsorbingWeight, BaseWeight
from deltaw.kernels.per_example import linear, spread


def draw_dropout_seed() -> int:
    """A seed for one dropout mask, from torch's default generator, whose state checkpoints and recomputing restore."""
    return int(torch.randint(0, 2**62, (), dtype=torch.int64).item())


def dropout_mask(like: Tensor, p: float, seed: int) -> Tensor:
    """The mask of `draw_dropout_seed`'s seed: 0 with probability p, else 1/(1 - p); shape and dtype of `like`.

    Made again in the backward pass instead of being kept, and so the same however `like` lies in memory.
    """
    made = torch.Generator(device=like.device)
    made.manual_seed(seed)
    return like.new_empty(like.shape).bernoulli_(1.0 - p, generator=made).div_(1.0 - p)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        base: BaseWeight,
        scale: float,
        p: float,
        seed: int,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = base.matmul(flat, bias)
        dropped = flat * dropout_mask(flat, p, seed) if p else flat
        h = dropped @ A.to(x.dtype).t()
        out.addmm_(h, B.to(x.dtype).t(), alpha=scale)
        ctx.base, ctx.scale, ctx.p, ctx.seed, ctx.shape = base, scale, p, seed, x.shape
        ctx.sinks = Sinks.of(x, A, B)
        _, need_A, need_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_A else None, A, B, h if need_B else None)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, A, B, h = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        dx, dA, dB = low_rank_gradients(ctx, g, x, A, B, h, ctx.base)
        return dx, dA, dB, g.sum(0) if ctx.needs_input_grad[3] else None, None, None, None, None


class Sinks:
    """What a function's backward pass needs where its parameters' gradients are asked for by example.

    Args:
        context: what holds in the forward pass.
        rows: examples in the function's input.
        parameters: leaves, in the order in which the function knows them.
    """

    def __init__(self, context: ForwardContext, rows: int, parameters: tuple[Tensor, ...]) -> None:
        assert context.sink is not None
        self.sink, self.rows, self.parameters = context.sink, rows, parameters

    @classmethod
    def of(cls, x: Tensor, *parameters: Tensor) -> Sinks | None:
        """For the context in force and the function's input x (..., in); None: nobody asks."""
        context = sink_context()
        if context is None or not any(p.requires_grad for p in parameters):
            return None
        return cls(context, len(context.by_row(x)), parameters)

    def feed(self, which: int, gradients: Tensor) -> None:
        """The gradients of one parameter, (rows, *its shape)."""
        self.sink.feed(self.parameters[which], gradients)

    def split(self, flat: Tensor) -> Tensor:
        """(T, d) to (rows, T / rows, d)."""
        return flat.view(self.rows, -1, flat.shape[-1])


def summed_products(a: Tensor, b: Tensor, sinks: Sinks | None, which: int, factor: float = 1.0) -> Tensor | None:
    """Factor a^T b for a (T, m) and b (T, n): (m, n); where there are sinks they get it by example, and None comes."""
    if sinks is None:
        return (a.t() @ b).mul_(factor)
    sinks.feed(which, torch.bmm(sinks.split(a).mT, sinks.split(b)).mul_(factor))
    return None


def low_rank_gradients(
    ctx: Any, g: Tensor, x: Tensor, A: Tensor, B: Tensor, h: Tensor, base: BaseWeight
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, A and B, its first three inputs, where a function wants them.

    Args:
        ctx: a function's context, with `scale`, `p` and `seed` of its dropout, `shape` of x and `sinks`, of which
            A and B are the first parameters.
        g: the gradient of x W^T + scale (dropout(x) A^T) B^T, (T, out).
        x: (..., in); may be None where A wants no gradient.
        A: (r, in).
        B: (out, r).
        h: dropout(x) A^T, (T, r); may be None where B wants no gradient.
        base: W (out, in).
    """
    need_x, need_A, need_B = ctx.needs_input_grad[:3]
    dx = dA = dB = None
    if need_B:
        dB = _in_dtype(summed_products(g, h, ctx.sinks, 1, ctx.scale), B)
    if need_x or need_A:
        mask = dropout_mask(g.new_empty(()).expand(len(g), ctx.shape[-1]), ctx.p, ctx.seed) if ctx.p else None
        k = (g @ B.to(g.dtype)).mul_(ctx.scale)
        if need_A:
            flat = x.reshape(-1, x.shape[-1])
            dA = _in_dtype(summed_products(k, flat if mask is None else flat * mask, ctx.sinks, 0), A)
        if need_x:
            dx = base.t_matmul(g)
            if mask is None:
                dx.addmm_(k, A.to(k.dtype))
            else:
                dx.addcmul_(k @ A.to(k.dtype), mask)
            dx = dx.view(ctx.shape)
    return dx, dA, dB


def _in_dtype(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(parameter.dtype)


def lora_linear(
    x: Tensor,
    base: BaseWeight,
    A: Tensor,
    B: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """X W^T + bias + scale (dropout(x) A^T) B^T, differentiable in x, A, B and bias; W is frozen.

    The arithmetic is in x's dtype; A and B may be of another (their own gradients come back in theirs), and nothing
    as large as x is ever cast.

    Args:
        x: (..., in), of the base's dtype (any other is torch's own error, as for a plain linear).
        base: the frozen W (out, in).
        A: (r, in).
        B: (out, r).
        scale: alpha/r or its like.
        bias: (out,) or None.
        dropout: probability of dropping an entry of x on the low-rank branch only.
    """
    if torch.is_autocast_enabled(x.device.type):
        # Autocast chooses a dtype for each operation; only the plain expression lets it.
        return base.matmul(x, bias) + linear(linear(F.dropout(x, dropout), spread(A)), spread(B)) * scale
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    seed = draw_dropout_seed() if dropout else 0
    result: Tensor = _LoraLinear.apply(x, A, B, bias, base, scale, dropout, seed)
    return result


class _AbsorbedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, c: Tensor | None, bias: Tensor | None, base: Any, scale: float
    ) -> Tensor:
        merged = base.absorbed(A, B, scale, c)
        ctx.merged, ctx.scale = merged, scale
        out: Tensor = merged.matmul(x, bias)
        ctx.save_for_backward(x, A, B, c, bias, None if c is None else out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, A, B, c, bias, y = ctx.saved_tensors
        need_x, need_A, need_B, need_c, need_bias = ctx.needs_input_grad[:5]
        g, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = ctx.merged.t_matmul(grad) if need_x else None
        dc = None
        if need_c:
            shifted = y.view_as(g) if bias is None else y.view_as(g) - bias
            dc = (g * shifted).sum(0, dtype=torch.float32).to(c.dtype) / c
        g = g if c is None else g * c.to(g.dtype)
        dA = ((g @ B.to(g.dtype)).mul_(ctx.scale).t() @ flat).to(A.dtype) if need_A else None
        dB = (g.t() @ (flat @ A.to(flat.dtype).t())).mul_(ctx.scale).to(B.dtype) if need_B else None
        return dx, dA, dB, dc, grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None, None, None


def absorbed_linear(
    x: Tensor,
    base: AbsorbingWeight,
    A: Tensor,
    B: Tensor,
    *,
    scale: float,
    out_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """X Q(W + scale B A)^T + bias, where Q rounds to what `base` is stored in, and the gradient ignores Q.

    The straight-through estimator (Bengio et al., arXiv 1308.3432): dA and dB are those of the unrounded product, dx is
    exact. Training so for a while makes an adapter that survives its merge. Shapes as for `lora_linear`; `out_scale`
    (out,), DoRA's, multiplies the rows inside Q, nowhere zero.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    result: Tensor = _AbsorbedLinear.apply(x, A, B, out_scale, bias, base, scale)
    return result
