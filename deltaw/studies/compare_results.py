"""The numbers of a comparison: what its cells left, gathered by data set and method, with spreads and intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaw import __version__
from deltaw.core.generators import generator
from deltaw.report.folder import read_lines, read_run
from deltaw.report.page import by_step
from deltaw.studies.compare_cells import PREDICTIONS, cell_record
from deltaw.studies.compare_plan import Cell, Plan
from deltaw.studies.compare_statistics import FEW_SEEDS, RESAMPLES, paired_bootstrap, summarized

RESULTS = "results.json"
_COST = ("train_s", "tokens_per_s", "peak_memory_bytes", "adapter_bytes", "steps", "tokens")


def earlier_failures(folder: Path) -> dict[str, dict[str, Any]]:
    """Failures that the last results told of."""
    try:
        found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["failed"]
        return {item["cell"]: {key: item[key] for key in ("error", "exit_code")} for item in found}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def collect(
    plan: Plan, failed: Mapping[str, Mapping[str, Any]], *, is_done: Callable[[Plan, Cell], bool]
) -> dict[str, Any]:
    """Everything that is measured so far, as `results.json` has it.

    Args:
        plan: the comparison.
        failed: cell to its `error` and `exit_code`.
        is_done: tells whether a cell is complete.

    Returns:
        `groups`, one for each data set and label: `metrics`, `cost`, `latency`, `text` and `others` (before, after) as
        summaries over seeds (`mean`, `sd`, `n`, `values`); `significance`, `curves`, `failed`, `missing`, `notes`, and
        what it was made from. A number that was not measured is absent.
    """
    done = {name: _Done(plan, cell) for name, cell in plan.cells.items() if is_done(plan, cell)}
    groups = []
    for data in plan.data:
        for label in plan.labels:
            cells = [cell for cell in plan.cells.values() if (cell.data, cell.label) == (data, label)]
            if cells:
                groups.append(_group(data, label, [done[c.name] for c in cells if c.name in done], cells, done))
    _complete_bare(groups)
    significance = _significance(plan, done)
    return {
        "format": 1,
        "deltaw": __version__,
        "command": plan.command,
        "output": plan.output,
        "model": next(iter(plan.cells.values())).setup["model"],
        "seeds": plan.seeds,
        "data": plan.data,
        "labels": plan.labels,
        "reference": plan.reference,
        "latency_of": plan.latency,
        "text_of": plan.text,
        "devices": sorted({one.device for one in done.values() if one.device}),
        "cells": {"all": len(plan.cells), "done": len(done)},
        "groups": groups,
        "significance": significance,
        "curves": {data: _curves(plan, data, done) for data in plan.data},
        "failed": [{"cell": name, **dict(found)} for name, found in failed.items() if name not in done],
        "missing": [name for name in plan.cells if name not in done and name not in failed],
        "notes": _notes(plan, done, significance),
        "config": plan.source,
    }


class _Done:
    """A complete cell's files."""

    def __init__(self, plan: Plan, cell: Cell) -> None:
        self.cell = cell
        self.folder = plan.folder(cell)
        record = cell_record(self.folder)
        assert record is not None
        self.record = record
        self.measured: dict[str, Any] = record["measured"]
        self.run: dict[str, Any] = {} if cell.bare else read_run(self.folder / "run.json")
        place = record.get("device", {})
        parts = [place.get("name") or place.get("type"), f"{place['threads']} threads" if "threads" in place else ""]
        self.device = ", ".join(filter(None, parts if place.get("type") == "cpu" else parts[:1]))

    @property
    def own(self) -> dict[str, Any]:
        """What was measured on the cell's own test rows."""
        found: dict[str, Any] = self.measured[f"task:{self.cell.data}"]
        return found

    def cost(self, name: str) -> float | None:
        """A number of the run's cost."""
        found: float | None = self.run.get("cost", {}).get(name)
        if name == "trainable_parameters":
            found = self.run.get("method", {}).get(name)
        return found

    def shares(self) -> tuple[list[str], list[tuple[float, float]]]:
        """Which test rows there were, and each one's share of the main metric."""
        lines = read_lines(self.folder / PREDICTIONS, [])
        return [line["row"] for line in lines], [(line["share"][0], line["share"][1]) for line in lines]


