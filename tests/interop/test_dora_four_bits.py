"""DoRA on 4-bit bases: PEFT over bitsandbytes as oracle; merging back into 4 bits; training with the merge in mind."""

import warnings

import pytest
import tiny
import torch
from test_bitsandbytes import made, ours, theirs

import deltaw as dw
from deltaw.checkpoint.adapters import adapter_state
from deltaw.core.generators import generator
from deltaw.kernels.dora_linear import dora_linear, squared_row_norms
from deltaw.kernels.lora_linear import absorbed_linear
from deltaw.methods.host import set_merge_aware
from deltaw.quant import NF4, NF4Weight, quantize_model

pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")]

TARGETS = ["q_proj", "v_proj", "down_proj"]


def weighed(logits):
    return (torch.tanh(logits) * torch.randn(logits.shape, generator=generator(0, "weights"))).sum()


def test_pefts_logits_gradients_and_files(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

    made("llama").save_pretrained(tmp_path / "base")
    # In training mode throughout: for evaluation on CPUs bitsandbytes repacks a weight, and PEFT's norm reads garbage.
    base = theirs(tmp_path / "base", "llama", dtype=torch.float32).train()
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True)).train()
    start = {k: p.detach().clone() for k, p in model.named_parameters() if "magnitude" in k}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator(4, key)))
    model.save_pretrained(tmp_path / "theirs")
    loaded = ours(tmp_path / "base", "llama", dtype="float32", quantize=NF4())
    fresh = dw.adapt(ours(tmp_path / "base", "llama", dtype="float32", quantize=NF4()), dw.DoRA(target_modules=TARGETS))
    begun = {k: t for k, t in adapter_state(fresh, "default").items() if "magnitude" in k}
    assert len(begun) == len(start) == 6
    for key, value in start.items():
        torch.testing.assert_close(begun[key.removesuffix(".default.weight")], value, rtol=1e-5, atol=0)
    dw.load_adapter(loaded, tmp_path / "theirs", name="x", trainable=True)
    expected = tiny.logits(model, "llama")
    assert tiny.relative(tiny.logits(loaded, "llama"), expected) < 1e-4
    weighed(model(**tiny.inputs("llama")).logits).backward()
    weighed(loaded(**tiny.inputs("llama")).logits).backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    wanted = get_peft_model_state_dict(model, state_dict=grads)
    places = {p.data_ptr(): p.grad for p in dw.adapter_parameters(loaded, "x").values()}
    got = {k: places[t.data_ptr()] for k, t in adapter_state(loaded, "x").items()}
    assert got.keys() == wanted.keys() and len(got) == 18
    for key in got:
        assert tiny.relative(got[key], wanted[key]) < 1e-4, key
    dw.save_adapter(loaded, tmp_path / "ours", name="x")
    again = theirs(tmp_path / "base", "llama", dtype=torch.float32).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys.*")
        back = PeftModel.from_pretrained(again, tmp_path / "ours").train()
    assert torch.equal(tiny.logits(back, "llama"), expected)


@pytest.mark.parametrize("mode", ["retain", "requantize"])
def test_merges_into_four_bits(mode):
    model = quantize_model(made("llama"), NF4())
    dw.adapt(model, dw.DoRA(r=4, target_modules=TARGETS))
    tiny.randomise(model, std=0.3)
    before = tiny.logits(quantize_model(made("llama"), NF4()), "llama")
    expected = tiny.logits(model, "llama")
    report = dw.MergeReport()
    calibration = [tiny.inputs("llama")] if mode == "retain" else None
    dw.merge(model, into="nf4", mode=mode, calibration=calibration, report=report)
    merged = tiny.logits(model, "llama")
    assert tiny.relative(merged, expected) < 0.5 * tiny.relative(before, expected)
    assert len(report.layers) >= 6
    dw.unmerge(model)
    assert torch.equal(tiny.logits(model, "llama"), expected)


def test_training_with_the_merge_in_mind_computes_with_the_rounded_product():
    draw = generator(0, "absorbed")
    W, x, g = (torch.randn(shape, generator=draw) for shape in ((24, 64), (5, 64), (5, 24)))
    A, B = torch.randn(3, 64, generator=draw), torch.randn(24, 3, generator=draw) * 0.1
    m = torch.rand(24, generator=draw) + 7
    base, bias = NF4Weight.quantize(W), torch.randn(24, generator=draw)
    squared = squared_row_norms(base)
    leaves = [t.clone().requires_grad_() for t in (x, A, B, m, bias)]
    norm = dora_linear(x, base, A, B, m, squared, scale=0.5)[1]
    c = leaves[3] / norm
    y = absorbed_linear(leaves[0], base, leaves[1], leaves[2], scale=0.5, out_scale=c, bias=leaves[4])
    rounded = NF4Weight.quantize((m / norm)[:, None] * (base.dequantize() + 0.5 * B @ A)).dequantize()
    torch.testing.assert_close(y, x @ rounded.t() + bias, rtol=1e-5, atol=1e-4)
    y.backward(g)
    plain = [t.clone().requires_grad_() for t in (x, A, B, m, bias)]
    unrounded, _ = dora_linear(plain[0], base, plain[1], plain[2], plain[3], squared, scale=0.5, bias=plain[4])
    unrounded.backward(g)
    # m's gradient is that of the rounded output, which is what was computed with.
    plain[3].grad = (g * (x @ rounded.t())).sum(0) / m
    for index, tolerance in ((1, 1e-5), (2, 1e-5), (3, 1e-5), (4, 1e-6)):
        assert tiny.relative(leaves[index].grad, plain[index].grad) < tolerance, index
    torch.testing.assert_close(leaves[0].grad, g @ rounded, rtol=1e-4, atol=1e-4)


def test_a_model_in_training_with_the_merge_in_mind():
    model = quantize_model(made("llama"), NF4())
    dw.adapt(model, dw.DoRA(r=4, target_modules=TARGETS))
    tiny.randomise(model, std=0.3)
    set_merge_aware(model, True)
    absorbed = model.train()(**tiny.inputs("llama")).logits
    weighed(absorbed).backward()
    assert all(p.grad is not None and p.grad.any() for p in dw.adapter_parameters(model, "default").values())
    model.eval()
    dw.merge(model, into="nf4", mode="requantize")
    assert tiny.relative(tiny.logits(model, "llama"), absorbed.detach()) < 1e-4
