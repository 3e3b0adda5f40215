"""GETs and HEADs of a bucket's objects: the first through botocore, whose request is then the pattern of all others.

A request of botocore's costs about 2 ms of processor time (endpoint rules, serialization, handlers, parsing), half of
what receiving its 16 MiB does. What it decides (URL, headers, region) is the same for all of a bucket, but for the key:
later requests are signed and sent with botocore's own signer and connections, and nothing else of it. After a refusal
that is not about the object the pattern is forgotten: what may help (another region, other credentials) is botocore's.

Half of the rest was signing. Range and If-Match need no signature, as in presigned URLs: what is signed is the same for
all ranges of an object, and a server takes it for a quarter of an hour. Content is verified by what was read of it.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

import botocore.exceptions
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSPreparedRequest, AWSRequest
from botocore.parsers import create_parser

from cached.origins.s3.client import Connection

_SIGNED = re.compile(r"AWS4-HMAC-SHA256 Credential=[^,]*?/\d{8}/([^/,]+)/s3/aws4_request")
_OF_ONE_REQUEST = frozenset({
    "authorization", "range", "if-match", "date", "x-amz-date", "x-amz-content-sha256", "x-amz-security-token",
    "x-amz-checksum-mode", "amz-sdk-invocation-id", "amz-sdk-request",
})  # fmt: skip
_OF_THE_OBJECT = frozenset({404, 412, 416})
_SIGNED_FOR_S = 60.0
_MAX_SIGNED = 256
_MAX_DIGITS = 19


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful answer: its fields by botocore's names, and what ``Body`` reads, with nothing read yet."""

    fields: Mapping[str, Any]
    raw: Any


@dataclass(frozen=True, slots=True)
class _Signed:
    """Headers of a GET, and with which credentials and when (monotonic) they were signed."""

    credentials: Any
    at_s: float
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Pattern:
    folder_url: str
    """What stands before the key."""
    headers: Mapping[str, str]
    region: str
    """Empty: not signed."""
    signed: dict[str, _Signed] = field(default_factory=dict)
    """By URL."""


class Objects:
    """Of one bucket, by one client. Thread-safe. Raises what botocore's client raises."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pattern: _Pattern | None = None
        self._sent = threading.local()
        for operation in ("GetObject", "HeadObject"):
            connection.client.meta.events.register(f"before-send.s3.{operation}", self._notice)

    def get(self, request: Mapping[str, str]) -> Answer:
        """The answer to GetObject with these parameters: Bucket, Key, Range and, where wanted, VersionId, IfMatch.

        Unless the body is read to its end, ``raw`` has to be closed.
        """
        pattern = self._pattern
        if pattern is None:
            answer = self._learn(self._connection.client.get_object, request)
            return Answer(answer, answer["Body"]._raw_stream)  # noqa: SLF001 its own reading copies every byte once more
        url = pattern.folder_url + _place(request)
        headers = {**self._signed_get(pattern, url), "Range": request["Range"]}
        if "IfMatch" in request:
            headers["If-Match"] = request["IfMatch"]
        reply = self._connection.ask("GET", url, headers)
        if reply is not None:
            if reply.status in {200, 206}:
                return _answer(reply.headers, reply)
            raise self._refused("GetObject", reply.status, reply.headers, reply.content())
        answer = self._connection.send(AWSRequest("GET", url, headers, stream_output=True).prepare())
        if answer.status_code in {200, 206}:
            return _answer(answer.headers, answer.raw)
        raise self._refused("GetObject", answer.status_code, answer.headers, answer.content)

    def head(self, request: Mapping[str, str]) -> Mapping[str, Any]:
        """What HeadObject answers to these parameters, Bucket and Key: the object's fields, with its checksums."""
        pattern = self._pattern
        if pattern is None:
            return self._learn(self._connection.client.head_object, {**request, "ChecksumMode": "ENABLED"})
        url = pattern.folder_url + _place(request)
        headers = _sign(pattern, "HEAD", url, {"x-amz-checksum-mode": "ENABLED"}, self._connection.credentials())
        reply = self._connection.ask("HEAD", url, headers)
        if reply is not None:
            status, answered, body = reply.status, reply.headers, reply.content()
        else:
            answer = self._connection.send(AWSRequest("HEAD", url, headers).prepare())
            status, answered, body = answer.status_code, answer.headers, answer.content
        if status != 200:
            raise self._refused("HeadObject", status, answered, body)
        return _fields(answered)

    def _learn(self, operation: Callable[..., dict[str, Any]], request: Mapping[str, str]) -> dict[str, Any]:
        self._sent.request = None
        answer = operation(**request)
        self._pattern = _pattern_of(self._sent.request, _place(request))
        return answer

    def _notice(self, request: AWSPreparedRequest, **_other: Any) -> None:
        """What botocore is about to send, in this thread; the last one is the one that succeeded."""
        self._sent.request = request

    def _signed_get(self, pattern: _Pattern, url: str) -> Mapping[str, str]:
        if not pattern.region:
            return pattern.headers
        now_s, credentials = time.monotonic(), self._connection.credentials()
        signed = pattern.signed.get(url)
        if signed is None or signed.credentials != credentials or now_s - signed.at_s > _SIGNED_FOR_S:
            if len(pattern.signed) >= _MAX_SIGNED:
                pattern.signed.clear()
            signed = _Signed(credentials, now_s, _sign(pattern, "GET", url, {}, credentials))
            pattern.signed[url] = signed
        return signed.headers

    def _refused(self, operation: str, status: int, headers: Mapping[str, str], body: bytes) -> Exception:
        if status < 500 and status not in _OF_THE_OBJECT:
            self._pattern = None
        client = self._connection.client
        parsed = create_parser("rest-xml").parse(
            {"status_code": status, "headers": headers, "body": body},
            client.meta.service_model.operation_model(operation).output_shape,
        )
        error: Exception = botocore.exceptions.ClientError(parsed, operation)
        return error


