"""bitsandbytes' serialised form of a 4-bit weight, both ways, without bitsandbytes.

Beside `weight` (uint8, (k, 1)) a folder holds `weight.absmax` (float32, or uint8 with double quantisation),
`weight.quant_map` (16 codes), with double quantisation `weight.nested_absmax` and `weight.nested_quant_map`, and
`weight.quant_state.bitsandbytes__nf4`: JSON in bytes, with shape, dtype, block sizes and the nested offset.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltaw.core.errors import InputError
from deltaw.kernels.nf4 import NESTED_BLOCK, NestedScales
from deltaw.quant.codebooks import NF4_VALUES, dynamic_code, nf4_code
from deltaw.quant.weight import NF4Weight

#: The key, after the weight's own, under which the JSON lies.
STATE_KEY = "quant_state.bitsandbytes__nf4"

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def from_bitsandbytes(packed: Tensor, quant_state: Any, *, name: str = "the weight") -> NF4Weight:
    """A packed weight of bitsandbytes as ours; nothing is requantised and, where layouts allow, nothing copied.

    Args:
        packed: two codes a byte, any shape and storage dtype (`Params4bit.data`, or what a file holds).
        quant_state: a `bitsandbytes.functional.QuantState`, or a mapping of the tensors that a folder saves, by what
            comes after `weight.` (`absmax`, `quant_map`, `quant_state.bitsandbytes__nf4`, ...).
        name: for errors.

    Raises:
        InputError: another codebook (fp4), a shape that is no matrix, tensors that lack or do not fit.
    """
    facts = _saved(quant_state, name) if isinstance(quant_state, Mapping) else _live(quant_state)
    if facts["quant_type"] != "nf4":
        raise InputError(f"{name} is quantised as {facts['quant_type']!r}: only nf4 is known; load the 16-bit model")
    shape = tuple(facts["shape"])
    if len(shape) != 2:
        raise InputError(f"{name} has shape {shape}: expected a matrix (out, in)")
    count, block = shape[0] * shape[1], int(facts["blocksize"])
    codes, absmax = packed.detach().reshape(-1).view(torch.uint8), facts["absmax"]
    blocks = -(-count // block)
    if codes.numel() != -(-count // 2) or absmax.numel() != blocks:
        raise InputError(
            f"{name} is damaged: {codes.numel()} bytes and {absmax.numel()} scales do not fit shape {shape} "
            f"in blocks of {block}"
        )
    if facts["code"] is not None and facts["code"].float().flatten()[:16].tolist() != list(NF4_VALUES):
        raise InputError(f"{name} has a codebook that is not NormalFloat's: load the 16-bit model")
    scales: Tensor | NestedScales
    if facts["nested"] is not None:
        nested = facts["nested"]
        if int(nested["blocksize"]) != NESTED_BLOCK or nested["absmax"].numel() != -(-blocks // NESTED_BLOCK):
            raise InputError(f"{name} has scales in blocks of {nested['blocksize']}: expected {NESTED_BLOCK}")
        own = dynamic_code(True, codes.device)
        given = nested["code"].float().to(codes.device).flatten()
        scales = NestedScales(
            absmax.detach().reshape(-1).view(torch.uint8),
            own if torch.equal(own, given) else given,
            nested["absmax"].float().reshape(-1),
            torch.as_tensor(nested["offset"], dtype=torch.float32, device=codes.device).reshape(()),
        )
    else:
        scales = absmax.detach().reshape(-1).float()
    return NF4Weight(codes, scales, (shape[0], shape[1]), facts["dtype"], block)


def _saved(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """What the tensors of a folder say."""
    states = [key for key in tensors if key.startswith("quant_state.bitsandbytes__")]
    needed = {"absmax", "quant_map"} - set(tensors)
    if not states or needed:
        raise InputError(f"{name} lacks {min(needed) if needed else STATE_KEY}: the folder is incomplete")
    try:
        state = json.loads(bytes(tensors[states[0]].cpu().tolist()).decode())
        dtype = _DTYPES[state["dtype"]]
    except (ValueError, KeyError) as error:
        raise InputError(f"{name} has a damaged quantisation state ({error})") from None
    nested = None
    if "nested_absmax" in tensors:
        nested = {
            "absmax": tensors["nested_absmax"],
            "code": tensors["nested_quant_map"],
            "blocksize": state.get("nested_blocksize", NESTED_BLOCK),
            "offset": state["nested_offset"],
        }
    return {
        "quant_type": state.get("quant_type", states[0].rpartition("__")[2]),
        "shape": state["shape"],
        "dtype": dtype,
        "blocksize": state["blocksize"],
        "absmax": tensors["absmax"],
        "code": tensors["quant_map"],
        "nested": nested,
    }


def _live(state: Any) -> dict[str, Any]:
    """What a `QuantState` in memory says."""
    second = getattr(state, "state2", None)
    nested = None
    if second is not None:
        nested = {
            "absmax": second.absmax,
            "code": second.code,
            "blocksize": second.blocksize,
            "offset": state.offset,
        }
    return {
        "quant_type": state.quant_type,
        "shape": state.shape,
        "dtype": state.dtype,
        "blocksize": state.blocksize,
        "absmax": state.absmax,
        "code": state.code,
        "nested": nested,
    }


def to_bitsandbytes(weight: NF4Weight) -> dict[str, Tensor]:
    """What a folder holds of a weight: the text after `weight` in each key, to the tensor."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    saved = {"": weight.codes.unsqueeze(1), ".quant_map": nf4_code(weight.device).clone()}
    if isinstance(weight.scales, NestedScales):
        nested = weight.scales
        saved[".absmax"] = nested.q
        saved[".nested_absmax"] = nested.absmax
        saved[".nested_quant_map"] = nested.code.clone()
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(nested.offset),
        }
    else:
        saved[".absmax"] = weight.scales
    saved[f".{STATE_KEY}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return saved
