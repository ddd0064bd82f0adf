"""Models in 4 bits against quantising in memory and bitsandbytes; adapters for vLLM against the originals in PEFT."""

from __future__ import annotations

import copy
import json
import math
import shlex
import shutil

import pytest
import small_runs
import torch
import transformers
from command_line import digest, tiny_model, write_rows
from safetensors.torch import load_file, save_file

import deltaw as dw
from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.quant import NF4, NF4Tensor, quantize_model, quantized_sites
from deltaw.studies.export import export_into, quantize_into
from deltaw.studies.job import run_training as train

KEYS = {"max_steps": 2, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 0.05, "r": 4}
KEYS |= {"dtype": "float32", "device": "cpu", "baselines": False}
IDS = torch.arange(1, 25).view(2, 12)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models of four families, rows, and runs `lora`, `qlora`, `full` and `classes`."""
    folder = tmp_path_factory.mktemp("export")
    tiny_model(folder / "llama")
    for family in ("bert", "gpt2", "t5"):
        small_runs.make_model(folder / family, family)
    tiny_model(folder / "bert", kind="Bert")
    data = str(write_rows(folder / "rows.jsonl", count=24))

    def run(name, model, **more):
        train(model=str(folder / model), data=data, output=str(folder / name), **KEYS | more)

    run("lora", "llama", rank_pattern={"q_proj": 2})
    run("qlora", "llama", method="qlora")
    run("classes", "bert", r=2)
    full = {key: value for key, value in KEYS.items() if key != "r"}
    train(model=str(folder / "llama"), data=data, output=str(folder / "full"), method="full", **full)
    return folder


def load(folder, **options):
    return dw.load_model(folder, **{"device": "cpu", "dtype": "float32"} | options)


def assert_same_weights(found, wanted):
    ours, theirs = dict(found.named_parameters()), dict(wanted.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert type(ours[name]) is type(value) and ours[name].dtype == value.dtype, name
        if isinstance(value, NF4Tensor):
            for part, tensor in value.packed.tensors().items():
                assert torch.equal(ours[name].packed.tensors()[part], tensor), (name, part)
        else:
            assert torch.equal(ours[name], value), name


# Quantising.


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", NF4()),
        ("llama", NF4(double_quant=False, block_size=128, head=True, skip_modules=("layers.0", "down_proj"))),
        ("bert", NF4()),
        ("gpt2", NF4()),
        ("t5", NF4(skip_modules=("wo",))),
    ],
    ids=["llama", "llama-options", "bert", "gpt2", "t5"],
)
def test_a_folder_in_4_bits_is_the_model_quantised_in_memory(place, tmp_path, family, config):
    said = []
    done = quantize_into(tmp_path / "out", model=str(place / family), quantize=config, dtype="float32", say=said.append)
    wanted = load(place / family, task=done["task"])
    parameters = sum(p.numel() for p in wanted.parameters())
    quantize_model(wanted, config)
    assert_same_weights(load(tmp_path / "out", task=done["task"]), wanted)
    held = {id(weight): weight for _, _, weight in quantized_sites(wanted)}.values()
    assert done["matrices"] == len(held)
    assert done["parameters"] == sum(weight.numel() for weight in held)
    assert done["bytes"] == sum(weight.packed.nbytes for weight in held)
    assert done["bits"] == pytest.approx(8 * done["bytes"] / done["parameters"], abs=1e-4)
    assert sum(part["parameters"] for part in done["kept"].values()) + done["parameters"] == parameters
    assert ("output head" in done["kept"]) == (family == "llama" and not config.head)
    assert ("other matrices" in done["kept"]) == bool(config.skip_modules)
    assert done["source_bytes"] == (place / family / "model.safetensors").stat().st_size
    assert done["weights_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert done["output_bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert done["peak_memory_bytes"] > done["output_bytes"] and said
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == wanted.config.vocab_size


def assert_bitsandbytes_agrees(folder, ours):
    """transformers with bitsandbytes has the values that are here, bit for bit."""
    library = pytest.importorskip("bitsandbytes")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    held = {path: weight for path, _, weight in quantized_sites(ours)}
    assert {path for path, module in theirs.named_modules() if isinstance(module, library.nn.Linear4bit)} == set(held)
    for path, weight in held.items():
        packed = theirs.get_submodule(path).weight
        # As one row, which begins a block in any case: on a CPU theirs takes each row for the beginning of one.
        state = copy.copy(packed.quant_state)
        state.shape = torch.Size((1, weight.numel()))
        values = library.functional.dequantize_4bit(packed.data, state).view(packed.quant_state.shape)
        assert torch.equal(values, weight.packed.dequantize()), path
    for name, value in theirs.named_parameters():
        if not isinstance(value, library.nn.Params4bit):
            assert torch.equal(value, ours.get_parameter(name)), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_with_bitsandbytes_has_the_same_values(place, tmp_path, family):
    quantize_into(tmp_path / "out", model=str(place / family), quantize=NF4(), dtype="float32")
    assert_bitsandbytes_agrees(tmp_path / "out", load(tmp_path / "out"))


def test_what_stays_is_held_in_16_bits(place, tmp_path):
    done = quantize_into(tmp_path / "auto", model=str(place / "llama"), quantize=NF4())
    assert done["dtype"] == "bfloat16"
    half = load(place / "llama", dtype="float16")
    dw.save_model(half, tmp_path / "half", tokenizer=dw.load_tokenizer(place / "llama"))
    assert quantize_into(tmp_path / "kept", model=str(tmp_path / "half"), quantize=NF4())["dtype"] == "float16"
    wide = quantize_into(tmp_path / "wide", model=str(tmp_path / "half"), quantize=NF4(), dtype="float32")
    tensors = load_file(tmp_path / "wide" / "model.safetensors")
    assert wide["dtype"] == "float32" and tensors["model.norm.weight"].dtype == torch.float32


def test_a_classifier_keeps_its_head_and_its_names(place, tmp_path):
    merged = tmp_path / "merged"
    export_into(merged, to="hf", run=str(place / "classes"))
    done = quantize_into(tmp_path / "out", model=str(merged), quantize=NF4(), dtype="float32")
    assert done["task"] == "sequence-classification" and done["kept"]["task head"]["parameters"] > 0
    found = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert found.id2label == {0: "bad", 1: "good"}
    wanted = load(merged, task="sequence-classification", labels=["bad", "good"])
    assert_same_weights(
        load(tmp_path / "out", task="sequence-classification", labels=["bad", "good"]), quantize_model(wanted, NF4())
    )
    said = []
    made = {"model": str(place / "bert"), "quantize": NF4(), "task": "token-classification", "say": said.append}
    with pytest.raises(InputError, match="has no classes of its own: name them with --labels"):
        quantize_into(tmp_path / "new", **made)
    quantize_into(tmp_path / "new", labels=["O", "B"], **made)
    assert "the classification head is new, and untrained" in said


def test_what_cannot_be_quantised(place, tmp_path):
    out, llama = tmp_path / "out", str(place / "llama")

    def refused(match, model=llama, quantize=None, **more):
        with pytest.raises(InputError, match=match):
            quantize_into(out, model=model, quantize=quantize or NF4(), **more)
        assert not out.exists()

    quantize_into(tmp_path / "four", model=llama, quantize=NF4(double_quant=False))
    refused(r"four is in 4 bits already \(bitsandbytes' nf4 with 32-bit scales\): load it", str(tmp_path / "four"))
    refused("is a run, not a model: deltaw export .*lora --to bnb", str(place / "lora"))
    refused("is a run, not a model: deltaw export .*lora/adapter --to bnb", str(place / "lora" / "adapter"))
    alone = shutil.copytree(place / "lora" / "adapter", tmp_path / "alone")
    refused("is an adapter, not a model: deltaw export --adapter", str(alone))
    refused("no such model", str(tmp_path / "nope"))
    refused("skip_modules 'q_prj' matches no module", quantize=NF4(skip_modules=["q_prj"]))
    refused("unknown dtype 'int4'", dtype="int4")
    refused("unknown task 'chat'", task="chat")
    refused("causal-lm has no classes", labels=["a"])
    refused(r"transformers loads wo in float32 only", str(place / "t5"))
    broken = shutil.copytree(llama, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    refused(r"cannot quantise model\.layers\.1\.mlp\.up_proj\.weight: 1 of its .* NaN", str(broken))
    out.mkdir()
    (out / "kept").write_text("kept")
    with pytest.raises(InputError, match="is not empty: choose a new folder"):
        quantize_into(out, model=llama, quantize=NF4())
    with pytest.raises(InputError, match="is a file: choose a new folder"):
        quantize_into(out / "kept", model=llama, quantize=NF4())
    assert [file.name for file in out.iterdir()] == ["kept"]


# Adapters for vLLM.


def make_adapter(place, folder, *, family="llama", dtype=torch.float32, task="causal-lm", **config):
    """An adapter with random factors."""
    model = load(place / family, task=task)
    dw.adapt(model, dw.LoRA(**config), name="made")
    with torch.no_grad():
        for key, parameter in dw.adapter_parameters(model, "made").items():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(0, key)) * 0.1)
            parameter.data = parameter.data.to(dtype)
    dw.save_adapter(model, folder, name="made")
    return str(folder)


def logits(place, folder, *, peft):
    if peft:
        library = pytest.importorskip("peft")
        model = transformers.AutoModelForCausalLM.from_pretrained(place / "llama", dtype=torch.float32)
        model = library.PeftModel.from_pretrained(model, folder)
    else:
        model = dw.load_adapter(load(place / "llama"), folder)
    with torch.no_grad():
        return model.eval()(IDS).logits


PATTERNS = {
    "plain": {"r": 4, "alpha": 6},
    "ranks": {"r": 4, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 12}},
    "alphas": {"r": 3, "alpha": 5, "alpha_pattern": {"v_proj": 1, r"layers\.0\..*down_proj": 7.5}},
    "rslora": {"r": 4, "rslora": True, "rank_pattern": {"o_proj": 9}, "target_modules": ["o_proj", "k_proj"]},
    "layers": {"r": 4, "layers_to_transform": [1], "alpha_pattern": {"q_proj": 3}},
    "regex": {"r": 2, "target_modules": r".*layers\.0\.(mlp\.up|self_attn\.q)_proj"},
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", PATTERNS)
def test_an_adapter_for_vllm_computes_the_same(place, tmp_path, name, dtype):
    config = PATTERNS[name]
    adapter = make_adapter(place, tmp_path / "adapter", dtype=dtype, **config)
    done = export_into(tmp_path / "out", to="vllm", adapter=adapter, model=str(place / "llama"))
    bare = load(place / "llama")
    with torch.no_grad():
        base = bare(IDS).logits
    for peft in (True, False):
        wanted, found = (logits(place, folder, peft=peft) for folder in (adapter, tmp_path / "out"))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(wanted, base, rtol=1e-3, atol=1e-4)

    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    r = max([config["r"], *config.get("rank_pattern", {}).values()])
    assert (fields["r"], done["r"]) == (r, r)
    for field in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_rslora", "layers_to_transform"):
        assert not fields[field], field
    assert fields["bias"] == "none" and isinstance(fields["target_modules"], list)
    assert fields["base_model_name_or_path"] == str(place / "llama")
    old, new = (load_file(f"{folder}/adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    assert old.keys() == new.keys()
    # What vLLM computes from these files: one scale times B A.
    model = dw.load_adapter(bare, adapter, name="original")
    scale = fields["lora_alpha"] / fields["r"]
    for site in dw.summary(model, "original").sites:
        A, B = (new[f"base_model.model.{site.name}.lora_{factor}.weight"] for factor in "AB")
        assert A.shape[0] == B.shape[1] == r
        original = model.get_submodule(site.name).adapted.parts["original"][0]
        torch.testing.assert_close(scale * (B.float() @ A.float()), original.delta(), rtol=1e-5, atol=1e-7)
    if name in ("plain", "regex"):
        assert all(torch.equal(new[key], old[key]) and new[key].dtype == dtype for key in old)
        assert (done["padded"], done["rescaled"]) == (0, 0)


def test_a_scale_that_the_dtype_would_round_is_kept_in_float32(place, tmp_path):
    kept, odd = {"alpha_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 3}}
    for name, config, dtype in (("kept", kept, torch.bfloat16), ("odd", odd, torch.float32)):
        adapter = make_adapter(place, tmp_path / name, dtype=torch.bfloat16, r=4, alpha=8, **config)
        done = export_into(tmp_path / f"{name}-out", to="vllm", adapter=adapter, model=str(place / "llama"))
        tensors = load_file(tmp_path / f"{name}-out" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        assert (done["rescaled"], done["alpha"]) == (2, 8)


def test_the_command_that_serves_a_run(place, tmp_path):
    base = str(place / "llama")
    done = export_into(tmp_path / "out", to="vllm", run=str(place / "lora"))
    words = ["vllm", "serve", base, "--enable-lora", "--lora-modules", f"lora={tmp_path}/out", "--max-lora-rank", "8"]
    assert shlex.split(done["command"]) == words
    assert (done["name"], done["r"], done["padded"], done["rescaled"]) == ("lora", 4, 2, 2)
    assert done["adapter"] == str(place / "lora" / "adapter") and "note" not in done
    again = export_into(tmp_path / "a=b, c", to="vllm", run=str(place / "lora" / "adapter"), name="mine")
    module = json.loads(shlex.split(again["command"])[5])
    assert module == {"name": "mine", "path": str(tmp_path / "a=b, c")}
    assert digest(tmp_path / "out") == digest(tmp_path / "a=b, c")
    moved = make_adapter(place, tmp_path / "my adapter", r=33, target_modules="qv")
    third = export_into(tmp_path / "third", to="vllm", adapter=moved, model=base)
    assert (third["name"], third["max_lora_rank"]) == ("my-adapter", 64)


def test_the_command_for_a_4_bit_base(place, tmp_path):
    done = export_into(tmp_path / "out", to="vllm", run=str(place / "qlora"))
    assert shlex.split(done["command"])[-2:] == ["--quantization", "bitsandbytes"] and "note" not in done
    quantize_into(tmp_path / "four", model=str(place / "llama"), quantize=NF4())
    done = export_into(tmp_path / "again", to="vllm", run=str(place / "lora"), model=str(tmp_path / "four"))
    assert shlex.split(done["command"])[2] == str(tmp_path / "four")
    assert shlex.split(done["command"])[-2:] == ["--quantization", "bitsandbytes"]
    run = shutil.copytree(place / "qlora", tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("double_quant: true", "double_quant: false"))
    done = export_into(tmp_path / "third", to="vllm", run=str(run))
    assert "--no-double-quant --output FOLDER and serve that" in done["note"]


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"bias": "lora_only", "family": "gpt2"}, r"it has bias='lora_only'"),
        ({"lora_bias": True}, r"it has lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, r"it has modules_to_save=\['lm_head'\]"),
        ({"trainable_tokens": [1, 2]}, r"it has trainable_tokens=\[1, 2\]"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"it adapts an embedding \(model\.embed_tokens\)"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"it adapts the output head \(lm_head\)"),
        ({"family": "gpt2"}, r"it adapts a Conv1D \(transformer\.h\.0\.attn\.c_attn\)"),
        ({"family": "t5"}, r"t5 is t5, which is no decoder that generates"),
        ({"family": "bert", "task": "masked-lm"}, r"bert is bert, which is no decoder that generates"),
        ({"r": 600, "target_modules": "qv"}, r"rank 600, above its largest of 512"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_what_vllm_does_not_serve(place, tmp_path, config, wanted):
    adapter = make_adapter(place, tmp_path / "adapter", **{"r": 2} | config)
    with pytest.raises(InputError, match=f"vLLM does not serve .*adapter beside its base, .*{wanted}.*: use --to hf"):
        export_into(tmp_path / "out", to="vllm", adapter=adapter, model=str(place / config.get("family", "llama")))
    assert not (tmp_path / "out").exists()


def test_tensors_that_are_no_factors_are_refused(place, tmp_path):
    adapter = make_adapter(place, tmp_path / "adapter", r=2)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(InputError, match=r"it carries lm_head\.weight beside its factors: use --to hf"):
        export_into(tmp_path / "out", to="vllm", adapter=adapter, model=str(place / "llama"))
    tiny_model(tmp_path / "wide", hidden=64)
    make_adapter(place, tmp_path / "other", r=2)
    with pytest.raises(InputError, match="does not fit LlamaForCausalLM"):
        export_into(tmp_path / "out", to="vllm", adapter=str(tmp_path / "other"), model=str(tmp_path / "wide"))
    assert not (tmp_path / "out").exists()


# Merged models.


def test_hf_is_the_merged_model_in_the_bases_dtype(place, tmp_path):
    done = export_into(tmp_path / "out", to="hf", run=str(place / "lora"))
    assert (done["to"], done["output"]) == ("hf", str(tmp_path / "out"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.float32
    with torch.no_grad():
        found = plain(IDS).logits
    torch.testing.assert_close(found, logits(place, place / "lora" / "adapter", peft=False), rtol=1e-4, atol=1e-5)


def test_hf_of_a_4_bit_run_is_merged_into_the_base_that_it_was_trained_on(place, tmp_path):
    export_into(tmp_path / "out", to="hf", run=str(place / "qlora"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.bfloat16
    quantised = dw.load_adapter(load(place / "llama", quantize=NF4()), place / "qlora")
    dw.merge(quantised, into="bf16", keep_original=False)
    for name, value in plain.named_parameters():
        # The 4-bit values are rounded to the dtype that the base was loaded in, which is the merger's choice.
        wanted = quantised.get_parameter(name).detach().float()
        torch.testing.assert_close(value.detach().float(), wanted, rtol=2**-6, atol=2**-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("run", ["lora", "qlora"])
def test_bnb_is_the_merged_model_in_4_bits(place, tmp_path, run):
    done = export_into(tmp_path / "out", to="bnb", run=str(place / run))
    assert done["to"] == "bnb" and "retention" in done and done["layers"]
    ours = load(tmp_path / "out")
    assert len(list(quantized_sites(ours))) == 14
    assert_bitsandbytes_agrees(tmp_path / "out", ours)


def test_a_run_that_trained_the_whole_model(place, tmp_path):
    full = str(place / "full")
    done = export_into(tmp_path / "hf", to="hf", run=full)
    assert digest(tmp_path / "hf") == digest(place / "full" / "model")
    assert (done["dtype"], done["adapters"], done["model"]) == ("float32", [], f"{full}/model")
    done = export_into(tmp_path / "bnb", to="bnb", run=full)
    assert done["matrices"] == 14 and len(list(quantized_sites(load(tmp_path / "bnb")))) == 14
    with pytest.raises(InputError, match=r"trained the whole model: vllm serve .*/full/model serves it as it is"):
        export_into(tmp_path / "vllm", to="vllm", run=full)
    assert not (tmp_path / "vllm").exists()


def test_what_cannot_be_exported(place, tmp_path):
    out, lora = tmp_path / "out", str(place / "lora")

    def refused(match, **words):
        with pytest.raises(InputError, match=match):
            export_into(out, **{"to": "hf", "run": lora} | words)
        assert not out.exists()

    refused("unknown form to export to 'gguf'.*known: bnb, hf, lora, vllm", to="gguf")
    refused("name is 'x': it is for vllm, and hf takes none", name="x")
    refused("name is 'a=b': expected no spaces", name="a=b", to="vllm")
    refused("nothing to export", run=None)
    refused("nothing to export", adapter=lora)
    for to in ("hf", "vllm", "bnb"):
        refused("no run at .*nope: expected a folder that deltaw train wrote", run=str(tmp_path / "nope"), to=to)
        refused("is no run but a model", run=str(place / "llama"), to=to)
        alone = shutil.copytree(place / "lora" / "adapter", tmp_path / f"alone-{to}")
        refused("is no run but an adapter: give it as --adapter", run=str(alone), to=to)
        refused("the base is not known: name it with --model", run=None, adapter=str(alone), to=to)
        refused("no such folder: .*gone", run=None, adapter=str(tmp_path / "gone"), to=to)
    unfinished = shutil.copytree(lora, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "adapter")
    refused("has no adapter .*: finish it with deltaw train --resume", run=str(unfinished))
    out.mkdir()
    (out / "kept").write_text("kept")
    for to in ("hf", "vllm", "bnb"):
        with pytest.raises(InputError, match="is not empty: choose a new folder"):
            export_into(out, to=to, run=lora)
    assert [file.name for file in out.iterdir()] == ["kept"]