def _sign(pattern: _Pattern, method: str, url: str, headers: Mapping[str, str], credentials: Any) -> Mapping[str, str]:
    """The headers of a request like the pattern's."""
    request = AWSRequest(method, url, {**pattern.headers, **headers})
    if pattern.region:
        S3SigV4Auth(credentials, "s3", pattern.region).add_auth(request)
    return dict(request.headers.items())


def _place(request: Mapping[str, str]) -> str:
    """The end of an object's URL."""
    place = quote(request["Key"], safe="/-._~")
    return f"{place}?versionId={quote(request['VersionId'], safe='-._~')}" if "VersionId" in request else place


def _pattern_of(sent: AWSPreparedRequest | None, place: str) -> _Pattern | None:
    """The pattern of a request; None where its URL or the way it is signed is not the ordinary one."""
    if sent is None or not sent.url.endswith(f"/{place}"):
        return None
    given = {name: value.decode() if isinstance(value, bytes) else str(value) for name, value in sent.headers.items()}
    signature = next((value for name, value in given.items() if name.lower() == "authorization"), "")
    signed = _SIGNED.match(signature)
    if "X-Amz-Signature=" in sent.url or (signature and signed is None):
        return None
    kept = {name: value for name, value in given.items() if name.lower() not in _OF_ONE_REQUEST}
    return _Pattern(sent.url.removesuffix(place), kept, signed[1] if signed else "")


def _answer(headers: Mapping[str, str], raw: Any) -> Answer:
    try:
        return Answer(_fields(headers), raw)
    except (ValueError, OverflowError):
        raw.close()
        raise


def _fields(headers: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {name: headers[header] for name, header in _HEADERS.items() if header in headers}
    if headers.get("content-length", "").isdecimal() and len(headers["content-length"]) <= _MAX_DIGITS:
        found["ContentLength"] = int(headers["content-length"])
    if "ETag" not in found and "last-modified" in headers:
        found["LastModified"] = parsedate_to_datetime(headers["last-modified"])
    return found


_HEADERS = {
    "ETag": "etag",
    "VersionId": "x-amz-version-id",
    "ContentRange": "content-range",
    "ChecksumType": "x-amz-checksum-type",
    **{
        f"Checksum{name}": f"x-amz-checksum-{name.lower()}"
        for name in ("SHA256", "CRC64NVME", "SHA1", "CRC32C", "CRC32")
    },
}
