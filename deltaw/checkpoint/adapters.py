"""Adapters on disk in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

Every key begins `base_model.model.` and goes on with the module's path; the adapter's name is not in it. No pickle is
ever read. What is missing, unexpected or of another shape is an error, and leaves the model as it was.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.errors import InputError
from deltaw.core.files import as_os_error, atomic_folder, write_json
from deltaw.methods.contract import Method
from deltaw.methods.host import adapt, adapter_names, book_of, delete_adapter, parts_of, set_adapter
from deltaw.methods.registry import METHODS, method_of
from deltaw.models.sites import base_modules, task_heads
from deltaw.models.targets import pattern_value, peft_targets

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

Path_ = str | os.PathLike[str]


def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's keys, on the CPU; sharded ones are gathered, so every process must call it."""

    def whole(tensor: Tensor) -> Tensor:
        gather = getattr(tensor, "full_tensor", None)
        return tensor if gather is None else gather()

    state: dict[str, Tensor] = {}
    stored: set[int] = set()
    for path, _, part in parts_of(model, name):
        for own, tensor in part.tensors().items():
            key, value = _key(path, own), whole(tensor).to("cpu").contiguous()
            # A tied pair inside a trained copy is written twice, as PEFT does: safetensors takes no shared storage.
            state[key] = value.clone() if value.data_ptr() in stored else value
            stored.add(value.data_ptr())
    return state


def _key(path: str, own: str) -> str:
    """A tensor's key in the file: after its module's path where it begins with a dot, else as it is."""
    return f"{PREFIX}{path}{own}" if own.startswith(".") else own


