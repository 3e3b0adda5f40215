"""Access lists: what a caller may not know of answers as what is not there, on every surface, to the last byte."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cached_client import CacheError
from tests.integration.harness import DaemonProcess, wait_for
from tests.integration.support import Worker, refused
from tests.integration.users import ANN, BEN, CLO, Open, needs_root, shared_daemon

pytestmark = needs_root

SECRET, ABSENT = "kestrel-70b", "kestrel-71b"
"""Ben may not know of the first, and nobody knows the second."""
TEAM = 61100
KEY = {"engine": "vllm", "model": SECRET}
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
    with shared_daemon(models, tenants={"two": {"access": {"uids": [BEN]}}}) as (daemon, as_user):
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
        answer["grpc-status-details-bin"] = bytes.fromhex(answer["grpc-status-details-bin"]).decode("latin-1")
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
        ("FindArtifact", {"key": {"engine": "vllm", "model": "NAME"}}),
    ],
)
def test_what_a_caller_may_not_know_of_answers_as_what_is_not_there(
    host: Host, method: str, request_: dict[str, Any]
) -> None:
    if method == "FindArtifact":  # its name is a hash of the key
        found = [host.ben.ask("call", method=method, **json.loads(json.dumps(request_).replace("NAME", name)))
                 for name in (SECRET, ABSENT)]  # fmt: skip
        assert [set(item["answers"][0]) for item in found] == [{"name", "descriptorSocket"}] * 2
        return
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
    member.ask("release")


def test_a_token_helps_nobody_else(host: Host) -> None:
    attached = host.ann.ask("call", method="Attach", ref=SECRET, limit=1)["answers"][0]["opened"]
    assert host.ben.ask("fetch", token=attached["token"]) == host.ben.ask("fetch", token="f" * 64)
    held = [item["leaseId"] for item in host.ann.ask("call", method="ListLeases")["answers"][0]["leases"]]
    assert held
    answers = [
        told(host.ben, lease_id, "Detach", {"leaseId": "NAME", "token": "f" * 64}) for lease_id in (held[0], "00000000")
    ]
    assert answers[0] == answers[1]


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
