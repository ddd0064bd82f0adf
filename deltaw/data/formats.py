"""Reading a data source into rows: which layout it has, and a clear line with file and line number when it has none."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deltaw.core.errors import InputError, near, unknown_name
from deltaw.core.files import sha256_file
from deltaw.data.rows import LAYOUTS, ROLES, ChatRow, Counts, LabelRow, PromptRow, Row, RowSet, TagRow, TextRow
from deltaw.data.sources import BadRow, Records, check_text, local_file, one_line, read_file, read_hub

_FIELDS = sorted({name for layout in LAYOUTS.values() for name in layout.fields})
_TAG = re.compile(r"O|[BI]-.+", re.DOTALL)


def read_rows(
    source: str | os.PathLike[str],
    *,
    layout: str = "auto",
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    skip_bad_rows: bool = False,
    group: str | None = None,
) -> RowSet:
    """Reads JSONL, CSV, Parquet or a hub data set.

    Lines of white space are no rows. Rows whose text or answer is blank are left out and counted as `empty`.
    A cell of a CSV that stands for a list (`tokens`, `tags`, `messages`) holds it as JSON.

    Args:
        source: a path that ends in .jsonl, .ndjson, .json (one object a line), .csv, .tsv or .parquet (UTF-8), or a hub
            data set as `owner/name` or `owner/name:configuration`.
        layout: a key of `LAYOUTS`, or "auto" to tell it by the columns.
        columns: our field's name to the column's name in the source, for those that differ.
        split: which split of a hub data set; a file has none.
        skip_bad_rows: count malformed rows in `counts.bad` instead of raising for the first one.
        group: a column that says whom each row is of; None: nobody asks.

    Raises:
        InputError: one line with file and line number for a missing or empty file, a malformed row, a layout that is
            not clear, or a source of which nothing is left.
        RunError: the hub cannot be reached.
    """
    if layout != "auto" and layout not in LAYOUTS:
        raise unknown_name("layout", layout, ["auto", *LAYOUTS])
    for name in columns or {}:
        if name not in _FIELDS:
            raise unknown_name("field in columns", name, _FIELDS)
    path = local_file(source)
    name = os.fspath(source)
    mapping = {field: (columns or {}).get(field, field) for field in _FIELDS}
    wanted = set(mapping.values()) | ({group} if group is not None else set())
    records = read_hub(name, split, wanted) if path is None else read_file(path, wanted)
    if not skip_bad_rows:
        for line, item in records.items:
            if isinstance(item, BadRow):
                raise InputError(f"{name}:{line}: {item}")
    if records.columns:
        layout = _layout(name, records, layout, mapping, set(columns or ()))
    if group is not None and group not in records.columns:
        raise InputError(
            f"{name}: found the columns {', '.join(map(repr, records.columns)) or '(none)'}, and not {group!r}, which "
            "unit names: give the column that says whom a row is of"
        )

    rows: list[Row] = []
    lines: list[int] = []
    groups: list[str] = []
    bad = empty = 0
    for line, item in records.items:
        try:
            if isinstance(item, BadRow):
                raise item
            row = _row(item, layout, mapping, records)
            if group is not None and item.get(group) in (None, ""):
                raise BadRow(f"{group!r} is empty: expected whom the row is of")
        except BadRow as error:
            if not skip_bad_rows:
                raise InputError(f"{name}:{line}: {error}") from None
            bad += 1
            continue
        if row is None:
            empty += 1
            continue
        rows.append(row)
        lines.append(line)
        if group is not None:
            groups.append(str(item[group]))
    if not rows:
        raise InputError(f"{name}: no row is left ({bad} bad, {empty} empty): expected at least one")
    digest = None if path is None else sha256_file(path)
    return RowSet(rows, layout, name, digest, Counts(rows=len(rows), bad=bad, empty=empty), lines, groups)


def _layout(source: str, records: Records, layout: str, mapping: dict[str, str], mapped: set[str]) -> str:
    """The layout that the columns show, or the one asked for when its columns are there."""
    present = set(records.columns)
    found = f"{source}: found the columns {', '.join(map(repr, records.columns)) or '(none)'}"
    for field in mapped:
        if mapping[field] not in present:
            close = near(mapping[field], present)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise InputError(f"{found}, and not {mapping[field]!r}, which columns gives for {field!r}{hint}")
    if layout != "auto":
        missing = [mapping[f] for f in LAYOUTS[layout].fields if mapping[f] not in present]
        if missing:
            raise InputError(
                f"{found}; layout {layout!r} needs {', '.join(map(repr, missing))}: "
                "name the right columns with columns, or choose another layout"
            )
        return layout
    fits = [name for name, kind in LAYOUTS.items() if all(mapping[f] in present for f in kind.fields)]
    if "label" in fits:
        fits.remove("text")
    if len(fits) == 1:
        return fits[0]
    known = "; ".join(f"{name}: {', '.join(kind.fields)}" for name, kind in LAYOUTS.items())
    if fits:
        raise InputError(f"{found}, which fit the layouts {' and '.join(fits)}: say which with layout")
    hint = ""
    if records.textual and len(records.columns) == 1 and re.search(r"[;\t|]", records.columns[0]):
        hint = " (a .csv separates by commas, a .tsv by tabs)"
    raise InputError(f"{found}{hint}, which fit no layout: expected one of {known}; rename them with columns")


def _row(record: Mapping[str, Any], layout: str, mapping: dict[str, str], records: Records) -> Row | None:
    """The checked row, or None when its text or answer is blank."""
    values: list[Any] = []
    for field in LAYOUTS[layout].fields:
        column = mapping[field]
        if record.get(column) is None:
            raise BadRow(f"the row has no {column!r}" if column not in record else f"{column!r} is null")
        value = record[column]
        if records.textual and field in ("tokens", "tags", "messages"):
            value = _listed(value, column)
        values.append(_READERS.get(field, _text)(value, column, records.names.get(column)))
    if layout == "chat":
        answers = [m["content"] for m in values[0] if m["role"] == "assistant"]
        return ChatRow(values[0]) if any(a.strip() for a in answers) else None
    if layout == "tags":
        tokens, tags = values
        if len(tokens) != len(tags):
            raise BadRow(f"{len(tokens)} {mapping['tokens']!r} but {len(tags)} {mapping['tags']!r}: one tag a token")
        return TagRow(tokens, tags) if tokens else None
    if layout == "prompt":
        return PromptRow(*values) if values[1].strip() else None
    if layout == "label":
        text, label = values
        if not label.strip():
            raise BadRow(f"{mapping['label']!r} is blank: expected a label")
        return LabelRow(text, label.strip()) if text.strip() else None
    return TextRow(*values) if values[0].strip() else None


def _text(value: Any, column: str, names: Sequence[str] | None = None) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{column!r} is {type(value).__name__} {one_line(value, 40)}: expected text")
    return check_text(value, repr(column))


def _label(value: Any, column: str, names: Sequence[str] | None) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return _named(value, column, names) if names else str(value)
    if not isinstance(value, str):
        raise BadRow(
            f"{column!r} is {type(value).__name__} {one_line(value, 40)}: expected a label as text or a whole number"
        )
    return check_text(value, repr(column))


def _tokens(value: Any, column: str, names: Sequence[str] | None) -> list[str]:
    tokens = [_text(item, column) for item in _list(value, column)]
    if blank := [i for i, token in enumerate(tokens) if not token.strip()]:
        raise BadRow(f"item {blank[0] + 1} of {column!r} is blank: expected a word")
    return tokens


def _tags(value: Any, column: str, names: Sequence[str] | None) -> list[str]:
    tags = []
    for item in _list(value, column):
        tag = _named(item, column, names) if names and isinstance(item, int) else item
        if not isinstance(tag, str) or not _TAG.fullmatch(tag):
            raise BadRow(f"{column!r} has {one_line(item, 40)}: expected BIO tags such as 'O', 'B-person', 'I-person'")
        tags.append(check_text(tag, repr(column)))
    return tags


def _messages(value: Any, column: str, names: Sequence[str] | None) -> list[dict[str, str]]:
    messages = []
    for number, item in enumerate(_list(value, column), 1):
        what = f"message {number} of {column!r}"
        if not isinstance(item, Mapping):
            raise BadRow(f"{what} is {type(item).__name__}: expected an object with 'role' and 'content'")
        if item.get("tool_calls"):
            raise BadRow(f"{what} has 'tool_calls', which are not supported: write them out in 'content'")
        for key in ("role", "content"):
            if not isinstance(item.get(key), str):
                raise BadRow(f"{what} has no {key!r} text (its keys: {one_line(sorted(map(str, item)))})")
        if item["role"] not in ROLES:
            raise BadRow(f"{what} has the role {one_line(item['role'], 40)}: expected one of {', '.join(ROLES)}")
        messages.append({"role": item["role"], "content": check_text(item["content"], what)})
    return messages


def _list(value: Any, column: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadRow(f"{column!r} is {type(value).__name__} {one_line(value, 40)}: expected a list")
    return value


def _listed(cell: str, column: str) -> Any:
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        raise BadRow(f"{column!r} is {one_line(cell, 40)}: expected a list written as JSON") from None


def _named(value: int, column: str, names: Sequence[str] | None) -> str:
    if names is None or not 0 <= value < len(names):
        raise BadRow(f"{column!r} is the class number {value}: expected 0 to {len(names or ()) - 1}")
    return names[value]


_READERS: dict[str, Callable[[Any, str, Sequence[str] | None], Any]] = {
    "label": _label,
    "tokens": _tokens,
    "tags": _tags,
    "messages": _messages,
}
