"""Checksums against published vectors, and folding against the whole."""

from __future__ import annotations

import base64
import hashlib
import mmap
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached import checksum
from cached.errors import InvalidRequestError

CHECK = b"123456789"

VECTORS = {
    "crc64nvme": "ae8b14860a799888",
    "crc32c": "e3069283",
    "crc32": "cbf43926",
    "sha1": "f7c3bc1d808e04732adf679965ccc34ca7ae3441",
    "git-sha1": "e2e107ac61ac259b87c544f6e7a4eb03422c6c21",  # git hash-object
    "sha256": "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225",
}


@pytest.mark.parametrize("algorithm", checksum.ALGORITHMS)
def test_published_vectors(algorithm: str) -> None:
    assert checksum.part_digest(algorithm, CHECK) == VECTORS[algorithm]
    assert checksum.part_digest(algorithm, CHECK[:4], memoryview(CHECK)[4:]) == VECTORS[algorithm]


def test_crc32_is_that_of_zlib() -> None:
    assert checksum.crc32(CHECK) == zlib.crc32(CHECK)


@given(parts=st.lists(st.binary(max_size=200), max_size=6))
def test_folding_parts_gives_the_value_of_the_whole(parts: list[bytes]) -> None:
    whole = b"".join(parts)
    folded = checksum.combine_crc64nvme((checksum.crc64nvme(part), len(part)) for part in parts)
    assert folded == checksum.crc64nvme(whole)


@given(data=st.binary(max_size=200), cut=st.integers(0, 200))
def test_a_crc_continues_from_its_prefix(data: bytes, cut: int) -> None:
    assert checksum.crc64nvme(data[cut:], checksum.crc64nvme(data[:cut])) == checksum.crc64nvme(data)


def test_a_mapping_is_read_in_place() -> None:
    with mmap.mmap(-1, 8192) as mapping:
        mapping[100:109] = CHECK
        with memoryview(mapping) as view, view[100:109] as part, part.toreadonly() as sealed:
            assert checksum.crc64_hex(checksum.crc64nvme(sealed)) == VECTORS["crc64nvme"]


def test_composite_is_the_digest_of_binary_digests() -> None:
    parts = [b"a" * 100, b"b" * 7]
    values = [checksum.part_digest("sha256", part) for part in parts]
    expected = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    assert checksum.compose_parts("sha256", values) == expected


def test_hex_is_big_endian_as_s3_sends_it() -> None:
    sent_by_s3 = base64.b64encode((0xAE8B14860A799888).to_bytes(8, "big"))
    assert base64.b64decode(sent_by_s3).hex() == checksum.part_digest("crc64nvme", CHECK)
    assert checksum.crc64_hex(1) == "0" * 15 + "1"


@pytest.mark.parametrize(
    "text", ["", "1", "AE8B14860A799888", "0x8b14860a799888", "ae8b14860a79988g", "ae8b14860a799888 "]
)
def test_parse_refuses_what_is_not_a_crc(text: str) -> None:
    with pytest.raises(ValueError, match="not a CRC64"):
        checksum.parse_crc64_hex(text)
    assert checksum.parse_crc64_hex("ae8b14860a799888") == 0xAE8B14860A799888


def test_unknown_algorithms_are_named() -> None:
    with pytest.raises(InvalidRequestError, match="md5"):
        checksum.new_digest("md5")
