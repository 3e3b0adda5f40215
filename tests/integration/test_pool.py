"""L1's pool: memory that is ready before a load needs it."""

from __future__ import annotations

from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, model_files
from tests.invariants import check_at_rest

MIB = 1024 * 1024


def test_the_pool_is_filled_ahead_and_the_first_load_takes_it(site: Site) -> None:
    site.settings |= {"l1": {"capacity": "512MiB", "pool_bytes": "auto", "pool_reserve_bytes": "100MiB"}}
    site.add("m", model_files(45 * MB))
    site.start()
    wait_for(lambda: len(site.segments("pool")) == 2, "the pool to be filled")
    ahead = {path.stat().st_ino: path.stat() for path in site.segments("pool")}
    assert sorted(status.st_size for status in ahead.values()) == [32 * MIB, 50 * MIB]
    wait_for(lambda: all(p.stat().st_blocks * 512 == p.stat().st_size for p in site.segments("pool")), "its pages")
    site.check_served("m")
    assert site.segment("m", "model.safetensors").stat().st_ino in ahead
    check_at_rest(site.daemon)


def test_the_pool_is_filled_with_the_sizes_of_models_that_are_not_in_memory(site: Site) -> None:
    site.settings |= {"l1": {"capacity": "512MiB", "pool_bytes": "auto", "pool_reserve_bytes": "100MiB"}}
    files = site.add("m", model_files(45 * MB))
    site.start()
    site.pull("m", level="l2")
    site.daemon.restart()
    size_bytes = len(files["model.safetensors"])
    wait_for(lambda: size_bytes in {path.stat().st_size for path in site.segments("pool")}, "a segment of its size")
    check_at_rest(site.daemon)


def test_the_pool_never_takes_more_than_its_limit_nor_than_there_is(site: Site) -> None:
    site.settings |= {"l1": {"capacity": "96MiB", "pool_bytes": "64MiB", "pool_reserve_bytes": "1GiB"}}
    site.add("m", model_files(60 * MB))
    site.start()
    wait_for(lambda: site.level("l1").pool_bytes == 64 * MIB, "the pool to be filled to its limit")
    site.check_served("m")
    level = site.level("l1")
    assert level.used_bytes <= level.capacity_bytes
    check_at_rest(site.daemon)
