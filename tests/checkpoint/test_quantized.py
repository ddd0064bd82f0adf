"""Loading models in 4 bits: as quantising in memory would make them, in the memory that was promised."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import deltaw as dw
from deltaw.checkpoint.model_files import load_tokenizer, model_facts
from deltaw.checkpoint.quantized import quantized_bytes
from deltaw.core.errors import InputError
from deltaw.quant import NF4, NF4Tensor, quantize_model, quantized_sites

LABELS = ["a", "b", "c"]
CAUSAL = ["llama", "llama-tied", "llama-bias", "gemma3", "phi3", "falcon", "gpt_neox", "bloom", "opt", "gpt2", "t5"]
NAMES = [*CAUSAL, "llama-seq", "bert-tok", "distilbert-seq", "bert-mlm", "modernbert", "bart-seq", "fused", "experts"]


def built(name):
    """As `tiny.tiny`, and two whose files hold their weights otherwise: one cuts them in three, one stacks them."""
    import transformers

    if name == "fused":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.NomicBertConfig(vocab_size=tiny.VOCAB, max_position_embeddings=64, **sizes)
        model = transformers.NomicBertForMaskedLM(config)
    elif name == "experts":
        given = {"num_local_experts": 3, "num_experts_per_tok": 2}
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**tiny._LLAMA | given))
    else:
        return tiny.tiny(name)
    tiny.draw(model, 0, name)
    return model.eval()


def task_of(name):
    if name in ("modernbert", "fused"):
        return "masked-lm"
    kinds = {"seq": "sequence-classification", "tok": "token-classification", "mlm": "masked-lm"}
    return kinds.get(name.rsplit("-")[-1], "causal-lm")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")

    def folder(name):
        path = root / name
        if not path.exists():
            built(name).save_pretrained(path)
        return path

    return folder


def load(path, name="llama", **options):
    task = task_of(name)
    given = {
        "task": task,
        "dtype": "float32",
        "device": "cpu",
        "labels": LABELS if task.endswith("classification") else None,
    }
    return dw.load_model(path, **given | options)


def assert_same_model(model, expected):
    found, wanted = dict(model.named_parameters()), dict(expected.named_parameters())
    assert found.keys() == wanted.keys()
    for key, parameter in wanted.items():
        got = found[key]
        assert (type(got), got.dtype, got.shape) == (type(parameter), parameter.dtype, parameter.shape), key
        if isinstance(parameter, NF4Tensor):
            assert got.transposed == parameter.transposed and not got.requires_grad
            tiny.assert_same(got.packed.tensors(), parameter.packed.tensors())
        else:
            assert torch.equal(got, parameter), key
    tiny.assert_same(dict(model.named_buffers()), dict(expected.named_buffers()))


def files_with(folders, path, name, change):
    """A copy of a folder whose tensors `change` has changed."""
    tensors = load_file(folders(name) / "model.safetensors")
    change(tensors)
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_bytes((folders(name) / "config.json").read_bytes())
    return path


@pytest.mark.parametrize("name", NAMES)
def test_reading_into_4_bits_is_quantising_in_memory(folders, name):
    model = load(folders(name), name, quantize=NF4())
    expected = quantize_model(load(folders(name), name), NF4())
    assert len(list(quantized_sites(model))) >= 6 and not model.training
    assert_same_model(model, expected)
    generation = [getattr(one, "generation_config", None) for one in (model, expected)]
    assert str(generation[0]) == str(generation[1])
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.config.name_or_path == model.name_or_path == str(folders(name))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert-mlm"])
@pytest.mark.parametrize(
    "quantize",
    [
        NF4(double_quant=False),
        NF4(block_size=128),
        NF4(embeddings=True),
        NF4(head=True),
        NF4(embeddings=True, head=True),
    ],
    ids=str,
)
def test_what_is_asked_for_is_what_is_quantised(folders, name, quantize):
    model = load(folders(name), name, quantize=quantize)
    assert_same_model(model, quantize_model(load(folders(name), name), quantize))
    tied = name != "llama"
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    assert isinstance(embedding.weight, NF4Tensor) == (quantize.embeddings or (tied and quantize.head))


def test_pieces_change_nothing(folders, monkeypatch):
    from deltaw.checkpoint import quantized

    whole = load(folders("gpt2"), "gpt2", quantize=NF4())
    monkeypatch.setattr(quantized, "_PIECE", {"cpu": 100})
    assert_same_model(load(folders("gpt2"), "gpt2", quantize=NF4()), whole)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_quantised_from_the_dtype_they_are_loaded_in(folders, tmp_path, stored, dtype):
    built("llama").to(stored).save_pretrained(tmp_path)
    model = load(tmp_path, quantize=NF4(), dtype=dtype)
    assert_same_model(model, quantize_model(load(tmp_path, dtype=dtype), NF4()))
    assert model.dtype == getattr(torch, dtype)


def test_no_mark_is_left_that_others_refuse(folders, tmp_path):
    import transformers

    model = load(folders("llama"), quantize=NF4())
    assert not any(hasattr(model, name) for name in ("hf_quantizer", "quantization_method", "is_quantized"))
    assert not hasattr(model.config, "quantization_config") and not hasattr(model.config, "_is_quantized")
    assert model.to("cpu") is model
    dw.adapt(model, dw.LoRA(r=2))
    transformers.Trainer(model, transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[]))


def test_a_new_head_stays_dense_and_comes_from_the_seed(folders):
    options = {"task": "sequence-classification", "labels": LABELS, "seed": 3}
    model = load(folders("llama"), quantize=NF4(), **options)
    assert_same_model(model, quantize_model(load(folders("llama"), **options), NF4()))
    assert type(model.score.weight) is nn.Parameter and model.score.weight.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(folders, tmp_path, bad):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 2:4] = bad

    files_with(folders, tmp_path, "llama", spoil)
    said = "cannot quantise model.layers.1.mlp.up_proj.weight: 2 of its 384 values are NaN or infinite"
    with pytest.raises(InputError, match=f"^{said}$"):
        load(tmp_path, quantize=NF4())


def test_what_lacks_or_does_not_fit_is_one_line(folders, tmp_path):
    def without(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]

    def another(name):
        def change(tensors):
            tensors[name] = tensors[name][:5].clone()

        return change

    for number, (change, said) in enumerate(
        [
            (without, r"lacks 1 tensors that LlamaForCausalLM needs \(model.layers.1.mlp.up_proj.weight"),
            (another("model.layers.0.self_attn.q_proj.weight"), r"q_proj.weight has shape \(5, 16\) in the files"),
            (another("model.norm.weight"), "model.norm.weight|ignore_mismatched_sizes"),
            (another("lm_head.weight"), "lm_head.weight|ignore_mismatched_sizes"),
        ]
    ):
        path = files_with(folders, tmp_path / str(number), "llama", change)
        with pytest.raises(InputError, match=said) as caught:
            load(path, quantize=NF4())
        assert "\n" not in str(caught.value)
    path = tmp_path / "0" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match="is damaged or no safetensors file"):
        load(path.parent, quantize=NF4())


def test_options_that_are_none(folders):
    with pytest.raises(InputError, match=r"quantize is True: expected dw.NF4\(\) or None"):
        load(folders("llama"), quantize=True)
    with pytest.raises(InputError, match="skip_modules 'qproj' matches no module"):
        load(folders("llama"), quantize=NF4(skip_modules=["qproj"]))


def test_fused_experts_are_told_of(folders, caplog):
    with caplog.at_level(logging.WARNING, "deltaw"):
        model = load(folders("experts"), quantize=NF4(), dtype="bfloat16")
    parameters = 2 * 3 * 3 * 16 * 24
    assert [record.getMessage() for record in caplog.records] == [
        f"4 fused expert tensors ({parameters:,} parameters, {2 * parameters:,} bytes) stay in bfloat16: "
        "only matrices are held in 4 bits"
    ]
    assert "model.layers.0.self_attn.q_proj" in {path for path, _, _ in quantized_sites(model)}


# Saved in 4 bits.


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("falcon", "t5")])
def test_a_4_bit_folder_is_read_as_it_was_written(folders, tmp_path, name):
    model = load(folders(name), name, quantize=NF4())
    before = model.config.to_dict()
    dw.save_model(model, tmp_path)
    assert model.config.to_dict() == before | {"architectures": [type(model).__name__]}
    again = load(tmp_path, name)
    assert_same_model(again, model)
    assert_same_model(load(tmp_path, name, quantize=NF4()), model)
    ids = torch.tensor([[3, 4, 5, 6, 2]])
    assert torch.equal(*(one(ids).logits for one in (model, again)))
    dw.save_model(again, tmp_path / "again")
    tiny.assert_same(*(load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again")))


def test_facts_and_tokenizers_of_a_4_bit_folder(folders, tmp_path):
    import transformers
    from tokenizers import Tokenizer, models

    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), eos_token="b", unk_token="a"
    )
    dw.save_model(load(folders("llama"), quantize=NF4()), tmp_path, tokenizer=words)
    assert model_facts(tmp_path) == model_facts(folders("llama"))
    assert load_tokenizer(tmp_path).pad_token == "b"


def test_asking_a_4_bit_folder_for_something_else(folders, tmp_path):
    dw.save_model(load(folders("llama"), quantize=NF4(double_quant=False)), tmp_path)
    for quantize in (NF4(), NF4(double_quant=False, head=True), NF4(double_quant=False, skip_modules=["q_proj"])):
        with pytest.raises(InputError, match=r"is in 4 bits already \(14 matrices, 32-bit scales of 64 values\)"):
            load(tmp_path, quantize=quantize)
    assert load(tmp_path, quantize=NF4(double_quant=False)).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "quantize", "said"),
    [
        (
            "llama",
            NF4(embeddings=True),
            "bitsandbytes' form has no 4-bit embedding; quantise with NF4(embeddings=False",
        ),
        ("llama-tied", NF4(head=True), "bitsandbytes' form has no 4-bit embedding"),
        ("falcon", NF4(), "transformers loads no 4-bit FalconLinear; quantise with NF4(skip_modules=['dense', "),
        ("t5", NF4(), "transformers loads wo in float32 only; quantise with NF4(skip_modules=['wo']) to save"),
    ],
)
def test_what_has_no_place_in_the_form_is_not_saved(folders, tmp_path, name, quantize, said):
    model = load(folders(name), name, quantize=quantize)
    with pytest.raises(InputError) as caught:
        dw.save_model(model, tmp_path / "out")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not hasattr(model.config, "quantization_config")


def test_entries_of_the_form_mean_one_module_each():
    from transformers.quantizers.quantizers_utils import should_convert_module

    from deltaw.checkpoint.quantized import _bitsandbytes_config

    names = ["fc", "fc1", "up", "up_fc", "other"]
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in names})
    quantize_model(model, NF4(skip_modules=["fc", "other"]))
    held = {path: (module, weight) for path, module, weight in quantized_sites(model)}
    skipped = _bitsandbytes_config(model, held)["llm_int8_skip_modules"]
    assert skipped == ["^fc$", "other"]
    assert [name for name in names if should_convert_module(name, skipped)] == list(held) == ["fc1", "up", "up_fc"]


WEIGHT = "model.layers.0.mlp.up_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(WEIGHT), f"{WEIGHT} lacks beside {STATE}"),
        (lambda t: t.pop(f"{WEIGHT}.absmax"), f"{WEIGHT} lacks absmax"),
        (lambda t: t.pop(STATE), rf"{WEIGHT} has shape \(192, 1\) in the files: expected \(24, 16\)"),
        (lambda t: t.update({STATE: t[STATE][:9].clone()}), f"{WEIGHT} has a damaged quantisation state"),
        (
            lambda t: t.update({f"{WEIGHT}.quant_state.bitsandbytes__fp4": t.pop(STATE)}),
            f"{WEIGHT} is quantised as fp4",
        ),
        (lambda t: t.update({WEIGHT: t[WEIGHT][:9].clone()}), f"{WEIGHT} is damaged: 9 bytes and 6 scales"),
    ],
)
def test_a_damaged_4_bit_folder(folders, tmp_path, change, said):
    dw.save_model(load(folders("llama"), quantize=NF4()), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=said) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "is quantised by gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "is quantised in 8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "is quantised as fp4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "is quantised as fp4"),
    ],
)
@pytest.mark.parametrize("quantize", [None, NF4()])
def test_another_quantisation(folders, tmp_path, given, said, quantize):
    files_with(folders, tmp_path, "llama", lambda tensors: None)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": given}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"{said}: expected a 16-bit model or one in bitsandbytes' nf4"):
        load(tmp_path, quantize=quantize)


@pytest.mark.parametrize(("double", "bits"), [(True, 4.127), (False, 4.5)])
def test_resident_weights_are_the_arithmetic(double, bits):
    quantize = NF4(double_quant=double)
    model = quantize_model(nn.Sequential(nn.Linear(1024, 768, bias=False), nn.Linear(768, 512)), quantize)
    held = quantized_bytes(model)
    assert held.parameters == 1024 * 768 + 768 * 512 and (held.other_parameters, held.other_bytes) == (512, 2048)
    assert held.bits == pytest.approx(bits, abs=0.005) and quantize.bits == pytest.approx(bits, abs=0.001)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for _, _, weight in quantized_sites(model)
        for tensor in weight.packed.tensors().values()
    }
    assert sum(storages.values()) == pytest.approx(held.parameters * bits / 8, rel=0.02)
    assert quantized_bytes(nn.Linear(4, 4)).bits == 0


# Memory.

MEASURE = """
import ctypes, gc, json, sys, torch
import deltaw as dw
from deltaw.checkpoint.quantized import quantized_bytes
from deltaw.quant import NF4

