"""The way to a daemon on another machine: gRPC over TCP with mutual TLS. The `cached` command uses it.

What attaches models cannot cross a network, because it hands out descriptors of memory: that is refused by the daemon.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import grpc

from cached_client.connection import CHANNEL_OPTIONS, Connection
from cached_client.errors import InvalidRequestError

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")
_KEEPALIVE_MS = 120_000  # as often as a gRPC server bears that is not told otherwise


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the authorities that the daemon's certificate must come from, and the caller's certificate and key."""

    ca: str
    cert: str
    key: str


class NetworkConnection(Connection):
    """A channel to one daemon at ``HOST:PORT``. Its ``path`` is empty: there is no socket."""

    def __init__(self, address: str, files: TlsFiles) -> None:
        """Reads the files; nothing is sent yet. Raises InvalidRequestError."""
        if _ADDRESS.fullmatch(address) is None:
            raise InvalidRequestError(
                f"{address!r} is not an address", hint="write HOST:PORT, such as gpu-7.example:9471", value=address
            )
        self.path: Path = Path()
        self._address = address
        self._credentials = grpc.ssl_channel_credentials(
            _content("certificate authorities", files.ca),
            _content("private key", files.key),
            _content("certificate", files.cert),
        )
        self._prepare()

    @property
    def target(self) -> str:
        """The address, as errors name it."""
        return self._address

    def _open(self) -> grpc.Channel:
        options = [*CHANNEL_OPTIONS, ("grpc.keepalive_time_ms", _KEEPALIVE_MS)]
        return grpc.secure_channel(self._address, self._credentials, options=options)


def _content(what: str, path: str) -> bytes:
    if not path:
        raise InvalidRequestError(
            f"a daemon at an address is only spoken to with mutual TLS, and no file of the {what} was given",
            hint="give --tls-ca, --tls-cert and --tls-key, or set CACHED_TLS_CA, CACHED_TLS_CERT and CACHED_TLS_KEY",
            value=path,
        )
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InvalidRequestError(
            f"cannot read the {what} {path}: {error.strerror}", hint="give the path of a PEM file", value=path
        ) from error
    if b"-----BEGIN" not in data:
        raise InvalidRequestError(f"{path} holds no {what}", hint="give the path of a PEM file", value=path)
    return data
