"""Hosting: names, what is active, hooks and forwards of others, and what stands on the model."""

import types

import pytest
import tiny
import torch
from torch import nn

import deltaw as dw
from deltaw.core.errors import InputError
from deltaw.core.protocols import LowRank
from deltaw.methods.contract import Part
from deltaw.methods.host import book_of, parts_of, sites_of


@pytest.fixture
def model():
    return tiny.randomise(dw.adapt(tiny.tiny("llama"), dw.LoRA(r=4, target_modules="qv")))


@pytest.mark.parametrize("name", ["", "a.b", "a b", "ä", "a/b", "../x", "a\n"])
def test_names_that_could_be_no_module_or_file(name, model):
    with pytest.raises(InputError, match="expected letters, digits, _ and -"):
        dw.adapt(model, dw.LoRA(), name=name)


@pytest.mark.parametrize("name", ["keys", "train", "training", "forward", "_modules"])
def test_names_that_torch_has_taken(name):
    model = tiny.tiny("llama")
    with pytest.raises(InputError, match=f"adapter name '{name}' means something to torch's modules"):
        dw.adapt(model, dw.LoRA(r=2), name=name)
    assert "_deltaw" not in model.__dict__ and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["0", "a-b_c", "default2", "parts", "adapted", "lora_A"])
def test_names_that_are_fine(name):
    model = dw.adapt(tiny.tiny("llama"), dw.LoRA(r=2), name=name)
    assert dw.adapter_names(model) == [name] and len(dw.adapter_parameters(model, name)) == 28
    tiny.randomise(model, name)
    expected = tiny.logits(model, "llama")
    dw.set_adapter(model, None)
    assert not torch.equal(tiny.logits(model, "llama"), expected)
    dw.unload(model)


def test_unknown_and_taken_names(model):
    for call in (dw.set_adapter, dw.delete_adapter, dw.adapter_parameters, dw.summary):
        with pytest.raises(InputError, match="unknown adapter 'defalt': did you mean 'default'"):
            call(model, "defalt")
    with pytest.raises(InputError, match="already has an adapter named 'default'"):
        dw.adapt(model, dw.LoRA())
    assert dw.adapter_names(model) == ["default"]


def test_an_unknown_name_among_several_changes_nothing(model):
    expected = tiny.logits(model, "llama")
    with pytest.raises(InputError, match="unknown adapter 'x'"):
        dw.set_adapter(model, {"default": 0.5, "x": 0.5})
    assert torch.equal(tiny.logits(model, "llama"), expected)


def test_a_frozen_adapter_never_wants_gradients():
    model = dw.adapt(tiny.tiny("llama"), dw.LoRA(r=2), trainable=False)
    assert not any(p.requires_grad for p in model.parameters())
    dw.adapt(model, dw.LoRA(r=2), name="two")
    dw.set_adapter(model, ["default", "two"])
    wanting = {k for k, p in model.named_parameters() if p.requires_grad}
    assert wanting == dw.adapter_parameters(model, "two").keys()


def test_summary_of_which_adapter(model):
    dw.adapt(model, dw.LoRA(r=2, target_modules="mlp"), name="two")
    assert dw.summary(model).adapter == "two"
    dw.set_adapter(model, ["default", "two"])
    with pytest.raises(InputError, match="2 adapters are active: say which of default, two"):
        dw.summary(model)
    assert [len(dw.summary(model, name).sites) for name in ("default", "two")] == [4, 6]
    with pytest.raises(InputError, match="0 adapters are active: say which of none"):
        dw.summary(tiny.tiny("llama"))


def test_looking_at_a_model_leaves_nothing_on_it():
    model = tiny.tiny("llama")
    assert dw.adapter_names(model) == [] and list(sites_of(model)) == [] and book_of(model).merged is None
    dw.unload(model)
    assert "_deltaw" not in model.__dict__


def test_parts_meet_the_contract():
    options = dict(bias="lora_only", modules_to_save=["classifier"], trainable_tokens=[3])
    model = dw.adapt(tiny.tiny("bert-seq"), dw.LoRA(r=2, **options))
    parts = [part for _, _, part in parts_of(model, "default")]
    assert len({type(part) for part in parts}) == 4
    for part in parts:
        assert isinstance(part, Part) and isinstance(part, nn.Module)
        assert isinstance(part.low_rank(), LowRank | None) and isinstance(part.described(), dict)


