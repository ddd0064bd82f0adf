"""Writing that never leaves half a file: to a temporary name beside the target, then rename."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deltaw.core.errors import DeltawError, InputError, RunError


def explain_os_error(error: OSError, path: str | os.PathLike[str] | None = None) -> DeltawError:
    """One clear line for the operating system's refusals (read-only, full disk, missing folder)."""
    where = os.fspath(path) if path is not None else (error.filename or "a file")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"no space left on the device while writing {where}: free some space or choose another folder")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return InputError(f"cannot write to {where}: {os.strerror(error.errno)}; choose a folder that you may write to")
    if error.errno == errno.ENOENT:
        return InputError(f"no such file or folder: {where}")
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return InputError(f"cannot write to {where}: a file stands in a folder's place, or a folder in a file's")
    return RunError(f"{where}: {error.strerror or error}")


def as_os_error(error: Exception) -> OSError:
    """The operating system's error inside one of safetensors', which is no `OSError` and tells it in its text."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else OSError(" ".join(str(error).split()))


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256 in hexadecimal, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it over `path` when the block ends well, removes it otherwise.

    Raises:
        InputError, RunError: one line for a read-only folder, a full disk and their like.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise explain_os_error(error, _culprit(error, temporary, target)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replaces: Sequence[str] | None = None) -> Iterator[Path]:
    """Yields a fresh folder; puts it in `path`'s place when the block ends well, removes it otherwise.

    Args:
        path: the folder.
        replaces: None replaces a folder that stands at `path` whole. Else patterns of names: of the old content only
            entries that match one, or that the new folder has too, go; what else stands there is left alone.

    Raises:
        InputError, RunError: one line for a read-only folder, a full disk and their like; the old content stands.
    """
    target = Path(os.path.abspath(path))
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_dir():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target))
        beside = target if replaces is not None and target.is_dir() else target.parent
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=beside))
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        sync_folder(temporary)
        if not target.exists():
            os.rename(temporary, target)
        elif replaces is None:
            _replace([(temporary, target)])
        else:
            new = sorted(temporary.iterdir())
            names = {entry.name for entry in new}
            stale = [
                old
                for old in sorted(target.iterdir())
                if old.name not in names and any(fnmatch.fnmatch(old.name, pattern) for pattern in replaces)
            ]
            _replace([*((entry, target / entry.name) for entry in new), *((None, entry) for entry in stale)])
    except OSError as error:
        raise explain_os_error(error, _culprit(error, temporary, target)) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace(moves: Sequence[tuple[Path | None, Path]]) -> None:
    """Renames each first path to the second (None: only takes the second away); on a failure all is as it was."""
    if not moves:
        return
    first = moves[0][1]
    old = Path(tempfile.mkdtemp(prefix=f".{first.name}.", suffix=".old", dir=first.parent))
    undo: list[tuple[Path, Path]] = []
    try:
        for number, (source, target) in enumerate(moves):
            if os.path.lexists(target):
                os.rename(target, old / str(number))
                undo.append((old / str(number), target))
            if source is not None:
                os.rename(source, target)
                undo.append((target, source))
    except BaseException:
        for source, target in reversed(undo):
            os.rename(source, target)
        os.rmdir(old)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _culprit(error: OSError, temporary: Path | None, target: Path) -> str:
    """The file that the system complained of: one that the block read, or the target under its own name."""
    name = error.filename
    own = temporary is None or name is None or os.fspath(name).startswith(os.fspath(temporary))
    return os.fspath(target if own else name)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Waits until every file below `path` is on the disk, so that a rename afterwards never shows half a file."""
    for file in Path(path).rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON atomically; NaN and infinity are refused, as JSON has neither."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
