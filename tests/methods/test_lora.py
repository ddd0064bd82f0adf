"""LoRA's configuration, its starting values and its formula."""

import math

import pytest
import tiny
import torch

import deltaw as dw
from deltaw.core.errors import InputError
from deltaw.methods.host import parts_of
from deltaw.methods.lora import param_count
from deltaw.methods.registry import method_of


def test_defaults_and_pefts_spellings():
    assert dw.LoRA() == dw.LoRA(r=16, alpha=32.0, target_modules="all-linear")
    ours = dw.LoRA(r=8, alpha=4, dropout=0.1, rslora=True, trainable_tokens=[1], init="gaussian")
    theirs = dw.LoRA(
        r=8, lora_alpha=4, lora_dropout=0.1, use_rslora=True, trainable_token_indices=[1], init_lora_weights="gaussian"
    )
    assert ours == theirs and dw.LoRA(init_lora_weights=True) == dw.LoRA()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(r=0), "r is 0: expected a whole number of at least 1"),
        (dict(r=True), "r is True"),
        (dict(r=2.0), "r is 2.0"),
        (dict(lora_alpha=0), "lora_alpha is 0: expected a number above 0"),
        (dict(alpha=-1), "alpha is -1"),
        (dict(alpha=float("nan")), "alpha is nan"),
        (dict(alpha=float("inf")), "alpha is inf"),
        (dict(lora_dropout=1.0), r"lora_dropout is 1.0: expected a probability in \[0, 1\)"),
        (dict(dropout="x"), "dropout is 'x'"),
        (dict(bias="some"), "bias is 'some'"),
        (dict(init_lora_weights="pisa"), "init_lora_weights is 'pisa'"),
        (dict(init=False), "init is False"),
        (dict(rank_pattern={"q": 0}), "rank_pattern is"),
        (dict(rank_pattern={"(": 1}), "rank_pattern is"),
        (dict(alpha_pattern={"q": 0}), "alpha_pattern is"),
        (dict(alpha_pattern=[1]), "alpha_pattern is"),
        (dict(r=0, bias="some", dropout=2), "r is 0.*; dropout is 2.*; bias is 'some'"),
        (dict(rank=3), "unknown LoRA option 'rank': did you mean"),
        (dict(alpha=1, lora_alpha=1), "both alpha and lora_alpha"),
    ],
)
def test_wrong_options_are_one_line_in_the_name_that_was_given(options, says):
    with pytest.raises(InputError, match=says) as caught:
        dw.LoRA(**options)
    assert "\n" not in str(caught.value)


def test_scale_and_rank_are_looked_up_apart():
    config = dw.LoRA(r=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"0.q_proj": 3})
    assert [(config.rank_of(p), config.scale_of(p)) for p in ("0.q_proj", "1.q_proj", "0.v_proj")] == [
        (2, 1.5), (2, 4.0), (4, 2.0),
    ]  # fmt: skip
    assert dw.LoRA(r=4, alpha=8, rslora=True).scale_of("x") == 8 / math.sqrt(4)
    assert param_count(config, "linear", (7, 5)) == 4 * 12
    assert param_count(dw.LoRA(r=4, lora_bias=True), "linear", (7, 5)) == 4 * 12 + 7


def test_starting_values_are_of_the_size_that_the_paper_has():
    targets = ["q_proj", "embed_tokens"]
    for init, deviation in (("default", 1 / math.sqrt(3 * 16)), ("gaussian", 1 / 256)):
        model = dw.adapt(tiny.tiny("llama"), dw.LoRA(r=256, init=init, target_modules=targets))
        for path, _, part in parts_of(model, "default"):
            A, B = part.lora_A.detach(), part.lora_B.detach()
            drawn, zero = (B, A) if "embed" in path else (A, B)
            expected = 1.0 if "embed" in path else deviation
            assert not zero.any()
            # 4,096 draws: the deviation's own relative error is about 1 %.
            assert abs(float(drawn.std()) / expected - 1) < 0.05 and abs(float(drawn.mean())) < 0.1 * expected
            if init == "default" and "embed" not in path:
                assert drawn.abs().max() <= 1 / math.sqrt(16)


