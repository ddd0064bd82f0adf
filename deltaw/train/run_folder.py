"""A run folder: `config.yaml`, `run.json`, `metrics.jsonl`, `examples.jsonl`, `adapter/`, `checkpoints/`.

Every file is written whole or not at all, but for `metrics.jsonl`, which grows by lines and is cut back to the resumed
step when a run goes on.
"""

from __future__ import annotations

import json
import math
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from deltaw import __version__
from deltaw.core.errors import InputError
from deltaw.core.files import atomic_file, explain_os_error, write_json, write_text


class RunFolder:
    """Where a run writes. Only the first process of a distributed run may write.

    Attributes:
        path: the folder.
        record: the content of `run.json`, written by `save`.
    """

    def __init__(self, path: Path, record: dict[str, Any], *, writes: bool = True) -> None:
        self.path = path
        self.record = record
        self.writes = writes

    @classmethod
    def create(cls, path: str | Path, *, config: Mapping[str, Any], command: str, writes: bool = True) -> RunFolder:
        """Starts a fresh run.

        Raises:
            InputError: the folder holds a run already, or cannot be written to.
        """
        folder = Path(path)
        if writes and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "holds a run already" if (folder / "run.json").exists() else "is not empty"
            raise InputError(f"{folder} {what}: choose another output, or go on with --resume {folder}")
        record = {
            "format": 1,
            "deltaw": __version__,
            "status": "running",
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": command,
            "versions": versions(),
            "seed": config.get("seed", 0),
        }
        commit = _commit()
        if commit:
            record["commit"] = commit
        run = cls(folder, record, writes=writes)
        if writes:
            import yaml

            write_text(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
            run.save()
        return run

    @classmethod
    def open(cls, path: str | Path, *, writes: bool = True) -> RunFolder:
        """A run that exists.

        Raises:
            InputError: no run there, or a damaged one.
        """
        folder = Path(path)
        file = folder / "run.json"
        if not file.is_file():
            raise InputError(f"no run at {folder}: expected a folder that deltaw train wrote (with run.json in it)")
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file} is damaged ({error})") from None
        return cls(folder, record, writes=writes)

    def save(self, **changes: Any) -> None:
        """Takes `changes` into the record and writes `run.json`."""
        self.record.update(changes)
        if self.writes:
            write_json(self.path / "run.json", self.record)

    def log(self, line: Mapping[str, Any]) -> None:
        """Adds a line to `metrics.jsonl`; a number that is not finite is left out, as JSON has none."""
        if not self.writes:
            return
        line = {key: value for key, value in line.items() if not isinstance(value, float) or math.isfinite(value)}
        try:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise explain_os_error(error, self.path / "metrics.jsonl") from error

    def cut_log(self, step: int) -> None:
        """Forgets the lines of `metrics.jsonl` after `step`, and a last line that was cut off."""
        file = self.path / "metrics.jsonl"
        if not self.writes or not file.exists():
            return
        kept = []
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                break
        with atomic_file(file) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def write_examples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes `examples.jsonl`."""
        if self.writes:
            write_text(
                self.path / "examples.jsonl", "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
            )

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint: its folder got its name only when everything was in it."""
        found = {
            int(match[1]): child
            for child in (self.checkpoints.iterdir() if self.checkpoints.is_dir() else ())
            if (match := re.fullmatch(r"checkpoint-(\d+)", child.name))
        }
        return found[max(found)] if found else None


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "scikit-learn"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_record(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What `run.json` says of the device."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        name = str(found.get("cpu_name", "")) or platform.processor()
    return {
        "type": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: allocated on the GPU, resident for a process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(used) if sys.platform == "darwin" else int(used) * 1024


def _commit() -> str | None:
    """The commit of the source tree that is running, None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
