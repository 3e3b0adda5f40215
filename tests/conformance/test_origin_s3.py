"""What an S3 origin must make of servers that break, lie, refuse, or know more than others."""

from __future__ import annotations

import datetime as dt
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cached import checksum
from cached.errors import (
    CachedError,
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
    ObjectChangedError,
    OriginDeniedError,
    OriginError,
    OriginProtocolError,
    OriginUnavailableError,
)
from cached.origins.base import OriginChecksum, OriginObject, OriginSpec
from cached.origins.net.body import range_problem
from cached.origins.registry import open_origin, open_writable
from cached.origins.s3 import S3Origin
from cached.origins.s3.versions import marker, request_condition, same_version
from tests.conformance.buckets import new_bucket
from tests.conformance.reading import read_range
from tests.fault_proxy import FaultKind
from tests.servers import ACCESS_KEY, SECRET_KEY, CountingProxy, RcloneS3, s3_env

DATA = bytes(range(256)) * 4000


def read(origin: Any, item: Any, offset_bytes: int, length_bytes: int) -> bytes:
    buffer = bytearray(length_bytes)
    read_range(origin, item, offset_bytes, memoryview(buffer))
    return bytes(buffer)


def assert_discreet(error: CachedError) -> None:
    """Nobody's secret is in it, it says what to do, and it survives the pipe."""
    chained = [str(item) for item in (error.__cause__, error) if item is not None]
    text = " ".join([*chained, str(error.to_dict())])
    assert SECRET_KEY not in text
    assert ACCESS_KEY not in text
    assert error.hint
    assert type(CachedError.from_dict(error.to_dict())) is type(error)


# --- faults on the way ------------------------------------------------------------------------------------------------

FAULTS: list[tuple[FaultKind, dict[str, Any], type[CachedError]]] = [
    ("truncate", {"after_bytes": 5000}, OriginProtocolError),
    ("short_length", {"after_bytes": 5000}, OriginProtocolError),
    ("wrong_range", {}, OriginProtocolError),
    ("whole", {}, OriginProtocolError),
    ("status", {"status": 503}, OriginUnavailableError),
    ("status", {"status": 500}, OriginUnavailableError),
    ("status", {"status": 429}, OriginUnavailableError),
    ("status", {"status": 403}, OriginDeniedError),
    ("reset", {}, OriginUnavailableError),
    ("reset", {"after_bytes": 5000}, OriginUnavailableError),
    ("etag", {}, ObjectChangedError),
]


@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
@pytest.mark.parametrize(("kind", "settings", "expected"), FAULTS, ids=lambda value: str(value)[:40])
def test_a_fault_is_the_right_error_once_and_then_forgotten(server, kind, settings, expected, later):
    """In the first request, which is botocore's, and in later ones, which go out on the open connection."""
    bucket = new_bucket(server)
    server.put(bucket, "m/w", DATA)
    server.put(bucket, "m/before", DATA)
    with CountingProxy(server.endpoint_url) as proxy:
        origin = open_origin(OriginSpec(f"s3://{bucket}/m", {"endpoint_url": proxy.endpoint_url}))
        item = open_origin(server.spec(f"s3://{bucket}/m")).stat("w")
        if later:
            assert read(origin, origin.stat("before"), 0, 1000) == DATA[:1000]
        fault = proxy.inject(kind, ranged=True, **settings)
        with pytest.raises(expected) as error:
            read(origin, item, 1000, 20_000)
        assert type(error.value) is expected
        assert_discreet(error.value)
        assert "w of s3://" in str(error.value)
        assert fault.hits == 1, "the origin does not retry: that is the planner's"
        assert read(origin, item, 1000, 20_000) == DATA[1000:21_000]
        assert len(proxy.gets("m/w")) == 2
        origin.close()


@pytest.mark.parametrize("status", [400, 403, 503])
def test_secrets_that_a_server_echoes_are_not_repeated(rclone, status):
    bucket = new_bucket(rclone)
    with CountingProxy(rclone.endpoint_url) as proxy:
        origin = open_origin(OriginSpec(f"s3://{bucket}/m", {"endpoint_url": proxy.endpoint_url}))
        proxy.inject("status", status=status, message=f"key {ACCESS_KEY} with {SECRET_KEY} is wrong")
        with pytest.raises(OriginError, match=r"key \*\*\* with \*\*\* is wrong") as error:
            origin.list_objects()
        assert_discreet(error.value)
        origin.close()


