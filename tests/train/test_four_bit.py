"""Training on 4-bit bases, with states in host memory and with the merge in mind: the same promises as ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small_runs
import torch
from safetensors.torch import load_file
from test_distributed import assert_same_run, torchrun

import deltaw as dw
from deltaw.core.errors import InputError
from deltaw.quant import NF4Tensor, quantized_sites
from deltaw.studies.job import resume
from deltaw.studies.job import run_training as train
from deltaw.train.config import TrainConfig, make_config, read_config
from deltaw.train.trainer import DeltawTrainer

# 24 rows, so 3 steps an epoch and 12 in all.
KEYS = {
    "method": "qlora", "r": 2, "dropout": 0.0, "epochs": 4, "batch_size": 8, "micro_batch_size": 4,
    "learning_rate": 1e-2, "log_every": 1, "eval_every": 6, "save_every": 3, "dtype": "float32", "device": "cpu",
    "max_length": 48, "baselines": False, "evaluate_before": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four-bit")
    small_runs.make_model(folder / "llama", "llama", dropout=0.1, std=0.2)
    small_runs.make_model(folder / "gpt2", "gpt2", std=0.2)
    small_runs.write_rows(folder / "rows.jsonl", small_runs.rows_of("label", 24))
    small_runs.write_rows(folder / "eval.jsonl", small_runs.rows_of("label", 6, seed=1))
    return folder


def keys_for(place, output, **changes):
    data = {"data": str(place / "rows.jsonl"), "eval_data": str(place / "eval.jsonl")}
    keys = KEYS | {"model": str(place / "llama"), "output": str(output)} | data | changes
    return {key: value for key, value in keys.items() if value is not None}


@pytest.fixture(scope="module")
def whole(place):
    return train(**keys_for(place, place / "whole"))


def losses(run):
    return [line["loss"] for line in small_runs.logged(run) if "loss" in line]


def trained(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")


class Stopped(BaseException):
    """Stands for the death of the process."""


def stopped_and_resumed(monkeypatch, keys, step):
    """The folder of a run that died before a step and was resumed."""
    own = DeltawTrainer.training_step

    def stopping(self, *args, **kwargs):
        if self.state.global_step == step:
            # What a kill would leave: here the run still gets to write down how it ended.
            assert ("optimizer_backend" in small_runs.record(Path(keys["output"]))) == ("optimizer" in keys)
            raise Stopped
        return own(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(DeltawTrainer, "training_step", stopping)
        with pytest.raises(Stopped):
            train(**keys)
    lines = []
    resume(keys["output"], say=lines.append)
    assert any("resuming from step" in line for line in lines)
    return Path(keys["output"])


@pytest.fixture
def models(monkeypatch):
    """Every model that is trained, with its weights' codes before and after."""
    seen, own = [], DeltawTrainer.train

    def tensors(model):
        return {path: {k: t.clone() for k, t in w.packed.tensors().items()} for path, _, w in quantized_sites(model)}

    def watching(self, *args, **kwargs):
        entry = {"model": self.model, "before": tensors(self.model)}
        entry["dense"] = {k: p.clone() for k, p in self.model.named_parameters() if not isinstance(p, NF4Tensor)}
        found = own(self, *args, **kwargs)
        seen.append(entry | {"after": tensors(self.model)})
        return found

    monkeypatch.setattr(DeltawTrainer, "train", watching)
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_learns_and_leaves_the_base_alone(place, tmp_path, models, family):
    run = train(**keys_for(place, tmp_path / "run", model=str(place / family)))
    curve = losses(run)
    assert len(curve) == 12 and sum(curve[-3:]) < 0.8 * sum(curve[:3])
    (entry,) = models
    assert len(entry["before"]) == (14 if family == "llama" else 8)
    assert entry["before"].keys() == entry["after"].keys()
    for path, before in entry["before"].items():
        assert all(torch.equal(tensor, entry["after"][path][name]) for name, tensor in before.items()), path
    moved = {k for k, p in entry["dense"].items() if not torch.equal(p, entry["model"].get_parameter(k))}
    assert moved == set(dw.adapter_parameters(entry["model"], "default"))
    # The run says what it was, and its adapter loads on the same base.
    keys = read_config(run / "config.yaml")
    assert (keys.method, keys.quantize, keys.double_quant) == ("lora", "nf4", True)
    model = dw.load_model(place / family, dtype="float32", device="cpu", quantize=keys.quantization)
    dw.load_adapter(model, run / "adapter", name="again")
    assert dw.summary(model).base_bytes < entry["model"].get_input_embeddings().weight.numel() * 16


