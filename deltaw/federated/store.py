"""What both sides keep on disk, so that either may be killed at any moment.

A file gets its name by a rename once all of it is on the disk, and a server's checkpoint is a new folder each round,
which is there whole or not at all; the one before goes afterwards.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaw.core.errors import RunError
from deltaw.core.files import atomic_file, atomic_folder, write_json, write_text
from deltaw.core.protocols import LowRank
from deltaw.federated.messages import Message, MessageError, pack, unpack
from deltaw.federated.state import GlobalState, Layout
from deltaw.federated.wire import carried_tensors, layout_of, layout_plain, owned, state_of, state_tensors

_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")


class ClientStore:
    """A client's books of one or several runs: named messages, each replaced whole.

    Holds updates as they are before masking: its folder is the organisation's own, of mode 0700.

    Args:
        folder: where to keep them; None keeps them in memory, for as long as the process lives.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._kept: dict[tuple[str, str], bytes] = {}

    def save(self, run: str, name: str, message: Message) -> None:
        """Keeps a message under a name, on the disk when this returns."""
        data = pack(message)
        if self._folder is None:
            self._kept[run, name] = data
            return
        path = self._path(run, name)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)

    def load(self, run: str, name: str) -> Message | None:
        """The message of that name; None where there is none.

        Raises:
            RunError: it is damaged. What it held, such as privacy spent, is not guessed.
        """
        if self._folder is None:
            data = self._kept.get((run, name))
            return None if data is None else unpack(data)
        path = self._path(run, name)
        try:
            return unpack(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, MessageError) as error:
            raise RunError(f"{path}: {error}; restore it from a copy, or let this client leave the run") from None

    def drop(self, run: str, *names: str) -> None:
        """Forgets messages; those that are not there are no error."""
        for name in names:
            self._kept.pop((run, name), None)
            if self._folder is not None:
                self._path(run, name).unlink(missing_ok=True)

    def _path(self, run: str, name: str) -> Path:
        assert self._folder is not None
        if not _NAME.fullmatch(run) or not _NAME.fullmatch(name):
            raise MessageError(f"a run's id of {run[:100]!r}: expected letters, digits, - and _")
        return self._folder / run / f"{name}.message"


@dataclass
class Progress:
    """The server between two rounds.

    Attributes:
        state: the global model after `done` rounds.
        layout: of its tensors.
        base: SHA-256 of the frozen base that all clients have.
        done: rounds completed.
        line: the last completed round's line of `rounds.jsonl`.
        optimizer: the server optimizer's tensors.
        folds: updates that were folded into the bases, oldest first.
        totals: sums over the run, such as bytes.
    """

    state: GlobalState
    layout: Layout
    base: str
    done: int = 0
    line: dict[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    folds: list[Mapping[str, LowRank]] = field(default_factory=list)
    totals: dict[str, float] = field(default_factory=dict)


class ServerStore:
    """The server's part of a run folder: `state/` and `rounds.jsonl`.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._states = self.folder / "state"
        self._lines = self.folder / "rounds.jsonl"

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint, then the round's line, then takes the older checkpoint away."""
        name = f"round-{progress.done:06d}"
        if not (self._states / name).exists():
            with atomic_folder(self._states / name) as folder:
                self._write(folder, progress)
        self._append(progress.line)
        for old in self._checkpoints():
            if old.name != name:
                shutil.rmtree(old)

    def load(self) -> Progress | None:
        """The last whole checkpoint, or None; `rounds.jsonl` is brought to the same round.

        Raises:
            RunError: the checkpoint is damaged.
        """
        found = self._checkpoints()
        if not found:
            return None
        try:
            progress = self._read(found[-1])
        except (OSError, MessageError, KeyError, ValueError) as error:
            raise RunError(f"the checkpoint {found[-1]} cannot be read: {error}") from None
        kept = [line for line in self.lines() if line.get("round", 0) < progress.done]
        write_text(self._lines, "".join(json.dumps(line) + "\n" for line in [*kept, progress.line]))
        return progress

    def attempt(self, round_: int) -> int:
        """The number of a new attempt at a round, never given before, on the disk when this returns."""
        path = self._states / "attempt.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        number = int(found["attempt"]) + 1 if found.get("round") == round_ else 0
        write_json(path, {"round": round_, "attempt": number})
        return number

    def lines(self) -> list[dict[str, Any]]:
        """The whole lines of `rounds.jsonl`; a last one that a kill tore is left out."""
        made = []
        if self._lines.exists():
            for text in self._lines.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    break
                if isinstance(line, dict):
                    made.append(line)
        return made

    def _append(self, line: Mapping[str, Any]) -> None:
        with open(self._lines, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _checkpoints(self) -> list[Path]:
        return sorted(self._states.glob("round-*")) if self._states.is_dir() else []

    @staticmethod
    def _write(folder: Path, progress: Progress) -> None:
        header = {
            "layout": layout_plain(progress.layout),
            "base": progress.base,
            "done": progress.done,
            "line": progress.line,
            "folds": len(progress.folds),
            "totals": progress.totals,
        }
        parts = {"state": Message("state", header, state_tensors(progress.state))}
        parts["optimizer"] = Message("optimizer", {}, owned(progress.optimizer))
        for number, carried in enumerate(progress.folds):
            parts[f"fold-{number:06d}"] = Message("fold", {}, carried_tensors(carried))
        for name, message in parts.items():
            (folder / f"{name}.message").write_bytes(pack(message))

    @staticmethod
    def _read(folder: Path) -> Progress:
        def read(name: str) -> Message:
            return unpack((folder / f"{name}.message").read_bytes())

        message = read("state")
        header = message.header
        return Progress(
            state_of(message.tensors),
            layout_of(header["layout"]),
            header["base"],
            done=header["done"],
            line=header["line"],
            optimizer=read("optimizer").tensors,
            folds=[state_of(read(f"fold-{number:06d}").tensors).carried for number in range(header["folds"])],
            totals=header["totals"],
        )
