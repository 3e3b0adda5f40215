"""Damage: found by checksum wherever bytes move or are looked at, mended by the range, and told when it cannot be."""

from __future__ import annotations

import pytest

from cached.units import CHUNK_BYTES
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, flip_byte, model_files, refused, sha256
from tests.invariants import check_at_rest

WEIGHTS = "model.safetensors"
AT = 2 * CHUNK_BYTES + 12345
"""In the third chunk."""
RANGE = f"bytes={2 * CHUNK_BYTES}-{3 * CHUNK_BYTES - 1}"


@pytest.fixture
def pulled(site: Site) -> Site:
    """A model of four chunks at both levels, nothing asked of the origin yet."""
    site.add("m", model_files(3 * CHUNK_BYTES + 5 * MB))
    site.settings |= {"transfer": {"retry_budget_s": 1.0, "max_attempts": 2}}
    site.start()
    site.pull("m")
    check_at_rest(site.daemon, content=False)
    site.proxy.clear()
    return site


def counter(site: Site, name: str) -> float:
    """Summed over its labels."""
    return sum(value for key, value in site.daemon.stats().counters.items() if key.partition("{")[0] == name)


def test_verify_finds_nothing_where_nothing_is_wrong(pulled: Site) -> None:
    found, last = pulled.verify()
    assert not found
    size_bytes = sum(file.size_bytes for file in pulled.describe("m").files)
    assert (last.done_bytes, last.total_bytes, last.damaged_chunks) == (2 * size_bytes, 2 * size_bytes, 0)
    assert not pulled.proxy.requests()


def test_a_flipped_byte_in_l2_is_found_and_mended_by_one_ranged_get(pulled: Site) -> None:
    site = pulled
    site.evict("m", "l1")
    blob = site.l2_blob("m", WEIGHTS)
    flip_byte(blob, AT)
    for repair in (False, True):
        found, last = site.verify("m", repair=repair)
        (damage,) = found
        assert (damage.name, damage.path, damage.level) == ("m", WEIGHTS, pb.LEVEL_L2)
        assert (damage.chunk_index, damage.offset_bytes, damage.length_bytes) == (2, 2 * CHUNK_BYTES, CHUNK_BYTES)
        assert (damage.repaired, last.damaged_chunks, last.repaired_chunks) == (repair, 1, int(repair))
        assert site.ranges() == ([RANGE] if repair else [])
    assert sha256(blob.read_bytes()) == sha256(site.files["m"][WEIGHTS])
    assert not site.verify("m")[0]
    assert site.check_served("m").from_level == "l2"
    assert site.ranges() == [RANGE], "one ranged GET, and no other"


def test_a_flipped_byte_in_l1_is_mended_from_l2_and_the_holder_is_told(pulled: Site) -> None:
    site = pulled
    worker = site.worker()
    worker.ask("attach", ref="m")
    flip_byte(site.segment("m", WEIGHTS), AT)
    (damage,), _ = site.verify("m", repair=True)
    assert (damage.level, damage.repaired, damage.chunk_index) == (pb.LEVEL_L1, True, 2)
    wait_for(lambda: worker.ask("damaged") == [[WEIGHTS, 2 * CHUNK_BYTES, CHUNK_BYTES]], "the holder to be told")
    assert not site.proxy.requests(), "L2 has it"
    site.check_served("m")


def test_damage_in_l2_is_mended_in_both_levels_when_it_is_met_at_promotion(pulled: Site) -> None:
    site = pulled
    site.evict("m", "l1")
    blob = site.l2_blob("m", WEIGHTS)
    flip_byte(blob, AT)
    assert site.check_served("m").from_level == "l2"
    assert site.ranges() == [RANGE], "one ranged GET"
    check_at_rest(site.daemon)
    assert sha256(blob.read_bytes()) == sha256(site.files["m"][WEIGHTS])
    assert counter(site, "cached_checksum_failures_total") == 1
    assert counter(site, "cached_repaired_chunks_total") == 1


