"""A federation's page, by round: quality, drift between the silos, bytes on the wire."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from deltaw.report.charts import Series, line_chart
from deltaw.report.federation_charts import Line, silos_chart
from deltaw.report.federation_tables import (
    MANY,
    MOST_COLOURED,
    Federation,
    Points,
    brief,
    by_round,
    by_silo,
    coloured,
    last,
    medians,
    over_rounds,
    quality_table,
    rounds_table,
    saving,
    sent,
    short,
    total,
)
from deltaw.report.markup import Html, el, join
from deltaw.report.page import card, folded, table
from deltaw.report.tables import LOWER_IS_BETTER, PERCENT, format_bytes, format_metric

UNSEEN = "Under secure aggregation the server sees only the sum of the updates: there are no norms of single silos."


def lines_of(fed: Federation, found: dict[str, Points]) -> list[Line]:
    """Lines of silos, each with its colour on this page."""
    looks = coloured(fed)
    return [Line(brief(silo), points, looks.index(silo) if silo in looks else "rest") for silo, points in found.items()]


def bars(caption: str, rows: Sequence[tuple[str, float, str]], *, strong: str = "") -> Html:
    """Horizontal bars with their numbers.

    Args:
        caption: what the bars show, and where they end.
        rows: (name, length from 0 to 1, the number as text).
        strong: the row of this name stands out.
    """
    lines = []
    for name, length, written in rows:
        fill = el("span", cls="fill", style=f"--w:{min(1.0, max(0.0, length)) * 100:.2f}%")
        track = el("td", el("span", fill, cls="track", aria_hidden="true"))
        cells = [el("th", el("bdi", name), scope="row"), track, el("td", written, cls="num")]
        lines.append(el("tr", cells, cls="after" if name == strong else None))
    return el("table", el("caption", caption), el("tbody", lines), cls="bars")


def _extremes(found: dict[str, Points], write: Callable[[Any], str]) -> str:
    """The highest and the lowest of the lines' ends, in a sentence."""
    ends = {silo: value for silo, points in found.items() if (value := last(points)) is not None}
    if not ends:
        return ""
    high, low = max(ends, key=lambda silo: ends[silo]), min(ends, key=lambda silo: ends[silo])
    if len(ends) == 1:
        return f"{brief(high)} ends at {write(ends[high])}."
    top, bottom = f"{brief(high)} ends highest ({write(ends[high])})", f"{brief(low)} lowest ({write(ends[low])})"
    return f"Of {len(ends)} silos {top} and {bottom}."


def quality_section(fed: Federation) -> Html | None:
    """The main metric of the shared test set, and each silo's on its own rows, by round."""
    if fed.main is None:
        return None
    name = fed.main
    scale = 100.0 if PERCENT.search(name) else 1.0
    together, silos = by_round(fed, "metrics", name), by_silo(fed, "metrics", name)

    def scaled(points: Points) -> Points:
        return [(x, None if y is None else y * scale) for x, y in points]

    def write(value: Any) -> str:
        return format_metric(name, value)

    lines = [Line("shared test set", scaled(together), "all")]
    lines += lines_of(fed, {silo: scaled(points) for silo, points in silos.items()})
    words = _quality_in_words(fed, together, silos)
    unit = f"{' (%)' if scale > 1 else ''}{', lower is better' if LOWER_IS_BETTER.search(name) else ''}"
    summary = f"Line chart of {fed.name} by round. {words}"
    drawn = silos_chart(lines, y_label=f"{fed.name}{unit}", summary=summary)
    if drawn is None:
        return None
    tables = [folded(f"Every round ({len(fed.rounds)})", table(rounds_table(fed), "What each round came to"))]
    if silos:
        rows = table(over_rounds(silos, write), "On each silo's own rows")
        tables.append(folded(f"{fed.name} by round and silo", rows))
    said: list[Any] = [el("p", words, cls="muted")]
    if rows_ := quality_table(fed):
        grid = table(rows_, f"{fed.name} of the adapter on each silo's own rows", strong="After")
        if len(rows_) > MANY + 1:
            tables.append(folded(f"{fed.name} by silo ({len(rows_) - 1})", grid))
        else:
            said.append(grid)
    return join(card(el("div", drawn, el("div", said), cls="grid")), tables)


