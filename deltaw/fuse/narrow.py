"""Frozen weights of a group in 8 bits, as its products take them: when they are rounded anew, and what is put back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaw.fuse.directions import Directions
from deltaw.kernels.fp8 import LARGEST, quantize_nf4, quantize_rows_and_columns, spreads, whole
from deltaw.quant.codebooks import nf4_code
from deltaw.quant.weight import NF4Weight

#: Optimizer steps after which a layer's 8-bit weights are rounded anew, with other scales; layers take turns. 0: never.
TURNS = 8

#: W by rows and by columns in 8 bits with their scales, as `quantize_rows_and_columns` gives them; by rows with V of
#: the group's directions behind, and only where products forward read them; by columns with room behind. What stands
#: behind ends at a `whole` number of columns, with zeros.
Narrow = tuple[Tensor | None, Tensor | None, Tensor, Tensor]


def turn_of(step: int, layer: int) -> int:
    """The last step at which a layer's weights were to be rounded anew."""
    return max(0, step - (step + layer) % TURNS) if TURNS else 0


def narrowed(
    parts: Sequence[Any], *, forward: bool, turn: int = 0, along: Directions | None = None, room: int = 0
) -> Narrow:
    """Weights of one input width, one below the other, in 8 bits.

    Args:
        parts: matrices (out, in), dense or all in 4 bits.
        forward: whether they are wanted by rows.
        turn: by which scales are chosen; 0: as they need to be.
        along: directions along which what rounding took is put back.
        room: columns behind W by columns that there is to be room for.
    """
    rows, columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
    packed, count = isinstance(parts[0], NF4Weight), 0 if along is None else along.R.shape[1]
    behind = whole(columns + count) - columns if count else 0
    room = whole(rows + room) - rows if room else 0
    device = parts[0].codes.device if packed else parts[0].device
    spread = spreads(rows, columns, turn, device) if turn else None
    lost = None if along is None else torch.empty(rows, columns, dtype=along.R.dtype, device=device)
    if packed:
        q, scale, qT, scaleT = quantize_nf4(parts, nf4_code(device), spread=spread, room=(behind, room), lost=lost)
    else:
        q, scale, qT, scaleT = quantize_rows_and_columns(parts, spread=spread, room=(behind, room), lost=lost)
    qT = _with_zeros(qT, room)
    if not forward:
        return None, None, qT, scaleT
    if along is not None and lost is not None:
        V = lost @ along.R
        q = _with_zeros(q, behind)
        q[:, columns : columns + count] = (V / scale[:, None]).clamp_(-LARGEST, LARGEST).to(q.dtype)
    return q, scale, qT, scaleT


def _with_zeros(q: Tensor, room: int) -> Tensor:
    """Codes and the room behind their rows."""
    if not room:
        return q
    wide = q.as_strided((len(q), q.shape[1] + room), q.stride())
    wide[:, q.shape[1] :].view(torch.uint8).zero_()
    return wide
