"""A comparison's tables and page, from results made by hand."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_runs import HOSTILE

from deltaw.report.comparison import comparison_page, write_comparison
from deltaw.report.comparison_charts import Mark, log_ticks, plot
from deltaw.report.comparison_tables import (
    expense_table,
    failed_table,
    forgetting_table,
    format_difference,
    format_latency,
    format_p,
    format_spread,
    markdown,
    quality_table,
    significance_table,
    whole_table,
)

VOID = {"meta", "link", "br", "col"}


class Page(HTMLParser):
    """Checks that tags are balanced; keeps tags and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


def of(*values: float) -> dict[str, Any]:
    found: dict[str, Any] = {"mean": sum(values) / len(values), "n": len(values), "values": list(values)}
    if len(values) > 1:
        found["sd"] = math.sqrt(sum((value - found["mean"]) ** 2 for value in values) / (len(values) - 1))
    return found


def made_results() -> dict[str, Any]:
    """Two data sets; the base, two methods, of which one has a seed that failed."""
    groups = []
    for data in ("tfns", "ner"):
        for label in ("base", "lora", "full"):
            group: dict[str, Any] = {
                "data": data, "label": label, "method": label, "bare": label == "base", "axes": {},
                "seeds": [0] if label != "lora" else [0, 1], "cells": {"base": 1, "lora": 2, "full": 2}[label],
                "task": "instruct", "main": "accuracy", "rows": 588, "cost": {}, "others": {},
                "metrics": {"accuracy": of(0.4), "loss": of(1.25)},
                "text": {"after": of(20.0)}, "latency": {"unmerged": {"prompt_s": of(0.0016), "token_s": of(0.042)}},
            }  # fmt: skip
            if label != "base":
                group["metrics"] = {"accuracy": of(0.8, 0.84)} if label == "lora" else {"accuracy": of(0.9)}
                group["text"] = {"before": of(20.0), "after": of(21.0, 23.0)}
                group["others"] = {"fpb": {"metric": "accuracy", "before": of(0.4), "after": of(0.6, 0.7)}}
                cost = {"trainable_parameters": 2442240 if label == "lora" else 134515008, "train_s": 81.5}
                group["cost"] = {name: of(value) for name, value in (cost | {"tokens_per_s": 1234.0}).items()}
            if label == "lora":
                group["latency"]["merged"] = {"prompt_s": of(0.001), "token_s": of(1.2)}
            groups.append(group)
    row = {"data": "tfns", "reference": "lora", "metric": "accuracy"}
    return {
        "deltaw": "0.1.0", "command": "deltaw compare c.yaml", "output": "out", "model": "/models/SmolLM2-135M",
        "seeds": [0, 1], "data": ["tfns", "ner"], "labels": ["base", "lora", "full"], "reference": "lora",
        "devices": ["H100"], "cells": {"all": 10, "done": 8}, "groups": groups,
        "significance": [
            row | {"label": "base", "difference": -0.42, "low": -0.5, "high": -0.3, "p": 0.0002, "seeds": 2},
            row | {"label": "full", "difference": 0.08, "low": -0.01, "high": 0.17, "p": 0.0814, "seeds": 1},
            row | {"data": "ner", "label": "full", "reason": "measured on other rows"},
        ],
        "curves": {"tfns": {"lora": [[1, 2.0], [2, 1.5]], "full": [[1, 2.5], [2, 1.25]]}, "ner": {}},
        "failed": [{"cell": "tfns/full/seed-1", "error": "the loss is not finite", "exit_code": 1}],
        "missing": ["ner/full/seed-1"], "notes": ["2 seeds are few."], "config": "model: smollm2-135m\n",
    }  # fmt: skip


