"""Keys and certificates of a federation over Flower: who holds what, written once, private where it must be.

One folder for each party. The authority's key signs the server's certificate and is needed for nothing else: keep it
offline. A node's key (P-384) proves at the SuperLink who it is; its identity key (Ed25519) signs its part in secure
aggregation, where the server is not trusted.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.core.errors import InputError
from deltaw.core.files import explain_os_error

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

AUTHORITY, SERVER = "authority", "server"
_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Credential:
    """One file.

    Attributes:
        holder: whose folder it is in, and who alone gets it if it is private.
        path: the file.
        private: whether it is a secret.
        what: what it is for.
        expires: the certificate's last day.
        made: now; else it was there and was left alone.
    """

    holder: str
    path: Path
    private: bool
    what: str
    expires: datetime.date | None = None
    made: bool = True


def make_credentials(
    folder: str | os.PathLike[str], *, server_names: Iterable[str] = (), nodes: Iterable[str], days: int = 730
) -> list[Credential]:
    """Makes what is missing of a federation's credentials below `folder`; files that are there are never written.

    Run again with more nodes, it adds those. Banks that would not have their keys made by someone else make them with
    `make_node_credentials` and send the two public files.

    Args:
        folder: gets `authority/`, `server/` and one folder for each node.
        server_names: DNS names and addresses under which nodes reach the server, besides this machine's own.
        nodes: names of the organisations.
        days: until the certificates end.

    Returns:
        Every file, for `table`.

    Raises:
        InputError: a name that cannot be an organisation's, a server's certificate that lacks a name, no authority
            key to sign with.
    """
    from deltaw.federated.secure.keys import PublicIdentity, check_name, read_roster, write_roster

    root, names = Path(folder), list(nodes)
    if not names or len(set(names)) < len(names) or {AUTHORITY, SERVER} & set(names):
        raise InputError(
            f"nodes are {', '.join(names) or 'none'}: expected names that differ, not {AUTHORITY}, {SERVER}"
        )
    if days < 1:
        raise InputError(f"certificates of {days} days: expected at least 1")
    for name in names:
        check_name(name)
    rows = _authority(root / AUTHORITY, days)
    rows += _server(root / SERVER, root / AUTHORITY, [*_LOCAL, *server_names], days)
    for name in names:
        rows += make_node_credentials(root / name, name=name)
        rows.append(_copy(name, root / AUTHORITY / "ca.pem", root / name / "ca.pem", "knows the server by it"))
        rows.append(_copy(SERVER, root / name / "node.pub", root / SERVER / "nodes" / f"{name}.pub", "admits the node"))
    everyone: dict[str, PublicIdentity] = {}
    for file in sorted(root.glob("*/identity.pub")):
        everyone |= read_roster(file)
    for holder in (SERVER, *everyone):
        write_roster(root / holder / "peers.txt", everyone)
        rows.append(Credential(holder, root / holder / "peers.txt", False, "knows the nodes' signatures by it"))
    return rows


def make_node_credentials(folder: str | os.PathLike[str], *, name: str) -> list[Credential]:
    """A node's own two key pairs, what is missing of them; `node.pub` goes to the server, `identity.pub` to all peers.

    Raises:
        InputError: a name that cannot be a folder's.
    """
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    from deltaw.federated.secure.keys import IdentityKey, check_name, write_roster

    root = Path(folder)
    check_name(name)
    rows = []
    key_file = root / "node.key"
    if not key_file.exists():
        made = ec.generate_private_key(ec.SECP384R1())
        # The form that flower-supernode reads, without a passphrase, which it could not ask for.
        text = made.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())
        rows.append(_write(Credential(name, key_file, True, "proves the node to the server"), text))
    else:
        rows.append(Credential(name, key_file, True, "proves the node to the server", made=False))
    key = form.load_ssh_private_key(key_file.read_bytes(), None)
    text = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH) + f" {name}\n".encode()
    rows.append(_write(Credential(name, root / "node.pub", False, "send it to the server"), text))
    identity_file = root / "identity.key"
    made_now = not identity_file.exists()
    if made_now:
        IdentityKey.make().save(identity_file)
    rows.append(Credential(name, identity_file, True, "signs in secure aggregation", made=made_now))
    write_roster(root / "identity.pub", {name: IdentityKey.load(identity_file).public})
    rows.append(Credential(name, root / "identity.pub", False, "send it to every peer", made=made_now))
    return rows


def table(rows: Iterable[Credential]) -> str:
    """Who gets what, as lines of text."""
    head = ("goes to", "file", "", "what for")
    cells = [head] + [
        (
            row.holder,
            str(row.path),
            ("PRIVATE" if row.private else "public") + ("" if row.made else ", was there"),
            row.what + (f", until {row.expires}" if row.expires else ""),
        )
        for row in rows
    ]
    widths = [max(len(line[place]) for line in cells) for place in range(len(head))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _write(row: Credential, data: bytes) -> Credential:
    """Writes a file that must not be there; leaves one that is, if it says the same or is private."""
    try:
        row.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(row.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if row.private else 0o644)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            os.fsync(handle)
        return row
    except FileExistsError:
        if not row.private and row.path.read_bytes() != data:
            raise InputError(
                f"{row.path} is there and says something else: move it away, or choose another folder"
            ) from None
        return Credential(row.holder, row.path, row.private, row.what, row.expires, made=False)
    except OSError as error:
        raise explain_os_error(error, row.path) from error


def _copy(holder: str, source: Path, target: Path, what: str) -> Credential:
    return _write(Credential(holder, target, False, what), source.read_bytes())


def _new_key(row: Credential) -> tuple[EllipticCurvePrivateKey, Credential]:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    text = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    return key, _write(row, text)


def _authority(folder: Path, days: int) -> list[Credential]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    key_row = Credential(AUTHORITY, folder / "ca.key", True, "signs the server's certificate; keep offline")
    what = "every party knows the server by it"
    if (folder / "ca.pem").exists():
        found = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        rows = [Credential(AUTHORITY, folder / "ca.pem", False, what, _end(found), made=False)]
        kept = Credential(AUTHORITY, folder / "ca.key", True, key_row.what, made=False)
        return rows + [kept] * (folder / "ca.key").exists()
    key, key_row = _new_key(key_row)
    if not key_row.made:
        raise InputError(f"{key_row.path} is there without its ca.pem: put that back, or choose another folder")
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "deltaw federation")])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    made = (
        _builder(name, name, key, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    return [_write(Credential(AUTHORITY, folder / "ca.pem", False, what, _end(made)), _pem(made)), key_row]


def _server(folder: Path, authority: Path, names: list[str], days: int) -> list[Credential]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    what, path = "the server's certificate", folder / "server.pem"
    key_row = Credential(SERVER, folder / "server.key", True, "the server's, for TLS")
    token_row = Credential(SERVER, folder / "operator.token", True, "admits nodes and starts runs")
    alternatives = list(dict.fromkeys(_general_name(name) for name in names))
    if path.exists():
        found = x509.load_pem_x509_certificate(path.read_bytes())
        has = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if lacking := [str(name.value) for name in alternatives if name not in has]:
            raise InputError(f"{path} is not for {', '.join(lacking)}: move it and server.key away to have them made")
        rows = [Credential(SERVER, path, False, what, _end(found), made=False)]
        rows.append(Credential(SERVER, key_row.path, True, key_row.what, made=False))
    else:
        if not (authority / "ca.key").exists():
            raise InputError(f"{authority / 'ca.key'} is not there: put it back to have a certificate signed")
        signer = form.load_pem_private_key((authority / "ca.key").read_bytes(), None)
        issuer = x509.load_pem_x509_certificate((authority / "ca.pem").read_bytes())
        key, key_row = _new_key(key_row)
        if not key_row.made:
            raise InputError(f"{key_row.path} is there without its server.pem: move it away")
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "deltaw federation server")])
        usage = x509.KeyUsage(
            digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
            key_agreement=False, key_cert_sign=False, crl_sign=False, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        made = (
            _builder(subject, issuer.subject, key, signer, days)  # type: ignore[arg-type]
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .sign(signer, hashes.SHA384())  # type: ignore[arg-type]
        )
        rows = [_write(Credential(SERVER, path, False, what, _end(made)), _pem(made)), key_row]
    rows.append(_write(token_row, secrets.token_urlsafe(32).encode() + b"\n"))
    rows.append(_copy(SERVER, authority / "ca.pem", folder / "ca.pem", "goes with the certificate"))
    return rows


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, signer: EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks of two organisations differ.
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )


def _general_name(name: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError:
        raise InputError(f"server name {name!r}: expected a DNS name (ASCII) or an address") from None


def _pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _end(certificate: x509.Certificate) -> datetime.date:
    return certificate.not_valid_after_utc.date()