def test_the_codes_scales_make_a_difference(place, tmp_path, whole):
    """Else the tests below could pass on a 16-bit base."""
    for changes in ({"double_quant": False}, {"method": "lora"}):
        other = train(**keys_for(place, tmp_path / str(len(changes) + changes.get("double_quant", 7)), **changes))
        assert losses(other)[0] == pytest.approx(losses(whole)[0], rel=0.1) and losses(other) != losses(whole)


def test_the_shorthand_is_the_run_written_out(place, tmp_path, whole):
    written = train(**keys_for(place, tmp_path / "run", method="lora", quantize="nf4"))
    assert small_runs.outcome(written) == small_runs.outcome(whole)


def test_stopped_and_resumed(place, whole, tmp_path, monkeypatch):
    for step, checkpointing in ((5, False), (8, True)):
        keys = keys_for(place, tmp_path / str(step), gradient_checkpointing=checkpointing)
        assert small_runs.outcome(stopped_and_resumed(monkeypatch, keys, step)) == small_runs.outcome(whole)


def test_how_a_step_is_cut_changes_nothing(place, tmp_path, whole):
    for micro in (8, 2):
        run = train(**keys_for(place, tmp_path / str(micro), micro_batch_size=micro))
        for line, other in zip(small_runs.logged(run), small_runs.logged(whole), strict=True):
            assert line == pytest.approx(other, rel=1e-3)
        assert_close(run, whole, rtol=1e-3)


def assert_close(run, other, *, rtol):
    mine, theirs = trained(run), trained(other)
    assert mine.keys() == theirs.keys()
    for key in theirs:
        # Adam divides by the gradient's own size: where that is rounding, the update is as well.
        torch.testing.assert_close(mine[key], theirs[key], rtol=rtol, atol=KEYS["learning_rate"] * 1e-2, msg=key)


# Optimizers with states in host memory.


def test_paged_adamw_is_adamw(place, tmp_path, whole, monkeypatch):
    keys = keys_for(place, tmp_path / "run", optimizer="paged_adamw", weight_decay=0.1)
    run = train(**keys)
    plain = train(**keys_for(place, tmp_path / "plain", weight_decay=0.1))
    assert_close(run, plain, rtol=1e-4)
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5) and losses(plain) != losses(whole)
    assert small_runs.record(run)["optimizer_backend"] == "own"
    again = stopped_and_resumed(monkeypatch, keys | {"output": str(tmp_path / "again")}, 7)
    assert small_runs.outcome(again) == small_runs.outcome(run)


def test_paged_adamw_in_8_bits_learns_and_resumes(place, tmp_path, whole, monkeypatch):
    keys = keys_for(place, tmp_path / "run", optimizer="paged_adamw_8bit")
    run = train(**keys)
    assert sum(losses(run)[-3:]) < 0.8 * sum(losses(run)[:3]) and losses(run)[0] == losses(whole)[0]
    assert losses(run) == pytest.approx(losses(whole), rel=0.2)
    again = stopped_and_resumed(monkeypatch, keys | {"output": str(tmp_path / "again")}, 7)
    assert small_runs.outcome(again) == small_runs.outcome(run)


# With the merge in mind.


