"""Memory for matrices whose rows have something behind them."""

from __future__ import annotations

from torch import Tensor

#: Rows with room behind them begin at multiples of this, the bytes that tensor cores' loads fetch at a time.
ROW_BYTES = 128


def with_room(like: Tensor, rows: int, columns: int, room: int) -> Tensor:
    """Memory for a matrix (rows, columns + room), of the dtype and device of `like`; contiguous without room."""
    step = ROW_BYTES // like.element_size()
    wide = -(-(columns + room) // step) * step if room else columns
    return like.new_empty(rows, wide)[:, : columns + room]