def test_a_row_for_each_method_with_spreads_and_nothing_for_what_was_not_measured() -> None:
    results = made_results()
    assert quality_table(results, "tfns") == [
        ["Method", "Seeds", "Accuracy", "Loss"],
        ["base", "1", "40.0 %", "1.250"],
        ["lora", "2", "82.0 ± 2.8 %", "–"],
        ["full", "1 of 2", "90.0 %", "–"],
    ]
    table = expense_table(results, "tfns")
    assert table[0][1:4] == ["Trained parameters", "Training time", "Tokens/s"] and "Peak memory" not in table[0]
    assert table[1] == ["base", "–", "–", "–", "1.60 ms", "–", "42.0 ms", "–"]
    assert table[2] == ["lora", "2.44 M", "1 min 22 s", "1,234", "1.60 ms", "1.00 ms", "42.0 ms", "1.2 s"]
    assert forgetting_table(results, "tfns") == [
        ["Method", "General text perplexity", "fpb accuracy"],
        ["base", "20.0", "–"],
        ["lora", "20.0 → 22.0 ± 1.4", "40.0 % → 65.0 ± 7.1 %"],
        ["full", "20.0 → 22.0 ± 1.4", "40.0 % → 65.0 ± 7.1 %"],
    ]
    whole = whole_table(results, "ner")
    assert len(whole) == 4 and {len(row) for row in whole} == {1 + 3 + 7 + 2}


def test_intervals_and_failures() -> None:
    results = made_results()
    assert significance_table(results) == [
        ["Method", "Data", "Metric", "Difference to lora", "95 % interval", "p"],
        ["base", "tfns", "Accuracy", "−42.0 points", "−50.0 to −30.0", "< 0.001"],
        ["full", "tfns", "Accuracy", "+8.0 points", "−1.0 to +17.0", "0.081"],
        ["full", "ner", "accuracy", "measured on other rows", "–", "–"],
    ]
    assert failed_table(results)[1] == ["tfns/full/seed-1", "1", "the loss is not finite"]
    empty = results | {"groups": [], "significance": [], "failed": []}
    assert quality_table(empty, "tfns") == whole_table(empty, "tfns") == significance_table(empty) == []


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (format_spread("accuracy", of(0.5, 0.5)), "50.0 ± 0.0 %"),
        (format_spread("loss", of(1.0, 2.0)), "1.500 ± 0.707"),
        (format_spread("perplexity", of(100.0, 200.0)), "150.0 ± 70.7"),
        (format_spread("loss", None), "–"),
        (format_difference("loss", -0.0001), "0.000"),
        (format_difference("loss", 0.25), "+0.250"),
        (format_difference("accuracy", -0.0001), "0.0"),
        (format_latency(0.000_05), "0.05 ms"),
        (format_p(1.0), "1.000"),
        (format_p(None), "–"),
    ],
)
def test_numbers_are_written_alike(made: str, wanted: str) -> None:
    assert made == wanted


def test_the_markdown_has_every_table(tmp_path: Path) -> None:
    results = made_results()
    results["failed"][0]["error"] = "a | b\nc"
    text = markdown(results)
    assert "## tfns" in text and "## ner" in text and "a \\| b c" in text and "- 2 seeds are few." in text
    assert "Not run yet: ner/full/seed-1." in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert write_comparison(tmp_path, results) == tmp_path / "report.html"
    assert (tmp_path / "table.md").read_text() == text


def test_the_page_has_every_part_and_fetches_nothing() -> None:
    page = Page(comparison_page(made_results()))
    sections = [values["id"] for tag, values in page.tags if tag == "h2" and "id" in values]
    assert sections == "quality against plots curves cost forgetting failed setup reproduce".split()
    text = " ".join(page.texts)
    for shown in (
        "Comparison on SmolLM2-135M",
        "82.0 ± 2.8 %",
        "1 cell failed",
        "the loss is not finite",
        "8 of 10 done",
    ):
        assert shown in text
    assert "deltaw compare c.yaml" in text and "2 seeds are few." in text
    # Quality against parameters and against time for both data sets, and one chart of loss curves.
    assert len([1 for tag, values in page.tags if tag == "svg" and values.get("role") == "img"]) == 5
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "form"}
    for _, values in page.tags:
        assert str(values.get("href") or "#").startswith(("#", "data:,")) and not values.get("src")
    done = made_results() | {"failed": [], "missing": []}
    assert "banner" not in comparison_page(done).split("<body>")[1]
    assert "has not run yet" in comparison_page(made_results() | {"failed": []})


