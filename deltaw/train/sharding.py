"""FSDP2: every process keeps a part of each parameter, gradient and optimizer state, and gathers a block to run it.

An adapter's parameters stay whole in every process: they are few, and as parts of distributed tensors each of hundreds
would cost the host more than its arithmetic costs the device. Their gradients are averaged once a step.

torch's `fully_shard` is called here, not through accelerate, which on CPUs quietly falls back to whole copies.
What gathers or distributes talks to the other processes: every one of them has to call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.checkpoint.adapters import PREFIX, load_state, read_adapter
from deltaw.core.errors import InputError, RunError
from deltaw.methods.host import parts_of
from deltaw.quant.shards import shardable
from deltaw.quant.tensor import NF4Tensor


def shard(model: Any, device: torch.device, *, whole: Iterable[nn.Parameter] = ()) -> None:
    """Shards the model in place, block by block, over all processes; torch.distributed is running.

    Args:
        model: the same in every process.
        device: of this process.
        whole: parameters that stay whole in each; what trains them calls `average_gradients`.

    Raises:
        InputError: an encoder-decoder, whose parts are also run by themselves.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if model.config.is_encoder_decoder:
        raise InputError(f"sharding does not know {type(model).__name__}, an encoder-decoder: leave it at none")
    mesh = init_device_mesh(device.type, (get_world_size(),))
    blocks, kept = set(getattr(model, "_no_split_modules", None) or ()), set(whole)
    for module in reversed(list(model.modules())):
        if type(module).__name__ in blocks:
            _make_shardable(module)
            fully_shard(module, mesh=mesh, ignored_params=kept)
    _make_shardable(model)
    fully_shard(model, mesh=mesh, ignored_params=kept)
    # Else accelerate would wrap it for DDP.
    model._is_accelerate_prepared = True


def _make_shardable(module: nn.Module) -> None:
    """Gives the 4-bit weights below a module the form that FSDP2 shares out; what was one weight stays one."""
    made: dict[NF4Tensor, nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if isinstance(parameter, NF4Tensor):
                if parameter not in made:
                    made[parameter] = shardable(parameter)
                child._parameters[name] = made[parameter]


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has taken the model's parameters apart."""
    return any_sharded(model.parameters())


def any_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether this process holds parts of some of them only."""
    return any(hasattr(parameter, "full_tensor") for parameter in parameters)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Makes gradients their mean over all processes, of parameters that each has whole; every process has to call it.

    Where some processes have no gradient theirs counts as 0; where none has, there is none afterwards.
    """
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for alike in by_dtype.values():
        _average(alike)


def _average(parameters: Sequence[nn.Parameter]) -> None:
    """`average_gradients` of parameters of one dtype, all in one message, with how many processes have each."""
    from torch.distributed import all_reduce, get_world_size

    first = parameters[0]
    here = [parameter.grad is not None for parameter in parameters]
    counts = first.new_ones(len(here)) if all(here) else torch.tensor(here, dtype=first.dtype, device=first.device)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    message = torch.cat([counts.detach(), *(part.detach().reshape(-1) for part in parts)])
    all_reduce(message)
    means = message[len(here) :].div_(get_world_size()).split([part.numel() for part in parts])
    # Only who lacks some waits for the device to hear of them.
    found = here if all(here) else message[: len(here)].tolist()
    known = [(*one[:3],) for one in zip(parameters, parts, means, found, strict=True) if one[3]]
    if known:
        torch._foreach_copy_([part for _, part, _ in known], [mean.view(part.shape) for _, part, mean in known])
    for parameter, part, _ in known:
        parameter.grad = part


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; the tensor itself where it is not sharded."""
    part = getattr(tensor, "to_local", None)
    found = tensor.detach() if part is None else part().detach()
    assert isinstance(found, Tensor)
    return found


def whole_state(model: nn.Module) -> dict[str, Any]:
    """A sharded model's state on the CPU of the first process; empty on the others."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(model, options=_options(cpu_offload=True))


def optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """A sharded optimizer's state on the CPU of the first process; empty on the others."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return dict(get_optimizer_state_dict(model, _inner(optimizer), options=_options(cpu_offload=True)))


def load_optimizer(model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Puts `optimizer_state`'s result back; every process brings the whole of it."""
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    set_optimizer_state_dict(model, _inner(optimizer), state, options=_options())


def load_adapter_weights(model: nn.Module, name: str, folder: Path) -> None:
    """Puts the tensors of an adapter folder into the adapter on the model, sharded or not."""
    parts = [part for _, _, part in parts_of(model, name)]
    if not any_sharded(tensor for part in parts for tensor in part.tensors().values()):
        load_state(model, name, folder)
        return
    _, _, tensors = read_adapter(folder)
    for path, _, part in parts_of(model, name):
        part.load_tensors({key: _like(own, tensors[f"{PREFIX}{path}{key}"]) for key, own in part.tensors().items()})


def load_model_weights(model: nn.Module, folder: Path) -> None:
    """Puts the weights that `save_pretrained` wrote into a model, sharded or not.

    Raises:
        RunError: they are another model's.
    """
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        state |= load_file(file)
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        missing, unexpected = set_model_state_dict(model, state, options=_options(strict=False))
    else:
        missing, unexpected = model.load_state_dict(state, strict=False)
    own = dict(model.named_parameters())
    lost = [key for key in missing if key in own]
    if lost or unexpected:
        raise RunError(f"{folder} does not hold this model: {[*lost, *unexpected][0]} is missing or unexpected")


def _like(own: Tensor, values: Tensor) -> Tensor:
    """The values, distributed as `own` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(own, DTensor):
        return values
    return distribute_tensor(values.to(own.device), own.device_mesh, own.placements)


def _options(**changes: Any) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, **changes)


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    found = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(found, torch.optim.Optimizer)
    return found
