"""From `target_modules` to sites: groups, names and regular expressions; what matches nothing is an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from deltaw.core.errors import InputError, near, unknown_name
from deltaw.models.families import GROUPS, names_of, roles_of
from deltaw.models.sites import Site, base_modules, kind_of, output_head, site_of, task_heads

Targets = str | Sequence[str]


def model_type(model: nn.Module) -> str | None:
    """The architecture's name in transformers, None for a plain module."""
    found = getattr(getattr(model, "config", None), "model_type", None)
    return found if isinstance(found, str) else None


def resolve_targets(
    model: nn.Module,
    target_modules: Targets,
    *,
    exclude_modules: Targets | None = None,
    layers_to_transform: Sequence[int] | int | None = None,
    layers_pattern: Sequence[str] | str | None = None,
    reserved: Iterable[str] = (),
) -> list[Site]:
    """The sites that `target_modules` names, in the model's order.

    Each entry is a group (`all-linear`, `attention`, `qv`, `mlp`), a module's path or the end of one (`q_proj`,
    `attention.output.dense`), or a regular expression that matches whole paths. Groups and regular expressions pick
    linears, Conv1Ds and embeddings only; a name must be one.

    Args:
        model: the model to look through.
        target_modules: one entry or several.
        exclude_modules: entries of the same kind (names or a regular expression) that are left out.
        layers_to_transform: indices of the layers to keep; None keeps all.
        layers_pattern: name of the list that holds the layers, where the first number of a path is not the layer.
        reserved: paths of modules trained whole (`modules_to_save`), inside which nothing is adapted.

    Raises:
        InputError: an entry matches nothing (near names are listed), a layer that is not there, or a module that cannot
            be adapted.
    """
    modules = dict(base_modules(model))
    entries = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    if not entries or not all(isinstance(entry, str) and entry for entry in entries):
        raise InputError(f"target_modules is {target_modules!r}: expected groups, names or regular expressions")
    chosen: set[str] = set()
    for entry in entries:
        chosen |= _match(model, modules, entry)
    if exclude_modules is not None:
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules)
        for entry in excluded:
            left_out = {name for name in modules if name and (_names(name, entry) or _matches(name, entry))}
            if not left_out:
                ends = {name.rsplit(".", 1)[-1] for name in chosen}
                raise unknown_name(f"module of {type(model).__name__} to exclude", entry, ends)
            chosen -= left_out
    if layers_to_transform is not None:
        wanted = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform)
        layer_of = {name: _layer(name, layers_pattern) for name in chosen}
        if missing := sorted(wanted - set(layer_of.values()) - {None}, key=str):
            there = sorted(index for index in set(layer_of.values()) if index is not None)
            raise InputError(f"layers_to_transform {missing[0]!r}: the layers that hold a target are {there}")
        chosen = {name for name in chosen if layer_of[name] in wanted}
    reserved = tuple(reserved)
    chosen = {n for n in chosen if not any(n == r or n.startswith(r + ".") for r in reserved)}
    if not chosen:
        raise InputError(
            f"target_modules {target_modules!r} leaves no module after exclude_modules, layers_to_transform and "
            "modules_to_save"
        )
    return [site_of(name, module) for name, module in modules.items() if name in chosen]


def _match(model: nn.Module, modules: dict[str, nn.Module], entry: str) -> set[str]:
    """Paths of the modules that one entry names."""
    if entry == "all-linear":
        found = _inner_linears(model, modules)
        if not found:
            raise InputError(f"target 'all-linear': {type(model).__name__} has no linear module besides its head")
        return found
    if entry in GROUPS:
        return _group(model, modules, entry)
    named = {name for name in modules if _names(name, entry)}
    if named:
        return named
    adaptable = {name for name, module in modules.items() if kind_of(module) is not None}
    matched = {name for name in adaptable if _matches(name, entry)}
    if matched:
        return matched
    ends = {name.rsplit(".", 1)[-1] for name in adaptable}
    hint = near(entry, ends | adaptable | {"all-linear", *GROUPS}) or sorted(ends)[:12]
    raise InputError(
        f"target {entry!r} matches no module of {type(model).__name__}: near names are {', '.join(hint)}; "
        f"or use all-linear, {', '.join(GROUPS)}"
    )


