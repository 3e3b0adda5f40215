"""Brings a checkpoint of an origin into a folder, verified, so that it can be converted."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from cached.checksum import RunningDigest, new_digest
from cached.errors import CachedError, IntegrityError, NotFoundError
from cached.origins.base import Origin, OriginChecksum, OriginObject, OriginSpec
from cached.origins.registry import open_origin, pinned_spec
from cached.origins.selection import is_companion, is_pickle, is_training_state
from cached.units import CHUNK_BYTES

_ATTEMPTS = 5
_DELAY_S = 1.0
_INDEX = ".bin.index.json"


def fetch(spec: OriginSpec, folder: Path, on_bytes: Callable[[int], None]) -> None:
    """Every pickle, index and companion of the origin, compared with the origin's own checksum where it has one.

    ``on_bytes`` is called with counts of further bytes. Raises what origins raise, and IntegrityError.
    """
    listing = open_origin(spec)
    try:
        listed = listing.list_objects()
    finally:
        listing.close()
    wanted = [item for item in listed if _is_wanted(item.path)]
    if not any(is_pickle(item.path) for item in wanted):
        raise NotFoundError(
            f"{spec.uri} has no .bin, .pt, .pth or .ckpt files to convert",
            hint="pull it as it is",
            uri=spec.uri,
            path="",
        )
    origin = open_origin(pinned_spec(spec, listed))
    try:
        for item in wanted:
            _fetch_file(origin, origin.stat(item.path), folder / item.path, on_bytes)
    finally:
        origin.close()


def _is_wanted(path: str) -> bool:
    checkpoint = is_pickle(path) or path.endswith(_INDEX)
    return (checkpoint and not is_training_state(path)) or is_companion(path)


def _fetch_file(origin: Origin, item: OriginObject, file: Path, on_bytes: Callable[[int], None]) -> None:
    check = next((check for check in item.checksums if not check.part_sizes_bytes), None)
    digest = new_digest(check.algorithm, item.size_bytes) if check else None
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("xb") as opened, memoryview(bytearray(min(CHUNK_BYTES, item.size_bytes))) as buffer:
        for at in range(0, item.size_bytes, CHUNK_BYTES):
            with buffer[: min(CHUNK_BYTES, item.size_bytes - at)] as view:
                _read(origin, item, at, view)
                _take(opened, view, digest)
                on_bytes(len(view))
    if check is not None and digest is not None and digest.hexdigest() != check.value_hex:
        raise _damaged(item, check, digest.hexdigest())


def _take(opened: BinaryIO, view: memoryview, digest: RunningDigest | None) -> None:
    opened.write(view)
    if digest is not None:
        digest.update(view)


def _read(origin: Origin, item: OriginObject, offset_bytes: int, view: memoryview) -> None:
    """One range, tried again while that may help."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with origin.open_range(item, offset_bytes, len(view)) as read_into:
                read_into(view)
        except CachedError as error:
            if not error.retryable or attempt == _ATTEMPTS:
                raise
            time.sleep(float(error.fields.get("retry_after_s", "0")) + _DELAY_S * attempt)
        else:
            return


def _damaged(item: OriginObject, check: OriginChecksum, found: str) -> IntegrityError:
    return IntegrityError(
        f"{item.path} is not what the origin's own checksum says",
        hint="the object or the way to it is damaged: try again, and upload the file again if it stays so",
        path=item.path,
        check=f"origin-{check.algorithm}",
        expected=check.value_hex,
        found=found,
    )
