"""Combining runs and adapters as folders: what is written, what is said, what is left alone."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

import deltaw as dw
from deltaw.core.errors import InputError
from deltaw.studies.combining import combine


@pytest.fixture
def two(tmp_path):
    for place, config in enumerate((dw.LoRA(r=2, alpha=3), dw.LoRA(r=3, target_modules="attention"))):
        model = dw.adapt(tiny.tiny("llama"), config, name=f"a{place}")
        dw.save_adapter(tiny.randomise(model, f"a{place}"), tmp_path / f"a{place}", base_model="some-model")
    return [(tmp_path / "a0", 1.0), (tmp_path / "a1", -0.5)]


def expected_logits(two):
    model = tiny.tiny("llama")
    for path, _ in two:
        dw.load_adapter(model, path)
    dw.set_adapter(model, {path.name: weight for path, weight in two})
    return tiny.logits(model, "llama")


def test_the_sum_is_exact_by_default(two, tmp_path):
    done = combine(two, tmp_path / "sum")
    loaded = dw.load_adapter(tiny.tiny("llama"), tmp_path / "sum")
    torch.testing.assert_close(tiny.logits(loaded, "llama"), expected_logits(two), atol=2e-5, rtol=1e-5)
    assert done["method"] == "cat" and done["relative_error"] < 1e-7 and done["r"] == 5
    assert [a["weight"] for a in done["adapters"]] == [1.0, -0.5] and [a["sites"] for a in done["adapters"]] == [14, 8]
    assert done["output_bytes"] == (tmp_path / "sum/adapter_model.safetensors").stat().st_size
    assert done["parameters"] == sum(a["parameters"] for a in done["adapters"])
    assert len(done["sites"]) == 14 and {site["r"] for site in done["sites"].values()} == {2, 5}
    fields = json.loads((tmp_path / "sum/adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "some-model" and fields["peft_type"] == "LORA"
    json.dumps(done, allow_nan=False)


def test_a_rank_means_svd_and_its_error_falls_with_it(two, tmp_path):
    errors = [combine(two, tmp_path / f"r{r}", r=r, model="other") for r in (1, 2, 4, 5)]
    assert all(done["method"] == "svd" and done["r"] <= r for done, r in zip(errors, (1, 2, 4, 5), strict=True))
    values = [done["relative_error"] for done in errors]
    assert values == sorted(values, reverse=True) and values[0] > 0.1 and values[-1] < 1e-7
    assert json.loads((tmp_path / "r1/adapter_config.json").read_text())["base_model_name_or_path"] == "other"


def test_nothing_is_written_where_something_is_wrong(two, tmp_path):
    with pytest.raises(InputError, match="is not empty: choose a new folder"):
        combine(two, tmp_path / "a0")
    with pytest.raises(InputError, match="needs equal ranks"):
        combine(two, tmp_path / "out", method="linear")
    with pytest.raises(InputError, match="no such folder"):
        combine([*two, (tmp_path / "none", 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
