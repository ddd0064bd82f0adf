"""A run's numbers as tables of plain strings, units included: the same rows for a terminal and for the HTML page.

Every table is a list of rows of equal length, the header first, and is empty where the run has nothing to show.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

Table = list[list[str]]

MISSING = "–"
LABELS = {
    "majority": "Majority class",
    "tfidf_logreg": "TF-IDF + logistic regression",
    "train_s": "Training time",
    "eval_s": "Evaluation time",
    "total_s": "Total time",
    "steps": "Optimizer steps",
    "tokens": "Tokens trained on",
    "tokens_per_s": "Tokens per second",
    "peak_memory_bytes": "Peak memory",
    "adapter_bytes": "Adapter size",
}
WORDS = {"f1": "F1", "auroc": "AUROC", "auc": "AUC", "gpu": "GPU", "cpu": "CPU"}
METRIC_ORDER = ["accuracy", "exact_match", "f1", "precision", "recall", "macro_f1", "macro_auroc", "perplexity", "loss"]
# Nearly every token is O in entity data, so token accuracy says little there.
TAGS_ORDER = ["f1", "precision", "recall", *METRIC_ORDER]
# What an evaluation counted stands beside its metrics, and is none.
COUNTS = {"tokens", "n", "predicted", "rows"}
PERCENT = re.compile(r"(^|_)(accuracy|f1|match|precision|recall)($|_)")
LOWER_IS_BETTER = re.compile(r"(^|_)(loss|perplexity|error)($|_)")


def part(value: Any, *keys: str) -> dict[str, Any]:
    """The dictionary at `value[key][key]...`, empty where it is absent or something else."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float | None:
    """`value` as a finite number; None for NaN, infinity, absence and everything that is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def label(name: str) -> str:
    """A key as a person would write it: `macro_f1` to "Macro F1"."""
    if name in LABELS:
        return LABELS[name]
    words = [WORDS.get(word, word) for word in re.sub(r"_(s|bytes)$", "", name).split("_") if word]
    joined = " ".join(words) or name
    return joined[:1].upper() + joined[1:]


def plain(value: Any) -> str:
    """Any JSON value as text: strings as they are, missing ones as a dash, structures as JSON."""
    if value is None or value == "" or (isinstance(value, float) and number(value) is None):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def signed(written: str) -> str:
    """A formatted number with a true minus sign."""
    return written.replace("-", "\N{MINUS SIGN}")


def format_count(value: Any) -> str:
    """A count with thousands separated: 2,442,240."""
    found = number(value)
    if found is None:
        return MISSING
    return signed(f"{found:,.0f}" if found == round(found) else f"{found:,.1f}")


def format_short(value: Any) -> str:
    """A large count in three digits: 2.44 M."""
    found = number(value)
    if found is None:
        return MISSING
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # Below 10,000 the whole number is as short.
        if abs(found) >= max(size * 0.9995, 1e4):
            return signed(f"{three_digits(found / size)} {unit}")
    return format_count(found)


def three_digits(value: float) -> str:
    """`value` with three digits where it is below 1,000, none after the point above that."""
    size = abs(value)
    return f"{value:,.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"


def format_bytes(value: Any) -> str:
    """Bytes in the binary unit that leaves one to four digits before the point: 9.35 MiB."""
    found = number(value)
    if found is None:
        return MISSING
    unit = 0
    while abs(found) >= 1023.5 and unit < 4:
        found /= 1024
        unit += 1
    name = ("B", "KiB", "MiB", "GiB", "TiB")[unit]
    return f"{found:.0f} B" if unit == 0 else f"{three_digits(found)} {name}"


def format_seconds(value: Any) -> str:
    """A duration: 850 ms, 42.3 s, 1 min 40 s, 2 h 05 min."""
    found = number(value)
    if found is None:
        return MISSING
    if abs(found) < 0.9995:
        return signed(f"{found * 1000:.0f} ms")
    if found < 59.95:
        return signed(f"{found:.1f} s")
    minutes, seconds = divmod(round(found), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(round(found / 60), 60)
    return f"{hours:,} h {minutes:02d} min"


def format_share(value: Any) -> str:
    """A share of one as a percentage; more digits where it is small: 84.0 %, 1.78 %, 0.054 %."""
    found = number(value)
    if found is None:
        return MISSING
    percent = found * 100
    digits = 1 if percent == 0 or abs(percent) >= 9.95 else 2 if abs(percent) >= 0.995 else 3
    return signed(f"{percent:.{digits}f} %")


def format_metric(name: str, value: Any) -> str:
    """A metric's value: shares as percentages with one digit, losses with three, the rest with three or so."""
    found = number(value)
    if found is None:
        return MISSING
    if PERCENT.search(name) and 0 <= found <= 1:
        return f"{found * 100:.1f} %"
    if abs(found) >= 1e6 or 0 < abs(found) < 1e-3:
        return signed(f"{found:.3g}")
    return signed(f"{found:,.{3 if abs(found) < 10 else 1}f}")


