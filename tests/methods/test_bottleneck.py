"""Bottleneck adapters against the equation written out with hooks on the plain model."""

import json

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

import deltaw as dw
from deltaw.checkpoint.adapters import adapter_state
from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.methods.host import parts_of

MODELS = ["llama", "gpt2", "bert-seq", "t5", "gemma3"]
ACTIVATION = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


def written_out(plain, model, weights, name, activation="gelu"):
    """The plain model's logits with y + sum of weight (U act(D y + d) + u) behind each adapted linear."""
    handles = []
    for path in {path for adapter in weights for path, _, _ in parts_of(model, adapter)}:
        own = [
            (weight, part)
            for adapter, weight in weights.items()
            for place, _, part in parts_of(model, adapter)
            if place == path
        ]

        def hook(module, args, y, own=own):
            total = y
            for weight, part in own:
                D, d, U, u = (p.to(y.dtype) for p in (part.down_weight, part.down_bias, part.up_weight, part.up_bias))
                inner = ACTIVATION[activation](torch.einsum("...o,ko->...k", y, D) + d)
                total = total + weight * (torch.einsum("...k,ok->...o", inner, U) + u)
            return total

        handles.append(plain.get_submodule(path).register_forward_hook(hook))
    out = plain(**tiny.inputs(name)).logits
    for handle in handles:
        handle.remove()
    return out


def loss_of(logits):
    weights = torch.randn(logits.shape, generator=generator(0, "loss")).to(logits.dtype)
    return (torch.tanh(logits) * weights).sum()


@pytest.mark.parametrize("activation", ACTIVATION)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_the_equations(name, activation):
    model, plain = tiny.tiny(name, torch.float64), tiny.tiny(name, torch.float64)
    dw.adapt(model, dw.Bottleneck(bottleneck_dim=5, activation=activation), dtype=torch.float64)
    tiny.randomise(model)
    expected = written_out(plain, model, {"default": 1.0}, name, activation)
    got = model.train()(**tiny.inputs(name)).logits
    assert tiny.relative(got, tiny.logits(tiny.tiny(name, torch.float64), name)) > 0.05
    parameters = dw.adapter_parameters(model, "default")
    ours = torch.autograd.grad(loss_of(got), list(parameters.values()))
    theirs = torch.autograd.grad(loss_of(expected), list(parameters.values()))
    tolerance = 1e-10 if name in ("gpt2", "bert-seq") else 1e-6
    assert tiny.relative(got, expected) < tolerance
    for key, mine, other in zip(parameters, ours, theirs, strict=True):
        assert (mine - other).norm() <= tolerance * other.norm(), key


@pytest.mark.parametrize("weights", [{"one": 1.0, "two": 1.0}, {"one": 0.5, "two": -2.0}])
def test_several_add_up(weights):
    model = tiny.tiny("llama", torch.float64)
    for name, seed in (("one", 1), ("two", 2)):
        dw.adapt(model, dw.Bottleneck(bottleneck_dim=3), name=name, dtype=torch.float64)
        tiny.randomise(model, name, seed=seed)
    dw.set_adapter(model, weights)
    expected = written_out(tiny.tiny("llama", torch.float64), model, weights, "llama")
    assert tiny.relative(tiny.logits(model, "llama"), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_dtypes_of_base_and_adapter_are_independent(dtype, adapter_dtype):
    model = dw.adapt(tiny.tiny("llama", dtype), dw.Bottleneck(bottleneck_dim=4), dtype=adapter_dtype)
    tiny.randomise(model)
    assert {p.dtype for p in dw.adapter_parameters(model, "default").values()} == {adapter_dtype}
    got = tiny.logits(model, "llama")
    assert got.dtype == dtype
    expected = written_out(tiny.tiny("llama", dtype).double(), model, {"default": 1.0}, "llama")
    # bfloat16: some roundings of 4e-3 in each of two layers.
    assert tiny.relative(got, expected) < (1e-5 if dtype == torch.float32 else 5e-2)


def test_on_four_bits_it_is_what_it_is_on_their_values():
    from deltaw.quant import NF4, quantize_model, quantized_sites

    model = quantize_model(tiny.tiny("llama"), NF4(embeddings=True, head=True))
    plain = tiny.tiny("llama")
    for path, module, weight in quantized_sites(model):
        plain.get_submodule(path).weight = nn.Parameter(weight.dequantize().contiguous().view_as(module.weight))
    assert torch.equal(tiny.logits(model, "llama"), tiny.logits(plain, "llama"))
    dw.adapt(model, dw.Bottleneck(bottleneck_dim=4))
    tiny.randomise(model)
    expected = written_out(plain, model, {"default": 1.0}, "llama")
    assert tiny.relative(tiny.logits(model, "llama"), expected) < 1e-5
    loss_of(model(**tiny.inputs("llama")).logits).backward()
    assert all(p.grad.any() for p in dw.adapter_parameters(model, "default").values())


def test_dropout_is_on_the_bottlenecks_input():
    model = dw.adapt(
        tiny.tiny("llama"), dw.Bottleneck(bottleneck_dim=4, dropout=0.4, target_modules=["0.mlp.down_proj"])
    )
    tiny.randomise(model)
    ((_, _, part),) = parts_of(model, "default")
    y = torch.randn(3, 16, generator=generator(0, "y"))
    torch.default_generator.manual_seed(4)
    got = part.train().update(None, y)
    torch.default_generator.manual_seed(4)
    part.dropout = 0.0
    assert torch.equal(got, part.update(None, F.dropout(y, 0.4)))
    assert not torch.equal(got, part.update(None, y))


# Where they sit.

SITES = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "bert-seq": ["attention.output.dense", "output.dense"],
    "gpt_neox": ["attention.dense", "mlp.dense_4h_to_h"],
    "modernbert": ["attn.Wo", "mlp.Wo"],
    "distilbert-seq": ["attention.out_lin", "ffn.lin2"],
}


