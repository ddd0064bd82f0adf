"""Line charts as inline SVG. Colours are the page's CSS variables: one drawing serves light, dark and paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from deltaw.report.markup import Html, el, join

WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 46, 428, 50, 230
MOST_POINTS = 400
FEW_POINTS = 12
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: what the legend says.
        points: (x, y) by ascending x; a y of None leaves a gap.
        dashed: dashes, and a mark on every point, tell it from its neighbour without colour.
    """

    name: str
    points: list[tuple[float, float | None]]
    dashed: bool = False


def nice_ticks(low: float, high: float, *, count: int = 5, smallest: float = 0.0) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high] in about `count` intervals."""
    if high - low <= max(abs(low), abs(high), 1e-100) * 1e-9:
        room = max(abs(low) * 0.1, smallest)
        room = room if room > 1e-100 else 1.0
        low, high = low - room, high + room
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = max(smallest, next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def scaled_labels(ticks: list[float]) -> tuple[list[str], str]:
    """The ticks' labels, and the power of ten that they are multiples of ("" for one)."""
    top = max(abs(tick) for tick in ticks)
    power = math.floor(math.log10(top) + 1e-9) if top and not 1e-2 <= top < 1e5 else 0
    step = (ticks[1] - ticks[0]) / 10.0**power
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    labels = [f"{tick / 10.0**power:,.{digits}f}".replace("-", "\N{MINUS SIGN}") for tick in ticks]
    return labels, f"× 10{str(power).translate(SUPERSCRIPT)}" if power else ""


def thinned(points: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """About `MOST_POINTS` points at most: each bucket keeps its ends, its lowest and its highest; spikes stay."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / (MOST_POINTS // 4))
    kept: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        measured = sorted((y, i) for i, (_, y) in enumerate(bucket) if y is not None)
        gap = next((i for i, (_, y) in enumerate(bucket) if y is None), 0)
        chosen = {0, len(bucket) - 1, gap} | ({measured[0][1], measured[-1][1]} if measured else set())
        kept += [bucket[i] for i in sorted(chosen)]
    return kept


def drawn_path(places: list[tuple[float, float] | None]) -> str:
    """SVG path commands; None lifts the pen."""
    commands, pen = [], "M"
    for place in places:
        if place is None:
            pen = "M"
        else:
            commands.append(f"{pen}{place[0]:.1f} {place[1]:.1f}")
            pen = "L"
    return "".join(commands)


def line_chart(
    series: list[Series], *, x_label: str, y_label: str, summary: str, from_zero: bool = False
) -> Html | None:
    """Draws lines over common axes.

    Args:
        series: the lines; those without a measured point are left out.
        x_label: the x axis' name; x values are whole numbers.
        y_label: the y axis' name, with its unit.
        summary: the chart in words, for those who cannot see it.
        from_zero: the y axis starts at zero.

    Returns:
        An `<svg>` element, or None where nothing was measured.
    """
    lines = [line for line in series if any(y is not None for _, y in line.points)]
    if not lines:
        return None
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points if y is not None]
    first, last = min(xs), max(xs)
    x_ticks = nice_ticks(first, last, smallest=1.0)
    # The curve should fill the width: no tick beyond its end.
    if len(inner := [x for x in x_ticks if x <= last]) > 1 and first < last:
        x_ticks = inner
    x_end = max(last, x_ticks[-1])
    y_ticks = nice_ticks(min(0.0, *ys) if from_zero else min(ys), max(ys))
    x_names, x_power = scaled_labels(x_ticks)
    y_names, y_power = scaled_labels(y_ticks)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_end - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)

    parts: list[Html] = []
    for tick, name in zip(y_ticks, y_names, strict=True):
        y = f"{place(x_ticks[0], tick)[1]:.1f}"
        parts.append(el("line", cls="rule", x1=LEFT, x2=RIGHT, y1=y, y2=y))
        parts.append(el("text", name, x=LEFT - 8, y=y, dy="0.32em", text_anchor="end"))
    for tick, name in zip(x_ticks, x_names, strict=True):
        x = f"{place(tick, y_ticks[0])[0]:.1f}"
        parts.append(el("line", cls="axis", x1=x, x2=x, y1=BOTTOM, y2=BOTTOM + 4))
        parts.append(el("text", name, x=x, y=BOTTOM + 19, text_anchor="middle"))
    parts.append(el("line", cls="axis", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM))
    middle = (LEFT + RIGHT) / 2
    parts.append(el("text", f"{x_label} {x_power}".strip(), x=middle, y=HEIGHT - 8, text_anchor="middle"))
    parts.append(el("text", f"{y_label} {y_power}".strip(), x=2, y=34))
    legend_x = 2.0
    for index, line in enumerate(lines):
        parts.append(drawn_series(line, index, legend_x, place, x_label))
        legend_x += 56 + 8.5 * len(line.name)
    return el("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=summary, cls="chart")


def drawn_series(
    line: Series, index: int, legend_x: float, place: Callable[[float, float], tuple[float, float]], x_label: str
) -> Html:
    """A line, its points with their tooltips, and its entry in the legend."""
    points = thinned(line.points)
    marked = line.dashed or len(points) <= FEW_POINTS
    path = drawn_path([None if y is None else place(x, y) for x, y in points])
    parts = [el("path", d=path, cls="line")]
    for x, y in points:
        if y is not None:
            cx, cy = place(x, y)
            tip = el("title", f"{line.name} {y:.4g} at {x_label} {x:,.0f}")
            parts.append(el("circle", tip, cx=f"{cx:.1f}", cy=f"{cy:.1f}", r=3, cls="dot" if marked else "dot faint"))
    parts.append(el("path", d=f"M{legend_x:.0f} 10h24", cls="line"))
    if marked:
        parts.append(el("circle", cx=f"{legend_x + 12:.0f}", cy=10, r=3, cls="dot"))
    parts.append(el("text", line.name, x=f"{legend_x + 30:.0f}", y=14, cls="name"))
    return el(
        "g",
        join(parts),
        cls=f"series s{index % 3}{' dashed' if line.dashed else ' dense' if len(points) > 150 else ''}",
    )
