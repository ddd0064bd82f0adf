"""quantize and export on a tiny model and its run: what they print, write and refuse."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
import transformers
from command_line import digest, process, tiny_model
from safetensors.torch import load_file

import deltaw as dw
from deltaw.cli.main import main
from deltaw.quant import quantized_sites


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(scope="module")
def whole(work, tmp_path_factory):
    """A run that trained the whole model."""
    folder = tmp_path_factory.mktemp("whole") / "full"
    words = ["train", "--model", work / "model", "--data", work / "rows.jsonl", "--output", folder, "--method", "full"]
    words += ["--max-steps", "1", "--device", "cpu", "--no-baselines", "--no-evaluate-before"]
    assert main([str(word) for word in words]) == 0
    return folder


def facts(out):
    return dict(re.findall(r"^(\S+(?: \S+)*)  +(.*)$", out, re.M))


# Quantising.


def test_quantize_writes_a_folder_and_says_what_became_of_the_model(here, deltaw):
    done = deltaw("quantize", "model", "--output", "four")
    assert done.code == 0, done.err
    assert done.err == "quantising model tensor by tensor\nwriting four\n"
    # 14 matrices of two layers: 4 x 32 x 32 and 3 x 32 x 48 values each.
    count = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert re.search(rf"Matrices +NF4 +14 +{count:,} .* 4\.1\d\d", done.out)
    assert re.search(r"Embeddings +bfloat16 +1 +8,256 .* 16\.000", done.out)
    assert re.search(r"Output head +bfloat16 +1 +8,256", done.out)
    assert re.search(r"Norms and biases +bfloat16 +5 +160", done.out)
    shown = facts(done.out)
    assert (shown["Model"], shown["Output"]) == ("model", "four")
    assert shown["Blocks"] == "64 values, scales in 8 bits" and "Peak memory" in shown
    assert re.fullmatch(r"[\d.]+ KiB, before [\d.]+ KiB", shown["Weights"])
    assert len(list(quantized_sites(dw.load_model("four", device="cpu")))) == 14
    assert transformers.AutoTokenizer.from_pretrained("four").eos_token == "<|end|>"
    before = digest(here / "four")
    assert "four is not empty: choose a new folder" in deltaw("quantize", "model", "--output", "four").error(2)
    again = deltaw("quantize", "four", "--output", "again")
    assert "four is in 4 bits already" in again.error(2) and not (here / "again").exists()
    assert digest(here / "four") == before


def test_options_of_quantize(here, deltaw):
    words = ["--no-double-quant", "--block-size", "128", "--head", "--skip-modules", "q_proj,layers.1.mlp"]
    words += ["--dtype", "float16", "--device", "cpu", "--task", "causal-lm"]
    done = deltaw("quantize", "model", "--output", "four", *words, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["double_quant"], found["block_size"], found["dtype"]) == (False, 128, "float16")
    assert found["matrices"] == 14 - 2 - 3 + 1
    assert found["bits"] == pytest.approx(4.25, abs=0.02)
    assert found["kept"]["other matrices"]["tensors"] == 5 and "output head" not in found["kept"]
    config = json.loads((here / "four" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is False


def test_quantize_names_classes(here, deltaw):
    tiny_model(here / "bert", kind="Bert")
    words = ["quantize", "bert", "--output", "four", "--task", "sequence-classification"]
    assert "name them with --labels" in deltaw(*words).error(2)
    config = json.loads((here / "bert" / "config.json").read_text())
    (here / "bert" / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    bare = deltaw("quantize", "bert", "--output", "four").error(2)
    assert "bert is an encoder without a head: name what it is for with --task" in bare
    done = deltaw(*words, "--labels", "bad, good")
    assert done.code == 0 and "the classification head is new, and untrained" in done.err
    assert transformers.AutoConfig.from_pretrained("four").id2label == {0: "bad", 1: "good"}


def test_wrong_usage_of_quantize(here, deltaw, finished):
    wrong = {
        ("quantize",): "nothing to quantise: give a model",
        ("quantize", "model"): "no output: name the folder to write with --output",
        ("quantize", "./modle"): "no such model: './modle': did you mean model?",
        ("quantize", "model", "--block-size", "60"): "block_size is 60: expected one of 64, 128",
        ("quantize", "model", "--block-size", "x"): "--block-size: expected a whole number",
        ("quantize", "model", "--skip-modules", "q_prj"): "skip_modules 'q_prj' matches no module",
        ("quantize", "model", "--dtype", "int4"): "unknown dtype 'int4'",
        ("quantize", "model", "--device", "tpu:x"): "device 'tpu:x': expected auto, cpu",
        ("quantize", "model", "--labels", "a,b"): "causal-lm has no classes",
        ("quantize", str(finished), "--head"): "is a run, whose base and task are known: give --output and --json",
    }
    for words, wanted in wrong.items():
        output = ["--output", "out"] if len(words) > 1 and words != ("quantize", "model") else []
        done = deltaw(*words, *output)
        assert done.code == 2 and done.out == "" and wanted in done.line(), words
    assert not (here / "out").exists()


def test_a_run_is_quantised_merged(here, deltaw, finished):
    done = deltaw("quantize", finished, "--output", "four", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["to"], found["into"], len(found["layers"])) == ("bnb", "nf4", 14) and "retention" in found
    assert json.loads((here / "four" / "config.json").read_text())["quantization_config"]["load_in_4bit"] is True


def test_quantize_in_a_process_of_its_own(here):
    with process("quantize", "model", "--output", "four", "--json", cwd=here) as running:
        out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert json.loads(out)["matrices"] == 14
    assert err == "quantising model tensor by tensor\nwriting four\n"


# Exporting.


def test_export_for_vllm_prints_the_command(here, deltaw, finished):
    done = deltaw("export", finished, "--model", "model", "--to", "vllm", "--output", "served")
    assert (done.code, done.err) == (0, "")
    shown = facts(done.out)
    words = ["vllm", "serve", "model", "--enable-lora", "--lora-modules", "finished=served", "--max-lora-rank", "8"]
    assert shlex.split(shown["Serve with"]) == words
    assert (shown["Rank"], shown["Modules"], shown["Output"]) == ("2", "14", "served")
    assert shown["Model in requests"] == "finished"
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (finished / "adapter", here / "served"))
    assert old.keys() == new.keys() and all((old[key] == new[key]).all() for key in old)
    alone = shutil.copytree(finished / "adapter", here / "alone")
    words = ["export", "--adapter", alone, "--model", "model", "--to", "vllm", "--name", "mine"]
    found = json.loads(deltaw(*words, "--output", "again", "--json").out)
    assert (found["to"], found["name"], found["max_lora_rank"]) == ("vllm", "mine", 8)
    assert digest(here / "again") == digest(here / "served")


def test_export_of_merged_models(here, deltaw, finished):
    done = deltaw("export", finished, "--model", "model", "--to", "hf", "--output", "hf")
    assert done.code == 0, done.err
    assert str(finished) in done.out and "hf" in done.out
    deltaw("merge", finished, "--model", "model", "--output", "merged")
    assert digest(here / "hf") == digest(here / "merged")
    done = deltaw("export", finished, "--model", "model", "--to", "bnb", "--output", "bnb", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["to"] == "bnb" and "retention" in found
    assert len(list(quantized_sites(dw.load_model("bnb", device="cpu")))) == 14
    done = deltaw("export", finished, "--model", "model", "--to", "bnb", "--output", "shown")
    assert done.code == 0 and "etention" in done.out


def test_export_of_a_run_that_trained_the_whole_model(here, deltaw, whole):
    done = deltaw("export", whole, "--to", "hf", "--output", "hf")
    assert done.code == 0, done.err
    assert facts(done.out)["Copied"] == f"{whole}/model, as the run trained the whole model"
    assert digest(here / "hf") == digest(whole / "model")
    done = deltaw("export", whole, "--to", "bnb", "--output", "bnb")
    assert done.code == 0 and re.search(r"Matrices +NF4 +14", done.out)
    line = deltaw("export", whole, "--to", "vllm", "--output", "vllm").error(2)
    assert f"vllm serve {whole}/model serves it as it is" in line and not (here / "vllm").exists()


def test_wrong_usage_of_export(here, deltaw, finished):
    unfinished = shutil.copytree(finished, here / "unfinished")
    shutil.rmtree(unfinished / "adapter")
    alone = shutil.copytree(finished / "adapter", here / "alone")
    earlier, out = digest(finished), ["--output", "out"]
    wrong = [
        ([finished, *out], "no form to export to: give --to hf, --to vllm, --to bnb or --to lora"),
        ([finished, "--to", "vlm", *out], "unknown form to export to 'vlm': did you mean 'vllm'?"),
        ([finished, "--to", "hf"], "no output: name the folder to write with --output"),
        (["--to", "hf", *out], "nothing to export: give a run folder, or an adapter (--adapter)"),
        ([finished, "--adapter", alone, "--to", "hf", *out], "were given: give one"),
        (["model", "--to", "hf", *out], "model is no run but a model"),
        (["smollm2-135m", "--to", "hf", *out], "no run at smollm2-135m: expected a folder that deltaw train wrote"),
        ([alone, "--to", "vllm", *out], "is no run but an adapter: give it as --adapter"),
        (["--adapter", alone, "--to", "vllm", *out], "the base is not known: name it with --model"),
        ([unfinished, "--to", "vllm", *out], "finish it with deltaw train --resume"),
        ([finished, "--to", "hf", "--name", "x", *out], "name is 'x': it is for vllm, and hf takes none"),
        ([finished, "--to", "vllm", "--name", "a b", *out], "name is 'a b': expected no spaces"),
        ([finished, "--to", "vllm", "--model", "./modle", *out], "no such model: './modle'"),
        ([finished, "--to", "vllm", "--model", "model", "--output", "rows.jsonl"], "rows.jsonl is a file"),
    ]
    for words, wanted in wrong:
        done = deltaw("export", *words)
        assert done.code == 2 and done.out == "" and wanted in done.line(), words
    assert not (here / "out").exists()
    assert digest(finished) == earlier
