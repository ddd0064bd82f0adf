"""What a consortium study consists of: for every point of the rows' knobs and every seed, cells on equal terms.

A cell is one organisation alone (`alone-NAME`), all rows in one place (`central`), a federation with a rule, with
secure aggregation (`secure`) or with privacy by example (`dp-8`: at epsilon 8), or a baseline (`tfidf`, `majority`).
All trained ones make the same number of passes over their rows, with the same batches, rates and schedule.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.core.errors import InputError, unknown_name
from deltaw.core.files import sha256_file, write_text
from deltaw.federated.config import make_federation_config
from deltaw.federated.rules import RULES
from deltaw.studies.consortium_data import Example, label_counts
from deltaw.train.config import make_config

ALONE, CENTRAL, SECURE, BASELINES = "alone", "central", "secure", ("tfidf", "majority")
SECURE_RULE = "fedavg-ab"
#: Every kind of cell; of the robust rules the one that takes as few as three updates and has nothing to set.
ALL_CELLS = (
    ALONE, CENTRAL, "fedavg-ab", "product", "fedex", "ffa", "rolora", "sketch", SECURE, "median",
    "dp-8", "dp-3", "dp-1", *BASELINES,
)  # fmt: skip
#: The most evaluations of a federation, before the first round left out.
_LOOKS = 5
_PRIVATE = re.compile(r"dp-(\d+(?:\.\d+)?)")
#: Keys in which paths stand.
_PLACES = ("data", "test_data", "clients", "output")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is asked.

    Attributes:
        example: whose rows, and with which settings.
        output: the folder of the study.
        cells: kinds of cells, of `ALL_CELLS` and all rules; `dp-N` for any epsilon N.
        seeds: of rows and training.
        points: values of the rows' knobs, by a name that is a folder; one without a name is the whole study.
        rounds: of a federation; None means the example's.
        local_epochs: passes over an organisation's rows in a round.
        local_steps: optimizer steps in a round, in place of passes.
        parallel: cells at a time; above 1 each in a process of its own.
        options: keys of every training, in place of the example's.
        federated: keys of every federation.
        private: keys of private federations, in place of the example's.
    """

    example: Example
    output: str
    cells: Sequence[str] = ALL_CELLS
    seeds: Sequence[int] = (0,)
    points: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    rounds: int | None = None
    local_epochs: float = 1.0
    local_steps: int | None = None
    parallel: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    federated: Mapping[str, Any] = field(default_factory=dict)
    private: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.seeds or not self.cells or not self.points:
            raise InputError("a study needs at least one seed, one cell and one point of its knobs")
        if self.parallel < 1:
            raise InputError(f"parallel is {self.parallel!r}: expected the number of cells at a time, at least 1")

    @property
    def all_rounds(self) -> int:
        """How many rounds a federation has."""
        return self.example.rounds if self.rounds is None else self.rounds


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run.

    Attributes:
        name: its folder below the study's.
        label: what the tables call it, the same for all seeds.
        kind: `alone`, `central`, `rule`, `secure`, `private` or `baseline`.
        point: the point of the knobs.
        seed: of rows and training.
        keys: of the run, its output left out.
        setup: the keys without places, and the hashes of the rows: what a finished run has to agree with.
    """

    name: str
    label: str
    kind: str
    point: str
    seed: int
    keys: Mapping[str, Any]
    setup: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study with its cells, as its processes read it.

    Attributes:
        output: its folder.
        parallel: cells at a time.
        command: what was typed.
        cells: by name, in the order of running.
        rows: point and seed to each file's rows by label.
    """

    output: str
    parallel: int
    command: str
    cells: Mapping[str, Cell]
    rows: Mapping[str, Mapping[str, Mapping[str, int]]]

    def folder(self, cell: Cell) -> Path:
        """Where a cell's run is."""
        return Path(self.output) / cell.name


def make_plan(study: Study, *, command: str) -> Plan:
    """Writes each seed's rows and lays out the cells; every configuration is checked before any runs.

    Raises:
        InputError: an unknown cell, or settings that do not go together.
    """
    kinds = _kinds(study)
    cells: dict[str, Cell] = {}
    rows: dict[str, dict[str, dict[str, int]]] = {}
    for point, knobs in study.points.items():
        for seed in study.seeds:
            place = "/".join(filter(None, (point, f"seed-{seed}")))
            folder = Path(study.output) / place / "rows"
            files = dict(study.example.write(folder, seed=seed, **{**study.example.knobs, **knobs}))
            rows[place] = {name: label_counts(path) for name, path in files.items()}
            files["all"] = folder / "all.jsonl"
            whole = [files[name].read_text(encoding="utf-8") for name in study.example.organisations]
            write_text(files["all"], "".join(whole))
            made = _Seed(study, point, seed, place, files, rows[place])
            for kind in kinds:
                cells |= {cell.name: cell for cell in made.cells(kind)}
    return Plan(output=study.output, parallel=study.parallel, command=command, cells=cells, rows=rows)


