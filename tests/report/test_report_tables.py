from __future__ import annotations

import math
from typing import Any

import pytest

from deltaw.report import cost_table, data_table, headline, metrics_table, sites_table
from deltaw.report.tables import (
    MISSING,
    format_bytes,
    format_change,
    format_count,
    format_metric,
    format_seconds,
    format_share,
    format_short,
    format_value,
    main_metric,
    number,
    ranges,
    split_name,
)


@pytest.mark.parametrize(
    ("write", "value", "expected"),
    [
        (format_bytes, 0, "0 B"),
        (format_bytes, 1023, "1023 B"),
        (format_bytes, 1024, "1.00 KiB"),
        (format_bytes, 1024**2 - 1, "1.00 MiB"),
        (format_bytes, 9_800_000, "9.35 MiB"),
        (format_bytes, 2_214_592_512, "2.06 GiB"),
        (format_bytes, 5 * 1024**5, "5,120 TiB"),
        (format_seconds, 0, "0 ms"),
        (format_seconds, 0.85, "850 ms"),
        (format_seconds, 42.26, "42.3 s"),
        (format_seconds, 59.97, "1 min 00 s"),
        (format_seconds, 100.0, "1 min 40 s"),
        (format_seconds, 3599.6, "1 h 00 min"),
        (format_seconds, 7500, "2 h 05 min"),
        (format_count, 2_442_240, "2,442,240"),
        (format_count, -3, "−3"),
        (format_short, 9_999, "9,999"),
        (format_short, 12_345, "12.3 k"),
        (format_short, 999_600, "1.00 M"),
        (format_short, 134_515_008, "135 M"),
        (format_short, 8_030_261_248, "8.03 B"),
        (format_share, 0.0178, "1.78 %"),
        (format_share, 0.00054, "0.054 %"),
        (format_share, 1, "100.0 %"),
        (format_share, 0, "0.0 %"),
    ],
)
def test_units(write: Any, value: float, expected: str) -> None:
    assert write(value) == expected


@pytest.mark.parametrize("write", [format_bytes, format_seconds, format_count, format_short, format_share])
@pytest.mark.parametrize("value", [None, math.nan, math.inf, "12", True, [], 10**400])
def test_what_is_no_number_is_a_dash(write: Any, value: Any) -> None:
    assert number(value) is None
    assert write(value) == MISSING


def test_values_take_the_unit_of_their_name() -> None:
    values = {"train_s": 100, "tokens_per_s": 426.24, "peak_memory_bytes": 2048, "share": 0.5, "steps": 1000}
    written = [format_value(name, value) for name, value in values.items()]
    assert written == ["1 min 40 s", "426", "2.00 KiB", "50.0 %", "1,000"]


@pytest.mark.parametrize(
    ("name", "before", "after", "expected"),
    [
        ("accuracy", 0.515, 0.83, "+31.5 points (better)"),
        ("accuracy", 0.83, 0.515, "−31.5 points (worse)"),
        ("eval_loss", 1.912, 0.402, "−1.510 (better)"),
        ("perplexity", 18.2, 24.5, "+6.3 (worse)"),
        ("macro_auroc", 0.6, 0.7, "+0.100 (better)"),
        ("accuracy", 0.5, 0.50001, "no change"),
        ("accuracy", None, 0.5, MISSING),
        ("loss", 1.0, math.nan, MISSING),
    ],
)
def test_change(name: str, before: Any, after: Any, expected: str) -> None:
    assert format_change(name, before, after) == expected


def test_metrics_table(run: dict[str, Any]) -> None:
    assert metrics_table(run) == [
        ["Metric", "Before", "After", "Change", "Majority class", "TF-IDF + logistic regression"],
        ["Accuracy", "51.5 %", "83.0 %", "+31.5 points (better)", "44.5 %", "70.5 %"],
        ["Macro F1", "40.2 %", "81.7 %", "+41.5 points (better)", "20.5 %", "66.8 %"],
        ["Macro AUROC", "0.631", "0.914", "+0.283 (better)", MISSING, "0.842"],
        ["Perplexity", "6.767", "1.495", "−5.272 (better)", MISSING, MISSING],
        ["Loss", "1.912", "0.402", "−1.510 (better)", MISSING, MISSING],
    ]


def test_metrics_table_leaves_out_what_was_not_measured(run: dict[str, Any]) -> None:
    run["metrics"] = {"before": {"loss": math.nan}, "after": {"loss": 2.9, "perplexity": 18.2, "tokens": 90}}
    assert metrics_table(run) == [["Metric", "After"], ["Perplexity", "18.2"], ["Loss", "2.900"]]
    assert main_metric(run) == "perplexity"
    for nothing in ({}, {"metrics": None}, {"metrics": {"after": []}}, {"metrics": {"after": {"loss": None}}}):
        assert metrics_table(nothing) == []
        assert main_metric(nothing) is None


