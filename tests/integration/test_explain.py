"""Why models are where they are, what another tier would lead to, and the host's own trace: from a real daemon."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cached.simulate.trace import read_trace
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import wait_for
from tests.integration.support import Site, model_files, refused, total_bytes
from tests.integration.test_evict import SMALL, resident

_CODE = "import sys; from cached.cli.main import main; sys.exit(main())"
FULL = {"l1": {"capacity": "70MB", "transient_capacity": "0B"}}
"""Room for three models."""


def started(site: Site, *names: str, **l1: str) -> None:
    """A host on which each model was attached as often as its place in the list says."""
    site.settings |= {"l1": FULL["l1"] | l1}
    for seed, name in enumerate([*names, "spare"], 1):
        site.add(name, model_files(SMALL, seed=seed))
    site.start()
    for times, name in enumerate(names, 1):
        for _ in range(times):
            site.check_served(name)


def cached(site: Site, *words: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", _CODE, "--socket", str(site.daemon.socket), *words],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def place(site: Site, name: str, level: int = pb.LEVEL_L1) -> pb.Place:
    (found,) = [place for place in site.describe(name).places if place.level == level]
    return found


def listed(site: Site, name: str) -> Any:
    return next(model for model in json.loads(cached(site, "ls", "-o", "json")) if model["name"] == name)


def what_if(site: Site, name: str, tier: int) -> pb.SetTierResponse:
    with site.rpc() as stub:
        return stub.SetTier(pb.SetTierRequest(ref=name, tier=tier, what_if=True))


def test_a_model_knows_what_it_is_worth_and_who_goes_before_it(site: Site) -> None:
    started(site, "seldom", "now-and-then", "often")
    places = [place(site, name) for name in ("seldom", "now-and-then", "often")]
    assert [list(place.evicted_before) for place in places] == [[], ["seldom"], ["seldom", "now-and-then"]]
    assert [place.evicted_before_count for place in places] == [0, 1, 2]
    assert 0 < places[0].worth_s < places[1].worth_s < places[2].worth_s
    for found in places:
        assert abs(found.worth_s - found.requests * found.reload_s) < 1e-6
        assert found.held_bytes == total_bytes(model_files(SMALL, seed=1))
    assert "it would go first" in places[0].why
    assert "2 would go before it" in places[2].why
    worth_s = places[2].worth_s
    wait_for(lambda: abs(listed(site, "often")["worth_s"] - worth_s) < 0.05 * worth_s, "the list's value, a second old")
    assert "2 would go before it" in cached(site, "show", "often")


def test_who_was_evicted_is_told_why_and_what_it_would_be_worth(site: Site) -> None:
    started(site, "a", "b", "c")
    site.pull("spare")
    (gone,) = {"a", "b", "c", "spare"} - resident(site)
    told = place(site, gone)
    assert told.held_bytes == 0
    assert told.worth_s > 0
    assert told.why.startswith("not in l1: there it would spare ")
    assert f"ago: {gone} left l1: " in told.why
    assert "ago: spare has a place in l1: " in place(site, "spare").why
    site.evict(gone, "all")
    everywhere = site.describe(gone).places
    assert [found.held_bytes for found in everywhere] == [0, 0], "it is nowhere, and known still"
    assert f"ago: {gone} left l2: operator" in everywhere[1].why


def test_the_protected_say_so(site: Site) -> None:
    started(site, "a", "b")
    with site.rpc() as stub:
        stub.Pin(pb.PinRequest(ref="a"))
    assert place(site, "a").why.endswith("pinned, so it is not evicted")
    with site.worker() as worker:
        worker.ask("attach", ref="b")
        assert "leased, so it is not evicted" in place(site, "b").why
        assert "in use" in cached(site, "ls")


def test_asking_what_if_tells_what_then_happens_and_changes_nothing(site: Site) -> None:
    started(site, "a", "b", "c")
    before = resident(site)
    answer = what_if(site, "spare", pb.TIER_HOT)
    assert answer.summary.tier == pb.TIER_HOT
    assert answer.loaded_bytes == 0, "nobody knows yet how large it is"
    site.pull("spare", level="l2")
    answer = what_if(site, "spare", pb.TIER_HOT)
    assert answer.loaded_bytes == total_bytes(model_files(SMALL, seed=4))
    (victim,) = answer.evictions
    assert (victim.name, victim.reason) == ("a", "worth least")
    assert resident(site) == before, "nothing was done"
    assert site.describe("spare").summary.tier == pb.TIER_AUTO
    with site.rpc() as stub:
        stub.SetTier(pb.SetTierRequest(ref="spare", tier=pb.TIER_HOT))
    wait_for(lambda: "spare" in resident(site), "the hot model")
    assert resident(site) == before - {victim.name} | {"spare"}
    assert [item.name for item in what_if(site, "b", pb.TIER_COLD).evictions] == ["b"]
    assert not what_if(site, "b", pb.TIER_WARM).evictions


def test_more_hot_bytes_than_there_may_be_are_refused_with_who_has_them(site: Site) -> None:
    started(site, "a", "b", hot_capacity="30MB")
    with site.rpc() as stub:
        stub.SetTier(pb.SetTierRequest(ref="a", tier=pb.TIER_HOT))
    for asked in (True, False):
        with refused("NO_ROOM") as fields, site.rpc() as stub:
            stub.SetTier(pb.SetTierRequest(ref="b", tier=pb.TIER_HOT, what_if=asked))
        assert fields["holders"].startswith("a (")
    level = site.level("l1")
    assert level.hot_bytes == total_bytes(model_files(SMALL, seed=1))
    assert level.hot_capacity_bytes == 30_000_000
    assert json.loads(cached(site, "stats", "-o", "json"))["levels"][0]["hot_bytes"] == level.hot_bytes


def test_the_trace_of_a_host_can_be_simulated_and_outlives_restarts(site: Site, tmp_path: Path) -> None:
    started(site, "a", "b")
    with site.worker() as worker:
        worker.ask("attach", ref="a")
        held = cached(site, "stats", "--trace")
        assert held.splitlines()[-1].endswith(",0.000"), "it is held still"
    wait_for(lambda: not site.leases(), "the lease's end")
    exported = cached(site, "stats", "--trace")
    site.daemon.restart()
    assert cached(site, "stats", "--trace") == exported
    site.check_served("b")
    (tmp_path / "trace.csv").write_text(cached(site, "stats", "--trace"))
    rows = read_trace(tmp_path / "trace.csv")
    assert [row.model for row in rows] == ["a", "b", "b", "a", "b"]
    assert {row.model: row.size_bytes for row in rows} == {
        name: total_bytes(model_files(SMALL, seed=seed)) for seed, name in enumerate("ab", 1)
    }
    words = (
        "simulate",
        str(tmp_path / "trace.csv"),
        "--l1",
        "64MB",
        "--l2",
        "1GB",
        "--policy",
        "default",
        "-o",
        "json",
    )
    simulated = json.loads(cached(site, *words))["policies"]["default"]
    assert (simulated["attaches"], simulated["l1_hits"]) == (5, 3)