@pytest.mark.parametrize("name", SITES)
def test_two_in_every_layer(name):
    model = dw.adapt(tiny.tiny(name), dw.Bottleneck(reduction_factor=4))
    paths = [path for path, _, _ in parts_of(model, "default")]
    assert (
        len(paths) == 4 and len({path for path in paths if any(path.endswith("." + end) for end in SITES[name])}) == 4
    )
    for layer in "01":
        for end in SITES[name]:
            assert any(f".{layer}." in path and path.endswith(f"{layer}.{end}") for path in paths)
    for site in dw.summary(model).sites:
        assert site.details == {"bottleneck_dim": site.shape[0] // 4}
        assert site.parameters == 2 * 4 * 16 + 4 + 16


def test_an_encoder_decoders_cross_attention_has_one_too():
    model = dw.adapt(tiny.tiny("t5"), dw.Bottleneck())
    paths = [path for path, _, _ in parts_of(model, "default")]
    ends = [path.rsplit(".", 1)[0].rsplit(".", 1)[-1] for path in paths]
    assert sorted(set(ends)) == ["DenseReluDense", "EncDecAttention", "SelfAttention"] and len(ends) == 10


def test_chosen_layers_and_linears():
    def paths(**options):
        model = dw.adapt(tiny.tiny("llama"), dw.Bottleneck(bottleneck_dim=2, **options))
        return [path.removeprefix("model.layers.") for path, _, _ in parts_of(model, "default")]

    assert paths(layers_to_transform=[1]) == ["1.self_attn.o_proj", "1.mlp.down_proj"]
    assert paths(exclude_modules="down_proj") == ["0.self_attn.o_proj", "1.self_attn.o_proj"]
    assert paths(target_modules=["q_proj", "0.mlp.up_proj"]) == [
        "0.self_attn.q_proj",
        "0.mlp.up_proj",
        "1.self_attn.q_proj",
    ]


class Odd(nn.Module):
    """Two layers whose linears nobody's table knows."""

    def __init__(self, *names):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(4, 4) for name in names}) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            for linear in layer.values():
                x = linear(x)
        return x


def test_layers_where_two_cannot_be_found_say_so():
    for model, says in [
        (Odd("a", "b"), r"layers.0 of Odd has none that is known: name the linears in target_modules"),
        (Odd("o_proj", "a"), r"layers.0 of Odd has layers.0.o_proj: name the linears"),
        (Odd("o_proj", "down_proj", "fc2"), r"has layers.0.o_proj, layers.0.down_proj, layers.0.fc2: name"),
        (nn.Sequential(nn.Linear(4, 4)), r"Sequential has no numbered layers: name the linears"),
    ]:
        with pytest.raises(InputError, match=says):
            dw.adapt(model, dw.Bottleneck())
    model = dw.adapt(Odd("a", "b"), dw.Bottleneck(bottleneck_dim=2, target_modules=["a"]))
    assert [path for path, _, _ in parts_of(model, "default")] == ["layers.0.a", "layers.1.a"]
    with pytest.raises(InputError, match="is an embedding: leave it out"):
        dw.adapt(tiny.tiny("llama"), dw.Bottleneck(target_modules=["embed_tokens"]))


def test_wrong_options_are_one_line():
    assert dw.Bottleneck().bottleneck_dim == 64 and dw.Bottleneck(reduction_factor=16).bottleneck_dim is None
    for options, says in [
        ({"bottleneck_dim": 0}, "bottleneck_dim is 0"),
        ({"bottleneck_dim": True}, "bottleneck_dim is True"),
        ({"bottleneck_dim": 4, "reduction_factor": 2}, "give one of them"),
        ({"reduction_factor": 0.5}, "reduction_factor is 0.5"),
        ({"activation": "elu"}, "activation is 'elu': expected one of gelu, relu, silu, tanh"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ]:
        with pytest.raises(InputError, match=says):
            dw.Bottleneck(**options)


# Files and merging.


def test_files(tmp_path):
    config = dw.Bottleneck(reduction_factor=4, activation="tanh", dropout=0.1, layers_to_transform=1)
    model = tiny.randomise(dw.adapt(tiny.tiny("llama"), config))
    dw.save_adapter(model, tmp_path / "a")
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["peft_type"] == "DELTAW_BOTTLENECK"
    assert fields["target_modules"] == ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"]
    loaded = dw.load_adapter(tiny.tiny("llama"), tmp_path / "a")
    assert torch.equal(tiny.logits(loaded, "llama"), tiny.logits(model, "llama"))
    tiny.assert_same(adapter_state(loaded, "a"), adapter_state(model, "default"))
    import peft

    with pytest.raises(KeyError, match="DELTAW_BOTTLENECK"):
        peft.PeftModel.from_pretrained(tiny.tiny("llama"), tmp_path / "a")
    del fields["activation"]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"adapter_config.json is damaged: expected activation"):
        dw.load_adapter(tiny.tiny("llama"), tmp_path / "a")


def test_it_cannot_be_merged():
    model = tiny.randomise(dw.adapt(tiny.tiny("llama"), dw.Bottleneck(bottleneck_dim=4)))
    with pytest.raises(InputError, match="depends on the input and cannot be merged"):
        dw.merge(model)
