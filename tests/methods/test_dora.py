"""DoRA's part: its magnitude, what it keeps and when it lets go, and its place beside other adapters."""

import copy

import pytest
import tiny
import torch
from torch import nn

import deltaw as dw
from deltaw.core.errors import InputError
from deltaw.methods.dora import DoraPart
from deltaw.methods.host import parts_of, steady_parts
from deltaw.quant import NF4, quantize_model

TARGETS = ["q_proj", "down_proj"]


def adapted(name="llama", **options):
    return tiny.randomise(dw.adapt(tiny.tiny(name), dw.DoRA(**{"r": 4, "target_modules": TARGETS} | options)))


def parts(model, name="default"):
    return [part for _, _, part in parts_of(model, name) if isinstance(part, DoraPart)]


def test_the_magnitude_starts_as_the_norm_of_the_rows_and_counts():
    model = dw.adapt(tiny.tiny("gpt2"), dw.DoRA(r=2, target_modules=["c_attn", "wte"]))
    for path, module, part in parts_of(model, "default"):
        W = module.weight.t()
        torch.testing.assert_close(part.magnitude, W.norm(dim=1), rtol=1e-6, atol=0)
        assert part.magnitude.shape == (part.lora_B.shape[0],), path
    summed = dw.summary(model)
    assert all(site.parameters == 2 * sum(site.shape) + site.shape[0] for site in summed.sites)


def test_narrow_factors_keep_a_wide_magnitude():
    model = dw.adapt(tiny.tiny("llama", torch.bfloat16), dw.DoRA(r=2), dtype=torch.bfloat16)
    assert {p.magnitude.dtype for p in parts(model)} == {torch.float32}
    assert {p.lora_A.dtype for p in parts(model)} == {torch.bfloat16}


def test_norms_follow_the_factors_unless_told_that_they_are_steady():
    model = adapted()
    before = tiny.logits(model, "llama")
    for part in steady_parts(model):
        part.steady(True)
    assert torch.equal(tiny.logits(model, "llama"), before)
    kept = [part.norm() for part in parts(model)]
    assert all(part.norm() is norm for part, norm in zip(parts(model), kept, strict=True))
    with torch.no_grad():
        for part in parts(model):
            part.lora_B.mul_(2)
    stale = tiny.logits(model, "llama")
    for part in steady_parts(model):
        part.steady(True)
    fresh = tiny.logits(model, "llama")
    for part in steady_parts(model):
        part.steady(False)
    assert torch.equal(tiny.logits(model, "llama"), fresh) and not torch.equal(stale, fresh)
    assert all(part.norm() is not part.norm() for part in parts(model))


def test_the_weights_norms_follow_the_weight():
    """In place, cast, replaced, in 4 bits, in a copy."""
    model = adapted()
    tiny.logits(model, "llama")

    def check(model, dtype=torch.float32):
        for _, module, part in parts_of(model, "default"):
            W = module.weight.dequantize() if hasattr(module.weight, "packed") else module.weight
            torch.testing.assert_close(part.squared(), W.detach().to(dtype).square().sum(1), rtol=1e-5, atol=0)

    check(model)
    with torch.no_grad():
        for _, module, _ in parts_of(model, "default"):
            module.weight.mul_(1.5)
    check(model)
    twin = copy.deepcopy(model)
    check(twin.double(), torch.float64)
    for _, module, _ in parts_of(model, "default"):
        module.weight = nn.Parameter(module.weight.detach() + 1, requires_grad=False)
    check(model)
    check(model.to(torch.bfloat16))
    four_bits = dw.adapt(quantize_model(tiny.tiny("llama"), NF4()), dw.DoRA(r=2, target_modules=TARGETS))
    check(four_bits)
    check(four_bits.to(torch.bfloat16))


@pytest.mark.parametrize("four_bits", [False, True])
def test_beside_a_lora_the_updates_add_up_with_their_weights(four_bits):
    model = tiny.tiny("llama", torch.float64)
    if four_bits:
        quantize_model(model, NF4())
    dw.adapt(model, dw.DoRA(r=3, target_modules=TARGETS), name="d", dtype=torch.float64)
    dw.adapt(model, dw.LoRA(r=2, target_modules=TARGETS), name="l", dtype=torch.float64)
    for name in ("d", "l"):
        tiny.randomise(model, name)
    deltas = {path: {} for path, _, _ in parts_of(model, "d")}
    for name in ("d", "l"):
        for path, _, part in parts_of(model, name):
            deltas[path][name] = part.delta()
    dw.set_adapter(model, {"d": 0.6, "l": -0.5})
    got = tiny.logits(model, "llama")
    base = quantize_model(tiny.tiny("llama", torch.float64), NF4()) if four_bits else tiny.tiny("llama", torch.float64)
    for path, delta in deltas.items():
        module = base.get_submodule(path)
        W = module.weight.dequantize() if four_bits else module.weight.detach()
        module.weight = nn.Parameter(W + 0.6 * delta["d"] - 0.5 * delta["l"])
    assert tiny.relative(got, tiny.logits(base, "llama")) < 1e-6
    dw.merge(model, into="float32")
    assert tiny.relative(tiny.logits(model, "llama"), got) < 1e-5


def test_a_bias_for_b_is_refused():
    with pytest.raises(InputError, match="lora_bias does not go with DoRA"):
        dw.DoRA(lora_bias=True)


def test_spellings_and_unknown_names():
    assert dw.DoRA(lora_alpha=8, use_rslora=True) == dw.DoRA(alpha=8, rslora=True)
    with pytest.raises(InputError, match="DoRA option 'rnk'"):
        dw.DoRA(rnk=8)


def test_dropout_leaves_the_frozen_product_whole():
    model = adapted(dropout=0.5).train()
    with torch.no_grad():
        for part in parts(model):
            part.lora_B.zero_()
            part.magnitude.copy_(part.norm())
    assert torch.equal(model(**tiny.inputs("llama")).logits, tiny.logits(tiny.tiny("llama"), "llama"))
