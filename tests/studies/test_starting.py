"""Runs whose adapters start from the base, from what quantising lost, or from training rows."""

from __future__ import annotations

import json
import math

import pytest
import small_runs
import torch
from safetensors.torch import load_file

import deltaw as dw
from deltaw.checkpoint import load_model
from deltaw.cli.main import main
from deltaw.core.errors import InputError
from deltaw.models.sites import SiteWeight, base_modules, kind_of
from deltaw.quant import NF4, quantized_sites
from deltaw.studies.job import resume
from deltaw.studies.job import run_training as train
from deltaw.studies.starting import original_weights, starting_points
from deltaw.train.config import make_config
from deltaw.train.trainer import DeltawTrainer

KEYS = {
    "r": 3, "epochs": 2, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 5e-3, "log_every": 1,
    "save_every": 2, "keep_checkpoints": 1, "held_out": 0, "dtype": "float32", "device": "cpu", "max_length": 48,
    "eval_batch_size": 4, "baselines": False, "evaluate_before": False, "max_steps": 3,
}  # fmt: skip
STARTS = {
    "olora in 4 bits": ("llama", {"init": "olora", "quantize": "nf4"}),
    "pissa by iteration, classes": (
        "bert", {"init": "pissa_niter_2", "rslora": True, "task": "sequence-classification"},
    ),
    "eva": ("llama", {"init": "eva", "dropout": 0.1}),
    "eva, encoder-decoder": ("t5", {"init": "eva", "target_modules": "attention"}),
    "loftq": ("gpt2", {"init": "loftq", "quantize": "nf4"}),
    "lora-fa": ("llama", {"freeze_a": True, "loraplus_lr_ratio": 4}),
    "dora": ("llama", {"method": "dora", "init": "pissa"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starting")
    for family in ("llama", "gpt2", "bert", "t5"):
        small_runs.make_model(folder / family, family, layers=1 if family in ("gpt2", "bert") else 2, std=0.15)
    small_runs.write_rows(folder / "label.jsonl", small_runs.rows_of("label", 16))
    return folder


def keys_for(place, output, family, **changes):
    given = {"model": str(place / family), "data": str(place / "label.jsonl"), "output": str(output)}
    return KEYS | given | changes


@pytest.fixture(scope="module")
def whole(place):
    """The run of a start, made once."""

    def made(name):
        folder, (family, changes) = place / "whole" / name, STARTS[name]
        if not folder.exists():
            train(**keys_for(place, folder, family, **changes))
        return folder

    return made


@pytest.mark.parametrize("name", STARTS)
def test_a_run_ends_where_an_interrupted_and_resumed_one_does(place, whole, tmp_path, name, monkeypatch):
    family, changes = STARTS[name]
    expected = small_runs.outcome(whole(name))

    def dying(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return own(self, *args, **kwargs)

    own = DeltawTrainer.training_step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DeltawTrainer, "training_step", dying)
        train(**keys_for(place, tmp_path / "broken", family, **changes))
    assert [p.name for p in (tmp_path / "broken" / "checkpoints").iterdir()] == ["checkpoint-2"]
    resume(tmp_path / "broken")
    assert small_runs.outcome(tmp_path / "broken") == expected


@pytest.mark.parametrize("name", ["eva", "olora in 4 bits", "lora-fa", "dora"])
def test_what_a_run_leaves_is_a_plain_adapter_that_can_be_trained_on(place, whole, tmp_path, name):
    run, (family, changes) = whole(name), STARTS[name]
    record = small_runs.record(run)
    sites = {site["name"]: site for site in record["method"]["sites"]}
    init = changes.get("init", "default")
    assert record["method"]["config"]["init"] == init
    assert all(site.get("init", "default") == init for site in sites.values())
    state = load_file(run / "adapter" / "adapter_model.safetensors")
    saved = sum(tensor.nbytes for tensor in state.values())
    assert record["method"]["adapter_bytes"] == record["cost"]["adapter_bytes"] == saved
    twice = 2 if init in ("pissa", "olora") else 1
    ranks = {key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(A) for key, A in state.items()}
    assert {name: twice * site["r"] for name, site in sites.items()} == {n: r for n, r in ranks.items() if n in sites}
    fields = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert fields["init_lora_weights"] is True
    if init == "eva":
        assert sum(ranks[name] for name in sites) == 3 * 14 and len(set(ranks[name] for name in sites)) > 1
        assert {sites[name]["scale"] for name in sites} == {2.0}
    else:
        assert (fields["r"], fields["lora_alpha"], fields["rank_pattern"]) == (3 * twice, 6 * twice, {})
    again = keys_for(place, tmp_path / "on", family, **changes, adapter=str(run), max_steps=2)
    if init != "default":
        with pytest.raises(InputError, match=f"init {init} is of new adapters, and .* has its values: leave init out"):
            train(**again)
        del again["init"]
    train(**again)
    on = small_runs.record(tmp_path / "on")["method"]
    assert {site["name"]: site["r"] for site in on["sites"]} == {n: ranks[n] for n in sites}
    # What the file does not say is as the run says it.
    frozen = {key: t for key, t in state.items() if changes.get("freeze_a") and ".lora_A." in key}
    assert on["trainable_parameters"] == sum(t.numel() for t in state.values()) - sum(map(torch.numel, frozen.values()))
    assert on["config"]["loraplus_lr_ratio"] == changes.get("loraplus_lr_ratio", 1)
    moved = load_file(tmp_path / "on" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(moved[key], t) == (key in frozen) for key, t in state.items())
    other = {"method": "lora" if changes.get("method") == "dora" else "dora"}
    with pytest.raises(InputError, match=r"is of method (lora|dora), and method is (lora|dora): give method"):
        train(**again | other | {"output": str(tmp_path / "other")})
    assert not (tmp_path / "other").exists()


def test_eva_looks_at_the_first_training_rows(place, tmp_path):
    config = make_config(keys_for(place, tmp_path / "run", "llama", init="eva"))
    model = load_model(config.model, dtype="float32", device="cpu")
    seen = []

    class Collator:
        def __call__(self, rows):
            seen.append([row["input_ids"][0] for row in rows])
            return {"input_ids": torch.ones(1, 1, dtype=torch.long), "labels": torch.ones(1, 1)}

    examples = [{"input_ids": [i]} for i in range(99)]
    (batches,) = starting_points(config, model, examples, Collator()).values()
    assert seen == [[i, i + 1] for i in range(0, 16, 2)]
    assert len(batches) == 8 and all(set(batch) == {"input_ids"} for batch in batches)
    assert starting_points(make_config(keys_for(place, tmp_path, "llama")), model, examples, Collator()) == {}
    assert starting_points(make_config(keys_for(place, tmp_path, "llama", adapter="x")), model, [], Collator()) == {}
    for init, says in (("pissa", "init pissa does not go with sharding fsdp2"), ("olora", "init olora")):
        sharded = make_config(keys_for(place, tmp_path, "llama", init=init, sharding="fsdp2"))
        with pytest.raises(InputError, match=says):
            starting_points(sharded, model, examples, Collator())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("shards", [False, True])
def test_original_weights_are_those_of_the_folder(place, tmp_path, family, shards):
    source = str(place / family)
    task = "sequence-classification" if family == "bert" else "causal-lm"
    options = {"task": task, "dtype": "float32", "device": "cpu", "labels": ["a", "b"]}
    plain = load_model(source, **options)
    if shards:
        source = str(tmp_path / "shards")
        load_model(place / family, dtype="float32", device="cpu", task="masked-lm" if family == "bert" else "causal-lm"
                   ).save_pretrained(source, max_shard_size="20KB")  # fmt: skip
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model = load_model(source, quantize=NF4(), **options)
    read = original_weights(source, model)
    checked = 0
    for path, _, _ in quantized_sites(model):
        module = dict(base_modules(plain))[path]
        assert torch.equal(read(path), SiteWeight(module, kind_of(module)).dequantize()), path
        checked += 1
    assert checked >= (4 if family in ("gpt2", "bert") else 8)
    model.set_submodule("made_up", torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"init loftq: .* stores made_up.weight under another name"):
        read("made_up")


def test_a_folder_in_4_bits_has_no_original(place, tmp_path):
    model = load_model(str(place / "llama"), dtype="float32", device="cpu", quantize=NF4())
    dw.save_model(model, tmp_path / "small")
    with pytest.raises(InputError, match="in 4 bits already: give the 16-bit model"):
        original_weights(str(tmp_path / "small"), model)("model.layers.0.self_attn.q_proj")
    with pytest.raises(InputError, match="the base is not in 4 bits: quantize it to nf4"):
        train(**keys_for(place, tmp_path / "run", "llama", init="loftq"))
    assert not (tmp_path / "run").exists()


def test_ranks_and_alphas_by_layer_from_a_file_and_from_flags(place, tmp_path, capfd):
    (tmp_path / "run.yaml").write_text(
        f"model: {place / 'llama'}\ndata: {place / 'label.jsonl'}\nr: 4\nalpha: 8\n"
        "rank_pattern: {down_proj: 2, 'layers.0.self_attn.q_proj': 1}\n"
        "alpha_pattern: {'layers\\.1\\..*': 3.5, up_proj: 0.2}\n"
    )
    quick = ["--max-steps", "1", "--batch-size", "2", "--micro-batch-size", "2", "--device", "cpu", "--held-out", "0"]
    flags = ["--rank-pattern", "down_proj=2,layers.0.self_attn.q_proj=1", "--r", "4", "--alpha", "8"]
    flags += ["--alpha-pattern", r"layers\.1\..*=3.5", "--alpha-pattern", "up_proj=0.2"]
    given = ["--model", str(place / "llama"), "--data", str(place / "label.jsonl"), *flags]
    for rslora, words in ((False, ["--config", str(tmp_path / "run.yaml")]), (True, [*given, "--rslora"])):
        output = tmp_path / str(rslora)
        code = main(["train", *words, *quick, "--output", str(output)])
        assert code == 0, capfd.readouterr().err
        found = {site["name"]: site for site in small_runs.record(output)["method"]["sites"]}
        assert len(found) == 14
        for name, site in found.items():
            r = 2 if "down_proj" in name else 1 if name.endswith("0.self_attn.q_proj") else 4
            # Of several patterns that fit, the first one counts.
            alpha = 3.5 if ".layers.1." in name else 0.2 if "up_proj" in name else 8
            assert site["r"] == r
            assert site["scale"] == pytest.approx(alpha / (math.sqrt(r) if rslora else r), rel=1e-12), name
        loaded = dw.load_adapter(load_model(str(place / "llama"), device="cpu"), output / "adapter")
        kept = {site.name: site.details for site in dw.summary(loaded).sites}
        assert all(kept[name]["r"] == site["r"] for name, site in found.items())
        assert all(kept[name]["scale"] == pytest.approx(site["scale"], rel=1e-12) for name, site in found.items())
