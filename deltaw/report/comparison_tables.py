"""A comparison's numbers as tables of plain strings: the same for a terminal, for Markdown and for the HTML page.

Every table is a list of rows of equal length, the header first, and is empty where there is nothing to show. A cell
without a number holds a dash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltaw.report.tables import (
    MISSING,
    PERCENT,
    Table,
    format_bytes,
    format_metric,
    format_seconds,
    format_short,
    format_value,
    metric_label,
    number,
    ordered_metrics,
    part,
    signed,
    three_digits,
    without_empty_columns,
)


def groups_of(results: dict[str, Any], data: str) -> list[dict[str, Any]]:
    """The rows of one data set that have something to show, in the order of the comparison."""
    return [group for group in results["groups"] if group["data"] == data and group["seeds"]]


def format_spread(name: str, summary: Any) -> str:
    """Mean and sample standard deviation of a metric: "84.0 ± 1.2 %"; the mean alone where there is one value."""
    mean, deviation = number(part(summary).get("mean")), number(part(summary).get("sd"))
    if mean is None or deviation is None:
        return format_metric(name, mean)
    if PERCENT.search(name) and 0 <= mean <= 1:
        return f"{mean * 100:.1f} ± {deviation * 100:.1f} %"
    if abs(mean) >= 1e6 or 0 < abs(mean) < 1e-3:
        return signed(f"{mean:.3g} ± {deviation:.2g}")
    digits = 3 if abs(mean) < 10 else 1
    return signed(f"{mean:,.{digits}f} ± {deviation:,.{digits}f}")


def format_latency(value: Any) -> str:
    """A short time: 1.60 ms, 42.0 ms, 1.2 s."""
    found = number(value)
    if found is None:
        return MISSING
    return f"{three_digits(found * 1000)} ms" if found < 0.9995 else format_seconds(found)


def format_p(value: Any) -> str:
    """A p value with three digits after the point."""
    found = number(value)
    return MISSING if found is None else "< 0.001" if found < 0.001 else f"{found:.3f}"


def format_difference(name: str, value: Any) -> str:
    """A difference of a metric with its sign: of shares in points."""
    found = number(value)
    if found is None:
        return MISSING
    percent = bool(PERCENT.search(name))
    written = f"{found * 100:+.1f}" if percent else f"{found:+.3f}"
    # No rounded number is "-0.0".
    return signed(written if any(digit in written for digit in "123456789") else written[1:])


def _change(name: str, item: Any) -> str:
    """Before and after on one line; one of them where only that was measured."""
    before, after = part(item).get("before"), part(item).get("after")
    written = [format_spread(name, summary) for summary in (before, after)]
    return " → ".join(text for text in written if text != MISSING) or MISSING


def quality_table(results: dict[str, Any], data: str) -> Table:
    """Each method's metrics on a data set's test rows, mean ± sample standard deviation over the seeds."""
    groups = groups_of(results, data)
    if not groups:
        return []
    seen = {name: group["metrics"][name]["mean"] for group in groups for name in group["metrics"]}
    as_run = {"task": groups[0]["task"], "metrics": {"after": seen}}
    names = ordered_metrics(as_run)
    table = [["Method", "Seeds", *(metric_label(as_run, name) for name in names)]]
    for group in groups:
        measured = [format_spread(name, group["metrics"].get(name)) for name in names]
        table.append([group["label"], seeds_of(group), *measured])
    return without_empty_columns(table)


def seeds_of(group: dict[str, Any]) -> str:
    """How many cells are done, and of how many where some are not."""
    done, wanted = len(group["seeds"]), group["cells"]
    return str(done) if done == wanted else f"{done} of {wanted}"


def expense_table(results: dict[str, Any], data: str) -> Table:
    """What each method took, and how fast what it made is."""
    latencies = ("Prompt", "Prompt, merged", "Token", "Token, merged")
    table = [["Method", "Trained parameters", "Adapter size", "Training time", "Tokens/s", "Peak memory", *latencies]]
    for group in groups_of(results, data):
        cost = {name: summary["mean"] for name, summary in group["cost"].items()}
        beside, merged = (part(group, "latency", kind) for kind in ("unmerged", "merged"))
        medians = [part(found, name).get("mean") for name in ("prompt_s", "token_s") for found in (beside, merged)]
        table.append(
            [
                group["label"],
                format_short(cost.get("trainable_parameters")),
                format_bytes(cost.get("adapter_bytes")),
                format_seconds(cost.get("train_s")),
                format_value("tokens_per_s", cost.get("tokens_per_s")),
                format_bytes(cost.get("peak_memory_bytes")),
                *map(format_latency, medians),
            ]
        )
    return without_empty_columns(table)


def forgetting_table(results: dict[str, Any], data: str) -> Table:
    """Perplexity of general text, and the tasks that were not trained on, before and after training."""
    groups = groups_of(results, data)
    names = list(dict.fromkeys(name for group in groups for name in group["others"]))
    header = ["Method", "General text perplexity"]
    metrics = {
        name: next(group["others"][name]["metric"] for group in groups if name in group["others"]) for name in names
    }
    header += [f"{name} {metric_label({}, metrics[name]).lower()}" for name in names]
    table = [header]
    for group in groups:
        others = [_change(metrics[name], group["others"].get(name)) for name in names]
        table.append([group["label"], _change("perplexity", group["text"]), *others])
    return without_empty_columns(table)


def whole_table(results: dict[str, Any], data: str) -> Table:
    """One row a method with everything: quality, cost, latency, forgetting."""
    parts = [quality_table(results, data), expense_table(results, data), forgetting_table(results, data)]
    parts = [table for table in parts if table]
    if not parts:
        return []
    return [[rows[0][0], *(cell for row in rows for cell in row[1:])] for rows in zip(*parts, strict=True)]


def significance_table(results: dict[str, Any]) -> Table:
    """Each method's main metric against the reference's: difference, 95 % interval, p."""
    table = [["Method", "Data", "Metric", f"Difference to {results['reference']}", "95 % interval", "p"]]
    for row in results["significance"]:
        metric = row.get("metric", "")
        if "p" not in row:
            table.append([row["label"], row["data"], metric, row.get("reason", MISSING), MISSING, MISSING])
            continue
        low, high = (format_difference(metric, row[end]) for end in ("low", "high"))
        unit = " points" if PERCENT.search(metric) else ""
        difference = format_difference(metric, row["difference"]) + unit
        named = metric_label({}, metric)
        table.append([row["label"], row["data"], named, difference, f"{low} to {high}", format_p(row["p"])])
    return table if len(table) > 1 else []


def failed_table(results: dict[str, Any]) -> Table:
    """The cells that failed, with their errors."""
    rows = [[item["cell"], str(item["exit_code"]), item["error"]] for item in results["failed"]]
    return [["Cell", "Exit code", "Error"], *rows] if rows else []


def markdown(results: dict[str, Any]) -> str:
    """All tables as Markdown."""
    count = results["cells"]
    parts = [f"# Comparison on {results['model']}", f"{count['done']} of {count['all']} cells done."]
    for data in results["data"]:
        if table := whole_table(results, data):
            parts += [f"## {data}", _grid(table)]
    if table := significance_table(results):
        parts += ["## Against the reference", _grid(table)]
    if table := failed_table(results):
        parts += ["## Failed cells", _grid(table)]
    if results["missing"]:
        parts.append(f"Not run yet: {', '.join(results['missing'])}.")
    parts += [f"- {note}" for note in results["notes"]]
    return "\n\n".join(parts) + "\n"


def _grid(table: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in table]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(table[0]) - 1), *lines[1:]])
