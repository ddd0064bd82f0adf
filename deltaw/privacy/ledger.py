"""The privacy ledger: what an organisation has spent, in a file that outlives runs.

One JSON object a line. The first line is the budget; each later one is a charge, or a change of the budget with its
reason. Every line begins with the SHA-256 of the line before, so that a line changed, left out or put in between is
found. Lines cut off the end, or a chain written anew as a whole, are found by who keeps an earlier `head` elsewhere.

A charge is on the disk (fsync) before `charge` returns, and is to be made before its noised sums leave. A process
killed in between has charged for nothing, never the other way round; asked again with the same key, the ledger charges
no second time. A line torn by a kill or a power cut was never answered for, is not counted, and is written over.

All charges compose, whatever their data. Charges marked `disjoint` compose in parallel: the caller says that their
data set (`data_sha256`) shares no unit with those of other disjoint charges, so that a unit pays for one of them only.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from deltaw.core.errors import InputError
from deltaw.core.files import explain_os_error
from deltaw.privacy.accounting import UNITS, PrivacySpec, Spent, epsilon, steps_left

FORMAT = 1
#: The hash that the first line names.
ORIGIN = "0" * 64


class BudgetError(InputError):
    """A charge that would exceed the budget.

    Attributes:
        spent, asked, budget: epsilons: before the charge, with it, and the most there may be.
    """

    def __init__(self, message: str, *, spent: float, asked: float, budget: float) -> None:
        super().__init__(message)
        self.spent, self.asked, self.budget = spent, asked, budget


@dataclass(frozen=True)
class Entry:
    """One charge; `epsilon` is what was spent with it."""

    key: str
    spec: PrivacySpec
    data_sha256: str | None
    disjoint: bool
    time: str
    epsilon: float


@dataclass
class _Book:
    """What the file says. `end` is where whole lines end, `head` the last one's hash."""

    budget_epsilon: float
    delta: float
    unit: str
    entries: dict[str, Entry]
    head: str
    end: int


