"""One message: a header of plain values and tensors by name, as one safetensors blob. No pickle, no code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deltaw.core.errors import DeltawError

#: Of this layout of messages; another one is refused.
FORMAT = 1
_DIGEST = 32


class MessageError(DeltawError):
    """A message that is damaged, too large, or not of this protocol. It is refused; the round goes on."""


@dataclass(frozen=True)
class Message:
    """What one side tells the other.

    Attributes:
        kind: what is asked or answered.
        header: plain values: run, round, request id and what belongs to the kind.
        tensors: by name, on the CPU, contiguous.
    """

    kind: str
    header: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def pack(message: Message) -> bytes:
    """The message on the wire: 32 bytes of SHA-256, then safetensors with the header in its metadata.

    The hash finds damage, not malice: transports and keys see to that.
    """
    from safetensors.torch import save

    said = json.dumps({"format": FORMAT, "kind": message.kind, "header": dict(message.header)}, allow_nan=False)
    body = save({name: tensor.contiguous() for name, tensor in message.tensors.items()}, metadata={"deltaw": said})
    return hashlib.sha256(body).digest() + body


def unpack(data: bytes, *, limit_bytes: int | None = None) -> Message:
    """The message of `pack`'s bytes.

    Raises:
        MessageError: more than `limit_bytes`, damaged, or of another format.
    """
    from safetensors.torch import load

    if limit_bytes is not None and len(data) > limit_bytes:
        raise MessageError(f"a message of {len(data)} bytes: expected at most {limit_bytes}")
    digest, body = data[:_DIGEST], data[_DIGEST:]
    if len(digest) < _DIGEST or hashlib.sha256(body).digest() != digest:
        raise MessageError(f"a message of {len(data)} bytes is damaged: its checksum differs")
    try:
        length = int.from_bytes(body[:8], "little")
        said = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["deltaw"])
        kind, header, found = said["kind"], said["header"], said["format"]
        tensors = load(body)
    except Exception as error:
        raise MessageError(f"a message that cannot be read: {' '.join(str(error).split())[:200]}") from None
    if found != FORMAT or not isinstance(kind, str) or not isinstance(header, dict):
        raise MessageError(f"a message of format {found!r}: expected {FORMAT}; use the same version of deltaw")
    return Message(kind, header, tensors)