def format_change(name: str, before: Any, after: Any) -> str:
    """From before to after, with a sign, and in words whether that is better: "+22.5 points (better)"."""
    first, second = number(before), number(after)
    if first is None or second is None:
        return MISSING
    change = second - first
    if PERCENT.search(name) and 0 <= first <= 1 and 0 <= second <= 1:
        written = f"{change * 100:+.1f} points"
    else:
        size = max(abs(first), abs(second))
        written = f"{change:+.3g}" if size >= 1e6 or size < 1e-3 else f"{change:+,.{3 if size < 10 else 1}f}"
    if not re.search("[1-9]", written):
        return "no change"
    better = (change < 0) == bool(LOWER_IS_BETTER.search(name))
    return f"{signed(written)} ({'better' if better else 'worse'})"


def format_value(name: str, value: Any) -> str:
    """A number in the unit that its name's ending states (`_s`, `_bytes`, `_per_s`, `share`); other values as text."""
    if number(value) is None:
        return plain(value)
    if name.endswith("_per_s"):
        return format_count(round(float(value), 0 if abs(value) >= 100 else 1))
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name.endswith("_s"):
        return format_seconds(value)
    if name == "share" or name.endswith("_share"):
        return format_share(value)
    return format_count(value) if float(value) == round(value) else f"{value:.4g}"


def ordered_metrics(run: dict[str, Any]) -> list[str]:
    """The names of every metric that has a number somewhere, the most telling one first."""
    columns = [part(run, "metrics", "after"), part(run, "metrics", "before"), *baselines(run).values()]
    measured = (name for column in columns for name in column if number(column[name]) is not None)
    names = [name for name in dict.fromkeys(measured) if name not in COUNTS]
    order = TAGS_ORDER if run.get("task") == "token-classification" else METRIC_ORDER
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def metric_label(run: dict[str, Any], name: str) -> str:
    """A metric's name as a person would write it; precision, recall and F1 of tags are those of whole entities."""
    of_entities = run.get("task") == "token-classification" and name in ("f1", "precision", "recall")
    return f"Entity {WORDS.get(name, name)}" if of_entities else label(name)


def main_metric(run: dict[str, Any]) -> str | None:
    """The metric that stands for the run: the first in order that was measured after training, else before it."""
    names = ordered_metrics(run)
    for column in ("after", "before"):
        for name in names:
            if number(part(run, "metrics", column).get(name)) is not None:
                return name
    return None


