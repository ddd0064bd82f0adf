"""Merging: exact to the dtype, ties told in the configuration, and back again without a bit lost."""

import pytest
import tiny
import torch

import deltaw as dw
from deltaw.checkpoint import merging
from deltaw.core.errors import InputError
from deltaw.methods.host import parts_of

TOKENS = [36, 10]


def adapted(name, dtype=torch.float32, adapter="default", seed=1, **options):
    model = dw.adapt(tiny.tiny(name, dtype), dw.LoRA(**{"r": 4, "alpha": 3.0} | options), name=adapter)
    return tiny.randomise(model, adapter, seed=seed)


def saved_and_loaded(model, path):
    """The folder in plain transformers."""
    dw.save_model(model, path)
    return type(model).from_pretrained(path, dtype=next(model.parameters()).dtype).eval()


def exact(model, weights):
    """W + sum of weight scale B A in float64, in the stored layout, by path."""
    result = {}
    for name, weight in weights.items():
        for path, module, part in parts_of(model, name):
            W = result.get(path, module.weight.detach().double())
            delta = part.scale * (part.lora_B.detach().double() @ part.lora_A.detach().double())
            result[path] = W + weight * (delta if part.kind == "linear" else delta.t())
    return result


def units_in_the_last_place(values):
    """The distance from each value to the next of its dtype, in float64."""
    following = torch.nextafter(values.abs(), torch.full_like(values, float("inf")))
    return following.double() - values.abs().double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("weights", [{"one": 1.0}, {"one": 0.7, "two": -0.3}])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_weights_are_the_float64_sum_rounded_once(name, weights, dtype):
    targets = ["all-linear", "embed_tokens" if name == "llama" else "wpe"]
    model = adapted(name, dtype, "one", target_modules=targets)
    dw.adapt(model, dw.LoRA(r=2, target_modules=targets), name="two", dtype=torch.float64)
    tiny.randomise(model, "two")
    dw.set_adapter(model, weights)
    expected = exact(model, weights)
    dw.merge(model)
    assert len(expected) > 8
    for path, value in expected.items():
        merged = model.get_submodule(path).weight
        assert merged.dtype == dtype and not merged.requires_grad and merged.is_contiguous()
        error = (merged.detach().double() - value).abs()
        # Half a unit for rounding to nearest, and a few roundings of the largest term for the sum in float32 (or 64).
        wide = torch.promote_types(dtype, torch.float32)
        rounding = 0.5 * units_in_the_last_place(merged.detach()) if dtype != wide else 0.0
        assert (error <= rounding + 8 * torch.finfo(wide).eps * value.abs().max()).all()


def test_the_sum_does_not_depend_on_how_many_elements_are_taken_at_a_time(monkeypatch):
    expected = dw.merge(adapted("gpt2", target_modules=["all-linear", "wpe"], trainable_tokens=TOKENS)).state_dict()
    monkeypatch.setattr(merging, "_ELEMENTS", 40)
    got = dw.merge(adapted("gpt2", target_modules=["all-linear", "wpe"], trainable_tokens=TOKENS)).state_dict()
    assert got.keys() == expected.keys()
    for key in got:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-6, atol=1e-6)


