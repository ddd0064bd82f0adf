"""A federation's page, from folders made here as a server writes them."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import shutil
import xml.etree.ElementTree as tree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_report_page as run_page
from made_runs import HOSTILE, lines_of, made_run
from test_report_page import Page, read, sections

from deltaw.report.federation import federation_page
from deltaw.report.federation_charts import Level, Line, silos_chart
from deltaw.report.federation_privacy import collusion_table, format_epsilon, statement
from deltaw.report.federation_tables import (
    Federation,
    by_round,
    coloured,
    left_out_table,
    rounds_table,
    silos_table,
    view,
)
from deltaw.report.folder import RunFolder
from deltaw.report.markup import Html

BASE = "3b" * 32
MakeFolder = Callable[..., Path]
CONFIG = "clients:\n  bank-a: {data: a.jsonl}\nrounds: 20\nrule: fedavg-ab\noutput: runs/banks\nseed: 0\n"


def made_federation(
    *, silos: int = 3, rounds: int = 20, secure: bool = False, private: bool = True, seed: int = 0, alone: bool = True
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """run.json and the lines of rounds.jsonl."""
    draw = random.Random(seed)
    names = [f"bank-{chr(97 + i)}" for i in range(silos)] if silos <= 26 else [f"branch-{i:02d}" for i in range(silos)]
    reach = {name: draw.uniform(0.70, 0.90) for name in names}
    run = {key: made_run()[key] for key in ("format", "deltaw", "status", "started", "versions", "seed", "model")}
    run |= {
        "kind": "federation",
        "command": "deltaw federate --config banks.yaml",
        "task": "sequence-classification",
        "method": {"name": "lora", "config": {"r": 8, "alpha": 16}},
        "federation": {
            "rule": "fedavg-ab", "rounds": rounds, "transport": "local", "secure": secure,
            "compression": "none" if secure else "int8", "weighting": "examples",
            "clients": {name: {"examples": draw.randrange(600, 1000), "base": BASE} for name in names},
        },
        "privacy": None,
    }  # fmt: skip
    lines = [{"round": 0, "metrics": made_metrics(0.5), "silos": {n: {"metrics": made_metrics(0.5)} for n in names}}]
    for index in range(1, rounds + 1):
        lines.append(made_round(index, rounds, reach, draw, secure=secure, private=private))
    up, down = (sum(line.get(key, 0) for line in lines) for key in ("bytes_up", "bytes_down"))
    run["metrics"] = {
        "before": lines[0]["metrics"],
        "after": lines[-1]["metrics"],
        "silos": {
            name: {"before": made_metrics(0.5), "after": lines[-1]["silos"][name].get("metrics", {})} for name in names
        },
        "baselines": {"tfidf_logreg": made_metrics(0.71)},
        "labels": ["legitimate", "mule_account", "structuring"],
    }
    if alone:
        for name in names:
            run["metrics"]["silos"][name]["alone"] = made_metrics(reach[name] - 0.1)
    run["cost"] = {"total_s": 812.5, "bytes_up": up, "bytes_down": down, "peak_memory_bytes": 2_214_592_512}
    if private:
        run["privacy"] = made_privacy(names, lines[-1], secure=secure)
    return run, lines


def made_metrics(auroc: float) -> dict[str, float]:
    return {"accuracy": round(auroc - 0.1, 4), "macro_f1": round(auroc - 0.2, 4), "macro_auroc": round(auroc, 4)}


def made_round(
    index: int, rounds: int, reach: dict[str, float], draw: random.Random, *, secure: bool, private: bool
) -> dict[str, Any]:
    silos: dict[str, Any] = {}
    grown = 1 - math.exp(-4 * index / rounds)
    for name, top in reach.items():
        status = draw.choices(["ok", "late", "crashed", "refused"], [97, 1, 1, 1])[0] if index < rounds else "ok"
        entry: dict[str, Any] = {
            "status": status,
            "metrics": made_metrics(0.5 + (top - 0.5) * grown * draw.uniform(0.97, 1)),
        }
        if status == "ok":
            entry |= {"bytes_up": draw.randrange(80_000, 90_000), "seconds": round(draw.uniform(2, 6), 2)}
            if not secure:
                entry |= {"update_norm": draw.uniform(0.2, 0.4) / index**0.3, "cosine": draw.uniform(0.5, 0.9)}
        else:
            entry["reason"] = {
                "late": "no answer within 30 s",
                "crashed": "the process ended with exit code -9",
                "refused": "the update's norm is 812.4: expected at most 10 (max_update_norm)",
            }[status]
        if private:
            entry["epsilon"] = 3.0 * math.sqrt(index / rounds) * (1 + 0.001 * len(name))
        silos[name] = entry
    up = sum(entry.get("bytes_up", 0) for entry in silos.values())
    line: dict[str, Any] = {
        "round": index, "metrics": made_metrics(0.5 + 0.36 * grown), "silos": silos,
        "facts": {} if secure else {"product_error": 0.3 / index, "truncation_error": 1.5e-7},
        "bytes_up": up, "bytes_down": 330_000 * len(reach), "seconds": 12.5, "attempts": 2 if index == 7 else 1,
    }  # fmt: skip
    return line if secure else line | {"drift": 0.9 - 0.4 * index / rounds}


def made_privacy(names: list[str], end: dict[str, Any], *, secure: bool) -> dict[str, Any]:
    def collusion(spent: float) -> dict[str, float]:
        return {str(n): spent * (math.sqrt(len(names) / (len(names) - n)) if secure else 1) for n in range(len(names))}

    def client(name: str) -> dict[str, Any]:
        spent = end["silos"][name]["epsilon"]
        return {
            "epsilon": spent, "target_epsilon": 3.1, "epsilon_rdp": spent + 0.4, "steps": 400, "sampling_rate": 0.05,
            "collusion": collusion(spent),
        }  # fmt: skip

    return {
        "level": "update" if secure else "example", "unit": "customer", "adjacency": "add-or-remove-one",
        "sampling": "poisson", "delta": 1e-5, "noise_multiplier": 1.0, "max_grad_norm": 1.0,
        "clients": {name: client(name) for name in names},
    }  # fmt: skip


@pytest.fixture
def make(tmp_path: Path) -> MakeFolder:
    """Writes a federation's folder."""

    def write(run: Any, lines: list[dict[str, Any]], *, config: str | None = CONFIG, name: str = "federation") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
        (folder / "rounds.jsonl").write_text(lines_of(lines), encoding="utf-8")
        if config is not None:
            (folder / "config.yaml").write_text(config, encoding="utf-8")
        return folder

    return write


