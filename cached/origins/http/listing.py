"""Lists of files as they lie on web servers, and version markers from the headers of an answer. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from cached.errors import InvalidRequestError
from cached.refs import check_digest, check_path

DEFAULT_LIST = "SHA256SUMS"
_SUM = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_HINT = (
    "a list is the output of sha256sum, one path a line, or JSON: an array of paths, or of objects with path and, "
    "where known, sha256"
)


def parse_list(data: bytes, where: str) -> dict[str, str]:
    """Path → SHA-256 (or empty) from a list: JSON, the output of ``sha256sum``, or one path a line.

    Lines that are empty or begin with ``#`` are skipped. Raises InvalidRequestError naming what cannot be read.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _wrong(where, "it is not UTF-8") from error
    if text.lstrip()[:1] in {"[", "{"}:
        pairs = _from_json(text, where)
    else:
        lines = (line.rstrip("\r") for line in text.split("\n"))
        pairs = [_from_line(line) for line in lines if line.strip() and not line.startswith("#")]
    found: dict[str, str] = {}
    for path, digest in pairs:
        clean = check_path(path.removeprefix("./"))
        if clean in found:
            raise _wrong(where, f"it names {clean} twice")
        found[clean] = check_digest(digest.lower()) if digest else ""
    if not found:
        raise _wrong(where, "it names no files")
    return found


def _from_line(line: str) -> tuple[str, str]:
    match = _SUM.fullmatch(line)
    return (match[2], match[1]) if match else (line.strip(), "")


def _from_json(text: str, where: str) -> list[tuple[str, str]]:
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(where, f"it is not JSON: {error}") from error
    if isinstance(data, dict):
        data = data.get("files")
    if isinstance(data, dict):  # {"files": {"path": "sha256", …}}
        data = [{"path": path, "sha256": digest} for path, digest in data.items()]
    if not isinstance(data, list):
        raise _wrong(where, "it has no array of files")
    return [_from_entry(entry, where) for entry in data]


def _from_entry(entry: Any, where: str) -> tuple[str, str]:
    if isinstance(entry, str):
        return entry, ""
    if isinstance(entry, dict):
        path, digest = entry.get("path"), entry.get("sha256", "")
        if isinstance(path, str) and isinstance(digest, str):
            return path, digest
    raise _wrong(where, f"{json.dumps(entry)[:100]} is no file")


def _wrong(where: str, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"the list of files {where} cannot be used: {why}", hint=_HINT, value=where)


def marker(headers: Mapping[str, str]) -> str:
    """The version that an answer says it is of: its ETag, else its date; empty if it has neither."""
    etag = headers.get("ETag", "").strip()
    if value := etag.removeprefix("W/").strip('"'):
        return f"{'weak' if etag.startswith('W/') else 'etag'}:{value}"
    date = headers.get("Last-Modified", "").strip()
    return f"modified:{date}" if date else ""


def same_version(expected: str, found: str) -> bool:
    """Whether two markers are of one version. Servers differ in the weakness of an ETag between HEAD and GET."""
    kinds = {marker.partition(":")[0] for marker in (expected, found)}
    return expected == found or (kinds == {"etag", "weak"} and expected.partition(":")[2] == found.partition(":")[2])


def condition(version: str) -> dict[str, str]:
    """What a request sends so that only this version is answered. A weak ETag never matches a condition on a range."""
    kind, _, value = version.partition(":")
    if kind == "etag":
        return {"If-Match": f'"{value}"'}
    return {"If-Unmodified-Since": value} if kind == "modified" else {}
