"""Identity keys (Ed25519) that organisations make once and whose public halves they exchange beforehand."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from deltaw.core.errors import InputError
from deltaw.core.files import explain_os_error, write_text

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KIND = "ed25519"


@dataclass(frozen=True)
class PublicIdentity:
    """The public half of an organisation's key.

    Attributes:
        raw: the 32 bytes of the Ed25519 key.

    Raises:
        InputError: the bytes are no such key.
    """

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != 32:
            raise InputError(f"a public identity key of {len(self.raw)} bytes: expected the 32 of an Ed25519 key")

    @property
    def text(self) -> str:
        """The key in base64, as rosters have it."""
        return base64.b64encode(self.raw).decode()

    @classmethod
    def from_text(cls, text: str) -> PublicIdentity:
        """The key of `text`'s 44 characters of base64."""
        try:
            raw = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise InputError(
                f"a public identity key {text[:60]!r}: expected base64, as IdentityKey.public.text gives"
            ) from None
        return cls(raw)

    def verifies(self, signature: bytes, data: bytes) -> bool:
        """Whether `signature` is this key's over `data`."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, data)
        except (InvalidSignature, ValueError):
            return False
        return True


@dataclass(frozen=True)
class IdentityKey:
    """An organisation's private key, which signs what its client says: `make`, then `save` and `load`."""

    _key: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def make(cls) -> IdentityKey:
        """A new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @property
    def public(self) -> PublicIdentity:
        """The half to give to the other organisations."""
        raw = self._key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return PublicIdentity(raw)

    def sign(self, data: bytes) -> bytes:
        """64 bytes of signature over `data`."""
        return self._key.sign(data)

    def save(self, path: str | os.PathLike[str], *, passphrase: str | None = None) -> None:
        """Writes the key as PEM (PKCS 8, mode 0600), encrypted where a passphrase is given.

        Raises:
            InputError: a file is there already (a key is never written over), or the folder cannot be written to.
        """
        target = Path(path)
        if target.exists():
            raise InputError(f"{target} exists: a key is never written over; move it away or choose another name")
        if passphrase == "":
            raise InputError("an empty passphrase: give one of at least one character, or none")
        locked: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if passphrase is not None:
            locked = serialization.BestAvailableEncryption(passphrase.encode())
        pem = self._key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
        temporary: str | None = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # mkstemp's files have mode 0600 from the start: at no moment can anybody else read the key.
            handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
            with open(handle, "wb") as file:
                file.write(pem)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            temporary = None
        except OSError as error:
            raise explain_os_error(error, target) from error
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, passphrase: str | None = None) -> IdentityKey:
        """The key of a file that `save` wrote.

        Raises:
            InputError: no such file, others may read it, no PEM key in it, a key of another kind, or a passphrase that
                is wrong, missing or not needed.
        """
        source = Path(path)
        try:
            pem = source.read_bytes()
            mode = stat.S_IMODE(source.stat().st_mode)
        except FileNotFoundError:
            raise InputError(f"no identity key at {source}: make one, and give its public half to the others") from None
        except OSError as error:
            raise InputError(f"cannot read the identity key {source}: {error.strerror or error}") from error
        if os.name == "posix" and mode & 0o077:
            raise InputError(f"{source} has mode {mode:04o}, so others can read the key: chmod 600 {source}")
        try:
            key = serialization.load_pem_private_key(pem, None if passphrase is None else passphrase.encode())
        except TypeError:
            fault = (
                "is encrypted: give its passphrase" if passphrase is None else "is not encrypted: give no passphrase"
            )
            raise InputError(f"{source} {fault}") from None
        except Exception:
            told = (
                "no private key in PEM form" if passphrase is None else "the passphrase is wrong, or no PEM key in it"
            )
            raise InputError(f"{source}: {told}; expected an identity key as deltaw writes them") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise InputError(f"{source} holds a {type(key).__name__}: expected an Ed25519 key; make one with deltaw")
        return cls(key)


def check_name(name: str) -> str:
    """`name` if an organisation may be called that, else an `InputError`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"an organisation called {name!r}: expected up to 64 letters, digits, '.', '_' and '-'")
    return name


def write_roster(path: str | os.PathLike[str], identities: Mapping[str, PublicIdentity]) -> None:
    """Writes the participants' names and public keys, a line each: `bank-a ed25519 BASE64`."""
    lines = [f"{check_name(name)} {_KIND} {identities[name].text}\n" for name in sorted(identities)]
    write_text(path, "".join(lines))


def read_roster(path: str | os.PathLike[str]) -> dict[str, PublicIdentity]:
    """Names and public keys of `write_roster`'s form; empty lines and those that begin with # are passed over.

    Raises:
        InputError: no such file, or a line that is not a name and a key, with its number; a name or a key twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(
            f"no file of public keys at {path}: one line for each organisation, NAME {_KIND} KEY"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the file of public keys {path}: {error}") from None
    found: dict[str, PublicIdentity] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = line.split()
        try:
            if len(parts) != 3 or parts[1] != _KIND:
                raise InputError(f"expected NAME {_KIND} KEY")
            name, identity = check_name(parts[0]), PublicIdentity.from_text(parts[2])
            if name in found or identity in found.values():
                raise InputError("this name or this key is there twice")
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        found[name] = identity
    if not found:
        raise InputError(f"{path} names no organisation: expected a line for each, NAME {_KIND} KEY")
    return found
