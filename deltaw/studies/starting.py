"""What an adapter of a run may start from: training rows, and the weights from before they were quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.checkpoint.calibration import on_device
from deltaw.checkpoint.streaming import StoredTensor, read_folder
from deltaw.core.errors import InputError
from deltaw.data import Collator
from deltaw.models.sites import site_of
from deltaw.models.sources import resolve
from deltaw.train import TrainConfig

#: Optimizer steps' worth of rows that EVA looks at.
STEPS = 4


def starting_points(
    config: TrainConfig, model: Any, examples: Sequence[Mapping[str, Any]], collator: Collator
) -> dict[str, Any]:
    """What `dw.adapt` is given beside the configuration: `batches`, `original`, or nothing.

    Args:
        config: the run.
        model: its base, on its device.
        examples: its encoded training rows, of which the first are looked at: a resumed run starts alike.
        collator: for them.

    Raises:
        InputError: a start that does not go with the run's sharding.
    """
    method = config.method_config
    init = str(getattr(method, "init", ""))
    # An adapter to go on from has its values.
    if config.adapter is not None:
        return {}
    if init.startswith(("pissa", "olora")) and not method.freeze_a and config.sharding != "none":
        raise InputError(
            f"init {init} does not go with sharding {config.sharding} yet: choose another start, or sharding none"
        )
    if init == "eva":
        size, chosen = config.micro_batch_size, examples[: STEPS * config.batch_size]
        batches = [collator([dict(row) for row in chosen[i : i + size]]) for i in range(0, len(chosen), size)]
        return {"batches": on_device(model, batches, model.device)}
    return {"original": original_weights(config.model, model)} if init == "loftq" else {}


def original_weights(source: str, model: Any) -> Callable[[str], Tensor]:
    """Reads a module's weight (out, in), as it was before it was quantised, from the folder that the model came from.

    Nothing is read but headers until the weight of a module is asked for.

    Args:
        source: what the model was loaded from.
        model: in 4 bits.

    Raises:
        InputError: when asked for a weight that the folder has in 4 bits only, or not under the module's name.
    """
    tensors: dict[str, StoredTensor] = {}
    base = getattr(model, "base_model_prefix", "")

    def read(path: str) -> Tensor:
        if not tensors:
            tensors.update(read_folder(_folder(source)))
        site = site_of(path, model.get_submodule(path))
        # A folder of the bare model leaves out what a task's model has in front, one of another task's may add it.
        names = [f"{path}.weight", f"{path.removeprefix(f'{base}.')}.weight", f"{base}.{path}.weight"]
        found = next((tensors[name] for name in names if name in tensors), None)
        if found is None:
            raise InputError(f"init loftq: {source} stores {names[0]} under another name: choose another start")
        if not found.dtype.is_floating_point:
            raise InputError(f"init loftq: {source} holds {names[0]} in 4 bits already: give the 16-bit model")
        W = found.to(site.weight.device, torch.promote_types(found.dtype, torch.float32))
        return W if site.kind == "linear" else W.t()

    return read


def _folder(source: str) -> Path:
    found = resolve(source)
    if found.kind != "hub":
        return Path(found.path_or_id)
    from huggingface_hub import snapshot_download

    # The model has been loaded, so its files are here.
    return Path(snapshot_download(found.path_or_id, local_files_only=True))
