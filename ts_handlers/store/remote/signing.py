"""Ed25519 signatures of what comes from another host.

Keys are PEM files (private: PKCS#8 without a passphrase; public: SubjectPublicKeyInfo), as ``openssl genpkey -algorithm
ed25519`` writes them too. A key is named by its id: the first 16 hexadecimal digits of the SHA-256 of the 32 bytes of
the public key.

Rotation: add the new public key beside the old one on every host; then change the signing key where entries are built;
then remove the old public key, when what it signed is no longer needed. What a removed key signed is refused and built
again, and the new object is found beside the old one (see `ts_handlers.store.remote.names`).
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ts_handlers.errors import RefusedError, SettingsError, StoreError
from ts_handlers.settings import SECTION
from ts_handlers.settings.sections import TrustSettings
from ts_handlers.store.local.ownership import check_path

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

logger = logging.getLogger(__name__)

UNSIGNED = "-"
_LINE = re.compile(r"-|[0-9a-f]{16} [A-Za-z0-9+/]{86}==")


class Keyring:
    """The keys of a host: the public keys whose signatures it accepts, and the private key with which it signs.

    Parameters
    ----------
    public:
        The accepted public keys by id; with none, everything is accepted.
    signing:
        The private key with which this host signs, or None.
    """

    def __init__(
        self, public: Mapping[str, Ed25519PublicKey] | None = None, signing: Ed25519PrivateKey | None = None
    ) -> None:
        self._public = dict(public or {})
        self._signing = signing
        if signing is not None:
            self._signing_id = key_id(signing.public_key())
            if self._public and self._signing_id not in self._public:
                logger.warning(
                    "%s.trust: the signing key %s is not among public_keys (%s), so this host would refuse what it "
                    "publishes itself; add its public key",
                    SECTION,
                    self._signing_id,
                    self._accepted(),
                )

    @property
    def required(self) -> bool:
        """Whether only signed objects are accepted."""
        return bool(self._public)

    @property
    def may_publish(self) -> bool:
        """Whether hosts with the same settings would accept what this host publishes."""
        return not self.required or self._signing is not None

    def sign(self, message: bytes) -> str:
        """The signature line for a message; ``-`` without a signing key."""
        if self._signing is None:
            return UNSIGNED
        return f"{self._signing_id} {base64.b64encode(self._signing.sign(message)).decode()}"

    def verify(self, message: bytes, line: str) -> None:
        """Check the signature line of a message.

        Raises
        ------
        RefusedError
            The signature is missing, of a key that is not accepted, or not of this message.
        """
        if not _LINE.fullmatch(line):
            raise RefusedError(f"{line[:32]!r} is no signature of this format")
        if not self.required:
            return
        if line == UNSIGNED:
            raise RefusedError(
                f"it is not signed, and {SECTION}.trust.public_keys asks for a signature of {self._accepted()}; "
                "publish it from a host with trust.signing_key"
            )
        name, _, encoded = line.partition(" ")
        if name not in self._public:
            raise RefusedError(
                f"it is signed with the key {name}, which is not among {SECTION}.trust.public_keys "
                f"({self._accepted()}); add that key's file if you trust it"
            )
        from cryptography.exceptions import InvalidSignature

        try:
            self._public[name].verify(base64.b64decode(encoded), message)
        except InvalidSignature as error:
            raise RefusedError(
                f"its signature of the key {name} does not fit its contents: it was changed after it was signed"
            ) from error

    def _accepted(self) -> str:
        return ", ".join(sorted(self._public))


def load_keyring(settings: TrustSettings) -> Keyring:
    """Read the key files that the section ``trust`` of the settings names.

    Raises
    ------
    SettingsError
        A file cannot be read, could be another user's, or holds no Ed25519 key; or the package `cryptography` is
        missing.
    """
    if not settings.public_keys and settings.signing_key is None:
        return Keyring()
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
    except ImportError as error:
        raise SettingsError(
            f"{SECTION}.trust: signatures need the package 'cryptography', which cannot be imported ({error}); "
            "pip install 'ts-handlers[remote]'"
        ) from error
    public = {}
    for index, path in enumerate(settings.public_keys or ()):
        where = f"{SECTION}.trust.public_keys[{index}]"
        data = _read(path, where, settings)
        try:
            key = load_pem_public_key(data)
        except ValueError as error:
            raise SettingsError(f"{where}: {path} holds no public key in PEM format: {error}") from error
        if not isinstance(key, Ed25519PublicKey):
            raise SettingsError(f"{where}: expected an Ed25519 public key in {path}, found {type(key).__name__}")
        public[key_id(key)] = key
    signing = None
    if settings.signing_key is not None:
        where = f"{SECTION}.trust.signing_key"
        data = _read(settings.signing_key, where, settings, private=True)
        try:
            private = load_pem_private_key(data, password=None)
        except (ValueError, TypeError) as error:  # TypeError: it has a passphrase
            raise SettingsError(
                f"{where}: {settings.signing_key} holds no private key in PEM format without a passphrase"
            ) from error
        if not isinstance(private, Ed25519PrivateKey):
            raise SettingsError(f"{where}: expected an Ed25519 private key in {settings.signing_key}")
        signing = private
    return Keyring(public, signing)


def _read(path: str, where: str, settings: TrustSettings, *, private: bool = False) -> bytes:
    """The content of a key file, held to the rules of ssh.

    It belongs to this user or to root, and so does the way to it; nobody else can write them. A private key of this
    user can be read by nobody else either. (One of root's may be read by a group: secrets are mounted so.)
    """
    file = Path(path).expanduser().absolute()
    try:
        check_path(file, settings.folders, "key file")
        with open(file, "rb") as stream:
            status = os.fstat(stream.fileno())
            if private and status.st_uid == os.geteuid() and status.st_mode & 0o077:
                raise SettingsError(
                    f"{where}: the private key {path} can be read by others (mode {stat.S_IMODE(status.st_mode):04o}): "
                    "chmod 0600 it, and make a new one if others have used this host"
                )
            return stream.read()
    except SettingsError:
        raise
    except StoreError as error:
        raise SettingsError(f"{where}: {error}") from error
    except OSError as error:
        raise SettingsError(f"{where}: the key file {path} cannot be read: {error.strerror or error}") from error


def key_id(key: Ed25519PublicKey) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the 32 bytes of a public key."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def generate_keys(private_path: str | Path, public_path: str | Path) -> str:
    """Make a pair of keys: the private one readable by its owner alone; returns the key's id.

    Raises
    ------
    FileExistsError
        One of the files exists: a key is never overwritten.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    if os.path.lexists(public_path):
        raise FileExistsError(f"{public_path} exists; a key is never overwritten, name another file")
    _write_new(private_path, private, 0o600)
    _write_new(public_path, public, 0o644)
    return key_id(key.public_key())


def _write_new(path: str | Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise FileExistsError(f"{path} exists; a key is never overwritten, name another file") from error
    with open(descriptor, "wb") as file:
        file.write(data)
