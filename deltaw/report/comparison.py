"""A comparison's page: its results in, one HTML file without scripts and without anything from a network out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from deltaw.core.files import write_text
from deltaw.report.comparison_charts import CSS as CHART_CSS
from deltaw.report.comparison_charts import Mark, plot
from deltaw.report.comparison_tables import (
    expense_table,
    failed_table,
    forgetting_table,
    groups_of,
    markdown,
    quality_table,
    significance_table,
)
from deltaw.report.markup import Html, el, join
from deltaw.report.page import REPORT, card, command, folded, model_name, table
from deltaw.report.shell import document
from deltaw.report.tables import LOWER_IS_BETTER, PERCENT, format_seconds, format_short, metric_label, number, part

TABLE = "table.md"


def write_comparison(folder: str | os.PathLike[str], results: dict[str, Any]) -> Path:
    """Writes `table.md` and `report.html` into a comparison's folder.

    Args:
        folder: the comparison's.
        results: what `results.json` has.

    Returns:
        The path of the page.

    Raises:
        InputError, RunError: one line for a folder that cannot be written to.
    """
    write_text(Path(folder) / TABLE, markdown(results))
    path = Path(folder) / REPORT
    write_text(path, comparison_page(results))
    return path


def comparison_page(results: dict[str, Any]) -> str:
    """The whole page."""
    title = f"Comparison on {model_name({'model': {'source': results['model']}})}"
    sections = [
        ("quality", "Quality", _each(results, quality_table, "Mean ± sample standard deviation over the seeds")),
        ("against", "Against the reference", _significance(results)),
        ("plots", "Quality against cost", _plots(results)),
        ("curves", "Loss curves", _curves(results)),
        ("cost", "Cost and latency", _each(results, expense_table, "Means over the seeds")),
        ("forgetting", "Forgetting", _each(results, forgetting_table, "Before → after training")),
        ("failed", "Failed cells", _failed(results)),
        ("setup", "Configuration", _setup(results)),
        ("reproduce", "Reproduce", _reproduce(results)),
    ]
    return document(
        title,
        sections,
        kind="comparison",
        heading=title,
        top=[_facts(results), _banner(results)],
        footer=el("footer", el("p", f"Written by deltaw {results['deltaw']}.")),
        version=results["deltaw"],
        css=CHART_CSS,
    )


def _facts(results: dict[str, Any]) -> Html:
    count = results["cells"]
    shown = [
        ("Methods", str(len(results["labels"]))),
        ("Data sets", ", ".join(results["data"])),
        ("Seeds", ", ".join(map(str, results["seeds"]))),
        ("Reference", results["reference"]),
        ("Cells", f"{count['done']} of {count['all']} done"),
        ("Device", "; ".join(results["devices"])),
    ]
    return el("dl", [el("div", el("dt", name), el("dd", value)) for name, value in shown if value], cls="facts")


def _banner(results: dict[str, Any]) -> Html | None:
    """What stands above everything where cells failed or have not run."""
    failed, missing = len(results["failed"]), len(results["missing"])
    if failed:
        said = "The tables have what the others came to; the errors stand under Failed cells."
        head = f"{failed} cell{'s' if failed > 1 else ''} failed"
        return el("div", el("h2", head), el("p", said), cls="banner failed")
    if missing:
        head = f"{missing} cell{'s have' if missing > 1 else ' has'} not run yet"
        said = "The tables have what is done; the same command goes on with the rest."
        return el("div", el("h2", head), el("p", said), cls="banner unfinished")
    return None


def _each(results: dict[str, Any], make: Any, caption: str) -> Html | None:
    """One table a data set."""
    boxes = []
    for data in results["data"]:
        if rows := make(results, data):
            size = next((group["rows"] for group in groups_of(results, data)), None)
            of = f"{data}: {size:,} test rows. " if make is quality_table and size else f"{data}. "
            boxes.append(card(table(rows, f"{of}{caption}")))
    notes = el("ul", [el("li", note) for note in results["notes"]], cls="notes") if make is quality_table else None
    return join(el("div", boxes, cls="top"), notes) if boxes else None


def _significance(results: dict[str, Any]) -> Html | None:
    rows = significance_table(results)
    if not rows:
        return None
    caption = f"Each method less {results['reference']}, on the same test rows: 95 % intervals of the difference"
    return card(table(rows, caption, text_columns=3))


def _failed(results: dict[str, Any]) -> Html | None:
    rows = failed_table(results)
    return card(table(rows, "The rest was finished", text_columns=3)) if rows else None


def _quality(group: dict[str, Any]) -> tuple[float, float | None] | None:
    """The main metric's mean and deviation, shares in per cent."""
    summary = part(group, "metrics", group["main"])
    mean = number(summary.get("mean"))
    if mean is None:
        return None
    scale = 100.0 if PERCENT.search(group["main"]) else 1.0
    deviation = number(summary.get("sd"))
    return mean * scale, None if deviation is None else deviation * scale


