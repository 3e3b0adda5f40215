"""Uploading a file, with a checksum where the server takes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import S3Transfer, TransferConfig
from botocore.exceptions import ClientError
from s3transfer.utils import OSUtils, ReadFileChunk

from cached import checksum
from cached.errors import IntegrityError, NotFoundError
from cached.origins.base import OriginObject

_log = structlog.get_logger(__name__)
_READ_BYTES = 8 << 20
_MAX_PARTS = 9_000
_PART_BYTES = 16 << 20


class _Part(ReadFileChunk):  # type: ignore[misc]  # s3transfer has no types
    """Is closed also where the progress callback raises, which s3transfer calls once more on closing."""

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._fileobj.close()


class _Files(OSUtils):  # type: ignore[misc]
    def open_file_chunk_reader_from_fileobj(
        self, fileobj: Any, chunk_size: int, full_file_size: int, callbacks: Any, close_callbacks: Any = None
    ) -> _Part:
        return _Part(
            fileobj, chunk_size, full_file_size, callbacks=callbacks, enable_callbacks=False,
            close_callbacks=close_callbacks,
        )  # fmt: skip


def send_file(client: Any, local_path: Path, bucket: str, key: str, progress: Callable[[int], None] | None) -> str:
    """Uploads in parts and gives the CRC64-NVME of what was read, in hex. Raises what botocore raises.

    With a CRC64-NVME on every part first; once more without, if the server refuses that (older MinIO, some gateways).
    """
    if not local_path.is_file():
        raise NotFoundError(f"{local_path} is not a file", hint="name a file that is there", path=local_path)
    crc64_hex = checksum.crc64_hex(_crc64_of(local_path, progress))
    config = TransferConfig(
        multipart_chunksize=max(_PART_BYTES, -(-local_path.stat().st_size // _MAX_PARTS)),
        multipart_threshold=2 * _PART_BYTES,
        max_concurrency=4,
        preferred_transfer_client="classic",  # the other one takes neither our client's settings nor its credentials
    )
    with S3Transfer(client, config, _Files()) as transfer:
        where = str(local_path), bucket, key, progress
        try:
            _send(transfer, *where, {"ChecksumAlgorithm": "CRC64NVME"})
        except ClientError as error:
            if not _checksum_refused(error):
                raise
            _log.info("s3.upload_checksum_refused", bucket=bucket, key=key)
            _send(transfer, *where, {})
    return crc64_hex


def _send(
    transfer: Any, path: str, bucket: str, key: str, progress: Callable[[int], None] | None, extra: dict[str, str]
) -> None:
    try:
        transfer.upload_file(path, bucket, key, callback=progress, extra_args=extra)
    except S3UploadFailedError as error:
        raise error.__context__ or error from None


def upload_checked(local_path: Path, send: Callable[[], str], stat: Callable[[], OriginObject]) -> OriginObject:
    """Sends (``send`` gives the file's CRC64-NVME in hex) and compares what is stored then with what was sent.

    Once more if it differs: a gateway in front of a file system may go on to tell what it saw of a file while that was
    being written, if others were written beside it. Raises IntegrityError if it still differs.
    """
    crc64_hex, stored = send(), stat()
    if (difference := _difference(local_path, stored, crc64_hex)) is None:
        return stored
    _log.info("s3.upload_repeated", path=stored.path, reason=str(difference))
    crc64_hex, stored = send(), stat()
    if (difference := _difference(local_path, stored, crc64_hex)) is not None:
        raise difference
    return stored


def _difference(local_path: Path, stored: OriginObject, crc64_hex: str) -> IntegrityError | None:
    """None if what is stored has the file's size and, if the server tells it, its CRC64-NVME."""
    size_bytes = local_path.stat().st_size
    found = {item.algorithm: item.value_hex for item in stored.checksums if not item.part_sizes_bytes}
    for check, expected, seen in (
        ("size", str(size_bytes), str(stored.size_bytes)),
        ("crc64nvme", crc64_hex, found.get("crc64nvme", crc64_hex)),
    ):
        if expected != seen:
            return IntegrityError(
                f"{stored.path} is not at the origin what was uploaded: {check} {seen} instead of {expected}",
                hint="the file was changed while it was being uploaded, or something else wrote there; upload it again",
                path=stored.path,
                check=check,
                expected=expected,
                found=seen,
            )
    return None


def _crc64_of(path: Path, progress: Callable[[int], None] | None) -> int:
    value = 0
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            value = checksum.crc64nvme(buffer[:count], value)
            if progress is not None:
                progress(0)  # it may end this
    return value


def _checksum_refused(error: ClientError) -> bool:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status in {400, 411, 501} and error.response.get("Error", {}).get("Code") not in {
        "BadDigest",
        "ExpiredToken",
    }