def test_a_whole_object_is_right_where_the_range_is_all_of_it(server):
    bucket = new_bucket(server)
    server.put(bucket, "m/w", DATA)
    with CountingProxy(server.endpoint_url) as proxy:
        origin = open_origin(OriginSpec(f"s3://{bucket}/m", {"endpoint_url": proxy.endpoint_url}))
        fault = proxy.inject("whole", ranged=True)
        assert read(origin, origin.stat("w"), 0, len(DATA)) == DATA
        assert fault.hits == 1
        origin.close()


def test_connections_are_used_again(server):
    bucket = new_bucket(server)
    server.put(bucket, "m/w", DATA)
    with CountingProxy(server.endpoint_url) as proxy:
        origin = open_origin(OriginSpec(f"s3://{bucket}/m", {"endpoint_url": proxy.endpoint_url}))
        item = origin.stat("w")
        for number in range(10):
            assert read(origin, item, number * 1000, 1000) == DATA[number * 1000 :][:1000]
        assert proxy.connections == 1
        origin.close()


def test_a_silent_server_times_out(rclone):
    bucket = new_bucket(rclone)
    rclone.put(bucket, "m/w", DATA)
    with CountingProxy(rclone.endpoint_url) as proxy:
        options = {"endpoint_url": proxy.endpoint_url, "read_timeout_s": "0.3"}
        origin = open_origin(OriginSpec(f"s3://{bucket}/m", options))
        item = origin.stat("w")
        proxy.inject("hold", after_bytes=100)
        with pytest.raises(OriginUnavailableError):
            read(origin, item, 0, 5000)
        proxy.heal()
        origin.close()


def test_an_unreachable_endpoint_is_unavailable():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        spec = OriginSpec(
            "s3://bucket/m",
            {"endpoint_url": f"http://127.0.0.1:{taken.getsockname()[1]}", "anonymous": "true"},
        )
        with pytest.raises(OriginUnavailableError) as error:
            open_origin(spec).list_objects()
        assert_discreet(error.value)


# --- who may ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["list", "stat", "read"])
def test_wrong_credentials_are_denied(rclone, monkeypatch, operation):
    bucket = new_bucket(rclone)
    rclone.put(bucket, "m/w", DATA)
    item = open_origin(rclone.spec(f"s3://{bucket}/m")).stat("w")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-at-all")
    origin = open_origin(rclone.spec(f"s3://{bucket}/m"))
    calls = {
        "list": origin.list_objects,
        "stat": lambda: origin.stat("w"),
        "read": lambda: read(origin, item, 0, 10),
    }
    with pytest.raises(OriginDeniedError) as error:
        calls[operation]()
    assert_discreet(error.value)
    assert "not-the-secret" not in str(error.value.to_dict())
    assert rclone.endpoint_url in str(error.value)
    assert bucket in str(error.value)
    assert "AWS_ACCESS_KEY_ID" in error.value.hint, "says where the credentials came from"


def test_no_credentials_are_denied_with_advice(rclone, monkeypatch):
    bucket = new_bucket(rclone)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(OriginDeniedError, match="no usable credentials") as error:
        open_origin(rclone.spec(f"s3://{bucket}/m")).list_objects()
    assert "none found" in error.value.hint
    assert "anonymous" in error.value.hint


