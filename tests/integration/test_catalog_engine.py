"""What the catalog says, and what a change of it does to the models that are here."""

from __future__ import annotations

import signal
import subprocess

from tests.integration.harness import wait_for
from tests.integration.support import MB, SERVE, Site, model_files, refused
from tests.invariants import check_at_rest


def test_a_model_added_to_the_file_can_be_pulled_without_a_signal(site: Site) -> None:
    site.start()
    with refused("NO_SOURCE"):
        site.pull("m")
    site.add("m", model_files(MB))
    wait_for(lambda: any(event["models"] == 1 for event in site.daemon.log_events("catalog.loaded")), "the catalog")
    site.pull("m")
    site.check_served("m")


def test_a_bad_catalog_keeps_the_old_one_and_says_what_is_wrong(site: Site) -> None:
    site.add("m", model_files(MB))
    site.start()
    site.daemon.catalog_file.write_text('{"models": {"m": {"sorce": "s3://b/m"}}}')
    site.daemon.signal(signal.SIGHUP)
    refusal = site.daemon.wait_event("catalog.refused")
    assert "sorce" in refusal["error"]
    assert refusal["kept_old"] is True
    site.pull("m")
    site.check_served("m")


def test_a_model_that_becomes_hot_is_brought_and_stays(site: Site) -> None:
    site.add("m", model_files(MB))
    site.start()
    site.models["m"]["tier"] = "hot"
    site.reload_catalog()
    wait_for(lambda: site.summary("m").state == "ready", "the hot model to be brought")
    assert (site.summary("m").tier, site.summary("m").l1_bytes > MB) == ("hot", True)
    with refused("IN_USE"):
        site.evict("m")
    site.models["m"]["tier"] = "cold"
    site.reload_catalog()
    wait_for(lambda: site.summary("m").l1_bytes == 0, "the model that became cold to leave L1")


def test_a_model_that_left_the_catalog_stays_and_can_be_removed(site: Site) -> None:
    site.add("m", model_files(MB))
    site.start()
    site.pull("m")
    del site.models["m"]
    site.reload_catalog()
    site.check_served("m")
    site.evict("m", "all")
    with refused("NO_SOURCE"):
        site.pull("m")
    check_at_rest(site.daemon)


def test_the_catalogs_source_counts_and_its_patterns_choose(site: Site) -> None:
    files = {**model_files(MB), "extra.json": b"{}", "model.gguf": b"GGUF" + bytes(100)}
    site.add("m", files, include=["*.gguf", "*.json"], exclude=["extra.json"])
    site.start()
    with refused("INVALID_REQUEST") as seen:
        site.pull("m", source="s3://elsewhere/m")
    assert "catalog" in seen["message"]
    site.pull("m")
    assert {file.path for file in site.describe("m").files} == {"config.json", "tokenizer.json", "model.gguf"}


def test_a_uri_and_another_source_are_refused_whatever_is_here(site: Site) -> None:
    """Both a cold model and one that no origin would be asked for; nothing of the other source is taken."""
    files = site.files["m"] = model_files(MB)
    site.upload("m", files)
    site.upload("other/m", model_files(MB, seed=2))
    site.start()
    for _ in range(2):
        with refused("INVALID_REQUEST") as seen:
            site.pull(site.uri("m"), source=site.uri("other/m"))
        assert site.uri("m") in seen["message"]
        assert site.uri("other/m") in seen["message"]
        with site.cache() as cache, refused("INVALID_REQUEST"):
            cache.attach(site.uri("m"), source=site.uri("other/m"), wait=True)
        for words in (("run", "--source"), ("path", "--pull", "--source")):
            command = [*SERVE, "--socket", str(site.daemon.socket), *words, site.uri("other/m"), site.uri("m")]
            ran = subprocess.run(
                [*command, "--", "true"] if "run" in words else command, capture_output=True, text=True, timeout=60
            )
            assert ran.returncode == 2, ran.stderr
            assert "two sources are given" in ran.stderr
        site.pull(site.uri("m"), source=site.uri("m"))
        site.check_served("m")


def test_the_operators_tier_outlives_a_restart_and_the_stronger_one_counts(site: Site) -> None:
    site.add("m", model_files(MB), tier="cold")
    site.start()
    site.pull("m", tier="warm")
    assert site.describe("m").summary.tier_from == "operator"
    site.daemon.restart(kill=True)
    assert (site.summary("m").tier, site.describe("m").summary.tier_from) == ("warm", "operator")
    site.models["m"]["tier"] = "hot"
    site.reload_catalog()
    assert (site.summary("m").tier, site.describe("m").summary.tier_from) == ("hot", "catalog")


def test_the_catalog_outlives_restarts_in_either_order(site: Site) -> None:
    site.add("m", model_files(MB), tier="warm", priority=3)
    site.start()
    site.pull("m")
    site.daemon.restart(kill=True)
    summary = site.describe("m").summary
    assert (summary.priority, site.summary("m").tier, summary.tier_from) == (3, "warm", "catalog")