def test_hostile_names_stay_text() -> None:
    names = list(HOSTILE)
    results = json.loads(json.dumps(made_results()))

    def poison(value: Any) -> Any:
        if isinstance(value, str) and value not in ("accuracy", "loss", "tfns", "ner", "base", "lora", "full"):
            return names[len(value) % len(names)]
        if isinstance(value, list):
            return [poison(item) for item in value]
        return {key: poison(item) for key, item in value.items()} if isinstance(value, dict) else value

    page = comparison_page(poison(results))
    assert {tag for tag, _ in Page(page).tags} == {tag for tag, _ in Page(comparison_page(made_results())).tags}
    page.encode()


def test_a_chart_places_points_where_they_are() -> None:
    marks = [
        Mark("base", 0, level=1.0),
        Mark("one", 1, [(1e3, 2.0, 0.5)]),
        Mark("two", 2, [(1e5, 3.0, None)]),
        Mark("none", 3),
    ]
    drawn = plot(marks, x_label="parameters", y_label="quality", summary="in words", log_x=True)
    assert drawn is not None
    places = [tuple(map(float, found)) for found in re.findall(r"translate\(([\d.]+) ([\d.]+)\)", drawn)][:2]
    level = float(re.search(r'class="level-k" x1="46" x2="428" y1="([\d.]+)"', drawn)[1])  # type: ignore[index]
    (x1, y1), (x2, y2) = places
    assert x1 < x2 and level - y1 == pytest.approx(y1 - y2, abs=0.2)
    bar = re.search(r'd="M([\d.]+) ([\d.]+)V([\d.]+)M', drawn)
    assert bar is not None and float(bar[3]) - float(bar[2]) == pytest.approx(y1 - y2, abs=0.2)
    assert "none" not in drawn and drawn.count("<li>") == 3
    assert plot([marks[0]], x_label="x", y_label="y", summary="") is None
    same = plot([Mark("a", 0, [(5.0, 1.0, None)])], x_label="x", y_label="y", summary="", log_x=True)
    assert same is not None and "nan" not in same


@pytest.mark.parametrize(("low", "high"), [(1, 1), (3, 3), (1e3, 1e9), (2442240, 134515008), (7, 8), (1e-3, 0.5)])
def test_logarithmic_ticks_enclose_the_values(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert ticks == sorted(ticks) and len(ticks) >= 2
    assert ticks[0] <= low * (1 + 1e-9) and ticks[-1] >= high * (1 - 1e-9)
    # None could be left out at either end.
    assert len(ticks) == 2 or (ticks[1] > low and ticks[-2] < high) or low == high


def test_many_methods_are_told_apart_by_colour_and_by_shape() -> None:
    marks = [Mark(f"m{index}", index, [(float(index + 1), 1.0, None)]) for index in range(12)]
    drawn = plot(marks, x_label="x", y_label="y", summary="")
    assert drawn is not None
    looks = re.findall(r'<g class="(k\d)"><g><title>[^<]*</title><path d="([^"]+)"', drawn)
    assert len(looks) == 12 and len(set(looks)) == 12


def test_results_are_not_changed_by_being_written() -> None:
    results = made_results()
    kept = copy.deepcopy(results)
    comparison_page(results)
    markdown(results)
    assert results == kept


def test_a_level_far_from_the_points_does_not_flatten_them() -> None:
    points = [(1.0, 84.0, 1.0), (2.0, 88.0, 1.0)]
    for level, drawn in ((80.0, True), (12.9, False)):
        made = str(plot([Mark("base", 0, level=level), Mark("lora", 1, points)], x_label="x", y_label="y", summary="s"))
        assert ('class="level-k"' in made.partition("<ul")[0]) == drawn
        assert ("base (12.9, off the chart)" in made) != drawn
