"""A daemon in a cluster: labels of its node, slots for pulls that nobody waits for, and an API that goes away."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cached.fleet.slots import lease_name
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, model_files
from tests.kube_api import KubeServer

PREFIX = "models.cached.local"


@pytest.fixture
def kube(site: Site, tmp_path: object) -> Iterator[KubeServer]:
    """An API that the site's daemon knows, with its node."""
    with KubeServer() as server:
        server.add_node("node-1", **{f"{PREFIX}/stale": "old", f"l1.{PREFIX}/stale": "old", "zone": "a"})
        config = server.write_config(site.folder / "kubeconfig")
        environment = site.environment
        site.environment = lambda: environment() | {"KUBECONFIG": str(config)}  # type: ignore[method-assign]
        yield server
        site.close()  # while there is an API


def test_the_node_has_labels_of_the_models_that_are_ready_and_of_no_others(site: Site, kube: KubeServer) -> None:
    site.settings |= {"fleet": {"node_labels": True, "node_name": "node-1"}}
    site.add("m", model_files(MB))
    site.start()
    wait_for(lambda: not kube.labels("node-1", "stale"), "stale labels to go")
    site.pull("m")
    revision = site.summary("m").revision[:12]
    want = {f"{PREFIX}/m": revision, f"l1.{PREFIX}/m": revision}
    wait_for(lambda: kube.labels("node-1", PREFIX) == want, "the labels of a model in memory")
    site.evict("m", "l1")
    wait_for(lambda: kube.labels("node-1", PREFIX) == {f"{PREFIX}/m": revision}, "the label of one on disk")
    with kube.refusing(429, method="PATCH", times=1, retry_after_s=1) as refused:
        site.evict("m", "l2")
        wait_for(lambda: refused.hits, "a patch that is throttled")
        wait_for(lambda: any("labels are not up to date" in why for why in site.daemon.stats().degraded), "that told")
        wait_for(lambda: not kube.labels("node-1", PREFIX), "the label to go nevertheless")
    wait_for(lambda: not site.daemon.stats().degraded, "all to be well again")
    site.pull("m")
    wait_for(lambda: kube.labels("node-1", PREFIX) == want, "the labels again")
    site.daemon.terminate()
    assert kube.labels("node-1") == {"kubernetes.io/hostname": "node-1", "zone": "a"}


def test_an_api_that_is_away_or_refuses_is_told_and_disturbs_nobody(site: Site, kube: KubeServer) -> None:
    site.settings |= {"fleet": {"node_labels": True, "node_name": "node-1"}}
    site.add("m", model_files(MB))
    with kube.refusing(403):
        site.start()
        (problem,) = wait_for(lambda: list(site.daemon.stats().degraded), "the problem")
        assert "403" in problem
        site.check_served("m")


def test_a_pull_that_nobody_waits_for_waits_for_a_slot_and_one_that_somebody_waits_for_does_not(
    site: Site, kube: KubeServer
) -> None:
    site.settings |= {"fleet": {"slots": 1, "node_name": "node-1", "namespace": "ml"}}
    kube.hold(lease_name(0), "node-2", namespace="ml", duration_s=3600)
    for seed, name in enumerate(("hot", "wanted"), 1):
        site.add(name, model_files(MB, seed=seed), tier="hot")
    site.start()
    wait_for(lambda: len(site.daemon.log_events("pull.waiting")) == 2, "both to wait")
    site.check_served("wanted")
    assert site.proxy.get_bytes("hot/") == 0
    note = next(note for note in site.describe("hot").notes if "waits for one of the 1 slots" in note)
    assert note
    kube.hold(lease_name(0), "", namespace="ml")
    wait_for(lambda: site.summary("hot").state == "ready", "the one that waited")
    wait_for(lambda: not kube.holder(lease_name(0), "ml"), "the slot to be given back")
    assert site.daemon.log_events("pull.turn")[0]["slot"] == lease_name(0)
    assert not any("waits" in note for note in site.describe("hot").notes)


def test_a_pull_is_put_off_by_chance_and_an_attach_is_not(site: Site) -> None:
    site.settings |= {"fleet": {"jitter_s": 86400.0}}
    site.add("m", model_files(MB), tier="hot")
    site.start()
    (event,) = wait_for(lambda: site.daemon.log_events("pull.put_off"), "the pull to be put off")
    assert 0 <= event["delay_s"] <= 86400
    assert site.proxy.get_bytes() == 0
    site.check_served("m")


def test_settings_of_the_fleet_that_cannot_be_used_are_told(site: Site) -> None:
    site.settings |= {"fleet": {"label_prefix": "Not/A/Prefix"}}
    site.daemon.start(wait=False)
    assert site.daemon.wait() != 0
    assert "a domain name such as" in site.daemon.log()
    site.check = False
