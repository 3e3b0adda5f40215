"""Later requests, which follow the pattern of the first of botocore's: as right as that, for a tenth of its work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import botocore.awsrequest
import botocore.exceptions
import pytest
from botocore.auth import S3SigV4Auth
from botocore.credentials import ReadOnlyCredentials

from cached.errors import NotFoundError, OriginDeniedError, OriginUnavailableError
from cached.origins.base import Origin, OriginSpec
from cached.origins.net.body import Body
from cached.origins.registry import open_origin
from cached.origins.s3.objects import Objects
from cached.origins.s3.options import S3Options
from cached.origins.s3.shared import CONNECTIONS, SharedConnection
from tests.conformance.buckets import new_bucket
from tests.servers import ACCESS_KEY, CountingProxy, MotoS3, RcloneS3, S3Server

DATA = bytes(range(256)) * 4000


def shared_of(server: S3Server) -> SharedConnection:
    return CONNECTIONS.take(S3Options(endpoint_url=server.endpoint_url, region="eu-central-1"))


def range_of(found: Objects, bucket: str, key: str, first: int, length: int) -> bytes:
    answer = found.get({"Bucket": bucket, "Key": key, "Range": f"bytes={first}-{first + length - 1}"})
    body, content = Body(), bytearray(length)
    body.begin(answer.raw)
    assert body.read_into(memoryview(content)) == length
    body.finish()
    body.end()
    return bytes(content)


@contextmanager
def proxied(server: S3Server, bucket: str) -> Iterator[tuple[Origin, CountingProxy]]:
    with CountingProxy(server.endpoint_url) as proxy:
        origin = open_origin(OriginSpec(f"s3://{bucket}/m", {"endpoint_url": proxy.endpoint_url}))
        yield origin, proxy
        origin.close()


@pytest.fixture
def signatures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URLs that were signed."""
    found: list[str] = []
    sign = S3SigV4Auth.add_auth

    def noted(self: Any, request: botocore.awsrequest.AWSRequest) -> None:
        found.append(request.url)
        sign(self, request)

    monkeypatch.setattr(S3SigV4Auth, "add_auth", noted)
    return found


# --- descriptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [None, "CRC64NVME", "CRC32C", "SHA256"])
def test_a_later_description_says_what_the_first_did(moto: MotoS3, algorithm: str | None) -> None:
    bucket = new_bucket(moto)
    moto.client().put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    moto.put(bucket, "m/\u00fcber w+1", DATA, **({"ChecksumAlgorithm": algorithm} if algorithm else {}))
    with proxied(moto, bucket) as (origin, proxy):
        found = [origin.stat("\u00fcber w+1") for _ in range(3)]
        assert found[1:] == found[:2]
        assert found[0].size_bytes == len(DATA)
        assert found[0].version
        assert len(found[0].checksums) == (algorithm is not None)
        assert (len(proxy.requests("HEAD")), proxy.connections) == (3, 1)


def test_only_the_first_description_is_asked_for_by_botocore(server: S3Server) -> None:
    bucket = new_bucket(server)
    server.put(bucket, "m/w", DATA)
    shared = shared_of(server)
    found, wanted = shared.objects(bucket), {"Bucket": bucket, "Key": "m/w"}
    first = found.head(wanted)
    with patch.object(shared.connection.client, "head_object", side_effect=AssertionError):
        assert found.head(wanted)["ETag"] == first["ETag"]
    CONNECTIONS.give_back(shared)


def test_what_is_not_there_is_not_there_later_either(server: S3Server) -> None:
    bucket = new_bucket(server)
    server.put(bucket, "m/w", DATA)
    with proxied(server, bucket) as (origin, proxy):
        for _ in range(3):
            assert origin.stat("w").size_bytes == len(DATA)
            with pytest.raises(NotFoundError, match="gone of s3://"):
                origin.stat("gone")
        assert proxy.connections == 1


@pytest.mark.parametrize(("status", "expected"), [(403, OriginDeniedError), (503, OriginUnavailableError)])
def test_a_refused_description_is_the_right_error_once(
    server: S3Server, status: int, expected: type[Exception]
) -> None:
    bucket = new_bucket(server)
    server.put(bucket, "m/w", DATA)
    with proxied(server, bucket) as (origin, proxy):
        first = origin.stat("w")
        fault = proxy.inject("status", method="HEAD", status=status)
        with pytest.raises(expected, match="w of s3://"):
            origin.stat("w")
        assert fault.hits == 1
        assert origin.stat("w") == first


def test_a_connection_that_the_server_closed_is_replaced(server: S3Server) -> None:
    bucket = new_bucket(server)
    server.put(bucket, "m/w", DATA)
    with proxied(server, bucket) as (origin, proxy):
        first = origin.stat("w")
        proxy.inject("reset", method="HEAD")
        with pytest.raises(OriginUnavailableError, match="could not be reached"):
            origin.stat("w")
        assert origin.stat("w") == first
        assert proxy.connections == 2


# --- signatures -------------------------------------------------------------------------------------------------------


def test_one_signature_serves_all_ranges_of_an_object_for_a_minute(
    server: S3Server, signatures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = new_bucket(server)
    for name in ("a", "b"):
        server.put(bucket, f"m/{name}", DATA)
    shared = shared_of(server)
    found = shared.objects(bucket)
    assert found.head({"Bucket": bucket, "Key": "m/a"})["ContentLength"] == len(DATA)
    signatures.clear()
    for first in range(0, 100_000, 10_000):
        for name in ("a", "b"):
            assert range_of(found, bucket, f"m/{name}", first, 5000) == DATA[first : first + 5000]
    assert len(signatures) == 2
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s + 61)
    assert range_of(found, bucket, "m/a", 7, 5000) == DATA[7:5007]
    assert len(signatures) == 3
    CONNECTIONS.give_back(shared)


def test_other_credentials_sign_anew(rclone: RcloneS3, signatures: list[str]) -> None:
    """As when those of a role were renewed."""
    bucket = new_bucket(rclone)
    rclone.put(bucket, "m/w", DATA)
    shared = shared_of(rclone)
    found = shared.objects(bucket)
    found.head({"Bucket": bucket, "Key": "m/w"})
    assert range_of(found, bucket, "m/w", 0, 10) == DATA[:10]
    signatures.clear()
    renewed = ReadOnlyCredentials(ACCESS_KEY, "another", None)
    with (
        patch.object(shared.connection, "credentials", lambda: renewed),
        pytest.raises(botocore.exceptions.ClientError, match="SignatureDoesNotMatch"),
    ):
        range_of(found, bucket, "m/w", 0, 10)
    assert len(signatures) == 1
    CONNECTIONS.give_back(shared)
