"""Evaluating and merging what a run made: the run's own figures again, and W + scale B A to the last bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from command_line import tiny_model, write_rows
from safetensors.torch import load_file, save_file

from deltaw.core.errors import InputError
from deltaw.studies.job import run_training as train
from deltaw.studies.merged import merge_into, stored_dtype
from deltaw.studies.ship import evaluate_model, evaluate_run, model_labels, open_run, run_of_adapter

KEYS = {
    "max_steps": 3,
    "batch_size": 4,
    "micro_batch_size": 4,
    "learning_rate": 0.05,
    "dtype": "float32",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models `llama` and `bert`, rows, and runs `lora`, `other`, `full` and `classes` on them."""
    folder = tmp_path_factory.mktemp("ship")
    tiny_model(folder / "llama")
    tiny_model(folder / "bert", kind="Bert")
    data = str(write_rows(folder / "rows.jsonl", count=40))
    held = str(write_rows(folder / "held.jsonl", count=8))

    def run(name, model, **more):
        train(model=str(folder / model), data=data, output=str(folder / name), **{**KEYS, **more})

    run("lora", "llama", r=4)
    run("other", "llama", r=2, rslora=True, target_modules="attention", seed=1, test_data=held)
    run("full", "llama", method="full", learning_rate=0.001)
    run("classes", "bert", r=4, seed=5)
    return folder


def record(folder):
    return json.loads((folder / "run.json").read_text())


def delta(folder, name, scale):
    """Scale B A of one site, in float32."""
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    prefix = f"base_model.model.{name}."
    return scale * (tensors[f"{prefix}lora_B.weight"].float() @ tensors[f"{prefix}lora_A.weight"].float())


QUERY = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize("name", ["lora", "other", "full", "classes"])
def test_a_run_evaluated_again_has_its_own_figures(place, name):
    run = place / name
    found = evaluate_run(run, compare_base=True)
    wanted = record(run)["metrics"]
    for when in ("before", "after"):
        assert found["metrics"][when] == pytest.approx(wanted[when], rel=1e-5)
        assert found["metrics"]["confusion"][when] == wanted["confusion"][when]
    assert found["metrics"]["before"] != found["metrics"]["after"]
    assert found["metrics"]["baselines"] == wanted["baselines"]
    assert found["metrics"]["labels"] == ["bad", "good"]
    assert ("adapter" in found) == (name != "full")


def test_other_rows_and_other_places(place, tmp_path):
    held = place / "held.jsonl"
    found = evaluate_run(place / "lora", data=str(held))
    assert found["data"]["test"]["rows"] == 8
    assert "before" not in found["metrics"] and set(found["metrics"]["baselines"]) == {"majority", "tfidf_logreg"}
    moved = shutil.copytree(place / "llama", tmp_path / "moved")
    again = evaluate_run(place / "lora", data=str(held), changes={"model": str(moved), "baselines": False})
    assert again["metrics"]["after"] == found["metrics"]["after"]
    assert again["model"]["source"] == str(moved)
    assert "baselines" not in again["metrics"]
    assert run_of_adapter(place / "lora" / "adapter") == run_of_adapter(place / "lora") == place / "lora"
    alone = shutil.copytree(place / "lora" / "adapter", tmp_path / "adapter")
    assert run_of_adapter(alone) is None
    keys = {"model": str(moved), "data": str(held), "dtype": "float32", "device": "cpu"}
    lone = evaluate_model(adapter=alone, keys=keys, compare_base=True)
    assert lone["metrics"]["after"] == pytest.approx(found["metrics"]["after"], rel=1e-6)
    bare = evaluate_model(keys=keys)
    assert bare["metrics"]["after"] == lone["metrics"]["before"]
    with pytest.raises(InputError, match="nothing to compare the base with"):
        evaluate_model(keys=keys, compare_base=True)


def test_baselines_are_left_out_where_the_training_rows_are_gone(place, tmp_path):
    run = shutil.copytree(place / "lora", tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("rows.jsonl", "gone.jsonl"))
    said = []
    found = evaluate_run(run, data=str(place / "held.jsonl"), say=said.append)
    assert "baselines" not in found["metrics"]
    assert said[0].startswith("no baselines, as the training rows cannot be read: no such file: ")
    with pytest.raises(InputError, match="no such file"):
        evaluate_run(run)


