"""S3Origin: listing, describing, reading and uploading objects."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from cached.errors import (
    CachedError,
    InvalidRequestError,
    NotFoundError,
    OriginError,
    OriginProtocolError,
)
from cached.origins.base import Abort, OriginChecksum, OriginObject, OriginSpec, ReadInto
from cached.origins.net.body import Body, range_problem
from cached.origins.net.reading import range_read, read_nothing
from cached.origins.s3.client import Connection
from cached.origins.s3.failures import Failures
from cached.origins.s3.objects import Answer, Objects
from cached.origins.s3.options import parse_location, parse_options
from cached.origins.s3.shared import CONNECTIONS, SharedConnection
from cached.origins.s3.versions import (
    checksum,
    checksum_names,
    is_composite,
    marker,
    request_condition,
    same_version,
)
from cached.refs import check_path

_MAX_PARTS = 10_000  # S3's own limit; a server that pages for ever is not followed


class S3Origin:
    """See Origin and WritableOrigin. The client is made at first use; one origin may be used by any number of threads.

    Origins of the same options share it.

    Options: those of S3Options, as text. Credentials are found by boto3 in the usual AWS places.
    """

    def __init__(self, spec: OriginSpec) -> None:
        self._location = parse_location(spec.uri)
        self._options = parse_options(spec)
        self._lock = threading.Lock()
        self._shared: SharedConnection | None = None
        self._upload_client: Any = None
        self._one_object: bool | None = False if self._location.only_prefix else None
        self._may_name_versions = True

    def prepare(self) -> None:
        """See Origin."""
        self._connected()

    def list_objects(self) -> list[OriginObject]:
        """See Origin. Keys that end with ``/`` are skipped; a key that is not a safe path is InvalidRequestError."""
        found = [item for item in map(self._listed, self._list(self._location.base)) if item is not None]
        if found:
            return sorted(found, key=lambda item: item.path)
        if not self._location.only_prefix:
            fields = self._head(self._location.key, self._location.last_part)
            return [_described(check_path(self._location.last_part), fields)]
        raise NotFoundError(
            f"there are no objects below s3://{self._location.bucket}/{self._location.base}",
            hint="look at the bucket and the prefix; `aws s3 ls` with the same endpoint shows what is there",
            uri=f"s3://{self._location.bucket}/{self._location.base}",
            path="",
        )

    def stat(self, path: str) -> OriginObject:
        """See Origin. A composite checksum is given only where the server tells the sizes of the parts."""
        key = self._key(path)
        fields = self._head(key, path)
        checksums: list[OriginChecksum] = []
        for name in checksum_names(fields):
            sizes = self._part_sizes(key, path, fields) if is_composite(fields, name) else ()
            usable = checksum(fields, name, sizes) if sizes is not None else None
            if usable is not None:
                checksums.append(usable)
        described = _described(path, fields, tuple(checksums))
        if not described.version and not checksums:
            raise self._connected()[1].make(
                OriginError, "the server tells neither ETag nor Last-Modified of it, and no checksum: a change while "
                "it is read could not be seen", path, cause="no version", hint="use a server that tells one of them",
            )  # fmt: skip
        return described

    @contextmanager
    def open_range(
        self, item: OriginObject, offset_bytes: int, length_bytes: int, abort: Abort | None = None
    ) -> Iterator[ReadInto]:
        """See Origin. A range without bytes costs a HEAD."""
        shared, failures = self._taken(), self._connected()[1]
        if not length_bytes:
            self._check_version(item)
            yield read_nothing
            return
        request = {
            "Bucket": self._location.bucket,
            "Key": self._key(item.path),
            "Range": f"bytes={offset_bytes}-{offset_bytes + length_bytes - 1}",
            **request_condition(item.version),
        }

        def begin(body: Body) -> None:
            with failures.typed(item.path, expected_version=item.version):
                answer = self._got(shared.objects(self._location.bucket), request)
            body.begin(answer.raw)
            if not same_version(item.version, answer.fields):
                raise failures.changed(item.path, item.version, marker(answer.fields))
            problem = range_problem(answer.fields, offset_bytes, length_bytes, item.size_bytes)
            if problem:
                raise failures.wrong_range(item.path, request["Range"], problem)

        with range_read(begin, failures, item.path, request["Range"], length_bytes, abort) as read_into:
            yield read_into

    def _got(self, objects: Objects, request: Mapping[str, str]) -> Answer:
        """Who may read objects may be refused their versions, which is another permission (s3:GetObjectVersion).

        Then the current version is asked for, on the condition that it is still the one with this ETag.
        """
        unnamed = {name: value for name, value in request.items() if name != "VersionId"}
        if len(unnamed) == len(request) or not self._may_name_versions:
            return objects.get(unnamed)
        try:
            return objects.get(request)
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") != 403:
                raise
        answer = objects.get(unnamed)
        self._may_name_versions = False
        return answer

    def upload_file(self, local_path: Path, path: str, progress: Callable[[int], None] | None = None) -> OriginObject:
        """See WritableOrigin. Sent with a CRC64-NVME where the server takes one."""
        # Not in movers, where each import delays the first byte.
        from cached.origins.s3.upload import send_file, upload_checked

        key = f"{self._location.base}{check_path(path)}"
        connection, failures = self._connected()
        with self._lock:
            if self._upload_client is None:
                self._upload_client = connection.upload_client()

        def send() -> str:
            with failures.typed(path):
                crc64_hex = send_file(self._upload_client, local_path, self._location.bucket, key, progress)
            with self._lock:
                self._one_object = False
            return crc64_hex

        return upload_checked(local_path, send, lambda: self.stat(path))

    def close(self) -> None:
        """See Origin. A later call connects anew."""
        with self._lock:
            shared, self._shared = self._shared, None
            upload_client, self._upload_client = self._upload_client, None
        if shared is not None:
            CONNECTIONS.give_back(shared)
        if upload_client is not None:
            upload_client.close()

    def _connected(self) -> tuple[Connection, Failures]:
        connection = self._taken().connection
        return connection, Failures(self._location, connection)

    def _taken(self) -> SharedConnection:
        with self._lock:
            if self._shared is None:
                self._shared = CONNECTIONS.take(self._options)
            return self._shared

    def _check_version(self, item: OriginObject) -> None:
        fields = self._head(self._key(item.path), item.path)
        if not same_version(item.version, fields):
            raise self._connected()[1].changed(item.path, item.version, marker(fields))

    def _list(self, prefix: str, limit: int = 0) -> list[dict[str, Any]]:
        connection, failures = self._connected()
        request: dict[str, Any] = {"Bucket": self._location.bucket, "Prefix": prefix}
        if limit:
            request["MaxKeys"] = limit
        found: list[dict[str, Any]] = []
        with failures.typed(""):
            for page in connection.client.get_paginator("list_objects_v2").paginate(**request):
                if "IsTruncated" not in page and "KeyCount" not in page:
                    raise _no_listing(failures, "it answers no list of objects")  # a login page, or nothing at all
                found.extend(page.get("Contents", ()))
                if limit and len(found) >= limit:
                    break
                # botocore ends without a word there, and the first page would pass for the whole.
                if page.get("IsTruncated") and not page.get("NextContinuationToken"):
                    raise _no_listing(failures, "its list goes on after a page, and it does not say where")
        return found

    def _listed(self, fields: dict[str, Any]) -> OriginObject | None:
        key = str(fields.get("Key") or "")
        if not key:
            raise _no_listing(self._connected()[1], "its list has an object without a key")
        if key.endswith("/"):
            return None
        try:
            return _described(check_path(key.removeprefix(self._location.base)), fields)
        except InvalidRequestError as error:
            raise InvalidRequestError(
                f"the key {key[:200]!r} in bucket {self._location.bucket!r} cannot be a file of a model: {error}",
                hint=f"rename or remove that object; {error.hint}",
                value=key[:200],
            ) from error

    def _key(self, path: str) -> str:
        check_path(path)
        if path == self._location.last_part and self._is_one_object():
            return self._location.key
        return f"{self._location.base}{path}"

    def _is_one_object(self) -> bool:
        """Whether the URI names one object; asked once, and only where a path could mean both."""
        if self._one_object is None:
            one = not self._list(self._location.base, limit=1)
            with self._lock:
                self._one_object = one
        return bool(self._one_object)

    def _head(self, key: str, path: str) -> Mapping[str, Any]:
        shared, failures = self._taken(), self._connected()[1]
        with failures.typed(path):
            return shared.objects(self._location.bucket).head({"Bucket": self._location.bucket, "Key": key})

    def _part_sizes(self, key: str, path: str, fields: Mapping[str, Any]) -> tuple[int, ...] | None:
        """Sizes of the parts of a composite checksum; None, and a line in the log, where the server does not tell."""
        try:
            sizes = self._ask_part_sizes(key, path, fields)
        except (CachedError, KeyError, ValueError) as error:
            sizes, why = (), str(error)
        else:
            why = "the server tells no part sizes, or they do not add up"
        if not sizes or sum(sizes) != fields["ContentLength"]:
            import structlog  # here, for the same reason

            log = structlog.get_logger(__name__)
            log.info("s3.composite_checksum_unusable", bucket=self._location.bucket, key=key, why=why)
            return None
        return sizes

    def _ask_part_sizes(self, key: str, path: str, fields: Mapping[str, Any]) -> tuple[int, ...]:
        connection, failures = self._connected()
        request: dict[str, Any] = {
            "Bucket": self._location.bucket, "Key": key, "ObjectAttributes": ["ObjectParts", "ETag"], "MaxParts": 1000,
        }  # fmt: skip
        if fields.get("VersionId", "null") != "null":
            request["VersionId"] = fields["VersionId"]
        sizes: list[int] = []
        while len(sizes) < _MAX_PARTS:
            with failures.typed(path):
                answer = connection.client.get_object_attributes(**request)
            if not same_version(marker({"ETag": fields.get("ETag")}), {"ETag": answer.get("ETag", fields.get("ETag"))}):
                raise failures.changed(path, marker(fields), marker(answer))
            parts = answer.get("ObjectParts", {})
            sizes.extend(int(part["Size"]) for part in parts.get("Parts", ()))
            if not parts.get("IsTruncated") or not parts.get("Parts"):
                break
            request["PartNumberMarker"] = int(parts["NextPartNumberMarker"])
        return tuple(sizes)


def _no_listing(failures: Failures, problem: str) -> OriginError:
    return failures.make(
        OriginProtocolError, problem, "", cause=problem,
        hint="use an endpoint that knows S3's ListObjectsV2, and look whether this one is an S3 server",
    )  # fmt: skip


def _described(path: str, fields: Mapping[str, Any], checksums: tuple[OriginChecksum, ...] = ()) -> OriginObject:
    size = fields.get("Size", fields.get("ContentLength"))
    if size is None:
        raise OriginError(
            f"the server does not tell the size of {path}", hint="look at the endpoint", path=path, cause="no size"
        )
    return OriginObject(path=path, size_bytes=int(size), version=marker(fields), checksums=checksums)
