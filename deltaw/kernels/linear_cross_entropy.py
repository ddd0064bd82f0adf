"""The cross-entropy of a linear head that never holds all logits, as one autograd function.

The loss and its gradients are made together, a chunk of tokens at a time, as in Hsu et al., "Liger Kernel: Efficient
Triton Kernels for LLM Training", arXiv 2410.10989, section 3.2.

Symbols, N tokens, vocabulary V: h (N, d), W (V, d), b (V,), y (N,) targets, s the logit scale, c the soft cap.

    u = s (h W^T + b)        z = c tanh(u / c), or u without a cap        p = softmax(z)        L = -sum_n log p_n[y_n]
    G = dL/du = (p - onehot(y)) (1 - tanh(u / c)^2)        dh = s G W        dW = s G^T h        db = s sum_n G_n

Measured on two Zen 4 cores, forward and backward with W frozen, 1,024 tokens, d 576, V 49,152, medians of nine
interleaved runs against `F.linear`, a cast to float32 and `F.cross_entropy`: 0.80 s to 0.91 s in float32, 0.38 s to
0.64 s in bfloat16. The two products alone, which nothing here can save, take 0.72 s and 0.30 s.

CUDA tensors of at most 32 bits go to `cross_entropy_triton.py` between the products, where Triton is installed.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaw.core.errors import InputError
from deltaw.kernels.norm import triton_form

#: Logits of one chunk, that is of one product. Chunks that fit the last-level cache lose more in the products than they
#: save: with whole chunks in the softmax and a busier machine, 32, 64, 128, 256 and 512 tokens took 1.95, 1.47, 1.34,
#: 1.17 and 1.06 s in float32, 0.82, 0.67, 0.57, 0.49 and 0.48 s in bfloat16; 1,024 were no faster than 512.
CHUNK_LOGITS = 1 << 25

#: Logits that softmax takes at a time on CPU, as float32 in the cache: 0.89 s instead of 1.07 s for whole chunks in
#: bfloat16, on the busier machine, no proven difference in float32. Softmaxes that read bfloat16 were not faster.
BLOCK_LOGITS = 1 << 22

#: Bytes of a chunk where the Triton kernel works on it in place: 2,048 tokens of a vocabulary of 128,256 in 16 bits,
#: enough rows for products at full speed.
CHUNK_BYTES_CUDA = 1 << 29


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        softcap: float | None,
        scale: float,
        wanted: tuple[bool, bool, bool],
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = hidden.new_empty(hidden.shape) if wanted[0] else None
        grad_weight = weight.new_zeros(weight.shape, dtype=wide) if wanted[1] else None
        grad_bias = weight.new_zeros(weight.shape[0], dtype=wide) if wanted[2] else None
        buffer = hidden.new_empty(chunk, weight.shape[0])
        kernels = triton_form(hidden, "cross_entropy_triton")
        block = max(1, min(chunk, BLOCK_LOGITS // weight.shape[0])) if hidden.is_cpu else chunk
        in_place = hidden.dtype == wide or kernels is not None
        scratch = None if in_place else hidden.new_empty(block, weight.shape[0], dtype=wide)
        total = hidden.new_zeros((), dtype=wide)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            x, target = hidden[rows], targets[rows, None]
            grad = buffer[: len(x)]
            torch.mm(x, weight.t(), out=grad)
            if kernels is not None:
                total += kernels.loss_and_gradient(grad, target, bias, softcap, scale, any(wanted))
            else:
                for part, part_target in zip(grad.split(block), target.split(block), strict=True):
                    total += _loss_and_gradient(part, scratch, part_target, bias, softcap, scale, any(wanted))
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                if hidden.dtype == wide:
                    grad_weight.addmm_(grad.t(), x)
                else:
                    grad_weight.add_(torch.mm(grad.t(), x))
            if grad_bias is not None:
                grad_bias.add_(grad.sum(0, dtype=wide))
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.scale = scale
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        factor = grad_output * ctx.scale
        # Out of place, since a retained graph may be walked twice; the cast rides along in the same pass.
        grads = [
            None if grad is None else torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None, None, None)


def _loss_and_gradient(
    raw: Tensor,
    scratch: Tensor | None,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    wanted: bool,
) -> Tensor:
    """Summed loss of raw = h W^T (rows, V) for targets (rows, 1); where wanted, turns `raw` into G in place."""
    logits = raw if scratch is None else scratch[: len(raw)].copy_(raw)
    if bias is not None:
        logits.add_(bias)
    if scale != 1.0:
        logits.mul_(scale)
    if softcap is not None:
        bent = torch.tanh(logits.div_(softcap))
        torch.mul(bent, softcap, out=logits)
    # CPU kernels go row by row and may write over their input; elsewhere nothing promises it.
    log_p = torch.log_softmax(logits, -1, out=logits if logits.is_cpu else None)
    log_p_target = log_p.gather(1, target)
    if wanted:
        grad = log_p.exp_()
        # A p that bfloat16 will round to 1 would take p - 1, all the gradient there is, with it.
        grad.scatter_(1, target, torch.expm1(log_p_target))
        if softcap is not None:
            grad.mul_(bent.square_().neg_().add_(1.0))
        if grad is not raw:
            raw.copy_(grad)
    return -log_p_target.sum()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_tokens: int | None = None,
    chunk_bytes: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: Literal["sum", "mean"] = "sum",
    ignore_index: int | None = -100,
) -> Tensor:
    """Cross-entropy of softmax(softcap(logit_scale (hidden weight^T + bias))), holding a chunk of logits at a time.

    Products run in the inputs' dtype (autocast's where it is on); softmax, the loss and sums over chunks in float32, or
    in float64 for float64 inputs. Gradients are made in the forward pass, for those inputs only that want them, so what
    is kept for the backward pass is as large as `hidden` (and as `weight` in float32 where it is trained). Extra
    memory: a chunk of logits, on CPU at most two float32 blocks of `BLOCK_LOGITS` beside it, on CUDA with Triton
    nothing, elsewhere up to three more chunks. Differentiable once.

    Args:
        hidden: (tokens, d).
        weight: (vocab, d), `hidden`'s dtype.
        targets: (tokens,), integers from 0 to vocab - 1, or `ignore_index`.
        bias: (vocab,) or None.
        chunk_tokens: most tokens of one chunk; None takes as many as make `CHUNK_LOGITS` logits, with Triton on CUDA
            `CHUNK_BYTES_CUDA` bytes of them.
        chunk_bytes: most bytes of a chunk's logits, but for a single token's; None sets no such bound.
        softcap: c of c tanh(logits / c), or None.
        logit_scale: multiplies the logits before the cap.
        reduction: "sum" over the targets, or "mean" over those that are not ignored.
        ignore_index: the target that carries no loss; such tokens are left out before the product, for which a GPU is
            waited for. None: all targets carry loss.

    Returns:
        The loss, shape (), float32 (float64 for float64 inputs). With nothing but ignored targets it is 0 for both
        reductions, with zero gradients, where `F.cross_entropy`'s mean is NaN.

    Raises:
        InputError: shapes or dtypes that do not fit, a target outside the vocabulary (on CPU; the Triton kernel makes
            the loss NaN), an unknown reduction.
    """
    _check(hidden, weight, targets, bias, chunk_tokens, chunk_bytes, reduction)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    targets = targets.to(hidden.device, torch.int64)
    if ignore_index is not None:
        index = (targets != ignore_index).nonzero()[:, 0]
        if len(index) < len(targets):
            hidden, targets = hidden[index], targets[index]
    count, vocab = len(targets), weight.shape[0]
    if count and targets.device.type == "cpu" and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        raise InputError(
            f"targets go from {int(targets.min())} to {int(targets.max())}: expected 0 to {vocab - 1}, the head's "
            "vocabulary" + ("" if ignore_index is None else f", or {ignore_index} for no loss")
        )
    row_bytes = vocab * hidden.itemsize
    on_device = triton_form(hidden, "cross_entropy_triton") is not None
    limit = chunk_tokens or (CHUNK_BYTES_CUDA // row_bytes if on_device else CHUNK_LOGITS // vocab)
    limit = max(1, limit if chunk_bytes is None else min(limit, chunk_bytes // row_bytes))
    # Chunks of equal size: a small rest costs nearly as much time as a full chunk.
    chunk = max(1, -(-count // max(1, -(-count // limit))))
    graph = torch.is_grad_enabled()
    wanted = tuple(graph and t is not None and t.requires_grad for t in (hidden, weight, bias))
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, chunk, softcap, logit_scale, wanted)
    return total / count if reduction == "mean" and count else total


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    chunk_tokens: int | None,
    chunk_bytes: int | None,
    reduction: str,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise InputError(
            f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}: expected (tokens, d) and (vocab, d)"
        )
    if targets.shape != hidden.shape[:1] or targets.is_floating_point():
        raise InputError(
            f"targets are {targets.dtype} of shape {tuple(targets.shape)}: expected integers, ({hidden.shape[0]},)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"bias has shape {tuple(bias.shape)}: expected ({weight.shape[0]},)")
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise InputError(f"hidden is {hidden.dtype} and weight {weight.dtype}: expected one dtype for both, cast one")
    for name, value in {"chunk_tokens": chunk_tokens, "chunk_bytes": chunk_bytes}.items():
        if value is not None and value < 1:
            raise InputError(f"{name}={value}: expected at least 1, or None")
    if reduction not in ("sum", "mean"):
        raise InputError(f"reduction {reduction!r}: expected 'sum' or 'mean'")