def test_an_adapted_tied_head_is_untied_and_said_to_be(tmp_path):
    model = adapted("llama-tied", target_modules=["lm_head", "q_proj"])
    expected, embedding = tiny.logits(model, "llama-tied"), model.model.embed_tokens.weight
    dw.merge(model)
    assert model.config.tie_word_embeddings is False
    assert model.model.embed_tokens.weight is embedding and model.lm_head.weight is not embedding
    merged = tiny.logits(model, "llama-tied")
    assert tiny.relative(merged, expected) < 1e-5
    loaded = saved_and_loaded(model, tmp_path / "m")
    assert loaded.config.tie_word_embeddings is False
    assert torch.equal(tiny.logits(loaded, "llama-tied"), merged)
    dw.unmerge(model)
    assert model.config.tie_word_embeddings is True and model.lm_head.weight is embedding
    assert torch.equal(tiny.logits(model, "llama-tied"), expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["embed_tokens"]),
        dict(target_modules=["embed_tokens", "lm_head"]),
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        dict(target_modules=["q_proj"], trainable_tokens={"lm_head": TOKENS}),
        dict(target_modules=["q_proj"], trainable_tokens={"lm_head": TOKENS, "embed_tokens": [3]}),
        dict(target_modules=["q_proj", "lm_head"], trainable_tokens=TOKENS),
    ],
)
def test_whatever_parts_the_two_unties_them(options, tmp_path):
    model = adapted("llama-tied", **options)
    expected = tiny.logits(model, "llama-tied")
    dw.merge(model)
    merged = tiny.logits(model, "llama-tied")
    assert tiny.relative(merged, expected) < 1e-5 and model.config.tie_word_embeddings is False
    assert torch.equal(tiny.logits(saved_and_loaded(model, tmp_path / "m"), "llama-tied"), merged)


@pytest.mark.parametrize(
    ("name", "targets"), [("llama-tied", "qv"), ("gpt2", "attention"), ("bert-mlm", "qv"), ("t5", "qv")]
)
def test_tokens_of_a_tied_embedding_stay_tied(name, targets, tmp_path):
    model = adapted(name, target_modules=targets, trainable_tokens=TOKENS)
    expected, rows = (
        tiny.logits(model, name),
        next(p.rows for _, _, p in parts_of(model, "default") if hasattr(p, "rows")),
    )
    dw.merge(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is embedding.weight and model.config.tie_word_embeddings is True
    torch.testing.assert_close(embedding.weight[TOKENS], rows.detach())
    merged = tiny.logits(model, name)
    assert tiny.relative(merged, expected) < 1e-5
    assert torch.equal(tiny.logits(saved_and_loaded(model, tmp_path / "m"), name), merged)


@pytest.mark.parametrize("targets", [["shared"], ["lm_head"], ["encoder.embed_tokens"]])
def test_an_architecture_that_always_ties_refuses(targets):
    model = adapted("t5", target_modules=[*targets, "v"])
    before, config, expected = tiny.base_state(model), model.config.to_dict(), tiny.logits(model, "t5")
    with pytest.raises(InputError, match="which T5ForConditionalGeneration always ties: leave the adapter unmerged"):
        dw.merge(model)
    tiny.assert_same(tiny.base_state(model), before)
    assert model.config.to_dict() == config and torch.equal(tiny.logits(model, "t5"), expected)
    assert model.lm_head.weight is model.shared.weight


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["gpt2", "bert-mlm", "llama-bias"])
def test_biases(name, bias, tmp_path):
    model = adapted(name, bias=bias, target_modules="qv")
    expected = tiny.logits(model, name)
    trained = {
        path: part.bias.detach().clone() for path, _, part in parts_of(model, "default") if hasattr(part, "bias")
    }
    dw.merge(model)
    for path, value in trained.items():
        torch.testing.assert_close(model.get_submodule(path).bias.detach(), value)
    merged = tiny.logits(model, name)
    assert tiny.relative(merged, expected) < 1e-5
    if name == "bert-mlm":
        assert model.cls.predictions.bias is model.cls.predictions.decoder.bias
    assert torch.equal(tiny.logits(saved_and_loaded(model, tmp_path / "m"), name), merged)


def test_a_shift_where_there_is_no_bias_is_refused():
    model = adapted("llama", target_modules=["q_proj"], lora_bias=True)
    before = tiny.base_state(model)
    with pytest.raises(InputError, match=r"cannot merge a bias into model.layers.0.self_attn.q_proj, which has none"):
        dw.merge(model)
    tiny.assert_same(tiny.base_state(model), before)
    assert dw.adapter_names(model) == ["default"] and "forward" in model.model.layers[0].self_attn.q_proj.__dict__


