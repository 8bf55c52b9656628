"""Keys: how they are made and read, and what is said when they cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.marks import needs_root
from ts_handlers import parse_settings
from ts_handlers.errors import SettingsError
from ts_handlers.settings.sections import TrustSettings
from ts_handlers.store.remote.signing import Keyring, generate_keys, load_keyring


def test_private_key_is_private_and_no_key_is_overwritten(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        name = generate_keys(tmp_path / "a.key", tmp_path / "a.pub")
    finally:
        os.umask(before)
    assert (tmp_path / "a.key").stat().st_mode & 0o777 == 0o600
    assert len(name) == 16
    assert generate_keys(tmp_path / "b.key", tmp_path / "b.pub") != name
    old = (tmp_path / "a.key").read_bytes()
    for private, public in (("a.key", "c.pub"), ("c.key", "a.pub")):
        with pytest.raises(FileExistsError, match="never overwritten"):
            generate_keys(tmp_path / private, tmp_path / public)
    assert (tmp_path / "a.key").read_bytes() == old
    assert not (tmp_path / "c.key").exists()


def test_who_may_publish(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "ab":
        generate_keys(tmp_path / f"{name}.key", tmp_path / f"{name}.pub")
    a = str(tmp_path / "a.key")
    assert Keyring().may_publish
    assert not load_keyring(TrustSettings((str(tmp_path / "a.pub"),))).may_publish
    assert load_keyring(TrustSettings((str(tmp_path / "a.pub"),), a)).may_publish
    assert load_keyring(TrustSettings((), a)).may_publish
    assert caplog.text == ""
    load_keyring(TrustSettings((str(tmp_path / "b.pub"),), a))
    assert "would refuse what it publishes itself" in caplog.text


def test_wrong_key_files_are_named(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    other = ec.generate_private_key(ec.SECP256R1())
    pem, private = s.Encoding.PEM, s.PrivateFormat.PKCS8
    files = {
        "none": b"nothing",
        "other.pub": other.public_key().public_bytes(pem, s.PublicFormat.SubjectPublicKeyInfo),
        "other.key": other.private_bytes(pem, private, s.NoEncryption()),
        "locked.key": ed25519.Ed25519PrivateKey.generate().private_bytes(
            pem, private, s.BestAvailableEncryption(b"secret")
        ),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).chmod(0o600)

    def message(public: tuple[str, ...] = (), signing: str | None = None) -> str:
        paths = tuple(str(tmp_path / name) for name in public)
        with pytest.raises(SettingsError) as caught:
            load_keyring(TrustSettings(paths, None if signing is None else str(tmp_path / signing)))
        return str(caught.value)

    assert "public_keys[0]" in message(("missing",))
    assert "cannot be read" in message(("missing",))
    assert "no public key in PEM format" in message(("none",))
    assert "expected an Ed25519 public key" in message(("other.pub",))
    assert "no private key in PEM format" in message(signing="none")
    assert "without a passphrase" in message(signing="locked.key")
    assert "expected an Ed25519 private key" in message(signing="other.key")


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_keys(tmp_path / "a.key", tmp_path / "a.pub")
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.serialization", None)
    with pytest.raises(SettingsError, match=r"package 'cryptography'.*pip install"):
        load_keyring(TrustSettings((str(tmp_path / "a.pub"),)))


def test_key_files_are_held_to_the_rules_of_ssh(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    generate_keys(folder / "a.key", folder / "a.pub")
    trust = TrustSettings((str(folder / "a.pub"),), str(folder / "a.key"))
    load_keyring(trust)
    for path, mode, text in (
        ("a.key", 0o640, r"signing_key: the private key .*can be read by others \(mode 0640\): chmod 0600"),
        ("a.key", 0o602, "signing_key: the key file .*writable by others"),
        ("a.pub", 0o664, r"public_keys\[0\]: the key file .*writable by others \(mode 0664\)"),
        ("", 0o777, r"public_keys\[0\]: the folder .*keys, on the way to the key file .*writable by others"),
    ):
        before = (folder / path).stat().st_mode & 0o7777
        (folder / path).chmod(mode)
        with pytest.raises(SettingsError, match=text):
            load_keyring(trust)
        (folder / path).chmod(before)
    folder.chmod(0o777)
    load_keyring(TrustSettings(trust.public_keys, trust.signing_key, (str(folder),)))


@needs_root
@pytest.mark.parametrize("name", ["a.key", "a.pub", ""])
def test_key_files_of_another_user_are_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    generate_keys(folder / "a.key", folder / "a.pub")
    os.chown(folder / name, 54321, 54321)
    with pytest.raises(SettingsError, match="belongs to uid 54321"):
        load_keyring(TrustSettings((str(folder / "a.pub"),), str(folder / "a.key")))


def test_an_empty_list_of_public_keys_is_a_mistake() -> None:
    with pytest.raises(SettingsError, match=r"trust\.public_keys: expected at least one PEM file, found an empty list"):
        parse_settings({"handler": {"ts_handlers": {"trust": {"public_keys": []}}}})
