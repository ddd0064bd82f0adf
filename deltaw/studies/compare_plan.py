"""What a comparison consists of: from one YAML file to cells, each a run with all its keys, checked before any runs.

A cell is (data set, method, a point of the axes, seed). What it is compared with *before* training are bare cells: the
base alone on one data set's test rows, measured once for all cells that ask it in the same way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw import __version__
from deltaw.checkpoint.model_files import ModelFacts, model_facts
from deltaw.core.configs import aliases_of
from deltaw.core.errors import InputError, unknown_name
from deltaw.core.files import sha256_file
from deltaw.data import label_set
from deltaw.methods import METHODS
from deltaw.models.packages import Progress
from deltaw.studies.catalogue import fetch_model
from deltaw.studies.compare_sheet import (
    BARE,
    FILES,
    LATENCY,
    SECTIONS,
    Entry,
    Sheet,
    canonical,
    fields_of,
    general_text,
    located,
    measured_section,
    plain_method,
    read_sheet,
    run_fields,
    spellings,
)
from deltaw.studies.job import resolved
from deltaw.studies.rows import RunRows, run_rows
from deltaw.train import TrainConfig
from deltaw.train.config import make_config, read_yaml
from deltaw.train.loop import check_setting

#: Keys by which two bare models are asked the same: what they are, which rows they see and how these are written out.
_ASKED = (
    "model data eval_data test_data held_out layout columns split skip_bad_rows task labels template chat_template "
    "label_prompt max_length max_new_tokens"
).split()
#: Tasks whose models are one class, so that one trained on one of them can be asked another.
_LANGUAGE = ("instruct", "causal-lm")


@dataclass(frozen=True)
class Probe:
    """Rows that a cell's model is measured on.

    Attributes:
        name: the data set's or the transfer set's.
        keys: of the run that asks these rows.
        file: of a transfer set; None: the test rows of the run.
        labels: the closed set of answers; None for free text.
        before: the bare cell that measured the same before training.
        fingerprint: changes with the rows and with how they are asked.
    """

    name: str
    keys: dict[str, Any]
    file: str | None
    labels: list[str] | None
    before: str
    fingerprint: str


@dataclass(frozen=True)
class Cell:
    """One run of a comparison, or one look at the bare base.

    Attributes:
        name: its folder below `cells`: data set, label, seed.
        data: the data set's name.
        label: the method's name, with what axes say of it.
        method: the method's name in the file.
        seed: of the run.
        bare: nothing is trained.
        keys: of the run, without the output.
        axes: the point of the axes.
        setup: every resolved key but for places, and the hashes of files: what a finished cell has to agree with.
        probes: what is measured, the cell's own test rows first.
        mergeable: the adapter can be written into the weights.
    """

    name: str
    data: str
    label: str
    method: str
    seed: int
    bare: bool
    keys: dict[str, Any]
    axes: dict[str, Any]
    setup: dict[str, Any]
    probes: list[Probe]
    mergeable: bool


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        output: its folder.
        source: the YAML file's text.
        command: the command line.
        seeds: of every trained cell.
        data: names of the data sets, in the file's order.
        labels: rows of the table, in their order.
        reference: the label that the others are compared with.
        parallel: cells at a time.
        text: the general text and how much of it; None: not measured.
        latency: batch, prompt and tokens; None: not measured.
        cells: by name, in the order of running.
    """

    output: str
    source: str
    command: str
    seeds: list[int]
    data: list[str]
    labels: list[str]
    reference: str
    parallel: int
    text: dict[str, Any] | None
    latency: dict[str, int] | None
    cells: dict[str, Cell]

    def folder(self, cell: Cell) -> Path:
        """Where the cell's run is."""
        return Path(self.output) / "cells" / cell.name

    def wanted(self, cell: Cell) -> dict[str, str]:
        """Names of a cell's measurements, with what each is of: one with another mark is made again."""
        marks = {f"task:{probe.name}": probe.fingerprint for probe in cell.probes}
        if self.text is not None and cell.setup["task"] in _LANGUAGE:
            marks["text"] = digest(self.text.get("sha256"), self.text["tokens"], cell.setup["max_length"])
        if self.latency is not None:
            marks["latency"] = digest(self.latency)
        return marks

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"format": 1, "deltaw": __version__, **dataclasses.asdict(self)}


