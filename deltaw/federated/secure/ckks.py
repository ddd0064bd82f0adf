"""Secure aggregation by homomorphic encryption (CKKS; Cheon, Kim, Kim, Song 2017) with the optional `tenseal`.

The clients share one secret key that the server lacks. Each sends its vector encrypted, the server adds ciphertexts and
each client decrypts the sum. Against double masking: no dropouts to recover from and fewer messages, but 8 times the
bytes, an error of about 2^14 / scale instead of none, and one client that gives the key to the server opens every
vector. Use it where all clients trust each other and only the server is to see nothing.

Decrypted values carry a trace of the key (Li and Micciancio 2021): `unmask` rounds them to a grid about 2^10 times as
coarse as that trace. This hides nearly all of it, which is no proof; so do not publish the sums of many rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deltaw.core.errors import InputError, MissingExtraError
from deltaw.federated.secure.keys import check_name
from deltaw.federated.secure.ring import check_range
from deltaw.federated.secure.session import SecureSettings, SecureSum
from deltaw.federated.secure.statements import SecureError

# 128 bits of security at this degree (homomorphicencryption.org's table allows 109 bits of modulus). Sums need no
# multiplication, so one prime carries the values, and the other only what the library asks for.
_DEGREE = 4096
_SLOTS = _DEGREE // 2
_PRIMES = (60, 49)
_GRID_BITS = 24


def make_context() -> tuple[bytes, bytes]:
    """A fresh key: the clients' secret context, kept like a private key, and the server's, which cannot decrypt."""
    ts = _tenseal()
    made = ts.context(ts.SCHEME_TYPE.CKKS, poly_modulus_degree=_DEGREE, coeff_mod_bit_sizes=list(_PRIMES))
    kept = {"save_galois_keys": False, "save_relin_keys": False}
    return made.serialize(save_secret_key=True, **kept), made.serialize(save_secret_key=False, **kept)


class CkksClient:
    """Encrypts this client's vectors and decrypts sums.

    Args:
        name: the organisation's.
        context: the secret context that all clients share.
        settings: `clip`, `weight_bound` and `max_norm` are used; all parties have the same.
        clients: the most clients whose vectors are added.

    Raises:
        MissingExtraError: tenseal is absent.
        InputError: no secret context, or bounds under which a sum could overflow.
    """

    def __init__(self, name: str, context: bytes, *, settings: SecureSettings, clients: int) -> None:
        self.name = check_name(name)
        self.settings = settings
        self.scale_bits = _scale_bits(settings, clients)
        self._context = _context(context)
        if not self._context.has_secret_key():
            raise InputError("this context of CKKS has no secret key: clients need the first one of make_context")

    def mask(self, vector: Tensor, *, weight: int = 1) -> Tensor:
        """The ciphertexts of weight times vector (n,) and of the weight, as bytes: uint8 (m,).

        Raises:
            InputError: a vector or weight that is not finite or beyond its bounds.
        """
        assert self.settings.clip is not None
        check_range(vector, clip=self.settings.clip)
        self.settings.check_input(vector, weight)
        ts = _tenseal()
        values = torch.cat([vector.double() * weight, torch.tensor([float(weight)], dtype=torch.float64)])
        scale = 2.0**self.scale_bits
        parts = [ts.ckks_vector(self._context, part.tolist(), scale).serialize() for part in values.split(_SLOTS)]
        return _joined(parts)

    def unmask(self, total: Tensor, clients: tuple[str, ...]) -> SecureSum:
        """The sum of `CkksServer.result`'s ciphertexts over the clients that it names."""
        try:
            values = [value for part in _parted(self._context, total) for value in part.decrypt()]
        except (ValueError, RuntimeError, TypeError) as error:
            raise SecureError(f"the sum is refused: it cannot be decrypted ({error})") from None
        grid = 2.0 ** (_GRID_BITS - self.scale_bits)
        summed = torch.tensor(values, dtype=torch.float64).div_(grid).round_().mul_(grid)
        weight = round(float(summed[-1])) if summed.numel() > 1 and summed.isfinite().all() else 0
        if not len(clients) <= weight <= len(clients) * self.settings.weight_bound:
            raise SecureError(f"the sum of the weights is {weight}: it is not the sum over {len(clients)} clients")
        return SecureSum(summed[:-1], weight, clients)


class CkksServer:
    """Adds ciphertexts; can open none.

    Args:
        context: the second one of `make_context`.

    Raises:
        MissingExtraError: tenseal is absent.
        InputError: a context with the secret key, which a server must not have.
    """

    def __init__(self, context: bytes) -> None:
        self._context = _context(context)
        if self._context.has_secret_key():
            raise InputError("this context of CKKS has the secret key: a server gets the second one of make_context")
        self._sum: list[Any] = []
        self._uploaded: list[str] = []

    def add_upload(self, name: str, words: Tensor) -> None:
        """Adds a client's ciphertexts to the sum; a `SecureError` refuses them and leaves the sum as it was."""
        if name in self._uploaded:
            raise SecureError(f"{name}'s upload is refused: it sent one before")
        try:
            parts = list(_parted(self._context, words))
            if self._sum and [part.size() for part in parts] != [part.size() for part in self._sum]:
                raise ValueError("of another length than the others'")
            self._sum = [a + b for a, b in zip(self._sum, parts, strict=True)] if self._sum else parts
        except (ValueError, RuntimeError, TypeError) as error:
            raise SecureError(f"{name}'s upload is refused: {' '.join(str(error).split())[:120]}") from None
        self._uploaded.append(name)

    def result(self) -> tuple[Tensor, tuple[str, ...]]:
        """The sum's ciphertexts, uint8 (m,), and whose vectors are in it."""
        if not self._sum:
            raise SecureError("there is no sum: no client sent a vector")
        return _joined([part.serialize() for part in self._sum]), tuple(sorted(self._uploaded))


def _scale_bits(settings: SecureSettings, clients: int) -> int:
    """The exponent of the scale with which a sum stays below half of the first prime, at most 50."""
    if settings.clip is None or clients < 1:
        raise InputError(f"clip {settings.clip}, {clients} clients: CKKS needs a clip, and at least one client")
    largest = clients * settings.weight_bound * max(settings.clip, 1.0)
    bits = min(_PRIMES[0] - 2 - math.ceil(math.log2(largest)), 50)
    if bits < _GRID_BITS + 2:
        raise InputError(f"sums to {largest:g} leave CKKS too few bits: lower the clip or the weights' bound")
    return bits


def _context(data: bytes) -> Any:
    try:
        return _tenseal().context_from(data)
    except (ValueError, RuntimeError, TypeError):
        raise InputError(f"{len(data)} bytes are no context of CKKS: give one of make_context") from None


def _joined(parts: list[bytes]) -> Tensor:
    joined = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8)


def _parted(context: Any, data: Tensor) -> Iterator[Any]:
    """The ciphertexts of `_joined`'s bytes; ValueError where they are none."""
    ts, raw, at = _tenseal(), data.numpy().tobytes(), 0
    while at < len(raw):
        length = int.from_bytes(raw[at : at + 8], "little")
        part = raw[at + 8 : at + 8 + length]
        if len(part) != length or not length:
            raise ValueError("ciphertexts that are cut off")
        yield ts.ckks_vector_from(context, part)
        at += 8 + length


def _tenseal() -> Any:
    try:
        import tenseal
    except ModuleNotFoundError:
        raise MissingExtraError("tenseal is not installed: pip install 'deltaw[homomorphic]'") from None
    return tenseal
