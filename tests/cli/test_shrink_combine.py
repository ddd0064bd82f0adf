"""shrink and combine on a tiny run: what they print, write and refuse."""

from __future__ import annotations

import json
import re

import pytest
from command_line import digest

import deltaw as dw


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def facts(out):
    return dict(re.findall(r"^(\S+(?: \S+)*)  +(.*)$", out, re.M))


def test_shrink_a_run(here, deltaw, finished):
    before = digest(finished)
    done = deltaw("shrink", finished, "--r", "1", "--output", "small", "--measure", "--device", "cpu")
    assert done.code == 0, done.err
    assert len(re.findall(r"^ ?model\.layers\.\d\.\S+ +2 +1 +\d\.\d{4}", done.out, re.M)) == 14
    shown = facts(done.out)
    assert shown["Highest rank"] == "1, before 2" and shown["Output"] == "small"
    assert re.fullmatch(r"0\.\d{4}", shown["Error in all"])
    assert re.fullmatch(r"[\d.]+ KiB, before [\d.]+ KiB", shown["Size"])
    assert re.search(r"^ ?loss +[\d.]+ +[\d.]+", done.out, re.M)
    assert re.fullmatch(r"(measuring the adapter (before|after) on \d+ held-out rows\n){2}", done.err)
    assert digest(finished) == before
    dw.load_adapter(dw.load_model("model", device="cpu"), "small")
    asked = ("shrink", finished, "--energy", "0.99", "--output", "small")
    assert "small is not empty: choose a new folder" in deltaw(*asked).error(2)
    again = deltaw("shrink", finished, "--energy", "1", "--output", "same", "--json")
    assert json.loads(again.out)["relative_error"] == 0 and again.err == ""


def test_modules_with_ranks_of_their_own(here, deltaw, finished):
    words = ["--rank-pattern", r"q_proj=1,.*\.1\.mlp\.up_proj=1", "--rank-pattern", "o_proj=1"]
    for name, more in (("a", ["--r", "2"]), ("b", [])):
        done = json.loads(deltaw("shrink", finished, *words, *more, "--output", name, "--json").out)
        low = {site for site, found in done["sites"].items() if found["r"] == 1}
        assert (
            low == {site for site in done["sites"] if site.endswith(("q_proj", "o_proj", "layers.1.mlp.up_proj"))}
            and len(low) == 5
        )
        saved = json.loads((here / name / "adapter_config.json").read_text())
        assert saved["r"] == 2 and set(saved["rank_pattern"]) == low


def test_advice_on_a_run(deltaw, finished):
    done = deltaw("shrink", finished, "--advise")
    assert done.code == 0, done.err
    assert len(re.findall(r"^ ?model\.layers\.\d\.\S+ +2( +\d\.\d+){4} +\d", done.out, re.M)) == 14
    assert facts(done.out)["Rank now"] == "2" and re.match(r"[12], which keeps", facts(done.out)["Recommended"])
    found = json.loads(deltaw("shrink", finished, "--advise", "--json", "--energy", "0.5").out)
    assert found["energy"] == 0.5 and found["r_recommended"] == 1 and len(found["sites"]) == 14


def test_many_sites_are_gathered_by_layer():
    from deltaw.cli.shrink import by_layer

    paths = [f"model.layers.{i}.{n}" for i in range(21) for n in ("q", "k")]
    groups = by_layer({path: {"at": path} for path in [*paths, "lm_head"]})
    assert list(groups) == ["lm_head", *(f"model.layers.{i}" for i in range(21))]
    assert [site["at"] for site in groups["model.layers.10"]] == ["model.layers.10.k", "model.layers.10.q"]


def test_advice_for_a_model(here, deltaw):
    plain = deltaw("shrink", "--advise")
    assert plain.code == 0 and re.search(r"below 7B +light +4-8", plain.out) and "16-64" in plain.out
    assert "Fits" not in plain.out
    done = deltaw("shrink", "--advise", "--model", "model", "--task", "light")
    assert re.search(r"light +4-8 +yes", done.out) and done.out.count("yes") == 1
    assert facts(done.out)["Parameters"] == "34,080"
    found = json.loads(deltaw("shrink", "--advise", "--task", "reasoning", "--json").out)
    assert [row["fits"] for row in found["advice"]] == [False, False, True] and "model" not in found


def test_combine_runs(here, deltaw, finished):
    words = ["combine", "--adapter", finished, "--adapter", f"{finished}=-0.5"]
    done = deltaw(*words, "--output", "sum")
    assert done.code == 0 and done.err == "", done.err
    assert "Combined by cat" in done.out and re.search(r"-0\.5 +14 +", done.out)
    assert len(re.findall(r"^ ?model\.layers\.\d\.\S+ +4 +4 +\S+$", done.out.replace(" \n", "\n"), re.M)) == 5
    assert facts(done.out)["Highest rank"] == "4"
    svd = json.loads(deltaw(*words, "--output", "half", "--r", "2", "--json").out)
    assert svd["method"] == "svd" and svd["relative_error"] < 1e-6 and svd["r"] == 2
    drop = [*words, "--method", "dare_linear", "--density", "0.5", "--json"]
    first, second, third = (
        json.loads(deltaw(*drop, "--output", f"d{place}", "--seed", seed).out) for place, seed in enumerate((1, 1, 2))
    )
    assert first["sites"] == second["sites"] != third["sites"]
    assert "sum is not empty" in deltaw(*words, "--output", "sum").error(2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shrink"], "nothing to shrink: give a run folder"),
        (["shrink", "x"], "name the folder to write with --output"),
        (["shrink", "x", "--r", "2", "--output", "y"], "no adapter at x: no such folder"),
        (["shrink", "x", "--r", "two", "--output", "y"], "--r is 'two': expected a whole number"),
        (
            ["shrink", "x", "--rank-pattern", "q_proj", "--output", "y"],
            "is 'q_proj': expected KEY=VALUE",
        ),
        (
            ["shrink", "x", "--rank-pattern", "q=two", "--output", "y"],
            "--rank-pattern is 'two': expected a whole",
        ),
        (["shrink", "x", "--advise", "--rank-pattern", "q=2"], "leave out --rank-pattern"),
        (["shrink", "x", "--r", "2", "--output", "y", "--device", "cpu"], "nothing is measured without --measure"),
        (["shrink", "x", "--advise", "--r", "2", "--output", "y"], "leave out --output, --r"),
        (["shrink", "x", "--advise", "--task", "light"], "the adapter itself is looked at: leave out --task"),
        (["shrink", "--advise", "--task", "easy"], "unknown task 'easy'"),
        (["shrink", "--advise", "--energy", "0.5"], "no adapter to look at: leave out --energy"),
        (["combine"], "nothing to combine: give adapters with --adapter"),
        (["combine", "--adapter", "x"], "name the folder to write with --output"),
        (["combine", "--adapter", "x=a", "--output", "y"], "expected FOLDER or FOLDER=WEIGHT"),
        (["combine", "--adapter", "=2", "--output", "y"], "--adapter is '=2': expected FOLDER or FOLDER=WEIGHT"),
        (["combine", "--adapter", "x", "--output", "y"], "no adapter at x"),
        (["combine", "--adapter", "x", "--output", "y", "--density", "much"], "--density is 'much'"),
    ],
)
def test_wrong_usage_is_one_line(here, deltaw, words, message):
    assert message in deltaw(*words).error(2)
    assert not (here / "y").exists()