def test_an_adapted_decoder_of_an_encoder_parts_all_that_was_tied(tmp_path):
    model = adapted("bert-mlm", target_modules=["decoder", "query"])
    expected, before = tiny.logits(model, "bert-mlm"), tiny.base_state(model)
    merged = tiny.logits(dw.merge(model), "bert-mlm")
    assert tiny.relative(merged, expected) < 1e-5
    assert torch.equal(tiny.logits(saved_and_loaded(model, tmp_path / "m"), "bert-mlm"), merged)
    dw.unmerge(model)
    tiny.assert_same(tiny.base_state(model), before)
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_to_save_and_their_inner_ties(dtype, tmp_path):
    model = adapted("bert-mlm", dtype, modules_to_save=["cls", "embeddings.LayerNorm"], target_modules="qv")
    expected = tiny.logits(model, "bert-mlm")
    dw.merge(model)
    assert torch.equal(model.cls.predictions.bias, model.cls.predictions.decoder.bias)
    assert model.config.tie_word_embeddings is False
    merged = tiny.logits(model, "bert-mlm")
    assert tiny.relative(merged, expected) < (1e-5 if dtype == torch.float32 else 5e-2)
    loaded = saved_and_loaded(model, tmp_path / "m")
    assert torch.equal(tiny.logits(loaded, "bert-mlm"), merged)


@pytest.mark.parametrize("weights", [["one", "two"], {"one": 0.25, "two": 1.5}, {"two": 1.0}])
def test_combinations_are_merged_as_they_are_active(weights, tmp_path):
    model = adapted("llama", adapter="one", bias="none")
    dw.adapt(model, dw.LoRA(r=3, rslora=True, target_modules="mlp"), name="two")
    tiny.randomise(model, "two")
    dw.set_adapter(model, weights)
    expected = tiny.logits(model, "llama")
    dw.merge(model)
    merged = tiny.logits(model, "llama")
    assert tiny.relative(merged, expected) < 1e-5
    assert torch.equal(tiny.logits(saved_and_loaded(model, tmp_path / "m"), "llama"), merged)
    dw.unmerge(model)
    assert dw.adapter_names(model) == ["one", "two"] and torch.equal(tiny.logits(model, "llama"), expected)


def test_without_the_originals_the_model_is_plain_again():
    model = adapted("llama")
    weight = model.model.layers[0].self_attn.q_proj.weight
    expected = tiny.logits(dw.merge(model, keep_original=False), "llama")
    with pytest.raises(InputError, match=r"with keep_original=False; load it again"):
        dw.unmerge(model)
    assert model.model.layers[0].self_attn.q_proj.weight is not weight
    assert torch.equal(tiny.logits(model, "llama"), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(tiny.logits(dw.adapt(model, dw.LoRA(r=2)), "llama"), expected)


def test_what_a_merged_model_refuses():
    model = dw.merge(adapted("llama"))
    for refused, says in [
        (lambda: dw.merge(model), "merged already"),
        (lambda: dw.adapt(model, dw.LoRA(), name="x"), "call dw.unmerge"),
        (lambda: dw.set_adapter(model, None), "call dw.unmerge"),
        (lambda: dw.delete_adapter(model, "default"), "call dw.unmerge"),
        (lambda: dw.unload(model), "call dw.unmerge"),
    ]:
        with pytest.raises(InputError, match=says):
            refused()
    dw.unload(dw.unmerge(model))
    for refused, says in [
        (lambda: dw.merge(model), "no adapter is active"),
        (lambda: dw.unmerge(model), "nothing to undo"),
    ]:
        with pytest.raises(InputError, match=says):
            refused()


def test_an_inactive_adapter_is_not_merged():
    model = adapted("llama")
    expected = tiny.logits(tiny.tiny("llama"), "llama")
    dw.set_adapter(model, None)
    with pytest.raises(InputError, match="no adapter is active"):
        dw.merge(model)
    assert torch.equal(tiny.logits(model, "llama"), expected)


def test_training_goes_on_after_unmerging():
    model = dw.unmerge(dw.merge(adapted("gpt2")))
    model.train()(**tiny.inputs("gpt2")).logits.sum().backward()
    assert all(p.grad is not None for p in dw.adapter_parameters(model, "default").values())
    assert all(p.grad is None for k, p in model.named_parameters() if "adapted" not in k)