def write_state(
    model: nn.Module, name: str, state: dict[str, Tensor], folder: Path, *, base_model: str | None = None
) -> None:
    """Writes `adapter_state`'s tensors and the configuration into a folder that is made for it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config = book_of(model).configs[name]
    method = method_of(config)
    if method.to_peft is None:
        raise InputError(
            f"{name!r} is {method.name}, which trains the model itself: save the model with dw.save_model(model, path)"
        )
    # A site of rank 0 is written as PEFT writes it.
    bare = [f"{PREFIX}{path}." for path, _, part in parts_of(model, name) if part.described().get("r") == 0]
    empty = next((key for key, t in state.items() if not t.numel() and not key.startswith(tuple(bare))), None)
    if empty is not None:
        raise InputError(f"{empty} is empty: gather sharded parameters before saving")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    except SafetensorError as error:
        raise as_os_error(error) from error
    write_json(folder / CONFIG_FILE, peft_config(model, name, method, config, base_model))


def load_state(model: nn.Module, name: str, folder: Path) -> None:
    """Puts the tensors of a folder into an adapter that is on the model already."""
    _fill(model, name, _read_tensors(folder), folder)


def save_adapter(model: nn.Module, path: Path_, *, name: str | None = None, base_model: str | None = None) -> Path:
    """Writes one adapter as a folder that PEFT, vLLM and transformers load.

    Args:
        model: an adapted model.
        path: the folder; both files are written or none. What else stands in it is left alone.
        name: which adapter; None means the only one.
        base_model: what `base_model_name_or_path` says; None means what the model was loaded from.

    Raises:
        InputError: no such adapter, several and no name, or a method that has no such file.
    """
    name = _only(model, name)
    state = adapter_state(model, name)
    with atomic_folder(path, replaces=()) as folder:
        write_state(model, name, state, folder, base_model=base_model)
    return Path(path)


def peft_config(model: nn.Module, name: str, method: Method, config: Any, base_model: str | None) -> dict[str, Any]:
    """The fields of `adapter_config.json`."""
    assert method.to_peft is not None
    # Not by `low_rank`, for which DoRA takes norms: of a sharded one, with processes that are not asked here.
    sites = {path: part for path, _, part in parts_of(model, name) if any(map(_is_factor, part.tensors()))}
    copies = [path for path, _, part in parts_of(model, name) if part.replaces]
    known = base_model or getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return {
        "base_model_name_or_path": known,
        "task_type": _task_type(model, copies),
        "inference_mode": True,
        **method.to_peft(config, model, sites),
        "modules_to_save": copies or None,
    }


def _is_factor(key: str) -> bool:
    return key.startswith((".lora_A", ".lora_embedding_A"))


def _task_type(model: nn.Module, copies: Sequence[str]) -> str | None:
    kind = type(model).__name__
    heads = task_heads(model)
    if heads:
        # PEFT takes these two to mean that the head was trained and is in the file.
        trained = all(head in copies for head in heads)
        return ("SEQ_CLS" if "Sequence" in kind else "TOKEN_CLS") if trained else None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM" if kind.endswith(("ForConditionalGeneration", "WithLMHeadModel")) else None
    return "CAUSAL_LM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else None


def read_adapter(path: Path_) -> tuple[Method, Any, dict[str, Tensor]]:
    """The method, the configuration and the tensors of an adapter folder.

    Raises:
        InputError: no adapter there, a damaged file, a pickle, a method or field that is not supported.
    """
    folder = adapter_folder(path)
    fields = _read_config(folder)
    kind = fields.get("peft_type")
    for name in METHODS:
        method = METHODS[name]
        if method.peft_type is not None and method.peft_type == kind:
            assert method.from_peft is not None
            config = method.from_peft(fields)
            return method_of(config), config, _read_tensors(folder)
    supported = ", ".join(str(METHODS[name].peft_type) for name in METHODS if METHODS[name].peft_type)
    raise InputError(f"{folder / CONFIG_FILE}: peft_type {kind!r} is not supported: expected one of {supported}")


def adapter_folder(path: Path_) -> Path:
    """The folder itself, or its `adapter/` where it is a run folder."""
    folder = Path(path)
    inside = folder / "adapter"
    return inside if not (folder / CONFIG_FILE).is_file() and (inside / CONFIG_FILE).is_file() else folder


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        inside = sorted(saved_adapters(folder)) if folder.is_dir() else []
        if inside:
            named = ", ".join(str(folder / name) for name in inside)
            raise InputError(f"{folder} holds several adapters: name one of {named}")
        what = "no such folder" if not folder.exists() else f"no {CONFIG_FILE} in it"
        raise InputError(f"no adapter at {folder}: {what}; give a folder that dw.save_adapter or PEFT wrote")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({_one_line(error)}): copy the adapter again") from None
    if not isinstance(fields, dict):
        raise InputError(f"{file} holds {type(fields).__name__}: expected an object of PEFT's fields")
    return fields


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS_FILE
    if not file.is_file():
        pickles = [p.name for p in folder.glob("*.bin")] + [p.name for p in folder.glob("*.pt")]
        if pickles:
            raise InputError(
                f"{folder / pickles[0]} is a pickle, which can run code and is never loaded: "
                "save the adapter again with safe_serialization=True"
            )
        raise InputError(f"no {WEIGHTS_FILE} in {folder}: the adapter is incomplete")
    try:
        return load_file(file)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{file} is damaged or no safetensors file ({_one_line(error)}): copy it again") from None


def load_adapter(
    model: nn.Module,
    path: Path_,
    *,
    name: str | None = None,
    trainable: bool = False,
    active: bool | None = None,
) -> nn.Module:
    """Puts an adapter from a folder on `model`, in place.

    Args:
        model: the base it was trained on, adapted or not.
        path: a folder that `save_adapter` or PEFT wrote, or a run folder.
        name: how to call it; None means the folder's name, with what a name cannot have replaced.
        trainable: whether to go on training it, then in at least float32; else its tensors keep their dtype.
        active: whether to compute with it now, alone; None means only if it is the first.

    Raises:
        InputError: not an adapter, or one of another model: the first differences are named, the model is unchanged.
    """
    folder = adapter_folder(path)
    _, config, tensors = read_adapter(folder)
    if name is None:
        stem = folder.parent.name if folder.name == "adapter" else folder.name
        name = re.sub(r"[^A-Za-z0-9_-]", "-", stem) or "default"
        # A folder may be called what no adapter can: `train`, `keys`.
        name = f"adapter-{name}" if hasattr(nn.ModuleDict(), name) else name
    before = dict(book_of(model).active)
    adapt(model, _exact_modules(model, config), name=name, trainable=trainable)
    try:
        _take_dtypes(model, name, tensors, trainable)
        _fill(model, name, tensors, folder)
    except BaseException:
        delete_adapter(model, name)
        if book_of(model).configs:
            set_adapter(model, before)
        raise
    if active is False or (active is None and len(book_of(model).configs) > 1):
        set_adapter(model, before)
    return model


def _exact_modules(model: nn.Module, config: Any) -> Any:
    """The configuration with its modules as whole paths, read as PEFT reads them, which is not how users' are read."""
    changes: dict[str, Any] = {}
    targets = getattr(config, "target_modules", None)
    if targets is not None and targets != "all-linear":
        chosen = ("exclude_modules", "layers_to_transform", "layers_pattern")
        paths = peft_targets(model, targets, **{name: getattr(config, name) for name in chosen})
        changes = {"target_modules": paths, **dict.fromkeys(chosen)}
        # PEFT passes over patterns that name nothing; here they are mistakes.
        for field in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(config, field, {})
            used = {p: value for p, value in patterns.items() if any(pattern_value({p: 1}, path, 0) for path in paths)}
            if used != patterns:
                changes[field] = used
    if wanted := getattr(config, "modules_to_save", None):
        changes["modules_to_save"] = _saved_paths(model, wanted)
    return dataclasses.replace(config, **changes) if changes else config


