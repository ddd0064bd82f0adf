"""Folders in 4 bits: transformers + bitsandbytes' load here, and ours load there, to the bit.

bitsandbytes' kernel for CPUs takes each row to begin a block, which is so only where rows are whole blocks. Models here
have such rows, but for "odd", whose logits there are not compared.
"""

import copy
import json
import math
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file

import deltaw as dw
from deltaw.quant import NF4, NF4Tensor, quantized_sites

bitsandbytes = pytest.importorskip("bitsandbytes")

NAMES = ["llama", "llama-tied", "wide", "odd", "gpt2", "opt", "mpt", "bert-mlm", "bart-seq", "t5"]
#: "wide" has more than one block of nested scales, the last one short.
SIZES = {
    "wide": {"hidden_size": 128, "intermediate_size": 192},
    "odd": {"hidden_size": 104, "intermediate_size": 203, "head_dim": 26, "num_attention_heads": 4},
}
LABELS = ["a", "b", "c"]


def task_of(name):
    return {"bert-mlm": "masked-lm", "bart-seq": "sequence-classification"}.get(name, "causal-lm")


def auto_of(name):
    import transformers

    return {
        "bert-mlm": transformers.AutoModelForMaskedLM,
        "bart-seq": transformers.AutoModelForSequenceClassification,
        "t5": transformers.AutoModelForSeq2SeqLM,
    }.get(name, transformers.AutoModelForCausalLM)


def logits_of(model, name):
    with torch.no_grad():
        return model(**tiny.inputs(name)).logits


def made(name):
    """As `tiny.tiny`, with rows of whole blocks."""
    import transformers

    prefix, suffix, options = tiny.MODELS.get(name, tiny.MODELS["llama"])
    options = {key: {16: 64, 24: 128, 8: 32}.get(value, value) for key, value in options.items()} | SIZES.get(name, {})
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, prefix + suffix)(getattr(transformers, f"{prefix}Config")(**options))
    tiny.draw(model, 0, name, std=0.1)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """16-bit folders by name."""
    root = tmp_path_factory.mktemp("dense")

    def folder(name):
        path = root / name
        if not path.exists():
            made(name).to(torch.bfloat16).save_pretrained(path)
        return path

    return folder


def theirs(folder, name, *, double=True, dtype=torch.bfloat16, **options):
    import transformers

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        **options,
    )
    return auto_of(name).from_pretrained(folder, quantization_config=config, dtype=dtype).eval()


def ours(folder, name, **options):
    labels = LABELS if task_of(name).endswith("classification") else None
    given = {"dtype": "bfloat16", "device": "cpu"} | options
    return dw.load_model(folder, task=task_of(name), labels=labels, **given)


def their_values(model):
    """{path: dequantised W (out, in)} of the modules that bitsandbytes holds in 4 bits."""
    return {
        path: dequantized(module.weight, module.weight.quant_state)
        for path, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }


def dequantized(weight, state):
    """As one row, which begins a block in any case."""
    flat = copy.copy(state)
    flat.shape = torch.Size((1, math.prod(state.shape)))
    return bitsandbytes.functional.dequantize_4bit(weight.data, flat).view(state.shape)


def without_head(values):
    return {path: value for path, value in values.items() if not path.startswith("classification_head")}


def our_values(model):
    return {path: weight.packed.dequantize() for path, _, weight in quantized_sites(model)}


def dense_values(model):
    skip = (NF4Tensor, bitsandbytes.nn.Params4bit)
    return {key: p.detach() for key, p in model.named_parameters() if not isinstance(p, skip)}


