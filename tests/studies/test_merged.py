"""Merging runs on 4-bit bases into 4 bits and 16: what is written, what was kept, and where that cannot be known."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from command_line import tiny_model, write_rows

from deltaw.checkpoint import load_model
from deltaw.core.errors import InputError
from deltaw.quant import NF4Tensor, quantized_sites
from deltaw.studies.job import run_training as train
from deltaw.studies.merged import merge_into, retention
from deltaw.studies.ship import evaluate_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, rows, and runs on it: `q` on a 4-bit base, `plain` on a 16-bit one."""
    folder = tmp_path_factory.mktemp("merged")
    tiny_model(folder / "llama")
    data = str(write_rows(folder / "rows.jsonl", count=40))
    keys = dict(batch_size=8, micro_batch_size=8, learning_rate=0.03, device="cpu", baselines=False, r=4)
    for name, method in (("q", "qlora"), ("plain", "lora")):
        train(
            model=str(folder / "llama"),
            data=data,
            output=str(folder / name),
            method=method,
            max_steps=10,
            dtype="bfloat16",
            **keys,
        )
    return folder


def test_into_four_bits_with_what_was_kept(place, tmp_path):
    said = []
    done = merge_into(tmp_path / "m", adapters=[(str(place / "q"), 1.0)], into="nf4", calibrate=16, say=said.append)
    assert (done["into"], done["mode"], done["dtype"]) == ("nf4", "retain", "bfloat16") and done[
        "calibration_tokens"
    ] > 0
    assert done["retention"] == retention(done["metrics"])
    base, adapter, merged = (done["metrics"][when]["loss"] for when in ("base", "adapter", "merged"))
    assert done["retention"]["loss"] == pytest.approx((merged - base) / (adapter - base))
    # The figures are those of the run, and of the folder that was written.
    recorded = json.loads((place / "q/run.json").read_text())["metrics"]
    assert base == pytest.approx(recorded["before"]["loss"], rel=1e-6)
    assert adapter == pytest.approx(recorded["after"]["loss"], rel=1e-6)
    loaded = load_model(tmp_path / "m", device="cpu")
    assert len(list(quantized_sites(loaded))) == len(done["layers"]) == done["adapters"][0]["sites"] == 14
    assert json.loads((tmp_path / "m/deltaw_merge.json").read_text())["layers"] == done["layers"]
    assert any("measuring the merged model" in line for line in said)
    # Plain requantising of the same run keeps less of the update in every layer's median.
    plain = merge_into(tmp_path / "p", adapters=[(str(place / "q"), 1.0)], into="nf4", mode="requantize", measure=False)
    assert "metrics" not in plain and "retention" not in plain
    middle = [sorted(e["kept"] for e in found["layers"].values())[7] for found in (done, plain)]
    assert middle[0] > middle[1]


def test_into_sixteen_bits_the_base_is_the_one_that_was_trained_on(place, tmp_path):
    done = merge_into(tmp_path / "m", adapters=[(str(place / "q"), 1.0)])
    assert done["into"] == "bfloat16" and "layers" not in done
    assert done["retention"]["loss"] == pytest.approx(1.0, abs=0.1)
    merged = load_model(tmp_path / "m", device="cpu")
    assert not any(isinstance(p, NF4Tensor) for p in merged.parameters())
    sixteen, four = (
        load_model(place / "llama", device="cpu", dtype="bfloat16", quantize=q)
        for q in (None, _run(place).quantization)
    )
    path = "model.layers.0.self_attn.q_proj"
    W, kept, held = (m.get_submodule(path).weight for m in (merged, sixteen, four))
    update = W.float() - held.dequantize().float()
    rank = torch.linalg.matrix_rank(update, rtol=0.05)
    assert rank <= 6 < torch.linalg.matrix_rank(W.float() - kept.float(), rtol=0.05)


def _run(place):
    from deltaw.studies.ship import open_run

    return open_run(place / "q").config


def test_a_sixteen_bit_run_goes_into_four_bits_too(place, tmp_path):
    done = merge_into(tmp_path / "m", adapters=[(str(place / "plain"), 1.0)], into="nf4", calibrate=8)
    assert done["into"] == "nf4" and set(done["metrics"]) == {"base", "adapter", "merged"}
    loaded = load_model(tmp_path / "m", device="cpu")
    assert sum(1 for _ in quantized_sites(loaded)) == 14
    found = evaluate_model(keys={"model": str(tmp_path / "m"), "data": str(place / "rows.jsonl"), "device": "cpu"})
    assert found["metrics"]["after"]["loss"] > 0


def test_without_the_rows_it_goes_by_the_weights_and_says_so(place, tmp_path):
    shutil.copytree(place / "q", tmp_path / "moved")
    shutil.copy(place / "rows.jsonl", tmp_path / "rows.jsonl")
    config = (
        (tmp_path / "moved/config.yaml").read_text().replace(str(place / "rows.jsonl"), str(tmp_path / "gone.jsonl"))
    )
    (tmp_path / "moved/config.yaml").write_text(config)
    said = []
    done = merge_into(tmp_path / "m", adapters=[(str(tmp_path / "moved"), 1.0)], into="nf4", say=said.append)
    assert done["calibration_tokens"] == 0 and "metrics" not in done
    assert any("weights alone, and retention is not measured" in line and "gone.jsonl" in line for line in said)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"into": "int4"}, "unknown form to merge into 'int4'"),
        ({"into": "nf4", "mode": "keep"}, "unknown mode of merging 'keep'"),
        ({"quantize": "fp4"}, "unknown quantisation 'fp4'"),
        ({"calibrate": -1}, "calibrate is -1"),
    ],
)
def test_wrong_options_leave_nothing(place, tmp_path, options, says):
    with pytest.raises(InputError, match=says):
        merge_into(tmp_path / "m", adapters=[(str(place / "q"), 1.0)], **options)
    assert not (tmp_path / "m").exists()


def test_bases_held_differently_are_not_merged_together(place, tmp_path):
    with pytest.raises(InputError, match="held in different ways"):
        merge_into(tmp_path / "m", adapters=[(str(place / "q"), 1.0), (str(place / "plain"), 0.5)])
