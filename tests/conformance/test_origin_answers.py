"""Answers that no server ought to give: each is a typed error that says so, and never a model with less in it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest

from cached.errors import InvalidRequestError, OriginError, OriginProtocolError
from cached.origins.base import OriginChecksum, OriginSpec
from cached.origins.registry import open_origin
from tests.conformance.reading import read_range
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


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (_ENTRY.replace(b"<Key>m/w</Key>", b""), "without a key"),
        (_ENTRY.replace(b"100", b"many"), "cannot be read"),
        (_ENTRY.replace(b"2020-01-01T00:00:00Z", b"yesterday"), "cannot be read"),
    ],
)
def test_an_s3_listing_that_cannot_be_read_says_so(odd, entries, says):
    odd.listing = (200, s3_listing(entries))
    with pytest.raises(OriginProtocolError, match=says) as error:
        s3_origin(odd).list_objects()
    assert error.value.hint


def test_an_s3_object_of_an_unreadable_date_says_so_each_time(odd):
    dated = {"Last-Modified": "Wed, 01 Jan 2020 00:00:00 GMT"}
    odd.said = {"HEAD": (200, _CONTENT, dated), "GET": (200, _CONTENT, dated)}
    origin = s3_origin(odd)
    item = origin.stat("w")
    for date in ("yesterday", "Wed, 01 Jan 99999999999999999999 00:00:00 GMT"):
        odd.said = {method: (200, _CONTENT, {"Last-Modified": date}) for method in ("HEAD", "GET")}
        for fresh in (origin, s3_origin(odd)):
            with pytest.raises(OriginProtocolError, match="cannot be read"):
                fresh.stat("w")
            with pytest.raises(OriginProtocolError, match="cannot be read"):
                read_range(fresh, item, 0, memoryview(bytearray(100)))


@pytest.mark.parametrize("target", ["http://[bad/", "http://h:99999/", "http://h:abc/"])
def test_a_link_that_is_no_url_is_said_so(odd, target):
    odd.said["HEAD"] = (302, b"", {"Location": target})
    with pytest.raises(OriginProtocolError, match="no URL"):
        open_origin(OriginSpec(f"{odd.url}/w")).list_objects()
    tree = b'[{"type": "file", "path": "x", "oid": "' + b"a" * 40 + b'", "size": 3}]'
    odd.said["GET"] = (200, tree, {"Link": f'<{target}>; rel="next"'})
    with pytest.raises(OriginError, match="no URL"):
        open_origin(OriginSpec(f"hf://org/repo@{'a' * 40}", {"endpoint": odd.url})).list_objects()


@pytest.mark.parametrize("length", ["abc", "-1", "1" * 5000])
def test_a_length_that_is_none_is_a_wrong_range(odd, length):
    item = open_origin(OriginSpec(f"{odd.url}/w")).stat("w")
    odd.said["GET"] = (206, b"x" * 10, {"ETag": '"e"', "Content-Range": "bytes 0-9/100", "Content_Length": length})
    with pytest.raises(OriginProtocolError, match="announces"):
        read_range(open_origin(OriginSpec(f"{odd.url}/w")), item, 0, memoryview(bytearray(10)))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'[{"type": "file", "path": "x", "oid": "' + b"a" * 40 + b'", "size": 3, "lfs": ["z"]}]', "not what a hub"),
        (b"[" * 200_000, "not JSON"),
    ],
)
def test_what_no_hub_tells_is_said_so(odd, body, says):
    odd.said["GET"] = (200, body, {})
    with pytest.raises(OriginError, match=says):
        open_origin(OriginSpec(f"hf://org/repo@{'a' * 40}", {"endpoint": odd.url})).list_objects()


@pytest.mark.parametrize("uri", ["https://host/x", "hf://org/repo"])
def test_a_ca_bundle_that_is_none_is_refused_at_once(tmp_path, uri):
    (tmp_path / "ca.pem").write_text("no certificate\n")
    with pytest.raises(InvalidRequestError, match="CA bundle") as error:
        open_origin(OriginSpec(uri, {"ca_bundle": str(tmp_path / "ca.pem")}))
    assert "PEM" in error.value.hint


def test_an_s3_object_of_no_version_needs_a_checksum(odd):
    odd.said["HEAD"] = (200, _CONTENT, {})
    with pytest.raises(OriginError, match="neither ETag nor Last-Modified") as error:
        s3_origin(odd).stat("w")
    assert error.value.fields["cause"] == "no version"
    crc32 = base64.b64encode(bytes(4)).decode()
    odd.said["HEAD"] = (200, _CONTENT, {"x-amz-checksum-crc32": crc32, "x-amz-checksum-type": "FULL_OBJECT"})
    assert s3_origin(odd).stat("w").checksums == (OriginChecksum("crc32", "00000000"),)


@pytest.mark.parametrize("scheme", ["http", "s3"])
@pytest.mark.parametrize(
    ("said", "right"),
    [
        ((200, _CONTENT, {"Content_Length": ""}), True),
        ((200, _CONTENT + b"x", {"Content_Length": ""}), False),
        ((200, b"64\r\n" + _CONTENT + b"\r\n0\r\n\r\n", {"Content_Length": "", "Transfer_Encoding": "chunked"}), True),
        (
            (200, b"65\r\n" + _CONTENT + b"x\r\n0\r\n\r\n", {"Content_Length": "", "Transfer_Encoding": "chunked"}),
            False,
        ),
    ],
)
def test_a_body_of_no_length_that_is_longer_is_wrong(odd, scheme, said, right):
    origin = s3_origin(odd) if scheme == "s3" else open_origin(OriginSpec(f"{odd.url}/m/w"))
    item = origin.stat("w")
    for before in (False, True):  # on a connection that is open already, and on one that is not
        if before:
            odd.said["GET"] = (200, _CONTENT, {"ETag": '"e"'})
            read_range(origin, item, 0, memoryview(bytearray(100)))
        status, body, headers = said
        odd.said["GET"] = (status, body, {"ETag": '"e"', **headers})
        if right:
            read_range(origin, item, 0, memoryview(bytearray(100)))
            continue
        with pytest.raises(OriginProtocolError, match="more bytes than were asked for"):
            read_range(origin, item, 0, memoryview(bytearray(100)))


def test_another_folder_is_not_read_for_one_of_a_name_with_a_fragment(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "w").write_bytes(b"1")
    for end in ("#v2", "?v2"):
        with pytest.raises(InvalidRequestError) as error:
            open_origin(OriginSpec(f"file://{tmp_path}/m{end}"))
        assert "%23" in error.value.hint
    (tmp_path / "m#v2").mkdir()
    (tmp_path / "m#v2" / "x").write_bytes(b"1")
    assert [item.path for item in open_origin(OriginSpec(f"file://{tmp_path}/m%23v2")).list_objects()] == ["x"]
