"""The benchmark that holds fused layers' losses against the general path's, on a random model."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import small_runs
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = ["--model", "tiny", "--device", "cpu", "--length", "32", "--batch", "4", "--held", "6", "--seeds", "3"]
PLACES = ("Lima", "Oslo", "Rome", "Bern", "Quito")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import fast_quality

    yield fast_quality
    for name in ("fast_quality", "fast_runs"):
        sys.modules.pop(name)


@pytest.fixture
def runs(benchmark):
    return sys.modules["fast_runs"]


@pytest.fixture
def in_process(benchmark, monkeypatch):
    # A process for each run takes seconds, and is tried by itself below.
    monkeypatch.setattr(benchmark, "ask", benchmark.worker)


@pytest.fixture
def text(tmp_path):
    rows = [{"prompt": f"Where is house {i}?", "completion": f"In {PLACES[i % 5]}, street {i * i}."} for i in range(40)]
    return small_runs.write_rows(tmp_path / "rows.jsonl", rows)


def measured(benchmark, tmp_path, *given):
    out = tmp_path / "record.json"
    benchmark.main([*TINY, "--out", str(out), *given])
    return json.loads(out.read_text())


def save_rows(benchmark, text, args):
    train, held = benchmark.token_rows(benchmark.read_texts(text), args)
    torch.save({"train": torch.tensor(train), "held": torch.tensor(held)}, args.rows)


def test_curves_are_held_against_what_rounding_does(benchmark, in_process, text, tmp_path, capsys):
    given = ["curves", "--data", text, "--methods", "lora", "dora", "--steps", "10", "--learning-rate", "1e-2"]
    record = measured(benchmark, tmp_path, *given)
    runs = {cell["name"]: cell for cell in record["cells"]}
    ways = ["general", "general-rounding", "general-float32", "general-float32-rounding", "fused", "fused-float32"]
    assert list(runs) == [*(f"lora-{way}" for way in [*ways, "fused-input"]), *(f"dora-{way}" for way in ways)]
    rows = {row["name"]: row for row in record["curves"]}
    assert set(rows) == set(runs) - {"lora-general", "dora-general"}
    for name, run in runs.items():
        assert ("2 of 2 layers fused" in run["said"]) == ("fused" in name)
        assert len(run["losses"]) == 10 and run["keys"]["seed"] == 3
        # It learns, so that a wrong gradient would show.
        assert run["after"] < run["before"] - 0.5
    for name, row in rows.items():
        against = runs[runs[name]["against"]]
        apart = torch.tensor(runs[name]["losses"]).double() - torch.tensor(against["losses"]).double()
        wanted = [apart.abs().mean(), apart.abs().max(), apart.mean(), runs[name]["after"] - against["after"]]
        torch.testing.assert_close(
            torch.tensor([*row["distance"].values()], dtype=torch.float64),
            torch.tensor(wanted, dtype=torch.float64),
            rtol=1e-4,
            atol=1e-9,
        )
    for method in ("lora", "dora"):
        assert rows[f"{method}-fused-float32"]["distance"]["largest"] < 2e-5
        assert rows[f"{method}-fused-float32"]["coincides"] and rows[f"{method}-fused-float32"]["parted"] == 11
        yardstick = max(rows[f"{method}-general-{way}"]["distance"]["mean"] for way in ("rounding", "float32"))
        row = rows[f"{method}-fused"]
        assert row["of_yardstick"]["mean"] == pytest.approx(row["distance"]["mean"] / yardstick)
    printed = capsys.readouterr().out
    assert "| lora-fused-float32 | lora-general-float32 |" in printed and "; at no step | yes |" in printed

    # The same with an update scaled by one part in eight more does not coincide.
    args = benchmark.arguments().parse_args([*TINY, "--learning-rate", "1e-2", "--rows", str(tmp_path / "rows.pt")])
    save_rows(benchmark, text, args)
    cells = record["cells"][:6]
    for cell in cells[4:]:
        cell |= benchmark.worker({**cell, "keys": cell["keys"] | {"alpha": 36}}, args)
        assert "error" not in cell
    assert [row["coincides"] for row in benchmark.of_curves(cells) if "coincides" in row] == [False, False]


def test_gradients_are_held_against_those_of_float64(benchmark, in_process, text, tmp_path, capsys, monkeypatch):
    from deltaw.fuse import decoder

    given = ["gradients", "--data", text, "--methods", "lora", "qlora", "--steps", "4"]
    record = measured(benchmark, tmp_path, *given)
    for cell in record["cells"]:
        assert cell["said"] == ["2 of 2 layers fused"] and [one["step"] for one in cell["compared"]] == [1, 2, 3, 4]
        assert cell["compared"][3]["loss"] < cell["compared"][0]["loss"]
    for row in record["gradients"]:
        assert row["alike"] and row["losses_apart"] < 2e-6
        # Neither is the other.
        assert all(0 < row[name]["median"] <= row[name]["largest"] < 1e-5 for name in ("general", "fused", "apart"))
    assert "| lora-gradients | " in capsys.readouterr().out
    # A factor of one part in a thousand in one projection.
    install, uninstall, hooks = decoder.install_blocks, decoder.uninstall_blocks, []

    def wrong(model):
        down = model.model.layers[0].mlp.down_proj
        hooks.extend(p.register_hook(lambda grad: grad * 1.001) for p in down.parameters() if p.requires_grad)
        return install(model)

    def right(model):
        while hooks:
            hooks.pop().remove()
        return uninstall(model)

    monkeypatch.setattr(decoder, "install_blocks", wrong)
    monkeypatch.setattr(decoder, "uninstall_blocks", right)
    args = benchmark.arguments().parse_args([*TINY, "--rows", str(tmp_path / "rows.pt")])
    save_rows(benchmark, text, args)
    found = benchmark.worker(record["cells"][0] | {"steps": 1}, args)
    (row,) = benchmark.of_gradients([record["cells"][0] | found])
    assert row["fused"]["median"] > 1e-5 and not row["alike"]


def test_losses_with_8_bit_products_are_over_those_of_bfloat16(benchmark, runs, in_process, text, tmp_path, capsys):
    record = measured(benchmark, tmp_path, "fp8", "--data", text, "--steps", "3", "--methods", "lora")
    cells = record["cells"]
    assert [cell["keys"]["fp8"] for cell in cells] == ["none", "backward", "most", "all"]
    assert ["2 of 2 layers fused" in cell["said"] for cell in cells] == [False, True, True, True]
    model = runs.tiny_model(32)
    _, held = benchmark.token_rows(benchmark.read_texts(text), benchmark.arguments().parse_args(TINY))
    with torch.no_grad():
        ids = torch.tensor(held)
        wanted = float(model(input_ids=ids, labels=ids).loss)
    assert len({cell["after"] for cell in cells}) == 4
    for cell, row in zip(cells, record["fp8"], strict=True):
        assert cell["before"] == pytest.approx(wanted, rel=1e-4)
        assert row["ratio"] == cell["after"] / cells[0]["after"]
        assert 0.99 < row["ratio"] < 1.01
    assert "lora fp8 all: mean " in capsys.readouterr().out
    assert ", within 0.5%" in benchmark.told_fp8(cells)
    worse = [*cells[:3], {**cells[3], "after": cells[0]["after"] * 1.006}]
    assert "lora fp8 all: mean 1.00600, largest 1.00600, NOT within 0.5%" in benchmark.told_fp8(worse)


def test_rows_hold_every_text_once_and_held_out_ones_are_others(benchmark, runs, text, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    Path(text).rename(folder / "a.jsonl")
    (folder / "b.txt").write_text("One part.\n\nAnother\nof two lines.\n\n\nOne part.\n")
    small_runs.write_rows(folder / "c.jsonl", [{"text": "One part."}, {"text": "Seen here alone."}])
    (folder / "notes.md").write_text("No text to train on.")
    texts = benchmark.read_texts(str(folder))
    assert texts[0] == "Where is house 0? In Lima, street 0."
    assert texts[40:] == ["One part.", "Another\nof two lines.", "Seen here alone."]
    benchmark.main(["--prepare", str(tmp_path / "one.jsonl"), "--data", str(folder)])
    assert benchmark.read_texts(str(tmp_path / "one.jsonl")) == texts
    args = benchmark.arguments().parse_args(TINY)
    train, held = benchmark.token_rows(texts, args)
    assert len(held) == 6 and {len(row) for row in train + held} == {32}
    found = "".join(chr(token) for row in train + held for token in row).split(chr(runs.END))
    # Cut off at the end is less than a row.
    assert set(found[:-1]) <= set(texts) and len(found) == len(set(found)) >= len(texts) - 1
    assert (train, held) == benchmark.token_rows(texts, args)


def test_what_cannot_be_is_one_line(benchmark, text, tmp_path, monkeypatch, capsys):
    few = small_runs.write_rows(tmp_path / "few.jsonl", [{"text": "A few words."}])
    for data, said in ((few, "error: the text has 0 rows of 32 tokens"), (str(tmp_path / "no.txt"), "no such file")):
        with pytest.raises(SystemExit, match=said):
            benchmark.main([*TINY, "--data", data])
    for wrong, said in ((["speed"], "unknown study 'speed'"), (["--steps", "-1"], "--batch is an even number")):
        with pytest.raises(SystemExit):
            benchmark.main([*wrong, *TINY])
        assert said in capsys.readouterr().err
    # A run that fails is a line; the others go on.
    ran = {"losses": [1.0], "before": 1.0, "after": 1.0, "tokens_per_s": 1, "peak_memory_bytes": 1, "said": []}
    monkeypatch.setattr(benchmark, "ask", lambda cell, args: {"error": "no"} if cell["name"] == "lora-general" else ran)
    with pytest.raises(SystemExit, match=r"1 of 7 runs failed: lora-general$"):
        benchmark.main(["curves", *TINY, "--methods", "lora", "--data", text])
    assert "lora-general: no" in capsys.readouterr().out


def test_the_library_has_enough_text_for_everybody(benchmark):
    texts = benchmark.read_texts(None)
    assert sum(map(len, texts)) > 500_000 and len(set(texts)) == len(texts)


def test_a_run_has_a_process_and_a_time_limit(benchmark, text, tmp_path):
    given = [*TINY, "--steps", "1"]
    args = benchmark.arguments().parse_args(given)
    args.given, args.jobs, args.rows = given, 2, str(tmp_path / "rows.pt")
    save_rows(benchmark, text, args)
    cell = benchmark.curve_cells(argparse.Namespace(methods=["qlora"], seeds=[0], batch=4, device="cpu"))[4]
    found = benchmark.ask({**cell, "steps": 1}, args)
    assert "error" not in found and len(found["losses"]) == 1
    args.limit = 0.2
    assert benchmark.ask({**cell, "steps": 1}, args) == {"error": "not done after 0.2 s"}
    args.rows = str(tmp_path / "missing.pt")
    assert "missing.pt" in benchmark.worker({**cell, "steps": 1}, args)["error"]


def test_half_a_budget_keeps_half(runs, monkeypatch):
    from deltaw.fuse.keep import HEAD_BYTES, Room, choose, kept_bytes

    sizes = {"width": 576, "inner": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64, "itemsize": 2}
    config = argparse.Namespace(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=31, num_attention_heads=9, num_key_value_heads=3
    )
    trained = torch.nn.Parameter(torch.zeros(1000, 1000))
    model = argparse.Namespace(config=config, dtype=torch.bfloat16, parameters=lambda: [trained])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *device: 300_000_000)
    budget = runs.half_budget(model, 4096)
    # Once the loop has its copy of what is trained.
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *device: 304_000_000)
    room = Room(budget_bytes=budget, later_bytes=12_000_000, head_bytes=HEAD_BYTES)
    plan = choose(31, room.left(torch.device("cuda"), 0), lambda keep: kept_bytes(keep, 4096, **sizes))
    assert plan.count("all") == 15 and "attention" in plan and "input" in plan and "host" not in plan