@pytest.fixture
def banks(make: MakeFolder) -> Path:
    return make(*made_federation())


@pytest.fixture
def fifty(make: MakeFolder) -> Path:
    return make(*made_federation(silos=50, rounds=30), name="fifty")


@pytest.fixture
def hostile(make: MakeFolder) -> Path:
    """Every name and reason hostile."""
    run, lines = made_federation(silos=6)
    names = dict(zip(run["federation"]["clients"], HOSTILE, strict=False))
    text = json.dumps([run, lines])
    for name, bad in names.items():
        text = text.replace(json.dumps(name), json.dumps(bad))
    run, lines = json.loads(text)
    run["federation"] |= {
        "rule": HOSTILE[0],
        "transport": HOSTILE[1],
        HOSTILE[2]: HOSTILE[3],
        "compression": HOSTILE[4],
    }
    run["privacy"] |= {"unit": HOSTILE[0], "adjacency": HOSTILE[1], "sampling": HOSTILE[5]}
    run |= {"status": "failed", "error": HOSTILE[1]}
    for line in lines[1:]:
        line["facts"] = {HOSTILE[line["round"] % len(HOSTILE)]: 0.5}
        for entry in line["silos"].values():
            entry |= {"status": HOSTILE[line["round"] % 5], "reason": HOSTILE[line["round"] % len(HOSTILE)]}
    return make(run, lines, config="\n".join(HOSTILE[:-1]), name="hostile")


def tables(page: Page) -> list[str]:
    return [text for inside, text in page.texts if inside in ("td", "bdi", "th", "code")]


def fed_of(run: dict[str, Any], lines: list[dict[str, Any]]) -> Federation:
    return view(RunFolder(run=copy.deepcopy(run)), copy.deepcopy(lines))