class Ledger:
    """An organisation's ledger for one kind of unit. Made by `open`; any number of processes may use one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        budget_epsilon: float | None = None,
        delta: float | None = None,
        *,
        unit: str | None = None,
    ) -> Ledger:
        """Opens a ledger, or begins one where no file is.

        Args:
            path: the file; its folder is made.
            budget_epsilon: the most that may be spent; for an existing ledger its own (None: as it is there).
            delta: of the budget; likewise.
            unit: whose privacy is kept; likewise, and `example` for a new one.

        Raises:
            InputError: a new ledger without a budget, another budget than the file's, a damaged file.
        """
        budget, small = (1.0 if budget_epsilon is None else budget_epsilon), (0.5 if delta is None else delta)
        if not (0 < budget < math.inf and 0 < small < 1 and unit in (None, *UNITS)):
            raise InputError(
                f"a ledger with budget_epsilon {budget_epsilon}, delta {delta}, unit {unit!r}; an epsilon above 0, "
                f"a delta between 0 and 1, and one of {', '.join(UNITS)} are needed"
            )
        ledger, begin = cls(Path(path)), None
        if budget_epsilon is not None and delta is not None:
            begin = {"kind": "budget", "format": FORMAT, "budget_epsilon": budget, "delta": delta}
            begin["unit"] = unit or "example"
        elif not ledger.path.exists():
            raise InputError(f"no ledger at {path}: give the budget_epsilon and delta of a new one")
        with ledger._locked(create=begin is not None) as file:
            content = _content(file)
            if begin and b"\n" not in content and _torn(content, ORIGIN):
                ledger._append(file, 0, ORIGIN, begin)
                _sync_names(ledger.path.parent)
            book = ledger._book(file)
        for name, given, own in (
            ("budget_epsilon", budget_epsilon, book.budget_epsilon),
            ("delta", delta, book.delta),
            ("unit", unit, book.unit),
        ):
            if given is not None and given != own:
                raise InputError(
                    f"{path} is a ledger with {name} {own}, not {given}: open it with its own, change its budget by "
                    "Ledger.amend, or begin another file"
                )
        return ledger

    def charge(
        self,
        key: str | Sequence[str | int],
        spec: PrivacySpec,
        *,
        data_sha256: str | None = None,
        disjoint: bool = False,
    ) -> Spent:
        """Charges for releases that are about to be made.

        Args:
            key: names them (run id, round); charged once, however often asked. Sums that left and are made again with
                new noise are new releases and need another key; those that never left, or leave again as they are, not.
            spec: what they are.
            data_sha256: of the data set.
            disjoint: no unit of this data set is in another disjoint charge's.

        Returns:
            What is spent with the charge.

        Raises:
            BudgetError: it would be more than the budget; nothing is charged.
            InputError: a key that was charged for something else, another unit, disjoint without `data_sha256`.
        """
        name = key if isinstance(key, str) else "/".join(map(str, key))
        if disjoint and data_sha256 is None:
            raise InputError(
                "a disjoint charge without data_sha256: name the data set that shares no units with others"
            )
        with self._locked() as file:
            book = self._book(file)
            if spec.unit != book.unit:
                raise InputError(f"{self.path} counts by {book.unit}, not by {spec.unit}: keep another ledger for that")
            if (old := book.entries.get(name)) is not None:
                if (old.spec, old.data_sha256, old.disjoint) != (spec, data_sha256, disjoint):
                    raise InputError(
                        f"{name} was charged in {self.path} for other releases: give this charge another key"
                    )
                return _spent(book)
            wanted = Entry(name, spec, data_sha256, disjoint, _now(), math.nan)
            after = _spent(book, wanted)
            if not after.epsilon <= book.budget_epsilon:
                before = _spent(book).epsilon
                raise BudgetError(
                    f"{name} would take epsilon to {after.epsilon:.4g} at delta {book.delta:g}, over the budget of "
                    f"{book.budget_epsilon:g} in {self.path}; {before:.4g} is spent: take fewer steps, more noise (a "
                    "target epsilon calibrates it to what is left), or have the budget changed",
                    spent=before,
                    asked=after.epsilon,
                    budget=book.budget_epsilon,
                )
            line = asdict(replace(wanted, epsilon=after.epsilon))
            self._append(file, book.end, book.head, {"kind": "charge", **line})
            return after

    def amend(self, *, budget_epsilon: float, reason: str) -> None:
        """Changes the budget from here on; who reads the ledger sees when, from what, and why.

        Raises:
            InputError: a budget below what is spent or not above 0, no reason.
        """
        with self._locked() as file:
            book = self._book(file)
            spent = _spent(book).epsilon
            if not max(spent, 1e-300) <= budget_epsilon < math.inf or not reason.strip():
                raise InputError(
                    f"a budget of {budget_epsilon} with reason {reason!r}; {spent:.4g} is spent; give both"
                )
            line = {"kind": "amend", "time": _now(), "budget_epsilon": budget_epsilon, "reason": reason}
            self._append(file, book.end, book.head, line)

    def spent(self) -> Spent:
        """What all charges cost together."""
        return _spent(self._read())

    def remaining(self, *, sampling_rate: float, noise_multiplier: float) -> int:
        """How many more steps of this kind the budget has room for, on data that shares units with all before."""
        book = self._read()
        return min(
            steps_left(
                target_epsilon=book.budget_epsilon,
                delta=book.delta,
                sampling_rate=sampling_rate,
                noise_multiplier=noise_multiplier,
                already=specs,
            )
            for specs in _ways(book)
        )

    def composed(self) -> list[PrivacySpec]:
        """Every charge's releases, in the order of the file; `calibrate`'s `already`."""
        return [entry.spec for entry in self.entries()]

    def entries(self) -> list[Entry]:
        """Every charge, in the order of the file."""
        return list(self._read().entries.values())

    @property
    def budget_epsilon(self) -> float:
        """The most that may be spent."""
        return self._read().budget_epsilon

    @property
    def delta(self) -> float:
        """The delta of the budget."""
        return self._read().delta

    @property
    def head(self) -> str:
        """SHA-256 of the last line: who keeps it elsewhere can tell whether lines were cut off."""
        return self._read().head

    def table(self) -> list[dict[str, str]]:
        """One row a charge with what was spent up to there, for people: time, key, what, data, epsilon."""
        book = self._read()
        return [
            {
                "time": entry.time,
                "key": entry.key,
                "steps": str(entry.spec.steps),
                "noise": f"{entry.spec.noise_multiplier:.4g}" + (" of integers" if entry.spec.integer else ""),
                "sampling rate": f"{entry.spec.sampling_rate:.4g}",
                "data": (entry.data_sha256 or "")[:12] + (" (disjoint)" if entry.disjoint else ""),
                "epsilon": f"{entry.epsilon:.4g}",
                "left": f"{max(book.budget_epsilon - entry.epsilon, 0):.4g}",
            }
            for entry in book.entries.values()
        ]

    def _read(self) -> _Book:
        with self._locked() as file:
            return self._book(file)

    @contextlib.contextmanager
    def _locked(self, *, create: bool = False) -> Iterator[int]:
        """The file, open and locked against every other process and thread."""
        try:
            if create:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
        except OSError as error:
            raise explain_os_error(error, self.path) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        except OSError as error:
            raise explain_os_error(error, self.path) from error
        finally:
            os.close(file)

    def _book(self, file: int) -> _Book:
        lines = _content(file).split(b"\n")
        last, book, head, end = lines.pop(), None, ORIGIN, 0
        for number, raw in enumerate(lines, 1):
            if number == len(lines) and not last and b"\0" in raw and _torn(raw, head):
                break
            try:
                line = json.loads(raw)
                if line["previous"] != head:
                    raise InputError("does not follow the line before")
                book = _read_line(line, book)
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.path}, line {number} was changed or damaged ({error}): restore the file from a copy; until "
                    "then nothing can be charged"
                ) from None
            head, end = hashlib.sha256(raw).hexdigest(), end + len(raw) + 1
        if not _torn(last, head):
            raise InputError(f"{self.path} ends in something that is no line of it: restore the file from a copy")
        if book is None:
            raise InputError(f"{self.path} has no budget: restore the file from a copy, or remove it to begin another")
        book.head, book.end = head, end
        return book

    def _append(self, file: int, end: int, head: str, line: dict[str, Any]) -> None:
        raw = _written(head, line)
        os.ftruncate(file, end)
        os.lseek(file, end, os.SEEK_SET)
        while raw:
            raw = raw[os.write(file, raw) :]
        os.fsync(file)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")


def _sync_names(folder: Path) -> None:
    """Waits until the folder's list of files is on the disk, a new file's name with it."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _written(head: str, line: dict[str, Any]) -> bytes:
    return json.dumps({"previous": head, **line}, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _torn(rest: bytes, head: str) -> bool:
    """Whether `rest` can be what is left of a line whose writing was cut short (zeros: space without its content)."""
    start = _written(head, {})[:-2]
    return all(got in (want, 0) for got, want in zip(rest, start, strict=False))


def _content(file: int) -> bytes:
    os.lseek(file, 0, os.SEEK_SET)
    pieces = []
    while piece := os.read(file, 1 << 20):
        pieces.append(piece)
    return b"".join(pieces)


def _read_line(line: dict[str, Any], book: _Book | None) -> _Book:
    kind = line["kind"]
    if (kind == "budget") != (book is None):
        raise InputError(f"a line of kind {kind!r} out of place")
    if book is None:
        if line["format"] != FORMAT:
            raise InputError(f"format {line['format']}; this version reads {FORMAT}")
        return _Book(line["budget_epsilon"], line["delta"], line["unit"], {}, "", 0)
    if kind == "charge":
        values = {field.name: line[field.name] for field in fields(Entry)}
        book.entries[line["key"]] = Entry(**{**values, "spec": PrivacySpec.from_json(line["spec"])})
    elif kind == "amend":
        book.budget_epsilon = line["budget_epsilon"]
    else:
        raise InputError(f"a line of kind {kind!r}")
    return book


def _ways(book: _Book, new: Entry | None = None) -> list[list[PrivacySpec]]:
    """For each data set that is disjoint from others, what a unit in it is touched by; one list where there is none."""
    entries = [*book.entries.values(), *([new] if new else [])]
    sets = sorted({entry.data_sha256 or "" for entry in entries if entry.disjoint}) or [""]
    return [[e.spec for e in entries if not e.disjoint or e.data_sha256 == data] for data in sets]


def _spent(book: _Book, new: Entry | None = None) -> Spent:
    """The most that any unit pays."""
    return max((epsilon(specs, delta=book.delta) for specs in _ways(book, new)), key=lambda spent: spent.epsilon)
