"""The numbers of a consortium study: spreads over seeds, and what is gained over the best organisation alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltaw import __version__
from deltaw.report.comparison_tables import format_difference, format_spread
from deltaw.report.tables import (
    MISSING,
    PERCENT,
    Table,
    format_bytes,
    format_metric,
    format_seconds,
    metric_label,
    without_empty_columns,
)
from deltaw.studies.compare_statistics import FEW_SEEDS, summarized
from deltaw.studies.consortium_cells import cell_run, is_done
from deltaw.studies.consortium_plan import ALONE, Cell, Plan, Study

METRICS = ("macro_auroc", "accuracy", "macro_f1")


def collect(study: Study, plan: Plan, failed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that is measured so far, as `results.json` has it.

    Args:
        study: what was asked.
        plan: its cells.
        failed: a cell to its `error` and `exit_code`.

    Returns:
        `points`, each with `cells` (one entry for all seeds of a cell): `metrics`, `cost` and `against_best` as
        summaries over seeds (`mean`, `sd`, `min`, `max`, `n`, `values`); `best_alone` by seed; `failed`, `missing`,
        `notes`, and what it was made from. A number that was not measured is absent.
    """
    done = {name: cell_run(plan.folder(cell)) or {} for name, cell in plan.cells.items() if is_done(plan, cell)}
    points = [_point(study, plan, point, done) for point in study.points]
    return {
        "format": 1,
        "kind": "consortium",
        "deltaw": __version__,
        "command": plan.command,
        "example": study.example.name,
        "title": study.example.title,
        "output": plan.output,
        "model": next(iter(plan.cells.values())).keys.get("model"),
        "organisations": list(study.example.organisations),
        "seeds": list(study.seeds),
        "rounds": study.all_rounds,
        "main": METRICS[0],
        "points": points,
        "rows": plan.rows,
        "cells": {"all": len(plan.cells), "done": len(done)},
        "failed": [{"cell": name, **dict(found)} for name, found in failed.items() if name not in done],
        "missing": [name for name in plan.cells if name not in done and name not in failed],
        "notes": _notes(study, points, parallel=plan.parallel),
    }


def _summary(values: Sequence[float]) -> dict[str, Any]:
    return {**summarized(values), "min": min(values), "max": max(values)}


def _metric(record: Mapping[str, Any], name: str) -> float | None:
    found: float | None = record.get("metrics", {}).get("after", {}).get(name)
    return found


