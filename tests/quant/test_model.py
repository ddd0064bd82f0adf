"""Which modules go into 4 bits, and models quantised in memory."""

import pytest
import tiny
import torch
from torch import nn

import deltaw as dw
from deltaw.core.errors import InputError
from deltaw.quant import NF4, NF4Tensor, NF4Weight, is_quantized, quantizable, quantize_model, quantized_sites

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LLAMA = {f"model.layers.{n}.{part}" for n in (0, 1) for part in
         [*(f"self_attn.{p}" for p in ATTENTION), *(f"mlp.{p}" for p in MLP)]}  # fmt: skip
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def paths(name, **options):
    return set(quantizable(tiny.tiny(name), NF4(**options)))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("llama", {}, LLAMA),
        ("llama", {"embeddings": True}, LLAMA | {EMBEDDING}),
        ("llama", {"head": True}, LLAMA | {HEAD}),
        ("llama", {"embeddings": True, "head": True}, LLAMA | {EMBEDDING, HEAD}),
        ("llama-tied", {}, LLAMA),
        ("llama-tied", {"embeddings": True}, LLAMA | {EMBEDDING, HEAD}),
        ("llama-tied", {"head": True}, LLAMA | {EMBEDDING, HEAD}),
        ("llama-tied", {"embeddings": True, "skip_modules": ["lm_head"]}, LLAMA),
        ("llama", {"skip_modules": ["layers.0"]}, {path for path in LLAMA if ".0." not in path}),
        ("llama", {"skip_modules": ["v_proj", "model.layers.1.mlp"]},
         {path for path in LLAMA if "v_proj" not in path and ".1.mlp" not in path}),
        ("llama-seq", {"head": True}, LLAMA),
    ],
)  # fmt: skip
def test_chosen_modules_of_a_llama(name, options, expected):
    assert paths(name, **options) == expected


def test_chosen_modules_of_other_models():
    conv = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert paths("gpt2") == {f"transformer.h.{n}.{part}" for n in (0, 1) for part in conv}
    layer = {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
             "intermediate.dense", "output.dense"}  # fmt: skip
    expected = {f"bert.encoder.layer.{n}.{part}" for n in (0, 1) for part in layer}
    # Neither the pooler nor the new classifier, which are trained.
    assert paths("bert-seq") == paths("bert-tok") == paths("bert-seq", head=True) == expected
    assert paths("bert-seq", embeddings=True) == expected | {"bert.embeddings.word_embeddings"}


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("llama", {"skip_modules": ["w_proj"]}, "skip_modules 'w_proj' matches no module of LlamaForCausalLM"),
        ("llama", {"skip_modules": ["layers"]}, "LlamaForCausalLM has no linear module to quantise"),
    ],
)
def test_options_that_fit_nothing(name, options, said):
    with pytest.raises(InputError, match=said):
        quantizable(tiny.tiny(name), NF4(**options))


def test_options_that_mean_nothing():
    with pytest.raises(InputError, match="block_size is 100: expected one of 64, 128"):
        NF4(block_size=100)
    with pytest.raises(InputError, match="expected a list of names"):
        NF4(skip_modules="lm_head")


CASES = [
    ("llama", NF4()),
    ("llama-tied", NF4(embeddings=True)),
    ("llama-bias", NF4(double_quant=False)),
    ("gpt2", NF4(head=True, block_size=128)),
    ("bert-seq", NF4(skip_modules=["query"])),
    ("t5", NF4(embeddings=True, head=True)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "config"), CASES, ids=[name for name, _ in CASES])
def test_a_model_computes_with_its_weights_quantised(name, config, dtype):
    dense, model = tiny.tiny(name, dtype), tiny.tiny(name, dtype)
    chosen = quantizable(model, config)
    kinds = {path: (type(module), module.training) for path, module in model.named_modules()}
    keys, shapes = list(model.state_dict()), {k: p.shape for k, p in model.named_parameters()}
    assert quantize_model(model, config) is model and is_quantized(model) and not is_quantized(dense)
    assert {path: (type(module), module.training) for path, module in model.named_modules()} == kinds
    assert list(model.state_dict()) == keys and {k: p.shape for k, p in model.named_parameters()} == shapes
    assert {path for path, _, _ in quantized_sites(model)} == set(chosen)
    originals, values = {path: dense.get_submodule(path).weight for path in chosen}, {}
    for path, original in originals.items():
        transposed = type(dense.get_submodule(path)).__name__ == "Conv1D"
        W = original.detach().t() if transposed else original.detach()
        packed = NF4Weight.quantize(W, double_quant=config.double_quant, block_size=config.block_size)
        weight = model.get_submodule(path).weight
        assert isinstance(weight, NF4Tensor) and not weight.requires_grad and weight.dtype == dtype
        tiny.assert_same(weight.packed.tensors(), packed.tensors())
        matrix = packed.dequantize().t().contiguous() if transposed else packed.dequantize()
        dense.get_submodule(path).weight = values.setdefault(id(original), nn.Parameter(matrix, requires_grad=False))
    tiny.assert_same(
        {k: p.detach() for k, p in model.named_parameters() if not isinstance(p, NF4Tensor)},
        {k: p.detach() for k, p in dense.named_parameters() if not isinstance(model.get_parameter(k), NF4Tensor)},
    )
    assert torch.equal(tiny.logits(model, name), tiny.logits(dense, name))


def test_tied_weights_stay_tied():
    model = quantize_model(tiny.tiny("llama-tied"), NF4(embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.lm_head.weight, NF4Tensor)
    model = quantize_model(tiny.tiny("llama-tied"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not isinstance(model.lm_head.weight, NF4Tensor)


def test_quantising_again_changes_nothing():
    model = quantize_model(tiny.tiny("llama"))
    before = {path: weight for path, _, weight in quantized_sites(model)}
    quantize_model(model, NF4(head=True))
    after = {path: weight for path, _, weight in quantized_sites(model)}
    assert after.keys() - before.keys() == {"lm_head"} and all(after[path] is before[path] for path in before)


def test_a_value_that_is_no_number_names_its_tensor():
    model = tiny.tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(InputError, match=r"cannot quantise model.layers.1.mlp.up_proj.weight: 1 of its 384 values"):
        quantize_model(model)


def test_an_adapted_model_is_refused():
    model = dw.adapt(tiny.tiny("llama"), dw.LoRA(r=2))
    with pytest.raises(InputError, match="carries adapters: quantise it before adapting"):
        quantize_model(model)
    assert not is_quantized(model)


def test_a_plain_module_is_quantised_too():
    model = nn.Sequential(nn.Linear(37, 13), nn.ReLU(), nn.Linear(13, 5))
    x = torch.ones(2, 37)
    quantize_model(model)
    assert {path for path, _, _ in quantized_sites(model)} == {"0", "2"}
    hidden = torch.relu(x @ model[0].weight.dequantize().t() + model[0].bias)
    torch.testing.assert_close(model(x), hidden @ model[2].weight.dequantize().t() + model[2].bias)