def test_a_federation_has_every_part_in_order(banks: Path) -> None:
    page = read(banks)
    order = ["result", "rounds", "metrics", "drift", "bytes", "privacy", "left-out", "rule", "silos", "cost", "setup"]
    assert sections(page) == [*order, "reproduce"]
    assert "SmolLM2-135M-Instruct over 3 silos: LoRA, r 8, alpha 16 · ΔW federation" in page.all("title")
    assert "deltaw federate --config banks.yaml" in page.all("code")
    assert "deltaw federate --config runs/banks/config.yaml --output runs/banks-again" in page.all("code")


def test_numbers_are_those_of_the_files(banks: Path) -> None:
    run, lines = json.loads((banks / "run.json").read_text()), made_federation()[1]
    page, cells = read(banks), tables(read(banks))
    for key in ("before", "after"):
        assert f"{run['metrics'][key]['macro_auroc']:.3f}" in page.all("span")
    up, down = run["cost"]["bytes_up"], run["cost"]["bytes_down"]
    assert f"{(up + down) / 2**20:.1f} MiB" in page.all("dd")
    assert f"{up / 2**20:.2f} MiB up, {down / 2**20:.1f} MiB down" in page.all("dd")
    for line in lines:
        assert f"{line['metrics']['macro_auroc']:.3f}" in cells
        if line["round"]:
            assert f"{line['drift']:.3g}" in cells and f"{line['facts']['product_error']:.3g}" in cells
    states = [entry["status"] for line in lines[1:] for entry in line["silos"].values()]
    assert f"{states.count('ok')} of 60" in page.all("dd")
    for name, client in run["federation"]["clients"].items():
        entries = [line["silos"][name] for line in lines[1:]]
        for shown in (
            f"{client['examples']:,}", BASE[:12], f"{sum(e['status'] == 'ok' for e in entries)} of 20",
            f"{sum(e.get('bytes_up', 0) for e in entries) / 2**20:.2f} MiB",
            f"{run['metrics']['silos'][name]['after']['macro_auroc']:.3f}",
            f"{run['metrics']['silos'][name]['alone']['macro_auroc']:.3f}",
        ):  # fmt: skip
            assert shown in cells, shown
    best = max(run["metrics"]["silos"], key=lambda name: run["metrics"]["silos"][name]["alone"]["macro_auroc"])
    assert f"{best}, trained by itself" in page.all("dd")
    gain = run["metrics"]["after"]["macro_auroc"] - run["metrics"]["silos"][best]["alone"]["macro_auroc"]
    assert f"{gain:.3f} better than the best baseline (Best single silo)" in page.text


def test_updates_left_out_are_all_there(banks: Path) -> None:
    run, lines = made_federation()
    found = [
        [str(line["round"]), name, entry["status"].capitalize(), entry["reason"]]
        for line in lines[1:]
        for name, entry in line["silos"].items()
        if entry["status"] != "ok"
    ]
    assert found and left_out_table(fed_of(run, lines))[1:] == found
    page = read(banks)
    assert all(cell in tables(page) for row in found for cell in row)
    assert "Rounds that took more than one attempt: 7 (2)." in page.text
    for line in lines[1:]:
        for entry in line["silos"].values():
            entry.pop("reason", None)
            entry["status"] = "absent" if line["round"] % 4 else "ok"
            if line["round"] % 2:
                del entry["status"]
    assert left_out_table(fed_of(run, lines)) == []
    assert silos_table(fed_of(run, lines))[1][4:6] == ["5 of 20", "0"]


def test_a_customer_at_two_silos_is_a_group_of_two_in_one_noised_sum() -> None:
    run, lines = made_federation(secure=True)
    for client in run["privacy"]["clients"].values():
        client["epsilon"] = 1.5
    text = Page(federation_page(fed_of(run, lines))).text
    assert f"at most (3, {(1 + math.e**1.5) * 1e-5:.3g}".replace("e-0", "e-") in text
    for client in run["privacy"]["clients"].values():
        client["epsilon"] = 15.0
    assert "epsilon doubles: this promises little" in Page(federation_page(fed_of(run, lines))).text


def test_attempts_given_up_have_their_reasons() -> None:
    run, lines = made_federation()
    lines[7]["failed_attempts"] = ["bank-a late: no answer", 3]
    rows = left_out_table(fed_of(run, lines))[1:]
    assert ["7", "all", "Attempt given up", "bank-a late: no answer"] in rows
    assert [int(row[0]) for row in rows] == sorted(int(row[0]) for row in rows)


