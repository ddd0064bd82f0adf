"""A consortium study's page: quality by cell with seeds as points, what is gained, links to the cells' own pages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaw.report.comparison_charts import CSS, Mark, plot
from deltaw.report.markup import Html, el, join
from deltaw.report.page import card, command, model_name, table
from deltaw.report.shell import document
from deltaw.report.tables import metric_label, number, plain
from deltaw.studies.consortium_results import best_table, failed_table, quality_table, sweep_table


def study_page(results: Mapping[str, Any]) -> str:
    """The whole page, from what `results.json` has."""
    sections = [
        ("quality", "Quality", _each(results, _quality)),
        ("against", "Against the best organisation alone", _each(results, _against)),
        ("sweep", "Sweep", _sweep(results)),
        ("privacy", "Privacy", _privacy(results)),
        ("rows", "Rows", _rows(results)),
        ("runs", "Runs", _runs(results)),
        ("failed", "Failed cells", _failed(results)),
        ("reproduce", "Reproduce", _reproduce(results)),
    ]
    return document(
        results["title"],
        sections,
        kind="consortium study",
        heading=results["title"],
        top=[_facts(results), _banner(results)],
        footer=el("footer", el("p", f"Written by deltaw {results['deltaw']}.")),
        version=results["deltaw"],
        css=CSS,
    )


def _facts(results: Mapping[str, Any]) -> Html:
    count = results["cells"]
    shown = [
        ("Model", model_name({"model": {"source": results["model"]}})),
        ("Organisations", ", ".join(results["organisations"])),
        ("Rounds", str(results["rounds"])),
        ("Seeds", ", ".join(map(str, results["seeds"]))),
        ("Cells", f"{count['done']} of {count['all']} done"),
    ]
    return el("dl", [el("div", el("dt", name), el("dd", value)) for name, value in shown], cls="facts")


def _banner(results: Mapping[str, Any]) -> Html | None:
    failed, missing = len(results["failed"]), len(results["missing"])
    if failed:
        return el("div", el("h2", f"{failed} of {results['cells']['all']} cells failed"), cls="banner failed")
    if missing:
        head = f"{missing} cell{'s have' if missing > 1 else ' has'} not run yet"
        return el("div", el("h2", head), el("p", "The same command goes on with the rest."), cls="banner unfinished")
    return None


def _each(results: Mapping[str, Any], make: Any) -> Html | None:
    """What `make` says of each point of the knobs, under the point's name where there are several."""
    boxes = []
    for point in results["points"]:
        if (made := make(results, point)) is not None:
            boxes.append(join(el("h3", point["name"]) if point["name"] else None, made))
    notes = el("ul", [el("li", note) for note in results["notes"]], cls="notes") if make is _quality else None
    return join(boxes, notes) if boxes else None


def _quality(results: Mapping[str, Any], point: Mapping[str, Any]) -> Html | None:
    rows = quality_table(results, point)
    if not rows:
        return None
    main = results["main"]
    marks = []
    for place, entry in enumerate(point["cells"]):
        values = entry["metrics"].get(main, {}).get("values", [])
        points: list[tuple[float, float, float | None]] = [(place + 1.0, value, None) for value in values]
        marks.append(Mark(f"{place + 1} {entry['label']}", place, points))
    named = metric_label({}, main)
    summary = f"{named} by cell, a mark a seed: " + "; ".join(
        f"{mark.name} {', '.join(f'{y:.3f}' for _, y, _ in mark.points)}" for mark in marks if mark.points
    )
    drawn = plot(marks, x_label="cell, by its number", y_label=named, summary=summary)
    caption = "Mean ± sample standard deviation over the seeds; Range and Less best alone are of the macro AUROC"
    return join(card(drawn) if drawn is not None else None, card(table(rows, caption, text_columns=2)))


def _against(results: Mapping[str, Any], point: Mapping[str, Any]) -> Html | None:
    rows = best_table(results, point)
    caption = "The best organisation alone on each seed, by the test rows, and what other cells reach beyond it"
    return card(table(rows, caption, text_columns=2)) if rows else None


def _sweep(results: Mapping[str, Any]) -> Html | None:
    rows = sweep_table(results)
    return card(table(rows, "Means ± sample standard deviation over the seeds", text_columns=0)) if rows else None


def _privacy(results: Mapping[str, Any]) -> Html | None:
    """What each private cell promises an organisation's units."""
    names = ("epsilon", "epsilon_rdp", "delta", "unit", "adjacency", "sampling", "noise_multiplier", "max_grad_norm")
    rows = [["Cell", *(name.replace("_", " ").capitalize() for name in names)]]
    for point in results["points"]:
        for entry in point["cells"]:
            if "privacy" in entry:
                of = f"{point['name']}: " if point["name"] else ""
                values = [entry["privacy"].get(name) for name in names]
                told = [plain(value) if number(value) is None else f"{value:.4g}" for value in values]
                rows.append([f"{of}{entry['label']}", *told])
    if len(rows) < 2:
        return None
    caption = "For each organisation by itself; the largest epsilon and noise multiplier of any of them in any seed"
    return card(table(rows, caption))


def _rows(results: Mapping[str, Any]) -> Html | None:
    """Rows by label of the first seed of each point."""
    boxes = []
    for point in results["points"]:
        place = "/".join(filter(None, (point["name"], f"seed-{results['seeds'][0]}")))
        files = results["rows"][place]
        labels = sorted(set().union(*files.values()))
        rows = [["Label", *files]]
        rows += [[label, *(str(found.get(label, 0)) for found in files.values())] for label in labels]
        rows.append(["all", *(str(sum(found.values())) for found in files.values())])
        knobs = ", ".join(f"{name} {value}" for name, value in point["knobs"].items())
        boxes.append(card(table(rows, f"{place}{f' ({knobs})' if knobs else ''}: rows by label")))
    return join(boxes)


def _runs(results: Mapping[str, Any]) -> Html | None:
    """Links to the cells' own pages."""
    items = []
    for point in results["points"]:
        for entry in point["cells"]:
            pages = [(name, Path(name) / "report.html") for name in entry["runs"]]
            links = [
                join(" ", el("a", name, href=page.as_posix()))
                for name, page in pages
                if (Path(results["output"]) / page).is_file()
            ]
            if links:
                items.append(el("li", entry["label"], ":", links))
    return el("ul", items) if items else None


def _failed(results: Mapping[str, Any]) -> Html | None:
    rows = failed_table(results)
    return card(table(rows, "The rest was finished", text_columns=3)) if rows else None


def _reproduce(results: Mapping[str, Any]) -> Html:
    note = "Each run's folder holds its own config.yaml. Private cells draw their noise anew each time."
    return join(command(results["command"]), el("p", note, cls="muted"))
