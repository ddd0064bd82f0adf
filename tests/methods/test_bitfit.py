"""BitFit: which parameters are trained, and new biases against a model that has them."""

import json

import pytest
import tiny
import torch

import deltaw as dw
from deltaw.checkpoint.adapters import adapter_state
from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.methods.host import parts_of


def biases(model):
    """Paths of the modules with a bias that the model's output depends on."""
    named = model.named_parameters(remove_duplicate=False)
    return {key.removesuffix(".bias") for key, _ in named if key.endswith("bias")}


@pytest.mark.parametrize("name", ["llama-bias", "gpt2", "bert-seq", "bert-mlm", "distilbert-seq", "opt", "qwen2"])
def test_every_bias_is_trained_and_nothing_else(name):
    model = tiny.tiny(name)
    expected = biases(model)
    if name == "bert-mlm":
        # One parameter under two names; the decoder adds it.
        expected.remove("cls.predictions")
    count = sum(model.get_parameter(f"{path}.bias").numel() for path in expected)
    dw.adapt(model, dw.BitFit())
    assert {path for path, _, _ in parts_of(model, "default")} == expected
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert dw.summary(model).trainable_parameters == count


def test_a_model_without_biases_says_what_to_give():
    with pytest.raises(InputError, match="LlamaForCausalLM has no bias to train: give add_missing=True"):
        dw.adapt(tiny.tiny("llama"), dw.BitFit())
    # A new classifier alone is not BitFit either.
    with pytest.raises(InputError, match="no bias to train"):
        dw.adapt(tiny.tiny("llama-seq"), dw.BitFit(modules_to_save=["score"]))
    with pytest.raises(InputError, match="is an embedding, which has no bias"):
        dw.adapt(tiny.tiny("llama"), dw.BitFit(add_missing=True, target_modules=["embed_tokens"]))


def test_new_biases_equal_those_of_a_model_that_has_them():
    """`llama` with new biases is `llama-bias` with the same weights and these biases: logits and gradients."""
    twin, model = tiny.tiny("llama-bias", torch.float64), tiny.tiny("llama", torch.float64)
    model.load_state_dict({k: v for k, v in twin.state_dict().items() if not k.endswith(".bias")})
    dw.adapt(model, dw.BitFit(add_missing=True), dtype=torch.float64)
    assert {path for path, _, _ in parts_of(model, "default")} == biases(twin)
    tiny.randomise(model)
    for path, _, part in parts_of(model, "default"):
        twin.get_parameter(f"{path}.bias").data.copy_(part.bias)
    weights = torch.randn(2, 7, tiny.VOCAB, generator=generator(0, "loss")).double()
    for one in (model, twin):
        (torch.tanh(one(**tiny.inputs("llama")).logits) * weights).sum().backward()
    assert tiny.relative(tiny.logits(model, "llama"), tiny.logits(twin, "llama")) < 1e-12
    for path, _, part in parts_of(model, "default"):
        expected = twin.get_parameter(f"{path}.bias").grad
        torch.testing.assert_close(part.bias.grad, expected, rtol=1e-6, atol=1e-9)


def test_old_and_new_biases_together_and_chosen_layers():
    model = dw.adapt(
        tiny.tiny("qwen2"), dw.BitFit(add_missing=True, target_modules=["attention"], layers_to_transform=1)
    )
    found = {path: part.described() for path, _, part in parts_of(model, "default")}
    new = {path for path, said in found.items() if said == {"bias": "new"}}
    assert new == {"model.layers.1.self_attn.o_proj"}
    assert set(found) - new == biases(tiny.tiny("qwen2"))
    with pytest.raises(InputError, match=r"cannot merge a bias into model.layers.1.self_attn.o_proj, which has none"):
        dw.merge(model)


@pytest.mark.parametrize("config", [dw.BitFit(), dw.BitFit(add_missing=True, target_modules=["mlp", "o_proj"])])
def test_files(config, tmp_path):
    name = "qwen2"
    model = tiny.randomise(dw.adapt(tiny.tiny(name), config))
    dw.save_adapter(model, tmp_path / "a")
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["peft_type"] == "DELTAW_BITFIT" and fields["add_missing"] == config.add_missing
    assert len(fields["target_modules"]) == (8 if config.add_missing else 0)
    loaded = dw.load_adapter(tiny.tiny(name), tmp_path / "a")
    assert torch.equal(tiny.logits(loaded, name), tiny.logits(model, name))
    tiny.assert_same(adapter_state(loaded, "a"), adapter_state(model, "default"))
    import peft

    with pytest.raises(KeyError, match="DELTAW_BITFIT"):
        peft.PeftModel.from_pretrained(tiny.tiny(name), tmp_path / "a")
    for field, wrong in (("add_missing", "yes"), ("target_modules", None)):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(fields | {field: wrong}))
        with pytest.raises(InputError, match=r"adapter_config.json is damaged"):
            dw.load_adapter(tiny.tiny(name), tmp_path / "a")


def test_merging_equals_biases_written_by_hand():
    model, plain = dw.adapt(tiny.tiny("bert-seq"), dw.BitFit()), tiny.tiny("bert-seq")
    tiny.randomise(model)
    for path, _, part in parts_of(model, "default"):
        plain.get_parameter(f"{path}.bias").data.copy_(part.bias)
    expected = tiny.logits(plain, "bert-seq")
    torch.testing.assert_close(tiny.logits(model, "bert-seq"), expected, rtol=1e-5, atol=1e-6)
    dw.merge(model)
    assert torch.equal(tiny.logits(model, "bert-seq"), expected)
