"""Shrinking adapters on a model and as folders, measuring it, and advice on ranks."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from command_line import tiny_model, write_rows

import deltaw as dw
from deltaw.checkpoint.adapters import adapter_state
from deltaw.core.errors import InputError
from deltaw.core.generators import generator
from deltaw.methods.host import book_of, parts_of
from deltaw.studies.job import run_training as train
from deltaw.studies.shrinking import parameter_count, rank_advice, rank_heuristics, shrink, shrink_adapter


def deltas(model, name="default"):
    found = {}
    for path, _, part in parts_of(model, name):
        if (low := part.low_rank()) is not None:
            found[path] = low.scale * low.B.detach().double() @ low.A.detach().double()
    return found


def nearest(X, r):
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    return U[:, :r] @ torch.diag(s[:r]) @ Vh[:r]


#: What has low-rank parts: (model, configuration).
CASES = {
    "linear": ("llama", dw.LoRA(r=4, alpha=6)),
    "rslora": ("qwen3", dw.LoRA(r=4, rslora=True, target_modules="attention")),
    "conv1d": ("gpt2", dw.LoRA(r=4)),
    "embeddings": ("llama-tied", dw.LoRA(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "patterns": ("llama", dw.LoRA(r=4, rank_pattern={"q_proj": 6, "down_proj": 1}, alpha_pattern={"k_proj": 3.0})),
    "biases": ("llama-bias", dw.LoRA(r=4, lora_bias=True, bias="lora_only")),
    "classifier": ("llama-seq", dw.LoRA(r=4, modules_to_save=["score"])),
    "tokens": ("llama", dw.LoRA(r=4, trainable_tokens=[4, 9])),
    "frozen-a": ("llama", dw.LoRA(r=4, freeze_a=True)),
    "pissa": ("llama", dw.LoRA(r=4, init="pissa", target_modules="mlp")),
    "dora": ("llama", dw.DoRA(r=4)),
    "adalora": ("llama", dw.AdaLoRA(init_r=6, target_r=2)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_site_becomes_the_nearest_of_its_rank(case, tmp_path):
    name, config = CASES[case]
    model = tiny.randomise(dw.adapt(tiny.tiny(name), config))
    before, base = deltas(model), tiny.base_state(model)
    others = {k: t for k, t in adapter_state(model, "default").items() if ".lora_A" not in k and ".lora_B.w" not in k}
    report = shrink(model, r=2)
    after = deltas(model)
    assert after.keys() == before.keys() == report.sites.keys()
    for path, X in before.items():
        expected = nearest(X, 2)
        torch.testing.assert_close(after[path], expected, rtol=0, atol=2e-6)
        assert report.sites[path].distance == pytest.approx(float((X - after[path]).norm()), rel=1e-4, abs=1e-6)
        assert report.sites[path].r == (1 if case == "patterns" and "down_proj" in path else 2)
    whole = torch.cat([(before[path] - after[path]).flatten() for path in before]).norm()
    norm = torch.cat([X.flatten() for X in before.values()]).norm()
    assert report.relative_error == pytest.approx(float(whole / norm), rel=1e-4) and report.relative_error > 0.01
    tiny.assert_same(tiny.base_state(model), base)
    if case != "adalora":
        left = adapter_state(model, "default")
        tiny.assert_same(
            {k: left[k] for k in others if "lora_embedding" not in k},
            {k: t for k, t in others.items() if "lora_embedding" not in k},
        )
    # Balanced, where the part holds plain factors of this rank.
    for path, _, part in parts_of(model, "default"):
        if part.low_rank() is not None and report.sites[path].r_before > report.sites[path].r:
            torch.testing.assert_close(part.lora_A @ part.lora_A.T, part.lora_B.T @ part.lora_B, atol=1e-5, rtol=0)
    # What is saved says what it is: the same logits after loading.
    dw.save_adapter(model, tmp_path / "a")
    again = dw.load_adapter(tiny.tiny(name), tmp_path / "a")
    assert torch.equal(tiny.logits(again, name), tiny.logits(model, name))


def test_shrinking_leaves_what_trains_and_what_is_frozen(tmp_path):
    model = tiny.randomise(dw.adapt(tiny.tiny("llama"), dw.LoRA(r=4, freeze_a=True)))
    shrink(model, r=2)
    assert all(key.endswith("lora_B") and p.requires_grad for key, p in dw.adapter_parameters(model, "default").items())
    assert len(dw.adapter_parameters(model, "default")) == 14
    loss = model(**tiny.inputs("llama"), labels=tiny.inputs("llama")["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in dw.adapter_parameters(model, "default").values())
    untrained = dw.load_adapter(tiny.tiny("llama"), dw.save_adapter(model, tmp_path / "a"), name="b")
    shrink(untrained, "b", r=1)
    assert not any(p.requires_grad for p in dw.adapter_parameters(untrained, "b").values())


def test_ranks_by_energy_differ_by_site():
    model = tiny.randomise(dw.adapt(tiny.tiny("llama"), dw.LoRA(r=4, target_modules="attention")))
    before = deltas(model)
    report = shrink(model, energy=0.9, rank_pattern={"0.self_attn.v_proj": 1})
    config = book_of(model).configs["default"]
    for path, X in before.items():
        shares = torch.linalg.svdvals(X).square().cumsum(0)
        needed = 1 if path.endswith("0.self_attn.v_proj") else int((shares < 0.9 * shares[-1]).sum()) + 1
        assert report.sites[path].r == needed == config.rank_of(path)
        assert config.scale_of(path) == pytest.approx(2.0)
    assert len({fit.r for fit in report.sites.values()}) > 1


def test_doras_magnitude_is_kept_and_its_norm_is_taken_anew():
    model = tiny.randomise(dw.adapt(tiny.tiny("llama"), dw.DoRA(r=4, target_modules=["q_proj"])))
    (path, module, part), *_ = parts_of(model, "default")
    magnitude = part.magnitude.detach().clone()
    shrink(model, r=1)
    assert torch.equal(part.magnitude, magnitude)
    V = module.weight.detach().double() + deltas(model)[path]
    expected = magnitude.double()[:, None] * V / V.norm(dim=1, keepdim=True)
    got = module.weight.detach().double() + part.delta().double()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "which rank\\? got neither of r .*: give one"),
        ({"r": 2, "energy": 0.9}, "which rank\\? got both of r"),
        ({"r": 0}, "r is 0: expected a whole number"),
        ({"energy": 1.5}, "energy is 1.5: expected the share"),
        ({"r": 2, "rank_pattern": {"nothing": 1}}, "pattern 'nothing' of rank_pattern names no site"),
        ({"r": 2, "rank_pattern": {"q_proj": 0}}, "rank_pattern is"),
        ({"name": "other", "r": 2}, "which adapter\\? got 'other', and the model has default"),
    ],
)
def test_refused(options, message):
    model = tiny.randomise(dw.adapt(tiny.tiny("llama"), dw.LoRA(r=4)))
    before = adapter_state(model, "default")
    with pytest.raises(InputError, match=message):
        shrink(model, options.pop("name", None), **options)
    tiny.assert_same(adapter_state(model, "default"), before)


def test_refused_models():
    merged = dw.merge(dw.adapt(tiny.tiny("llama"), dw.LoRA(r=4)))
    with pytest.raises(InputError, match="holds a merged adapter"):
        shrink(merged, r=2)
    with pytest.raises(InputError, match="is full, without low-rank updates"):
        shrink(dw.adapt(tiny.tiny("llama"), dw.Full()), r=2)


# Folders.


@pytest.mark.parametrize("case", [name for name in CASES if name != "adalora"])
def test_a_folder_is_shrunk_as_a_model_is(case, tmp_path):
    name, config = CASES[case]
    model = tiny.randomise(dw.adapt(tiny.tiny(name), config))
    dw.save_adapter(model, tmp_path / "before")
    done = shrink_adapter(tmp_path / "before", tmp_path / "after", r=2)
    report = shrink(model, r=2)
    assert done["relative_error"] == pytest.approx(report.relative_error, rel=1e-5)
    assert {path: site["r"] for path, site in done["sites"].items()} == {p: f.r for p, f in report.sites.items()}
    again = dw.load_adapter(tiny.tiny(name), tmp_path / "after", name="default")
    torch.testing.assert_close(tiny.logits(again, name), tiny.logits(model, name), atol=2e-5, rtol=1e-5)
    files = {name: (tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("before", "after")}
    assert (done["bytes_before"], done["bytes"]) == tuple(files.values()) and files["after"] < files["before"]
    assert done["parameters"] < done["parameters_before"] and done["method"] == ("dora" if case == "dora" else "lora")
    fields = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("before", "after")]
    changed = {key for key in fields[0] if fields[0][key] != fields[1][key]}
    assert changed <= {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    dw.save_adapter(tiny.randomise(dw.adapt(tiny.tiny("llama"), dw.LoRA(r=2))), tmp_path / "a")
    with pytest.raises(InputError, match="is not empty: choose a new folder"):
        shrink_adapter(tmp_path / "a", tmp_path / "a", r=1)
    with pytest.raises(InputError, match="energy is 0"):
        shrink_adapter(tmp_path / "a", tmp_path / "b", energy=0)
    assert not (tmp_path / "b").exists()
    with pytest.raises(InputError, match="is no run folder, so there are no held-out rows"):
        shrink_adapter(tmp_path / "a", tmp_path / "b", r=1, measure=True)


def test_measured_on_the_held_out_rows_of_the_run(tmp_path):
    tiny_model(tmp_path / "model")
    keys = dict(model=str(tmp_path / "model"), data=str(write_rows(tmp_path / "rows.jsonl")), device="cpu", r=4)
    keys |= dict(max_steps=4, batch_size=4, micro_batch_size=4, learning_rate=0.05, dtype="float32", baselines=False)
    train(output=str(tmp_path / "run"), **keys)
    recorded = json.loads((tmp_path / "run/run.json").read_text())["metrics"]["after"]
    said = []
    done = shrink_adapter(tmp_path / "run", tmp_path / "out", r=1, measure=True, say=said.append)
    assert done["metrics"]["before"]["loss"] == pytest.approx(recorded["loss"], rel=1e-5)
    assert done["metrics"]["after"]["loss"] != done["metrics"]["before"]["loss"]
    assert sum("held-out rows" in line for line in said) == 2
    same = shrink_adapter(tmp_path / "run/adapter", tmp_path / "same", r=4, measure=True)
    assert same["metrics"]["before"] == same["metrics"]["after"] and same["relative_error"] == 0


# Advice.


def test_advice_is_that_of_the_singular_values(tmp_path):
    model = dw.adapt(tiny.tiny("llama"), dw.LoRA(r=4, target_modules=["q_proj", "o_proj"]))
    values = {"q_proj": [4.0, 2.0, 1.0, 0.05], "o_proj": [1.0, 1.0, 0.01, 0.01]}
    for path, _, part in parts_of(model, "default"):
        s = torch.tensor(values[path.rsplit(".")[-1]], dtype=torch.float64)
        random = generator(0, path)
        U, V = (torch.linalg.qr(torch.randn(t, 4, generator=random).double())[0] for t in (16, 16))
        with torch.no_grad():
            part.lora_A.copy_(V.T / part.scale)
            part.lora_B.copy_(U * s)
    dw.save_adapter(model, tmp_path / "a")
    found = rank_advice(tmp_path / "a")
    q, o = (found["sites"][f"model.layers.0.self_attn.{name}"] for name in ("q_proj", "o_proj"))
    assert (q["r_needed"], o["r_needed"], found["r"]) == (3, 2, 4)
    assert q["energy_half"] == pytest.approx(20 / 21.0025, rel=1e-5) and q["energy_quarter"] == pytest.approx(
        16 / 21.0025, rel=1e-5
    )
    assert o["effective_rank"] == pytest.approx(2, rel=2e-3) and o["stable_rank"] == pytest.approx(2.0002, rel=1e-5)
    # All sites together: 2 x (17, 5, 1.0001, ...) of squares.
    assert found["r_recommended"] == 3 and not found["fills_rank"]
    assert found["energy_at_recommended"] == pytest.approx(23.0001 / 23.0027, rel=1e-5)
    assert (found["parameters"], found["parameters_at_recommended"]) == (4 * 4 * 32, 3 * 4 * 32)
    assert found["parameters_by_site"] == (3 + 2) * 2 * 32
    assert rank_advice(tmp_path / "a", energy=0.9)["r_recommended"] == 2
    done = shrink_adapter(tmp_path / "a", tmp_path / "b", energy=0.99)
    assert done["parameters"] == found["parameters_by_site"]
    full = dw.adapt(tiny.tiny("llama"), dw.LoRA(r=2, target_modules=["q_proj"]))
    for _, _, part in parts_of(full, "default"):
        with torch.no_grad():
            part.lora_B[:2] = torch.eye(2)
            part.lora_A.copy_(torch.eye(2, 16))
    dw.save_adapter(full, tmp_path / "full")
    assert rank_advice(tmp_path / "full")["fills_rank"]
    with pytest.raises(InputError, match="energy is 2"):
        rank_advice(tmp_path / "full", energy=2)


@pytest.mark.parametrize(
    ("billions", "task", "fits"),
    [
        (0.135, "light", [0]),
        (0.135, "instruct", [1]),
        (6.7, "light", [1]),
        (13, "instruct", [1]),
        (13, None, [1, 2]),
        (3, None, [0, 1, 2]),
        (34, "instruct", [2]),
        (70.6, "light", [2]),
        (1, "reasoning", [2]),
        (None, "light", [0, 1, 2]),
        (None, "reasoning", [2]),
        (None, None, [0, 1, 2]),
    ],
)
def test_guides_ranks(billions, task, fits):
    rows = rank_heuristics(parameters=None if billions is None else int(billions * 1e9), task=task)
    assert [(row["r_low"], row["r_high"]) for row in rows] == [(4, 8), (8, 16), (16, 64)]
    assert [place for place, row in enumerate(rows) if row["fits"]] == fits


def test_guides_know_their_tasks():
    with pytest.raises(InputError, match="unknown task 'instruction': did you mean 'instruct'"):
        rank_heuristics(task="instruction")


def test_parameters_are_counted_from_the_configuration(tmp_path):
    for kind in ("Llama", "Bert"):
        tiny_model(tmp_path / kind, kind=kind)
        (tmp_path / kind / "model.safetensors").write_bytes(b"no tensors are read")
    # 258 x 32 embeddings, and a head of its own.
    assert parameter_count(tmp_path / "Llama") == 2 * 258 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    with pytest.raises(InputError):
        parameter_count(tmp_path / "nothing")
