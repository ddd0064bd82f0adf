"""Identity keys on disk and the file of everybody's public keys."""

import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from deltaw.core.errors import InputError
from deltaw.federated.secure import IdentityKey, PublicIdentity, read_roster, write_roster


@pytest.mark.parametrize("passphrase", [None, "correct horse"])
def test_a_key_comes_back_from_its_file_that_only_its_user_can_read(tmp_path, passphrase):
    key, path = IdentityKey.make(), tmp_path / "keys" / "bank.pem"
    key.save(path, passphrase=passphrase)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["bank.pem"]
    loaded = IdentityKey.load(path, passphrase=passphrase)
    assert loaded.public == key.public
    assert key.public.verifies(loaded.sign(b"text"), b"text")
    assert not key.public.verifies(loaded.sign(b"text"), b"other")
    assert not IdentityKey.make().public.verifies(loaded.sign(b"text"), b"text")
    assert (b"ENCRYPTED" in path.read_bytes()) is (passphrase is not None)
    assert "PRIVATE" not in repr(key)


def test_a_key_is_never_written_over(tmp_path):
    path = tmp_path / "bank.pem"
    IdentityKey.make().save(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="never written over"):
        IdentityKey.make().save(path)
    assert path.read_bytes() == before


def test_wrong_key_files_are_told_apart(tmp_path):
    key = IdentityKey.make()
    key.save(tmp_path / "open.pem")
    key.save(tmp_path / "locked.pem", passphrase="one")
    other = X25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for name, content in (("other.pem", other), ("junk.pem", b"no key"), ("empty.pem", b"")):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    for name, passphrase, reason in [
        ("none.pem", None, "no identity key"),
        ("open.pem", "one", "is not encrypted"),
        ("locked.pem", None, "is encrypted"),
        ("locked.pem", "two", "passphrase is wrong"),
        ("other.pem", None, "expected an Ed25519 key"),
        ("junk.pem", None, "no private key in PEM form"),
        ("empty.pem", None, "no private key in PEM form"),
    ]:
        with pytest.raises(InputError, match=reason):
            IdentityKey.load(tmp_path / name, passphrase=passphrase)
    (tmp_path / "open.pem").chmod(0o640)
    with pytest.raises(InputError, match=r"mode 0640.*chmod 600"):
        IdentityKey.load(tmp_path / "open.pem")
    with pytest.raises(InputError, match="empty passphrase"):
        key.save(tmp_path / "new.pem", passphrase="")


def test_a_roster_comes_back(tmp_path):
    roster = {name: IdentityKey.make().public for name in ("bank-b", "Bank.A", "bank_c")}
    write_roster(tmp_path / "peers", roster)
    text = (tmp_path / "peers").read_text()
    (tmp_path / "peers").write_text("# our consortium\n\n" + text)
    assert read_roster(tmp_path / "peers") == roster
    with pytest.raises(InputError, match="called 'bank b'"):
        write_roster(tmp_path / "peers", {"bank b": IdentityKey.make().public})


KEY, OTHER = IdentityKey.make().public.text, IdentityKey.make().public.text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"a ed25519 {KEY}\nb ed25519", "line 2: expected NAME ed25519 KEY"),
        (f"a rsa {KEY}", "line 1: expected NAME"),
        (f"a ed25519 {KEY}\na ed25519 {OTHER}", "line 2: this name or this key is there twice"),
        (f"a ed25519 {KEY}\nb ed25519 {KEY}", "line 2: this name or this key is there twice"),
        ("a ed25519 not-base64!", "line 1: a public identity key"),
        ("a ed25519 AAAA", "3 bytes"),
        (f"../a ed25519 {KEY}", "called '../a'"),
        ("# nobody\n", "names no organisation"),
    ],
    ids=["short", "kind", "name", "key", "base64", "length", "path", "empty"],
)
def test_wrong_rosters_name_the_line(tmp_path, text, reason):
    (tmp_path / "peers").write_text(text)
    with pytest.raises(InputError, match=reason.replace(".", r"\.")):
        read_roster(tmp_path / "peers")
    with pytest.raises(InputError, match="no file of public keys"):
        read_roster(tmp_path / "none")


def test_a_point_that_is_none_verifies_nothing():
    assert not PublicIdentity(b"\xff" * 32).verifies(bytes(64), b"text")