def test_entities_come_first_where_tokens_are_tagged(run: dict[str, Any]) -> None:
    run["task"] = "token-classification"
    run["metrics"] = {
        "after": {"accuracy": 0.97, "precision": 0.6, "recall": 0.5, "f1": 0.545},
        "baselines": {"tag_dictionary": {"precision": 0.4, "recall": 0.3, "f1": 0.343}},
    }
    table = metrics_table(run)
    assert table[0] == ["Metric", "After", "Tag dictionary"]
    assert [row[0] for row in table[1:]] == ["Entity F1", "Entity precision", "Entity recall", "Accuracy"]
    assert main_metric(run) == "f1"


def test_sites_are_grouped_by_kind(run: dict[str, Any]) -> None:
    table = sites_table(run)
    assert table[0] == ["Projection", "Layers", "Sites", "Kind", "Shape (out × in)", "r", "Scale", "Parameters"]
    assert len(table) == 1 + 7
    assert table[1] == ["self_attn.q_proj", "0–29", "30", "linear", "576 × 576", "8", "2", "276,480"]
    listed = sites_table(run, every=True)
    assert len(listed) == 1 + 210
    assert listed[1] == ["model.layers.0.self_attn.q_proj", "linear", "576 × 576", "8", "2", "9,216"]
    total = sum(int(row[-1].replace(",", "")) for row in table[1:])
    assert total == sum(int(row[-1].replace(",", "")) for row in listed[1:]) == run["method"]["trainable_parameters"]


def test_sites_of_different_rank_or_stack_stay_apart() -> None:
    def site(name: str, r: int = 4) -> dict[str, Any]:
        return {"name": name, "kind": "linear", "shape": [8, 8], "r": r, "scale": 1.0, "parameters": 16 * r}

    names = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q", "lm_head"]
    names += [f"m.layers.{layer}.mlp.experts.{expert}.up" for layer in (0, 2) for expert in (0, 1)]
    sites = [*map(site, names), site("m.layers.1.mlp.experts.0.up", r=8)]
    rows = [row[:3] + row[5:6] for row in sites_table({"method": {"sites": sites}})[1:]]
    assert rows == [
        ["encoder.block.*.layer.0.SelfAttention.q", "0", "1", "4"],
        ["decoder.block.*.layer.0.SelfAttention.q", "0", "1", "4"],
        ["lm_head", MISSING, "1", "4"],
        ["mlp.experts.*.up", "0, 2", "4", "4"],
        ["mlp.experts.*.up", "1", "1", "8"],
    ]


def test_names_and_ranges() -> None:
    assert split_name("model.layers.12.self_attn.q_proj") == ("model.layers", 12, "self_attn.q_proj")
    assert split_name("0.weight") == ("", 0, "weight")
    assert split_name("lm_head") == ("", None, "lm_head")
    assert ranges([9, 0, 1, 2, 3, 7, 10, 11, 11]) == "0–3, 7, 9–11"


def test_data_and_cost(run: dict[str, Any]) -> None:
    table = data_table(run)
    names = ["Split", "Rows", "Tokens", "Tokens with loss", "Truncated", "Dropped", "Empty", "Bad", "Layout", "Source"]
    assert table[0] == names
    assert table[1] == ["train", "800", "30,112", "1,611", "3", "0", "0", "0", "label", "reviews-train.jsonl"]
    assert cost_table(run)[1:3] == [["Training time", "2 min 21 s"], ["Evaluation time", "23.9 s"]]
    run["data"]["test"] |= {"unmatched": 2, "conflicts": 0}
    found = data_table(run)
    assert "Unmatched" in found[0] and "Conflicts" not in found[0]
    assert [row[found[0].index("Unmatched")] for row in found[1:]] == [MISSING, MISSING, "2"]
    assert data_table({"data": {"train": {}, "eval": None}}) == []
    assert cost_table({"cost": {"train_s": None}}) == []


def test_headline(run: dict[str, Any]) -> None:
    assert headline(run) == [
        ("Trainable parameters", "2.44 M", "1.78 % of 137 M"),
        ("Training time", "2 min 21 s", "50 steps"),
        ("Tokens per second", "426", ""),
        ("Peak memory", "2.06 GiB", "cpu"),
        ("Adapter size", "9.35 MiB", "on disk"),
    ]
    assert headline({}) == []


def test_metrics_keep_their_digits() -> None:
    written = [format_metric("loss", 0.4), format_metric("perplexity", 24.53), format_metric("loss", 1e-5)]
    assert written == ["0.400", "24.5", "1e−05"]
    assert format_metric("accuracy", 84.0) == "84.0"
