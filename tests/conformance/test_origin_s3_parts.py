"""Which checksums an S3 origin gives of objects that were uploaded in parts."""

from __future__ import annotations

import base64
import hashlib

import pytest

from cached import checksum
from cached.origins.base import OriginChecksum
from cached.origins.registry import open_origin
from cached.origins.s3 import S3Origin
from tests.conformance.buckets import new_bucket
from tests.servers import S3Server


def put_in_parts(server: S3Server, bucket: str, key: str, parts: list[bytes], algorithm: str) -> None:
    client = server.client()
    upload = client.create_multipart_upload(Bucket=bucket, Key=key, ChecksumAlgorithm=algorithm)["UploadId"]
    done = []
    for number, part in enumerate(parts, 1):
        answer = client.upload_part(
            Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=part, ChecksumAlgorithm=algorithm
        )
        done.append({"PartNumber": number, "ETag": answer["ETag"]})
    client.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": done})


PARTS = [b"a" * (5 << 20), b"b" * 1000]


def test_a_full_object_crc64_of_parts_is_used(moto):
    bucket = new_bucket(moto)
    put_in_parts(moto, bucket, "m/w", PARTS, "CRC64NVME")
    (found,) = open_origin(moto.spec(f"s3://{bucket}/m")).stat("w").checksums
    assert found == OriginChecksum("crc64nvme", checksum.crc64_hex(checksum.crc64nvme(b"".join(PARTS))))


def test_a_composite_without_part_sizes_is_no_checksum(moto):
    bucket = new_bucket(moto)
    put_in_parts(moto, bucket, "m/w", PARTS, "SHA256")
    stated = open_origin(moto.spec(f"s3://{bucket}/m")).stat("w")
    assert stated.checksums == (), "moto tells no part sizes"
    assert stated.size_bytes == sum(map(len, PARTS))


def composite_of(parts: list[bytes]) -> str:
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
    return base64.b64encode(digest).decode()


@pytest.mark.parametrize("suffix", ["", "-2"])
def test_a_composite_with_part_sizes_is_given_with_them(moto, monkeypatch, suffix):
    """No server from PyPI tells part sizes, so AWS's documented answers are given in their place."""
    bucket = new_bucket(moto)
    put_in_parts(moto, bucket, "m/w", PARTS, "SHA256")
    origin = S3Origin(moto.spec(f"s3://{bucket}/m"))
    connection, _ = origin._connected()
    head = connection.client.head_object(Bucket=bucket, Key="m/w", ChecksumMode="ENABLED")
    value = composite_of(PARTS)
    assert head["ChecksumSHA256"] == value
    pages = iter(
        [
            {
                "ObjectParts": {
                    "IsTruncated": True,
                    "NextPartNumberMarker": 1,
                    "Parts": [{"PartNumber": 1, "Size": 5 << 20}],
                }
            },
            {"ObjectParts": {"IsTruncated": False, "Parts": [{"PartNumber": 2, "Size": 1000}]}},
        ]
    )
    etag = head["ETag"].strip('"')
    monkeypatch.setattr(connection.client, "get_object_attributes", lambda **_: {"ETag": etag, **next(pages)})
    monkeypatch.setattr(connection.client, "head_object", lambda **_: {**head, "ChecksumSHA256": f"{value}{suffix}"})
    (found,) = origin.stat("w").checksums
    assert found == OriginChecksum("sha256", base64.b64decode(value).hex(), (5 << 20, 1000))
    assert checksum.compose_parts("sha256", [hashlib.sha256(part).hexdigest() for part in PARTS]) == found.value_hex
