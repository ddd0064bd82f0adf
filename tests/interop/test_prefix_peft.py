"""Prefix tuning's files: PEFT reads ours and we read PEFT's, with equal tensors, logits and generated text."""

import json

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import deltaw as dw
from deltaw.core.errors import InputError
from deltaw.core.generators import generator

# What PEFT says of its own about models without a name, and asks of transformers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file in.*"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

N = 4
MODELS = ["llama", "gpt2", "gemma3", "bloom", "qwen3"]
WEIGHTS = "adapter_model.safetensors"


def ours(name):
    model = dw.adapt(tiny.tiny(name), dw.PrefixTuning(N))
    return tiny.randomise(model, std=1.0)


def theirs(name, **options):
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": N} | options
    model = peft.get_peft_model(tiny.tiny(name), peft.PrefixTuningConfig(**options))
    for key, parameter in model.prompt_encoder.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator(0, key)))
    return model.eval()


def padded():
    given = tiny.inputs("llama", batch=3)
    given["attention_mask"][1, 5:] = given["attention_mask"][2, 3:] = 0
    return given


@pytest.mark.parametrize("name", MODELS)
def test_peft_reads_ours(name, tmp_path):
    model = ours(name)
    dw.save_adapter(model, tmp_path / "a")
    (own,) = dw.adapter_parameters(model, "default").values()
    assert {k: v.shape for k, v in load_file(tmp_path / "a" / WEIGHTS).items()} == {"prompt_embeddings": own.shape}
    loaded = peft.PeftModel.from_pretrained(tiny.tiny(name), tmp_path / "a").eval()
    assert torch.equal(loaded.prompt_encoder["default"].embedding.weight, own)
    with torch.no_grad():
        assert tiny.relative(loaded(**padded()).logits, model(**padded()).logits) < 1e-5
    ids = {"input_ids": torch.tensor([[5, 9, 11]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    settings = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(loaded.generate(**ids, **settings), model.generate(**ids, **settings))
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    tiny.assert_same(load_file(again / WEIGHTS), load_file(tmp_path / "a" / WEIGHTS))


@pytest.mark.parametrize("options", [{}, {"prefix_projection": True, "encoder_hidden_size": 6}], ids=["direct", "mlp"])
@pytest.mark.parametrize("name", MODELS)
def test_we_read_pefts(name, options, tmp_path):
    model = theirs(name, **options)
    model.save_pretrained(tmp_path / "a")
    loaded = dw.load_adapter(tiny.tiny(name), tmp_path / "a")
    (own,) = dw.adapter_parameters(loaded, "a").values()
    assert torch.equal(own, load_file(tmp_path / "a" / WEIGHTS)["prompt_embeddings"])
    with torch.no_grad():
        assert tiny.relative(loaded(**padded()).logits, model(**padded()).logits) < 1e-5
    dw.save_adapter(loaded, tmp_path / "b")
    tiny.assert_same(load_file(tmp_path / "b" / WEIGHTS), load_file(tmp_path / "a" / WEIGHTS))


def test_what_does_not_fit_is_one_line(tmp_path):
    dw.save_adapter(ours("llama"), tmp_path / "a")
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    with pytest.raises(InputError, match=r"of another shape \(prompt_embeddings \(4, 32\) instead of \(4, 64\)"):
        dw.load_adapter(tiny.tiny("gpt2"), tmp_path / "a")
    with pytest.raises(InputError, match="keeps no keys and values"):
        dw.load_adapter(tiny.tiny("distilbert-seq"), tmp_path / "a")
    for change, says in [
        ({"num_transformer_submodules": 2}, "is of an encoder-decoder"),
        ({"num_virtual_tokens": 5}, r"\(4, 32\) instead of \(5, 32\)"),
        ({"num_virtual_tokens": "4"}, "num_virtual_tokens is '4'"),
    ]:
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(fields | change))
        with pytest.raises(InputError, match=says):
            dw.load_adapter(tiny.tiny("llama"), tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(fields))
    save_file({"prompt_embeddings": torch.full((4, 32), torch.nan)}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(InputError, match="holds NaN or infinity"):
        dw.load_adapter(tiny.tiny("llama"), tmp_path / "a")
