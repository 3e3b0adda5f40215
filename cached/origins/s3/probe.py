"""What a bucket answers to each kind of request that a pull makes of it, for those who look for what is wrong."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from botocore.exceptions import ClientError

from cached.errors import CachedError, NotFoundError
from cached.origins.base import OriginSpec
from cached.origins.s3.client import Connection
from cached.origins.s3.failures import RAISED, Failures
from cached.origins.s3.options import S3Location, parse_location, parse_options
from cached.origins.s3.versions import checksum_names, is_composite

_KEYS = 50
_OTHER_ETAG = '"00000000000000000000000000000000"'


@dataclass(slots=True)
class S3Facts:
    """What was found, as far as it got. ``failed``: the request that did not work; ``code``: S3's word for why.

    ``credentials``: where they come from, never what they are. ``skew_s``: this clock's time less the server's.
    ``checksums``: of the sample, by which a first pull could be checked. ``honours_if_match``: None: not asked.
    """

    endpoint_url: str = ""
    ca_file: str = ""
    addressing: str = ""
    region: str = ""
    bucket_region: str = ""
    credentials: str = ""
    temporary: bool = False
    ends_s: float | None = None
    skew_s: float | None = None
    sample: str = ""
    checksums: tuple[str, ...] = ()
    honours_if_match: bool | None = None
    times_ms: dict[str, float] = field(default_factory=dict)
    failed: str = ""
    code: str = ""
    error: CachedError | None = None


def facts_of(spec: OriginSpec) -> S3Facts:
    """Of the client alone; connects to nothing. Raises InvalidRequestError."""
    connection = Connection(parse_options(spec))
    try:
        return _facts(connection, parse_location(spec.uri))
    finally:
        connection.client.close()


def probe(spec: OriginSpec) -> S3Facts:
    """Lists, describes and reads one byte, each once. What goes wrong is in the facts. Raises InvalidRequestError."""
    location = parse_location(spec.uri)
    connection = Connection(parse_options(spec))
    facts = _facts(connection, location)
    try:
        _Probe(connection, location, facts).run()
    finally:
        connection.client.close()
    return facts


def _facts(connection: Connection, location: S3Location) -> S3Facts:
    client = connection.client
    style = (client.meta.config.s3 or {}).get("addressing_style", "auto")
    temporary, ends_s = connection.credential_facts()
    virtual = style == "virtual" or (style == "auto" and "." not in location.bucket)
    return S3Facts(
        endpoint_url=connection.endpoint_url,
        ca_file=connection.ca_file(),
        addressing="virtual" if virtual else "path",
        region=str(client.meta.region_name or ""),
        credentials=connection.credential_source(),
        temporary=temporary,
        ends_s=ends_s,
    )


class _Probe:
    def __init__(self, connection: Connection, location: S3Location, facts: S3Facts) -> None:
        self._client = connection.client
        self._location = location
        self._facts = facts
        self._failures = Failures(location, connection)
        self._client.meta.events.register("after-call.s3", self._notice)

    def run(self) -> None:
        listing = self._ask("list", self._client.list_objects_v2, Prefix=self._location.base, MaxKeys=_KEYS)
        if listing is None:
            return
        key = self._sample(listing)
        if not key:
            uri = f"s3://{self._location.bucket}/{self._location.base}"
            self._facts.failed, self._facts.code = "list", "empty"
            self._facts.error = NotFoundError(
                f"there are no objects below {uri}", hint="look at the bucket and the prefix", uri=uri, path=""
            )
            return
        described = self._ask("describe", self._client.head_object, Key=key, ChecksumMode="ENABLED")
        if described is None:
            return
        self._facts.sample = key.removeprefix(self._location.base)
        self._facts.checksums = tuple(
            name.removeprefix("Checksum").lower() + (" (composite)" if is_composite(described, name) else "")
            for name in checksum_names(described)
        )
        if int(described.get("ContentLength", 0)):
            self._read(key, str(described.get("ETag", "")))

    def _sample(self, listing: dict[str, Any]) -> str:
        """The largest of the first objects: small ones are not what a checksum is wanted for."""
        found = [item for item in listing.get("Contents", ()) if not item["Key"].endswith("/")]
        if found:
            return str(max(found, key=lambda item: item.get("Size", 0))["Key"])
        return "" if self._location.only_prefix else self._location.key

    def _read(self, key: str, etag: str) -> None:
        condition = {"IfMatch": etag} if etag else {}
        answer = self._ask("read", self._client.get_object, Key=key, Range="bytes=0-0", **condition)
        if answer is None:
            return
        answer["Body"].close()
        try:
            other = self._client.get_object(
                Bucket=self._location.bucket, Key=key, Range="bytes=0-0", IfMatch=_OTHER_ETAG
            )
        except ClientError as error:
            self._facts.honours_if_match = _status(error.response) == 412
        except RAISED:
            return
        else:
            other["Body"].close()
            self._facts.honours_if_match = False

    def _ask(self, what: str, method: Any, **request: Any) -> dict[str, Any] | None:
        began_s = time.perf_counter()
        try:
            answer: dict[str, Any] = method(Bucket=self._location.bucket, **request)
        except RAISED as error:
            self._facts.failed = what
            self._facts.code = self._code(error)
            self._facts.error = self._failures.translate(error, "")
            return None
        self._facts.times_ms[what] = 1000 * (time.perf_counter() - began_s)
        return answer

    @staticmethod
    def _code(error: BaseException) -> str:
        if isinstance(error, ClientError):
            return str(error.response.get("Error", {}).get("Code", "")) or str(_status(error.response))
        return type(error).__name__

    def _notice(self, http_response: Any, **_other: Any) -> None:
        """Of every answer, also one that says no."""
        headers = http_response.headers
        self._facts.bucket_region = headers.get("x-amz-bucket-region", "") or self._facts.bucket_region
        try:
            self._facts.skew_s = time.time() - parsedate_to_datetime(headers["date"]).timestamp()
        except (KeyError, TypeError, ValueError):
            return


def _status(response: dict[str, Any]) -> int:
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