def test_rows_that_changed_are_refused(place, tmp_path):
    run = shutil.copytree(place / "lora", tmp_path / "run")
    write_rows(tmp_path / "rows.jsonl", count=41)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(place / "rows.jsonl"), str(tmp_path / "rows.jsonl")))
    with pytest.raises(InputError, match=r"rows\.jsonl has changed since the run"):
        evaluate_run(run)


def test_labels_are_the_runs(place):
    with pytest.raises(InputError, match=r"labels are \['good', 'bad'\] and the run at .* has \['bad', 'good'\]"):
        evaluate_run(place / "lora", changes={"labels": ["good", "bad"]})
    assert evaluate_run(place / "lora", changes={"labels": ["bad", "good"]})["metrics"]["labels"] == ["bad", "good"]


def test_runs_without_a_result_and_without_rows(place, tmp_path):
    run = shutil.copytree(place / "lora", tmp_path / "run")
    shutil.rmtree(run / "adapter")
    with pytest.raises(
        InputError, match=r"has no adapter \(its status is 'done'\): finish it with deltaw train --resume"
    ):
        open_run(run)
    (run / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"has no config\.yaml"):
        open_run(run)
    bare = tmp_path / "bare"
    train(model=str(place / "llama"), data=str(place / "rows.jsonl"), output=str(bare), held_out=0, r=2, **KEYS)
    with pytest.raises(InputError, match="held no rows out: give some with data"):
        evaluate_run(bare)


def test_a_merged_run_is_w_plus_scale_b_a(place, tmp_path):
    done = merge_into(tmp_path / "merged", adapters=[(str(place / "lora"), 1.0)])
    base, merged = (
        load_file(place / "llama" / "model.safetensors"),
        load_file(tmp_path / "merged" / "model.safetensors"),
    )
    assert base.keys() == merged.keys()
    names = {site["name"] for site in record(place / "lora")["method"]["sites"]}
    for key, value in merged.items():
        name = key.removesuffix(".weight")
        wanted = base[key] + delta(place / "lora", name, 2.0) if name in names else base[key]
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7)
    assert not torch.equal(merged[f"{QUERY}.weight"], base[f"{QUERY}.weight"])
    assert done["model"] == str(place / "llama")
    assert (done["dtype"], done["task"], done["class"]) == ("float32", "instruct", "LlamaForCausalLM")
    assert done["adapters"] == [{"path": str(place / "lora"), "weight": 1.0, "sites": 14, "parameters": 3968}]
    assert done["output_bytes"] == sum(file.stat().st_size for file in (tmp_path / "merged").iterdir())
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    held = {"model": str(tmp_path / "merged"), "data": str(place / "held.jsonl"), "dtype": "float32", "device": "cpu"}
    found = evaluate_model(keys=held)["metrics"]["after"]
    assert found == pytest.approx(evaluate_run(place / "lora", data=held["data"])["metrics"]["after"], rel=1e-5)
    assert len(tokenizer) == plain.config.vocab_size


def test_several_adapters_are_a_weighted_sum(place, tmp_path):
    adapters = [(str(place / "lora"), 0.5), (str(place / "other" / "adapter"), -0.25)]
    merge_into(tmp_path / "merged", adapters=adapters)
    base, merged = (
        load_file(place / "llama" / "model.safetensors"),
        load_file(tmp_path / "merged" / "model.safetensors"),
    )
    wanted = base[f"{QUERY}.weight"] + 0.5 * delta(place / "lora", QUERY, 2.0)
    wanted = wanted - 0.25 * delta(place / "other", QUERY, 4 / 2**0.5)
    torch.testing.assert_close(merged[f"{QUERY}.weight"], wanted, rtol=1e-6, atol=1e-7)
    up = "model.layers.0.mlp.up_proj"
    wanted = base[f"{up}.weight"] + 0.5 * delta(place / "lora", up, 2.0)
    torch.testing.assert_close(merged[f"{up}.weight"], wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "kept"), [(None, torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)]
)
def test_the_base_keeps_its_stored_dtype_and_is_rounded_once(place, tmp_path, dtype, kept):
    stored = shutil.copytree(place / "llama", tmp_path / "stored")
    tensors = load_file(stored / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in tensors.items()}, stored / "model.safetensors", metadata={"format": "pt"})
    assert stored_dtype(stored) == torch.bfloat16
    merge_into(tmp_path / "merged", adapters=[(str(place / "lora"), 1.0)], model=str(stored), dtype=dtype)
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{QUERY}.weight"]
    wanted = tensors[f"{QUERY}.weight"].bfloat16().float() + delta(place / "lora", QUERY, 2.0)
    assert merged.dtype == kept
    # One rounding: off by at most one unit in the last place from the exact sum's own rounding.
    torch.testing.assert_close(merged.float(), wanted.to(kept).float(), rtol=2 * torch.finfo(kept).eps, atol=0)


