"""A comparison's file: cells, layers and axes, the bare cells beside them, and what is refused before anything runs."""

from __future__ import annotations

import json

import pytest
import small_runs
import yaml

from deltaw.core.errors import InputError
from deltaw.studies.compare_plan import plan_of, read_plan
from deltaw.train.config import make_config

COMMON = {"batch_size": 8, "max_length": 96, "dtype": "float32", "device": "cpu"}
LATENCY = {"prompt": 16, "tokens": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    small_runs.make_model(folder / "llama", "llama")
    small_runs.make_model(folder / "bert", "bert")
    for name, layout in (("a", "label"), ("b", "prompt"), ("tags", "tags"), ("text", "text")):
        small_runs.write_rows(folder / f"{name}-train.jsonl", small_runs.rows_of(layout, 30))
        small_runs.write_rows(folder / f"{name}-test.jsonl", small_runs.rows_of(layout, 10, seed=1))
    small_runs.write_rows(folder / "other.jsonl", [{"text": "aa", "label": "odd"}, {"text": "bb", "label": "even"}])
    return folder


def entry(name, **more):
    return {"data": f"{name}-train.jsonl", "test_data": f"{name}-test.jsonl", **more}


def sheet(**changes):
    keys = {
        "model": "llama", "output": "out", "data": {"a": entry("a")}, "methods": {"lora": {"r": 4}},
        "common": COMMON, "latency": LATENCY, "forgetting": False,
    }  # fmt: skip
    return {name: value for name, value in {**keys, **changes}.items() if value is not None}


def plan(place, **changes):
    (place / "c.yaml").write_text(yaml.safe_dump(sheet(**changes), sort_keys=False))
    return read_plan(place / "c.yaml")


def test_the_grid_is_data_by_method_by_axes_by_seed(place):
    found = plan(
        place,
        seeds=[0, 1],
        data={"a": entry("a"), "b": entry("b")},
        methods={"base": {}, "full": {}, "lora": {"r": 8}, "two": {"method": "rslora", "axes": {"alpha": [4]}}},
        axes={"r": [2, 4], "lr": [0.001, "1e-4"]},
    )
    names = ["full,learning_rate=0.001", "full,learning_rate=1e-4"]
    for method, more in (("lora", ""), ("two", ",alpha=4")):
        names += [f"{method},r={r},learning_rate={lr}{more}" for r in (2, 4) for lr in ("0.001", "1e-4")]
    assert found.labels == ["base", *names]
    wanted = ["a/base/seed-0", "b/base/seed-0"]
    wanted += [f"{data}/{name}/seed-{seed}" for seed in (0, 1) for name in names for data in "ab"]
    assert sorted(found.cells) == sorted(wanted)
    # The bare base first, then whole seeds, so that a comparison that is cut short has all methods.
    order = list(found.cells)
    assert order[:2] == wanted[:2]
    assert [int(name[-1]) for name in order[2:]] == sorted(int(name[-1]) for name in order[2:])
    assert found.reference == names[0]
    config = make_config(found.cells["b/two,r=4,learning_rate=1e-4,alpha=4/seed-1"].keys)
    assert (config.method_config.r, config.learning_rate, config.method_config.rslora) == (4, 1e-4, True)
    assert (config.seed, config.method_config.alpha, config.batch_size) == (1, 4, 8)
    assert config.data == str(place / "b-train.jsonl") and config.model == str(place / "llama")
    assert (config.evaluate_before, config.baselines) == (False, False)


def test_layers_override_each_other_in_any_spelling(place):
    found = plan(
        place,
        common=COMMON | {"lr": 1.0, "r": 2, "lora_alpha": 3},
        data={"a": entry("a", learning_rate=2.0)},
        methods={"lora": {"lr": 3.0}, "plain": {"method": "lora"}, "full": {}},
    )
    configs = {cell.label: make_config(cell.keys) for cell in found.cells.values()}
    assert [configs[name].learning_rate for name in ("lora", "plain", "full")] == [3.0, 2.0, 2.0]
    assert (configs["plain"].method_config.r, configs["plain"].method_config.alpha) == (2, 3)


def test_each_cell_is_measured_on_all_rows_that_its_model_can_be_asked(place):
    data = {
        "a": entry("a", transfer={"again": "b-test.jsonl"}),
        "b": entry("b"),
        "tags": entry("tags"),
        "text": entry("text"),
    }
    found = plan(place, data=data, forgetting={"tokens": 10})
    probes = {cell.data: [probe.name for probe in cell.probes] for cell in found.cells.values() if not cell.bare}
    assert probes["a"] == ["a", "again", "b", "text"] and probes["text"] == ["text", "a", "again", "b"]
    assert probes["tags"] == ["tags"]
    trained = found.cells["b/lora/seed-0"]
    assert [probe.before for probe in trained.probes] == [f"{name}/base/seed-0" for name in ("b", "a", "a", "text")]
    assert next(probe for probe in trained.probes if probe.name == "again").labels == ["bad", "good"]
    assert "text" in found.wanted(trained) and "text" not in found.wanted(found.cells["tags/lora/seed-0"])
    with pytest.raises(InputError, match=r"b/base/seed-0: transfer odd: .*jsonl has the labels \['even', 'odd'\]"):
        plan(place, model="bert", latency=False, data={"b": entry("b", transfer={"odd": "other.jsonl"})})


def test_a_bare_cell_for_each_way_of_asking(place):
    methods = {"lora": {}, "short": {"method": "lora", "max_length": 80}, "four": {"method": "base", "quantize": "nf4"}}
    found = plan(place, seeds=[3, 4], methods=methods | {"q": {"method": "qlora"}})
    bare = [cell for cell in found.cells.values() if cell.bare]
    assert {cell.name for cell in bare} == {f"a/{name}/seed-3" for name in ("base", "base,max_length=80", "four")}
    before = {cell.label: cell.probes[0].before for cell in found.cells.values() if not cell.bare}
    assert before["short"] == "a/base,max_length=80/seed-3"
    # What 4 bits cost is part of what a method in 4 bits changed.
    assert before["lora"] == before["q"] == "a/base/seed-3"
    assert found.labels[:2] == ["base", "base,max_length=80"] and found.reference == "lora"


def test_rows_split_by_the_seed_and_new_heads_want_a_bare_cell_a_seed(place):
    held = plan(place, seeds=[0, 1], data={"a": {"data": "a-train.jsonl"}})
    assert held.cells["a/lora/seed-1"].probes[0].before == "a/base/seed-1"
    first, second = (held.cells[f"a/lora/seed-{seed}"].probes[0].fingerprint for seed in (0, 1))
    assert first != second
    heads = plan(place, seeds=[0, 1], model="bert", latency=False)
    assert {cell.name for cell in heads.cells.values() if cell.bare} == {"a/base/seed-0", "a/base/seed-1"}


def test_a_plan_survives_its_file_and_files_may_move(place, tmp_path):
    found = plan(place, data={"a": entry("a", transfer={"b": "b-test.jsonl"})})
    assert plan_of(json.loads(json.dumps(found.record()))) == found
    (tmp_path / "rows").mkdir()
    for name in ("a-train", "a-test", "b-test"):
        (tmp_path / "rows" / f"{name}.jsonl").write_bytes((place / f"{name}.jsonl").read_bytes())
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump(sheet(model=str(place / "llama"), data={"a": entry("a", transfer={"b": "b-test.jsonl"})}))
    )
    moved = read_plan(tmp_path / "c.yaml", data_root=str(tmp_path / "rows"))
    for name, cell in found.cells.items():
        assert moved.cells[name].setup == cell.setup and moved.wanted(moved.cells[name]) == found.wanted(cell)
    (tmp_path / "rows" / "b-test.jsonl").write_bytes((place / "b-train.jsonl").read_bytes())
    changed = read_plan(tmp_path / "c.yaml", data_root=str(tmp_path / "rows"))
    cell = changed.cells["a/lora/seed-0"]
    assert cell.setup == found.cells[cell.name].setup
    old, new = found.wanted(found.cells[cell.name]), changed.wanted(cell)
    assert {name for name in new if new[name] != old[name]} == {"task:b"}


