"""States and layouts as what messages hold: tensors by name and plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltaw.core.protocols import LowRank
from deltaw.federated.messages import MessageError
from deltaw.federated.state import GlobalState, Layout

_TENSORS, _CARRIED = "tensors/", "carried/"


def owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, none of them a view of a larger or of another one."""
    seen: set[int] = set()
    made = {}
    for name, tensor in tensors.items():
        own = tensor.detach().to("cpu").contiguous()
        storage = own.untyped_storage()
        if storage.nbytes() != own.numel() * own.element_size() or storage.data_ptr() in seen:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        made[name] = own
    return made


def state_tensors(state: GlobalState) -> dict[str, Tensor]:
    """A state as named tensors; a carried update's scale is a tensor (1,) beside its factors."""
    found = {_TENSORS + key: tensor for key, tensor in state.tensors.items()}
    return owned(found | carried_tensors(state.carried))


def carried_tensors(carried: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Updates by site as named tensors."""
    found: dict[str, Tensor] = {}
    for site, low in carried.items():
        found |= {f"{_CARRIED}{site}:A": low.A, f"{_CARRIED}{site}:B": low.B}
        found[f"{_CARRIED}{site}:scale"] = torch.tensor([low.scale], dtype=torch.float64)
        if low.out_scale is not None:
            found[f"{_CARRIED}{site}:out_scale"] = low.out_scale
    return owned(found)


def state_of(tensors: Mapping[str, Tensor]) -> GlobalState:
    """The state that `state_tensors` wrote; other names are left alone.

    Raises:
        MessageError: a carried update lacks a factor.
    """
    own = {name.removeprefix(_TENSORS): tensor for name, tensor in tensors.items() if name.startswith(_TENSORS)}
    carried = {}
    for name in tensors:
        if name.startswith(_CARRIED) and name.endswith(":A"):
            stem = name[: -len(":A")]
            try:
                A, B, scale = tensors[name], tensors[f"{stem}:B"], float(tensors[f"{stem}:scale"].reshape(()))
            except (KeyError, RuntimeError):
                raise MessageError(f"the carried update {stem.removeprefix(_CARRIED)} lacks a factor") from None
            carried[stem.removeprefix(_CARRIED)] = LowRank(A, B, scale, tensors.get(f"{stem}:out_scale"))
    return GlobalState(own, carried)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, hexadecimal, of names, dtypes, shapes and values, whatever the order."""
    found = hashlib.sha256()
    for name, tensor in sorted(owned(tensors).items()):
        found.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def layout_plain(layout: Layout) -> dict[str, Any]:
    """A layout as JSON-able values."""
    return {
        "shapes": {key: list(shape) for key, shape in layout.shapes.items()},
        "scales": dict(layout.scales),
        "method": layout.method,
        "config": json.loads(json.dumps(dict(layout.config), sort_keys=True, default=str)),
        "frozen": sorted(layout.frozen),
    }


def layout_of(plain: Mapping[str, Any]) -> Layout:
    """The layout that `layout_plain` wrote.

    Raises:
        MessageError: it is none.
    """
    try:
        shapes = {str(key): tuple(int(size) for size in shape) for key, shape in plain["shapes"].items()}
        scales = {str(site): float(scale) for site, scale in plain["scales"].items()}
        config, frozen = dict(plain["config"]), frozenset(map(str, plain["frozen"]))
        return Layout(shapes, scales, str(plain["method"]), config, frozen)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MessageError(f"a layout that cannot be read: {error}") from None


def layout_digest(layout: Layout) -> str:
    """SHA-256 of a layout: equal for all that train the same adapter."""
    return hashlib.sha256(json.dumps(layout_plain(layout), sort_keys=True).encode()).hexdigest()


def flat(tensors: Mapping[str, Tensor], keys: Iterable[str] | None = None) -> Tensor:
    """All values as one vector, keys sorted, in float32 or wider."""
    chosen = sorted(tensors if keys is None else keys)
    if not chosen:
        return torch.zeros(0)
    return torch.cat([tensors[key].detach().reshape(-1) for key in chosen])


def unflat(vector: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of `flat`'s vector, in float32."""
    sizes = {key: int(torch.Size(shapes[key]).numel()) for key in sorted(shapes)}
    pieces = vector.to(torch.float32).split(list(sizes.values()))
    return {key: piece.reshape(shapes[key]).clone() for key, piece in zip(sizes, pieces, strict=True)}
