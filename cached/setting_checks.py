"""What a setting may be: one check each, which answers what would be right, or nothing when the value is right."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from cached.schedule import is_zone
from cached.units import parse_size

Check = Callable[[Any], str]
"""Answers what would be right, or nothing when the value is right."""

_MAX_SOCKET_BYTES = 96
"""A Unix socket's path has 107 usable bytes; those of the sockets beside it are a little longer."""


def choice(*words: str) -> Check:
    """One of these."""
    return lambda value: "" if value in words else f"one of {', '.join(map(repr, words))}{_meant(value, words)}"


def between(low: float, high: float) -> Check:
    """A number, both ends included."""
    return lambda value: "" if low <= value <= high else f"a number from {low:g} to {high:g}"


def capacity(value: str) -> str:
    """A size or a share."""
    try:
        resolve_capacity(value, 1)
    except ValueError:
        return "a size such as '64GiB', or a share such as '50%'"
    return ""


def size(value: str) -> str:
    """A size."""
    try:
        parse_size(value)
    except ValueError:
        return "a number and a unit, such as '64GiB' or '26GB'"
    return ""


def message_size(value: str) -> str:
    """Room for the largest message of a client of ours, which has 512 KiB of an artifact."""
    good = not size(value) and 600 * 1024 <= parse_size(value) <= 64 * 1024 * 1024
    return "" if good else "a size from '600KiB' to '64MiB'"


def size_or_auto(value: str) -> str:
    """A size, or the word."""
    return "'auto', or a size such as '8GiB'" if value != "auto" and size(value) else ""


def mode(value: str) -> str:
    """A mode, as text."""
    if re.fullmatch(r"0?[0-7]{3}", value) and int(value, 8) & 0o600 == 0o600:
        return ""
    return "an octal mode that lets the owner read and write, such as '0600' or '0640'"


def listen(value: str) -> str:
    """An address of this host and a port; empty for off."""
    if not value:
        return ""
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):(\d{1,5})", value)
    return "" if match and int(match[2]) < 65536 else "HOST:PORT such as '127.0.0.1:9470', or '' for off"


def url(value: str) -> str:
    """A URL, or empty."""
    return "" if not value or re.match(r"https?://[^/]", value) else "a URL such as 'https://minio.example:9000'"


def destination(value: str) -> str:
    """Where artifacts go to, or empty."""
    good = not value or re.fullmatch(r"(s3://[^/@?#]+(/[^?#]*)?|file:///[^?#]+)", value)
    return "" if good else "a URI such as 's3://BUCKET/PREFIX' or 'file:///FOLDER'"


def label_prefix(value: str) -> str:
    """A domain name."""
    good = len(value) <= 250 and re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*", value)
    return "" if good else "a domain name such as 'models.example.com', in small letters"


def path(value: str) -> str:
    """An absolute path, or empty."""
    return "" if not value or os.path.isabs(value) else "an absolute path"


def filled_path(value: str) -> str:
    """An absolute path."""
    return "" if os.path.isabs(value) and value == os.path.normpath(value) else "an absolute path, such as /dev/shm"


def paths(value: tuple[str, ...]) -> str:
    """Absolute paths, each once."""
    if len(set(map(os.path.normpath, value))) < len(value):
        return "each folder once"
    return "" if all(map(os.path.isabs, value)) else "absolute paths"


def socket(value: str) -> str:
    """The path of a Unix socket, or empty."""
    if len(os.fsencode(value)) > _MAX_SOCKET_BYTES:
        return f"a path of at most {_MAX_SOCKET_BYTES} bytes (the kernel's bound for sockets)"
    if "," in value:
        return "a path without a comma (which gRPC's clients take for the end of an address)"
    return path(value)


def ids(value: tuple[int, ...]) -> str:
    """Numeric ids of users or groups."""
    return "numeric ids, 0 or more" if any(item < 0 for item in value) else ""


def time_zone(value: str) -> str:
    """A time zone of this host."""
    return "" if is_zone(value) else "a time zone that this host knows, such as 'Europe/Berlin' or 'UTC'"


def anything(_value: object) -> str:
    """Whatever it is."""
    return ""


PATH_CHECKS: tuple[Check, ...] = (path, filled_path, paths, socket)
"""The checks of settings that are paths; an empty one is a default that depends on the host."""


def resolve_capacity(text: str, total_bytes: int) -> int:
    """Bytes of ``"64GiB"``, or of ``"50%"`` of ``total_bytes``. Raises ValueError, saying what would be right."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match is None:
        return parse_size(text)
    if not 0 < float(match[1]) <= 100:
        msg = f"{text!r} is not a share; write more than 0% and at most 100%"
        raise ValueError(msg)
    return int(total_bytes * float(match[1]) / 100)


def _meant(word: object, words: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(word).lower(), words, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