def stored(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_their_folder_loads_here(folders, tmp_path, monkeypatch, name, double):
    peer = theirs(folders(name), name, double=double)
    peer.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = ours(tmp_path, name)
    tiny.assert_same(our_values(model), without_head(their_values(peer)))
    # They quantise the heads of tasks, which are trained here, and so are read as dense as they can be.
    heads = {f"{path}.weight": value for path, value in their_values(peer).items() if path not in our_values(model)}
    assert set(heads) == (
        {f"classification_head.{n}.weight" for n in ("dense", "out_proj")} if name == "bart-seq" else set()
    )
    dense = dense_values(model)
    tiny.assert_same(dense, {key: (dense_values(peer) | heads)[key] for key in dense})
    assert all(parameter.requires_grad != isinstance(parameter, NF4Tensor) for parameter in model.parameters())
    assert {weight.packed.double_quant for _, _, weight in quantized_sites(model)} == {double}
    assert not hasattr(model.config, "quantization_config") and not hasattr(model, "hf_quantizer")
    if name not in ("odd", "bart-seq"):
        assert tiny.relative(logits_of(model, name), logits_of(peer, name)) < 2e-2


def test_values_take_the_dtype_that_was_asked_for(folders, tmp_path):
    peer = theirs(folders("llama"), "llama")
    peer.save_pretrained(tmp_path)
    model = ours(tmp_path, "llama", dtype="float32")
    for path, _, weight in quantized_sites(model):
        state = peer.get_submodule(path).weight.quant_state
        state.dtype = torch.float32
        expected = dequantized(peer.get_submodule(path).weight, state)
        assert weight.dtype == torch.float32 and torch.equal(weight.packed.dequantize(), expected)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_our_folder_loads_there(folders, tmp_path, name, double):
    skip = ("wo",) if name == "t5" else ()
    model = ours(folders(name), name, quantize=NF4(double_quant=double, skip_modules=skip))
    dw.save_model(model, tmp_path)
    assert not hasattr(model.config, "quantization_config")
    peer = auto_of(name).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    tiny.assert_same(their_values(peer), our_values(model))
    tiny.assert_same(dense_values(peer), dense_values(model))
    if name != "odd":
        assert tiny.relative(logits_of(model, name), logits_of(peer, name)) < 2e-2
    again = ours(tmp_path, name)
    tiny.assert_same(our_values(again), our_values(model))
    tiny.assert_same(dense_values(again), dense_values(model))


def test_a_module_left_out_is_left_out_there(folders, tmp_path):
    quantize = NF4(skip_modules=["layers.1.mlp.gate_proj", "layers.0.self_attn"], head=True)
    model = ours(folders("llama"), "llama", quantize=quantize)
    dw.save_model(model, tmp_path)
    peer = auto_of("llama").from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert "lm_head" in their_values(peer)
    tiny.assert_same(their_values(peer), our_values(model))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "wide", "odd", "gpt2", "opt"])
def test_the_files_are_what_they_write(folders, tmp_path, name, double):
    theirs(folders(name), name, double=double).save_pretrained(tmp_path / "theirs")
    dw.save_model(ours(folders(name), name, quantize=NF4(double_quant=double)), tmp_path / "ours")
    mine, peer = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in peer.items()}
    for key, value in peer.items():
        if key.endswith("nf4"):
            state, expected = (json.loads(bytes(tensor.tolist())) for tensor in (mine[key], value))
            # The mean of the scales, which either sums in an order of its own.
            offsets = state.pop("nested_offset", 0), expected.pop("nested_offset", 0)
            assert state == expected and offsets[0] == pytest.approx(offsets[1], rel=1e-6)
        elif key.endswith(".nested_absmax"):
            torch.testing.assert_close(mine[key], value, rtol=1e-5, atol=0)
        elif key.endswith(".weight.absmax") and double:
            assert mine[key].shape == value.shape
            assert int((mine[key].int() - value.int()).abs().max()) <= 1
        elif value.dtype == torch.uint8:
            # Ties between two codes, and values one rounding away from one.
            assert mine[key].shape == value.shape and float((mine[key] == value).float().mean()) > 0.99
        else:
            assert torch.equal(mine[key], value), key
    mine, peer = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs"))
    mine["quantization_config"].pop("llm_int8_skip_modules")
    peer["quantization_config"].pop("llm_int8_skip_modules")
    assert mine == peer


def test_other_quantisations_are_one_line(folders, tmp_path):
    import transformers

    kind = {"fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "eight": {"load_in_8bit": True}}
    for name, options in kind.items():
        config = transformers.BitsAndBytesConfig(**options)
        model = auto_of("llama").from_pretrained(folders("llama"), quantization_config=config, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
    for name, said in (("fp4", "as fp4"), ("eight", "in 8 bits")):
        with pytest.raises(dw.InputError, match=f"{name} is quantised {said}: expected a 16-bit model") as caught:
            ours(tmp_path / name, "llama")
        assert "\n" not in str(caught.value)
