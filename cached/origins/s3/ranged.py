"""Ranged GETs of objects: the first of each through botocore, whose request is then the pattern of all others.

A request of botocore's costs about 2 ms of processor time (endpoint rules, serialization, handlers, parsing), half of
what receiving its 16 MiB does. What it decides (URL, headers, region) is the same for every range of an object: the
later ranges are signed and sent with botocore's own signer and connections, and nothing else of it. After a refusal the
pattern is forgotten: what may help (another region, other credentials) is left to botocore.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import botocore.exceptions
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSPreparedRequest, AWSRequest
from botocore.parsers import create_parser

from cached.origins.s3.client import Connection

_SIGNED = re.compile(r"AWS4-HMAC-SHA256 Credential=[^,]*?/\d{8}/([^/,]+)/s3/aws4_request")
_OF_ONE_REQUEST = frozenset({
    "authorization", "range", "if-match", "date", "x-amz-date", "x-amz-content-sha256", "x-amz-security-token",
    "amz-sdk-invocation-id", "amz-sdk-request",
})  # fmt: skip
_MAX_PATTERNS = 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful answer: its fields by botocore's names, and urllib3's response with the body still to be read."""

    fields: Mapping[str, Any]
    raw: Any


@dataclass(frozen=True, slots=True)
class _Pattern:
    url: str
    headers: Mapping[str, str]
    region: str
    """Empty: not signed."""


class RangedGets:
    """Of one client. Thread-safe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._patterns: dict[tuple[str, ...], _Pattern] = {}
        self._sent = threading.local()
        connection.client.meta.events.register("before-send.s3.GetObject", self._notice)

    def get(self, request: Mapping[str, str]) -> Answer:
        """The answer to GetObject with these parameters: Bucket, Key, Range and, where wanted, VersionId, IfMatch.

        Raises what botocore's client raises. Unless the body is read to its end, ``raw`` has to be closed.
        """
        key = (request["Bucket"], request["Key"], request.get("VersionId", ""))
        pattern = self._patterns.get(key)
        if pattern is not None:
            return self._ask_again(key, pattern, request)
        self._sent.request = None
        answer = self._connection.client.get_object(**request)
        learned = _learn(self._sent.request)
        if learned is not None:
            if len(self._patterns) >= _MAX_PATTERNS:
                self._patterns.clear()
            self._patterns[key] = learned
        return Answer(answer, answer["Body"]._raw_stream)  # noqa: SLF001 its own reading copies every byte once more

    def _notice(self, request: AWSPreparedRequest, **_other: Any) -> None:
        """What botocore is about to send, in this thread; the last one is the one that succeeded."""
        self._sent.request = request

    def _ask_again(self, key: tuple[str, ...], pattern: _Pattern, wanted: Mapping[str, str]) -> Answer:
        headers = {**pattern.headers, "Range": wanted["Range"]}
        if "IfMatch" in wanted:
            headers["If-Match"] = wanted["IfMatch"]
        request = AWSRequest(method="GET", url=pattern.url, headers=headers, stream_output=True)
        if pattern.region:
            S3SigV4Auth(self._connection.credentials(), "s3", pattern.region).add_auth(request)
        answer = self._connection.send(request.prepare())
        if answer.status_code in {200, 206}:
            return Answer(_fields(answer.headers), answer.raw)
        if answer.status_code < 500:
            self._patterns.pop(key, None)
        parsed = create_parser("rest-xml").parse(
            {"status_code": answer.status_code, "headers": answer.headers, "body": answer.content},
            self._connection.client.meta.service_model.operation_model("GetObject").output_shape,
        )
        raise botocore.exceptions.ClientError(parsed, "GetObject")


def _learn(sent: AWSPreparedRequest | None) -> _Pattern | None:
    """The pattern of a request; None where the way it is signed is not the ordinary one."""
    if sent is None:
        return None
    given = {name: value.decode() if isinstance(value, bytes) else str(value) for name, value in sent.headers.items()}
    signature = next((value for name, value in given.items() if name.lower() == "authorization"), "")
    signed = _SIGNED.match(signature)
    if "X-Amz-Signature=" in sent.url or (signature and signed is None):
        return None
    kept = {name: value for name, value in given.items() if name.lower() not in _OF_ONE_REQUEST}
    return _Pattern(sent.url, kept, signed[1] if signed else "")


def _fields(headers: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, header in _HEADERS.items():
        if header in headers:
            found[name] = headers[header]
    if "ETag" not in found and "Last-Modified" in headers:
        found["LastModified"] = parsedate_to_datetime(headers["Last-Modified"])
    return found


_HEADERS = {
    "ETag": "ETag",
    "VersionId": "x-amz-version-id",
    "ContentRange": "Content-Range",
    "ContentLength": "Content-Length",
}
