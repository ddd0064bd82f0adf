"""Loading whole models for a task: new heads from a seed, and everything else that lacks is an error."""

import json
import pickle

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import deltaw as dw
from deltaw.checkpoint.model_files import model_facts, pick_device, pick_dtype
from deltaw.core.errors import InputError

LABELS = ["negative", "neutral", "positive"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")

    def folder(name):
        path = root / name
        if not path.exists():
            tiny.tiny(name).save_pretrained(path)
        return path

    return folder


def load(path, task="causal-lm", **options):
    return dw.load_model(path, task=task, dtype="float32", device="cpu", **options)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "t5"])
def test_a_language_model_is_read_as_it_was_written(folders, name):
    for task in ("causal-lm", "instruct"):
        model = load(folders(name), task)
        assert not model.training
        tiny.assert_same(dict(model.state_dict()), dict(tiny.tiny(name).state_dict()))


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-mlm", "distilbert-seq", "modernbert"])
def test_a_new_head_comes_from_the_seed_alone(folders, name, task):
    path = folders(name)
    if name == "distilbert-seq":
        from transformers import DistilBertModel

        path = folders("distilbert-seq").parent / "distilbert-bare"
        DistilBertModel.from_pretrained(folders(name)).save_pretrained(path)
    state = torch.get_rng_state()
    first = load(path, task, labels=LABELS, seed=1)
    torch.rand(5)
    again, other = load(path, task, labels=LABELS, seed=1), load(path, task, labels=LABELS, seed=2)
    tiny.assert_same(dict(first.state_dict()), dict(again.state_dict()))
    differing = {k for k, v in first.state_dict().items() if not torch.equal(v, other.state_dict()[k])}
    assert differing and all(k.startswith(("score", "classifier", "pre_classifier", "bert.pooler")) for k in differing)
    assert all(torch.isfinite(p).all() for p in first.parameters())
    assert first.config.id2label == dict(enumerate(LABELS)) and first.config.num_labels == 3
    torch.set_rng_state(state)


def test_a_trained_head_is_kept(folders):
    model = load(folders("bert-seq"), "sequence-classification", labels=LABELS)
    tiny.assert_same(dict(model.state_dict()), dict(tiny.tiny("bert-seq").state_dict()))


def test_a_tensor_that_lacks_is_an_error(folders, tmp_path):
    tensors = load_file(folders("llama") / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folders("llama") / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"lacks 1 tensors that LlamaForCausalLM needs \(model.layers.1.mlp.up_proj"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 50, -7])
def test_damaged_weights(folders, tmp_path, keep):
    (tmp_path / "config.json").write_bytes((folders("llama") / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folders("llama") / "model.safetensors").read_bytes()[:keep])
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_another_shape_is_an_error(folders, tmp_path):
    config = json.loads((folders("llama") / "config.json").read_text()) | {"intermediate_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folders("llama") / "model.safetensors").read_bytes())
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_never_loaded(folders, tmp_path):
    class Harm:
        def __reduce__(self):
            return open, (str(tmp_path / "harmed"), "w")

    (tmp_path / "config.json").write_bytes((folders("llama") / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(InputError, match="only as a pickle"):
        load(tmp_path)
    assert not (tmp_path / "harmed").exists()


def test_tasks_that_do_not_fit(folders):
    with pytest.raises(InputError, match="bert is an encoder and has no causal-lm: use sequence-classification"):
        load(folders("bert-mlm"))
    with pytest.raises(InputError, match="unknown task 'causal': did you mean 'causal-lm'"):
        load(folders("llama"), "causal")
    with pytest.raises(InputError, match="needs labels"):
        load(folders("llama"), "token-classification")
    with pytest.raises(InputError, match="cannot load") as caught:
        load(folders("llama"), "masked-lm")
    assert "\n" not in str(caught.value)


def test_devices_and_dtypes():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="device 'gpu': expected auto, cpu, cuda or cuda:N"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cpu")
        with pytest.raises(InputError, match=r"device 'cuda:1': torch .* sees no CUDA device; use cpu"):
            pick_device("cuda:1")
    assert pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert pick_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)
    assert pick_dtype(torch.float64, torch.device("cpu")) == torch.float64
    with pytest.raises(InputError, match="unknown dtype 'float': did you mean"):
        pick_dtype("float", torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "generative", "positions"),
    [("llama", True, 64), ("gpt2", True, 64), ("t5", True, None), ("bert-mlm", False, 64), ("modernbert", False, 64)],
)
def test_facts_are_read_from_the_configuration(folders, name, generative, positions):
    facts = model_facts(folders(name))
    assert (facts.generative, facts.positions) == (generative, positions)
