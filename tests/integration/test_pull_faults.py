"""Origins and movers that fail under a pull: borne, resumed, or refused with one clear error; never a wrong byte."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cached.units import CHUNK_BYTES
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, chunk_ranges, model_files, refused, total_bytes
from tests.invariants import check_at_rest

WEIGHTS = "model.safetensors"
SIZE = 2 * CHUNK_BYTES + 3 * MB


PASSING: dict[str, tuple[Any, dict[str, Any]]] = {
    "throttled": ("status", {"status": 503, "times": 3}),
    "too-many": ("status", {"status": 429, "times": 2}),
    "broken-listing": ("status", {"status": 500, "times": 2, "query": "list-type"}),
    "broken-head": ("status", {"status": 503, "times": 2, "method": "HEAD"}),
    "reset": ("reset", {"times": 2, "after_bytes": 3 * MB}),
    "truncated": ("truncate", {"times": 2, "after_bytes": 3 * MB}),
    "short": ("short_length", {"times": 2, "after_bytes": 1000}),
    "wrong-range": ("wrong_range", {"times": 2}),
    "whole": ("whole", {"times": 2}),
}
"""What the origin does wrong a few times, by the name of the model that it happens to."""


def test_passing_failures_of_the_origin_are_borne(site: Site) -> None:
    for seed, name in enumerate(PASSING, 1):
        site.add(name, model_files(CHUNK_BYTES + MB, seed=seed), tier="cold")
    site.start()
    for name, (kind, settings) in PASSING.items():
        path = "" if "query" in settings else f"{name}/{WEIGHTS}"
        fault = site.proxy.inject(kind, path=path, **settings)
        assert site.pull(name)[-1].phase == "ready", name
        assert fault.hits == settings["times"], name
        site.check_served(name)
    retries = [value for key, value in site.daemon.stats().counters.items() if key.startswith("cached_retries_total")]
    assert sum(retries) > len(PASSING)


@pytest.mark.parametrize("kind", ["truncate", "short_length", "wrong_range", "whole"])
def test_an_answer_that_stays_wrong_is_asked_for_three_times_and_no_more(site: Site, kind: Any) -> None:
    site.add("m", model_files(SIZE))
    site.settings |= {"transfer": {"max_attempts": 3}}
    offset, length = chunk_ranges(SIZE)[1]
    second = f"bytes={offset}-{offset + length - 1}"
    settings = {"after_bytes": 1000} if kind in {"truncate", "short_length"} else {}
    fault = site.proxy.inject(kind, times=-1, path=WEIGHTS, range=second, **settings)
    site.start()
    with refused("ORIGIN_PROTOCOL") as seen:
        site.pull("m")
    assert seen["path"] == WEIGHTS
    assert fault.hits == site.ranges(WEIGHTS).count(second) == 3
    check_at_rest(site.daemon, kept_ingests=True, content=False)
    site.proxy.heal()
    site.check_served("m")


def test_an_origin_that_hangs_is_left_after_its_stall_deadline(site: Site) -> None:
    site.add("m", model_files(SIZE))
    site.settings |= {"s3": {"read_timeout_s": 0.5}}
    site.hold(WEIGHTS, after_bytes=2 * MB, times=2)
    site.start()
    assert site.pull("m")[-1].phase == "ready"
    site.check_served("m")


def test_a_slow_origin_is_no_failure_and_other_pulls_go_on(site: Site) -> None:
    site.add("slow", model_files(SIZE))
    site.add("quick", model_files(4 * MB, seed=2))
    held = site.hold("slow/" + WEIGHTS, times=1, after_bytes=10)
    site.proxy.inject("slow", path="slow/" + WEIGHTS, times=1, rate_bytes_per_s=20e6)
    site.start()
    site.begin("slow")
    assert held.reached.wait(60)
    assert site.pull("quick")[-1].phase == "ready"
    held.release()
    check_at_rest(site.daemon)
    site.check_served("slow")


def test_a_failure_that_stays_is_told_and_what_was_verified_is_kept(site: Site) -> None:
    files = site.add("m", model_files(SIZE))
    site.settings |= {"transfer": {"max_attempts": 2, "retry_budget_s": 2.0}}
    offset, length = chunk_ranges(SIZE)[2]
    broken = f"bytes={offset}-{offset + length - 1}"
    site.proxy.inject("status", times=-1, range=broken, path=WEIGHTS)
    site.start()
    with refused("ORIGIN_UNAVAILABLE") as seen:
        site.pull("m")
    assert seen["path"] == WEIGHTS
    assert "503" in seen["message"]
    assert "503" in site.describe("m").last_error
    check_at_rest(site.daemon, kept_ingests=True, content=False)
    site.proxy.heal()
    site.proxy.clear()
    assert site.pull("m")[-1].phase == "ready"
    asked = site.ranges(WEIGHTS)
    assert broken in asked
    assert site.proxy.get_bytes() < total_bytes(files) - CHUNK_BYTES, "what was verified is not fetched again"
    site.check_served("m")


def test_refused_credentials_in_the_middle_are_an_error_at_once(site: Site) -> None:
    site.add("m", model_files(SIZE))
    fault = site.proxy.inject("status", times=-1, status=403, path=WEIGHTS)
    site.start()
    with refused("ORIGIN_DENIED"):
        site.pull("m")
    assert fault.hits <= 16, "it is not tried again and again"
    check_at_rest(site.daemon, kept_ingests=True, content=False)
    site.proxy.heal()
    site.pull("m")
    site.check_served("m")


def test_what_is_here_is_served_while_credentials_are_refused(site: Site) -> None:
    for seed, name in enumerate(("memory", "disk", "m"), 1):
        site.add(name, model_files(MB, seed=seed))
    site.start()
    site.pull("memory")
    site.pull("disk", level="l2")
    for method in ("GET", "HEAD"):
        site.proxy.inject("status", times=-1, status=403, method=method, code="ExpiredToken")
    with refused("ORIGIN_DENIED") as seen:
        site.pull("m")
    assert seen["cause"] == "ExpiredToken"
    assert site.check_served("memory").from_level == "l1"
    assert site.check_served("disk").from_level == "l2"


@pytest.mark.parametrize("now", ["renewed", "revoked"])
def test_credentials_that_expire_in_the_middle_are_read_once_more(site: Site, tmp_path: Path, now: str) -> None:
    site.add("m", model_files(SIZE))
    offset, length = chunk_ranges(SIZE)[1]
    second = f"bytes={offset}-{offset + length - 1}"
    expired = site.proxy.inject("status", status=403, code="ExpiredToken", wait=True, path=WEIGHTS, range=second)
    environment, kept = site.daemon.environment, tmp_path / "credentials"
    key, secret = environment.pop("AWS_ACCESS_KEY_ID"), environment.pop("AWS_SECRET_ACCESS_KEY")
    environment["AWS_SHARED_CREDENTIALS_FILE"] = str(kept)
    written = "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n"
    kept.write_text(written.format(key, secret))
    site.start()
    site.begin("m")
    assert expired.reached.wait(60)
    if now == "revoked":
        kept.write_text(written.format(key, "another"))
    expired.release()
    wait_for(lambda: not site.daemon.stats().active_load_count, "the pull to end")
    assert bool(site.daemon.log_events("load.failed")) == (now == "revoked")
    if now == "revoked":
        assert "denied" in site.describe("m").last_error
        kept.write_text(written.format(key, secret))
        site.pull("m")
    assert expired.hits == 1
    site.check_served("m")


@pytest.mark.parametrize("server", ["site", "moto_site"])
def test_an_object_replaced_under_the_pull_restarts_that_blob(request: pytest.FixtureRequest, server: str) -> None:
    site: Site = request.getfixturevalue(server)
    size = CHUNK_BYTES + 3 * MB
    site.settings |= {"transfer": {"max_attempts": 100}}
    old = site.add("m", model_files(size, seed=1))
    site.proxy.inject("status", times=-1, path=WEIGHTS, range=f"bytes={CHUNK_BYTES}-{size - 1}")
    site.start()
    site.begin("m")
    wait_for(lambda: site.summary("m").progress * total_bytes(old) > CHUNK_BYTES, "the first chunk")
    new = model_files(size, seed=2)
    site.put(f"m/{WEIGHTS}", new[WEIGHTS])
    site.proxy.heal()
    wait_for(lambda: site.summary("m").state == "ready", "the pull to end")
    check_at_rest(site.daemon)
    site.files["m"] = {**old, WEIGHTS: new[WEIGHTS]}
    site.check_served("m")


def test_an_etag_that_changes_between_ranges_is_never_mixed(site: Site) -> None:
    files = site.add("m", model_files(SIZE))
    offset, length = chunk_ranges(SIZE)[1]
    fault = site.proxy.inject("etag", path=WEIGHTS, range=f"bytes={offset}-{offset + length - 1}", times=1)
    site.start()
    site.pull("m")
    assert fault.hits == 1
    assert site.proxy.get_bytes(WEIGHTS) > len(files[WEIGHTS]), "the blob was begun anew"
    site.check_served("m")
    check_at_rest(site.daemon)


def movers(site: Site) -> list[int]:
    tasks = Path(f"/proc/{site.daemon.pid}/task").glob("*/children")
    return [int(pid) for path in tasks for pid in path.read_text().split()]


def test_a_mover_killed_under_a_pull_costs_only_its_ranges(site: Site) -> None:
    site.add("m", model_files(SIZE))
    held = site.hold(WEIGHTS, after_bytes=MB)
    site.start()
    site.begin("m")
    assert held.reached.wait(60)
    (mover,) = movers(site)
    os.kill(mover, signal.SIGKILL)
    held.release()
    check_at_rest(site.daemon)
    site.check_served("m")
    assert site.daemon.stats().counters["cached_mover_restarts_total"] == 1


@pytest.mark.slow
def test_movers_that_keep_dying_become_one_clear_error(site: Site) -> None:
    site.add("m", model_files(SIZE))
    site.settings |= {"transfer": {"max_attempts": 1}}
    site.proxy.inject("hold", path=WEIGHTS, times=-1)
    site.start()
    site.begin("m")
    killed: set[int] = set()
    deadline_s = time.monotonic() + 60
    while not site.describe("m").last_error:
        assert time.monotonic() < deadline_s, "no error although every mover dies"
        for mover in set(movers(site)) - killed:
            wait_for(lambda: len(site.proxy.gets(WEIGHTS)) > len(killed), "a range to be asked for")
            os.kill(mover, signal.SIGKILL)
            killed.add(mover)
    assert "mover died" in site.describe("m").last_error
    site.proxy.heal()
    site.pull("m")
    site.check_served("m")
