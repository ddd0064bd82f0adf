"""A comparison's YAML file: its sections, checked by themselves, with files below one folder."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.core.configs import aliases_of
from deltaw.core.errors import InputError, unknown_name
from deltaw.core.files import sha256_file
from deltaw.data.sources import EXTENSIONS
from deltaw.methods import METHODS
from deltaw.models.sources import EMBEDDED
from deltaw.train import TrainConfig
from deltaw.train.config import SHORTHANDS

SECTIONS = "model output seeds data methods axes common reference parallel forgetting latency".split()
BARE = "base"
LATENCY = {"batch": 1, "prompt": 128, "tokens": 32}
FORGETTING = {"text": None, "tokens": 16384}
FILES = ("data", "eval_data", "test_data", "adapter")

#: Keys that a cell gets from its place in the grid.
_PLACED = ("output", "seed", "method")


@dataclass(frozen=True)
class Entry:
    """A method of the file."""

    name: str
    method: str | None
    keys: dict[str, Any]
    axes: dict[str, list[Any]]


@dataclass(frozen=True)
class Sheet:
    """The file's sections, each checked by itself."""

    root: Path
    common: dict[str, Any]
    data: dict[str, dict[str, Any]]
    transfer: dict[str, dict[str, str]]
    methods: dict[str, Entry]
    seeds: list[int]


def read_sheet(keys: Mapping[str, Any], root: Path) -> Sheet:
    """Checks each section; relative files start from `root`."""
    common = _mapping("common", keys.get("common"))
    if "model" in keys:
        common = {"model": keys["model"], **common}
    common = _placed(root, common)
    data = {
        name: _placed(root, _mapping(f"data.{name}", entry))
        for name, entry in _mapping("data", keys.get("data")).items()
    }
    methods = _mapping("methods", keys.get("methods"))
    for what, found in (("data", data), ("methods", methods)):
        if not found:
            raise InputError(f"the comparison has no {what}: give at least one entry under {what}")
        for name in found:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
                raise InputError(f"{what}.{name}: a name has letters, digits and . _ + - only")
    transfer = {name: _mapping(f"data.{name}.transfer", entry.pop("transfer", None)) for name, entry in data.items()}
    _check_probe_names(list(data), transfer)
    everything = _every_field()
    for what, entry in [("common", common), *((f"data.{name}", found) for name, found in data.items())]:
        _check_keys(what, entry, everything, _PLACED + (() if what != "common" else FILES[:3]))
    axes = _axes("axes", keys.get("axes"), root)
    entries = {name: _entry(name, entry, axes, root) for name, entry in methods.items()}
    return Sheet(root, common, data, transfer, entries, _seeds(keys.get("seeds", [0])))


def _check_probe_names(data: Sequence[str], transfer: Mapping[str, Mapping[str, Any]]) -> None:
    taken: dict[str, Any] = dict.fromkeys(data)
    for name, files in transfer.items():
        for probe, file in files.items():
            if probe in taken and taken[probe] != file:
                raise InputError(f"data.{name}.transfer.{probe}: another set of rows has this name: choose another")
            if not isinstance(file, str):
                raise InputError(f"data.{name}.transfer.{probe} is {file!r}: expected a file of rows")
            taken[probe] = file


def _mapping(what: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"{what} is {value!r}: expected keys and values")
    return {str(key): item for key, item in value.items()}


def _check_keys(what: str, keys: Mapping[str, Any], known: set[str], forbidden: Sequence[str]) -> None:
    for name in keys:
        if name not in known:
            raise unknown_name(f"key in {what}", name, known)
        if name in forbidden:
            where = {"seed": "seeds", "method": "methods", "output": "output"}.get(name, "data")
            raise InputError(f"{what} holds {name}, which the comparison sets: leave it to {where}")


def _seeds(value: Any) -> list[int]:
    whole = isinstance(value, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in value)
    if not whole or not value or len(set(value)) != len(value):
        raise InputError(f"seeds is {value!r}: expected a list of different whole numbers, such as [0, 1, 2]")
    return list(value)


def _axes(what: str, value: Any, root: Path) -> dict[str, list[Any]]:
    axes = _mapping(what, value)
    for name, values in axes.items():
        if name in (*_PLACED, *FILES):
            raise InputError(f"{what}.{name}: expected a field of the configuration that is no place and no seed")
        if not isinstance(values, list) or not values:
            raise InputError(f"{what}.{name} is {values!r}: expected a list of values")
    for name in axes:
        if name not in _every_field():
            raise unknown_name(f"field in {what}", name, _every_field())
    return {name: [_placed(root, {name: value})[name] for value in values] for name, values in axes.items()}


