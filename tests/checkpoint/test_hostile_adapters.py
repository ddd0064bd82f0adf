"""Folders that are damaged, of another model or meant to harm: one line each, and the model as it was."""

import json
import os
import pickle

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import deltaw as dw
from deltaw.core.errors import InputError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "a"
    model = dw.adapt(tiny.tiny("llama"), dw.LoRA(r=4, target_modules="qv", modules_to_save=["norm"]))
    dw.save_adapter(tiny.randomise(model), path)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    target = tmp_path / "a"
    target.mkdir()
    for file in saved.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


def refused(path, says, name="llama"):
    """The error, after a check that neither a bare nor an adapted model is changed by it."""
    bare, adapted = tiny.tiny(name), dw.adapt(tiny.tiny(name), dw.LoRA(r=2), name="mine")
    tiny.randomise(adapted, "mine")
    dw.set_adapter(adapted, {"mine": 0.5})
    for model in (bare, adapted):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        wants = {k: p.requires_grad for k, p in model.named_parameters()}
        logits, names = tiny.logits(model, name), dw.adapter_names(model)
        with pytest.raises(InputError, match=says) as caught:
            dw.load_adapter(model, path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
        tiny.assert_same(dict(model.state_dict()), state)
        assert {k: p.requires_grad for k, p in model.named_parameters()} == wants
        assert dw.adapter_names(model) == names and torch.equal(tiny.logits(model, name), logits)
    assert not any("forward" in m.__dict__ for m in bare.modules()) and "_deltaw" not in bare.__dict__
    return str(caught.value)


def change(folder, function):
    tensors = load_file(folder / "adapter_model.safetensors")
    function(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")


def test_no_folder(tmp_path):
    refused(tmp_path / "nothing", "no adapter at .*nothing: no such folder")


def test_an_empty_folder(tmp_path):
    refused(tmp_path, "no adapter at .*: no adapter_config.json in it; give a folder that")


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "f").write_text("x")
    refused(tmp_path / "f", "no adapter at .*/f: no adapter_config.json in it")


def test_a_folder_of_several_lists_them(folder):
    parent = folder.parent
    (parent / "b").mkdir()
    for file in folder.iterdir():
        (parent / "b" / file.name).write_bytes(file.read_bytes())
    refused(parent, r"holds several adapters: name one of .*/a, .*/b$")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"text"', "\ufeff{}", "[" * 100_000])
def test_a_configuration_that_is_no_json_object(folder, text):
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    refused(folder, "adapter_config.json (is not JSON|holds|: peft_type)")


def test_a_configuration_in_another_encoding(folder):
    (folder / "adapter_config.json").write_bytes('{"peft_type": "LORA", "x": "ä"}'.encode("latin-1"))
    refused(folder, "is not JSON")


def test_a_configuration_that_cannot_be_read(folder):
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to("adapter_config.json")
    refused(folder, "no adapter at")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_safetensors(folder, keep):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "adapter_model.safetensors is damaged or no safetensors file")


def test_bytes_flipped_in_the_header(folder):
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[:8] = b"\xff" * 8
    file.write_bytes(data)
    refused(folder, "is damaged or no safetensors file")


def test_no_weights(folder):
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "no adapter_model.safetensors in .*: the adapter is incomplete")


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.safetensors"])
@pytest.mark.parametrize("writer", [pickle.dumps, "torch"])
def test_a_pickle_is_never_loaded(folder, tmp_path, name, writer):
    (folder / "adapter_model.safetensors").unlink()
    trap = str(tmp_path / "harmed")
    if writer == "torch":
        torch.save(Harm(trap), folder / name)
    else:
        (folder / name).write_bytes(writer(Harm(trap)))
    refused(folder, "is a pickle, which can run code and is never loaded|is damaged or no safetensors file")
    assert not os.path.exists(trap)


