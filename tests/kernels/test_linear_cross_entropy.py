"""The chunked cross-entropy against a dense float64 reference, forward and backward; Triton's form by its interpreter.

The interpreter is chosen by a variable that Triton reads when it is first imported, hence a process of its own.
"""

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.kernels.linear_cross_entropy import CHUNK_BYTES_CUDA, CHUNK_LOGITS, linear_cross_entropy

# Of the largest entry: float64 and float32 rounding over sums of up to 50 terms; bfloat16 has 8 bits of mantissa.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def inputs(tokens=13, d=9, vocab=50, *, dtype=torch.float32, bias=True, ignored=(0, 5, 12), seed=0):
    draw = generator(seed, "lce")
    hidden = torch.randn(tokens, d, generator=draw).to(dtype)
    weight = torch.randn(vocab, d, generator=draw).to(dtype)
    shift = torch.randn(vocab, generator=draw).to(dtype) if bias else None
    targets = torch.randint(0, vocab, (tokens,), generator=draw)
    targets[list(ignored)] = -100
    return hidden, weight, shift, targets


def reference(hidden, weight, bias, targets, *, softcap=None, logit_scale=1.0, reduction="sum"):
    logits = F.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction=reduction)


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def assert_near(got, want, tolerance):
    torch.testing.assert_close(got.double(), want.double(), rtol=0.0, atol=tolerance * float(want.abs().max()))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("chunk", [1, 4, 13, None])
@pytest.mark.parametrize(
    ("bias", "options"),
    [(False, {}), (True, {}), (True, {"softcap": 3.0}), (False, {"logit_scale": 0.25}),
     (True, {"softcap": 2.0, "logit_scale": 1.5})],
)  # fmt: skip
def test_matches_the_dense_reference(dtype, reduction, chunk, bias, options):
    *tensors, targets = inputs(dtype=dtype, bias=bias)
    mine, theirs = leaves(*tensors), leaves(*[None if t is None else t.double() for t in tensors])
    loss = linear_cross_entropy(
        mine[0], mine[1], targets, bias=mine[2], chunk_tokens=chunk, reduction=reduction, **options
    )
    want = reference(*theirs, targets, reduction=reduction, **options)
    (loss * 3.7).backward()
    (want * 3.7).backward()
    assert loss.shape == () and loss.dtype == torch.promote_types(dtype, torch.float32)
    assert_near(loss.detach(), want.detach(), TOLERANCE[dtype])
    for got, dense, tensor in zip(mine, theirs, tensors, strict=True):
        if got is not None:
            assert got.grad.dtype == tensor.dtype
            assert_near(got.grad, dense.grad, TOLERANCE[dtype])


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(softcap):
    *tensors, targets = inputs(5, 4, 7, dtype=torch.float64, ignored=(1,))
    mine = leaves(*tensors)

    def loss(h, w, b):
        return linear_cross_entropy(
            h, w, targets, bias=b, chunk_tokens=2, softcap=softcap, logit_scale=0.7, reduction="mean"
        )

    assert torch.autograd.gradcheck(loss, mine)


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 3, 2), (7, 33, 1001)])
def test_odd_sizes(size, monkeypatch):
    monkeypatch.setattr("deltaw.kernels.linear_cross_entropy.BLOCK_LOGITS", 2 * size[2])
    hidden, weight, _, targets = inputs(*size, bias=False, ignored=())
    (h, w), (hd, wd) = leaves(hidden, weight), leaves(hidden.double(), weight.double())
    loss, want = linear_cross_entropy(h, w, targets, chunk_tokens=3), reference(hd, wd, None, targets)
    loss.backward()
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(h.grad.double(), hd.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad.double(), wd.grad, rtol=1e-5, atol=1e-5)


def test_strided_inputs_and_narrow_targets():
    hidden, weight, _, targets = inputs(bias=False)
    h = torch.stack([hidden, hidden], dim=-1)[..., 0].requires_grad_()
    w = weight.t().contiguous().t().requires_grad_()
    assert not h.is_contiguous() and not w.is_contiguous()
    linear_cross_entropy(h, w, targets.to(torch.int32), chunk_tokens=4).backward()
    hd, wd = leaves(hidden, weight)
    reference(hd, wd, None, targets).backward()
    assert_near(h.grad, hd.grad, 2e-6)
    assert_near(w.grad, wd.grad, 2e-6)


