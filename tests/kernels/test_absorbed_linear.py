"""Products with the update rounded into a 4-bit weight: straight-through gradients, and the switch in the host."""

import pytest
import tiny
import torch
import torch.nn.functional as F

import deltaw as dw
from deltaw.core.generators import generator
from deltaw.kernels.lora_linear import absorbed_linear, lora_linear
from deltaw.methods.host import set_merge_aware
from deltaw.quant import NF4, NF4Weight, quantize_model, quantized_sites

DTYPES = [torch.float32, torch.bfloat16]


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed, "absorbed", *shape)).to(dtype)


def case(*shape, dtype=torch.float32, out=13, r=3):
    inner = shape[-1]
    weight = NF4Weight.quantize(drawn(out, inner, seed=9, dtype=dtype))
    tensors = (drawn(*shape), 0.3 * drawn(r, inner, seed=1), drawn(out, r, seed=2), drawn(out, seed=3))
    return weight, [t.to(dtype).requires_grad_(True) for t in tensors]


def gradients(out, tensors):
    return torch.autograd.grad(out, tensors, drawn(*out.shape, seed=4, dtype=out.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37,), (4, 37), (2, 3, 37), (0, 37)])
def test_output_is_that_of_the_merged_weight_and_gradients_pass_straight_through(shape, dtype):
    weight, (x, A, B, bias) = case(*shape, dtype=dtype)
    merged = weight.absorbed(A, B, 0.7).dequantize()
    assert not torch.equal(merged, weight.dequantize())
    got = absorbed_linear(x, weight, A, B, scale=0.7, bias=bias)
    expected = F.linear(x, merged, bias)
    assert got.dtype == dtype and torch.equal(got, expected)
    dx, dA, dB, db = gradients(got, [x, A, B, bias])
    wanted_x, wanted_b = gradients(expected, [x, bias])
    wanted_A, wanted_B = gradients(lora_linear(x, weight, A, B, scale=0.7, bias=bias), [A, B])
    for mine, theirs in zip((dx, dA, dB, db), (wanted_x, wanted_A, wanted_B, wanted_b), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_only_what_wants_a_gradient_gets_one():
    weight, tensors = case(4, 37)
    for wants in ([0], [1], [2], [3], [0, 2]):
        given = [t.detach().requires_grad_(i in wants) for i, t in enumerate(tensors)]
        chosen = [given[i] for i in wants]
        x, A, B, bias = tensors
        expected = gradients(absorbed_linear(x, weight, A, B, scale=0.7, bias=bias), [tensors[i] for i in wants])
        x, A, B, bias = given
        got = gradients(absorbed_linear(x, weight, A, B, scale=0.7, bias=bias), chosen)
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_factors_of_a_wider_dtype_get_gradients_in_theirs():
    weight, (x, A, B, bias) = case(4, 37, dtype=torch.bfloat16)
    A, B = A.detach().float().requires_grad_(True), B.detach().float().requires_grad_(True)
    got = gradients(absorbed_linear(x, weight, A, B, scale=0.7, bias=bias), [x, A, B])
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32, torch.float32]


def test_autocast_chooses_the_dtype():
    weight, (x, A, B, bias) = case(4, 37)
    with torch.autocast("cpu", torch.bfloat16):
        got = absorbed_linear(x, weight, A, B, scale=0.7, bias=bias)
    expected = F.linear(x.bfloat16(), weight.absorbed(A, B, 0.7).dequantize(dtype=torch.bfloat16), bias.bfloat16())
    assert torch.equal(got, expected)
    assert [g.dtype for g in gradients(got, [x, A, B])] == [torch.float32] * 3


# The switch.


def adapted(name="llama", config=None, dtype=torch.float32, **options):
    model = quantize_model(tiny.tiny(name, dtype), NF4(embeddings=True, head=True))
    dw.adapt(model, config or dw.LoRA(r=2, target_modules="all-linear"), **options)
    return tiny.randomise(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "llama-bias", "gpt2", "bert-mlm"])
def test_training_computes_what_the_merged_model_will(name, dtype):
    model = adapted(name, dtype=dtype).train()
    own = tiny.logits(model, name)
    set_merge_aware(model, True)
    aware = tiny.logits(model, name)
    # Evaluation, and training once it is off again, are as ever.
    assert torch.equal(tiny.logits(model.eval(), name), own) and not torch.equal(aware, own)
    set_merge_aware(model.train(), False)
    assert torch.equal(tiny.logits(model, name), own)
    dw.merge(model, mode="requantize")
    assert torch.equal(tiny.logits(model.eval(), name), aware)
    assert sum(1 for _ in quantized_sites(model)) > 4


def test_weighted_adapters_are_merged_together():
    model = adapted("llama")
    dw.adapt(model, dw.LoRA(r=3), name="second")
    tiny.randomise(model, "second")
    dw.set_adapter(model, {"default": 0.5, "second": -1.5})
    set_merge_aware(model.train(), True)
    aware = tiny.logits(model, "llama")
    dw.merge(model, mode="requantize")
    assert tiny.relative(tiny.logits(model.eval(), "llama"), aware) < 1e-5


def test_dropout_is_left_out_and_gradients_come_through():
    model = adapted("llama", dw.LoRA(r=2, dropout=0.5, target_modules="all-linear")).train()
    set_merge_aware(model, True)
    assert torch.equal(tiny.logits(model, "llama"), tiny.logits(model, "llama"))
    given = tiny.inputs("llama")
    model(**given, labels=given["input_ids"]).loss.backward()
    grads = [p.grad for p in dw.adapter_parameters(model, "default").values()]
    assert all(g is not None and torch.isfinite(g).all() and g.any() for g in grads)


def test_a_dense_base_does_not_notice():
    model = dw.adapt(tiny.tiny("llama"), dw.LoRA(r=2))
    tiny.randomise(model).train()
    own = tiny.logits(model, "llama")
    set_merge_aware(model, True)
    assert torch.equal(tiny.logits(model, "llama"), own)