def test_the_last_phase_trains_the_loss_of_the_merged_model(place, tmp_path, monkeypatch):
    """Models so small do not reliably keep more by it when they are merged, so that is not asked here."""
    compared, own = [], DeltawTrainer.training_step

    def watching(self, model, inputs, num_items_in_batch=None):
        dw.merge(model.train(), mode="requantize")
        with torch.no_grad():
            merged = float(self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch))
        dw.unmerge(model)
        loss = own(self, model, inputs, num_items_in_batch)
        compared.append((self.state.global_step, float(loss), merged))
        return loss

    keys = {"merge_aware": 0.5, "target_modules": "all-linear"}
    with monkeypatch.context() as patched:
        patched.setattr(DeltawTrainer, "training_step", watching)
        run = train(**keys_for(place, tmp_path / "run", **keys))
    assert {step for step, _, _ in compared} == set(range(12))
    for step, loss, merged in compared:
        if step >= 6:
            assert loss == pytest.approx(merged, rel=1e-5), step
        elif step > 2:
            assert loss != pytest.approx(merged, rel=1e-5), step
    assert sum(losses(run)[-3:]) < 0.9 * sum(losses(run)[:3])
    again = stopped_and_resumed(monkeypatch, keys_for(place, tmp_path / "again", **keys), 8)
    assert small_runs.outcome(again) == small_runs.outcome(run)
    # The phase is over with the run, and the adapter is a plain one.
    plain = train(**keys_for(place, tmp_path / "plain", target_modules="all-linear"))
    assert losses(plain)[:6] == losses(run)[:6] and losses(plain)[6:] != losses(run)[6:]
    assert {key: t.shape for key, t in trained(run).items()} == {key: t.shape for key, t in trained(plain).items()}


# Processes.


@pytest.mark.slow
def test_two_processes_are_one(place, tmp_path, whole):
    changes = {"optimizer": "paged_adamw", "merge_aware": 0.5}
    jobs = [
        {"keys": keys_for(place, tmp_path / "two")},
        {"keys": keys_for(place, tmp_path / "two-paged", **changes)},
    ]
    first, second = torchrun(tmp_path, jobs)
    assert not any("error" in job for job in first + second), json.dumps(first + second)
    assert_same_run(tmp_path / "two", whole, tolerance=1e-3)
    one = train(**keys_for(place, tmp_path / "one-paged", **changes))
    # A rounding of another sum can fall on the other side of a code's edge.
    assert losses(tmp_path / "two-paged") == pytest.approx(losses(one), rel=0.05)


# Refused.


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"method": "full", "quantize": "nf4"}, "method full trains the base itself, which 4 bits freeze"),
        ({"method": "qlora", "quantize": "none"}, "method qlora means quantize 'nf4', and quantize is 'none'"),
        ({"method": "rslora", "rslora": False}, "method rslora means rslora True, and rslora is False"),
        ({"optimizer": "paged_adamw", "sharding": "fsdp2"}, "does not go with a paged optimizer yet"),
        ({"optimizer": "paged_adam"}, "unknown optimizer 'paged_adam'.*paged_adamw"),
        ({"quantize": "int4"}, "unknown quantize 'int4'"),
        ({"method": "qlra"}, "unknown method 'qlra'.*qlora"),
        ({"method": "qlora", "merge_aware": 1.5}, r"merge_aware is 1.5: expected a share in \[0, 1\]"),
        ({"method": "qlora", "double_quant": "yes"}, "double_quant is 'yes': expected true or false"),
    ],
    ids=str,
)
def test_configurations_that_contradict_themselves(keys, said):
    with pytest.raises(InputError, match=said) as caught:
        make_config(keys)
    assert "\n" not in str(caught.value)


def test_shorthands_stand_for_what_they_say():
    qlora, rslora = make_config({"method": "qlora", "r": 4}), make_config({"method": "rslora", "quantize": "nf4"})
    assert (qlora.method, qlora.quantize, qlora.method_config.r) == ("lora", "nf4", 4)
    assert (rslora.method, rslora.quantize, rslora.method_config.rslora) == ("lora", "nf4", True)
    assert qlora.quantization == dw.NF4() and TrainConfig().quantization is None
    assert make_config({"method": "qlora", "double_quant": False}).quantization == dw.NF4(double_quant=False)
    assert make_config({"method": "qlora", "quantize": "nf4"}) == make_config({"method": "qlora"})


def test_merging_in_mind_needs_four_bits(place, tmp_path):
    with pytest.raises(InputError, match="merge_aware trains through 4-bit weights, and the base has none"):
        train(**keys_for(place, tmp_path / "run", method="lora", merge_aware=0.5))
