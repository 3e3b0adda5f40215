"""Signed catalogs: Ed25519 signatures that lie beside a catalog, and the keys that make and check them.

``CATALOG.sig`` is JSON: of each key that signed, its id, when it did so, and the signature over that time and the
catalog's bytes. Only where keys are configured, or a command asks, is the library behind this loaded.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib.util
import json
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from cached.errors import ConfigError
from cached.own_files import fsync_folder, opener

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SUFFIX = ".sig"
KEYS_SETTING = "catalog.public_keys"
_FORMAT = 1
_CONTEXT = b"cached catalog signature 1\n"
"""Before what is signed, so that a signature made for anything else is none."""

_MAX_BYTES = 64 * 1024
_MAX_AHEAD_S = 86400.0
_END_OF_CALENDAR_S = 253_402_300_799
_KEY_ID_CHARS = 16
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Signed:
    """Which key signed a catalog, and when: seconds since 1970 by the clock of who signed."""

    key_id: str
    signed_at_s: int

    @property
    def at(self) -> str:
        """The time, for people."""
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(min(self.signed_at_s, _END_OF_CALENDAR_S)))


class CatalogGuard:
    """Takes catalogs that are signed with one of these keys, and none that is older than the last one taken.

    The keys are read anew for each catalog, so a file of them can be exchanged while the daemon runs.
    """

    def __init__(self, key_files: Sequence[str], taken_file: str = "") -> None:
        """``taken_file`` remembers when the last catalog taken was signed; empty: nothing is remembered.

        Reads the keys once; blocks. Raises ConfigError if one cannot be used.
        """
        self._key_files = tuple(key_files)
        self._taken_file = taken_file
        _public_keys(self._key_files)

    def check(self, path: str, data: bytes) -> Signed:
        """Who signed the catalog at ``path``, whose bytes are ``data``; blocks. Raises ConfigError."""
        keys = _public_keys(self._key_files)
        signatures = _signatures(path + SUFFIX)
        known = [item for item in signatures if item.by.key_id in keys]
        if not known:
            ids = ", ".join(item.by.key_id for item in signatures) or "nobody"
            raise _refused(
                f"{path} is signed by {ids}, and not with any of catalog.public_keys ({', '.join(keys)})",
                "sign it with a key that this host trusts, or add that key's public half to catalog.public_keys", path,
            )  # fmt: skip
        for item in known:
            if _is_right(keys[item.by.key_id], item, data):
                self._check_time(path, item.by)
                return item.by
        raise _refused(
            f"{path} is not what {path}{SUFFIX} was made for: one of the two was changed or exchanged",
            "deliver both together, and find out who changed it if you did not", path,
        )  # fmt: skip

    def taken(self, signed: Signed) -> None:
        """The catalog is in use now: from now on none that was signed earlier is taken. Blocks."""
        if not self._taken_file or signed.signed_at_s <= self._last_taken_s():
            return
        fresh = f"{self._taken_file}.new"
        try:
            with suppress(FileNotFoundError):
                os.unlink(fresh)
            with open(fresh, "x", encoding="ascii", opener=opener) as file:
                file.write(f"{signed.signed_at_s}\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self._taken_file)
            fsync_folder(os.path.dirname(self._taken_file))
        except OSError as error:
            _log.warning("catalog.not_remembered", file=self._taken_file, error=str(error))

    def _check_time(self, path: str, signed: Signed) -> None:
        last_s = self._last_taken_s()
        if signed.signed_at_s < last_s:
            raise _refused(
                f"{path} was signed at {signed.at}, before the one of {Signed('', last_s).at} that was taken",
                "to go back to an older catalog on purpose, sign it again", path,
            )  # fmt: skip
        if signed.signed_at_s > time.time() + _MAX_AHEAD_S:
            raise _refused(
                f"{path} was signed at {signed.at}, more than a day from now",
                "compare this host's clock with that of who signed", path,
            )  # fmt: skip

    def _last_taken_s(self) -> int:
        if not self._taken_file:
            return 0
        try:
            with open(self._taken_file, encoding="ascii", opener=opener) as file:
                return int(file.read(32))
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot read when the last catalog was signed, in {self._taken_file}: {error}",
                hint="remove the file: any signed catalog is taken then, whatever its age",
                file=self._taken_file, key=KEYS_SETTING, value="",
            ) from error  # fmt: skip


def check_of(key_files: Sequence[str], path: Path) -> Callable[[bytes], object]:
    """What ``load_catalog`` shall ask about the catalog at ``path``: without keys nothing. Raises ConfigError."""
    if not key_files:
        return lambda _data: None
    guard = CatalogGuard(key_files)
    return lambda data: guard.check(str(path), data)


def sign(data: bytes, key_files: Sequence[str]) -> str:
    """The text of a signature file for these bytes, signed with each of these private keys. Raises ConfigError."""
    signed_at_s = int(time.time())
    made = []
    for file in key_files:
        key = _private_key(file)
        signature = key.sign(_message(signed_at_s, data))
        made.append(
            {
                "key_id": _key_id(key.public_key()),
                "signed_at": signed_at_s,
                "signature": base64.b64encode(signature).decode("ascii"),
            }
        )
    return json.dumps({"format": _FORMAT, "signatures": made}, indent=2) + "\n"


def generate_key() -> tuple[bytes, bytes, str]:
    """A new private key and its public half, both as PEM, and their id. Raises ConfigError without the library."""
    _library()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private, public, _key_id(key.public_key())


@dataclass(frozen=True, slots=True)
class _Signature:
    by: Signed
    signature: bytes


def _message(signed_at_s: int, data: bytes) -> bytes:
    return b"%b%d\n%b" % (_CONTEXT, signed_at_s, data)


def _is_right(key: Ed25519PublicKey, item: _Signature, data: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(item.signature, _message(item.by.signed_at_s, data))
    except InvalidSignature:
        return False
    return True


def _signatures(path: str) -> list[_Signature]:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES)
    except OSError as error:
        raise _refused(
            f"cannot read the catalog's signature {path}: {error.strerror}",
            "sign it: cached catalog sign CATALOG --key FILE; or clear catalog.public_keys to take unsigned ones", path,
        ) from error  # fmt: skip
    try:
        return _parsed(json.loads(data))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _refused(
            f"{path} is not the signature of a catalog", "make it again: cached catalog sign CATALOG --key FILE", path
        ) from error


def _parsed(told: Any) -> list[_Signature]:
    if told["format"] != _FORMAT:
        raise ValueError
    return [_signature(item) for item in told["signatures"]]


def _signature(item: Mapping[str, Any]) -> _Signature:
    key_id, signed_at_s, text = item["key_id"], item["signed_at"], item["signature"]
    if not isinstance(key_id, str) or type(signed_at_s) is not int or not isinstance(text, str) or signed_at_s < 0:
        raise ValueError
    try:
        return _Signature(Signed(key_id[:64], signed_at_s), base64.b64decode(text, validate=True))
    except binascii.Error as error:
        raise ValueError from error


def _public_keys(files: Sequence[str]) -> dict[str, Ed25519PublicKey]:
    _library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    keys: dict[str, Ed25519PublicKey] = {}
    for file in files:
        try:
            key = load_pem_public_key(_key_data(file))
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise _bad_key(file, "holds no public Ed25519 key", "make a pair with: cached catalog keygen FILE")
        keys[_key_id(key)] = key
    return keys


def _private_key(file: str) -> Ed25519PrivateKey:
    _library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _key_data(file)
    if stat.S_IMODE(os.stat(file).st_mode) & 0o077:
        raise _bad_key(file, "can be read by others", f"chmod 0600 {file}; if they may have, make a new one")
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise _bad_key(
            file, "holds no private Ed25519 key without a password", "make a pair with: cached catalog keygen FILE"
        )
    return key


def _key_data(file: str) -> bytes:
    try:
        with open(file, "rb") as opened:
            return opened.read(_MAX_BYTES)
    except OSError as error:
        raise _bad_key(file, f"cannot be read: {error.strerror}", "give the path of a key") from error


def _key_id(key: Ed25519PublicKey) -> str:
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:_KEY_ID_CHARS]


def _library() -> None:
    """Raises ConfigError unless it is installed."""
    if importlib.util.find_spec("cryptography") is None:
        raise ConfigError(
            "signatures of catalogs need the library cryptography, which is not installed",
            hint="pip install 'cached[sign]'", file="", key=KEYS_SETTING, value="",
        )  # fmt: skip


def _refused(message: str, hint: str, path: str) -> ConfigError:
    return ConfigError(message, hint=hint, file=path, key=KEYS_SETTING, value="")


def _bad_key(file: str, what: str, hint: str) -> ConfigError:
    return ConfigError(f"the key {file} {what}", hint=hint, file=file, key=KEYS_SETTING, value=file)
