"""Mask streams: a 256-bit key to any number of 32-bit words by ChaCha20 (RFC 8439), added modulo 2^32.

Keys come from HKDF-SHA256 (RFC 5869) with the attempt's transcript as salt and what the key is for as info, so that
no two streams of any run share one; the nonce can then be zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from deltaw.federated.secure.statements import canonical

#: Words made at a time: the stream and the part of the vector that it is added to stay in a core's cache.
_CHUNK = 1 << 16
_ZEROS = bytes(4 * _CHUNK)
_NONCE = bytes(16)

Words = np.ndarray[Any, np.dtype[np.uint32]]


def derived_key(secret: bytes, *, session: bytes, purpose: list[str | int]) -> bytes:
    """32 bytes from `secret` for one purpose in one attempt.

    Args:
        secret: what both sides know: an X25519 agreement, or a seed.
        session: the hash of the attempt's transcript.
        purpose: what the key is for; other purposes give unrelated keys.
    """
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=session, info=canonical(purpose)).derive(secret)


def agreed(private: X25519PrivateKey, public: bytes) -> bytes:
    """The X25519 agreement with a peer's public key; ValueError for a key of low order, whose result is known."""
    return private.exchange(X25519PublicKey.from_public_bytes(public))


def pair_key(private: X25519PrivateKey, public: bytes, *, session: bytes, phase: int, names: tuple[str, str]) -> bytes:
    """The key of two clients' common stream in one phase, the same from either side."""
    return derived_key(agreed(private, public), session=session, purpose=["pair mask", phase, *sorted(names)])


def self_key(seed: bytes, *, session: bytes, phase: int, name: str) -> bytes:
    """The key of a client's own stream in one phase."""
    return derived_key(seed, session=session, purpose=["self mask", phase, name])


def pair_sign(name: str, peer: str) -> int:
    """With which sign `name` adds its stream with `peer`: one of the two adds, the other subtracts."""
    return 1 if name < peer else -1


def add_stream(words: Words, key: bytes, *, sign: int) -> None:
    """Adds (sign 1) or subtracts (-1) the key's stream to `words` (n,) uint32, in place, modulo 2^32."""
    stream = Cipher(ChaCha20(key, _NONCE), mode=None).encryptor()
    buffer = bytearray(len(_ZEROS))
    change = np.frombuffer(buffer, dtype="<u4")
    zeros = memoryview(_ZEROS)
    combine = np.add if sign > 0 else np.subtract
    for begin in range(0, len(words), _CHUNK):
        part = words[begin : begin + _CHUNK]
        stream.update_into(zeros[: 4 * len(part)], buffer)
        combine(part, change[: len(part)], out=part)
