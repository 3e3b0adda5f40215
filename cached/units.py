"""Sizes and durations as people write them, and the constants of the data path. Standard library only."""

from __future__ import annotations

import re

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

CHUNK_BYTES = 16 * MIB
"""The unit of transfer, verification, progress and repair. Part of the on-disk format."""

_BYTE_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": TIB,
}  # fmt: skip
MAX_SIZE_BYTES = 2**63 - 1
"""What a file may have, and the wire carries."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)\s*")
_SECONDS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str) -> int:
    """Bytes of ``"64GiB"``, ``"26GB"``, ``"1048576"``. Raises ValueError, saying what would be right."""
    match = _SIZE.fullmatch(text)
    if match is None or match[2].upper() not in _BYTE_UNITS:
        msg = f"{text!r} is not a size; write a number and a unit, such as '64GiB' or '26GB'"
        raise ValueError(msg)
    size_bytes = float(match[1]) * _BYTE_UNITS[match[2].upper()]
    if size_bytes > MAX_SIZE_BYTES:
        msg = f"{text[:40]!r} is more than a size can be (8 EiB)"
        raise ValueError(msg)
    return int(size_bytes)


def format_size(size_bytes: float) -> str:
    """``1536`` → ``"1.5 KiB"``: three significant digits at most, binary units."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{_three_digits(size)} {unit}"
        size /= 1024
    return f"{_three_digits(size)} TiB"


def _three_digits(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}"


def format_rate(bytes_per_s: float) -> str:
    """``1.5 GB/s``, in decimal units as networks and buses are; empty for nothing."""
    if bytes_per_s <= 0:
        return ""
    return f"{bytes_per_s / 1e9:.1f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.1f} MB/s"


def parse_duration(text: str) -> float:
    """Seconds of ``"500ms"``, ``"30s"``, ``"5m"``, ``"2h"``, ``"1d"`` or a plain number. Raises ValueError."""
    match = _DURATION.fullmatch(text)
    if match is None:
        msg = f"{text!r} is not a duration; write a number and a unit, such as '500ms', '30s', '5m' or '2h'"
        raise ValueError(msg)
    return float(match[1]) * _SECONDS[match[2]]


def format_duration(seconds: float) -> str:
    """``0.0123`` → ``"12 ms"``, ``75`` → ``"1m15s"``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{minutes:02d}m"
    return f"{hours // 24}d{hours % 24:02d}h"


def chunk_count(size_bytes: int) -> int:
    """How many chunks a blob of this size has. An empty blob has none."""
    return -(-size_bytes // CHUNK_BYTES)


def chunk_length(size_bytes: int, index: int) -> int:
    """Length in bytes of chunk ``index`` of a blob: CHUNK_BYTES, but for the last."""
    return min(CHUNK_BYTES, size_bytes - index * CHUNK_BYTES)