def test_a_pickle_beside_the_safetensors_is_ignored(folder, tmp_path):
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Harm(str(tmp_path / "harmed"))))
    dw.load_adapter(tiny.tiny("llama"), folder)
    assert not os.path.exists(tmp_path / "harmed")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none(folder, value):
    def spoil(tensors):
        tensors[KEY][0, 0] = value

    change(folder, spoil)
    assert KEY in refused(folder, "holds NaN or infinity: the adapter is broken")


def test_integers_where_numbers_belong(folder):
    def spoil(tensors):
        tensors[KEY] = tensors[KEY].to(torch.int32)

    change(folder, spoil)
    refused(folder, r"is torch.int32: expected floating-point numbers")


def test_missing_tensors(folder):
    change(folder, lambda tensors: tensors.pop(KEY))
    assert KEY in refused(folder, r"does not fit LlamaForCausalLM: tensors 1 missing \(")


def test_a_missing_whole_module(folder):
    change(folder, lambda tensors: tensors.pop("base_model.model.model.norm.weight"))
    refused(folder, r"1 missing \(base_model.model.model.norm.weight\)")


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "nonsense",
        "base_model.model.model.layers.0.self_attn.adapted.weight",
    ],
)
def test_unexpected_tensors(folder, key):
    change(folder, lambda tensors: tensors.update({key: torch.zeros(4, 16)}))
    assert key in refused(folder, r"1 unexpected \(")


def test_a_tensor_of_the_base_that_differs(folder):
    key = "base_model.model.model.embed_tokens.weight"
    change(folder, lambda tensors: tensors.update({key: torch.zeros(50, 16)}))
    refused(folder, r"carries its own model.embed_tokens.weight \(50, 16\), and the model's differs")


@pytest.mark.parametrize("shape", [(16, 3), (8, 4, 1), (32,), (0, 4)])
def test_another_shape(folder, shape):
    change(folder, lambda tensors: tensors.update({KEY: torch.zeros(shape)}))
    assert f"{KEY} {shape} instead of (8, 4)" in refused(folder, "1 of another shape")


def test_another_rank_in_the_configuration(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    refused(folder, "8 of another shape")


@pytest.mark.parametrize(
    ("name", "says"), [("gpt2", "match no module of GPT2LMHeadModel"), ("phi", "of another shape")]
)
def test_the_adapter_of_another_model(folder, name, says):
    config = json.loads((folder / "adapter_config.json").read_text()) | {"modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    change(folder, lambda tensors: tensors.pop("base_model.model.model.norm.weight"))
    refused(folder, says, name=name)


def test_a_deeper_model(folder):
    def deepen(tensors):
        for key in [key for key in tensors if "layers.1" in key]:
            tensors[key.replace("layers.1", "layers.2")] = tensors[key].clone()

    change(folder, deepen)
    refused(folder, r"4 unexpected \(.*layers.2")


def test_modules_to_save_that_the_model_lacks(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["score"]}))
    refused(folder, "modules_to_save 'score' of the adapter is no module of LlamaForCausalLM")


def test_a_name_that_is_taken_or_none(folder):
    model = dw.load_adapter(tiny.tiny("llama"), folder, name="x")
    with pytest.raises(InputError, match="already has an adapter named 'x'"):
        dw.load_adapter(model, folder, name="x")
    with pytest.raises(InputError, match="expected letters, digits, _ and -"):
        dw.load_adapter(model, folder, name="a.b")
    assert dw.adapter_names(model) == ["x"]


def test_a_broken_one_among_several_leaves_none(folder):
    (folder / "bad").mkdir()
    (folder / "bad" / "adapter_config.json").write_text("{")
    model = tiny.tiny("llama")
    with pytest.raises(InputError, match="is not JSON"):
        dw.load_adapters(model, folder)
    assert dw.adapter_names(model) == [] and not any("forward" in m.__dict__ for m in model.modules())


def test_a_folder_name_that_is_no_adapter_name(folder):
    for name, expected in [("my adapter, v1.0", "my-adapter--v1-0"), ("train", "adapter-train")]:
        folder = folder.rename(folder.parent / name)
        assert dw.adapter_names(dw.load_adapter(tiny.tiny("llama"), folder)) == [expected]