def plan_of(record: Mapping[str, Any]) -> Plan:
    """The plan that `record` wrote."""
    cells = {
        name: Cell(**{**cell, "probes": [Probe(**probe) for probe in cell["probes"]]})
        for name, cell in record["cells"].items()
    }
    fields = {item.name: record[item.name] for item in dataclasses.fields(Plan)}
    return Plan(**{**fields, "cells": cells})


def digest(*values: Any) -> str:
    """A short name for plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_plan(
    file: str | Path,
    *,
    output: str | None = None,
    parallel: int | None = None,
    data_root: str | None = None,
    command: str = "",
    progress: Progress = lambda what, done, total: None,
) -> Plan:
    """Reads a comparison's YAML file, expands it into cells and checks each one's configuration and rows.

    Args:
        file: the YAML file.
        output: in place of the file's.
        parallel: in place of the file's.
        data_root: the folder that relative paths of rows start from; None means the file's own.
        command: what was typed, for the record.
        progress: told of a model's download.

    Raises:
        InputError: an unknown key or method, a missing file, rows or values that do not suit, in one line.
    """
    keys = read_yaml(file)
    for name in keys:
        if name not in SECTIONS:
            raise unknown_name("key of a comparison", name, SECTIONS)
    folder = output or keys.get("output")
    if not folder or not isinstance(folder, str):
        raise InputError(f"{file} names no output: give output (or --output), the folder to write")
    sheet = read_sheet(keys, Path(data_root) if data_root is not None else Path(file).parent)
    grid = _Grid(sheet, progress)
    cells = grid.cells()
    labels = list(dict.fromkeys(cell.label for cell in grid.ordered))
    count = parallel if parallel is not None else keys.get("parallel", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InputError(f"parallel is {count!r}: expected the number of cells to run at a time, at least 1")
    plan = Plan(
        output=folder,
        source=Path(file).read_text(encoding="utf-8"),
        command=command or f"deltaw compare {file}",
        seeds=sheet.seeds,
        data=list(sheet.data),
        labels=labels,
        reference=_reference(keys.get("reference"), grid.ordered),
        parallel=count,
        text=general_text(keys.get("forgetting"), sheet.root),
        latency=measured_section("latency", keys.get("latency"), LATENCY),
        cells=cells,
    )
    _check_positions(plan)
    return plan


@dataclass
class _Asked:
    """A configuration with its rows read and its open keys filled in."""

    config: TrainConfig
    rows: RunRows
    facts: ModelFacts


@dataclass
class _Grid:
    """Expands a sheet; reads each set of rows and each model's configuration once."""

    sheet: Sheet
    progress: Progress
    ordered: list[Cell] = field(default_factory=list)
    _facts: dict[str, ModelFacts] = field(default_factory=dict)
    _rows: dict[str, RunRows] = field(default_factory=dict)
    _hashes: dict[str, str] = field(default_factory=dict)
    _transfer: dict[str, list[str] | None] = field(default_factory=dict)
    _bare: dict[str, Cell] = field(default_factory=dict)

    def cells(self) -> dict[str, Cell]:
        """Every cell by name, bare ones first, then seed by seed; `ordered` has them in the order of the table."""
        trained = []
        # The file's own bare rows first: what is measured before training is then looked up among them.
        for entry in sorted(self.sheet.methods.values(), key=lambda entry: entry.method is not None):
            for data, point, seed in itertools.product(self.sheet.data, _points(entry.axes), self.sheet.seeds):
                if entry.method is None:
                    self._add_bare(data, entry.name, entry.keys, seed)
                else:
                    trained.append(self._trained(entry, data, point, seed))
        self.ordered = [*self._bare.values(), *trained]
        place = {name: index for index, name in enumerate(self.sheet.methods)}
        self.ordered.sort(key=lambda cell: place.get(cell.method, -1))
        found: dict[str, Cell] = {}
        for cell in sorted(self.ordered, key=lambda cell: (not cell.bare, self.sheet.seeds.index(cell.seed))):
            if cell.name in found:
                raise InputError(f"two cells would be {cell.name}: give the methods and values other names")
            found[cell.name] = cell
        return found

    def _keys(self, entry: Entry, data: str, point: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """The layers from common to axes; what the method has no use for in the wide ones is left out."""
        aliases = aliases_of(TrainConfig) if entry.method is None else spellings(entry.method)
        fields = run_fields() | (set() if entry.method is None else fields_of(plain_method(entry.method)))
        keys: dict[str, Any] = {}
        for layer in (self.sheet.common, self.sheet.data[data]):
            keys |= {name: value for name, value in canonical(layer, aliases).items() if name in fields}
        keys |= {**entry.keys, **point, "seed": seed}
        if entry.method is not None:
            # What the bare cells tell, and no training run needs to measure again.
            keys = {"evaluate_before": False, "baselines": False, "method": entry.method, **keys}
        return keys

    def _ask(self, keys: Mapping[str, Any], where: str) -> _Asked:
        try:
            config = make_config(keys)
            if config.model not in self._facts:
                fetch_model(config.model, progress=self.progress)
                self._facts[config.model] = model_facts(config.model)
            facts = self._facts[config.model]
            read = "data eval_data test_data layout columns split skip_bad_rows task labels held_out".split()
            split = _splits_by_seed(config) and config.seed
            key = digest(facts.generative, split, *(getattr(config, name) for name in read))
            if key not in self._rows:
                self._rows[key] = run_rows(config, generative=facts.generative)
            rows = self._rows[key]
            if rows.test is None:
                raise InputError("no rows are held out to measure on: give test_data")
            config = resolved(config, rows, facts)
            check_setting(config)
            return _Asked(config, rows, facts)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    def _trained(self, entry: Entry, data: str, point: Mapping[str, Any], seed: int) -> Cell:
        keys = self._keys(entry, data, point, seed)
        label = ",".join([entry.name, *(f"{name}={_written(value)}" for name, value in point.items())])
        name = f"{data}/{label}/seed-{seed}"
        asked = self._ask(keys, name)
        method = METHODS[asked.config.method]
        probes = self._probes(name, data, keys, asked)
        for other in self.sheet.data:
            if other != data:
                keys_there = self._keys(entry, other, point, seed)
                there = self._ask(keys_there, name)
                if _comparable(asked, there):
                    probes += self._probes(name, other, keys_there, there)
        seen = {probe.name: probe for probe in reversed(probes)}
        return Cell(
            name=name,
            data=data,
            label=label,
            method=entry.name,
            seed=seed,
            bare=False,
            keys=keys,
            axes=dict(point),
            setup=self._setup(asked.config),
            probes=[probe for probe in probes if seen[probe.name] is probe],
            mergeable=method.mergeable and not method.trains_base,
        )

    def _probes(self, where: str, data: str, keys: dict[str, Any], asked: _Asked, before: str = "") -> list[Probe]:
        """The test rows of one data set, and its transfer sets."""
        before = before or self._before(data, asked.config, asked.rows)
        probes = [self._probe(data, keys, asked.config, None, asked.rows.labels, before)]
        for name, source in self.sheet.transfer[data].items():
            file = located(self.sheet.root, source)
            config = asked.config
            key = digest(file, asked.rows.task, asked.rows.labels, config.layout, config.columns, config.split)
            if key not in self._transfer:
                try:
                    self._transfer[key] = transfer_rows(config, asked.rows, file, asked.facts).labels
                except InputError as error:
                    raise InputError(f"{where}: transfer {name}: {error}") from None
            probes.append(self._probe(name, keys, config, file, self._transfer[key], before))
        return probes

    def _probe(
        self,
        name: str,
        keys: dict[str, Any],
        config: TrainConfig,
        file: str | None,
        labels: list[str] | None,
        before: str,
    ) -> Probe:
        setup = self._setup(config)
        split = _splits_by_seed(config) and config.seed
        asked = [setup[key] for key in _ASKED if key != "data" or file is None]
        mark = digest(asked, labels, split, None if file is None else self._hash(file))
        return Probe(name, keys, file, labels, before, mark)

    def _before(self, data: str, config: TrainConfig, rows: RunRows) -> str:
        """The bare cell that is asked as a trained one is; made where the file names none."""
        usual = self._ask(self._keys(Entry(BARE, None, {}, {}), data, {}, config.seed), f"{data}/{BARE}").config
        given, plain = config.plain(), usual.plain()
        own = {key: given[key] for key in _ASKED if given[key] != plain[key]}
        label = ",".join([BARE, *(f"{key}={_written(value)}" for key, value in own.items())])
        return self._add_bare(data, label, own, config.seed).name

    def _add_bare(self, data: str, label: str, own: Mapping[str, Any], seed: int) -> Cell:
        keys = self._keys(Entry(label, None, dict(own), {}), data, {}, seed)
        asked = self._ask(keys, f"{data}/{label}")
        # Rows that do not change with the seed, asked of a model without a new head, give the same at every seed.
        if not _splits_by_seed(asked.config) and asked.rows.task in _LANGUAGE and seed != self.sheet.seeds[0]:
            return self._add_bare(data, label, own, self.sheet.seeds[0])
        setup = self._setup(asked.config)
        mark = digest(data, setup)
        if mark not in self._bare:
            name = f"{data}/{label}/seed-{seed}"
            probes = self._probes(name, data, keys, asked, before=name)
            self._bare[mark] = Cell(name, data, label, label.split(",")[0], seed, True, keys, {}, setup, probes, False)
        return self._bare[mark]

    def _setup(self, config: TrainConfig) -> dict[str, Any]:
        """Every key but the output; of a file its content's hash, so that it may move."""
        keys = config.plain()
        del keys["output"]
        for name in FILES:
            value = keys[name]
            if value and Path(value).is_file():
                keys[name] = f"sha256 {self._hash(value)}"
        return json.loads(json.dumps(keys, default=str))  # type: ignore[no-any-return]

    def _hash(self, file: str) -> str:
        if file not in self._hashes:
            self._hashes[file] = sha256_file(file)
        return self._hashes[file]


def _points(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The cross product of the axes."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _written(value: Any) -> str:
    """A value as part of a folder's name."""
    if isinstance(value, Mapping):
        value = [f"{key}-{item}" for key, item in value.items()]
    if isinstance(value, list):
        return "+".join(map(_written, value))
    text = f"{value:g}" if isinstance(value, float) else str(value).rstrip("/")
    short = re.sub(r"[^A-Za-z0-9._+-]+", "-", Path(text).name if "/" in text else text)
    return short if len(short) <= 40 else f"{short[:31]}-{digest(text)[:8]}"


def _splits_by_seed(config: TrainConfig) -> bool:
    return config.test_data is None and config.eval_data is None


def _comparable(own: _Asked, other: _Asked) -> bool:
    """Whether a model trained for one can be asked the other."""
    if own.rows.task in _LANGUAGE and other.rows.task in _LANGUAGE:
        return True
    return own.rows.task == other.rows.task and own.rows.labels == other.rows.labels


def transfer_rows(config: TrainConfig, rows: RunRows, file: str, facts: ModelFacts) -> RunRows:
    """A transfer set's rows as `train`, with the labels that they are asked by: the run's, where they are among them.

    Raises:
        InputError: rows that cannot be read, do not suit the task, or have labels that a trained head lacks.
    """
    head = rows.task.endswith("classification")
    asked = dataclasses.replace(
        config, data=file, eval_data=None, test_data=None, held_out=0, task=rows.task, early_stopping=0,
        labels=rows.labels if head else None,
    )  # fmt: skip
    found = run_rows(asked, generative=facts.generative)
    own = set(label_set(found.train) or ())
    if rows.labels is not None and own and own <= set(rows.labels):
        return dataclasses.replace(found, labels=rows.labels)
    if head:
        raise InputError(f"{file} has the labels {sorted(own)}, and the task's are {rows.labels}: leave it out")
    return found


def _reference(named: Any, cells: Sequence[Cell]) -> str:
    """The label to compare with: the named one, else the first that is trained."""
    labels = list(dict.fromkeys(cell.label for cell in cells))
    trained = [cell.label for cell in cells if not cell.bare]
    if named is None:
        return trained[0] if trained else labels[0]
    if named not in labels:
        whole = [cell.label for cell in cells if cell.method == named]
        if not whole:
            raise unknown_name("reference", str(named), labels)
        return whole[0]
    return str(named)


def _check_positions(plan: Plan) -> None:
    if plan.latency is None:
        return
    length = plan.latency["prompt"] + plan.latency["tokens"]
    for model in {cell.setup["model"] for cell in plan.cells.values()}:
        positions = model_facts(model).positions
        if positions is not None and length > positions:
            raise InputError(
                f"latency asks for {length} tokens and {model} has {positions} positions: lower prompt or tokens, or "
                "give latency: false"
            )
