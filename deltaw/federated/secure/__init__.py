"""Secure aggregation: the server sees only the sum of the clients' vectors (double masking; CKKS as an extra).

| against | kept secret | not kept secret |
|---|---|---|
| a server that follows the protocol | each vector and weight; sums over fewer than the threshold | the sum |
| a server that lies about who is there | the same, with a threshold over 2/3 | who took part, when, sizes |
| clients who tell the server all they know, fewer than the threshold | each other vector | the others' sum |
| clients who lie about their input | the others' vectors | the result: each can add anything within the clip |
| a server that drops clients at will | sums over fewer than the threshold | whose vectors are in the sum |
"""

from __future__ import annotations

from deltaw.core.errors import MissingExtraError

try:
    import cryptography as _cryptography  # noqa: F401
except ModuleNotFoundError:
    raise MissingExtraError("cryptography is not installed: pip install 'deltaw[federated]'") from None

from deltaw.federated.secure.client import SecureClient
from deltaw.federated.secure.keys import IdentityKey, PublicIdentity, read_roster, write_roster
from deltaw.federated.secure.server import SecureServer
from deltaw.federated.secure.session import SecureSettings, SecureSum, attempt_context
from deltaw.federated.secure.statements import SecureError

__all__ = [
    "IdentityKey",
    "PublicIdentity",
    "SecureClient",
    "SecureError",
    "SecureServer",
    "SecureSettings",
    "SecureSum",
    "attempt_context",
    "read_roster",
    "write_roster",
]
