"""The directory of a model whose origin vouches for its content: it can be used before its SHA-256 names its blobs."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import cached_client
from cached.checksum import crc64nvme
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, model_files, sha256


def vouched(site: Site, *sizes_bytes: int) -> dict[str, bytes]:
    """A model of the catalog, of whose objects the origin knows the CRC64-NVME."""
    files = model_files(*sizes_bytes)
    for path, data in files.items():
        checksum = base64.b64encode(crc64nvme(data).to_bytes(8, "big")).decode()
        site.server.put(site.bucket, f"m/{path}", data, ChecksumCRC64NVME=checksum)
    return site.know("m", files)


@contextlib.contextmanager
def attached(site: Site) -> Iterator[cached_client.Model]:
    """The model, complete, as soon as it may be used."""
    with site.cache() as cache, cache.attach("m", wait=True, timeout_s=60) as model:
        yield model


def movers_of(site: Site) -> list[int]:
    """The daemon's children."""
    tasks = Path(f"/proc/{site.daemon.pid}/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


@contextlib.contextmanager
def hashing_held(site: Site) -> Iterator[None]:
    """Nothing is hashed within: the movers are stopped."""
    movers = movers_of(site)
    for pid in movers:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in movers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def is_recorded(site: Site) -> bool:
    described = site.describe("m")
    return bool(described.files) and all(file.sha256 for file in described.files)


def kinds(place: Path, files: dict[str, bytes]) -> set[str]:
    """What kinds of segments the links lead to."""
    return {os.readlink(place / path).split(".")[-2] for path in files}


def test_the_directory_is_there_at_once_and_readable_while_blobs_get_their_names(site: Site) -> None:
    files = vouched(site, 60 * MB, 60 * MB, 60 * MB)
    site.start()
    with attached(site) as model:
        with hashing_held(site):
            place = model.directory
            assert place is not None
            assert "ingest" in kinds(place, files)
            described = site.describe(f"m@{model.revision}")
            assert (Path(described.path), described.summary.revision) == (place, model.revision)
            assert {file.path for file in described.files} == set(files)
            assert {path: info.local_path for path, info in model.files.items()} == {
                path: place / path for path in files
            }
            failures: list[str] = []
            done = threading.Event()
            reader = threading.Thread(target=read_all_the_time, args=(place, files, done, failures))
            reader.start()
        wait_for(lambda: is_recorded(site), "the blobs to be named")
        done.set()
        reader.join()
        assert not failures
        assert kinds(place, files) == {"blob"}
        check_content(place, files)
        assert model.directory == place
    site.daemon.restart()
    assert Path(site.describe("m").path).resolve() == place
    check_content(place, files)
    wait_for(lambda: not site.daemon.stats().active_load_count, "what is in memory to be confirmed")
    site.evict("m", "l1")
    check_content(place, files)
    site.evict("m", "all")
    assert not place.exists()


def read_all_the_time(place: Path, files: dict[str, bytes], done: threading.Event, failures: list[str]) -> None:
    while not done.is_set():
        for path, data in files.items():
            try:
                with (place / path).open("rb") as file:
                    assert file.read(16) == data[:16]
            except OSError as error:
                failures.append(str(error))


def check_content(place: Path, files: dict[str, bytes]) -> None:
    for path, data in files.items():
        assert sha256((place / path).read_bytes()) == sha256(data)


def test_the_directory_goes_with_a_load_that_is_stopped_before_it_is_recorded(site: Site) -> None:
    files = vouched(site, 60 * MB, 60 * MB)
    site.settings["daemon"] = {"drain_timeout_s": 0.0}
    site.start()
    with attached(site) as model, hashing_held(site):
        place = model.directory
        assert place is not None
        assert "ingest" in kinds(place, files)
        assert site.daemon.terminate() == 0
        assert not place.exists()
    site.start()
    wait_for(lambda: is_recorded(site), "the pull to go on")
    check_content(place, files)
