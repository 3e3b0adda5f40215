"""Models from a hub and from a web server, by a real daemon: whole, interrupted, refused, and damaged on their way."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cached.units import CHUNK_BYTES
from tests.fault_proxy import CountingProxy
from tests.http_servers import FileServer, Hub
from tests.integration.harness import wait_for
from tests.integration.support import MB, SERVE, Site, chunk_ranges, model_files, refused, total_bytes
from tests.invariants import check_at_rest

SIZE = 2 * CHUNK_BYTES + 3 * MB
WEIGHTS = "model.safetensors"
HELD = 1
TOKEN = "hf_right"


class _NoStore:
    """In the place of a site's S3 server: these sites have none."""

    def env(self) -> dict[str, str]:
        return {"HF_HOME": os.devnull}


@contextlib.contextmanager
def site_at(folder: Path, proxy: CountingProxy) -> Iterator[Site]:
    made = Site(folder, _NoStore(), proxy, "")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Its large files are behind the proxy of the site."""
    (tmp_path / "token").write_text(TOKEN)
    with Hub() as server:
        yield server


@pytest.fixture
def site(hub: Hub, tmp_path: Path) -> Iterator[Site]:
    with CountingProxy(hub.cdn.url) as proxy:
        hub.cdn_url = proxy.endpoint_url
        with site_at(tmp_path / "site", proxy) as made:
            made.settings["hf"] = {"endpoint": hub.url, "token_file": str(tmp_path / "token")}
            yield made


def cli(site: Site, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SERVE, "--socket", str(site.daemon.socket), *arguments], capture_output=True, text=True, timeout=100
    )


def killed_and_resumed(site: Site, begin: Any, range_header: str) -> None:
    """SIGKILL when all but one chunk is there; the next daemon gets that chunk, and nothing twice."""
    files = site.files["x"]
    held = site.proxy.inject("hold", path="/", range=range_header)
    site.start()
    begin()
    assert held.reached.wait(60)
    verified_bytes = total_bytes(files) - CHUNK_BYTES
    wait_for(lambda: site.summary("x").progress * total_bytes(files) >= verified_bytes, "all but one chunk")
    site.daemon.kill()
    site.proxy.heal()
    site.proxy.clear()
    site.start()
    wait_for(lambda: site.summary("x").state == "ready", "the pull to finish by itself")
    check_at_rest(site.daemon)
    ranged = {item.range for item in site.proxy.gets() if item.range and item.body_bytes > MB}
    assert ranged == {range_header}
    site.check_served("x")
    assert {file.checked_by for file in site.describe("x").files} == {"origin-checksum"}


def test_a_pull_from_a_hub_survives_kill_9(site: Site, hub: Hub) -> None:
    site.files["x"] = model_files(SIZE)
    hub.commit("org/repo", {**site.files["x"], "pytorch_model.bin": b"x" * 5000, "README.md": b"# A model"})
    site.files["x"]["README.md"] = b"# A model"
    hub.repositories["org/repo"].gated = True
    offset, length = chunk_ranges(SIZE)[HELD]

    def begin() -> None:
        done = cli(site, "pull", "x", "--source", "hf://org/repo", "--no-wait")
        assert done.returncode == 0, done.stderr

    killed_and_resumed(site, begin, f"bytes={offset}-{offset + length - 1}")
    assert hub.cdn.leaked == []
    assert TOKEN not in site.daemon.log(all_starts=True)
    listed = len(hub.seen)
    hub.commit("org/repo", {"config.json": b"{}", WEIGHTS: site.files["x"][WEIGHTS]})
    site.files["x"] = {"config.json": b"{}", WEIGHTS: site.files["x"][WEIGHTS]}
    site.proxy.clear()
    assert site.pull("x")[-1].phase == "ready", "the branch has moved on: a pull gets what it is now"
    assert len(hub.seen) > listed
    assert site.proxy.get_bytes() == 0, "the weights are the same blob"
    site.check_served("x")


def test_a_hub_whose_servers_give_other_bytes_of_the_same_size_is_found_out(site: Site, hub: Hub) -> None:
    files = model_files(MB)
    hub.commit("org/repo", files)
    site.proxy.inject("corrupt", path="/lfs/", after_bytes=MB // 2, times=-1)
    site.start()
    with refused("INTEGRITY") as seen:
        site.pull("x", source="hf://org/repo")
    assert seen["check"] == "origin-sha256"
    assert seen["path"] == WEIGHTS


def test_a_gated_model_says_what_to_do(site: Site, hub: Hub, tmp_path: Path) -> None:
    hub.commit("org/repo", model_files(MB))
    hub.repositories["org/repo"].gated = True
    (tmp_path / "token").write_text("hf_wrong")
    site.start()
    done = cli(site, "pull", "x", "--source", "hf://org/repo")
    assert done.returncode == 1
    assert "gated" in done.stderr
    assert f"accept the model's terms at {hub.url}/org/repo" in done.stderr
    (tmp_path / "token").write_text(TOKEN)
    done = cli(site, "pull", "x", "--source", "hf://org/repo")
    assert done.returncode == 0, done.stderr
    assert "hf_wrong" not in site.daemon.log()


def test_a_pull_from_a_web_server_survives_kill_9(tmp_path: Path) -> None:
    files = model_files(SIZE)
    offset, length = chunk_ranges(SIZE)[HELD]
    with FileServer() as web, CountingProxy(web.url) as proxy:
        for path, data in files.items():
            web.put(f"models/x/{path}", data)
        with site_at(tmp_path / "site", proxy) as site:
            site.files["x"] = files
            site.models["x"] = {"source": f"{proxy.endpoint_url}/models/x/"}
            killed_and_resumed(site, lambda: site.begin("x"), f"bytes={offset}-{offset + length - 1}")


def test_a_web_server_that_is_busy_and_then_changes_its_file(tmp_path: Path) -> None:
    files = model_files(SIZE)
    with FileServer() as web, CountingProxy(web.url) as proxy:
        for path, data in files.items():
            web.put(f"x/{path}", data)
        with site_at(tmp_path / "site", proxy) as site:
            site.models["x"] = {"source": f"{proxy.endpoint_url}/x", "origin": {"files": sorted(files)}}
            proxy.inject("status", status=429, path=WEIGHTS, times=2)
            proxy.inject("reset", path=WEIGHTS, after_bytes=MB, ranged=True)
            offset, length = chunk_ranges(SIZE)[HELD]
            broken = proxy.inject("reset", path=WEIGHTS, range=f"bytes={offset}-{offset + length - 1}", times=-1)
            site.start()
            site.begin("x")
            wait_for(lambda: broken.hits, "the first try of a range that is reset for now")
            files[WEIGHTS] = model_files(SIZE, seed=2)[WEIGHTS]
            web.put(f"x/{WEIGHTS}", files[WEIGHTS])
            proxy.heal()
            wait_for(lambda: site.summary("x").state == "ready", "the pull of what is there now")
            site.files["x"] = files
            site.check_served("x")
