"""Folders built once into the cache, with a manifest of hashes, so that a damaged or half-written one is rebuilt."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from deltaw.core.errors import DeltawError, InputError
from deltaw.core.files import atomic_folder, sha256_file, write_json
from deltaw.models.packages import remove_stale

log = logging.getLogger(__name__)

MANIFEST = "deltaw.json"


def cached_folder(target: Path, made_from: Mapping[str, str | int], build: Callable[[Path], None]) -> Path:
    """`target`, built by `build(folder)` unless it stands there intact and made from the same.

    Args:
        target: the folder in the cache.
        made_from: what the content follows from: hashes of the sources, the converter's version.
        build: fills an empty folder; whatever it raises leaves the cache as it was.

    Raises:
        InputError, RunError: what `build` raises, or one line for a cache that cannot be written to.
    """
    if intact(target, made_from):
        return target
    if target.exists():
        log.warning("%s is damaged or was made from something else; it is made again", target)
    remove_stale(target)
    try:
        with atomic_folder(target) as folder:
            build(folder)
            files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
            hashes = {name: {"size": file.stat().st_size, "sha256": sha256_file(file)} for name, file in files.items()}
            write_json(folder / MANIFEST, {"format": 1, "made_from": dict(made_from), "files": hashes})
            mode = (folder / MANIFEST).stat().st_mode & 0o777
            for file in files.values():  # safetensors writes files that only their owner may read
                os.chmod(file, mode)
    except DeltawError as error:
        if intact(target, made_from):  # another process was first
            return target
        if isinstance(error, InputError) and isinstance(error.__cause__, OSError):
            raise InputError(f"{error} (DELTAW_CACHE names the cache)") from error
        raise
    return target


def intact(folder: Path, made_from: Mapping[str, str | int]) -> bool:
    """Whether every file that the folder's manifest names is there with its hash, and was made from `made_from`."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != 1 or manifest["made_from"] != dict(made_from) or not manifest["files"]:
            return False
        files = {folder / name: known for name, known in manifest["files"].items()}
        return all(file.stat().st_size == known["size"] for file, known in files.items()) and all(
            sha256_file(file) == known["sha256"] for file, known in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
