"""What every origin must do, each against a real server; and what local folders alone can get wrong."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from cached.errors import (
    InvalidRequestError,
    NotFoundError,
    ObjectChangedError,
    OriginProtocolError,
)
from cached.origins.base import OriginSpec
from cached.origins.registry import _READABLE, open_origin, open_writable, redact
from tests.cloud_servers import Azure, FakeGcs, azure_env
from tests.conformance.reading import read_range
from tests.http_servers import FileServer, Hub
from tests.servers import S3Server, s3_env

DATA = bytes(range(256)) * 1000 + b"an unaligned end"
_buckets = (f"bucket-{number}" for number in itertools.count())


@dataclass
class Place:
    """An origin's place with means to change it behind the origin's back."""

    open: Callable[[str], Any]
    put: Callable[[str, bytes], Any]
    delete: Callable[[str], Any]
    writable: bool = True


def s3_place(server: S3Server) -> Place:
    bucket = next(_buckets)
    server.create_bucket(bucket)
    return Place(
        open=lambda path: open_writable(server.spec(f"s3://{bucket}/models/{path}")),
        put=lambda path, data: server.put(bucket, f"models/{path}", data),
        delete=lambda path: server.delete(bucket, f"models/{path}"),
    )


def web_place(server: FileServer) -> Place:
    return Place(
        open=lambda path: open_origin(OriginSpec(f"{server.url}/models/{quote(path)}")),
        put=lambda path, data: server.put(f"models/{path}", data),
        delete=lambda path: server.delete(f"models/{path}"),
        writable=False,
    )


def hub_place(hub: Hub) -> Place:
    """Each change is a new commit, and the history before it is gone."""
    files: dict[str, bytes] = {}

    def put(path: str, data: bytes) -> None:
        files[path] = data
        hub.commit("org/repo", files, squash=True)

    def delete(path: str) -> None:
        del files[path]
        hub.commit("org/repo", files, squash=True)

    hub.commit("org/repo", {})
    return Place(
        open=lambda path: open_origin(OriginSpec(f"hf://org/repo@main/{quote(path)}", {"endpoint": hub.url})),
        put=put,
        delete=delete,
        writable=False,
    )


def cloud_place(server: Any, uri: str, container: str, **options: str) -> Place:
    return Place(
        open=lambda path: open_origin(OriginSpec(f"{uri}/models/{path}", options)),
        put=lambda path, data: server.put(container, f"models/{path}", data),
        delete=lambda path: server.delete(container, f"models/{path}"),
        writable=uri.startswith("az://"),
    )


@pytest.fixture(params=["file", "rclone", "moto", "web", "hub", "gs", "az"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "file":

        def put(path: str, data: bytes) -> None:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"{path}.new").write_bytes(data)
            (tmp_path / f"{path}.new").replace(tmp_path / path)

        yield Place(
            open=lambda path: open_writable(OriginSpec(f"file://{quote(str(tmp_path))}/{quote(path)}")),
            put=put,
            delete=lambda path: (tmp_path / path).unlink(),
        )
        return
    if request.param == "web":
        with FileServer() as web:
            yield web_place(web)
        return
    if request.param == "gs":
        gcs: FakeGcs = request.getfixturevalue("fake_gcs")
        gcs.create_bucket(bucket := next(_buckets))
        yield cloud_place(gcs, f"gs://{bucket}", bucket, endpoint=gcs.url, anonymous="true")
        return
    if request.param == "az":
        with Azure() as azure, pytest.MonkeyPatch.context() as patch:
            for name, value in azure_env().items():
                patch.setenv(name, value)
            azure.containers["models"] = {}
            yield cloud_place(azure, "az://models", "models", endpoint=azure.url)
        return
    if request.param == "hub":
        with Hub() as hub:
            yield hub_place(hub)
        return
    server: S3Server = request.getfixturevalue(f"{request.param}_s3")
    with s3_env(server):
        yield s3_place(server)


def read(origin: Any, item: Any, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
    buffer = bytearray(item.size_bytes - offset_bytes if length_bytes is None else length_bytes)
    read_range(origin, item, offset_bytes, memoryview(buffer))
    return bytes(buffer)


# --- every origin -----------------------------------------------------------------------------------------------------


def test_lists_what_is_below_sorted_and_nothing_else(place: Place):
    for path in ("m/b.safetensors", "m/sub/deep/config.json", "m/a.txt", "m-other/x", "n"):
        place.put(path, path.encode())
    for uri in ("m", "m/"):
        origin = place.open(uri)
        found = origin.list_objects()
        assert [item.path for item in found] == ["a.txt", "b.safetensors", "sub/deep/config.json"]
        assert [item.size_bytes for item in found] == [7, 15, 22]
        assert all(item.version for item in found)
        origin.close()


def test_one_object_is_listed_and_read_by_its_own_name(place: Place):
    place.put("m/model.gguf", DATA)
    origin = place.open("m/model.gguf")
    (item,) = origin.list_objects()
    assert item.path == "model.gguf"
    assert item.size_bytes == len(DATA)
    origin.close()
    fresh = place.open("m/model.gguf")  # another process is given only the URI and the path
    stated = fresh.stat("model.gguf")
    assert read(fresh, stated, 5, 100) == DATA[5:105]
    fresh.close()


def test_an_object_with_the_folders_own_name_is_found(place: Place):
    place.put("m/m", b"inside")
    origin = place.open("m")
    assert read(origin, origin.stat("m")) == b"inside"
    origin.close()


@pytest.mark.parametrize(
    ("offset_bytes", "length_bytes"),
    [(0, 1), (0, 4096), (12345, 54321), (len(DATA) - 1, 1), (len(DATA) - 777, 777), (0, len(DATA)), (7, 0)],
)
def test_ranges(place: Place, offset_bytes: int, length_bytes: int):
    place.put("m/w", DATA)
    origin = place.open("m")
    item = origin.stat("w")
    assert item.size_bytes == len(DATA)
    assert read(origin, item, offset_bytes, length_bytes) == DATA[offset_bytes : offset_bytes + length_bytes]
    origin.close()


def test_a_listed_item_can_be_read(place: Place):
    place.put("m/w", DATA)
    origin = place.open("m")
    (item,) = origin.list_objects()
    assert read(origin, item) == DATA
    origin.close()


def test_empty_object(place: Place):
    place.put("m/empty", b"")
    origin = place.open("m")
    (item,) = origin.list_objects()
    assert item.size_bytes == 0
    assert read(origin, origin.stat("empty")) == b""
    origin.close()


def test_a_change_is_seen_also_with_the_same_size(place: Place):
    place.put("m/w", DATA)
    origin = place.open("m")
    item = origin.stat("w")
    place.put("m/w", DATA[::-1])
    with pytest.raises(ObjectChangedError) as error:
        read(origin, item, 0, 100)
    assert error.value.fields["expected"] == item.version
    with pytest.raises(ObjectChangedError):
        read(origin, item, 0, 0)
    assert read(origin, origin.stat("w"), 0, 100) == DATA[::-1][:100]
    origin.close()


def test_an_object_that_shrank_is_a_change(place: Place):
    place.put("m/w", DATA)
    origin = place.open("m")
    item = origin.stat("w")
    place.put("m/w", b"short")
    with pytest.raises(ObjectChangedError):
        read(origin, item, len(DATA) - 10, 10)
    origin.close()


def test_missing_things_are_not_found(place: Place):
    place.put("m/w", DATA)
    origin = place.open("m")
    item = origin.stat("w")
    with pytest.raises(NotFoundError) as error:
        origin.stat("nope.json")
    assert "nope.json" in str(error.value)
    assert error.value.hint
    place.delete("m/w")
    with pytest.raises(NotFoundError):
        read(origin, item, 0, 10)
    origin.close()
    for uri in ("nothing-here", "nothing-here/"):
        with pytest.raises(NotFoundError):
            place.open(uri).list_objects()


@pytest.mark.parametrize("path", ["../m2/secret", "/etc/passwd", "a/../../b", "", "a//b", "x\0y"])
def test_paths_that_lead_out_are_refused(place: Place, path: str):
    place.put("m/w", DATA)
    place.put("m2/secret", b"!")
    origin = place.open("m")
    with pytest.raises(InvalidRequestError):
        origin.stat(path)
    with pytest.raises(InvalidRequestError):
        read_range(origin, replace(origin.stat("w"), path=path), 0, memoryview(bytearray(1)))
    origin.close()


@pytest.mark.parametrize(
    "name", ["with space.txt", "ünïcode-模型.json", "plus+and&percent%20.txt", "#hash?query=1", "~!()'$"]
)
def test_odd_names(place: Place, name: str):
    place.put(f"m/{name}", name.encode())
    origin = place.open("m")
    (item,) = origin.list_objects()
    assert item.path == name
    assert read(origin, origin.stat(name)) == name.encode()
    origin.close()


def test_eight_threads_read_at_once(place: Place):
    place.put("m/w", DATA)
    origin = place.open("m")
    item = origin.stat("w")
    target = bytearray(len(DATA))
    step = -(-len(DATA) // 64)
    start = threading.Barrier(8)

    def fetch(thread: int) -> None:
        start.wait(30)
        for number in range(thread, 64, 8):
            end = min((number + 1) * step, len(DATA))
            read_range(origin, item, number * step, memoryview(target)[number * step : end])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fetch, range(8)))
    assert target == DATA
    origin.close()


def test_close_is_idempotent(place: Place):
    place.put("m/w", DATA)
    origin = place.open("m")
    origin.close()
    origin.list_objects()
    origin.close()
    origin.close()


def test_upload_then_read_back(place: Place, tmp_path: Path):
    source = tmp_path / "source.bin"
    source.write_bytes(DATA)
    if not place.writable:
        pytest.skip("models are not uploaded there")
    origin = place.open("new/model")
    sent: list[int] = []
    stored = origin.upload_file(source, "sub/w ä.bin", sent.append)
    assert stored.size_bytes == len(DATA)
    assert sum(sent) == len(DATA)
    source.write_bytes(b"")
    assert origin.upload_file(source, "empty").size_bytes == 0
    assert [item.path for item in origin.list_objects()] == ["empty", "sub/w ä.bin"]
    assert read(origin, origin.stat("sub/w ä.bin")) == DATA
    with pytest.raises(InvalidRequestError):
        origin.upload_file(source, "../out")
    with pytest.raises(NotFoundError):
        origin.upload_file(tmp_path / "not-there", "x")
    origin.close()


# --- the registry -----------------------------------------------------------------------------------------------------


def test_unknown_schemes_are_refused_and_nothing_secret_is_said():
    for uri in ("gopher://user:hunter2@host/x?token=hunter2", "plain/path", "", "ftp://x/y"):
        with pytest.raises(InvalidRequestError) as error:
            open_origin(OriginSpec(uri))
        assert "s3://" in error.value.hint
        assert "hunter2" not in str(error.value.to_dict())
    assert sorted(_READABLE) == ["az", "file", "gs", "hf", "http", "https", "s3"]
    assert redact("https://me:pw@host:1/a/b?X-Amz-Signature=1#f") == "https://host:1/a/b"


def test_little_is_loaded_for_an_origin_that_is_read(tmp_path: Path):
    """A mover's imports delay the first byte of a cold attach; boto3 is for uploads."""
    code = (
        "import sys; from cached.origins.registry import open_origin; from cached.origins.base import OriginSpec;"
        f"open_origin(OriginSpec('file://{tmp_path}')); assert 'botocore' not in sys.modules;"
        "open_origin(OriginSpec('s3://bucket/x')).prepare(); assert 'botocore' in sys.modules;"
        "import cached.transfer.mover; assert not {'boto3', 'structlog', 'rich', 'asyncio'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- local folders ----------------------------------------------------------------------------------------------------


def test_links_are_followed_inside_only(tmp_path: Path):
    root, outside = tmp_path / "m", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "secret").write_bytes(b"!")
    (root / "real").write_bytes(b"12345")
    (root / "link").symlink_to("real")
    origin = open_origin(OriginSpec(f"file://{root}"))
    assert [(item.path, item.size_bytes) for item in origin.list_objects()] == [("link", 5), ("real", 5)]
    (root / "bad").symlink_to(outside / "secret")
    for call in (origin.list_objects, lambda: origin.stat("bad")):
        with pytest.raises(InvalidRequestError, match="bad"):
            call()
    (root / "bad").unlink()
    (root / "folder").symlink_to(outside)
    with pytest.raises(InvalidRequestError, match="folder"):
        origin.list_objects()
    with pytest.raises(InvalidRequestError):
        origin.stat("folder/secret")


def test_a_hugging_face_snapshot_is_read_through_its_links(tmp_path: Path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0123").write_bytes(DATA)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    origin = open_origin(OriginSpec(f"file://{snapshot}"))
    (item,) = origin.list_objects()
    assert read(origin, item) == DATA


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    origin = open_origin(OriginSpec(f"file://{tmp_path}"))
    with pytest.raises(InvalidRequestError):
        origin.stat("pipe")


def test_a_local_read_past_the_end_is_an_error(tmp_path: Path):
    (tmp_path / "w").write_bytes(b"12345")
    origin = open_origin(OriginSpec(f"file://{tmp_path}"))
    with pytest.raises(OriginProtocolError):
        read(origin, origin.stat("w"), 3, 10)


@pytest.mark.parametrize("uri", ["file://host/x", "file://relative", "file:///x?", "file:///x?y", "file:///x#y"])
def test_wrong_local_uris(uri: str):
    with pytest.raises((InvalidRequestError, NotFoundError)):
        open_origin(OriginSpec(uri)).list_objects()
    with pytest.raises(InvalidRequestError):
        open_origin(OriginSpec("file:///tmp", {"endpoint_url": "http://x"}))