def resident(what):
    for line in open("/proc/self/status"):
        if line.startswith(what):
            return int(line.split()[1]) * 1024

small, big = sys.argv[1:]
# What the process needs once, whatever it loads.
first = dw.load_model(small, dtype="bfloat16", device="cpu", quantize=NF4())
del first
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
before = resident("VmRSS")
# Sets the count of the highest to the present one.
open("/proc/self/clear_refs", "w").write("5")
model = dw.load_model(big, dtype="bfloat16", device="cpu", quantize=NF4())
peak = resident("VmHWM")
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
held = quantized_bytes(model)
print(json.dumps({"before": before, "peak": peak, "after": resident("VmRSS"), "bits": held.bits,
                  "model": held.bytes + held.other_bytes, "name": model.config.name_or_path}))
"""


@pytest.fixture(scope="module")
def big_folder(tmp_path_factory):
    """200 MB in bfloat16, in shards; its two largest tensors are a fifth of it."""
    import transformers

    path = tmp_path_factory.mktemp("big")
    sizes = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 3, "head_dim": 96}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny._LLAMA | sizes | heads))
    model.to(torch.bfloat16).to_empty(device="cpu")
    tiny.draw(model, 0, "big", std=0.02)
    model.save_pretrained(path, max_shard_size="60MB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path, max(2 * p.numel() for p in model.parameters()), sum(2 * p.numel() for p in model.parameters())


def as_hub_id(folder, home):
    """The folder as huggingface_hub keeps what it has fetched."""
    kept = home / "hub" / "models--nobody--tiny"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("a" * 40)
    (kept / "snapshots").mkdir()
    (kept / "snapshots" / ("a" * 40)).symlink_to(folder, target_is_directory=True)
    return "hub:nobody/tiny"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' count of resident memory")
def test_peak_memory_while_reading(folders, big_folder, tmp_path):
    path, largest, whole = big_folder
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    small = as_hub_id(folders("llama"), tmp_path)
    command = [sys.executable, "-c", MEASURE, small, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["bits"] == pytest.approx(4.127, abs=0.005) and found["name"] == str(path)
    assert found["peak"] - found["before"] < found["model"] + 2 * largest < 0.5 * whole
    assert found["after"] - found["before"] < 1.02 * found["model"]


def test_a_hub_id_that_cannot_be_fetched(monkeypatch):
    import huggingface_hub

    from deltaw.checkpoint.model_files import _fetch

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find\nthe files")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(dw.RunError, match=r"cannot load 'nobody/x' from the hub \(cannot find the files\)"):
        _fetch("nobody/x", "nobody/x")


@pytest.mark.gpu
def test_peak_memory_on_a_gpu(folders, big_folder):
    path, largest, _ = big_folder
    expected = load(path, dtype="bfloat16", quantize=NF4())
    # What the device needs once.
    load(folders("llama"), dtype="bfloat16", device="cuda", quantize=NF4())
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load(path, dtype="bfloat16", device="cuda", quantize=NF4())
    peak = torch.cuda.max_memory_allocated()
    held = quantized_bytes(model)
    assert peak - before < held.bytes + held.other_bytes + 2 * largest
    assert torch.cuda.memory_allocated() - before < 1.05 * (held.bytes + held.other_bytes)
    for (path, _, weight), (_, _, other) in zip(quantized_sites(model), quantized_sites(expected), strict=True):
        assert weight.device.type == "cuda", path
        # Sums of scales come in another order there.
        assert torch.equal(weight.packed.codes.cpu(), other.packed.codes), path
        assert tiny.relative(weight.packed.dequantize().cpu(), other.packed.dequantize()) < 1e-2, path
