"""What torchrun starts in the tests of sharded 4-bit weights: a few steps of models that FSDP2 has taken apart.

Each process writes what it saw of every case: losses, gathered gradients, gathered weights, what it holds of them.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import tiny
import torch
import torch.nn.functional as F

import deltaw as dw
from deltaw.core.generators import generator
from deltaw.quant import NF4, NF4Tensor, quantize_model

ROWS, STEPS = 4, 2

#: By name: the model, changes of its configuration, how its weights are held, the method, recomputation.
CASES: dict[str, tuple[str, dict[str, Any], NF4, Any, bool]] = {
    # Rows that two processes cannot share evenly, and blocks that straddle them.
    "llama": ("llama", {"intermediate_size": 37}, NF4(), dw.LoRA(r=2), False),
    # Weights that stand transposed.
    "gpt2": ("gpt2", {}, NF4(double_quant=False, block_size=128), dw.LoRA(r=2), True),
    # One weight in two modules, and products that look at it by rows.
    "tied": ("llama-tied", {}, NF4(embeddings=True), dw.DoRA(r=2), True),
}


def made(case: str) -> Any:
    """A case's model, adapted: the same values every time."""
    import transformers

    name, changes, nf4, method, recomputes = CASES[case]
    prefix, suffix, options = tiny.MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**options | changes)
    model = getattr(transformers, f"{prefix}{suffix}")(config)
    tiny.draw(model, 0, case)
    quantize_model(model, nf4)
    dw.adapt(model, method)
    tiny.randomise(model)
    if recomputes:
        # transformers has renamed the switch, and warns of the old name.
        word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})
    model.config.use_cache = False
    return model.train()


def whole(tensor: Any) -> torch.Tensor:
    """All of a tensor that may be sharded, a copy."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def steps(model: Any, rank: int, world: int, *, averages: bool = False) -> dict[str, Any]:
    """Optimizer steps on this process' rows: losses over all of them, gradients, and the adapter that comes of it."""
    from deltaw.train.sharding import average_gradients

    ids = torch.randint(3, tiny.VOCAB, (STEPS, ROWS, 9), generator=generator(0, "sharded steps"))
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2)
    losses, grads = [], []
    for batch in ids:
        share = batch[rank * ROWS // world : (rank + 1) * ROWS // world]
        logits = model(input_ids=share).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), share[:, 1:].flatten(), reduction="sum")
        loss = loss / batch[:, 1:].numel()
        # Processes' gradients are averaged.
        (loss * world).backward()
        if averages:
            average_gradients([*own.values()])
        total = loss.detach().clone()
        if world > 1:
            torch.distributed.all_reduce(total)
        losses.append(total)
        grads.append({name: whole(p.grad) for name, p in own.items()})
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "grads": grads, "adapter": {name: whole(p) for name, p in own.items()}}


def packed(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of what the 4-bit weights consist of, by name, where they are gathered."""
    return {
        f"{path}.weight": {key: tensor.clone() for key, tensor in module.weight.packed.tensors().items()}
        for path, module in model.named_modules()
        if isinstance(module._parameters.get("weight"), NF4Tensor)
    }


def averaged(rank: int, folder: str) -> None:
    """Gradients after `average_gradients`, of parameters that both processes, one of them or none has one for."""
    from deltaw.train.sharding import average_gradients

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = [torch.nn.Parameter(torch.zeros(2, 3, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16) * 4]
    for i, parameter in enumerate(found):
        if i // 2 in (0, 1 + rank):
            parameter.grad = torch.full((3, 2), 1.0 + i + 10 * rank, dtype=parameter.dtype).t()
    average_gradients(found)
    torch.save([parameter.grad for parameter in found], os.path.join(folder, f"averaged-{rank}.pt"))
    torch.distributed.destroy_process_group()


def main(folder: str) -> None:
    from torch.distributed.fsdp import FSDPModule

    from deltaw.train.sharding import local_part, shard

    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for case in CASES:
        model = made(case)
        shard(model, torch.device("cpu"))
        held = {name: local_part(p) for name, p in model.named_parameters()}
        found = {"held": {n: (type(p).__name__, tuple(p.shape)) for n, p in held.items()}} | steps(model, rank, world)
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in reversed(units):
            unit.unshard()
        found["base"] = packed(model)
        for unit in units:
            unit.reshard()
        found["again"] = sorted(type(local_part(p)).__name__ for p in model.parameters())
        torch.save(found, os.path.join(folder, f"{case}-{rank}.pt"))
    model = made("llama")
    shard(model, torch.device("cpu"), whole=[p for p in model.parameters() if p.requires_grad])
    kinds = {type(p).__name__ for p in model.parameters() if p.requires_grad}
    found = {"trained": kinds} | steps(model, rank, world, averages=True)
    torch.save(found, os.path.join(folder, f"whole-{rank}.pt"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
