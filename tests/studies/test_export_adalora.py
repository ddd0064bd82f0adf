"""AdaLoRA's runs for everybody else: as plain LoRA, for vLLM and merged, against PEFT and the run's own model."""

from __future__ import annotations

import json

import peft
import pytest
import small_runs
import torch
import transformers
from command_line import tiny_model
from safetensors.torch import load_file

import deltaw as dw
from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.methods.host import parts_of
from deltaw.studies.export import export_into
from deltaw.studies.job import run_training as train

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

KEYS = {"method": "adalora", "init_r": 4, "target_r": 2, "max_steps": 4, "batch_size": 8, "micro_batch_size": 8}
KEYS |= {"learning_rate": 0.02, "dtype": "float32", "device": "cpu", "baselines": False, "evaluate_before": False}
IDS = torch.arange(5, 29).view(2, 12)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs `language` and `classes`, and pruned adapters beside the models `llama`, `gpt2` and `t5`."""
    folder = tmp_path_factory.mktemp("plain")
    tiny_model(folder / "llama")
    for family in ("bert", "gpt2", "t5"):
        small_runs.make_model(folder / family, family)
    rows = small_runs.write_rows(folder / "rows.jsonl", small_runs.rows_of("label", 24))
    train(model=str(folder / "llama"), data=rows, output=str(folder / "language"), **KEYS)
    options = {"task": "sequence-classification", "bias": "lora_only"}
    train(model=str(folder / "bert"), data=rows, output=str(folder / "classes"), **KEYS | options)
    return folder


def adapter(place, output, family, **options):
    """A random adapter of a model, with ranks from 0 to 4 in turn."""
    model = dw.load_model(place / family, device="cpu", dtype="float32")
    dw.adapt(model, dw.AdaLoRA(**{"init_r": 4, "target_r": 2} | options), name="a")
    for key, parameter in dw.adapter_parameters(model, "a").items():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(0, key)))
    lows = [part for _, _, part in parts_of(model, "a") if part.low_rank() is not None]
    for number, part in enumerate(lows):
        part.prune(torch.arange(4) < number % 5)
    dw.save_adapter(model, output, name="a")
    return model, [number % 5 for number in range(len(lows))]


def logits(model, **given):
    given = given or {"input_ids": IDS}
    with torch.no_grad():
        return model.eval()(**given).logits


def test_a_run_as_lora_computes_the_same_here_and_in_peft(place, tmp_path):
    done = export_into(tmp_path / "out", to="lora", run=str(place / "language"))
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    ranks = {site["name"]: site["r"] for site in small_runs.record(place / "language")["method"]["sites"]}
    left = {name: r for name, r in ranks.items() if r}
    assert fields["peft_type"] == "LORA" and fields["base_model_name_or_path"] == str(place / "llama")
    assert {name: fields["rank_pattern"].get(name, fields["r"]) for name in left} == left
    assert (done["to"], done["sites"], done["dropped"]) == ("lora", len(left), len(ranks) - len(left))
    assert done["ranks"] == [min(left.values()), max(left.values())] and done["method"] == "adalora"
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert done["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    own = dw.load_adapter(dw.load_model(place / "llama", device="cpu", dtype="float32"), place / "language")
    plain = dw.load_adapter(dw.load_model(place / "llama", device="cpu", dtype="float32"), tmp_path / "out")
    assert torch.equal(logits(plain), logits(own))
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "llama", dtype=torch.float32)
    assert not torch.equal(logits(base), logits(own))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(logits(theirs), logits(own), rtol=1e-5, atol=1e-5)


def test_a_classifier_with_biases_and_its_head(place, tmp_path):
    export_into(tmp_path / "out", to="lora", run=str(place / "classes"))
    labels = small_runs.record(place / "classes")["metrics"]["labels"]
    options = {"task": "sequence-classification", "labels": labels, "device": "cpu", "dtype": "float32"}
    own = dw.load_adapter(dw.load_model(place / "bert", **options), place / "classes")
    plain = dw.load_adapter(dw.load_model(place / "bert", **options), tmp_path / "out")
    ids = torch.arange(5, 17).view(2, 6)
    assert torch.equal(logits(plain, input_ids=ids), logits(own, input_ids=ids))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {}),
        ("t5", {"target_modules": "qv"}),
        ("llama", {"trainable_tokens": [3, 9], "modules_to_save": ["norm"]}),
    ],
)
def test_adapters_of_other_families(place, tmp_path, family, options):
    model, ranks = adapter(place, tmp_path / "a", family, **options)
    done = export_into(tmp_path / "out", to="lora", adapter=str(tmp_path / "a"), model=str(place / family))
    assert done["sites"] == sum(map(bool, ranks)) and done["dropped"] == ranks.count(0) and done["ranks"] == [1, 4]
    plain = dw.load_adapter(dw.load_model(place / family, device="cpu", dtype="float32"), tmp_path / "out")
    ids = torch.arange(5, 17).view(2, 6)
    given = {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if family == "t5" else {})
    assert torch.equal(logits(plain, **given), logits(model, **given))


def test_for_vllm(place, tmp_path):
    model, ranks = adapter(place, tmp_path / "a", "llama")
    done = export_into(tmp_path / "out", to="vllm", adapter=str(tmp_path / "a"), model=str(place / "llama"))
    assert (done["r"], done["sites"]) == (4, sum(map(bool, ranks))) and done["padded"] == sum(0 < r < 4 for r in ranks)
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA" and fields["r"] == 4 and not fields["rank_pattern"]
    assert not fields["alpha_pattern"]
    served = dw.load_adapter(dw.load_model(place / "llama", device="cpu", dtype="float32"), tmp_path / "out")
    torch.testing.assert_close(logits(served), logits(model), rtol=1e-5, atol=1e-5)
    adapter(place, tmp_path / "b", "llama", modules_to_save=["norm"])
    with pytest.raises(InputError, match=r"it has modules_to_save=\['model\.norm'\]; .*: use --to hf"):
        export_into(tmp_path / "no", to="vllm", adapter=str(tmp_path / "b"), model=str(place / "llama"))


def test_merged(place, tmp_path):
    export_into(tmp_path / "out", to="hf", run=str(place / "language"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    own = dw.load_adapter(dw.load_model(place / "llama", device="cpu", dtype="float32"), place / "language")
    torch.testing.assert_close(logits(plain), logits(own), rtol=1e-4, atol=1e-5)
    done = export_into(tmp_path / "bnb", to="bnb", run=str(place / "language"))
    assert done["layers"] and all(torch.isfinite(torch.tensor(list(e.values()))).all() for e in done["layers"].values())


def test_what_is_no_lora(place, tmp_path):
    model = dw.load_model(place / "llama", device="cpu", dtype="float32")
    dw.save_adapter(dw.adapt(model, dw.DoRA(r=2)), tmp_path / "dora")
    with pytest.raises(InputError, match="is dora, whose update is no plain product"):
        export_into(tmp_path / "out", to="lora", adapter=str(tmp_path / "dora"), model=str(place / "llama"))
    assert not (tmp_path / "out").exists()
    full = {key: value for key, value in KEYS.items() if not key.endswith("_r")} | {"method": "full", "max_steps": 1}
    train(model=str(place / "llama"), data=str(place / "rows.jsonl"), output=str(tmp_path / "full"), **full)
    with pytest.raises(InputError, match="trained the whole model: there is no adapter to write as LoRA"):
        export_into(tmp_path / "out", to="lora", run=str(tmp_path / "full"))


def test_the_command(place, tmp_path, capsys):
    from deltaw.cli.main import main

    assert main(["export", str(place / "language"), "--to", "lora", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "Rank" in shown and "(adalora)" in shown and str(tmp_path / "out") in shown