def _quality_in_words(fed: Federation, together: Points, silos: dict[str, Points]) -> str:
    name, said = fed.main or "", []
    measured = [(x, y) for x, y in together if y is not None]
    if measured:
        pick = min if LOWER_IS_BETTER.search(name) else max
        (x0, y0), (x1, y1), (x, best) = measured[0], measured[-1], pick(measured, key=lambda point: point[1])
        said.append(
            f"On the shared test set {format_metric(name, y0)} in round {x0:,.0f}, {format_metric(name, y1)} in round "
            f"{x1:,.0f}, best {format_metric(name, best)} in round {x:,.0f}."
        )
    if not silos:
        return " ".join([*said, "No silo measured the adapter on rows of its own."])
    said.append(
        f"On their own rows: {_extremes(silos, lambda value: format_metric(name, value)).replace('Of', 'of', 1)}"
    )
    if (count := len(coloured(fed))) < len(fed.silos):
        said.append(f"{count} silos have a colour, the best and the worst at the end; the others are thin.")
    return " ".join(said)


#: By key of a silo's entry: the box's title, the axis, whether it starts at zero, what the number means.
OF_UPDATES = (
    ("cosine", "Cosine with the mean update", "cosine", False, "1 is the mean's direction; below 0 against it."),
    ("update_norm", "Norm of the update", "Frobenius norm", True, "How much a silo changed the adapter in a round."),
)


def drift_section(fed: Federation) -> Html:
    """How far the silos' updates are from each other."""
    boxes = [box for box in (_of_updates(fed, *row) for row in OF_UPDATES) if box is not None]
    drift = _drift(fed)
    if boxes or drift is not None:
        return join(drift, el("div", boxes, cls="grid") if boxes else None)
    return card(el("p", UNSEEN if fed.secure else "No round recorded drift, norms or cosines."))


def _drift(fed: Federation) -> Html | None:
    """A chart of the drift."""
    drift = by_round(fed, "drift")
    if not drift:
        return None
    (first, begun), (end, reached) = drift[0], drift[-1]
    said = f"Drift is {short(begun)} in round {first:,.0f} and {short(reached)} in round {end:,.0f}."
    drawn = silos_chart(
        [Line("drift", drift, "all")],
        y_label="mean distance / norm of the mean",
        summary=f"Line chart of drift by round. {said}",
        from_zero=True,
    )
    meaning = (
        "The distance of a silo's update from the mean update, as a share of the mean's norm, on average over silos: "
        "0 where all agree; above 1 they differ by more than they share."
    )
    return card(el("div", drawn, el("div", el("p", said), el("p", meaning, cls="muted")), cls="grid"))


def _of_updates(fed: Federation, key: str, title: str, axis: str, from_zero: bool, meaning: str) -> Html | None:
    """A chart of one number by silo and round, what it means, and its numbers folded."""
    found = by_silo(fed, key)
    ends = _extremes(found, short)
    summary = f"Line chart: {title.lower()} by round and silo. {ends}"
    lines = lines_of(fed, found)
    if len(found) > MOST_COLOURED:
        lines.append(Line("median of all silos", medians(found), "all"))
    drawn = silos_chart(lines, y_label=axis, summary=summary, from_zero=from_zero)
    if drawn is None:
        return None
    rows = folded("Numbers by round and silo", table(over_rounds(found), title))
    return card(el("h3", title), drawn, el("p", f"{ends} {meaning}", cls="muted said"), rows)


def bytes_section(fed: Federation) -> Html:
    """Bytes up and down by round and by client, and what compression saved."""
    up, down = total(fed, "bytes_up"), total(fed, "bytes_down")
    if up is None and down is None:
        return card(el("p", f"No bytes were recorded. {saving(fed)}".strip()))
    said = f"{format_bytes(up)} up (silos to server) and {format_bytes(down)} down in all."
    drawn = line_chart(
        [Series("up", by_round(fed, "bytes_up")), Series("down", by_round(fed, "bytes_down"), dashed=True)],
        x_label="round",
        y_label="bytes a round",
        summary=f"Line chart of bytes up and down by round. {said}",
        from_zero=True,
    )
    boxes = [card(el("h3", "By round"), drawn, el("p", f"{said} {saving(fed)}".strip(), cls="muted said"))]
    by_client = {silo: value for silo in fed.silos if (value := sent(fed, silo)) is not None}
    most = max(by_client.values(), default=0.0)
    if most <= 0:
        boxes.append(card(el("h3", "By silo"), el("p", "The bytes of single silos were not recorded.")))
        return el("div", boxes, cls="grid")
    drawn = bars("Bytes up, all rounds", [(brief(silo), v / most, format_bytes(v)) for silo, v in by_client.items()])
    if len(by_client) <= MANY:
        return el("div", boxes, card(el("h3", "By silo"), drawn), cls="grid")
    least = min(by_client, key=lambda silo: by_client[silo])
    top = max(by_client, key=lambda silo: by_client[silo])
    between = (
        f"Between {format_bytes(by_client[least])} ({brief(least)}) and {format_bytes(most)} ({brief(top)}) up by silo."
    )
    boxes.append(card(el("h3", "By silo"), el("p", between), folded(f"Every silo ({len(by_client)})", drawn)))
    return el("div", boxes, cls="grid")