def test_anonymous_signs_nothing(moto, rclone_s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    bucket = new_bucket(moto)
    moto.put(bucket, "m/w", b"public", ACL="public-read")
    origin = open_origin(moto.spec(f"s3://{bucket}/m", anonymous="true"))
    assert origin.stat("w").size_bytes == 6
    with pytest.raises(OriginDeniedError) as error:
        open_origin(rclone_s3.spec(f"s3://{bucket}/m", anonymous="true")).list_objects()
    assert "anonymous" in error.value.hint


def test_a_profile_is_used_and_a_wrong_one_named(rclone, monkeypatch, tmp_path):
    bucket = new_bucket(rclone)
    rclone.put(bucket, "m/w", DATA)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    config = tmp_path / "config"
    config.write_text(
        f"[profile weights]\nregion = eu-central-1\naws_access_key_id = {ACCESS_KEY}\n"
        f"aws_secret_access_key = {SECRET_KEY}\nendpoint_url = {rclone.endpoint_url}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    origin = open_origin(OriginSpec(f"s3://{bucket}/m", {"profile": "weights", "addressing": "auto"}))
    assert origin.stat("w").size_bytes == len(DATA)
    with pytest.raises(InvalidRequestError, match="nope"):
        open_origin(OriginSpec(f"s3://{bucket}/m", {"profile": "nope"})).list_objects()


def test_a_bucket_that_is_not_there(server):
    with pytest.raises(NotFoundError, match="no bucket 'not-there-at-all'") as error:
        open_origin(server.spec("s3://not-there-at-all/m")).list_objects()
    assert_discreet(error.value)


def test_tls_needs_the_right_authority(tmp_path):
    with RcloneS3(tmp_path / "buckets", tls=True, tls_folder=tmp_path / "tls") as server, s3_env(server):
        server.create_bucket("safe")
        server.put("safe", "m/w", DATA)
        origin = open_origin(server.spec("s3://safe/m"))
        assert read(origin, origin.stat("w"), 10, 1000) == DATA[10:1010]
        with pytest.raises(OriginError, match="certificate") as error:
            open_origin(OriginSpec("s3://safe/m", {"endpoint_url": server.endpoint_url})).list_objects()
        assert not error.value.retryable
        assert "ca_bundle" in error.value.hint
        with pytest.raises(InvalidRequestError, match="CA bundle"):
            open_origin(server.spec("s3://safe/m", ca_bundle="/not/there.pem")).list_objects()
        source = tmp_path / "up"
        source.write_bytes(DATA)
        uploaded = open_writable(server.spec("s3://safe/m")).upload_file(source, "x/up")
        assert uploaded.size_bytes == len(DATA)
        origin.close()


# --- versions and checksums -------------------------------------------------------------------------------------------


def test_an_old_version_stays_readable_in_a_versioned_bucket(moto):
    bucket = new_bucket(moto)
    moto.client().put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    moto.put(bucket, "m/w", DATA)
    origin = open_origin(moto.spec(f"s3://{bucket}/m"))
    item = origin.stat("w")
    moto.put(bucket, "m/w", DATA[::-1])
    assert read(origin, item, 0, 100) == DATA[:100]
    assert origin.stat("w").version != item.version
    (listed,) = origin.list_objects()
    assert read(origin, listed, 0, 100) == DATA[::-1][:100]


def test_who_may_not_name_versions_reads_the_current_one_while_it_is_that(moto):
    bucket = new_bucket(moto)
    moto.client().put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    moto.put(bucket, "m/w", DATA)
    with CountingProxy(moto.endpoint_url) as proxy:
        denied = proxy.inject("status", times=-1, query="versionId", status=403)
        origin = open_origin(OriginSpec(f"s3://{bucket}/m", {"endpoint_url": proxy.endpoint_url}))
        item = origin.stat("w")
        assert read(origin, item, 0, 100) == DATA[:100]
        assert read(origin, item, 100, 100) == DATA[100:200]
        assert denied.hits == 1, "asked once, and remembered"
        moto.put(bucket, "m/w", DATA[::-1])
        with pytest.raises(ObjectChangedError):
            read(origin, item, 0, 100)
        proxy.inject("status", times=-1, ranged=True, status=403)
        with pytest.raises(OriginDeniedError):
            read(
                open_origin(OriginSpec(f"s3://{bucket}/m", {"endpoint_url": proxy.endpoint_url})),
                origin.stat("w"),
                0,
                100,
            )


@pytest.mark.parametrize("algorithm", ["CRC64NVME", "CRC32C", "CRC32", "SHA256", "SHA1"])
def test_full_object_checksums_are_given_in_hex(moto, algorithm):
    bucket = new_bucket(moto)
    moto.put(bucket, "m/w", DATA, ChecksumAlgorithm=algorithm)
    (found,) = open_origin(moto.spec(f"s3://{bucket}/m")).stat("w").checksums
    assert found == OriginChecksum(algorithm.lower(), checksum.part_digest(algorithm.lower(), DATA))


def test_no_checksum_is_made_up(server):
    bucket = new_bucket(server)
    server.put(bucket, "m/w", DATA)
    assert open_origin(server.spec(f"s3://{bucket}/m")).stat("w").checksums == ()


def test_markers_do_not_depend_on_quotes():
    assert marker({"ETag": '"abc"'}) == marker({"ETag": "abc"}) == marker({"ETag": 'W/"abc"', "VersionId": "null"})
    versioned = marker({"ETag": '"abc"', "VersionId": "v1"})
    assert same_version(versioned, {"ETag": "abc", "VersionId": "v1"})
    assert not same_version(versioned, {"ETag": "abc", "VersionId": "v2"})
    assert same_version("abc", {"ETag": '"abc"', "VersionId": "v1"})
    assert not same_version("abc", {"ETag": '"abd"'})


def test_a_server_without_etags_is_held_to_its_dates():
    first, second = (dt.datetime(2026, 1, 1, 0, 0, second, tzinfo=dt.UTC) for second in (1, 2))
    version = marker({"ETag": '""', "LastModified": first})
    assert same_version(version, {"LastModified": first})
    assert not same_version(version, {"LastModified": second})
    assert request_condition(version) == {}


@pytest.mark.parametrize(
    ("fields", "right"),
    [
        ({"ContentRange": "bytes 10-19/100", "ContentLength": 10}, True),
        ({"ContentRange": "bytes 10-19/*", "ContentLength": 10}, True),
        ({"ContentRange": "bytes 10-19/100"}, True),
        ({"ContentRange": "bytes 10-19/99", "ContentLength": 10}, False),
        ({"ContentRange": "bytes 11-20/100", "ContentLength": 10}, False),
        ({"ContentRange": "bytes 10-18/100", "ContentLength": 9}, False),
        ({"ContentRange": "bytes 10-19/100", "ContentLength": 11}, False),
        ({"ContentRange": "rubbish", "ContentLength": 10}, False),
        ({"ContentLength": 10}, False),
        ({"ContentLength": 100}, False),
        ({}, False),
    ],
)
def test_ranges_are_judged_by_what_they_say(fields, right):
    assert (range_problem(fields, 10, 10, 100) == "") == right


# --- keys and options -------------------------------------------------------------------------------------------------


def test_folder_keys_are_skipped_and_bad_keys_named(moto):
    bucket = new_bucket(moto)
    moto.put(bucket, "m/", b"")
    moto.put(bucket, "m/sub/", b"")
    moto.put(bucket, "m/ok", b"1")
    origin = open_origin(moto.spec(f"s3://{bucket}/m"))
    assert [item.path for item in origin.list_objects()] == ["ok"]
    moto.client().put_object(Bucket=bucket, Key="m/back\\slash", Body=b"1")
    with pytest.raises(InvalidRequestError, match="back") as error:
        origin.list_objects()
    assert "rename or remove" in error.value.hint


def test_dots_in_keys_are_refused(moto, monkeypatch):
    bucket = new_bucket(moto)
    origin = open_origin(moto.spec(f"s3://{bucket}/m"))
    evil = [{"Key": "m/../../etc/passwd", "Size": 1, "ETag": "x"}]
    monkeypatch.setattr(origin, "_list", lambda *_args: evil)  # no client can store such a key past HTTP's own clean-up
    with pytest.raises(InvalidRequestError, match="etc/passwd"):
        origin.list_objects()


def test_long_listings_are_read_to_the_end(rclone):
    bucket = new_bucket(rclone)
    rclone.seed_many(bucket, {f"many/{number:05}": b"1" for number in range(1203)})
    found = open_origin(rclone.spec(f"s3://{bucket}/many")).list_objects()
    assert [item.path for item in found] == [f"{number:05}" for number in range(1203)]


def test_large_uploads_go_in_parts_with_a_checksum(server, tmp_path: Path):
    bucket = new_bucket(server)
    data = os.urandom(33 << 20) + b"end"
    source = tmp_path / "large"
    source.write_bytes(data)
    with CountingProxy(server.endpoint_url) as proxy:
        origin = open_writable(OriginSpec(f"s3://{bucket}/m", {"endpoint_url": proxy.endpoint_url}))
        stored = origin.upload_file(source, "large")
        assert len(proxy.requests("PUT")) == 3
        origin.close()
    assert stored.size_bytes == len(data)
    assert server.get(bucket, "m/large") == data
    if server.name == "moto":
        assert stored.checksums == (OriginChecksum("crc64nvme", checksum.crc64_hex(checksum.crc64nvme(data))),)


@pytest.fixture
def uploading(rclone: RcloneS3, tmp_path: Path) -> Iterator[tuple[CountingProxy, Callable[[], OriginObject], str]]:
    """What is before the server, how to upload DATA as ``w`` through it, and the bucket."""
    bucket = new_bucket(rclone)
    (tmp_path / "w").write_bytes(DATA)
    with CountingProxy(rclone.endpoint_url) as proxy:
        origin = open_writable(OriginSpec(f"s3://{bucket}/m", {"endpoint_url": proxy.endpoint_url}))
        yield proxy, lambda: origin.upload_file(tmp_path / "w", "w"), bucket
        origin.close()


def test_an_upload_survives_a_busy_server_and_a_refused_checksum(rclone, uploading):
    proxy, upload, bucket = uploading
    proxy.inject("status", method="PUT", status=503)
    proxy.inject("status", method="PUT", status=501)
    assert upload().size_bytes == len(DATA)
    assert [seen.status for seen in proxy.requests("PUT")] == [503, 501, 200]
    proxy.inject("status", method="PUT", status=403, times=-1)
    with pytest.raises(OriginDeniedError) as error:
        upload()
    assert_discreet(error.value)
    assert rclone.get(bucket, "m/w") == DATA


def test_an_upload_that_seems_to_arrive_wrong_is_sent_once_more(uploading):
    proxy, upload, _ = uploading
    proxy.inject("short_length", method="HEAD", path="m/w")
    assert upload().size_bytes == len(DATA)
    assert len(proxy.requests("PUT")) == 2
    proxy.inject("short_length", method="HEAD", path="m/w", times=2)
    with pytest.raises(IntegrityError) as error:
        upload()
    assert error.value.fields == {"path": "w", "check": "size", "expected": str(len(DATA)), "found": "0"}


def test_an_upload_that_arrives_wrong_is_an_integrity_error(moto, tmp_path: Path, monkeypatch):
    from cached.origins.s3 import upload

    bucket = new_bucket(moto)
    source = tmp_path / "w"
    source.write_bytes(DATA)
    monkeypatch.setattr(upload, "_crc64_of", lambda *_args: 1)  # as if the file was changed meanwhile
    with pytest.raises(IntegrityError) as error:
        open_writable(moto.spec(f"s3://{bucket}/m")).upload_file(source, "w")
    assert error.value.fields["check"] == "crc64nvme"


@pytest.mark.parametrize(
    ("uri", "options"),
    [
        ("s3://", {}),
        ("s3:///key", {}),
        ("s3://user:secret@bucket/key", {}),
        ("s3://bucket/x", {"endpoint": "http://x"}),
        ("s3://bucket/x", {"endpoint_url": "x"}),
        ("s3://bucket/x", {"endpoint_url": "http://user:secret@x"}),
        ("s3://bucket/x", {"addressing": "dns"}),
        ("s3://bucket/x", {"anonymous": "maybe"}),
        ("s3://bucket/x", {"read_timeout_s": "soon"}),
        ("s3://bucket/x", {"max_connections": "-1"}),
    ],
)
def test_wrong_uris_and_options_are_refused_at_once(uri: str, options: dict[str, str]):
    with pytest.raises(InvalidRequestError) as error:
        open_origin(OriginSpec(uri, options))
    assert error.value.hint
    assert "secret" not in str(error.value.to_dict())


def test_addressing(monkeypatch):
    def url(options: dict[str, str]) -> str:
        connection, _ = S3Origin(OriginSpec("s3://bucket/x", options))._connected()
        return str(connection.client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "k"}))

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    assert url({}).startswith("https://bucket.s3.amazonaws.com/k")
    assert url({"addressing": "path"}).startswith("https://s3.amazonaws.com/bucket/k")
    assert url({"endpoint_url": "https://minio.example"}).startswith("https://minio.example/bucket/k")
    assert url({"endpoint_url": "https://x.example", "addressing": "virtual"}).startswith("https://bucket.x.example/k")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://ceph.example")
    assert url({"addressing": "auto"}).startswith("https://ceph.example/bucket/k")
