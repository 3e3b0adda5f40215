"""Ranged GETs of a bucket's objects: the first through botocore, whose request is then the pattern of all others.

A request of botocore's costs about 2 ms of processor time (endpoint rules, serialization, handlers, parsing), half of
what receiving its 16 MiB does. What it decides (URL, headers, region) is the same for all of a bucket, but for the key:
later requests are signed and sent with botocore's own signer and connections, and nothing else of it. After a refusal
the pattern is forgotten: what may help (another region, other credentials) is left to botocore.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
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
    "amz-sdk-invocation-id", "amz-sdk-request",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful answer: its fields by botocore's names, and what ``Body`` reads, with nothing read yet."""

    fields: Mapping[str, Any]
    raw: Any


@dataclass(frozen=True, slots=True)
class _Pattern:
    folder_url: str
    """What stands before the key."""
    headers: Mapping[str, str]
    region: str
    """Empty: not signed."""


class RangedGets:
    """Of one bucket, by one client. Thread-safe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pattern: _Pattern | None = None
        self._sent = threading.local()
        connection.client.meta.events.register("before-send.s3.GetObject", self._notice)

    def get(self, request: Mapping[str, str]) -> Answer:
        """The answer to GetObject with these parameters: Bucket, Key, Range and, where wanted, VersionId, IfMatch.

        Raises what botocore's client raises. Unless the body is read to its end, ``raw`` has to be closed.
        """
        pattern = self._pattern
        if pattern is not None:
            return self._ask_again(pattern, request)
        self._sent.request = None
        answer = self._connection.client.get_object(**request)
        self._pattern = _learn(self._sent.request, _place(request))
        return Answer(answer, answer["Body"]._raw_stream)  # noqa: SLF001 its own reading copies every byte once more

    def _notice(self, request: AWSPreparedRequest, **_other: Any) -> None:
        """What botocore is about to send, in this thread; the last one is the one that succeeded."""
        self._sent.request = request

    def _ask_again(self, pattern: _Pattern, wanted: Mapping[str, str]) -> Answer:
        url = pattern.folder_url + _place(wanted)
        headers = {**pattern.headers, "Range": wanted["Range"]}
        if "IfMatch" in wanted:
            headers["If-Match"] = wanted["IfMatch"]
        request = AWSRequest(method="GET", url=url, headers=headers, stream_output=True)
        if pattern.region:
            S3SigV4Auth(self._connection.credentials(), "s3", pattern.region).add_auth(request)
        reply = self._connection.ask(url, dict(request.headers.items()))
        if reply is not None and reply.status in {200, 206}:
            return Answer(_fields(reply.headers), reply)
        if reply is not None:
            status, answered, body = reply.status, reply.headers, reply.refusal()
        else:
            answer = self._connection.send(request.prepare())
            if answer.status_code in {200, 206}:
                return Answer(_fields(answer.headers), answer.raw)
            status, answered, body = answer.status_code, answer.headers, answer.content
        if status < 500:
            self._pattern = None
        parsed = create_parser("rest-xml").parse(
            {"status_code": status, "headers": answered, "body": body},
            self._connection.client.meta.service_model.operation_model("GetObject").output_shape,
        )
        raise botocore.exceptions.ClientError(parsed, "GetObject")


def _place(request: Mapping[str, str]) -> str:
    """The end of an object's URL."""
    place = quote(request["Key"], safe="/-._~")
    return f"{place}?versionId={quote(request['VersionId'], safe='-._~')}" if "VersionId" in request else place


def _learn(sent: AWSPreparedRequest | None, place: str) -> _Pattern | None:
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


def _fields(headers: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, header in _HEADERS.items():
        if header in headers:
            found[name] = headers[header]
    if "ETag" not in found and "last-modified" in headers:
        found["LastModified"] = parsedate_to_datetime(headers["last-modified"])
    return found


_HEADERS = {
    "ETag": "etag",
    "VersionId": "x-amz-version-id",
    "ContentRange": "content-range",
    "ContentLength": "content-length",
}
