"""Access lists: what a caller may not know of answers as what is not there, on every surface, to the last byte."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import cached_client
from cached_client import CacheError, artifacts
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import PAGES, DaemonProcess, wait_for
from tests.integration.support import Worker, refused
from tests.integration.users import ANN, BEN, CLO, Open, needs_root, shared_daemon

pytestmark = needs_root

SECRET, ABSENT = "kestrel-70b", "kestrel-71b"
"""Ben may not know of the first, and nobody knows the second."""
TEAM = 61100
KEY = {"engine": "vllm", "model": SECRET}
_TRACE_ID = re.compile(r"trace_id\x12 [0-9a-f]{32}")
_IDS = re.compile(r'"(leaseId|token|timeS|sinceTimeS|uptimeS|instance)": ("[^"]*"|[0-9.e+]+)')


class Host:
    """A daemon with Ann's model, Ben's by their tenant, and one for all; Ann holds hers."""

    def __init__(self, daemon: DaemonProcess, as_user: Open) -> None:
        self.daemon = daemon
        self.as_user = as_user
        self.ann, self.ben = as_user(ANN), as_user(BEN)
        assert self.ann.ask("attach", ref=SECRET)
        report = {"name": SECRET, "totalS": 2.0, "phases": [{"name": "imports", "endS": 1.0}]}
        assert self.ann.ask("call", method="ReportColdStart", coldStart=report)["code"] == "OK"


@contextmanager
def _host() -> Iterator[Host]:
    models = {
        SECRET: {"access": {"uids": [ANN], "gids": [TEAM]}},
        "bens": {"tenant": "two"},
        "open": {},
        "adapter": {"base": SECRET, "access": {"uids": [BEN]}},
    }
    tenants = {"two": {"access": {"uids": [BEN]}}}
    with shared_daemon(models, tenants=tenants, settings={"artifacts": {"save": True}, **PAGES}) as (daemon, as_user):
        yield Host(daemon, as_user)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with _host() as made:
        yield made


@pytest.fixture
def fresh_host() -> Iterator[Host]:
    """One that a test may restart."""
    with _host() as made:
        yield made


def told(user: Worker, name: str, method: str, request: dict[str, Any]) -> str:
    """All that comes back, with the name itself taken out."""
    filled = json.loads(json.dumps(request).replace("NAME", name))
    answer = user.ask("call", method=method, **filled)
    if "grpc-status-details-bin" in answer:
        details = bytes.fromhex(answer["grpc-status-details-bin"]).decode("latin-1")
        answer["grpc-status-details-bin"] = _TRACE_ID.sub("trace_id", details)
    return _IDS.sub("", json.dumps(answer)).replace(name, "NAME")


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Attach", {"ref": "NAME"}),
        ("Attach", {"ref": "NAME@abcd1234"}),
        ("Attach", {"ref": "NAME", "resume": True}),
        ("Attach", {"ref": "NAME@abcd1234", "resume": True}),
        ("Attach", {"ref": "NAME", "onlyIfResident": True}),
        ("Attach", {"ref": "NAME", "keepAliveS": 1e9}),
        ("Attach", {"ref": "NAME", "selection": {"tensors": ["t0.*"]}}),
        ("Attach", {"ref": "NAME", "source": "file:///etc"}),
        ("Attach", {"ref": "file:///etc/NAME"}),
        ("Pull", {"ref": "NAME"}),
        ("Pull", {"ref": "NAME@abcd1234"}),
        ("Pull", {"ref": "NAME", "noWait": True}),
        ("Pull", {"ref": "NAME", "level": "LEVEL_L2"}),
        ("Pull", {"ref": "NAME", "source": "file:///etc"}),
        ("Pull", {"ref": "NAME", "tier": "TIER_HOT"}),
        ("Pull", {"ref": "NAME", "atTimeS": 4e9}),
        ("Describe", {"ref": "NAME"}),
        ("Describe", {"ref": "NAME@abcd1234"}),
        ("SetTier", {"ref": "NAME", "tier": "TIER_COLD"}),
        ("SetTier", {"ref": "NAME", "tier": "TIER_HOT", "whatIf": True}),
        ("Pin", {"ref": "NAME"}),
        ("Unpin", {"ref": "NAME"}),
        ("Evict", {"ref": "NAME"}),
        ("Remove", {"ref": "NAME"}),
        ("Verify", {"ref": "NAME"}),
        ("Trace", {}),
        ("ListColdStarts", {"ref": "NAME"}),
        ("ReportColdStart", {"coldStart": {"name": "NAME", "totalS": 1.0}}),
    ],
)
def test_what_a_caller_may_not_know_of_answers_as_what_is_not_there(
    host: Host, method: str, request_: dict[str, Any]
) -> None:
    hidden = told(host.ben, SECRET, method, request_)
    assert hidden == told(host.ben, ABSENT, method, request_)
    assert '"code": "OK"' not in hidden


def test_nothing_that_lists_tells_of_it(host: Host) -> None:
    before = host.ben.ask("call", method="Stats")
    for method in ("List", "ListLeases", "Overview"):
        assert SECRET in json.dumps(host.ann.ask("call", method=method)), method
    for method, request in (
        ("List", {}), ("ListLeases", {}), ("Stats", {}), ("Overview", {}), ("ListArtifacts", {}),
        ("Describe", {"ref": "adapter"}),
    ):  # fmt: skip
        answer = host.ben.ask("call", method=method, **request)
        assert answer["code"] == "OK"
        assert SECRET not in json.dumps(answer), method
    stats = before["answers"][0]
    assert (stats["modelCount"], stats.get("leaseCount", 0), stats.get("counters", {})) == (3, 0, {})
    names = [item["name"] for item in host.ben.ask("call", method="List")["answers"][0]["models"]]
    assert names == ["adapter", "bens", "open"]


def test_events_are_told_to_those_who_may_know(host: Host) -> None:
    assert host.ben.ask("attach", ref="open")
    opened = host.daemon.wait_event("lease.opened", lambda item: item["model"] == "open")
    assert opened
    for user, name, seen in ((host.ben, "open", True), (host.ann, SECRET, True), (host.ben, SECRET, False)):
        kinds = user.ask("call", method="Watch", replay=True, limit=2)["answers"]
        assert (name in json.dumps(kinds)) is seen
    host.ben.ask("release")


def test_what_was_refused_is_no_news_that_would_tell_hidden_from_absent(host: Host) -> None:
    for name in (SECRET, ABSENT):
        told(host.ben, name, "Attach", {"ref": "NAME"})
    host.daemon.wait_event("rpc.refused", lambda item: item["model"] == ABSENT)
    assert host.ben.ask("attach", ref="open")
    news = host.ben.ask("call", method="Watch", replay=True, within_s=3.0)["answers"]  # what was is told first
    assert "open" in json.dumps(news)
    assert ABSENT not in json.dumps(news)
    assert SECRET not in json.dumps(news)
    host.ben.ask("release")


def test_the_page_the_metrics_and_the_directory_view_keep_it_to_themselves(host: Host) -> None:
    for path in ("/", "/metrics", "/readyz"):
        with urllib.request.urlopen(host.daemon.http + path) as answer:
            text = answer.read().decode()
            assert SECRET not in text, path
            assert path == "/readyz" or "bens" not in text
    assert host.ben.ask("listdir", path=str(host.daemon.models_dir)) == "PermissionError"
    for folder in (host.daemon.state_dir, host.daemon.l2_dir, host.daemon.socket.parent / ".cached"):
        assert host.ben.ask("listdir", path=str(folder)) == "PermissionError"


def test_those_who_may_use_it_as_ever(host: Host) -> None:
    member = host.as_user(CLO, TEAM)
    assert member.ask("attach", ref=SECRET) == host.ann.ask("attach", ref=SECRET)
    assert host.ben.ask("attach", ref="bens")
    with refused("NO_SOURCE"):
        host.ann.ask("attach", ref="bens")
    with refused("PERMISSION_DENIED"):
        _raise(host.ann.ask("call", method="Evict", ref=SECRET))
    for user in (member, host.ben):
        user.ask("release")


def test_an_artifact_is_there_for_those_who_may_see_its_model(host: Host, tmp_path: Path) -> None:
    (tmp_path / "compiled").write_bytes(b"code")
    with cached_client.connect(str(host.daemon.socket)) as cache:
        saved = artifacts.save(cache, tmp_path, KEY)
    assert saved.outcome == "stored"
    absent = {**KEY, "model": ABSENT}
    answers = {
        user: [host.__dict__[user].ask("call", method="FindArtifact", key=key)["answers"][0] for key in (KEY, absent)]
        for user in ("ann", "ben")
    }
    assert answers["ann"][0]["artifact"]["key"] == KEY
    assert [set(answer) for answer in answers["ben"]] == [{"name", "descriptorSocket"}] * 2
    assert host.ann.ask("call", method="Attach", ref=saved.name, limit=1)["code"] == "OK"
    names = [saved.name, answers["ben"][1]["name"], f"artifact.{'0' * 64}"]
    for method, request in (("Attach", {"ref": "NAME"}), ("Pull", {"ref": "NAME"}), ("Describe", {"ref": "NAME"})):
        assert len({told(host.ben, name, method, request) for name in names}) == 1
    for user, count in (("ann", 1), ("ben", 0)):
        listed = host.__dict__[user].ask("call", method="ListArtifacts")["answers"][0]
        assert len(listed.get("artifacts", ())) == count


def test_a_token_helps_nobody_else(host: Host) -> None:
    attached = host.ann.ask("call", method="Attach", ref=SECRET, limit=1)["answers"][0]["opened"]
    assert host.ben.ask("fetch", token=attached["token"]) == host.ben.ask("fetch", token="f" * 64)
    held = [item["leaseId"] for item in host.ann.ask("call", method="ListLeases")["answers"][0]["leases"]]
    assert held
    answers = [
        told(host.ben, lease_id, "Detach", {"leaseId": "NAME", "token": "f" * 64}) for lease_id in (held[0], "00000000")
    ]
    assert answers[0] == answers[1]


def test_an_operator_can_look_up_who_was_not_told(host: Host) -> None:
    assert host.ben.ask("call", method="Describe", ref=SECRET)["code"] == "NOT_FOUND"
    host.daemon.wait_event("access.hidden", lambda item: (item["caller"], item["model"]) == (f"uid {BEN}", SECRET))
    with host.daemon.stub() as stub:  # root is one
        notes = stub.Describe(pb.DescribeRequest(ref=SECRET)).notes
    assert f"seen by uid {ANN}, members of gid {TEAM}, operators" in notes
    assert "seen by" not in json.dumps(host.ann.ask("call", method="Describe", ref=SECRET))


def test_a_group_that_reads_all_segments_makes_nothing_of_lists_and_so_is_refused() -> None:
    models = {SECRET: {"access": {"uids": [ANN]}}}
    with shared_daemon(models, settings={"l1": {"segment_mode": "0640"}}) as (daemon, as_user):
        told = daemon.wait_event("catalog.refused")
        assert f"models.{SECRET}.access cannot be kept" in told["error"]
        assert as_user(BEN).ask("call", method="List")["answers"] == [{}]


def test_lists_follow_the_catalog_and_outlive_it(fresh_host: Host) -> None:
    host = fresh_host
    catalog = json.loads(host.daemon.catalog_file.read_text())["models"]
    entry = catalog.pop(SECRET)
    _load(host, catalog)
    assert SECRET not in json.dumps(host.ben.ask("call", method="List")), "a model that left the catalog is open to all"
    host.daemon.restart(kill=True)
    wait_for(lambda: _leases(host), "Ann's lease to be taken up again")
    assert SECRET not in json.dumps(host.ben.ask("call", method="List"))
    _load(host, {**catalog, SECRET: {**entry, "access": {"uids": [ANN, BEN]}}})
    assert SECRET in json.dumps(host.ben.ask("call", method="List"))
    _load(host, {**catalog, SECRET: entry})
    assert SECRET not in json.dumps(host.ben.ask("call", method="List"))


def _leases(host: Host) -> int:
    answer = host.ann.ask("call", method="ListLeases")
    return len(answer["answers"][0].get("leases", ())) if answer["code"] == "OK" else 0


def _load(host: Host, models: dict[str, Any]) -> None:
    before = len(host.daemon.log_events("catalog.loaded"))
    host.daemon.write_catalog(models)
    wait_for(lambda: len(host.daemon.log_events("catalog.loaded")) > before, "the catalog to be loaded")


def _raise(answer: dict[str, Any]) -> None:
    if answer["code"] != "OK":
        raise CacheError(answer["message"], reason=answer["code"])
