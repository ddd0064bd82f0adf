"""Reading safetensors one tensor at a time into memory of its own.

A mapped file counts as resident memory page by page until it is closed, so a model read through a map costs its whole
size beside what it is turned into. Here every tensor is read when it is asked for, in pieces that are cast on the way,
and is gone when its user lets go of it.

Format: 8 bytes of length (little-endian), JSON of that length, the tensors' bytes; the JSON maps names to dtype, shape
and offsets from the JSON's end.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from deltaw.core.errors import InputError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
#: What safetensors itself allows a header to be.
_HEADER_BYTES = 100_000_000
#: Bytes read at once where the dtype changes, so that the two forms of a tensor never stand side by side.
_PIECE_BYTES = 8 << 20
#: Tensors from this size on are no business of the allocator.
_MAPPED_BYTES = 1 << 20


class StoredTensor:
    """A tensor in a file, with the members that transformers asks of a tensor that is not read yet.

    `[...]` gives the object itself and `.to` reads: the cast then happens piece by piece.
    """

    def __init__(self, file: Path, start: int, dtype: str, shape: Sequence[int]) -> None:
        self.file = file
        self.start = start
        self.dtype = DTYPES[dtype]
        self.shape = torch.Size(shape)
        self._name = dtype

    def get_shape(self) -> list[int]:
        """The shape, as safetensors' slices give it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """The dtype by safetensors' name ("BF16")."""
        return self._name

    def __getitem__(self, index: Any) -> StoredTensor:
        assert index is Ellipsis, "a stored tensor is read whole"
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Reads the tensor into memory of its own, in `dtype` (None: the file's), then to the device.

        Raises:
            InputError: the file cannot be read, or has become shorter.
        """
        wanted = dtype or self.dtype
        made = _room(self.shape, wanted)
        flat = made.view(-1)
        whole = wanted == self.dtype
        step = max(flat.numel(), 1) if whole else _PIECE_BYTES // self.dtype.itemsize
        buffer = flat if whole else torch.empty(min(step, flat.numel()), dtype=self.dtype)
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.start)
                for begin in range(0, flat.numel(), step):
                    piece = buffer[: min(step, flat.numel() - begin)]
                    self._fill(file, piece)
                    if not whole:
                        flat[begin : begin + len(piece)] = piece
        except OSError as error:
            raise InputError(f"{self.file} cannot be read: {error.strerror or error}") from None
        return made if device is None else made.to(device)

    def _fill(self, file: Any, piece: Tensor) -> None:
        room = memoryview(piece.view(torch.uint8).numpy().data)
        while room:
            got = file.readinto(room)
            if not got:
                raise InputError(f"{self.file} became shorter while it was read: copy it again")
            room = room[got:]


def _room(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor whose memory goes back to the system with it.

    What the allocator frees below 32 MB it keeps, and what is made meanwhile lies in the gaps: a model of 200 MB took
    160 MB at its peak instead of 80, not in every run.
    """
    needed = math.prod(shape) * dtype.itemsize
    if needed < _MAPPED_BYTES:
        return torch.empty(shape, dtype=dtype)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, needed, **private), dtype=dtype).view(shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name; only its header is read.

    Raises:
        InputError: the file cannot be read, is damaged, or holds a dtype that torch has not.
    """

    def damaged(reason: str) -> NoReturn:
        raise InputError(f"{file} is damaged or no safetensors file ({reason}): copy it again") from None

    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_BYTES):
                damaged(f"a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(opened.read(length))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        damaged("its header is no JSON")
    if not isinstance(header, dict):
        damaged("its header is no JSON object")
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        try:
            kind, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            damaged(f"no dtype, shape or offsets for {name}")
        if kind not in DTYPES:
            raise InputError(f"{file}: {name} is {kind!r}: expected one of {', '.join(DTYPES)}")
        numbers = [start, stop, *shape] if isinstance(shape, list) else [None]
        if not all(type(number) is int and number >= 0 for number in numbers):
            damaged(f"shape {shape!r} and offsets {start!r} to {stop!r} for {name}")
        needed = math.prod(shape) * DTYPES[kind].itemsize
        if stop - start != needed or 8 + length + stop > size:
            damaged(f"{name} needs {needed:,} bytes and lies at {start:,} to {stop:,} of {size - 8 - length:,}")
        found[name] = StoredTensor(file, 8 + length + start, kind, shape)
    return found


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model folder by name: `model.safetensors`, or the shards that its index names.

    Raises:
        InputError: no such files, a damaged one, an index that is no index or names files elsewhere.
    """
    index = folder / _INDEX
    if (folder / _WHOLE).is_file():
        return read_header(folder / _WHOLE)
    if not index.is_file():
        raise InputError(f"{folder} has neither {_WHOLE} nor {_INDEX}: expected a model that transformers wrote")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{index} is damaged: expected a weight_map of tensors to files; copy it again") from None
    found: dict[str, StoredTensor] = {}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{index} names {shard!r}: expected names of files in the same folder")
        found |= read_header(folder / shard)
    return found
