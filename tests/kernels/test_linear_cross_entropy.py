"""The chunked cross-entropy against a dense float64 reference, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.kernels.linear_cross_entropy import CHUNK_LOGITS, linear_cross_entropy

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
        ({"reduction": "none"}, "'none'"),
    ],
)
def test_wrong_input_is_one_clear_line(change, message):
    hidden, weight, bias, targets = inputs()
    given = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias} | change
    with pytest.raises(InputError, match=message):
        linear_cross_entropy(given.pop("hidden"), given.pop("weight"), given.pop("targets"), **given)