def test_hooks_of_others_see_the_adapted_output(model):
    module, seen = model.model.layers[0].self_attn.q_proj, []
    module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    tiny.logits(model, "llama")
    (x, out), part = seen[0], module.adapted.parts["default"][0]
    expected = x @ (module.weight + part.scale * part.lora_B @ part.lora_A).t()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_a_forward_that_another_library_put_there_is_kept():
    model = tiny.tiny("llama")
    module, calls = model.model.layers[0].self_attn.q_proj, []

    def forward(self, x):
        calls.append(1)
        return nn.Linear.forward(self, x) * 2

    module.forward = types.MethodType(forward, module)
    kept = module.__dict__["forward"]
    expected = tiny.logits(model, "llama")
    dw.adapt(model, dw.LoRA(r=4, target_modules="qv"))
    assert torch.equal(tiny.logits(model, "llama"), expected) and len(calls) == 2
    tiny.randomise(model)
    x = torch.randn(3, 16)
    part = module.adapted.parts["default"][0]
    delta = part.scale * part.lora_B @ part.lora_A
    torch.testing.assert_close(module(x), x @ (2 * module.weight + delta).t(), rtol=1e-5, atol=1e-5)
    dw.unload(model)
    assert module.__dict__["forward"] is kept and torch.equal(tiny.logits(model, "llama"), expected)


@pytest.mark.parametrize("name", ["linear", "embedding"])
def test_keyword_arguments_and_every_shape(name):
    module = nn.Linear(6, 5) if name == "linear" else nn.Embedding(6, 5)
    model = tiny.randomise(dw.adapt(nn.ModuleDict({"m": module}), dw.LoRA(r=2, target_modules=["m"])))
    part = module.adapted.parts["default"][0]
    delta = part.scale * (part.lora_B @ part.lora_A).detach()
    for shape in ((), (3,), (2, 3), (0,), (2, 0, 3)):
        if name == "linear":
            x = torch.randn(*shape, 6)
            expected = x @ (module.weight + delta).t() + module.bias
            got = [module(x), module(input=x)]
        else:
            x = torch.randint(0, 6, shape)
            expected = (module.weight + delta.t())[x]
            got = [module(x), module(input=x)]
        for out in got:
            torch.testing.assert_close(out, expected)
    assert dw.adapter_names(model) == ["default"]


def test_a_padding_row_gets_no_gradient():
    module = nn.Embedding(6, 5, padding_idx=2)
    model = tiny.randomise(dw.adapt(nn.ModuleDict({"m": module}), dw.LoRA(r=3, target_modules=["m"])))
    module(torch.tensor([1, 2, 3])).sum().backward()
    (part,) = [part for _, _, part in parts_of(model, "default")]
    assert part.lora_A.grad[:, [1, 3]].any(0).all() and not part.lora_A.grad[:, [0, 2, 4, 5]].any()


def test_autocast_of_a_float32_model(model):
    expected = tiny.logits(model, "llama")
    given = tiny.inputs("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**given).logits
    assert out.dtype == torch.bfloat16 and tiny.relative(out.detach(), expected) < 5e-2
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in dw.adapter_parameters(model, "default").values())


def test_generation_with_a_cache_equals_generation_without(model):
    ids = tiny.inputs("llama")["input_ids"]
    options = dict(max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    merged = dw.merge(model).generate(ids, **options)
    assert torch.equal(cached, merged)


def test_moving_a_model_takes_its_adapters_along(model):
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    expected = tiny.logits(model, "llama")
    assert tiny.relative(tiny.logits(dw.merge(model), "llama"), expected) < 1e-6
    meta = dw.adapt(tiny.tiny("llama").to("meta"), dw.LoRA(r=2))
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_fused_experts_are_told_as_left_out():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 4))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.ModuleDict({"experts": Experts(), "router": nn.Linear(4, 2)})

    summary = dw.summary(dw.adapt(Model(), dw.LoRA(r=1)))
    assert summary.left_out == ["mlp.experts.gate_up_proj"] and "not adapted: 1 fused-expert" in str(summary)