def test_large_logits_stay_finite():
    hidden, weight = torch.tensor([[300.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
    assert linear_cross_entropy(hidden, weight, torch.tensor([2])).item() == 600.0


def test_a_nearly_certain_target_keeps_its_gradient_in_bfloat16():
    # p is 1 - 9e-4, which bfloat16 rounds to 1.
    h, w, target = torch.tensor([[7.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([0])
    (mine,), (dense,) = leaves(h.bfloat16()), leaves(h.double())
    linear_cross_entropy(mine, w.bfloat16(), target).backward()
    reference(dense, w.double(), None, target).backward()
    torch.testing.assert_close(mine.grad.double(), dense.grad, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("tokens", [0, 4])
def test_nothing_but_ignored_targets_is_zero_with_zero_gradients(reduction, tokens):
    hidden, weight, bias, targets = inputs(tokens, ignored=range(tokens))
    mine = leaves(hidden, weight, bias)
    loss = linear_cross_entropy(mine[0], mine[1], targets, bias=mine[2], reduction=reduction)
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in mine)


def test_another_ignore_index():
    hidden, weight, _, targets = inputs(bias=False, ignored=())
    kept = targets != targets[3]
    assert 0 < int(kept.sum()) < len(targets)
    got = linear_cross_entropy(hidden, weight, targets, ignore_index=int(targets[3]))
    assert_near(got, reference(hidden[kept], weight, None, targets[kept]), 2e-6)


def test_a_retained_graph_can_be_walked_twice():
    hidden, weight, _, targets = inputs(bias=False)
    h, w = leaves(hidden, weight)
    loss = linear_cross_entropy(h, w, targets)
    loss.backward(retain_graph=True)
    once = h.grad.clone(), w.grad.clone()
    loss.backward()
    assert torch.equal(h.grad, 2 * once[0]) and torch.equal(w.grad, 2 * once[1])


class Sizes(TorchDispatchMode):
    """Elements of every tensor made, and names of the operators."""

    def __init__(self):
        super().__init__()
        self.largest, self.names = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name)
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunk_of_logits(dtype):
    hidden, weight, _, targets = inputs(64, 4, 300, dtype=dtype, bias=False)
    (h,) = leaves(hidden)
    with Sizes() as sizes:
        linear_cross_entropy(h, weight, targets, chunk_tokens=8, softcap=5.0).backward()
    assert sizes.largest == 8 * 300
    assert CHUNK_LOGITS // 300 > 64
    with Sizes() as sizes:
        linear_cross_entropy(h, weight, targets)
    assert sizes.largest == 61 * 300
    # 61 tokens in chunks of at most 9, all alike.
    for options in ({"chunk_bytes": 10 * 300 * dtype.itemsize - 1}, {"chunk_tokens": 9, "chunk_bytes": 1 << 40}):
        with Sizes() as sizes:
            linear_cross_entropy(h, weight, targets, **options)
        assert sizes.largest == 9 * 300
    with Sizes() as sizes:
        linear_cross_entropy(h, weight, targets, chunk_bytes=1)
    assert sizes.largest == weight.numel()


def test_computes_only_the_gradients_that_are_wanted():
    hidden, weight, _, targets = inputs(bias=False)

    def products(*, h_grad, w_grad, grad=True):
        h, w = hidden.clone().requires_grad_(h_grad), weight.clone().requires_grad_(w_grad)
        with torch.set_grad_enabled(grad), Sizes() as sizes:
            loss = linear_cross_entropy(h, w, targets)
        assert loss.requires_grad == (grad and (h_grad or w_grad))
        return sum(name in ("aten::mm", "aten::addmm_") for name in sizes.names)

    assert products(h_grad=False, w_grad=False) == 1
    assert products(h_grad=True, w_grad=True, grad=False) == 1
    assert products(h_grad=True, w_grad=False) == 2
    assert products(h_grad=False, w_grad=True) == 2
    assert products(h_grad=True, w_grad=True) == 3


def test_follows_autocast():
    hidden, weight, bias, targets = inputs()
    mine, low = leaves(hidden, weight, bias), leaves(hidden.bfloat16(), weight.bfloat16(), bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(mine[0], mine[1], targets, bias=mine[2], chunk_tokens=4)
    loss.backward()
    want = linear_cross_entropy(low[0], low[1], targets, bias=low[2], chunk_tokens=4)
    want.backward()
    assert torch.equal(loss, want)
    assert all(
        m.grad.dtype == torch.float32 and torch.equal(m.grad, t.grad.float()) for m, t in zip(mine, low, strict=True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 9)}, "expected \\(tokens, d\\)"),
        ({"weight": torch.zeros(50, 8)}, "expected \\(tokens, d\\)"),
        ({"weight": torch.zeros(50, 9, dtype=torch.bfloat16)}, "one dtype"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets are"),
        ({"targets": torch.zeros(13)}, "targets are"),
        ({"targets": torch.full((13,), 50)}, "50.*expected 0 to 49"),
        ({"targets": torch.full((13,), -1)}, "-1.*expected 0 to 49"),
        ({"bias": torch.zeros(49)}, "bias has shape"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
        ({"chunk_bytes": 0}, "chunk_bytes=0"),
        ({"reduction": "none"}, "'none'"),
    ],
)
def test_wrong_input_is_one_clear_line(change, message):
    hidden, weight, bias, targets = inputs()
    given = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias} | change
    with pytest.raises(InputError, match=message):
        linear_cross_entropy(given.pop("hidden"), given.pop("weight"), given.pop("targets"), **given)


# The Triton kernel.

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
# The interpreter does not round to bfloat16 as a GPU does.
KERNEL_DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
on_a_gpu = [
    pytest.mark.gpu,
    needs_triton,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
in_either = [
    needs_triton,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
    # The interpreter's arithmetic is numpy's, which says where it divides by zero in the case not taken.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]


def marked(marks):
    def apply(function):
        for mark in marks:
            function = mark(function)
        return function

    return apply


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_triton_in_the_interpreter(passes_in_the_interpreter):
    passes_in_the_interpreter(__file__, "test_kernel_")


def same(got, want):
    torch.testing.assert_close(got, want, rtol=0.0, atol=0.0, equal_nan=True)


def framed(logits):
    """The logits with a column and a row of 7s around them, which the kernel has to leave alone."""
    frame = logits.new_full((logits.shape[0] + 1, logits.shape[1] + 2), 7.0)
    inner = frame[:-1, 1:-1]
    inner.copy_(logits)
    return frame, inner


def loss_and_gradient(logits, targets, bias=None, *, softcap=None, scale=1.0):
    """By the kernel, with tiles that divide nothing: the loss alone, the loss, and what became of the logits."""
    from deltaw.kernels.cross_entropy_triton import loss_and_gradient as kernel

    frame, inner = framed(logits)
    # Every other target, as a slice of a larger tensor may have them.
    column = targets.repeat_interleave(2)[::2, None]
    loss = kernel(inner, column, bias, softcap, scale, False, tile=(16, 1))
    same(inner, logits)
    again = kernel(inner, column, bias, softcap, scale, True, tile=(16, 1))
    same(loss, again)
    assert loss.dtype == torch.float32 and loss.shape == ()
    grad = inner.clone()
    inner.fill_(7.0)
    assert (frame == 7.0).all()
    return loss, grad


def dense(logits, targets, bias=None, *, softcap=None, scale=1.0):
    u = logits.double().requires_grad_()
    shifted = (u if bias is None else u + bias.double()) * scale
    z = shifted if softcap is None else softcap * torch.tanh(shifted / softcap)
    loss = F.cross_entropy(z, targets, reduction="sum")
    # G leaves out the logit scale, which the caller puts into the products.
    return loss.detach(), torch.autograd.grad(loss, u)[0] / scale


@marked(in_either)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 16), (7, 50), (2, 133)])
@pytest.mark.parametrize(
    ("bias", "options"), [(False, {}), (True, {}), (True, {"softcap": 3.0, "scale": 1.5}), (False, {"scale": 0.25})]
)
def test_kernel_is_the_dense_reference(dtype, size, bias, options):
    draw = generator(0, "lce", *size)
    logits = (4 * torch.randn(size, generator=draw)).to(DEVICE, dtype)
    targets = torch.randint(0, size[1], size[:1], generator=draw).to(DEVICE)
    shift = torch.randn(size[1], generator=draw).to(DEVICE, dtype) if bias else None
    loss, grad = loss_and_gradient(logits, targets, shift, **options)
    want, wanted = dense(logits, targets, shift, **options)
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=1e-6)
    assert_near(grad, wanted, {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype])
    # The torch form computes the same in the same dtype.
    from deltaw.kernels.linear_cross_entropy import _loss_and_gradient

    raw, scratch = logits.clone(), None if dtype == torch.float32 else torch.empty(size, device=DEVICE)
    usual = _loss_and_gradient(
        raw, scratch, targets[:, None], shift, options.get("softcap"), options.get("scale", 1.0), True
    )
    torch.testing.assert_close(loss, usual, rtol=2e-6, atol=1e-6)
    assert_near(grad, raw, {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype])


@marked(in_either)
def test_kernel_keeps_the_last_of_a_nearly_certain_target():
    """Loss and p - 1 of e^-7, e^-20 and e^-60 with their own precision, where 1 - p has lost it."""
    gaps = torch.tensor([7.0, 20.0, 60.0], device=DEVICE)
    logits = torch.zeros(3, 20, device=DEVICE).sub_(500.0)
    logits[:, 3], logits[:, 17] = gaps, 0.0
    targets = torch.full((3,), 3, device=DEVICE)
    loss, grad = loss_and_gradient(logits, targets)
    for row, gap in enumerate(gaps.double()):
        one, _ = loss_and_gradient(logits[row : row + 1], targets[:1])
        assert one.item() == pytest.approx(torch.log1p(torch.exp(-gap)).item(), rel=1e-5)
        assert grad[row, 3].item() == pytest.approx((torch.expm1(-torch.log1p(torch.exp(-gap)))).item(), rel=1e-5)
    assert loss.isfinite() and grad[:, 17].gt(0).all()


@marked(in_either)
def test_kernel_with_extreme_logits():
    inf, nan = float("inf"), float("nan")
    logits = torch.full((1, 40), -1e4, device=DEVICE)
    logits[0, 35] = 3e4
    first, last = torch.tensor([0], device=DEVICE), torch.tensor([35], device=DEVICE)
    loss, grad = loss_and_gradient(logits, first)
    assert loss.item() == 4e4 and grad[0, 0].item() == -1 and grad[0, 35].item() == 1 and grad.count_nonzero() == 2
    loss, grad = loss_and_gradient(logits, last)
    assert loss.item() == 0 and not grad.any()
    # A vocabulary with entries that are ruled out.
    logits[0, :30] = -inf
    loss, grad = loss_and_gradient(logits, last)
    assert loss.item() == 0 and not grad.any()
    # Whatever makes no sense must show.
    for broken in (nan, inf):
        logits[0, 20] = broken
        assert not loss_and_gradient(logits, last)[0].isfinite()
    for outside in (-1, 40):
        loss, grad = loss_and_gradient(torch.zeros(2, 40, device=DEVICE), torch.tensor([outside, 3], device=DEVICE))
        assert loss.isnan() and grad[0].isnan().all() and grad[1].isfinite().all()


@marked(on_a_gpu)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("bias", "options"), [(False, {}), (True, {"softcap": 30.0, "logit_scale": 0.5}), (True, {"logit_scale": 2.0})]
)
def test_on_a_gpu_by_the_public_function(dtype, bias, options):
    hidden, weight, shift, targets = inputs(777, 64, 50_257, dtype=dtype, bias=bias, ignored=range(0, 777, 5))
    tensors = [None if t is None else t.cuda() for t in (hidden * 0.3, weight, shift)]
    mine, theirs = leaves(*tensors), leaves(*[None if t is None else t.double() for t in tensors])
    loss = linear_cross_entropy(
        mine[0], mine[1], targets.cuda(), bias=mine[2], chunk_tokens=100, reduction="mean", **options
    )
    want = reference(*theirs, targets.cuda(), reduction="mean", **options)
    loss.backward()
    want.backward()
    assert_near(loss.detach(), want.detach(), TOLERANCE[dtype])
    for got, wanted in zip(mine, theirs, strict=True):
        if got is not None:
            assert_near(got.grad, wanted.grad, TOLERANCE[dtype])


@marked(on_a_gpu)
def test_on_a_gpu_a_chunk_is_all_the_memory_there_is():
    vocab, tokens = 128_256, 4_200
    hidden = torch.randn(tokens, 256, generator=generator(0, "h")).to("cuda", torch.bfloat16).requires_grad_()
    weight = torch.randn(vocab, 256, generator=generator(0, "w")).to("cuda", torch.bfloat16)
    targets = torch.randint(0, vocab, (tokens,), generator=generator(0, "t")).cuda()
    for bound, most in ((None, CHUNK_BYTES_CUDA), (1 << 26, 1 << 26)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy(hidden, weight, targets, chunk_bytes=bound).backward()
        assert torch.cuda.max_memory_allocated() - before < most + (40 << 20)
        hidden.grad = None
