"""What the TCP listener shows and trusts: read from files, checked, and read again when they change."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import grpc

from cached.config import TcpConfig
from cached.errors import ConfigError

_MAX_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Files:
    """What the files held, and what ``stat`` said of them then."""

    cert: bytes
    key: bytes
    client_ca: bytes
    seen: tuple[tuple[int, ...], ...]


class Certificates:
    """What the listener shows and trusts. ``reload`` from the loop's threads; ``credentials`` asks from gRPC's own.

    A change of the files holds for the next connection. Files that cannot be used change nothing.
    """

    def __init__(self, config: TcpConfig) -> None:
        """Reads the files; blocks. Raises ConfigError, naming the setting and what is wrong with its file."""
        self._config = config
        self._files = _read(config)
        self._taken = self._files

    def reload(self) -> bool:
        """Reads the files if they changed; blocks. Whether they had. Raises ConfigError, and then all stays."""
        if _seen(self._paths) == self._files.seen:
            return False
        self._files = _read(self._config)
        return True

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC: a client must show a certificate of ``client_ca``, and TLS 1.2 is the least."""
        return grpc.dynamic_ssl_server_credentials(_configuration(self._files), self._fetch, True)  # type: ignore[arg-type] # None is right

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Before each handshake: None for what was answered before."""
        files = self._files
        if files is self._taken:
            return None
        self._taken = files
        return _configuration(files)

    @property
    def _paths(self) -> Sequence[str]:
        return self._config.cert, self._config.key, self._config.client_ca


def _configuration(files: _Files) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(files.key, files.cert)], files.client_ca)


def _read(config: TcpConfig) -> _Files:
    seen = _seen((config.cert, config.key, config.client_ca))
    files = _Files(
        _content("tcp.cert", config.cert),
        _content("tcp.key", config.key, secret=True),
        _content("tcp.client_ca", config.client_ca),
        seen,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.cert, config.key, password=_no_password)
    except (OSError, ValueError) as error:
        why = error.reason if isinstance(error, ssl.SSLError) and error.reason else str(error)
        hint = "write the certificate of this very key, both as PEM and the key without a password"
        raise _unusable("tcp.cert", config.cert, f"and tcp.key ({config.key}) are no pair: {why}", hint) from None
    try:
        context.load_verify_locations(cadata=files.client_ca.decode("ascii"))
    except (OSError, ValueError) as error:
        why = error.reason if isinstance(error, ssl.SSLError) and error.reason else str(error)
        hint = "write the certificates of the authorities, as PEM"
        raise _unusable("tcp.client_ca", config.client_ca, f"holds no authorities: {why}", hint) from None
    if _seen((config.cert, config.key, config.client_ca)) != seen:
        raise _unusable("tcp.cert", config.cert, "changed while it was read", "it is read again in a moment")
    return files


def _no_password() -> str:
    """Instead of asking whoever has the terminal."""
    msg = "the key has a password"
    raise ValueError(msg)


def _content(key: str, path: str, *, secret: bool = False) -> bytes:
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            data = file.read(_MAX_BYTES)
    except OSError as error:
        hint = "give the path of a PEM file that the daemon's user may read"
        raise _unusable(key, path, f"cannot be read: {error.strerror}", hint) from error
    if secret and stat.S_IMODE(found.st_mode) & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        raise _unusable(key, path, f"has mode {mode}: others may read or change it", f"chmod 0600 {path}")
    return data


def _unusable(key: str, path: str, what: str, hint: str) -> ConfigError:
    return ConfigError(f"{key}: {path} {what}", hint=hint, file=path, key=key, value=path)


def _seen(paths: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    found: list[tuple[int, ...]] = [() for _ in paths]
    for index, path in enumerate(paths):
        with suppress(OSError):
            about = os.stat(path)
            found[index] = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_mode)
    return tuple(found)
