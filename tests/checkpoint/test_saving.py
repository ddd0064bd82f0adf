"""Where adapters and models are written: what stands there stays, and a full disk is one line."""

import errno
import os
import shutil
import subprocess

import pytest
import safetensors.torch
import tiny
import torch
from safetensors import SafetensorError

import deltaw as dw
from deltaw.checkpoint.adapters import adapter_state, load_state, read_adapter, saved_adapters, write_state
from deltaw.core.errors import InputError, RunError


@pytest.fixture
def model():
    return tiny.randomise(dw.adapt(tiny.tiny("llama"), dw.LoRA(r=4, target_modules="qv")))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_files_of_others_stay(model, tmp_path):
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "train.jsonl").write_text("mine")
    (tmp_path / "out" / "README.md").write_text("mine")
    for _ in range(2):
        assert dw.save_adapter(model, tmp_path / "out") == tmp_path / "out"
        assert sorted(contents(tmp_path / "out")) == [
            "README.md", "adapter_config.json", "adapter_model.safetensors", "data/train.jsonl",
        ]  # fmt: skip
    dw.merge(model)
    with pytest.raises(InputError, match="holds an adapter, which transformers would put on top"):
        dw.save_model(model, tmp_path / "out")
    (tmp_path / "m").mkdir()
    for name in ("train.py", "model-00002-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        (tmp_path / "m" / name).write_text("old")
    dw.save_model(model, tmp_path / "m")
    assert sorted(contents(tmp_path / "m")) == [
        "config.json", "generation_config.json", "model.safetensors", "train.py",
    ]  # fmt: skip
    loaded = type(model).from_pretrained(tmp_path / "m")
    assert torch.equal(tiny.logits(loaded, "llama"), tiny.logits(model, "llama"))


def full(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_full_disk_is_one_line_and_the_old_files_stand(model, tmp_path, monkeypatch, kind):
    if kind == "model":
        dw.merge(model)
    save = dw.save_model if kind == "model" else dw.save_adapter
    save(model, tmp_path / "out")
    before = contents(tmp_path)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    for target in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(RunError, match=f"no space left on the device while writing {target}") as caught:
            save(model, target)
        assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before and os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounts a small file system")
def test_a_disk_that_is_really_full(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        model = dw.adapt(tiny.tiny("llama"), dw.LoRA(r=1, target_modules=["q_proj"]))
        dw.save_adapter(model, small / "a")
        before = contents(small)
        big = dw.adapt(tiny.tiny("llama"), dw.LoRA(r=512))
        with pytest.raises(RunError, match="no space left on the device"):
            dw.save_adapter(big, small / "a")
        with pytest.raises(RunError, match="no space left on the device"):
            dw.save_model(tiny.tiny("llama", torch.float64), small / "m")
        assert contents(small) == before and os.listdir(small) == ["a"]
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_read_only_folder(model, tmp_path, monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code), str(tmp_path / "out"))

    monkeypatch.setattr("deltaw.core.files.tempfile.mkdtemp", refuse)
    with pytest.raises(InputError, match="choose a folder that you may write to"):
        dw.save_adapter(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_way(model, tmp_path):
    (tmp_path / "f").write_text("mine")
    for path in (tmp_path / "f", tmp_path / "f" / "a"):
        with pytest.raises(InputError, match="a file stands in a folder's place"):
            dw.save_adapter(model, path)
    assert (tmp_path / "f").read_text() == "mine"


def test_several_adapters_in_one_folder(model, tmp_path):
    dw.adapt(model, dw.LoRA(r=2, target_modules="mlp"), name="law")
    tiny.randomise(model, "law")
    for _ in range(2):
        assert dw.save_adapters(model, tmp_path / "out") == [tmp_path / "out", tmp_path / "out" / "law"]
    assert set(saved_adapters(tmp_path / "out")) == {"default", "law"}
    (tmp_path / "out" / "notes").mkdir()
    other = tiny.tiny("llama")
    assert dw.load_adapters(other, tmp_path / "out") == ["default", "law"] == dw.adapter_names(other)
    for name in ("default", "law"):
        tiny.assert_same(adapter_state(other, name), adapter_state(model, name))
    dw.set_adapter(model, "default")
    assert torch.equal(tiny.logits(other, "llama"), tiny.logits(model, "llama"))
    dw.delete_adapter(model, "default")
    assert dw.save_adapters(model, tmp_path / "one") == [tmp_path / "one" / "law"]
    with pytest.raises(InputError, match=r"no adapter at .*: expected adapter_config.json"):
        dw.load_adapters(other, tmp_path / "one" / "law" / "x")


def test_which_adapter_is_meant(model, tmp_path):
    with pytest.raises(InputError, match="no adapter named 'x': the model has default"):
        dw.save_adapter(model, tmp_path / "a", name="x")
    dw.adapt(model, dw.LoRA(r=2), name="law")
    with pytest.raises(InputError, match=r"which adapter\? the model has default, law"):
        dw.save_adapter(model, tmp_path / "a")
    with pytest.raises(InputError, match="the model has none"):
        dw.save_adapter(tiny.tiny("llama"), tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_unmerged_adapters_are_not_saved_as_a_model(model, tmp_path):
    with pytest.raises(InputError, match="the adapters default are not merged"):
        dw.save_model(model, tmp_path / "m")


@pytest.mark.parametrize("where", ["run", "run/adapter"])
def test_a_run_folder_is_read_by_its_adapter(model, tmp_path, where):
    dw.save_adapter(model, tmp_path / "run" / "adapter")
    other = dw.load_adapter(tiny.tiny("llama"), tmp_path / where)
    assert dw.adapter_names(other) == ["run"]
    method, config, tensors = read_adapter(tmp_path / where)
    assert (method.name, config.r, len(tensors)) == ("lora", 4, 8)


def test_what_is_active_after_loading(model, tmp_path):
    dw.save_adapter(model, tmp_path / "a")
    expected = tiny.logits(model, "llama")
    bare = tiny.logits(tiny.tiny("llama"), "llama")
    first = dw.load_adapter(tiny.tiny("llama"), tmp_path / "a", active=False)
    assert torch.equal(tiny.logits(first, "llama"), bare)
    dw.load_adapter(first, tmp_path / "a", name="b", active=True)
    assert torch.equal(tiny.logits(first, "llama"), expected)
    dw.load_adapter(first, tmp_path / "a", name="c")
    dw.set_adapter(first, {"a": 0.5, "c": 0.5})
    assert tiny.relative(tiny.logits(first, "llama"), expected) < 1e-5
    dw.load_adapter(first, tmp_path / "a", name="d")
    assert tiny.relative(tiny.logits(first, "llama"), expected) < 1e-5


def test_a_state_goes_into_an_adapter_that_is_there(model, tmp_path):
    write_state(model, "default", adapter_state(model, "default"), tmp_path / "deep" / "a")
    other = dw.adapt(tiny.tiny("llama"), dw.LoRA(r=4, target_modules="qv"), seed=4)
    parameters = [id(p) for p in other.parameters()]
    load_state(other, "default", tmp_path / "deep" / "a")
    assert [id(p) for p in other.parameters()] == parameters
    tiny.assert_same(adapter_state(other, "default"), adapter_state(model, "default"))
    empty = {key: tensor[:0] for key, tensor in adapter_state(model, "default").items()}
    with pytest.raises(InputError, match="is empty: gather sharded parameters before saving"):
        write_state(model, "default", empty, tmp_path / "empty")
