from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.errors import CachedError, IntegrityError, InvalidRequestError
from cached.manifest import BlobRecord, FileEntry, Manifest, check_paths, revision_of
from cached.types import CheckedBy
from cached.units import CHUNK_BYTES

A, B = "a" * 64, "b" * 64


def entry(
    path: str = "model.safetensors", size: int = 10, digest: str = A, by: CheckedBy = CheckedBy.FIRST_SEEN
) -> FileEntry:
    return FileEntry(path, size, digest, by)


def manifest(*files: FileEntry, **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "name": "llama",
        "revision": "0123456789abcdef",
        "source": "s3://bucket/llama",
        "files": files or (entry(), FileEntry("config.json", 3, B, CheckedBy.CATALOG_SHA256, version='"etag"')),
        "created_time_s": 12.5,
        "origin_options": {"endpoint": "http://localhost:1"},
        "notes": ("left out pytorch_model.bin: safetensors are there",),
    }
    return Manifest(**(values | changes))


def through_json(data: object) -> Any:
    return json.loads(json.dumps(data))


def test_round_trip() -> None:
    original = manifest()
    assert Manifest.from_dict(through_json(original.to_dict())) == original


def test_totals() -> None:
    shared = manifest(entry("a", 10, A), entry("b", 10, A), entry("c", 3, B))
    assert (shared.total_bytes, shared.blobs) == (23, {A: 10, B: 3})


def test_the_whole_is_checked_as_its_weakest_file() -> None:
    strong, middle, weak = CheckedBy.CATALOG_SHA256, CheckedBy.ORIGIN_CHECKSUM, CheckedBy.FIRST_SEEN
    assert manifest(entry("a", by=strong), entry("b", by=middle)).checked_by is middle
    assert manifest(entry("a", by=weak), entry("b", by=strong)).checked_by is weak
    assert manifest(entry("a", by=strong)).checked_by is strong


@pytest.mark.parametrize(
    "make",
    [
        lambda: entry("../up"),
        lambda: entry("/etc/passwd"),
        lambda: entry("a//b"),
        lambda: entry(size=-1),
        lambda: entry(size=1 << 63),
        lambda: entry(digest="A" * 64),
        lambda: manifest(entry("a"), entry("a")),
        lambda: manifest(entry("a"), entry("a/b/c", digest=B)),
        lambda: manifest(entry("a/b/c"), entry("a/b", digest=B)),
        lambda: manifest(entry("a", 1), entry("b", 2)),
        lambda: manifest(files=()),
        lambda: manifest(name="../up"),
        lambda: manifest(name="s3://x/y"),
        lambda: manifest(revision=""),
        lambda: manifest(revision="XYZ"),
    ],
)
def test_what_cannot_be_is_refused(make: Any) -> None:
    with pytest.raises(InvalidRequestError):
        make()


def test_like_named_neighbours_are_no_conflict() -> None:
    check_paths(["a", "a.b", "ab/c", "b/a"])


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_blob_round_trip(size: int) -> None:
    record = BlobRecord(A, size, tuple((1 << 64) - 1 - index for index in range(-(-size // CHUNK_BYTES))))
    assert BlobRecord.from_dict(through_json(record.to_dict())) == record


def test_blob_chunks() -> None:
    record = BlobRecord(A, CHUNK_BYTES + 5, (7, 8))
    assert (record.chunk(0), record.chunk(1)) == ((0, CHUNK_BYTES, 7), (CHUNK_BYTES, 5, 8))


@pytest.mark.parametrize(
    ("digest", "size", "crcs"),
    [(A, 1, ()), (A, 1, (1, 2)), (A, 0, (1,)), (A, 1, (1 << 64,)), (A, 1, (-1,)), ("x", 1, (1,)), (A, -1, ())],
)
def test_a_blob_whose_parts_do_not_fit_is_refused(digest: str, size: int, crcs: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequestError):
        BlobRecord(digest, size, crcs)


@pytest.mark.parametrize("packed", ["zz", "00", "0" * 15, "0" * 17, "0" * 32, ""])
def test_damaged_checksums_are_an_integrity_error(packed: str) -> None:
    with pytest.raises(IntegrityError):
        BlobRecord.from_dict({"digest": A, "size_bytes": 1, "crc64": packed})


def test_revision_depends_on_content_and_not_on_order() -> None:
    files = [("a", 1, "sha256:" + A), ("b", 2, 'version:"etag"')]
    assert revision_of(files) == revision_of(reversed(files)) == "61a13d57180bc717"
    changed = [
        [("a", 1, "sha256:" + B), files[1]],
        [("a", 2, "sha256:" + A), files[1]],
        [("aa", 1, "sha256:" + A), files[1]],
        [files[0], ("b", 2, 'version:"other"')],
        files[:1],
    ]
    assert len({revision_of(rows) for rows in [files, *changed]}) == 6
    with pytest.raises(InvalidRequestError):
        revision_of([("a", 1, "etag:1")])


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [at, *(place for key, value in inner for place in places(value, (*at, key)))]


def changed_at(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    data = copy.deepcopy(data)
    part = data
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    return data


@pytest.mark.parametrize("kind", [Manifest, BlobRecord])
@given(data=st.data())
def test_garbage_is_refused_or_read_exactly(kind: Any, data: st.DataObject) -> None:
    """Whatever is put in any place: IntegrityError, or a value that writes back the very same data."""
    good = manifest().to_dict() if kind is Manifest else BlobRecord(A, CHUNK_BYTES + 1, (1, 2)).to_dict()
    place = data.draw(st.sampled_from(places(good)))
    bad = changed_at(good, place, data.draw(plain))
    try:
        read = kind.from_dict(bad)
    except IntegrityError:
        return
    assert read.to_dict() == bad


@given(place=st.sampled_from(places(manifest().to_dict())))
def test_a_missing_or_an_extra_key_is_refused(place: tuple[Any, ...]) -> None:
    good = manifest().to_dict()
    part = good
    for key in place:
        part = part[key]  # type: ignore[assignment]
    if not isinstance(part, dict) or place == ("origin_options",):
        return
    for bad in (part | {"extra": 1}, {key: value for key, value in part.items() if key != next(iter(part))}):
        with pytest.raises(IntegrityError):
            Manifest.from_dict(changed_at(good, place, bad))


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), True, "1", None])
def test_a_time_is_a_finite_number(value: object) -> None:
    with pytest.raises(IntegrityError):
        Manifest.from_dict(manifest().to_dict() | {"created_time_s": value})


@given(data=plain)
def test_arbitrary_data_never_escapes_the_typed_errors(data: Any) -> None:
    for kind in (Manifest, BlobRecord):
        with pytest.raises(CachedError):
            kind.from_dict(data)