def _group(
    data: str, label: str, found: Sequence[_Done], cells: Sequence[Cell], done: Mapping[str, _Done]
) -> dict[str, Any]:
    """One row of the table."""
    cell = cells[0]
    group: dict[str, Any] = {
        "data": data, "label": label, "method": cell.method, "bare": cell.bare, "axes": cell.axes,
        "seeds": [one.cell.seed for one in found], "cells": len(cells),
    }  # fmt: skip
    if not found:
        return group
    group |= {"task": cell.setup["task"], "main": found[0].own["main"], "rows": found[0].own["rows"]}
    group["metrics"] = _columns([one.own["metrics"] for one in found])
    costs = {name: [one.cost(name) for one in found] for name in ("trainable_parameters", *_COST)}
    group["cost"] = {name: summarized(values) for name, values in costs.items() if None not in values}  # type: ignore[arg-type]
    group["latency"] = {
        kind: _columns([one.measured["latency"][kind] for one in found if kind in one.measured["latency"]])
        for kind in ("unmerged", "merged")
        if any(kind in one.measured.get("latency", {}) for one in found)
    }
    group["text"] = _before_after(
        [one.measured.get("text") for one in found],
        _befores(done, found, data, "text"),
        "perplexity",
    )
    group["others"] = {}
    for probe in cell.probes[1:]:
        name = f"task:{probe.name}"
        after = [one.measured[name] for one in found]
        befores = _befores(done, found, probe.name, name)
        main = after[0]["main"]
        shown = _before_after([one["metrics"] for one in after], [one and one["metrics"] for one in befores], main)
        group["others"][probe.name] = {"metric": main, **shown}
    return group


def _befores(done: Mapping[str, _Done], found: Sequence[_Done], probe: str, name: str) -> list[dict[str, Any] | None]:
    """What the bare base gave: once for all the seeds that it serves."""
    cells = dict.fromkeys(one.before for cell in found for one in cell.cell.probes if one.name == probe)
    return [done[cell].measured.get(name) if cell in done else None for cell in cells]


def _before_after(
    after: Sequence[Mapping[str, Any] | None], before: Sequence[Mapping[str, Any] | None], metric: str
) -> dict[str, Any]:
    found = {}
    for when, values in (("before", before), ("after", after)):
        numbers = [value[metric] for value in values if value and metric in value]
        if numbers and len(numbers) == len(values):
            found[when] = summarized(numbers)
    return found


