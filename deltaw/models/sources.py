"""Where a model comes from: an embedded name, a folder, a GGUF file or the hub; each ends as what is loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deltaw.core.errors import InputError, RunError, near
from deltaw.core.files import sha256_file
from deltaw.models.cached import cached_folder
from deltaw.models.embedded import MINILM, SMOLLM2, minilm_folder, smollm2_folder
from deltaw.models.from_gguf import CONVERTER, convert_gguf
from deltaw.models.packages import PinnedFile, Progress, cache_folder

_Fetch = Callable[..., Path]
_SMOLLM2: tuple[_Fetch, PinnedFile] = (smollm2_folder, SMOLLM2)
_MINILM: tuple[_Fetch, PinnedFile] = (minilm_folder, MINILM)
EMBEDDED: dict[str, tuple[_Fetch, PinnedFile]] = {
    "smollm2-135m": _SMOLLM2,
    "smollm2-135m-instruct": _SMOLLM2,
    "minilm": _MINILM,
    "all-minilm-l6-v2": _MINILM,
}
"""Names in lower case, to the function that makes the folder and the pinned file behind it."""

_HUB_PREFIX = "hub:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelSource:
    """What to hand to transformers' `from_pretrained`.

    Attributes:
        path_or_id: a local folder, or a hub id.
        kind: where it came from.
        sha256: of the pinned wheel or the GGUF file; None for a folder and the hub.
    """

    path_or_id: str
    kind: Literal["embedded", "folder", "gguf", "hub"]
    sha256: str | None = None


def resolve(
    source: str | os.PathLike[str], *, cache: str | os.PathLike[str] | None = None, progress: Progress | None = None
) -> ModelSource:
    """Finds a model: an embedded name (in any case), a folder, a .gguf file or a hub id, looked for in this order.

    An embedded name wins over a folder of that name, which is meant by `./minilm`; `hub:owner/name` always means the
    hub, whatever lies in the working folder. A hub id is passed on unread: nothing here asks the hub.

    Args:
        source: what the user gave.
        cache: the root under which embedded and GGUF models are kept; `cache_folder()` when None.
        progress: told of downloads and conversions.

    Raises:
        InputError: no such folder or file, a folder that is no model, only pickled weights, a GGUF file that cannot be
            converted.
        RunError: an embedded model cannot be fetched.
    """
    given = os.fspath(source)
    if not given.strip():
        raise InputError(f"the model is empty: expected a folder, a .gguf file, a hub id or {_embedded_names()}")
    if given.startswith(_HUB_PREFIX):
        return _hub(given.removeprefix(_HUB_PREFIX), given)
    if given.lower() in EMBEDDED:
        make, pinned = EMBEDDED[given.lower()]
        return ModelSource(str(make(cache=cache, progress=progress)), "embedded", pinned.sha256)
    path = Path(given).expanduser()
    if path.is_dir():
        check_folder(path)
        return ModelSource(str(path), "folder")
    if path.is_file():
        return _from_file(path, cache, progress)
    _refuse_missing(given, path)
    return _hub(given, given)


def check_folder(path: Path) -> None:
    """Raises an InputError unless the folder holds a model that loads without unpickling anything."""
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise InputError(f"{path} is an adapter, not a model: give its base model here and the folder as --adapter")
        if files := sorted(path.glob("*.gguf")):
            raise InputError(f"{path} has no config.json; to use the GGUF file in it give {files[0]}")
        raise InputError(f"{path} is not a model folder: it has no config.json")
    try:
        if not isinstance(json.loads((path / "config.json").read_text(encoding="utf-8")), dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise InputError(f"{path / 'config.json'} cannot be read as JSON: {error}") from error
    if any(path.glob("*.safetensors")):
        return
    if pickles := sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern)):
        raise InputError(
            f"{path} has its weights only as a pickle ({pickles[0]}), which can run code and is never loaded: where "
            "you trust it, load it with transformers' from_pretrained and write a safetensors folder by save_pretrained"
        )
    raise InputError(f"{path} has a config.json but no weights: expected model.safetensors or its shards")


def explain_hub_error(source: str, error: Exception) -> RunError:
    """The one line for a hub id that could not be loaded, with what works without the hub."""
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 200 else reason[:200] + "..."
    return RunError(
        f"cannot load {source!r} from the hub ({reason}): give a local folder or .gguf file, or {_embedded_names()}, "
        "which need a Python package index only"
    )


def _embedded_names() -> str:
    return " or ".join(
        sorted({min((n for n, made in EMBEDDED.items() if made is one), key=len) for one in EMBEDDED.values()})
    )


def _hub(name: str, given: str) -> ModelSource:
    if not _HUB_ID.fullmatch(name):
        raise InputError(
            f"no such model: {given!r} is neither a folder, a .gguf file, an embedded name ({_embedded_names()}) nor a "
            "hub id (owner/name)"
        )
    return ModelSource(name, "hub")


def _from_file(path: Path, cache: str | os.PathLike[str] | None, progress: Progress | None) -> ModelSource:
    if path.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise InputError(f"{path} is a pickle, which can run code and is never loaded: give a safetensors folder")
    if path.suffix.lower() != ".gguf":
        raise InputError(f"{path} is a file: expected a model folder (with config.json) or a .gguf file")
    digest = sha256_file(path)
    root = cache_folder() if cache is None else Path(cache)
    made_from: dict[str, str | int] = {"gguf": digest, "converter": CONVERTER}
    target = root / "models" / f"gguf-{digest[:16]}"
    folder = cached_folder(target, made_from, lambda empty: convert_gguf(path, empty, progress=progress))
    return ModelSource(str(folder), "gguf", digest)


def _refuse_missing(given: str, path: Path) -> None:
    """An error where a path was meant; a hub id (`owner/name`, or a bare name) passes."""
    parent = path.parent
    beside = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    close = [str(parent / name) for name in near(path.name, beside)]
    embedded = [name for name in near(given.lower(), EMBEDDED, count=1) if "/" not in given]
    is_path = (
        given.startswith((".", "~", os.sep)) or given.endswith((".gguf", "/", os.sep)) or not _HUB_ID.fullmatch(given)
    )
    if is_path or (close and parent != Path()) or (embedded and _is_close(given.lower(), embedded[0])):
        hint = " or ".join([*embedded, *close])
        hint = f"did you mean {hint}? " if hint else ""
        raise InputError(
            f"no such model: {given!r}: {hint}expected a folder, a .gguf file, {_embedded_names()}, or a hub id "
            "(hub:owner/name where a folder is in its way)"
        )


def _is_close(a: str, b: str) -> bool:
    import difflib

    return difflib.SequenceMatcher(None, a, b).ratio() >= 0.75