WRONG = {
    "an unknown section": ({"method": {}}, r"unknown key of a comparison 'method': did you mean 'methods'"),
    "no output": ({"output": None}, "names no output"),
    "no data": ({"data": {}}, "no data: give at least one"),
    "a method without a name": ({"methods": {"mine": {"r": 4}}}, r"methods.mine: unknown method 'mine'"),
    "a key of no method": ({"methods": {"lora": {"rank": 4}}}, r"unknown key in methods.lora 'rank'"),
    "a key of another": ({"methods": {"full": {"r": 4}}}, "a/full/seed-0: unknown configuration key 'r'"),
    "a value": ({"methods": {"lora": {"r": 0}}}, "a/lora/seed-0: .*r is 0"),
    "a common key": ({"common": {"epoch": 1}}, r"unknown key in common 'epoch'"),
    "a seed in common": ({"common": {"seed": 1}}, "common holds seed.*leave it to seeds"),
    "data in a method": ({"methods": {"lora": {"data": "x"}}}, "methods.lora holds data"),
    "seeds": ({"seeds": [0, 0]}, "seeds is .*different whole numbers"),
    "an axis of no field": ({"axes": {"rank": [1]}}, "unknown field in axes 'rank'"),
    "an axis that is no list": ({"axes": {"r": 4}}, "axes.r is 4: expected a list"),
    "an axis of places": ({"axes": {"data": ["a"]}}, "axes.data: expected a field"),
    "an own axis of another method": ({"methods": {"full": {"axes": {"r": [1]}}}}, "methods.full.axes 'r'"),
    "axes of the base": ({"methods": {"base": {"axes": {"r": [1]}}}}, "no axes"),
    "a missing file": ({"data": {"a": {"data": "gone.jsonl"}}}, "a/lora/seed-0: no such file: .*gone.jsonl"),
    "a missing transfer": ({"data": {"a": entry("a", transfer={"t": "t.jsonl"})}}, "transfer t: no such file"),
    "a missing text": ({"forgetting": {"text": "t.txt"}}, "no such file: .*t.txt; forgetting.text"),
    "a key of forgetting": ({"forgetting": {"token": 5}}, "unknown key in forgetting 'token'"),
    "a latency": ({"latency": {"batch": 0}}, "latency.batch is 0"),
    "a long latency": ({"latency": {"prompt": 999}}, "latency asks for 1031 tokens .* has 256 positions"),
    "a length": ({"common": COMMON | {"max_length": 999}}, "max_length is 999 .* has 256 positions"),
    "a reference": ({"reference": "lore"}, "unknown reference 'lore': did you mean 'lora'"),
    "parallel": ({"parallel": 0}, "parallel is 0"),
    "nothing held out": ({"common": COMMON | {"held_out": 0}, "data": {"a": {"data": "a-train.jsonl"}}}, "held out"),
    "a name": ({"data": {"a/b": entry("a")}}, "data.a/b: a name has letters"),
    "one name for two sets": (
        {"data": {"a": entry("a", transfer={"a": "b-test.jsonl"})}}, "transfer.a: another set of rows",
    ),
    "cells of one name": ({"axes": {"learning_rate": [0.1, "0.1"]}}, "two cells would be a/lora,learning_rate=0.1"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_before_anything_runs(place, name):
    changes, message = WRONG[name]
    with pytest.raises(InputError, match=message) as caught:
        plan(place, **changes)
    assert "\n" not in str(caught.value)
