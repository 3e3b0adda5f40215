"""One cache that several threads use: models come and go while all of them are resumed or closed."""

from __future__ import annotations

import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import pytest

import cached_client
from cached_client.errors import CacheError
from cached_client.testing import FakeDaemon
from tests.unit.client_support import eventually

FILES = {"config.json": b"{}"}


@pytest.fixture
def daemon(tmp_path: Path):
    with FakeDaemon(tmp_path) as running:
        yield running


class SlowSet(weakref.WeakSet):
    """One that is looked through slowly."""

    def __iter__(self):
        for model in super().__iter__():
            time.sleep(0.005)
            yield model


class Attaching:
    """Threads that attach a model of a cache, and close it again, for as long as this is entered."""

    def __init__(self, cache: cached_client.Cache, threads: int) -> None:
        self.failures: list[Exception] = []
        self._cache = cache
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._attach_often) for _ in range(threads)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _attach_often(self) -> None:
        while not self._ended.is_set():
            try:
                self._cache.attach("m").close()
            except Exception as error:
                self.failures.append(error)


def test_a_cache_is_resumed_while_another_thread_attaches(daemon) -> None:
    daemon.add("m", FILES)
    with cached_client.connect(daemon.target) as cache:
        cache._models = SlowSet()
        kept = [cache.attach("m", wait=True) for _ in range(8)]
        with Attaching(cache, 1) as attaching:
            for _ in range(20):
                cache.resume()
    assert not attaching.failures
    assert all(model.closed for model in kept)


def test_an_attach_during_the_close_of_its_cache_leaves_no_lease(daemon) -> None:
    daemon.add("m", FILES, arrived=False)
    with cached_client.connect(daemon.target) as cache, ThreadPoolExecutor(1) as pool:
        attached = pool.submit(cache.attach, "m", wait=True)
        eventually(lambda: daemon.lease_count == 1, "the lease")
        cache.close()
        for path, content in FILES.items():
            daemon.announce("m", path, 0, len(content))
        daemon.complete("m")
        with pytest.raises(CacheError, match="cache was closed while m") as caught:
            attached.result(20)
        assert caught.value.reason == "CLOSED"
        eventually(lambda: daemon.lease_count == 0, "the end of the lease")
        assert cache.connection._channel is None
        with cache.attach("m", wait=True) as model:
            assert model.complete


def test_a_cache_is_closed_again_and_again_while_threads_attach(daemon) -> None:
    daemon.add("m", FILES)
    with cached_client.connect(daemon.target) as cache, Attaching(cache, 3) as attaching:
        for _ in range(100):
            cache.close()
            time.sleep(0.01)
    assert attaching.failures
    assert {getattr(error, "reason", repr(error)) for error in attaching.failures} == {"CLOSED"}
    eventually(lambda: daemon.lease_count == 0, "the end of all leases")
    assert not [thread for thread in threading.enumerate() if thread.name == "cached-lease"]
