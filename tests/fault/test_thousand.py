"""A thousand attaches at once, cold and warm: one download, one copy, and descriptors that are given back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import cached_client
from cached.units import CHUNK_BYTES
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, model_files, total_bytes
from tests.invariants import check_at_rest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
ATTACHES = 1000
CONNECTIONS = 50
THREADS = 100
NOFILE = 1024
"""What a process may open unless somebody raised it: the service's limit is far higher."""
WAIT_S = 300.0


def open_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextmanager
def attached(site: Site, stack: ExitStack, threads: ThreadPoolExecutor) -> Iterator[list[Any]]:
    """A thousand models, asked for at once over some connections; each has its lease."""
    caches = [stack.enter_context(site.cache()) for _ in range(CONNECTIONS)]

    def attach(number: int) -> cached_client.Model:
        return caches[number % CONNECTIONS].attach("m", timeout_s=WAIT_S)

    models = list(threads.map(attach, range(ATTACHES)))
    yield models
    list(threads.map(lambda model: model.close(), models))
    wait_for(lambda: not site.leases(), "every lease to end", WAIT_S)


def test_a_thousand_attaches_cold_and_warm_make_one_download_and_one_copy(site: Site) -> None:
    files = site.add("m", model_files(CHUNK_BYTES + 3 * MB))
    site.add("first", model_files(MB, seed=2))
    site.started_by("prlimit", f"--nofile={NOFILE}:{NOFILE}")
    site.start()
    site.pull("first")  # what the first pull opens for good is no attach's
    before = open_descriptors(site.daemon.pid)
    site.proxy.clear()
    held = site.hold("m/model.safetensors", after_bytes=1000)
    with ThreadPoolExecutor(THREADS) as threads, ExitStack() as stack:
        for when in ("cold", "warm"):
            with attached(site, stack, threads) as models:
                held.release()
                reports = list(threads.map(lambda model: model.wait(WAIT_S), models))
                assert {report.from_level for report in reports} <= ({"l3", "l1"} if when == "cold" else {"l1"})
                assert len(site.leases()) == ATTACHES
                assert site.proxy.get_bytes() == total_bytes(files), f"one download; {when}"
                in_l1 = [path.stat() for path in site.segments("blob")]
                assert sum(found.st_blocks * 512 for found in in_l1) <= 1.01 * total_bytes(files) + 2 * MB, "one copy"
                views = {bytes(model.view("config.json")) for model in models}
                assert views == {files["config.json"]}
                assert models[-1].view("model.safetensors") == files["model.safetensors"]
                most = open_descriptors(site.daemon.pid)
                assert most < NOFILE // 2
    check_at_rest(site.daemon)
    limits = Path(f"/proc/{site.daemon.pid}/limits").read_text()
    assert f"Max open files            {NOFILE}" in limits
    wait_for(lambda: open_descriptors(site.daemon.pid) <= before + 8, "descriptors to be given back")
    assert not [event for event in site.daemon.log_events() if event.get("level") in {"error", "critical"}]