def plan_record(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it."""
    return {"format": 1, "kind": "consortium", **dataclasses.asdict(plan)}


def plan_of(record: Mapping[str, Any]) -> Plan:
    """The plan that `plan_record` gave."""
    cells = {name: Cell(**cell) for name, cell in record["cells"].items()}
    return Plan(**{**{item.name: record[item.name] for item in dataclasses.fields(Plan)}, "cells": cells})


def epsilon_of(kind: str) -> float | None:
    """The epsilon that a private cell's name tells; None for others."""
    found = _PRIVATE.fullmatch(kind)
    return float(found[1]) if found and float(found[1]) > 0 else None


def _kinds(study: Study) -> list[str]:
    known = dict.fromkeys((*ALL_CELLS, *RULES))
    for kind in study.cells:
        if kind not in known and epsilon_of(kind) is None:
            raise unknown_name("cell", kind, known)
    return list(dict.fromkeys(study.cells))


class _Seed:
    """The cells of one seed."""

    def __init__(
        self,
        study: Study,
        point: str,
        seed: int,
        place: str,
        files: Mapping[str, Path],
        rows: Mapping[str, Mapping[str, int]],
    ) -> None:
        self.study, self.point, self.seed, self.place, self.files = study, point, seed, place, files
        self.counts = {name: sum(rows[name].values()) for name in study.example.organisations}
        labels = study.example.labels or tuple(sorted(set().union(*rows.values())))
        self.common = {
            **study.example.keys,
            **study.options,
            "labels": list(labels),
            "test_data": str(files["test"]),
            "seed": seed,
        }

    def cells(self, kind: str) -> list[Cell]:
        study = self.study
        if kind == ALONE:
            return [
                self._trained(f"{ALONE}-{name}", f"{name} alone", ALONE, name) for name in study.example.organisations
            ]
        if kind == CENTRAL:
            return [self._trained(CENTRAL, "all rows in one place", CENTRAL, "all")]
        if kind in BASELINES:
            named = {"tfidf": "TF-IDF + logistic regression on all rows", "majority": "majority class"}
            keys = {**self.common, "data": str(self.files["all"])}
            return [self._cell(kind, named[kind], "baseline", keys, ("all", "test"))]
        if (epsilon := epsilon_of(kind)) is not None:
            private = {"rule_options": {}, **study.example.private, **study.private}
            private |= {"dp": True, "target_epsilon": epsilon}
            of = f"{private.get('unit') or 'example'}-level epsilon {epsilon:g}"
            rule = private.get("rule", study.federated.get("rule", SECURE_RULE))
            return [self._federated(kind, f"federated, {rule}, {of}", "private", private)]
        if kind == SECURE:
            # A bound near the true number of rows keeps the fixed point's grid fine.
            bound = max(self.counts.values())
            more = {"rule": SECURE_RULE, "rule_options": {}, "secure": True, "secure_weight_bound": bound}
            return [self._federated(kind, f"federated, {SECURE_RULE}, secure aggregation", SECURE, more)]
        own = {"rule": kind} | ({"freeze_a": True} if kind == "ffa" else {})
        return [self._federated(kind, f"federated, {kind}", "rule", own)]

    def _trained(self, name: str, label: str, kind: str, data: str) -> Cell:
        study = self.study
        keys = {**self.common, "data": str(self.files[data]), "evaluate_before": False, "baselines": False}
        if study.local_steps is None:
            keys["epochs"] = study.all_rounds * study.local_epochs
        else:
            # As many rows as all the organisations together go through.
            keys["max_steps"] = study.all_rounds * study.local_steps * (len(self.counts) if kind == CENTRAL else 1)
        make_config(keys)
        return self._cell(name, label, kind, keys, (data, "test"))

    def _federated(self, name: str, label: str, kind: str, own: Mapping[str, Any]) -> Cell:
        study = self.study
        keys = {
            **self.common,
            "rounds": study.all_rounds,
            "evaluate_every": -(-study.all_rounds // _LOOKS),
            "evaluate_clients": False,
            **study.federated,
            **own,
            "clients": {name: {"data": str(self.files[name])} for name in self.counts},
        }
        if study.local_steps is None:
            keys["local_epochs"] = study.local_epochs
        else:
            keys["local_steps"] = study.local_steps
        make_federation_config(keys)
        return self._cell(name, label, kind, keys, (*self.counts, "test"))

    def _cell(self, name: str, label: str, kind: str, keys: Mapping[str, Any], files: Sequence[str]) -> Cell:
        setup = {key: value for key, value in keys.items() if key not in _PLACES}
        setup |= {f"rows of {file}": f"sha256 {sha256_file(self.files[file])}" for file in files}
        return Cell(
            name=f"{self.place}/{name}",
            label=label,
            kind=kind,
            point=self.point,
            seed=self.seed,
            keys=keys,
            setup=setup,
        )