def _entry(name: str, value: Any, axes: Mapping[str, list[Any]], root: Path) -> Entry:
    keys = _placed(root, _mapping(f"methods.{name}", value))
    own = _axes(f"methods.{name}.axes", keys.pop("axes", None), root)
    method = keys.pop("method", name)
    known = [BARE, *METHODS, *SHORTHANDS]
    if method not in known:
        raise InputError(f"methods.{name}: {unknown_name('method', str(method), known)}")
    if method == BARE:
        if own:
            raise InputError(f"methods.{name} is the bare base, which has no axes: leave them out")
        _check_keys(f"methods.{name}", keys, run_fields() | set(aliases_of(TrainConfig)), (*_PLACED, *FILES))
        return Entry(name, None, canonical(keys, aliases_of(TrainConfig)), {})
    _check_keys(f"methods.{name}", keys, _every_field(), ("output", "seed", *FILES[:3]))
    spelled = spellings(method)
    merged = {**canonical(axes, spelled), **canonical(own, spelled)}
    fields = run_fields() | fields_of(plain_method(method))
    strange = next((field for field in canonical(own, spelled) if field not in fields), None)
    if strange is not None:
        raise unknown_name(f"field in methods.{name}.axes", strange, fields)
    return Entry(
        name, method, canonical(keys, spelled), {field: values for field, values in merged.items() if field in fields}
    )


def plain_method(method: str) -> str:
    """The registered method behind a shorthand."""
    return str(SHORTHANDS.get(method, {}).get("method", method))


def run_fields() -> set[str]:
    """Keys of a run that are no method's own."""
    return {item.name for item in dataclasses.fields(TrainConfig)} - {"method_config"}


def fields_of(method: str) -> set[str]:
    """A registered method's own keys."""
    return {item.name for item in dataclasses.fields(METHODS[method].config)}


def _every_field() -> set[str]:
    """Every key that some run takes, in every spelling."""
    return run_fields().union(
        aliases_of(TrainConfig), *(fields_of(name) | set(aliases_of(METHODS[name].config)) for name in METHODS)
    )


def spellings(method: str) -> dict[str, str]:
    """Other spellings of a method's run's keys, to the fields' names."""
    return {**aliases_of(TrainConfig), **aliases_of(METHODS[plain_method(method)].config)}


def canonical(keys: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """The keys under the fields' own names, so that a later layer's spelling overrides an earlier one's."""
    found: dict[str, Any] = {}
    for name, value in keys.items():
        own = aliases.get(name, name)
        if own in found:
            raise InputError(f"{name} and another spelling of {own} are given together: give one")
        found[own] = value
    return found


def measured_section(what: str, value: Any, defaults: Mapping[str, Any]) -> dict[str, Any] | None:
    """A section that is a mapping, absent (its defaults) or false (not measured)."""
    if value is False:
        return None
    keys = {} if value is True else _mapping(what, value)
    for name, item in keys.items():
        if name not in defaults:
            raise unknown_name(f"key in {what}", name, defaults)
        if name != "text" and (not isinstance(item, int) or isinstance(item, bool) or item < 1):
            raise InputError(f"{what}.{name} is {item!r}: expected a whole number of at least 1")
    return {**defaults, **keys}


def general_text(value: Any, root: Path) -> dict[str, Any] | None:
    """The general text: a file, or None for the editorials of the example data."""
    found = measured_section("forgetting", value, FORGETTING)
    if found is None or found["text"] is None:
        return found
    if not isinstance(found["text"], str):
        raise InputError(f"forgetting.text is {found['text']!r}: expected a file of text")
    path = Path(located(root, found["text"]))
    if not path.is_file():
        raise InputError(f"no such file: {path}; forgetting.text names general text (.txt, or rows with text)")
    return {**found, "text": str(path), "sha256": sha256_file(path)}


def located(root: Path, source: str) -> str:
    """A file below the root; what looks like no file and is not there is a name (of a model, of a hub's data set)."""
    path = Path(os.path.expanduser(source))
    below = root / path
    if below.exists() or path.suffix.lower() in (*EXTENSIONS, ".txt", ".gguf"):
        return os.path.normpath(below)
    return source


def _placed(root: Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys with their files below the root."""
    found = dict(keys)
    for name in (*FILES, "model"):
        value = found.get(name)
        if isinstance(value, str) and not (name == "model" and value.lower() in EMBEDDED):
            found[name] = located(root, value)
    return found