def test_a_classifier_is_merged_with_its_head_and_its_labels(place, tmp_path):
    merge_into(tmp_path / "merged", adapters=[(str(place / "classes"), 1.0)])
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert plain.config.id2label == {0: "bad", 1: "good"}
    assert model_labels(tmp_path / "merged") == ["bad", "good"]
    assert model_labels(place / "bert") is None
    tensors = load_file(place / "classes" / "adapter" / "adapter_model.safetensors")
    assert torch.equal(plain.classifier.weight, tensors["base_model.model.classifier.weight"])
    held = {"model": str(tmp_path / "merged"), "data": str(place / "held.jsonl"), "dtype": "float32", "device": "cpu"}
    found = evaluate_model(keys=held)
    assert found["task"] == "sequence-classification"
    wanted = evaluate_run(place / "classes", data=held["data"])["metrics"]["after"]
    assert found["metrics"]["after"] == pytest.approx(wanted, rel=1e-5)


def test_a_classifiers_adapter_alone_needs_its_labels(place, tmp_path):
    alone = shutil.copytree(place / "classes" / "adapter", tmp_path / "adapter")
    adapters, bert = [(str(alone), 1.0)], str(place / "bert")
    with pytest.raises(InputError, match="the adapter is for sequence-classification: name its classes with --labels"):
        merge_into(tmp_path / "merged", adapters=adapters, model=bert)
    with pytest.raises(InputError, match="of another shape"):
        merge_into(tmp_path / "merged", adapters=adapters, model=bert, labels=["a", "b", "c"])
    assert not (tmp_path / "merged").exists()
    merge_into(tmp_path / "merged", adapters=adapters, model=bert, labels=["bad", "good"])
    assert model_labels(tmp_path / "merged") == ["bad", "good"]


def test_what_cannot_be_merged(place, tmp_path):
    lora, out = str(place / "lora"), tmp_path / "out"
    with pytest.raises(InputError, match=r"trained the whole model, which is at .*full/model: nothing to merge"):
        merge_into(out, adapters=[(str(place / "full"), 1.0)])
    with pytest.raises(InputError, match=r"no such folder: .*; give a run folder"):
        merge_into(out, adapters=[(str(place / "nope"), 1.0)])
    alone = shutil.copytree(place / "lora" / "adapter", tmp_path / "adapter")
    with pytest.raises(InputError, match="is no run folder, so the base is not known: name it with --model"):
        merge_into(out, adapters=[(str(alone), 1.0)])
    with pytest.raises(InputError, match="trained on different models"):
        merge_into(out, adapters=[(lora, 1.0), (str(place / "classes"), 1.0)])
    with pytest.raises(InputError, match="unknown dtype 'int3'"):
        merge_into(out, adapters=[(lora, 1.0)], dtype="int3")
    assert not out.exists()
    out.mkdir()
    (out / "kept").write_text("kept")
    with pytest.raises(InputError, match="is not empty: choose a new folder"):
        merge_into(out, adapters=[(lora, 1.0)])
    with pytest.raises(InputError, match="is a file: choose a new folder"):
        merge_into(out / "kept", adapters=[(lora, 1.0)])
    assert [(file.name, file.read_text()) for file in out.iterdir()] == [("kept", "kept")]
