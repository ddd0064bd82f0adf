"""A comparison's charts as inline SVG: points with error bars, lines, and levels, told apart by colour and by shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from deltaw.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    drawn_path,
    nice_ticks,
    scaled_labels,
    thinned,
)
from deltaw.report.markup import Html, el
from deltaw.report.tables import format_short

TOP = 34
COLOURS = 8
DASHES = ("", "7 4", "2 4", "9 3 2 3")

#: Colours of methods, at least 3 to 1 against the page in light and in dark.
CSS = """
:root {
  --k0: #1a5fb4; --k1: #b34d00; --k2: #0b7a6a; --k3: #9141ac; --k4: #a51d2d; --k5: #7a6200;
  --k6: #3d3846; --k7: #c2297c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --k0: #82b6f7; --k1: #f2a663; --k2: #5fcdb8; --k3: #d29bf0; --k4: #ff8b82; --k5: #e3c95c;
    --k6: #c9c6d1; --k7: #ff9ccb;
  }
}
.legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 10px 0 0; padding: 0; font-size: 14px;
}
.notes { color: var(--muted); margin: 16px 0 0; padding-left: 1.2em; max-width: 80ch; font-size: 15px; }
.notes li { margin-bottom: 4px; }
.legend li { display: flex; align-items: center; gap: 6px; min-width: 0; overflow-wrap: anywhere; }
.legend svg { width: 30px; height: 14px; flex: none; overflow: visible; }
.mark-k { fill: var(--surface); stroke: var(--k); stroke-width: 2; }
.line-k, .bar-k { fill: none; stroke: var(--k); stroke-width: 2; stroke-linejoin: round; }
.bar-k { stroke-width: 1.5; opacity: 0.75; }
.level-k { stroke: var(--k); stroke-width: 1.5; stroke-dasharray: 2 4; }
"""
CSS += "".join(f".k{index} {{ --k: var(--k{index}); }}\n" for index in range(COLOURS))


@dataclass(frozen=True)
class Mark:
    """One method in a chart.

    Attributes:
        name: what the legend says.
        index: which colour and shape; the same in every chart of a page.
        points: (x, y, half the error bar's height or None).
        level: a y without an x, drawn across the chart.
        connected: the points are a line without marks.
    """

    name: str
    index: int
    points: list[tuple[float, float, float | None]] = field(default_factory=list)
    level: float | None = None
    connected: bool = False


def shape(index: int, x: float, y: float) -> Html:
    """A method's mark."""
    at = f"translate({x:.1f} {y:.1f})"
    drawn = ("M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", "M-4.5-4.5h9v9h-9z", "M0-6L5.5 4.5h-11z", "M0-6.5L6 0 0 6.5-6 0z")
    return el("path", d=drawn[_turn(index, len(drawn))], transform=at, cls="mark-k")


def _turn(index: int, count: int) -> int:
    """Which of a few shapes or dashes goes with a colour: another one each time the colours begin again."""
    return (index + index // COLOURS) % count


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose a range, with 2 and 5 between where there are few."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    start = max((i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9)), default=0)
    end = min((i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9)), default=len(ticks) - 1)
    if end == start:
        start, end = max(0, start - 1), min(len(ticks) - 1, end + 1)
    return ticks[start : end + 1]


def plot(
    marks: Sequence[Mark],
    *,
    x_label: str,
    y_label: str,
    summary: str,
    log_x: bool = False,
    x_format: Callable[[float], str] | None = None,
) -> Html | None:
    """Draws methods over common axes, with a legend beneath.

    Args:
        marks: the methods; those with nothing to draw are left out.
        x_label: the x axis' name, with its unit.
        y_label: the y axis' name, with its unit.
        summary: the chart in words, for those who cannot see it.
        log_x: the x axis is logarithmic; all x are above 0.
        x_format: how ticks of x are written; None means as numbers.

    Returns:
        The drawing and its legend, or None where no method has a point.
    """
    shown = [mark for mark in marks if mark.points or mark.level is not None]
    xs = [x for mark in shown for x, _, _ in mark.points]
    if not xs:
        return None
    ys = [y + side * (bar or 0.0) for mark in shown for _, y, bar in mark.points for side in (-1, 1)]
    shown = [_near(mark, min(ys), max(ys)) for mark in shown]
    ys += [mark.level for mark in shown if mark.level is not None]
    x_ticks = log_ticks(min(xs), max(xs)) if log_x else nice_ticks(min(xs), max(xs))
    y_ticks = nice_ticks(min(ys), max(ys))
    names, power = (None, "") if x_format is not None or log_x else scaled_labels(x_ticks)
    written = names or [(x_format or format_short)(tick) for tick in x_ticks]
    scale: Callable[[float], float] = math.log10 if log_x else float
    start, end = scale(x_ticks[0]), scale(x_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        # A margin keeps marks at the ends inside the frame.
        across = 0.03 + 0.94 * (scale(x) - start) / (end - start)
        return LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)

    drawing = _axes(x_ticks, written, y_ticks, place)
    drawing.append(el("text", f"{x_label} {power}".strip(), x=(LEFT + RIGHT) / 2, y=HEIGHT - 8, text_anchor="middle"))
    drawing.append(el("text", f"{y_label} {scaled_labels(y_ticks)[1]}".strip(), x=2, y=16))
    drawing += [_drawn(mark, place) for mark in shown]
    picture = el("svg", drawing, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=summary, cls="chart")
    return el("figure", picture, el("ul", [_legend(mark) for mark in shown], cls="legend"))


def _near(mark: Mark, low: float, high: float) -> Mark:
    """The mark without a level so far away that the points would all fall together; its name then says where it is."""
    reach = 2 * (high - low)
    if mark.level is None or low - reach <= mark.level <= high + reach:
        return mark
    return replace(mark, name=f"{mark.name} ({format_short(mark.level)}, off the chart)", level=None)


def _axes(
    x_ticks: Sequence[float],
    names: Sequence[str],
    y_ticks: list[float],
    place: Callable[[float, float], tuple[float, float]],
) -> list[Html]:
    parts = []
    for tick, name in zip(y_ticks, scaled_labels(y_ticks)[0], strict=True):
        y = f"{place(x_ticks[0], tick)[1]:.1f}"
        parts.append(el("line", cls="rule", x1=LEFT, x2=RIGHT, y1=y, y2=y))
        parts.append(el("text", name, x=LEFT - 8, y=y, dy="0.32em", text_anchor="end"))
    for tick, name in zip(x_ticks, names, strict=True):
        x = f"{place(tick, y_ticks[0])[0]:.1f}"
        parts.append(el("line", cls="axis", x1=x, x2=x, y1=BOTTOM, y2=BOTTOM + 4))
        parts.append(el("text", name, x=x, y=BOTTOM + 19, text_anchor="middle"))
    parts.append(el("line", cls="axis", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM))
    return parts


def _drawn(mark: Mark, place: Callable[[float, float], tuple[float, float]]) -> Html:
    parts: list[Html] = []
    if mark.level is not None:
        height = f"{place(_X_ANY, mark.level)[1]:.1f}"
        tip = el("title", f"{mark.name}: {mark.level:.4g}")
        parts.append(el("line", tip, cls="level-k", x1=LEFT, x2=RIGHT, y1=height, y2=height))
    if mark.connected:
        kept = thinned([(x, y) for x, y, _ in mark.points])
        line = drawn_path([place(x, y) for x, y in kept if y is not None])
        tip = el("title", mark.name)
        parts.append(
            el("path", tip, d=line, cls="line-k", stroke_dasharray=DASHES[_turn(mark.index, len(DASHES))] or None)
        )
        return el("g", parts, cls=f"k{mark.index % COLOURS}")
    for x, y, bar in mark.points:
        cx, cy = place(x, y)
        if bar:
            (_, top), (_, bottom) = place(x, y + bar), place(x, y - bar)
            ends = f"M{cx:.1f} {top:.1f}V{bottom:.1f}M{cx - 4:.1f} {top:.1f}h8M{cx - 4:.1f} {bottom:.1f}h8"
            parts.append(el("path", d=ends, cls="bar-k"))
        tip = el("title", f"{mark.name}: {y:.4g}{f' ± {bar:.2g}' if bar else ''} at {x:,.4g}")
        parts.append(el("g", tip, shape(mark.index, cx, cy)))
    return el("g", parts, cls=f"k{mark.index % COLOURS}")


#: An x of a level alone: any one that both scales take.
_X_ANY = 1.0


def _legend(mark: Mark) -> Html:
    if mark.level is not None and not mark.points:
        sample = el("line", cls="level-k", x1=0, x2=30, y1=7, y2=7)
    elif mark.connected:
        dash = DASHES[_turn(mark.index, len(DASHES))] or None
        sample = el("path", d="M0 7h30", cls="line-k", stroke_dasharray=dash)
    else:
        sample = shape(mark.index, 15, 7)
    swatch = el("svg", sample, viewBox="0 0 30 14", aria_hidden="true", cls=f"k{mark.index % COLOURS}")
    return el("li", swatch, el("bdi", mark.name))
