"""The scrubber of a real daemon: damage is found without anybody asking for the bytes, mended, told, and remembered."""

from __future__ import annotations

from functools import partial

import pytest

from cached.units import CHUNK_BYTES
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, Worker, flip_byte, model_files, refused, sha256
from tests.invariants import check_at_rest

WEIGHTS = "model.safetensors"
AT = CHUNK_BYTES + 12345
"""In the second chunk."""
ALWAYS = {"bytes_per_s": "100GB", "l1_period_s": 0.5, "l2_period_s": 0.5}


@pytest.fixture
def scrubbed(site: Site) -> Site:
    """Two models that share their weights, at both levels, looked at all the time; nothing asked of the origin yet."""
    files = model_files(CHUNK_BYTES + 3 * MB)
    site.add("m", files)
    site.add("twin", {"weights/other.safetensors": files[WEIGHTS]})
    site.settings |= {"scrub": ALWAYS, "transfer": {"retry_budget_s": 0.5, "max_attempts": 2}}
    site.start()
    for name in ("m", "twin"):
        site.pull(name)
    check_at_rest(site.daemon, content=False)
    site.proxy.clear()
    return site


def events(site: Site, kind: str) -> list[dict[str, str]]:
    return site.daemon.log_events(kind)


def _is_told(worker: Worker, damage: list[list[object]]) -> bool:
    return bool(worker.ask("damaged") == damage)


def test_flipped_bytes_at_both_levels_are_mended_without_a_request_and_all_holders_are_told(scrubbed: Site) -> None:
    site = scrubbed
    holders = {name: site.worker() for name in ("m", "twin")}
    for name, worker in holders.items():
        worker.ask("attach", ref=name)
    blob, segment = site.l2_blob("m", WEIGHTS), site.segment("m", WEIGHTS)
    right = sha256(site.files["m"][WEIGHTS])
    flip_byte(blob, AT)
    wait_for(lambda: sha256(blob.read_bytes()) == right, "L2 to be mended")
    flip_byte(segment, AT)
    for name, path in (("m", WEIGHTS), ("twin", "weights/other.safetensors")):
        worker, told = holders[name], [[path, CHUNK_BYTES, 3 * MB]]
        wait_for(partial(_is_told, worker, told), f"the holder of {name} to be told")
    wait_for(lambda: sha256(segment.read_bytes()) == right, "L1 to be mended")
    assert not site.proxy.requests(), "each level had what the other lacked"
    assert [event["at"] for event in events(site, "damage.repaired")] == ["l2", "l1"]
    site.check_served("m")
    counters = site.daemon.stats().counters
    assert counters['cached_repaired_chunks_total{level="l1"}'] == 1
    assert min(counters[f'cached_scrubbed_bytes_total{{level="{level}"}}'] for level in ("l1", "l2")) > CHUNK_BYTES


def test_what_cannot_be_mended_is_quarantined_and_named_until_the_origin_is_back(scrubbed: Site) -> None:
    site = scrubbed
    for name in ("m", "twin"):
        site.evict(name, "l1")
    site.proxy.inject("status", times=-1, status=503)
    flip_byte(site.l2_blob("m", WEIGHTS), AT)
    wait_for(lambda: site.summary("m").state == "quarantined", "the quarantine")
    assert site.summary("twin").state == "quarantined", "it has the same blob"
    (told,) = site.daemon.stats().degraded
    assert f"m, twin: chunk 1 of {WEIGHTS}" in told
    assert "503" in told
    assert not site.describe("m").path, "no directory shows what is damaged"
    assert f"quarantined: chunk 1 of {WEIGHTS}" in "".join(site.describe("m").notes)
    with refused("QUARANTINED"):
        site.check_served("m")
    tries = len(site.proxy.requests())
    wait_for(lambda: len(site.proxy.requests()) > tries, "another try")
    assert len(events(site, "damage.found")) == 2, "once by the scrubber, once by the attach"
    site.proxy.heal()
    wait_for(lambda: site.summary("m").state == site.summary("twin").state == "ready", "the end of the quarantine")
    assert not site.daemon.stats().degraded
    assert site.describe("twin").path
    site.check_served("m")


def test_when_it_was_verified_is_known_after_a_kill_and_nothing_is_read_before_it_is_due(site: Site) -> None:
    site.add("m", model_files(3 * MB))
    site.start()
    site.pull("m")
    check_at_rest(site.daemon, content=False)

    def verified() -> dict[int, float]:
        return {place.level: place.verified_time_s for place in site.describe("m").places}

    before = verified()
    assert all(before.values())
    site.daemon.restart(kill=True)
    check_at_rest(site.daemon, content=False)
    after = verified()
    assert after[pb.LEVEL_L2] == before[pb.LEVEL_L2]
    assert after[pb.LEVEL_L1] > before[pb.LEVEL_L1], "adoption is a look"
    stats = site.daemon.stats()
    assert stats.counters['cached_scrubbed_bytes_total{level="l2"}'] == 0
    assert (stats.scrub.bytes_per_s, stats.scrub.total_bytes) == (64_000_000, 0)


def test_a_copy_that_is_gone_is_written_again_from_the_other_level(scrubbed: Site) -> None:
    site = scrubbed
    blob = site.l2_blob("m", WEIGHTS)
    blob.unlink()
    wait_for(blob.exists, "the copy in L2")
    assert events(site, "l2.lost")
    site.segment("m", WEIGHTS).unlink()
    wait_for(lambda: events(site, "l1.lost"), "the loss to be found")
    assert site.check_served("m").from_level == "l2"
    assert not site.proxy.requests()
    assert not events(site, "damage.found"), "what is gone is not damaged"
