"""The URI and the options of an S3 origin, parsed once."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from cached.errors import InvalidRequestError
from cached.origins.base import OriginSpec
from cached.origins.net.options import check_known, refuse, seconds, truth

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}|arn:[A-Za-z0-9:/_-]{1,1000}")


@dataclass(frozen=True, slots=True)
class S3Options:
    """The options by name; empty text means that the AWS environment and configuration files decide."""

    endpoint_url: str = ""
    region: str = ""
    profile: str = ""
    anonymous: bool = False
    addressing: str = "auto"
    """``path``, ``virtual`` or ``auto``: the bucket in the path for every endpoint but AWS's own."""
    ca_bundle: str = ""
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 20.0
    max_connections: int = 0
    """Kept open between requests, by each process; 0: all."""


@dataclass(frozen=True, slots=True)
class S3Location:
    """Bucket and key (or prefix) of a URI. A URI that ends with ``/`` can only name a prefix."""

    bucket: str
    key: str
    only_prefix: bool

    @property
    def base(self) -> str:
        """What keys of objects below the URI begin with."""
        return f"{self.key}/" if self.key else ""

    @property
    def last_part(self) -> str:
        """The object's path, if the URI names one object."""
        return self.key.rpartition("/")[2]


def parse_location(uri: str) -> S3Location:
    """Bucket and key of ``s3://bucket/key``, not percent-decoded. Raises InvalidRequestError."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme.lower() != "s3" or not _BUCKET.fullmatch(bucket):
        raise InvalidRequestError(
            f"{_without_user(uri)!r} does not name an S3 bucket",
            hint="write s3://BUCKET/PREFIX; credentials come from the usual AWS places, never from the URI",
            value=_without_user(uri),
        )
    return S3Location(bucket=bucket, key=key.rstrip("/"), only_prefix=not key or key.endswith("/"))


def parse_options(spec: OriginSpec) -> S3Options:
    """Options of the right types. Raises InvalidRequestError naming the option and what would be right."""
    given = spec.options
    check_known("s3", given, {item.name for item in fields(S3Options)})
    addressing = given.get("addressing") or "auto"
    if addressing not in {"auto", "path", "virtual"}:
        refuse("addressing", f"addressing cannot be {addressing!r}", "write auto, path or virtual")
    endpoint_url = given.get("endpoint_url", "")
    if endpoint_url and not re.fullmatch(r"https?://[^/@\s]+(/[^@\s]*)?", endpoint_url):
        refuse("endpoint_url", "endpoint_url is not a URL", "write http(s)://HOST:PORT, without user and password")
    return S3Options(
        endpoint_url=endpoint_url,
        region=given.get("region", ""),
        profile=given.get("profile", ""),
        anonymous=truth("anonymous", given.get("anonymous") or "false"),
        addressing=addressing,
        ca_bundle=given.get("ca_bundle", ""),
        connect_timeout_s=seconds("connect_timeout_s", given.get("connect_timeout_s") or "5"),
        read_timeout_s=seconds("read_timeout_s", given.get("read_timeout_s") or "20"),
        max_connections=_count("max_connections", given.get("max_connections") or "0"),
    )


def _count(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text):
        refuse(name, f"{name} cannot be {text!r}", "write a whole number; 0 is no bound")
    return int(text)


def _without_user(uri: str) -> str:
    return re.sub(r"://[^/]*@", "://", uri)[:200]