def baselines(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The baselines' metrics by name, simplest first."""
    found = part(run, "metrics", "baselines")
    known = [name for name in ("majority", "tfidf_logreg") if name in found]
    names = known + [name for name in found if name not in known]
    return {name: found[name] for name in names if isinstance(found[name], dict)}


def without_empty_columns(table: Table) -> Table:
    """The table without the columns that hold nothing but dashes; empty when no row is left."""
    if len(table) < 2:
        return []
    keep = [i for i in range(len(table[0])) if i == 0 or any(row[i] != MISSING for row in table[1:])]
    return [[row[i] for i in keep] for row in table] if len(keep) > 1 else []


def metrics_table(run: dict[str, Any]) -> Table:
    """Metrics by row; before, after, the change and the baselines by column.

    Args:
        run: run.json.

    Returns:
        The header and one row a metric, all strings; columns that nothing was measured for are left out.
    """
    before, after = part(run, "metrics", "before"), part(run, "metrics", "after")
    others = baselines(run)
    table = [["Metric", "Before", "After", "Change", *map(label, others)]]
    for name in ordered_metrics(run):
        first, last, *rest = [format_metric(name, column.get(name)) for column in (before, after, *others.values())]
        table.append(
            [metric_label(run, name), first, last, format_change(name, before.get(name), after.get(name)), *rest]
        )
    return without_empty_columns(table)


def headline(run: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What the run cost, as (label, value, note): parameters, time, tokens/s, memory, sizes of base and adapter."""
    method, cost, model = part(run, "method"), part(run, "cost"), part(run, "model")
    trainable, total = number(method.get("trainable_parameters")), number(method.get("total_parameters"))
    share = number(method.get("share"))
    if share is None and trainable is not None and total:
        share = trainable / total
    of_total = f" of {format_short(total)}" if total else ""
    steps = f"{format_count(cost.get('steps'))} steps" if number(cost.get("steps")) is not None else ""
    size = cost.get("adapter_bytes", method.get("adapter_bytes"))
    tiles = [
        (
            "Trainable parameters",
            format_short(trainable),
            f"{format_share(share)}{of_total}" if share is not None else "",
        ),
        ("Training time", format_seconds(cost.get("train_s")), steps),
        ("Tokens per second", format_value("tokens_per_s", cost.get("tokens_per_s")), ""),
        ("Peak memory", format_bytes(cost.get("peak_memory_bytes")), plain(part(run, "device").get("type", ""))),
        ("Base weights", format_bytes(model.get("weights_bytes")), _bits(model)),
        ("Adapter size", format_bytes(size), "on disk"),
    ]
    return [(name, value, "" if note == MISSING else note) for name, value, note in tiles if value != MISSING]


def _bits(model: dict[str, Any]) -> str:
    bits, held = number(model.get("four_bit_bits")), number(model.get("four_bit_parameters"))
    return "" if bits is None else f"{format_short(held)} parameters in {bits:.3f} bits each"


def cost_table(run: dict[str, Any]) -> Table:
    """Measure and value, one row a number of run.json's `cost`."""
    cost = dict(part(run, "cost"))
    if "adapter_bytes" in part(run, "method"):
        cost.setdefault("adapter_bytes", part(run, "method")["adapter_bytes"])
    rows = [[label(name), format_value(name, value)] for name, value in cost.items() if number(value) is not None]
    return [["Measure", "Value"], *rows] if rows else []


def data_table(run: dict[str, Any]) -> Table:
    """Splits by row; their source, layout and counts by column."""
    counts = ["rows", "tokens", "loss_tokens", "truncated", "dropped", "empty", "bad"]
    names = {"tokens": "Tokens", "loss_tokens": "Tokens with loss"}
    splits = {split: found for split, found in part(run, "data").items() if isinstance(found, dict) and found}
    # Counts of one layout only (tags that matched nothing) matter where there are any.
    counts += dict.fromkeys(
        key for found in splits.values() for key in found if key not in counts and number(found[key])
    )
    table = [["Split", *(names.get(name, label(name)) for name in counts), "Layout", "Source"]]
    for split, found in splits.items():
        written = [format_count(found.get(name)) for name in counts]
        table.append([split, *written, plain(found.get("layout")), plain(found.get("source"))])
    return without_empty_columns(table)


def site_list(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The adapted sites of run.json that have a name."""
    sites = part(run, "method").get("sites")
    return [site for site in sites if isinstance(site, dict) and site.get("name")] if isinstance(sites, list) else []


def site_row(site: dict[str, Any]) -> list[str]:
    """Shape, r and scale of one site."""
    shape = site.get("shape")
    written = " × ".join(format_count(size) for size in shape) if isinstance(shape, list) and shape else MISSING
    scale = number(site.get("scale"))
    return [written, format_count(site.get("r")), MISSING if scale is None else f"{scale:.4g}"]


def split_name(name: str) -> tuple[str, int | None, str]:
    """A site's name as (what precedes the layer's number, the number, what follows); experts' numbers become `*`."""
    name = re.sub(r"(experts\.)\d+(?=\.|$)", r"\1*", name)
    match = re.match(r"(.*?)(?:^|\.)(\d+)\.(.+)$", name)
    return (match[1], int(match[2]), match[3]) if match and len(match[2]) < 7 else ("", None, name)


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as ranges: 0–3, 7, 9–11."""
    found: list[list[int]] = []
    for value in sorted(set(numbers)):
        if found and found[-1][1] == value - 1:
            found[-1][1] = value
        else:
            found.append([value, value])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in found)


def sites_table(run: dict[str, Any], *, every: bool = False) -> Table:
    """The adapted sites: one row a kind of projection (of one shape, r and scale), or one row a site.

    Args:
        run: run.json.
        every: one row a site.
    """
    sites = site_list(run)
    add: Callable[[Iterable[Any]], float] = lambda found: sum(number(value) or 0 for value in found)  # noqa: E731
    if every:
        table = [["Site", "Kind", "Shape (out × in)", "r", "Scale", "Parameters"]]
        table += [
            [plain(site["name"]), plain(site.get("kind")), *site_row(site), format_count(site.get("parameters"))]
            for site in sites
        ]
        return without_empty_columns(table)
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    prefixes: dict[str, set[str]] = {}
    for site in sites:
        prefix, _, suffix = split_name(str(site["name"]))
        prefixes.setdefault(suffix, set()).add(prefix)
        groups.setdefault((prefix, suffix, plain(site.get("kind")), *site_row(site)), []).append(site)
    table = [["Projection", "Layers", "Sites", "Kind", "Shape (out × in)", "r", "Scale", "Parameters"]]
    for (prefix, suffix, kind, *shown), members in groups.items():
        layers = [layer for site in members if (layer := split_name(str(site["name"]))[1]) is not None]
        name = f"{prefix}.*.{suffix}" if layers and len(prefixes[suffix]) > 1 else suffix
        measured = [site.get("parameters") for site in members]
        parameters = format_count(add(measured)) if any(number(v) is not None for v in measured) else MISSING
        table.append([name, ranges(layers) or MISSING, format_count(len(members)), kind, *shown, parameters])
    return without_empty_columns(table)