def _point(study: Study, plan: Plan, point: str, done: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One point of the knobs: every cell over its seeds."""
    own = [cell for cell in plan.cells.values() if cell.point == point]
    best = _best_alone(own, done)
    entries = []
    for label in dict.fromkeys(cell.label for cell in own):
        cells = [cell for cell in own if cell.label == label]
        entries.append(_entry(label, cells, [cell for cell in cells if cell.name in done], done, best))
    found: dict[str, Any] = {"name": point, "knobs": {**study.example.knobs, **study.points[point]}, "cells": entries}
    found["best_alone"] = [{"seed": seed, "label": label, METRICS[0]: value} for seed, (label, value) in best.items()]
    if best:
        found["best_alone_summary"] = _summary([value for _, value in best.values()])
    return found


def _best_alone(cells: Sequence[Cell], done: Mapping[str, Mapping[str, Any]]) -> dict[int, tuple[str, float]]:
    """Seed to the organisation that came furthest alone, of seeds for which all of them are done."""
    found: dict[int, tuple[str, float]] = {}
    alone = [cell for cell in cells if cell.kind == ALONE]
    for seed in dict.fromkeys(cell.seed for cell in alone):
        values = {cell.label: _metric(done.get(cell.name, {}), METRICS[0]) for cell in alone if cell.seed == seed}
        known = {label: value for label, value in values.items() if value is not None}
        if len(known) == len(values):
            label = max(known, key=lambda one: known[one])
            found[seed] = label, known[label]
    return found


def _entry(
    label: str,
    cells: Sequence[Cell],
    ended: Sequence[Cell],
    done: Mapping[str, Mapping[str, Any]],
    best: Mapping[int, tuple[str, float]],
) -> dict[str, Any]:
    records = [done[cell.name] for cell in ended]
    entry: dict[str, Any] = {
        "cell": cells[0].name.rpartition("/")[2],
        "label": label,
        "kind": cells[0].kind,
        "seeds": [cell.seed for cell in ended],
        "of": len(cells),
        "runs": [cell.name for cell in ended],
        "metrics": {},
        "cost": {},
    }
    for name in METRICS:
        values = [value for record in records if (value := _metric(record, name)) is not None]
        if values and len(values) == len(records):
            entry["metrics"][name] = _summary(values)
    for name in ("total_s", "bytes_up", "bytes_down"):
        values = [record["cost"][name] for record in records if name in record.get("cost", {})]
        if values and len(values) == len(records):
            entry["cost"][name] = _summary(values)
    pairs = [(cell.seed, _metric(done[cell.name], METRICS[0])) for cell in ended if cell.seed in best]
    differences = {seed: value - best[seed][1] for seed, value in pairs if value is not None}
    if differences and cells[0].kind != ALONE:
        entry["against_best"] = {**_summary(list(differences.values())), "seeds": list(differences)}
    if privacy := next((record["privacy"] for record in records if record.get("privacy")), None):
        entry["privacy"] = _promise(privacy, records)
    return entry


def _promise(privacy: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a private federation promises: what all organisations share, and the largest epsilon of any in any seed."""
    shared = {key: value for key, value in privacy.items() if key not in ("clients", "noise_multiplier", "statement")}
    each = [own for record in records for own in (record.get("privacy") or {}).get("clients", {}).values()]
    for key in ("epsilon", "noise_multiplier"):
        values = [own[key] for own in (*each, privacy) if key in own]
        if values:
            shared[key] = max(values)
    return shared


def _notes(study: Study, points: Sequence[Mapping[str, Any]], *, parallel: int) -> list[str]:
    """What a reader has to know of the numbers."""
    count = len(study.seeds)
    passes = (
        f"{study.local_steps} steps in each of {study.all_rounds} rounds"
        if study.local_steps is not None
        else f"{study.all_rounds * study.local_epochs:g} passes over its rows, federations in {study.all_rounds} rounds"
    )
    notes = [
        f"Every trained cell makes {passes}. All are measured once, at the end, on the same test rows. Each seed has "
        "rows, test rows and a start of its own.",
        "The best organisation alone is chosen for each seed by the test rows themselves, which favours it; "
        "differences are taken seed by seed.",
    ]
    if count == 1:
        notes.append("One seed: nothing is known of the spread over seeds.")
    else:
        few = "; so few tell little of it" if count < FEW_SEEDS else ""
        notes.append(f"± is the sample standard deviation over {count} seeds{few}.")
    promises = {
        f"epsilon {one['privacy'].get('epsilon', 0):.3g} at delta {one['privacy'].get('delta', 0):.2g} by "
        f"{one['privacy'].get('unit', 'example')}, neighbours {one['privacy'].get('adjacency')}, sampling "
        f"{one['privacy'].get('sampling')}, for each organisation by itself"
        for point in points
        for one in point["cells"]
        if "privacy" in one
    }
    notes += [f"Privacy: {promise}." for promise in sorted(promises)]
    if promises:
        notes.append("No promise covers the test rows, of which the metrics are exact functions.")
    if parallel > 1:
        notes.append(f"Up to {parallel} cells ran at a time: their times say little.")
    return notes


# Tables.


def quality_table(results: Mapping[str, Any], point: Mapping[str, Any]) -> Table:
    """Each cell's metrics over the seeds, and its difference to the best organisation alone."""
    main = results["main"]
    header = ["No.", "Cell", "Seeds", *(metric_label({}, name) for name in METRICS), "Range", "Less best alone"]
    table = [[*header, "Epsilon", "Sent up", "Time"]]
    for number, entry in enumerate(point["cells"], 1):
        summary = entry["metrics"].get(main, {})
        several = summary.get("n", 0) > 1
        epsilon = entry.get("privacy", {}).get("epsilon")
        done = len(entry["seeds"])
        table.append(
            [
                str(number),
                entry["label"],
                str(done) if done == entry["of"] else f"{done} of {entry['of']}",
                *(format_spread(name, entry["metrics"].get(name)) for name in METRICS),
                _range(main, summary) if several else MISSING,
                _difference(main, entry.get("against_best")),
                MISSING if epsilon is None else f"{epsilon:.3g}",
                format_bytes(entry["cost"].get("bytes_up", {}).get("mean")),
                format_seconds(entry["cost"].get("total_s", {}).get("mean")),
            ]
        )
    return without_empty_columns(table)


def best_table(results: Mapping[str, Any], point: Mapping[str, Any]) -> Table:
    """For each seed the best organisation alone, and every other cell's difference to it."""
    compared = [entry for entry in point["cells"] if "against_best" in entry]
    if not compared or len(point["best_alone"]) < 2:
        return []
    main = results["main"]
    table = [["Seed", "Best alone", metric_label({}, main), *(entry["label"] for entry in compared)]]
    for best in point["best_alone"]:
        row = [str(best["seed"]), best["label"], format_metric(main, best[main])]
        for entry in compared:
            found = dict(zip(entry["against_best"]["seeds"], entry["against_best"]["values"], strict=True))
            row.append(format_difference(main, found.get(best["seed"])))
        table.append(row)
    return table


def sweep_table(results: Mapping[str, Any]) -> Table:
    """A row for each point of the knobs: the best alone, and every other cell with its difference to it."""
    points = results["points"]
    if len(points) < 2:
        return []
    main = results["main"]
    knobs = list(dict.fromkeys(name for point in points for name in point["knobs"]))
    labels = list(
        dict.fromkeys(entry["label"] for point in points for entry in point["cells"] if entry["kind"] != ALONE)
    )
    heads = [part for label in labels for part in (label, f"{label} less best alone")]
    table = [[*(name.replace("_", " ").capitalize() for name in knobs), "Best alone", *heads]]
    for point in points:
        entries = {entry["label"]: entry for entry in point["cells"]}
        row = [f"{point['knobs'].get(name, MISSING)}" for name in knobs]
        row.append(format_spread(main, point.get("best_alone_summary")))
        for label in labels:
            entry = entries.get(label, {"metrics": {}})
            row += [format_spread(main, entry["metrics"].get(main)), _difference(main, entry.get("against_best"))]
        table.append(row)
    return without_empty_columns(table)


def failed_table(results: Mapping[str, Any]) -> Table:
    """The cells that failed, with their errors."""
    rows = [[item["cell"], str(item["exit_code"]), item["error"]] for item in results["failed"]]
    return [["Cell", "Exit code", "Error"], *rows] if rows else []


def tables(results: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Every table with its title, those that have nothing to show left out."""
    found = []
    for point in results["points"]:
        of = f"{point['name']}: " if point["name"] else ""
        found.append((f"{of}quality on the shared test rows", quality_table(results, point)))
        found.append((f"{of}difference to the best organisation alone, by seed", best_table(results, point)))
    found += [("Sweep", sweep_table(results)), ("Failed cells", failed_table(results))]
    return [(title[:1].upper() + title[1:], table) for title, table in found if len(table) > 1]


def markdown(results: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    count = results["cells"]
    parts = [f"# {results['title']}", f"{results['model']}; {count['done']} of {count['all']} cells done."]
    for title, table in tables(results):
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
        parts += [f"## {title}", "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])]
    if results["missing"]:
        parts.append(f"Not run yet: {', '.join(results['missing'])}.")
    parts.append("\n".join(f"- {note}" for note in results["notes"]))
    return "\n\n".join(parts) + "\n"


def _range(name: str, summary: Mapping[str, Any]) -> str:
    return f"{format_metric(name, summary['min'])} to {format_metric(name, summary['max'])}"


def _difference(name: str, summary: Mapping[str, Any] | None) -> str:
    """A mean difference with its spread and its extremes: "+0.051 ± 0.012 (+0.035 to +0.066)"."""
    if summary is None:
        return MISSING
    mean = format_difference(name, summary["mean"])
    if summary["n"] == 1:
        return mean
    scale = 100 if PERCENT.search(name) else 1
    low, high = (format_difference(name, summary[end]) for end in ("min", "max"))
    return f"{mean} ± {summary['sd'] * scale:.{1 if scale > 1 else 3}f} ({low} to {high})"
