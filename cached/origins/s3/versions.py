"""Version markers and checksums of S3 objects, from the fields of a response."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from cached.origins.base import OriginChecksum

_SEPARATOR = ";version_id="
_FIELDS = {
    "ChecksumSHA256": ("sha256", 32),
    "ChecksumCRC64NVME": ("crc64nvme", 8),
    "ChecksumSHA1": ("sha1", 20),
    "ChecksumCRC32C": ("crc32c", 4),
    "ChecksumCRC32": ("crc32", 4),
}


def marker(fields: Mapping[str, Any]) -> str:
    """The ETag and, where the response has one, the version id; without an ETag, when it was modified."""
    etag = bare_etag(str(fields.get("ETag") or ""))
    if not etag and fields.get("LastModified") is not None:
        etag = f"modified:{fields['LastModified'].timestamp():.0f}"
    version_id = fields.get("VersionId")
    return f"{etag}{_SEPARATOR}{version_id}" if version_id and version_id != "null" else etag


def bare_etag(etag: str) -> str:
    """An ETag without quotes and weakness: servers differ in both between listing, HEAD and GET."""
    return etag.removeprefix("W/").strip('"')


def request_condition(version: str) -> dict[str, str]:
    """What a GET asks for, so that only this version is answered (servers that know no conditions ignore it)."""
    etag, _, version_id = version.partition(_SEPARATOR)
    condition = {"VersionId": version_id} if version_id else {}
    if etag and not etag.startswith("modified:"):
        condition["IfMatch"] = f'"{etag}"'
    return condition


def same_version(expected: str, fields: Mapping[str, Any]) -> bool:
    """Whether a response is of the version; without a version id on either side the ETag decides alone."""
    expected_etag, _, expected_id = expected.partition(_SEPARATOR)
    found_etag, _, found_id = marker(fields).partition(_SEPARATOR)
    return expected_etag == found_etag and (not expected_id or not found_id or expected_id == found_id)


def is_composite(fields: Mapping[str, Any], name: str) -> bool:
    """Whether the checksum field ``name`` is over the digests of parts, or may be.

    A multipart object's CRC32 or CRC32C, or any SHA, is over the parts unless the server says FULL_OBJECT; S3 computes
    CRC64-NVME over the whole object only.
    """
    if "-" in str(fields[name]) or fields.get("ChecksumType") == "COMPOSITE":
        return True
    multipart = "-" in bare_etag(str(fields.get("ETag") or ""))
    return multipart and fields.get("ChecksumType") != "FULL_OBJECT" and name != "ChecksumCRC64NVME"


def checksum_names(fields: Mapping[str, Any]) -> list[str]:
    """The checksum fields that a response has, strongest first."""
    return [name for name in _FIELDS if fields.get(name)]


def checksum(fields: Mapping[str, Any], name: str, part_sizes_bytes: tuple[int, ...] = ()) -> OriginChecksum | None:
    """The value of a checksum field in hex; None if it is not a digest of that algorithm."""
    algorithm, length_bytes = _FIELDS[name]
    try:
        digest = base64.b64decode(str(fields[name]).partition("-")[0], validate=True)
    except binascii.Error:
        return None
    if len(digest) != length_bytes:
        return None
    return OriginChecksum(algorithm=algorithm, value_hex=digest.hex(), part_sizes_bytes=part_sizes_bytes)