def _saved_paths(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Paths of `modules_to_save`: PEFT matches its entries against any ending of a path, dot or not."""
    paths = [path for path, _ in base_modules(model) if any(path.endswith(ending) for ending in wanted)]
    missing = [ending for ending in wanted if not any(path.endswith(ending) for path in paths)]
    # PEFT adds both "classifier" and "score" for classification models, whichever the model has.
    if missing and not (paths and set(missing) <= {"classifier", "score"}):
        raise InputError(f"modules_to_save {missing[0]!r} of the adapter is no module of {type(model).__name__}")
    return paths


def _take_dtypes(model: nn.Module, name: str, tensors: dict[str, Tensor], trainable: bool) -> None:
    """Gives an adapter's parameters the dtype that the file has, so that nothing is rounded in loading."""
    for path, _, part in parts_of(model, name):
        own = part.tensors()
        given = {key: tensors[full].dtype for key in own if (full := _key(path, key)) in tensors}
        floating = [dtype for dtype in given.values() if dtype.is_floating_point]
        if not floating:
            continue
        if part.replaces:
            floating += [parameter.dtype for parameter in part.parameters() if parameter.is_floating_point()]
        elif trainable:
            floating.append(torch.float32)
        part.to(functools.reduce(torch.promote_types, floating))
        if not part.replaces and not trainable and len(set(floating)) > 1:
            # A magnitude is wider than the factors beside it.
            by_place = {tensor.data_ptr(): given[key] for key, tensor in part.tensors().items() if key in given}
            for parameter in part.parameters():
                parameter.data = parameter.data.to(by_place.get(parameter.data_ptr(), parameter.dtype))


def _fill(model: nn.Module, name: str, tensors: dict[str, Tensor], folder: Path) -> None:
    expected: dict[str, tuple[Any, str, Tensor]] = {}
    for path, _, part in parts_of(model, name):
        for key, tensor in part.tensors().items():
            expected[_key(path, key)] = (part, key, tensor)
    owned = {key: _base_parameter(model, key) for key in expected if key.endswith(".bias")}
    biases = {id(own): key for key, own in owned.items() if own is not None}
    extra = [
        key
        for key in tensors
        if key not in expected
        and not _is_alias(_base_parameter(model, key), key, tensors, biases)
        and not _harmless(model, key, tensors[key], folder)
    ]
    missing = [key for key in expected if key not in tensors]
    wrong = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(tensor.shape)}"
        for key, (_, _, tensor) in expected.items()
        if key in tensors and tensors[key].shape != tensor.shape
    ]
    problems = [
        f"{len(found)} {what} ({found[0]}{', ...' if len(found) > 1 else ''})"
        for what, found in (("missing", missing), ("unexpected", extra), ("of another shape", wrong))
        if found
    ]
    if problems:
        raise InputError(
            f"{folder} does not fit {type(model).__name__}: tensors {'; '.join(problems)}; "
            "load the model that the adapter was trained on"
        )
    for key, (_, _, tensor) in expected.items():
        if tensors[key].is_floating_point() != tensor.is_floating_point():
            raise InputError(f"{folder}: {key} is {tensors[key].dtype}: expected floating-point numbers")
        if not torch.isfinite(tensors[key]).all():
            raise InputError(f"{folder}: {key} holds NaN or infinity: the adapter is broken")
    by_part: dict[int, tuple[Any, dict[str, Tensor]]] = {}
    for full_key, (part, key, _) in expected.items():
        by_part.setdefault(id(part), (part, {}))[1][key] = tensors[full_key]
    for part, own in by_part.values():
        part.load_tensors(own)


