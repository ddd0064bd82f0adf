"""Where records come from: JSONL and CSV read line by line here (an error needs the line), Parquet, the hub."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.core.errors import InputError, RunError, near

JSON_LINES = (".jsonl", ".ndjson", ".json")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
EXTENSIONS = (*JSON_LINES, *SEPARATORS, ".parquet")


class BadRow(Exception):
    """One malformed row; becomes an `InputError` with its place, or a count."""


@dataclass
class Records:
    """A source's records before they are checked against a layout.

    Attributes:
        columns: every column seen, in order.
        items: (1-based line or row, the record as a dict, or why it cannot be one).
        names: for a column of class numbers, the names they stand for.
        textual: the cells are strings whatever they mean (CSV).
    """

    columns: list[str]
    items: list[tuple[int, dict[str, Any] | BadRow]]
    names: dict[str, list[str]] = field(default_factory=dict)
    textual: bool = False


def one_line(value: object, limit: int = 80) -> str:
    """The value's repr on one line, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def local_file(source: str | os.PathLike[str]) -> Path | None:
    """The file that `source` means, or None when it is a hub data set's name.

    A name is a hub's when it looks like `name` or `owner/name` (with `:configuration` at will), nothing of that name
    is here, and it neither ends like a file nor starts with a folder that exists.

    Raises:
        InputError: the file is missing (with near names), is a folder, or has an extension that nothing here reads.
    """
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        raise InputError(f"{source} is a folder: name one file in it ({', '.join(EXTENSIONS)})")
    if not path.exists():
        hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?", os.fspath(source))
        like_a_file = re.search(r"\.[A-Za-z][A-Za-z0-9]{1,7}$", path.name)
        if hub and not like_a_file and (path.parent == Path(".") or not path.parent.is_dir()):
            return None
        if not path.parent.is_dir():
            raise InputError(f"no such file: {source}; its folder {path.parent} does not exist either")
        close = near(path.name, (entry.name for entry in path.parent.iterdir()))
        hint = f"did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else "check the path"
        raise InputError(f"no such file: {source}; {hint}")
    if path.suffix.lower() not in EXTENSIONS:
        raise InputError(f"{source}: unknown extension {path.suffix!r}: expected one of {', '.join(EXTENSIONS)}")
    return path


def read_file(path: Path, wanted: set[str]) -> Records:
    """The records of a local file, by its extension; of a Parquet file only the wanted columns are loaded."""
    suffix = path.suffix.lower()
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty: expected at least one row")
        if suffix == ".parquet":
            return _read_parquet(path, wanted)
        records = _read_json_lines(path) if suffix in JSON_LINES else _read_csv(path, SEPARATORS[suffix])
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if not records.items:
        raise InputError(f"{path} is empty: expected at least one row")
    return records


def _read_json_lines(path: Path) -> Records:
    columns: dict[str, None] = {}
    items: list[tuple[int, dict[str, Any] | BadRow]] = []
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                record = _json_object(raw, first=number == 1)
            except BadRow as error:
                items.append((number, error))
                continue
            if record is not None:
                columns.update(dict.fromkeys(record))
                items.append((number, record))
    return Records(list(columns), items)


def _json_object(raw: bytes, *, first: bool) -> dict[str, Any] | None:
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadRow(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line; save the file as UTF-8"
        ) from None
    if not text:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"malformed JSON at column {error.colno} ({error.msg}): expected one JSON object a line") from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"malformed JSON ({one_line(str(error))}): expected one JSON object a line") from None
    if not isinstance(value, dict):
        raise BadRow(f"expected one JSON object a line, got {type(value).__name__} {one_line(value, 40)}")
    return value


def _read_csv(path: Path, separator: str) -> Records:
    items: list[tuple[int, dict[str, Any] | BadRow]] = []
    # surrogateescape keeps a wrong byte inside its own cell, so that the row can be named and the next one still read.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file, _long_cells():
        reader = csv.reader(file, delimiter=separator, strict=True)
        header: list[str] | None = None
        start = 1
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                raise InputError(f"{path}:{start}: malformed CSV ({error}): check the quotes of this row") from None
            if header is None:
                header = [cell.strip() for cell in cells]
                _check_header(header, f"{path}:{start}")
            elif cells:
                items.append((start, _csv_record(header, cells)))
            start = reader.line_num + 1
    return Records(header or [], items, textual=True)


def _check_header(header: list[str], where: str) -> None:
    for name in header:
        if broken := _broken(name):
            raise InputError(f"{where}: the header is {broken}; save the file as UTF-8")
    if not header or not all(header):
        raise InputError(f"{where}: the header has an empty column name: {one_line(header)}; name every column")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(f"{where}: the header names {', '.join(map(repr, twice))} twice: every column needs its own")


def _csv_record(header: list[str], cells: list[str]) -> dict[str, Any] | BadRow:
    if len(cells) != len(header):
        return BadRow(f"{len(cells)} cells, the header has {len(header)}: put cells that hold a separator in quotes")
    return dict(zip(header, cells, strict=True))


@contextmanager
def _long_cells() -> Iterator[None]:
    """Lifts csv's limit of 131072 characters a cell, which is global, and puts it back."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _broken(text: str) -> str | None:
    """Why a string cannot be written as UTF-8, or None."""
    for char in text:
        if "\udc80" <= char <= "\udcff":
            return f"not UTF-8: byte 0x{ord(char) - 0xDC00:02x}"
        if "\ud800" <= char <= "\udfff":
            return f"not Unicode text: the lone surrogate U+{ord(char):04X}"
    return None


def check_text(text: str, what: str) -> str:
    """The text, or a `BadRow` when it holds what no tokenizer can take."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{what} is {_broken(text)}; save the file as UTF-8") from None
    return text


def _read_parquet(path: Path, wanted: set[str]) -> Records:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if file.metadata.num_rows == 0:
                raise InputError(f"{path} is empty: expected at least one row")
            columns = [name for name in schema.names if name in wanted]
            values = [record for batch in file.iter_batches(columns=columns) for record in batch.to_pylist()]
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable Parquet file ({reason})") from None
    names: dict[str, list[str]] = {}
    if b"huggingface" in (schema.metadata or {}):
        from datasets import Features

        names = _class_names(Features.from_arrow_schema(schema))
    return Records(list(schema.names), list(enumerate(values, 1)), names)


def read_hub(name: str, split: str, wanted: set[str]) -> Records:
    """The wanted columns of a hub data set's split; `name` is `owner/name` or `owner/name:configuration`."""
    repository, _, configuration = name.partition(":")
    what = f"data set {name!r}, split {split!r}"
    import datasets

    try:
        data = datasets.load_dataset(repository, configuration or None, split=split)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, ValueError):
            raise InputError(f"cannot load the {what}: {reason}") from error
        if type(error).__name__ == "DatasetNotFoundError":
            raise InputError(
                f"no file {name!r} here and no such data set on the hub: check the name, or the path ({reason})"
            ) from error
        raise RunError(
            f"cannot load the {what}, as there is no file of that name here and the hub cannot be reached or read: "
            f"give a local file ({', '.join(EXTENSIONS)}), or try again with a network ({reason})"
        ) from error
    columns = list(data.column_names)
    # Columns that are not asked for may be images or sounds, which take a decoder to read.
    kept = data.select_columns([column for column in columns if column in wanted])
    return Records(columns, list(enumerate(kept, 1)), _class_names(data.features))


def _class_names(features: Any) -> dict[str, list[str]]:
    names = {}
    for column, feature in features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(getattr(inner, "names", None), list):
            names[column] = list(inner.names)
    return names
