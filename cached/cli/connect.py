"""The way from a command to the daemon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from cached.config import process_environment
from cached.errors import InvalidRequestError
from cached.refs import parse_ref
from cached.units import parse_duration
from cached_client.connection import Connection

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Globals:
    """Options before the verb. Each is empty unless it was given."""

    socket: str = ""
    address: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""


pass_globals = click.make_pass_decorator(Globals)


@contextmanager
def connected(options: Globals) -> Iterator[Connection]:
    """A connection to the daemon of ``--socket``, ``--address`` or their variables, else to that which workers find.

    Nothing is sent yet.
    """
    with _connection(options) as connection:
        yield connection


def _connection(options: Globals) -> Connection:
    env = process_environment()
    address = options.address or env.get("CACHED_ADDRESS", "")
    if not address or (options.socket and not options.address):
        return Connection(options.socket or None)
    if options.socket:
        raise click.UsageError("--socket is a daemon on this host, --address one elsewhere: give one of them.")
    from cached_client.network import NetworkConnection, TlsFiles

    names = ("ca", "cert", "key")
    given = [getattr(options, f"tls_{name}") or env.get(f"CACHED_TLS_{name.upper()}", "") for name in names]
    return NetworkConnection(address, TlsFiles(*given))


def _checked_ref(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str:
    if value is None:
        return ""
    try:
        parse_ref(value)
    except InvalidRequestError as error:
        raise click.BadParameter(f"{error.message}: {error.hint}") from error
    return value


def _seconds(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    try:
        return None if value is None else parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def ref_argument(function: _F) -> _F:
    """A REF, checked before anything is asked of the daemon."""
    return click.argument("ref", callback=_checked_ref)(function)


def optional_ref_argument(function: _F) -> _F:
    """A REF that may be left away; the command gets an empty text then."""
    return click.argument("ref", required=False, callback=_checked_ref)(function)


def wait_option(function: _F) -> _F:
    """``--wait 30s``; the command gets ``wait_s``, 0 without it."""
    text = "Wait until the daemon serves, at most this long, such as 30s. Without it: ask once."
    return click.option("--wait", "wait_s", metavar="DURATION", default="0s", callback=_seconds, help=text)(function)


def timeout_option(function: _F) -> _F:
    """``--timeout 30s``; the command gets ``timeout`` in seconds or None."""
    text = "Give up waiting after this long, such as 90s or 10m (exit code 4). What was begun goes on in the daemon."
    return click.option("--timeout", metavar="DURATION", callback=_seconds, help=text)(function)
