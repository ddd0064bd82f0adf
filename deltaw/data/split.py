"""A split that depends on a seed and on what the rows say, never on their order in the file or a global generator."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import replace

from deltaw.core.errors import InputError
from deltaw.data.rows import Counts, LabelRow, PromptRow, Row, RowSet, label_set, row_input


def split_rows(rowset: RowSet, *, held_out: float | int, seed: int) -> tuple[RowSet, RowSet]:
    """Splits off held-out rows, stratified by label where the rows have one.

    Rows with the same input (text, prompt, words, conversation before the last answer) stay on one side, so no held-out
    row was seen in training. Within a stratum these groups are ordered by SHA-256 of the seed and the input, and taken
    until the stratum's share is reached: reordering the file changes nothing; a row added or removed can move others,
    since the shares change. Groups are whole, so with many duplicates the held-out side can be smaller than asked for.

    Args:
        rowset: what `read_rows` gave.
        held_out: a share of the rows (a float between 0 and 1), or a number of rows (an int).
        seed: the run's seed.

    Returns:
        (training rows, held-out rows), each in the source's order; the source's counts of bad, empty and unmatched rows
        stay with the training rows.

    Raises:
        InputError: a share outside (0, 1), or a split that leaves one side empty.
    """
    total = len(rowset)
    if isinstance(held_out, bool) or not isinstance(held_out, int | float):
        raise InputError(f"held_out is {held_out!r}: give a share such as 0.1, or a number of rows")
    if isinstance(held_out, float) and not 0 < held_out < 1:
        raise InputError(f"held_out is {held_out}: a share lies between 0 and 1; a whole number counts rows")
    wanted = held_out if isinstance(held_out, int) else max(1, round(held_out * total))
    if not 0 < wanted < total:
        raise InputError(f"cannot hold out {wanted} of {total} rows of {rowset.source}: both sides need a row")

    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rowset):
        groups[row_input(row)].append(index)
    strata = _strata(rowset, groups)
    shares = _shares({name: sum(len(groups[key]) for key in keys) for name, keys in strata.items()}, wanted, total)

    held: set[int] = set()
    left: list[str] = []
    for name, keys in strata.items():
        room = shares[name]
        for key in sorted(keys, key=lambda k: _rank(seed, k)):
            if len(groups[key]) <= room:
                held.update(groups[key])
                room -= len(groups[key])
            else:
                left.append(key)
    for key in sorted(left, key=lambda k: _rank(seed, k)):
        if len(groups[key]) <= wanted - len(held):
            held.update(groups[key])
    if not held:
        raise InputError(
            f"cannot hold out {wanted} of {total} rows of {rowset.source}: "
            f"the rows share only {len(groups)} different inputs; hold out more, or remove duplicates"
        )
    train = _part(rowset, [i for i in range(total) if i not in held], rowset.counts)
    return train, _part(rowset, sorted(held), Counts())


def _strata(rowset: RowSet, groups: dict[str, list[int]]) -> dict[str, list[str]]:
    """Stratum to its groups' keys. A group whose rows disagree belongs to its commonest label, ties to the first."""
    labelled = label_set(rowset) is not None and isinstance(rowset.rows[0], LabelRow | PromptRow)
    strata: dict[str, list[str]] = defaultdict(list)
    for key, indices in groups.items():
        labels = Counter(_label(rowset.rows[i]) for i in indices) if labelled else Counter([""])
        strata[min(labels, key=lambda name: (-labels[name], name))].append(key)
    return {name: strata[name] for name in sorted(strata)}


def _label(row: Row) -> str:
    if isinstance(row, LabelRow):
        return row.label
    return row.completion.strip() if isinstance(row, PromptRow) else ""


def _shares(sizes: dict[str, int], wanted: int, total: int) -> dict[str, int]:
    """`wanted` divided among the strata in proportion to their sizes, by largest remainders."""
    shares = {name: size * wanted // total for name, size in sizes.items()}
    rest = sorted(sizes, key=lambda name: (-(sizes[name] * wanted % total), name))
    for name in rest[: wanted - sum(shares.values())]:
        shares[name] += 1
    return shares


def _rank(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\x1f{key}".encode()).digest()


def _part(rowset: RowSet, indices: list[int], counts: Counts) -> RowSet:
    return replace(
        rowset,
        rows=[rowset.rows[i] for i in indices],
        lines=[rowset.lines[i] for i in indices] if rowset.lines else (),
        groups=[rowset.groups[i] for i in indices] if rowset.groups else (),
        counts=replace(counts, rows=len(indices)),
    )
