"""Files that models share: stored once at each level, fetched once if that is known, kept while anybody has them."""

from __future__ import annotations

from cached.units import CHUNK_BYTES
from tests.integration.support import MB, Site, model_files, safetensors, sha256, total_bytes
from tests.invariants import check_at_rest

SHARED = safetensors(CHUNK_BYTES + 2 * MB, 77)


def two(site: Site, *, digests: bool) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Models ``a`` and ``b`` with one shard in common, under different names."""
    first = {**model_files(3 * MB, seed=1), "shared.safetensors": SHARED}
    second = {**model_files(4 * MB, seed=2), "same-bytes.safetensors": SHARED}
    for name, files in (("a", first), ("b", second)):
        known = {path: sha256(data) for path, data in files.items()} if digests else {}
        site.add(name, files, sha256=known)
    site.settings |= {"l1": {"pool_bytes": "0B"}}
    return first, second


def stored_once(site: Site) -> None:
    once = sum(len(data) for data in {d for files in site.files.values() for d in files.values()})
    check_at_rest(site.daemon)
    assert {site.level(name).used_bytes for name in ("l1", "l2")} == {once}


def test_a_shard_whose_digest_is_known_is_fetched_and_stored_once(site: Site) -> None:
    first, second = two(site, digests=True)
    site.start()
    site.pull("a")
    site.proxy.clear()
    last = site.pull("b")[-1]
    assert site.proxy.get_bytes() == total_bytes(second) - len(SHARED)
    assert last.reused_bytes == len(SHARED)
    stored_once(site)
    shared = {file.path: list(file.shared_with) for file in site.describe("b").files if file.shared_with}
    assert shared == {"same-bytes.safetensors": ["a"]}
    freed = site.evict("a", "all")
    gone = total_bytes(first) - len(SHARED)
    assert (freed.l1_freed_bytes, freed.l2_freed_bytes) == (gone, gone), "what b has stays"
    site.check_served("b")
    check_at_rest(site.daemon)
    site.proxy.clear()
    site.check_served("a")
    assert site.proxy.get_bytes() == gone


def test_both_at_once_fetch_it_once(site: Site) -> None:
    two(site, digests=True)
    site.start()
    held = site.hold(".safetensors", times=4, after_bytes=100)
    for name in "ab":
        site.begin(name)
    assert held.reached.wait(60)
    held.release()
    check_at_rest(site.daemon)
    for name in "ab":
        site.check_served(name)
    everything = {d for files in site.files.values() for d in files.values()}
    assert site.proxy.get_bytes() == sum(map(len, everything))
    stored_once(site)


def test_a_shard_that_is_only_recognised_when_it_is_there_is_stored_once(site: Site) -> None:
    two(site, digests=False)
    site.start()
    site.pull("a")
    site.pull("b")
    stored_once(site)
    site.evict("a", "all")
    site.check_served("b")


def test_what_another_model_had_already_is_fetched_where_it_is_gone(site: Site) -> None:
    """It was never fetched for this model, but the origin's marker of it is known."""
    two(site, digests=True)
    site.start()
    site.pull("a")
    site.pull("b")
    site.evict("a", "all")
    site.evict("b")
    site.l2_blob("b", "same-bytes.safetensors").unlink()
    with site.cache() as cache, cache.attach("b", only=["*"], timeout_s=60) as model:
        model.wait()
    site.check_served("b")


def test_a_shard_only_in_l2_is_promoted_for_the_other_model(site: Site) -> None:
    _, second = two(site, digests=True)
    site.start()
    site.pull("a", level="l2")
    site.proxy.clear()
    last = site.pull("b")[-1]
    assert (last.disk_bytes, last.origin_bytes) == (len(SHARED), total_bytes(second) - len(SHARED))
    assert site.summary("a").l1_bytes == len(SHARED)
    site.check_served("b")
    assert site.check_served("a").reused_bytes == len(SHARED)
    stored_once(site)


def test_two_paths_of_one_model_with_the_same_bytes(site: Site) -> None:
    same = safetensors(2 * MB, 5)
    files = {"model.safetensors": same, "copy.safetensors": same, "config.json": b"{}"}
    site.add("m", files, sha256={path: sha256(data) for path, data in files.items()})
    site.start()
    site.pull("m")
    site.check_served("m")
    assert site.proxy.get_bytes() == len(same) + 2
    site.daemon.restart(kill=True)
    site.check_served("m")
    stored_once(site)


def test_removing_one_revision_keeps_what_the_next_one_has(site: Site) -> None:
    site.add("m", {**model_files(MB, seed=1), "shared.safetensors": SHARED})
    site.start()
    old = site.pull("m")[-1].revision
    site.files["m"] = {**model_files(MB, seed=2), "shared.safetensors": SHARED}
    site.upload("m", site.files["m"])
    site.pull("m")
    site.evict(f"m@{old}", "all")
    site.check_served("m")
    check_at_rest(site.daemon)
    assert old not in site.describe("m").revisions
