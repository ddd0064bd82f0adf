from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.report.charts import BOTTOM, LEFT, MOST_POINTS, RIGHT, TOP, Series, line_chart, nice_ticks, thinned

numbers = st.floats(min_value=-1e99, max_value=1e99, allow_nan=False)


@given(low=numbers, high=numbers, smallest=st.sampled_from([0.0, 1.0]))
def test_ticks_enclose_the_range_in_few_even_steps(low: float, high: float, smallest: float) -> None:
    low, high = min(low, high), max(low, high)
    ticks = nice_ticks(low, high, smallest=smallest)
    assert 2 <= len(ticks) <= 12
    steps = [b - a for a, b in pairwise(ticks)]
    assert all(step > 0 for step in steps)
    slack = 1e-6 * steps[0]
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack


def test_ticks_are_round() -> None:
    assert nice_ticks(0.38, 1.78) == pytest.approx([0, 0.5, 1, 1.5, 2])
    assert nice_ticks(0, 50, smallest=1) == [0, 10, 20, 30, 40, 50]
    assert nice_ticks(1, 3, smallest=1) == [1, 2, 3]
    assert nice_ticks(0, 2e-4) == pytest.approx([0, 5e-5, 1e-4, 1.5e-4, 2e-4])


def draw(*series: Series) -> ElementTree.Element:
    svg = line_chart(list(series), x_label="step", y_label="loss (nats)", summary='falls & "rises"')
    assert svg is not None
    return ElementTree.fromstring(svg)


def test_a_line_lies_where_its_values_say() -> None:
    svg = draw(Series("train loss", [(0, 0.0), (50, 1.0), (100, 2.0)]))
    path = next(group for group in svg.iter("g")).find("path")
    assert path is not None
    middle = f"{(LEFT + RIGHT) / 2:.1f} {(TOP + BOTTOM) / 2:.1f}"
    assert path.get("d") == f"M{LEFT:.1f} {BOTTOM:.1f}L{middle}L{RIGHT:.1f} {TOP:.1f}"
    assert [tip.text for tip in svg.iter("title")][1] == "train loss 1 at step 50"
    assert svg.get("role") == "img" and svg.get("aria-label") == 'falls & "rises"'


def test_a_gap_lifts_the_pen() -> None:
    svg = draw(Series("train loss", [(0, 1.0), (1, 2.0), (2, None), (3, 1.5), (4, 1.0)]))
    path = next(group for group in svg.iter("g")).find("path")
    assert path is not None and re.sub(r"[^ML]", "", path.get("d", "")) == "MLML"
    assert "NaN" not in ElementTree.tostring(svg, encoding="unicode")


def test_series_are_told_apart_by_more_than_colour() -> None:
    svg = draw(Series("train loss", [(0, 1.0), (1, 2.0)]), Series("eval loss", [(1, 1.5)], dashed=True))
    assert [group.get("class") for group in svg.iter("g")] == ["series s0", "series s1 dashed"]
    texts = [text.text for text in svg.iter("text")]
    assert {"train loss", "eval loss", "step", "loss (nats)"} <= set(texts)


def test_small_values_are_scaled() -> None:
    svg = line_chart(
        [Series("rate", [(0, 0.0), (9, 2e-4)])], x_label="step", y_label="rate", summary="", from_zero=True
    )
    assert svg is not None
    texts = [text.text for text in ElementTree.fromstring(svg).iter("text")]
    assert "rate × 10⁻⁴" in texts and "1.5" in texts


def test_nothing_measured_is_no_chart() -> None:
    for series in ([], [Series("a", [])], [Series("a", [(1, None)])]):
        assert line_chart(series, x_label="", y_label="", summary="") is None


@given(st.lists(st.tuples(st.floats(0, 1e99), st.none() | numbers), min_size=1, max_size=20))
def test_every_coordinate_is_finite_and_inside(points: list[tuple[float, float | None]]) -> None:
    svg = line_chart([Series("a", sorted(points, key=lambda p: p[0]))], x_label="x", y_label="y", summary="")
    if svg is None:
        assert all(y is None for _, y in points)
        return
    for dot in ElementTree.fromstring(svg).iter("circle"):
        assert LEFT - 0.1 <= float(dot.get("cx", "nan")) <= RIGHT + 0.1 or dot.get("cy") == "10"
        assert TOP - 0.1 <= float(dot.get("cy", "nan")) <= BOTTOM + 0.1 or dot.get("cy") == "10"


def test_thinning_keeps_spikes_ends_and_gaps() -> None:
    points: list[tuple[float, float | None]] = [(i, math.sin(i / 500)) for i in range(20_000)]
    points[7_777] = (7_777, 50.0)
    points[12_345] = (12_345, None)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS + 10
    assert {points[0], points[-1], points[7_777], points[12_345]} <= set(kept)
    assert kept == sorted(kept, key=lambda point: point[0])
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]