def test_what_a_rule_said_of_single_uploads_is_counted() -> None:
    run, lines = made_federation()
    for line in lines[1:]:
        line["facts"] = {"clipped": 2.0, "bound": 0.25} | {
            "clipped:0": 1.0,
            "clipped:bank-b": float(line["round"] > 15),
        }
    fed = fed_of(run, lines)
    assert rounds_table(fed)[0][3:5] == ["Clipped", "Bound"]
    text = Page(federation_page(fed)).text
    assert "upload 0 in 20, bank-b in 5." in text
    assert "Bound is 0.25 in round 20, at most 0.25: the norm to which updates were shortened." in text


def test_the_promise_in_a_sentence(banks: Path) -> None:
    run, lines = made_federation()
    privacy = run["privacy"]
    privacy["clients"]["bank-b"] |= {"epsilon": 3.0, "epsilon_rdp": 3.4}
    privacy["clients"]["bank-a"] |= {"epsilon": 2.5, "epsilon_rdp": 2.9}
    privacy["clients"]["bank-c"] |= {"epsilon": 1.5, "epsilon_rdp": 1.9}
    expected = "(epsilon, delta) = (3, 1e-5) for one customer, add-or-remove-one, Poisson sampling; PLD accounting; "
    assert statement(fed_of(run, lines)) == expected + "RDP gives 3.4."
    text = Page(federation_page(fed_of(run, lines))).text
    assert "at most (5.5, 2e-5)" in text and "e^epsilon = 20.1" in text
    assert "The target was passed" not in text
    privacy["clients"]["bank-b"]["target_epsilon"] = 2.9
    text = Page(federation_page(fed_of(run, lines))).text
    assert "The target was passed by bank-b" in text and "0.1 over" in text
    privacy["clients"]["bank-b"]["epsilon_rdp"] = 3.0
    assert statement(fed_of(run, lines)).endswith("Poisson sampling; RDP accounting.")


@pytest.mark.parametrize(
    ("value", "written"),
    [(3.0, "3"), (3.1, "3.1"), (1.8282, "1.8282"), (1.82820001, "1.8283"), (0.012345678, "0.012346"), (1e4, "10,000"),
     (12345.6, "12,346"), (0.0, "0"), (None, "–"), (math.nan, "–")],
)  # fmt: skip
def test_epsilon_is_never_written_smaller(value: float | None, written: str) -> None:
    assert format_epsilon(value) == written


def test_epsilon_is_never_written_smaller_for_any_number() -> None:
    draw = random.Random()
    for _ in range(2000):
        value = 10 ** draw.uniform(-4, 4)
        shown = float(format_epsilon(value).replace(",", ""))
        assert value * (1 - 1e-9) <= shown <= value * (1 + 2e-4) + 1e-12, value


def test_collusion_of_none_one_and_all_others() -> None:
    run, lines = made_federation(silos=20, secure=True)
    rows = collusion_table(fed_of(run, lines))
    assert rows[0] == ["Silo", "None colludes", "1 colludes", "2 collude", "10 collude", "18 collude",
                       "All 19 others collude"]  # fmt: skip
    found = run["privacy"]["clients"]["bank-c"]["collusion"]
    assert rows[3] == ["bank-c", *(format_epsilon(found[key]) for key in ("0", "1", "2", "10", "18", "19"))]
    text = Page(federation_page(fed_of(run, lines))).text
    assert "so epsilon grows with their number" in text
    assert f"all 19 others collude: {rows[1][6]}" in text


def test_a_secure_round_shows_no_single_silo(make: MakeFolder) -> None:
    page = read(make(*made_federation(secure=True)))
    assert "the server sees only the sum of the updates: there are no norms of single silos" in page.text
    assert "Cosine" not in page.text and "Norm of the update" not in page.text
    assert "masked 32-bit word, which cannot be compressed" in page.text
    assert "no error is known, since the server sees only the sum" in page.text


def test_without_privacy_it_says_so(make: MakeFolder) -> None:
    page = read(make(*made_federation(private=False)))
    assert "ran without differential privacy: there is no epsilon" in page.text
    assert "Secure aggregation is off: the server sees each silo's update." in page.text
    assert "PLD" not in page.text