def _columns(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A summary of each number that every record has."""
    names = [name for name in records[0] if all(isinstance(one.get(name), (int, float)) for one in records)]
    return {name: summarized([one[name] for one in records]) for name in names if name not in ("tokens", "n")}


def _complete_bare(groups: Sequence[dict[str, Any]]) -> None:
    """The bare base of one data set is that of the others too: what it was measured on there stands in its row."""
    bare = [group for group in groups if group["bare"] and "metrics" in group]
    for group in bare:
        found = {}
        for other in bare:
            if other["label"] == group["label"] and other["data"] != group["data"]:
                found[other["data"]] = {"metric": other["main"], "after": other["metrics"].get(other["main"])}
                found |= {name: item for name, item in other["others"].items() if name != group["data"]}
        group["others"] = {**{name: item for name, item in found.items() if item.get("after")}, **group["others"]}
        for item in [*group["others"].values(), group["text"]]:
            item.pop("before", None)


def _significance(plan: Plan, done: Mapping[str, _Done]) -> list[dict[str, Any]]:
    """Each method against the reference, on each data set."""
    rows = []
    for data in plan.data:
        by_label = {
            label: {one.cell.seed: one for one in done.values() if (one.cell.data, one.cell.label) == (data, label)}
            for label in plan.labels
        }
        reference = by_label.get(plan.reference, {})
        for label, own in by_label.items():
            if label == plan.reference or not own or not reference:
                continue
            row: dict[str, Any] = {"data": data, "label": label, "reference": plan.reference}
            rows.append(row | _compared(own, reference, data, label))
    return rows


def _compared(own: dict[int, _Done], reference: dict[int, _Done], data: str, label: str) -> dict[str, Any]:
    """One method against the reference; `reason` where they cannot be compared."""
    main = next(iter(reference.values())).own["main"]
    if any(one.own["main"] != main for one in own.values()):
        return {"reason": f"measured by other metrics than {main}"}
    # A bare model that no seed changes stands beside each seed of the other.
    own, reference = _spread(own, reference), _spread(reference, own)
    seeds = sorted(set(own) & set(reference))
    if not seeds:
        return {"metric": main, "reason": "no seed in common"}
    a = {seed: own[seed].shares() for seed in seeds}
    b = {seed: reference[seed].shares() for seed in seeds}
    if any(a[seed][0] != b[seed][0] for seed in seeds):
        return {"metric": main, "reason": "measured on other rows"}
    same = all(a[seed][0] == a[seeds[0]][0] for seed in seeds)
    found = paired_bootstrap(
        {seed: shares for seed, (_, shares) in a.items()},
        {seed: shares for seed, (_, shares) in b.items()},
        generator=generator(0, "compare", data, label),
        same_rows=same,
    )
    return {"metric": main, **found}


def _spread(own: dict[int, _Done], other: dict[int, _Done]) -> dict[int, _Done]:
    alone = next(iter(own.values())) if len(own) == 1 else None
    return dict.fromkeys(other, alone) if alone is not None and alone.cell.bare else own


def _curves(plan: Plan, data: str, done: Mapping[str, _Done]) -> dict[str, list[list[float]]]:
    """Label to (step, training loss), the mean over the seeds at the steps that all of them logged."""
    found = {}
    for label in plan.labels:
        logs = [
            {
                step: loss
                for step, loss in by_step(read_lines(one.folder / "metrics.jsonl", []), "loss")
                if loss is not None
            }
            for one in done.values()
            if (one.cell.data, one.cell.label, one.cell.bare) == (data, label, False)
        ]
        steps = sorted(set.intersection(*map(set, logs))) if logs else []
        if steps:
            found[label] = [[step, sum(log[step] for log in logs) / len(logs)] for step in steps]
    return found


def _notes(plan: Plan, done: Mapping[str, _Done], significance: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader has to know of the numbers."""
    notes = []
    count = len(plan.seeds)
    if count == 1:
        notes.append(
            "One seed: there is no spread over seeds, and the intervals tell only how far other test rows would change "
            "a difference, not how far another training would."
        )
    elif count < FEW_SEEDS:
        notes.append(
            f"{count} seeds are few for a spread: ± is their sample standard deviation, itself known only roughly, and "
            "the intervals understate how far another training would change a difference."
        )
    else:
        notes.append(f"± is the sample standard deviation over {count} seeds.")
    if any("p" in row for row in significance):
        notes.append(
            f"Intervals and p are from a paired bootstrap of {RESAMPLES:,} resamples over test rows"
            f"{' and seeds' if count > 1 else ''}; p is not corrected for the number of comparisons."
        )
    together = max((one.record.get("parallel", 1) for one in done.values()), default=1)
    if together > 1:
        notes.append(
            f"Up to {together} cells ran at a time: times, tokens per second and latencies say little, since they "
            "shared the machine."
        )
    devices = {one.device for one in done.values() if one.device}
    if len(devices) > 1:
        notes.append(f"Cells ran on different devices ({'; '.join(sorted(devices))}): do not compare their times.")
    if plan.text is not None:
        source = "newspaper editorials of deltaw's example data" if plan.text["text"] is None else plan.text["text"]
        notes.append(
            f"General text: {source}, {plan.text['tokens']:,} tokens at most; perplexity a token, in windows of "
            "max_length."
        )
    if plan.latency is not None:
        batch, prompt, tokens = (plan.latency[key] for key in ("batch", "prompt", "tokens"))
        notes.append(
            f"Latency: medians for {batch} prompt{'s' if batch > 1 else ''} of {prompt} tokens and, after it, a token "
            f"of {tokens} generated greedily."
        )
    return notes
