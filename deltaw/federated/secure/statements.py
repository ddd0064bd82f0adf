"""What parties of secure aggregation say to each other: plain values, signed with the identity key."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from deltaw.core.errors import RunError
from deltaw.federated.secure.keys import IdentityKey, PublicIdentity

_DOMAIN = b"deltaw secure aggregation 1\0"


class SecureError(RunError):
    """A step of secure aggregation that is refused; nothing is revealed by it. Says who or what is at fault."""


def canonical(value: Any) -> bytes:
    """One byte string for each plain value (strings, whole numbers, lists, mappings with strings as keys)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def to_text(data: bytes) -> str:
    """Base64, for JSON."""
    return base64.b64encode(data).decode()


def from_text(text: str, length: int | None = None) -> bytes:
    """The bytes of `to_text`; ValueError where they are not `length` many."""
    data = base64.b64decode(text, validate=True)
    if length is not None and len(data) != length:
        raise ValueError(f"{len(data)} bytes, expected {length}")
    return data


def signed(identity: IdentityKey, *, kind: str, name: str, context: bytes, **fields: Any) -> dict[str, Any]:
    """A message of `name` in one attempt of one round, with its signature."""
    said = {"kind": kind, "name": name, "context": to_text(context), **fields}
    return {**said, "signature": to_text(identity.sign(_DOMAIN + canonical(said)))}


def check_signed(
    message: Any, public: PublicIdentity, *, kind: str, name: str, context: bytes, fields: frozenset[str]
) -> None:
    """Raises `SecureError` unless `message` is `signed`'s, by that organisation, of this kind and this attempt."""
    who = f"{name}'s {kind} message"
    if not isinstance(message, Mapping) or set(message) != {"kind", "name", "context", "signature", *fields}:
        got = sorted(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        raise SecureError(f"{who} is refused: got {got}, expected the fields {sorted(fields)} and a signature")
    if message["kind"] != kind or message["name"] != name:
        raise SecureError(f"{who} is refused: it is a {message['kind']!r} message of {message['name']!r}")
    if message["context"] != to_text(context):
        raise SecureError(f"{who} is refused: it belongs to another run, round or attempt (late or replayed)")
    with reading(who):
        said = canonical({key: value for key, value in message.items() if key != "signature"})
        signature = from_text(message["signature"], 64)
    if not public.verifies(signature, _DOMAIN + said):
        raise SecureError(f"{who} is refused: its signature is not that organisation's, or it was changed on the way")


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns any failure to parse hostile values into one `SecureError`."""
    try:
        yield
    except SecureError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise SecureError(f"{what} is refused: it cannot be read ({' '.join(str(error).split())[:120]})") from None