@pytest.mark.parametrize(
    ("kind", "cost", "said"),
    [
        ("none", {}, "Uploads were not compressed."),
        ("int8", {"bytes_up": 25, "bytes_up_float32": 100}, "(int8): 25 B where float32 takes 100 B, 75.0 % saved."),
        ("nf4", {}, "(nf4): 4 bits a value in place of 32"),
        ("topk", {}, "(topk). What they would have taken uncompressed was not recorded."),
    ],
)
def test_what_compression_saved(kind: str, cost: dict[str, int], said: str) -> None:
    run, lines = made_federation()
    run["federation"]["compression"], run["cost"] = kind, cost
    assert said in Page(federation_page(fed_of(run, lines))).text


def test_a_failed_federation_says_so_first(make: MakeFolder) -> None:
    run, lines = made_federation()
    run |= {"status": "failed", "error": "round 5: 1 of 3 silos answered", "metrics": {}, "cost": {}}
    page = read(make(run, lines[:5]))
    assert page.text.index("This federation failed") < page.text.index("round 5: 1 of 3") < page.text.index("Result")
    assert "The last whole round is 4 of 20." in page.text
    assert [f"{lines[i]['metrics']['macro_auroc']:.3f}" in page.all("span") for i in (0, 4)] == [True, True]
    assert f"{sum(line.get('bytes_up', 0) for line in lines[:5]) / 2**10:,.0f} KiB up" in page.text


def test_next_to_nothing_is_still_a_page(make: MakeFolder) -> None:
    page = read(make({"kind": "federation"}, [], config=None))
    assert sections(page) == ["result", "drift", "bytes", "privacy"]
    assert "This federation has not finished" in page.text and "No round was completed." in page.text
    assert "Whether secure aggregation was on is not recorded." in page.text


ABSENT = object()


@pytest.mark.parametrize("wrong", [ABSENT, None, 3, "text", [1], {"x": {"y": 1}}, math.nan, 1e308])
def test_absent_keys_and_wrong_types_are_left_out(wrong: Any) -> None:
    def each(value: dict[str, Any]) -> list[dict[str, Any]]:
        """`value` with one of its keys absent, or of another type, at any depth, in turn."""
        found = []
        for key in value:
            rest = {k: v for k, v in value.items() if k != key}
            found.append(rest if wrong is ABSENT else value | {key: wrong})
            if isinstance(value[key], dict):
                found += [value | {key: inner} for inner in each(value[key])]
        return found

    run, lines = made_federation(silos=1, rounds=1)
    for changed in each({key: value for key, value in run.items() if key not in ("format", "versions", "model")}):
        Page(federation_page(fed_of(changed, lines)))
    for changed in each(lines[1]):
        Page(federation_page(fed_of(run, [lines[0], changed])))


def test_of_a_round_logged_twice_the_later_line_counts_and_half_a_line_is_said(banks: Path) -> None:
    run, lines = made_federation()
    twice = fed_of(run, [*lines[:10], lines[5] | {"drift": 77.0}, *lines[10:]])
    assert [line["round"] for line in twice.rounds] == list(range(21))
    assert by_round(twice, "drift")[4] == (5.0, 77.0)
    with open(banks / "rounds.jsonl", "ab") as file:
        file.write(b'{"round": 21, "met')
    assert "rounds.jsonl: 1 unreadable line left out." in read(banks).text


def test_hostile_names_stay_text(hostile: Path) -> None:
    page = read(hostile)
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe"}
    assert all(not name.startswith("on") for _, values in page.tags for name in values)
    for text in HOSTILE[:6]:
        assert text in page.text


def test_the_page_is_one_file_that_fetches_and_runs_nothing(banks: Path) -> None:
    run_page.test_the_page_is_one_file_that_fetches_and_runs_nothing(banks)
    first = (banks / "report.html").read_bytes()
    assert read(banks) and (banks / "report.html").read_bytes() == first


@pytest.mark.parametrize("kind", ["banks", "fifty", "hostile"])
def test_tables_and_charts_can_be_read_aloud(kind: str, request: pytest.FixtureRequest) -> None:
    page = read(request.getfixturevalue(kind))
    names = [tag for tag, _ in page.tags]
    assert names.count("table") == names.count("caption") and names.count("h1") == 1
    assert all(values.get("scope") for tag, values in page.tags if tag == "th")
    charts = [values for tag, values in page.tags if tag == "svg" and values.get("class") == "chart"]
    assert len(charts) >= 5 and all(len(str(values["aria-label"])) > 40 for values in charts)
    assert all(values["role"] == "img" for values in charts)
    rest = [values for tag, values in page.tags if tag == "svg" and values.get("class") != "chart"]
    assert all(values.get("aria-hidden") == "true" for values in rest)
    ids = [values["id"] for _, values in page.tags if "id" in values]
    assert len(ids) == len(set(ids))