def _base_parameter(model: nn.Module, key: str) -> nn.Parameter | None:
    """The model's own parameter that a key of PEFT's means, if it means one."""
    module_path, _, parameter = key.removeprefix(PREFIX).replace(".base_layer.", ".").rpartition(".")
    try:
        return model.get_submodule(module_path)._parameters.get(parameter)
    except AttributeError:
        return None


def _is_alias(own: nn.Parameter | None, key: str, tensors: dict[str, Tensor], biases: dict[int, str]) -> bool:
    """Whether a key is the second name of a trained bias that two modules share, and says the same."""
    first = biases.get(id(own)) if own is not None else None
    return first is not None and first in tensors and torch.equal(tensors[first], tensors[key])


def _harmless(model: nn.Module, key: str, tensor: Tensor, folder: Path) -> bool:
    """Whether a key beyond the adapter's own is a copy that PEFT adds: of base embeddings, of an original module."""
    if ".original_module." in key or ".modules_to_save." in key:
        return True
    own = _base_parameter(model, key)
    if own is None:
        return False
    base = own.detach().cpu()
    # The base may have been read in a narrower dtype here, or there.
    same = own.shape == tensor.shape and (
        torch.equal(base, tensor.to(base.dtype)) or torch.equal(base.to(tensor.dtype), tensor)
    )
    if not same:
        raise InputError(
            f"{folder} carries its own {key.removeprefix(PREFIX)} {tuple(tensor.shape)}, and the model's differs: "
            "load the model that the adapter was trained on, with the same vocabulary"
        )
    return True


def saved_adapters(path: Path_) -> dict[str, Path]:
    """Adapters in PEFT's layout for several: the folder itself as "default", subfolders by their names."""
    folder = Path(path)
    found = {"default": folder} if (folder / CONFIG_FILE).is_file() else {}
    for child in sorted(folder.iterdir()) if folder.is_dir() else []:
        if (child / CONFIG_FILE).is_file() and child.name != "adapter":
            found[child.name] = child
    return found


def load_adapters(model: nn.Module, path: Path_) -> list[str]:
    """Loads every adapter of a folder or none, inactive unless it is the model's first; gives their names."""
    found = saved_adapters(path)
    if not found:
        raise InputError(f"no adapter at {path}: expected {CONFIG_FILE} in it or in its subfolders")
    loaded: list[str] = []
    try:
        for name, folder in found.items():
            load_adapter(model, folder, name=name)
            loaded.append(name)
    except BaseException:
        for name in loaded:
            delete_adapter(model, name)
        raise
    return loaded


def save_adapters(model: nn.Module, path: Path_) -> list[Path]:
    """Writes every adapter into a subfolder of its name; "default" goes into the folder itself, as PEFT has it."""
    names = adapter_names(model)
    written = []
    if "default" in names:
        written.append(save_adapter(model, path, name="default"))
    for name in names:
        if name != "default":
            written.append(save_adapter(model, Path(path) / name, name=name))
    return written


def _only(model: nn.Module, name: str | None) -> str:
    names = adapter_names(model)
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        listed = ", ".join(names) or "none"
        what = "which adapter?" if name is None else f"no adapter named {name!r}:"
        raise InputError(f"{what} the model has {listed}")
    assert name is not None
    return name


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