def test_sites_start_apart_and_names_decide():
    first = dw.adapt(tiny.tiny("llama"), dw.LoRA(r=4, target_modules="qv"))
    wider = dw.adapt(tiny.tiny("llama"), dw.LoRA(r=4))
    values = {path: part.lora_A for path, _, part in parts_of(first, "default")}
    assert not torch.equal(*[values[f"model.layers.{i}.self_attn.q_proj"] for i in range(2)])
    for path, _, part in parts_of(wider, "default"):
        if path in values:
            assert torch.equal(part.lora_A, values[path])


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "llama",
            dict(target_modules=["embed_tokens"], lora_bias=True),
            "lora_bias: model.embed_tokens is an embedding",
        ),
        ("llama", dict(rank_pattern={"q_prj": 2}), "pattern 'q_prj' of rank_pattern names no adapted"),
        ("llama", dict(modules_to_save=["scor"]), "modules_to_save 'scor' matches no module"),
        ("llama", dict(trainable_tokens=[48]), "expected distinct row numbers of model.embed_tokens below 48"),
        ("llama", dict(trainable_tokens=[-1]), "expected distinct row numbers"),
        ("llama", dict(trainable_tokens=[3, 3]), "expected distinct row numbers"),
        ("llama", dict(trainable_tokens=[]), "expected distinct row numbers"),
        ("llama", dict(trainable_tokens={"embeddings": [1]}), "trainable tokens name 'embeddings', which is no module"),
        ("llama", dict(trainable_tokens=[3], modules_to_save=["embed_tokens"]), "trains whole: choose one"),
        ("llama-tied", dict(trainable_tokens=[3], modules_to_save=["lm_head"]), "trains whole: choose one"),
        ("llama", dict(trainable_tokens={"norm": [1]}), "is a LlamaRMSNorm, not a linear"),
        ("llama", dict(target_modules=["q_proj"], modules_to_save=["self_attn"]), "leaves no module"),
    ],
)
def test_what_a_model_refuses(name, options, says):
    model = tiny.tiny(name)
    before = {k: p.requires_grad for k, p in model.named_parameters()}
    with pytest.raises(InputError, match=says) as caught:
        dw.adapt(model, dw.LoRA(**options))
    assert "\n" not in str(caught.value)
    assert {k: p.requires_grad for k, p in model.named_parameters()} == before
    assert not any("forward" in m.__dict__ or "adapted" in m._modules for m in model.modules())
    assert "_deltaw" not in model.__dict__


def test_biases_that_are_not_added_to_the_output_are_refused():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.up = torch.nn.Conv1d(4, 4, 1), torch.nn.Linear(4, 4)

    with pytest.raises(InputError, match=r"bias='all' cannot train conv.bias of a Conv1d"):
        dw.adapt(Model(), dw.LoRA(r=2, bias="all"))
    model = dw.adapt(Model(), dw.LoRA(r=2, bias="lora_only"))
    assert [path for path, _, part in parts_of(model, "default")] == ["up", "up"]


def test_a_plain_module_of_torch_can_be_adapted():
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    ids = torch.arange(9)
    expected = model(ids)
    dw.adapt(model, dw.LoRA(r=2, target_modules=["0", "1", "3"]))
    assert torch.equal(model(ids), expected)
    tiny.randomise(model)
    changed = model(ids)
    assert not torch.equal(changed, expected)
    dw.merge(model)
    assert tiny.relative(model(ids), changed) < 1e-5
    assert method_of(dw.LoRA()).name == "lora"
    with pytest.raises(InputError, match=r"int is no method's configuration: expected one of dw.LoRA, "):
        method_of(3)