def _plots(results: dict[str, Any]) -> Html | None:
    """For each data set the main metric against trained parameters and against training time."""
    boxes = []
    for data in results["data"]:
        groups = groups_of(results, data)
        if not groups:
            continue
        main = groups[0]["main"]
        direction = ", lower is better" if LOWER_IS_BETTER.search(main) else ""
        y_label = f"{metric_label({}, main)}{' (%)' if PERCENT.search(main) else ''}{direction}"
        for key, x_label, write in (
            ("trainable_parameters", "trained parameters (log scale)", format_short),
            ("train_s", "training time", format_seconds),
        ):
            marks = []
            for group in groups:
                index, quality = results["labels"].index(group["label"]), _quality(group)
                x = number(part(group, "cost", key).get("mean"))
                if quality is not None and group["bare"]:
                    marks.append(Mark(group["label"], index, level=quality[0]))
                elif quality is not None and x:
                    marks.append(Mark(group["label"], index, [(x, *quality)]))
            summary = f"{y_label} on {data} against {x_label}: " + "; ".join(
                f"{mark.name} {mark.points[0][1]:.4g} at {write(mark.points[0][0])}" for mark in marks if mark.points
            )
            log = key == "trainable_parameters"
            drawn = plot(marks, x_label=x_label, y_label=y_label, summary=summary, log_x=log, x_format=write)
            if drawn is not None:
                boxes.append(card(el("h3", f"{data}: {x_label.removesuffix(' (log scale)')}"), drawn))
    return el("div", boxes, cls="grid") if boxes else None


def _curves(results: dict[str, Any]) -> Html | None:
    """The training loss by step, a line a method, the mean over its seeds."""
    boxes = []
    for data, lines in results["curves"].items():
        marks = [
            Mark(label, results["labels"].index(label), [(step, loss, None) for step, loss in points], connected=True)
            for label, points in lines.items()
        ]
        ends = "; ".join(f"{mark.name} ends at {mark.points[-1][1]:.4g}" for mark in marks)
        summary = f"Training loss on {data} by step. {ends}"
        drawn = plot(marks, x_label="step", y_label="training loss (nats), mean over seeds", summary=summary)
        if drawn is not None:
            boxes.append(card(el("h3", data), drawn))
    return el("div", boxes, cls="grid") if boxes else None


def _setup(results: dict[str, Any]) -> Html:
    code = el("pre", el("code", results["config"].rstrip(), cls="user", dir="auto"), tabindex=0, aria_label="YAML file")
    return folded("The comparison's file", code)


def _reproduce(results: dict[str, Any]) -> Html:
    note = (
        "Seeds and configuration are above, and each cell's run folder holds its own fully resolved config.yaml. "
        "Another device, or another number of threads, may change the last digits."
    )
    return join(
        el("p", "This comparison was run with, from where its paths start:"),
        command(results["command"]),
        el("p", note, cls="muted"),
    )
