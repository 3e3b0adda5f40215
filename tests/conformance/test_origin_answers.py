"""Answers that no server ought to give: each is a typed error that says so, and never a model with less in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cached.errors import OriginProtocolError
from cached.origins.base import OriginSpec
from cached.origins.registry import open_origin
from tests.http_servers import HttpServer

_CONTENT = b"x" * 100
_ENTRY = (
    b"<Contents><Key>m/w</Key><Size>100</Size><ETag>&quot;e&quot;</ETag>"
    b"<LastModified>2020-01-01T00:00:00Z</LastModified></Contents>"
)


class Odd(HttpServer):
    """Answers what ``said`` holds for the method, each time; of S3 listings, ``listing``."""

    def __init__(self) -> None:
        self.said: dict[str, tuple[int, bytes, dict[str, str]]] = {}
        self.listing: tuple[int, bytes] = (200, s3_listing(_ENTRY))
        super().__init__()

    def handle(self, request: Any) -> None:
        if "list-type=2" in request.path:
            request.answer(*self.listing, Content_Type="application/xml")
            return
        status, body, headers = self.said.get(request.command, (200, _CONTENT, {"ETag": '"e"'}))
        request.answer(status, body, **headers)


def s3_listing(entries: bytes, more: bytes = b"<KeyCount>1</KeyCount><IsTruncated>false</IsTruncated>") -> bytes:
    return b'<?xml version="1.0"?><ListBucketResult>' + more + entries + b"</ListBucketResult>"


@pytest.fixture
def odd() -> Iterator[Odd]:
    with Odd() as server:
        yield server


def s3_origin(odd: Odd) -> Any:
    return open_origin(OriginSpec("s3://bucket/m", {"endpoint_url": odd.url, "anonymous": "true"}))


@pytest.mark.parametrize(
    "listing",
    [
        (200, s3_listing(_ENTRY, b"<IsTruncated>true</IsTruncated>")),
        (200, s3_listing(_ENTRY, b"<IsTruncated>true</IsTruncated><NextMarker>m/w</NextMarker>")),
        (200, b"<html>login</html>"),
        (200, s3_listing(_ENTRY, b"")),
        (204, b""),
    ],
)
def test_a_listing_that_is_none_or_goes_on_nowhere_is_no_model(odd, listing):
    assert [item.path for item in s3_origin(odd).list_objects()] == ["w"]
    odd.listing = listing
    with pytest.raises(OriginProtocolError, match="list") as error:
        s3_origin(odd).list_objects()
    assert "ListObjectsV2" in error.value.hint