def test_damage_that_cannot_be_mended_quarantines_until_the_origin_is_back(pulled: Site) -> None:
    site = pulled
    site.evict("m", "l1")
    flip_byte(site.l2_blob("m", WEIGHTS), AT)
    site.proxy.inject("status", times=-1, status=503)
    (damage,), last = site.verify("m", repair=True)
    assert not damage.repaired
    assert "503" in damage.error
    assert (last.damaged_chunks, last.repaired_chunks) == (1, 0)
    assert site.summary("m").state == "quarantined"
    with refused("QUARANTINED") as seen:
        site.check_served("m")
    assert (seen["path"], seen["offset_bytes"]) == (WEIGHTS, str(2 * CHUNK_BYTES))
    assert "verify --repair" in seen["hint"]
    check_at_rest(site.daemon, content=False)
    site.proxy.heal()
    (damage,), _ = site.verify("m", repair=True)
    assert damage.repaired
    assert site.summary("m").state == "ready"
    site.check_served("m")


def test_a_quarantined_model_mends_itself_with_the_next_attach_once_the_origin_is_back(pulled: Site) -> None:
    site = pulled
    site.evict("m", "l1")
    flip_byte(site.l2_blob("m", WEIGHTS), AT)
    site.proxy.inject("status", times=-1, status=503)
    with refused("QUARANTINED"):
        site.check_served("m")
    assert site.summary("m").state == "quarantined"
    site.proxy.heal()
    site.check_served("m")
    assert site.summary("m").state == "ready"


def test_damage_in_l1_that_cannot_be_mended_is_not_handed_out(pulled: Site) -> None:
    site = pulled
    site.evict("m", "l2")
    flip_byte(site.segment("m", WEIGHTS), AT)
    site.proxy.inject("status", times=-1, status=503)
    (damage,), _ = site.verify("m", repair=True)
    assert (damage.level, damage.repaired) == (pb.LEVEL_L1, False)
    with refused("QUARANTINED"):
        site.check_served("m")
    site.proxy.heal()
    site.check_served("m")
    assert site.summary("m").state == "ready"
    assert not site.verify("m")[0]


def test_the_origin_has_other_bytes_now_so_damage_stays_damage(pulled: Site) -> None:
    """Never a mix: what the origin has at that path now is not what this revision has."""
    site = pulled
    site.evict("m", "l1")
    flip_byte(site.l2_blob("m", WEIGHTS), AT)
    site.upload("m", model_files(3 * CHUNK_BYTES + 5 * MB, seed=2))
    (damage,), _ = site.verify("m", repair=True)
    assert not damage.repaired
    with refused("QUARANTINED"):
        site.check_served("m")
    last = site.pull("m")[-1]
    site.files["m"] = model_files(3 * CHUNK_BYTES + 5 * MB, seed=2)
    site.check_served("m")
    with site.rpc() as stub:
        old = next(revision for revision in site.describe("m").revisions if revision != last.revision)
        stub.Evict(pb.EvictRequest(ref=f"m@{old}"))


def test_the_same_bytes_uploaded_again_still_mend(pulled: Site) -> None:
    site = pulled
    site.evict("m", "l1")
    flip_byte(site.l2_blob("m", WEIGHTS), AT)
    site.upload("m", site.files["m"])
    (damage,), _ = site.verify("m", repair=True)
    assert damage.repaired


def test_verify_without_repair_of_all_models_names_each_damage(pulled: Site) -> None:
    site = pulled
    site.add("other", model_files(2 * MB, seed=5))
    site.reload_catalog()
    site.pull("other")
    flip_byte(site.l2_blob("m", WEIGHTS), AT)
    flip_byte(site.segment("other", WEIGHTS), 7)
    found, _ = site.verify()
    assert {(damage.name, damage.level, damage.chunk_index) for damage in found} == {
        ("m", pb.LEVEL_L2, 2),
        ("other", pb.LEVEL_L1, 0),
    }
    assert site.verify(repair=True)[1].repaired_chunks == 2
    assert not site.ranges(WEIGHTS)[1:], "each level mends the other"