def _inner_linears(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """Paths of all linears and Conv1Ds but those of the output head and of a classification head."""
    head = output_head(model)
    heads = task_heads(model)
    return {
        name
        for name, module in modules.items()
        if kind_of(module) in ("linear", "conv1d")
        and module is not head
        and not any(name == h or name.startswith(h + ".") for h in heads)
    }


def _group(model: nn.Module, modules: dict[str, nn.Module], group: str) -> set[str]:
    names, _ = names_of(model_type(model))
    wanted = set(GROUPS[group])
    linear = _inner_linears(model, modules)
    found = {name for name in linear if wanted & set(roles_of(name, names))}
    if not found and group != "qv":
        # No name of the table: the block's own name tells its attention from its MLP.
        within = re.compile(r"attn|attention" if group == "attention" else r"mlp|ffn|feed_?forward", re.IGNORECASE)
        found = {name for name in linear if within.search(name.rpartition(".")[0])}
    if not found:
        ends = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise InputError(
            f"target {group!r}: the family table does not know {model_type(model) or type(model).__name__!r} and its "
            f"names do not tell; name the modules instead, among {', '.join(ends[:12])}"
        )
    return found


def _names(path: str, entry: str) -> bool:
    return path == entry or path.endswith("." + entry)


def _matches(path: str, pattern: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error:
        return False


def _layer(path: str, patterns: Sequence[str] | str | None) -> int | None:
    """The index of the layer that holds `path`: its first number, or the one after a name in `patterns`."""
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", "." + path)
        return int(found[1]) if found else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path)
        if found:
            return int(found[1])
    return None


def peft_targets(
    model: nn.Module,
    target_modules: Targets,
    *,
    exclude_modules: Targets | None = None,
    layers_to_transform: Sequence[int] | int | None = None,
    layers_pattern: Sequence[str] | str | None = None,
) -> list[str]:
    """Paths that PEFT reads from these fields: a string is a regular expression, a list holds names alone.

    There an entry that matches nothing passes, and a whole path overrides the choice of layers (`check_target_module_
    exists` in `peft/tuners/tuners_utils.py`). `all-linear` is not resolved here, as PEFT never writes it.

    Raises:
        InputError: nothing at all is matched.
    """
    layers = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform or ())

    def named(path: str, entries: Targets) -> bool:
        if isinstance(entries, str):
            return _matches(path, entries)
        return any(_names(path, entry) for entry in entries)

    def taken(path: str) -> bool:
        if exclude_modules and named(path, exclude_modules):
            return False
        if isinstance(target_modules, str) or path in target_modules or not layers:
            return named(path, target_modules)
        return named(path, target_modules) and _layer(path, layers_pattern) in layers

    found = [path for path, _ in base_modules(model) if path and taken(path)]
    if not found:
        raise InputError(f"target_modules {target_modules!r} of the adapter match no module of {type(model).__name__}")
    return found


def shortest_names(model: nn.Module, sites: Sequence[str]) -> list[str]:
    """The shortest path endings that name exactly `sites` and no other module, for other programs to resolve.

    `q_proj` where every `q_proj` is a site; `attention.output.dense` where `output.dense` would say too much.
    """
    wanted = set(sites)
    others = [name for name, _ in base_modules(model) if name not in wanted]
    result: list[str] = []
    for site in sites:
        if any(_names(site, ending) for ending in result):
            continue
        parts = site.split(".")
        for length in range(1, len(parts) + 1):
            ending = ".".join(parts[-length:])
            if not any(_names(other, ending) for other in others):
                result.append(ending)
                break
        else:
            result.append(site)
    return sorted(set(result))


def pattern_value(patterns: dict[str, float] | dict[str, int], name: str, default: float) -> float:
    """The value of the first pattern that names the end of `name`, as PEFT has it, else the default."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
