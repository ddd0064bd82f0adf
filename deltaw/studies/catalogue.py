"""What there is to adapt: the models that come with deltaw, the known families, and the sites of a model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deltaw.checkpoint.model_files import TASKS, _auto_class, model_facts
from deltaw.core.errors import InputError, unknown_name
from deltaw.methods import METHODS, LoRA
from deltaw.models.families import FAMILIES, GROUPS, names_of, roles_of
from deltaw.models.packages import PinnedFile, Progress, cache_folder
from deltaw.models.sources import EMBEDDED, resolve
from deltaw.models.targets import model_type, resolve_targets


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that a Python package index provides.

    Attributes:
        names: what `--model` takes, the shortest first.
        about: its full name and licence.
        package: project and version on the index.
        download_bytes: of the package.
        cached: the folder that was made from it; None before the first use.
    """

    names: list[str]
    about: str
    package: str
    download_bytes: int
    cached: str | None


def embedded_models() -> list[EmbeddedModel]:
    """The embedded models; nothing is fetched."""
    made: dict[PinnedFile, list[str]] = {}
    for name, (_, pinned) in EMBEDDED.items():
        made.setdefault(pinned, []).append(name)
    found = []
    for pinned, names in made.items():
        # The maker's docstring begins with the model's name and licence.
        about = re.split(r",| as |\.$", (EMBEDDED[names[0]][0].__doc__ or "").strip().splitlines()[0])[0]
        folder = _built(pinned)
        found.append(
            EmbeddedModel(
                sorted(names, key=len),
                about,
                f"{pinned.project} {pinned.version}",
                pinned.size,
                None if folder is None else str(folder),
            )
        )
    return found


def fetch_model(source: str, *, progress: Progress) -> None:
    """Fetches an embedded model that is not in the cache yet, and tells how far it is; does nothing for others."""
    known = EMBEDDED.get(source.lower())
    if known is not None and _built(known[1]) is None:
        resolve(source, progress=progress)


def _built(pinned: PinnedFile) -> Path | None:
    """The cache's folder whose manifest says that it was made from this wheel."""
    for manifest in sorted((cache_folder() / "models").glob("*/deltaw.json")):
        try:
            if json.loads(manifest.read_text(encoding="utf-8"))["made_from"].get("wheel") == pinned.sha256:
                return manifest.parent
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def families() -> list[tuple[list[str], dict[str, tuple[str, ...]]]]:
    """Architectures that share their names: (model types, path suffix to the roles it plays)."""
    groups: dict[tuple[tuple[str, tuple[str, ...]], ...], list[str]] = {}
    for name, table in FAMILIES.items():
        groups.setdefault(tuple(table.items()), []).append(name)
    return [(sorted(names), dict(table)) for table, names in groups.items()]


@dataclass(frozen=True)
class TargetSite:
    """A module that some group of targets adapts.

    Attributes:
        name: its path in the model.
        kind: linear, conv1d or embedding.
        shape: (out, in).
        roles: what it does in its block; () where the family is unknown.
        groups: the groups that adapt it.
        parameters: of a LoRA on it.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    roles: tuple[str, ...]
    groups: tuple[str, ...]
    parameters: int

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "shape": list(self.shape), "roles": list(self.roles), "groups": list(self.groups)}


def target_sites(
    source: str | os.PathLike[str], *, r: int, targets: Sequence[str] = (), task: str | None = None
) -> list[TargetSite]:
    """The sites that each group of targets would adapt, from the model's configuration alone: no weights are read.

    Args:
        source: an embedded name, a folder, a GGUF file or a hub id.
        r: the LoRA's rank.
        targets: further targets (names, regular expressions) to show beside the groups.
        task: decides what is on top of the model; None means language modelling, masked for an encoder.

    Raises:
        InputError: no such model, or a target that matches nothing.
    """
    model = empty_model(source, task)
    config = LoRA(r=r)
    found: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}
    for group in ("all-linear", *GROUPS, *targets):
        try:
            sites = resolve_targets(model, group)
        except InputError:
            # An unknown architecture may have no module that plays these roles.
            if group in targets:
                raise
            continue
        for site in sites:
            found[site.name] = site
            groups.setdefault(site.name, []).append(group)
    table, _ = names_of(model_type(model))
    order = [name for name, _ in model.named_modules() if name in found]
    return [
        TargetSite(
            name,
            found[name].kind,
            found[name].shape,
            roles_of(name, table),
            tuple(groups[name]),
            METHODS["lora"].param_count(config, found[name].kind, found[name].shape),
        )
        for name in order
    ]


def empty_model(source: str | os.PathLike[str], task: str | None) -> Any:
    """The model's modules without memory behind their parameters."""
    import transformers

    generative = model_facts(source).generative
    config = transformers.AutoConfig.from_pretrained(resolve(source).path_or_id, trust_remote_code=False)
    task = task or ("causal-lm" if generative else "masked-lm")
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    with torch.device("meta"):
        return _auto_class(task, config).from_config(config)
