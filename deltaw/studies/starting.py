"""What an adapter of a run starts from: training rows, the weights from before they were quantised, another run's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.checkpoint import load_adapter
from deltaw.checkpoint.calibration import on_device
from deltaw.checkpoint.streaming import StoredTensor, read_folder
from deltaw.core.errors import InputError
from deltaw.data import Collator
from deltaw.methods.host import active_method, book_of, parts_of
from deltaw.methods.lora import LoRA, LoraPart
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
        InputError: a start that does not go with the run's sharding, or with an adapter to go on from.
    """
    method = config.method_config
    init = str(getattr(method, "init", ""))
    if config.adapter is not None:
        if init not in ("", "default"):
            raise InputError(f"init {init} is of new adapters, and {config.adapter} has its values: leave init out")
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


def go_on(model: Any, config: TrainConfig) -> str:
    """Puts the adapter that a run goes on from on the model, to be trained as the run says; gives its name.

    What it is made of is the folder's; what no folder says, LoRA+'s ratio and LoRA-FA's frozen A, is the run's.

    Raises:
        InputError: the adapter is of another method than the run's.
    """
    assert config.adapter is not None
    name = "default"
    load_adapter(model, config.adapter, name=name, trainable=True, active=True)
    found = active_method(model, name).name
    if found != config.method:
        raise InputError(f"{config.adapter} is of method {found}, and method is {config.method}: give method {found}")
    given = config.method_config
    if isinstance(given, LoRA):
        for _, _, part in parts_of(model, name):
            if isinstance(part, LoraPart):
                part.train_as(freeze_a=given.freeze_a, rate_ratio=given.loraplus_lr_ratio)
        options = {"freeze_a": given.freeze_a, "loraplus_lr_ratio": given.loraplus_lr_ratio}
        configs = book_of(model).configs
        configs[name] = dataclasses.replace(configs[name], **options)
    return name


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
