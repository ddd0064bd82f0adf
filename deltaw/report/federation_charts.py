"""A federation's charts as inline SVG: a line a silo over the rounds, beside the line of all of them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deltaw.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, drawn_path, nice_ticks, scaled_labels, thinned
from deltaw.report.comparison_charts import COLOURS, TOP, shape
from deltaw.report.comparison_charts import CSS as MARKS_CSS
from deltaw.report.markup import Html, el

#: A longer name of an axis would leave the drawing.
MOST_LETTERS = 44
#: With more points than these a mark stands at a line's end only.
FEW_POINTS = 12

CSS = (
    MARKS_CSS
    + """
.all { --k: var(--ink); }
.rest { --k: var(--bar); }
.all .line-k { stroke-width: 3.5; }
.rest .line-k { stroke-width: 1; opacity: 0.75; }
.line-k { stroke-linecap: round; }
.card > h3:not(:first-child), .card > .said { margin-top: 18px; }
section > :not(h2) + .card, section > :not(h2) + .grid { margin-top: 16px; }
.bars caption { padding-bottom: 4px; }
.statement { font-size: 18px; line-height: 1.45; font-weight: 600; }
.over { color: var(--bad); font-weight: 650; }
"""
)


@dataclass(frozen=True)
class Line:
    """One line over the rounds.

    Attributes:
        name: what the legend and the tooltip say.
        points: (round, value) by ascending round; a value of None leaves a gap.
        look: which colour and mark; "all" for the silos together, "rest" for a thin line without an entry of its own.
    """

    name: str
    points: list[tuple[float, float | None]]
    look: int | str

    @property
    def css(self) -> str:
        """The class that gives the colour."""
        return f"k{self.look % COLOURS}" if isinstance(self.look, int) else self.look


@dataclass(frozen=True)
class Level:
    """A value without a round, drawn across the chart."""

    name: str
    value: float


def silos_chart(
    lines: Sequence[Line], *, y_label: str, summary: str, from_zero: bool = False, level: Level | None = None
) -> Html | None:
    """Draws lines over the rounds, with a legend beneath that wraps.

    Args:
        lines: those without a measured point are left out.
        y_label: the y axis' name, with its unit.
        summary: the chart in words, for those who cannot see it.
        from_zero: the y axis starts at zero.
        level: a target.

    Returns:
        The drawing and its legend, or None where nothing was measured.
    """
    # What is drawn later lies above: thin lines first, the one of all silos last.
    order = {"rest": 0, "all": 2}
    shown = sorted(
        (line for line in lines if any(y is not None for _, y in line.points)),
        key=lambda line: order.get(str(line.look), 1),
    )
    if not shown:
        return None
    xs = [x for line in shown for x, y in line.points if y is not None]
    ys = [y for line in shown for _, y in line.points if y is not None] + ([level.value] if level else [])
    x_ticks = nice_ticks(min(xs), max(xs), smallest=1.0)
    if len(inner := [x for x in x_ticks if min(xs) <= x <= max(xs)]) > 1:
        x_ticks = inner
    y_ticks = nice_ticks(min(0.0, *ys) if from_zero else min(ys), max(ys))
    start, end = min(x_ticks[0], *xs), max(x_ticks[-1], *xs)

    def place(x: float, y: float) -> tuple[float, float]:
        across = 0.02 + 0.95 * (x - start) / (end - start)
        return LEFT + across * (RIGHT - LEFT), BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (BOTTOM - TOP)

    drawing = _axes(x_ticks, y_ticks, y_label, place)
    if level:
        y = f"{place(start, level.value)[1]:.1f}"
        tip = el("title", f"{level.name}: {level.value:.4g}")
        drawing.append(el("g", el("line", tip, cls="level-k", x1=LEFT, x2=RIGHT, y1=y, y2=y), cls="all"))
    drawing += [_drawn(line, place) for line in shown]
    picture = el("svg", drawing, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=summary, cls="chart")
    return el("figure", picture, el("ul", _legend(shown, level), cls="legend"))


def _axes(
    x_ticks: list[float], y_ticks: list[float], y_label: str, place: Callable[[float, float], tuple[float, float]]
) -> list[Html]:
    parts = []
    x_names, _ = scaled_labels(x_ticks)
    y_names, y_power = scaled_labels(y_ticks)
    for tick, name in zip(y_ticks, y_names, strict=True):
        y = f"{place(x_ticks[0], tick)[1]:.1f}"
        parts.append(el("line", cls="rule", x1=LEFT, x2=RIGHT, y1=y, y2=y))
        parts.append(el("text", name, x=LEFT - 8, y=y, dy="0.32em", text_anchor="end"))
    for tick, name in zip(x_ticks, x_names, strict=True):
        x = f"{place(tick, y_ticks[0])[0]:.1f}"
        parts.append(el("line", cls="axis", x1=x, x2=x, y1=BOTTOM, y2=BOTTOM + 4))
        parts.append(el("text", name, x=x, y=BOTTOM + 19, text_anchor="middle"))
    parts.append(el("line", cls="axis", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM))
    parts.append(el("text", "round", x=(LEFT + RIGHT) / 2, y=HEIGHT - 8, text_anchor="middle"))
    short = y_label if len(y_label) <= MOST_LETTERS else f"{y_label[: MOST_LETTERS - 1]}…"
    parts.append(el("text", f"{short} {y_power}".strip(), x=2, y=16))
    return parts


def _drawn(line: Line, place: Callable[[float, float], tuple[float, float]]) -> Html:
    points = thinned(line.points)
    measured = [(x, y) for x, y in points if y is not None]
    places: list[tuple[float, float] | None] = []
    for i, (x, y) in enumerate(points):
        alone = all(not 0 <= j < len(points) or points[j][1] is None for j in (i - 1, i + 1))
        # A line of no length with round ends is a dot, which a point between two gaps would otherwise lack.
        places += [None if y is None else place(x, y)] * (2 if alone else 1)
    tip = el("title", f"{line.name}: {measured[-1][1]:.4g} in round {measured[-1][0]:,.0f}")
    parts = [el("path", tip, d=drawn_path(places), cls="line-k")]
    if isinstance(line.look, int):
        marked = measured if len(measured) <= FEW_POINTS else measured[-1:]
        for x, y in marked:
            said = el("title", f"{line.name}: {y:.4g} in round {x:,.0f}")
            parts.append(el("g", said, shape(line.look, *place(x, y))))
    return el("g", parts, cls=line.css)


def _legend(lines: Sequence[Line], level: Level | None) -> list[Html]:
    named = sorted((line for line in lines if line.look != "rest"), key=lambda line: line.look != "all")
    entries = []
    for line in named:
        sample = [el("path", d="M0 7h30", cls="line-k")]
        if isinstance(line.look, int):
            sample.append(shape(line.look, 15, 7))
        entries.append(_entry(sample, line.name, line.css))
    rest = sum(line.look == "rest" for line in lines)
    if rest:
        entries.append(
            _entry([el("path", d="M0 7h30", cls="line-k")], f"{rest} other silo{'s' if rest > 1 else ''}", "rest")
        )
    if level:
        entries.append(_entry([el("line", cls="level-k", x1=0, x2=30, y1=7, y2=7)], level.name, "all"))
    return entries


def _entry(sample: list[Html], name: str, css: str) -> Html:
    swatch = el("svg", sample, viewBox="0 0 30 14", aria_hidden="true", cls=css)
    return el("li", swatch, el("bdi", name))
