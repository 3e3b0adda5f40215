"""Traces of attaches: CSV with the columns ``time_s,model,size_bytes`` and, where known, ``lease_s``."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from cached.errors import InvalidRequestError

_COLUMNS = ("time_s", "model", "size_bytes")
_HINT = "a trace is CSV with the columns time_s,model,size_bytes and optionally lease_s"


@dataclass(frozen=True, slots=True)
class Row:
    """One attach. ``lease_s``: how long the worker held it."""

    time_s: float
    model: str
    size_bytes: int
    lease_s: float = 0.0


def read_trace(path: Path) -> list[Row]:
    """All rows in order of time; columns that a trace does not have are passed over.

    Raises InvalidRequestError with the file, the line and what is wrong with it; nothing is skipped silently.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            _check_header(path, reader.fieldnames or ())
            rows = [_row(path, reader.line_num, fields) for fields in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidRequestError(f"{path} cannot be read: {error}", hint=_HINT, value=str(path)) from error
    if not rows:
        raise _wrong(path, 2, "there are no rows")
    rows.sort(key=lambda row: row.time_s)
    return rows


def _check_header(path: Path, names: object) -> None:
    found = [str(name) for name in names] if isinstance(names, list) else []
    missing = [name for name in _COLUMNS if name not in found]
    if missing:
        raise _wrong(path, 1, f"the header has no column {', '.join(missing)}")
    twice = [name for name in (*_COLUMNS, "lease_s") if found.count(name) > 1]
    if twice:
        raise _wrong(path, 1, f"the header has the column {twice[0]} twice")


def _row(path: Path, line: int, fields: Mapping[str | None, object]) -> Row:
    if None in fields:
        raise _wrong(path, line, "there are more fields than columns")
    model = _text(path, line, fields, "model")
    if not model.isprintable():
        raise _wrong(path, line, f"model {model!r} is not printable")
    lease = fields.get("lease_s")
    return Row(
        time_s=_number(path, line, fields, "time_s"),
        model=model,
        size_bytes=_size(path, line, fields),
        lease_s=_not_negative(path, line, fields, "lease_s") if lease not in {None, ""} else 0.0,
    )


def _text(path: Path, line: int, fields: Mapping[str | None, object], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or not value.strip():
        raise _wrong(path, line, f"{name} is missing")
    return value.strip()


def _number(path: Path, line: int, fields: Mapping[str | None, object], name: str) -> float:
    text = _text(path, line, fields, name)
    try:
        value = float(text)
    except ValueError:
        raise _wrong(path, line, f"{name} {text!r} is not a number") from None
    if not isfinite(value):
        raise _wrong(path, line, f"{name} {text!r} is not a finite number")
    return value


def _not_negative(path: Path, line: int, fields: Mapping[str | None, object], name: str) -> float:
    value = _number(path, line, fields, name)
    if value < 0:
        raise _wrong(path, line, f"{name} {value:g} is negative")
    return value


def _size(path: Path, line: int, fields: Mapping[str | None, object]) -> int:
    value = _number(path, line, fields, "size_bytes")
    if value <= 0 or value != int(value):
        raise _wrong(path, line, f"size_bytes {fields['size_bytes']!r} is not a whole number of bytes above 0")
    return int(value)


def _wrong(path: Path, line: int, what: str) -> InvalidRequestError:
    return InvalidRequestError(f"{path}:{line}: {what}", hint=_HINT, value=f"{path}:{line}")