def test_a_charts_words_have_its_ends(banks: Path) -> None:
    run = json.loads((banks / "run.json").read_text())
    page = read(banks)
    said = next(
        str(values["aria-label"])
        for tag, values in page.tags
        if tag == "svg" and "Line chart of Macro AUROC" in str(values.get("aria-label"))
    )
    ends = {name: silo["after"]["macro_auroc"] for name, silo in run["metrics"]["silos"].items()}
    high, low = max(ends, key=lambda name: ends[name]), min(ends, key=lambda name: ends[name])
    assert f"{high} ends highest ({ends[high]:.3f}) and {low} lowest ({ends[low]:.3f})" in said
    assert f"{run['metrics']['after']['macro_auroc']:.3f} in round 20" in said


def test_of_fifty_silos_six_have_a_colour_and_long_tables_are_folded(fifty: Path) -> None:
    run, lines = made_federation(silos=50, rounds=30)
    fed = fed_of(run, lines)
    ends = {name: silo["after"]["macro_auroc"] for name, silo in run["metrics"]["silos"].items()}
    ranked = sorted(ends, key=lambda name: -ends[name])
    assert sorted(ends[name] for name in coloured(fed)) == sorted(ends[name] for name in ranked[:3] + ranked[-3:])
    text = federation_page(fed)
    legends = re.findall('<ul class="legend">(.*?)</ul>', text)
    assert legends and all(entry.count("<li>") <= 8 and "44 other silos" in entry for entry in legends[0:1])
    assert all(entry.count("<li>") <= 8 for entry in legends)
    outside = re.sub("<details>.*?</details>", "", text, flags=re.S)
    assert "branch-00" in text and outside.count("<tr") < 60
    assert len(text) < 1_000_000


def coordinates(drawn: Html, name: str) -> list[list[tuple[float, float]]]:
    """The strokes of the line whose tooltip begins with `name`."""
    path = next(p for p in tree.fromstring(str(drawn)).iter("path") if (p.findtext("title") or "").startswith(name))
    strokes = path.get("d", "").split("M")[1:]
    return [[(float(x), float(y)) for x, y in (pair.split() for pair in stroke.split("L"))] for stroke in strokes]


def test_a_line_is_where_its_values_are_and_lifts_the_pen_at_a_gap() -> None:
    points: list[tuple[float, float | None]] = [(0, 0.2), (1, 0.4), (2, None), (3, 0.8), (4, None), (5, 1.0), (6, 0.6)]
    drawn = silos_chart(
        [Line("a", points, 0), Line("all", [(0, 0.0), (6, 1.0)], "all")],
        y_label="y",
        summary="s",
        level=Level("t", 0.5),
    )
    assert drawn is not None
    (start, end), strokes = coordinates(drawn, "all")[0], coordinates(drawn, "a:")
    assert [len(stroke) for stroke in strokes] == [2, 2, 2] and strokes[1][0] == strokes[1][1]
    measured = [(x, y) for x, y in points if y is not None]
    got = [*strokes[0], strokes[1][0], *strokes[2]]
    for (x, y), (across, down) in zip(measured, got, strict=True):
        assert across == pytest.approx(start[0] + x / 6 * (end[0] - start[0]), abs=0.11)
        assert down == pytest.approx(start[1] + y * (end[1] - start[1]), abs=0.11)
    line = next(item for item in tree.fromstring(str(drawn)).iter("line") if item.get("class") == "level-k")
    assert float(line.get("y1", "")) == pytest.approx((start[1] + end[1]) / 2, abs=0.11)
    assert silos_chart([Line("a", [(1, None)], 0)], y_label="y", summary="s") is None


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("kind", ["banks", "fifty", "hostile"])
def test_nothing_overflows_in_a_browser(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    run_page.test_nothing_overflows_in_a_browser(kind, tmp_path, request)
