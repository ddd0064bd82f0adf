"""The fused low-rank linear against torch's own differentiation of the plain expression."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltaw.core.generators import generator
from deltaw.core.protocols import BaseWeight
from deltaw.kernels.lora_linear import draw_dropout_seed, dropout_mask, lora_linear
from deltaw.models.sites import SiteWeight

SHAPES = [(5,), (3, 5), (2, 3, 5), (1, 5), (2, 1, 4, 5), (0, 5), (2, 0, 5)]


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed, "kernel", *shape)).to(dtype)


def base(out=7, inner=5, dtype=torch.float64, conv=False):
    module = Conv1D(out, inner) if conv else nn.Linear(inner, out)
    module = module.to(dtype).requires_grad_(False)
    module.weight.copy_(drawn(*module.weight.shape, seed=9, dtype=dtype))
    return SiteWeight(module, "conv1d" if conv else "linear")


def plain(x, weight, A, B, scale, bias=None, mask=None):
    """The same by plain operations on the dense matrix, for torch to differentiate."""
    W = weight.dequantize()
    dropped = x if mask is None else x * mask
    return F.linear(x, W, bias) + scale * F.linear(dropped, B @ A)


def case(shape, *, r=3, dtype=torch.float64, out=7, bias=True):
    inner = shape[-1]
    x, A, B = drawn(*shape, dtype=dtype), drawn(r, inner, seed=1, dtype=dtype), drawn(out, r, seed=2, dtype=dtype)
    b = drawn(out, seed=3, dtype=dtype) if bias else None
    return [t.requires_grad_(True) if t is not None else None for t in (x, A, B, b)]


def results(function, tensors, **options):
    out = function(*tensors, **options)
    out.backward(drawn(*out.shape, seed=4, dtype=out.dtype))
    grads = [t.grad for t in tensors if t is not None and t.requires_grad]
    for tensor in tensors:
        if tensor is not None:
            tensor.grad = None
    return [out.detach(), *grads]


def fused(x, A, B, b, *, weight, scale=1.7, **options):
    return lora_linear(x, weight, A, B, scale=scale, bias=b, **options)


def reference(x, A, B, b, *, weight, scale=1.7, mask=None):
    return plain(x, weight, A, B, scale, b, mask)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_equal_the_plain_expressions(shape, bias, conv):
    weight, tensors = base(conv=conv), case(shape, bias=bias)
    for got, expected in zip(
        results(fused, tensors, weight=weight), results(reference, tensors, weight=weight), strict=True
    ):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_against_finite_differences(shape, dropout):
    weight = base()

    def seeded(x, A, B, b):
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            return lora_linear(x, weight, A, B, scale=0.7, bias=b, dropout=dropout)

    state = torch.get_rng_state()
    assert torch.autograd.gradcheck(seeded, case(shape))


def layouts(x):
    yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield torch.stack([x, x + 1], dim=-1)[..., 0]
    yield x[:1].expand(4, *x.shape[1:])
    yield x.flip(0)[::2]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("number", range(4))
def test_inputs_that_are_not_contiguous(number, dropout):
    weight, (_, A, B, b) = base(), case((4, 6, 5))
    x = list(layouts(drawn(4, 6, 5)))[number].detach().requires_grad_(True)
    dense = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(True)
    state = torch.get_rng_state()
    got = results(fused, [x, A, B, b], weight=weight, dropout=dropout)
    torch.set_rng_state(state)
    expected = results(fused, [dense, A, B, b], weight=weight, dropout=dropout)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


def test_a_gradient_that_is_not_contiguous():
    weight, tensors = base(), case((4, 6, 5))
    out = fused(*tensors, weight=weight)
    upstream = drawn(7, 6, 4).permute(2, 1, 0)
    got = torch.autograd.grad(out, tensors, upstream)
    expected = torch.autograd.grad(reference(*tensors, weight=weight), tensors, upstream)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (3,), (0, 1, 2, 3)])
def test_only_what_wants_a_gradient_gets_one(needs):
    weight, full = base(), case((4, 5))
    expected = torch.autograd.grad(reference(*full, weight=weight).sum(), [full[i] for i in needs])
    tensors = [t.detach().requires_grad_(i in needs) for i, t in enumerate(full)]
    got = torch.autograd.grad(fused(*tensors, weight=weight).sum(), [tensors[i] for i in needs])
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


# A result is a float32-accumulated sum rounded to bfloat16 (2^-9 relative) at four steps (the frozen product, h, the
# sum, and k or the casts of A and B): about 4 x 2^-9 < 1e-2 of a tensor's largest entry.
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
def test_bfloat16_against_float64(factors):
    weight, tensors = base(24, 16, torch.bfloat16), case((6, 9, 16), dtype=torch.bfloat16, out=24)
    tensors = [
        t.detach().to(factors if i in (1, 2) else torch.bfloat16).requires_grad_() for i, t in enumerate(tensors)
    ]
    exact = SiteWeight(nn.Linear(16, 24).double().requires_grad_(False), "linear")
    exact.module.weight.copy_(weight.stored)
    got = results(fused, tensors, weight=weight)
    expected = results(reference, [t.detach().double().requires_grad_() for t in tensors], weight=exact)
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, factors, factors, torch.bfloat16]
    for g, e in zip(got, expected, strict=True):
        assert (g.double() - e).abs().max() < 1e-2 * e.abs().max()


def test_zero_B_gives_the_frozen_product_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        weight, (x, A, B, b) = base(dtype=dtype), case((4, 6, 5), dtype=dtype)
        assert torch.equal(lora_linear(x, weight, A, torch.zeros_like(B), scale=2.0, bias=b), weight.matmul(x, b))


def saved_shapes(function):
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    return sorted(shapes), out


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_only_x_A_B_and_h_are_kept(dropout):
    weight, tensors = base(dtype=torch.float32), case((2, 6, 5), dtype=torch.float32)
    shapes, out = saved_shapes(lambda: fused(*tensors, weight=weight, dropout=dropout))
    assert shapes == sorted([(2, 6, 5), (3, 5), (7, 3), (12, 3)])
    del out


def test_frozen_factors_keep_no_activation():
    weight, (x, A, B, b) = base(dtype=torch.float32), case((2, 6, 5), dtype=torch.float32)
    frozen = [x, A.detach(), B.detach(), b.detach()]
    shapes, out = saved_shapes(lambda: fused(*frozen, weight=weight))
    assert shapes == sorted([(3, 5), (7, 3)])
    (got,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(reference(*frozen, weight=weight).sum(), x)[0])


def test_dropout_uses_one_mask_in_both_passes_and_scales_by_what_is_kept():
    weight, tensors = base(), case((4, 6, 5))
    state = torch.get_rng_state()
    got = results(fused, tensors, weight=weight, dropout=0.3)
    torch.set_rng_state(state)
    mask = dropout_mask(tensors[0].reshape(-1, 5), 0.3, draw_dropout_seed()).view(4, 6, 5)
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.7}
    for g, e in zip(got, results(reference, tensors, weight=weight, mask=mask), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


def test_dropout_keeps_its_share_and_follows_torchs_generator():
    like = torch.empty(200, 100)
    mask = dropout_mask(like, 0.25, 5)
    # 20,000 draws: the share's standard deviation is 0.003.
    assert abs(float((mask == 0).float().mean()) - 0.25) < 0.015
    assert torch.equal(mask, dropout_mask(like, 0.25, 5)) and not torch.equal(mask, dropout_mask(like, 0.25, 6))
    assert torch.equal(mask, dropout_mask(torch.empty(100, 200).t(), 0.25, 5))
    state = torch.get_rng_state()
    first = draw_dropout_seed()
    assert first != draw_dropout_seed()
    torch.set_rng_state(state)
    assert first == draw_dropout_seed()


def test_activations_that_are_offloaded_give_the_same_gradients():
    weight, (_, A, B, b) = base(), case((6, 5))
    x = drawn(5, 6).t().requires_grad_(True)
    state = torch.get_rng_state()
    expected = results(fused, [x, A, B, b], weight=weight, dropout=0.5)
    torch.set_rng_state(state)
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t
    )
    with hooks:
        got = results(fused, [x, A, B, b], weight=weight, dropout=0.5)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


@pytest.mark.parametrize("bias", [False, True])
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_each_tensors_own(bias):
    weight, tensors = base(24, 16, torch.float32), case((6, 16), dtype=torch.float32, out=24, bias=bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused(*tensors, weight=weight)
    assert out.dtype == torch.bfloat16
    out.backward(torch.ones_like(out))
    got = [t.grad for t in tensors if t is not None]
    exact = [t.detach().requires_grad_() if t is not None else None for t in tensors]
    reference(*exact, weight=weight).sum().backward()
    for g, e in zip(got, [t.grad for t in exact if t is not None], strict=True):
        assert g.dtype == torch.float32
        assert (g - e).abs().max() < 2e-2 * e.abs().max()


def test_a_second_derivative_is_refused_and_not_wrong():
    weight, (x, A, B, b) = base(), case((4, 5))
    (grad,) = torch.autograd.grad(fused(x, A, B, b, weight=weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_dense_weights_meet_the_protocol():
    for conv in (False, True):
        weight = base(conv=conv)
        assert isinstance(weight, BaseWeight)
        assert weight.shape == (7, 5) and weight.nbytes == 7 * 5 * 8 and weight.dtype == torch.float64
        x, g, W = drawn(3, 5), drawn(3, 7), weight.dequantize()
        torch.testing.assert_close(weight.matmul(x), x @ W.t())
        torch.testing.assert_close(weight.t_matmul(g), g @ W)
        assert torch.equal(weight.dequantize(slice(2, 4), torch.float32), W[2:4].float())
