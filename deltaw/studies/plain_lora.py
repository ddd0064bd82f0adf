"""Adapters as the plain LoRAs that compute the same, made without the base's weights."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.checkpoint import load_adapter, save_adapter
from deltaw.checkpoint.adapters import PREFIX, adapter_folder, adapter_state, read_adapter
from deltaw.core.errors import InputError
from deltaw.methods import to_lora
from deltaw.methods.host import parts_of
from deltaw.models.sources import resolve
from deltaw.studies.catalogue import empty_model
from deltaw.studies.ship import FinishedRun, adapter_task, model_labels

NAME = "default"


def write_plain(output: str | os.PathLike[str], path: str, base: str, run: FinishedRun | None) -> dict[str, Any]:
    """Writes an adapter as LoRA in PEFT's layout, ranks and scales that differ as patterns.

    Args:
        output: the folder to write.
        path: an adapter or a run folder.
        base: what the adapter was trained on; its weights are not read.
        run: the adapter's run, where it has one.

    Returns:
        `model`, `adapter`, `method` (what it was), `sites`, `dropped` (sites of rank 0), `ranks` (the lowest and the
        highest), `parameters`, `output` and `output_bytes`.

    Raises:
        InputError: an update that is no plain product, an adapter of another model.
    """
    folder = adapter_folder(path)
    method, _, tensors = read_adapter(folder)
    if method.name not in ("lora", "adalora"):
        raise InputError(f"{folder} is {method.name}, whose update is no plain product, as LoRA's is: use --to hf")
    empty = _modules(base, folder, run)
    with warnings.catch_warnings():
        # Copies of modules take their values in `made_plain`, once they have memory.
        warnings.filterwarnings("ignore", message="for .*: copying from a non-meta parameter")
        load_adapter(empty, folder, name=NAME)
    before = len(_ranks(empty, NAME))
    state = made_plain(empty, NAME, tensors)
    save_adapter(empty, output, name=NAME, base_model=resolve(base).path_or_id)
    ranks = _ranks(empty, NAME)
    return {
        "model": base,
        "adapter": str(folder),
        "method": method.name,
        "sites": len(ranks),
        "dropped": before - len(ranks),
        "ranks": [min(ranks), max(ranks)],
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "output": str(output),
        "output_bytes": sum(file.stat().st_size for file in Path(output).rglob("*") if file.is_file()),
    }


def made_plain(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Makes an adapter that was loaded onto a model without memory a plain LoRA; gives its tensors under PEFT's keys.

    Args:
        model: its parameters may be on the meta device; the adapter's are then on the CPU.
        name: the adapter.
        tensors: of the file that it was loaded from.
    """
    for path, _, part in parts_of(model, name):
        keys = list(part.tensors())
        if any(parameter.is_meta for parameter in (*part.parameters(), *part.buffers())):
            part.to_empty(device="cpu")
        part.load_tensors({key: tensors[f"{PREFIX}{path}{key}"] for key in keys})
    to_lora(model, name)
    return adapter_state(model, name)


def _ranks(model: nn.Module, name: str) -> list[int]:
    lows = (part.low_rank() for _, _, part in parts_of(model, name))
    return [len(low.A) for low in lows if low is not None]


def _modules(base: str, folder: Path, run: FinishedRun | None) -> Any:
    """The base's modules for the adapter's task, without memory behind their parameters."""
    task = run.config.task if run is not None else adapter_task(folder)
    model = empty_model(base, task)
    labels = (run.labels if run is not None else None) or model_labels(base)
    if not (task or "").endswith("classification") or labels is None or len(labels) == model.config.num_labels:
        return model
    model.config.num_labels = len(labels)
    with torch.device("meta"):
        return type(model)(model.config)
