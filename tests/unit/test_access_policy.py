"""The rule of access, and the engine as one caller sees it."""

from __future__ import annotations

import asyncio
import resource
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from cached.access import AccessList, AccessPolicy, Caller
from cached.errors import LimitExceededError, NoRoomError, NotFoundError, PermissionDeniedError
from cached.open_files import FileShares, file_shares
from cached.overview import Limits
from cached.rpc.callers import Callers, caller_of
from cached.rpc.front import Front
from cached.rpc.limits import CallLimits
from cached.rpc.seen import Seen, Views
from cached.settings import LimitsConfig
from cached.types import Event, Peer
from tests.unit.rpc_support import DETAIL, FakeEngine

ANN, BEN = Caller("uid 1", 1, frozenset({10})), Caller("uid 2", 2, frozenset({20}))
ROOT = Caller("uid 0", 0, operator=True)
ONE = AccessList(uids=frozenset({1}))


def policy(lists: dict[str, AccessList] | None = None, **options: AccessList) -> AccessPolicy:
    made = AccessPolicy(options.get("default"), options.get("operators"))
    made.set_lists(lists or {})
    return made


@pytest.mark.parametrize(
    ("rule", "ann", "ben"),
    [
        (policy(), (True, True, True), (True, True, True)),
        (policy(default=ONE), (True, True, True), (False, False, False)),
        (policy({"m": ONE}), (False, True, True), (False, False, True)),
        (policy({"m": AccessList()}), (False, False, True), (False, False, True)),
        (policy(operators=AccessList(gids=frozenset({20}))), (False, True, True), (True, True, True)),
        (policy({"m": ONE}, default=AccessList(uids=frozenset({2}))), (False, True, True), (False, False, True)),
        (policy({"m": ONE}, operators=AccessList(uids=frozenset({2}))), (False, True, True), (True, True, True)),
    ],
)
def test_who_is_an_operator_who_sees_a_model_and_who_is_let_in(
    rule: AccessPolicy, ann: tuple[bool, ...], ben: tuple[bool, ...]
) -> None:
    for caller, expected in ((ANN, ann), (BEN, ben), (ROOT, (True, True, True))):
        assert (rule.is_operator(caller), rule.may_see(caller, "m"), rule.lets_in(caller)) == expected


def test_root_and_the_daemons_own_user_are_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 977)
    found = {uid: caller_of(Peer(1, uid, 5), (6, 7)) for uid in (0, 977, 978)}
    assert {uid: caller.operator for uid, caller in found.items()} == {0: True, 977: True, 978: False}
    assert found[978] == Caller("uid 978", 978, frozenset({5, 6, 7}))


def test_where_nothing_is_restricted_everybody_has_the_engine_itself() -> None:
    engine = FakeEngine()
    assert Views(engine, policy()).by(BEN) is engine
    restricted = Views(engine, policy(default=ONE))
    assert restricted.by(ANN) is engine
    with pytest.raises(PermissionDeniedError, match="uid 2 may not use this cache"):
        restricted.by(BEN)


def seen(engine: FakeEngine) -> Seen:
    """By Ben, who may not know of ``other``."""
    return Seen(engine, policy({"other": ONE}), BEN)


def test_what_is_told_of_a_model_names_no_other_that_is_hidden() -> None:
    assert "other" in repr(DETAIL)
    detail = seen(FakeEngine()).describe("tiny")
    assert "other" not in repr(detail)
    assert detail == replace(
        DETAIL, files=(replace(DETAIL.files[0], shared_with=()),), places=(), summary=detail.summary
    )  # fmt: skip
    with pytest.raises(NotFoundError):
        seen(FakeEngine()).describe("other")
    with pytest.raises(NotFoundError):
        seen(FakeEngine()).describe("unknown")


async def test_events_of_others_are_left_out_and_texts_that_name_them_replaced() -> None:
    engine = FakeEngine()
    engine.events = [
        Event(1.0, "evicted", "other", "r", "other left l1", {}),
        Event(2.0, "evicted", "tiny", "r", "tiny left l1: other needed room", {"level": "l1"}),
        Event(3.0, "kept_out", "tiny", "r", "tiny: not now", {"against": "other."}),
        Event(4.0, "catalog.loaded", "", "", "the catalog names 2 models", {}),
        Event(5.0, "evicted", "tiny", "r", "tiny left l1: another needed room", {"level": "l1"}),
    ]
    found = [event async for event in seen(engine).watch(replay=True)]
    assert [event.time_s for event in found] == [2.0, 3.0, 5.0]
    assert {event.message for event in found[:2]} == {
        "evicted: it has to do with other models: an operator can see the reason",
        "kept_out: it has to do with other models: an operator can see the reason",
    }
    assert [event.fields for event in found] == [{}, {}, {"level": "l1"}]
    assert found[2].message == "tiny left l1: another needed room"


def test_the_overview_and_the_stats_count_what_the_caller_sees() -> None:
    engine = FakeEngine()
    view = seen(engine)
    stats = view.stats()
    assert (stats.model_count, stats.counters, stats.origins) == (1, {}, ())
    assert stats.degraded == ("something does not work as it should: an operator can see what",)
    assert view.overview(Limits()).stats == stats


async def test_no_room_does_not_say_whose_it_is() -> None:
    engine = FakeEngine()
    engine.error = NoRoomError(
        "l1 has no room for 1 B of tiny; held by other (hot, 1 B)", hint="end leases", level="l1", holders="other (hot)"
    )

    class Failing(FakeEngine):
        def require_running(self) -> None:
            pass

    failing = Failing(error=engine.error)
    with pytest.raises(NoRoomError) as caught:
        await seen(failing).attach("tiny")
    assert "other (" not in str(caught.value.to_dict())
    assert caught.value.fields == {"level": "l1"}


def test_callers_are_known_by_their_connection_until_it_is_gone() -> None:
    callers = Callers(per_uid=2, in_all=100)
    name = callers.come(ANN)
    assert callers.of(f"unix-abstract:{name}") is ANN
    for peer in ("unix:", f"unix:{name}", "unix-abstract:cached-0", "ipv4:127.0.0.1:1", name):
        with pytest.raises(PermissionDeniedError):
            callers.of(peer)
    callers.gone(name)
    with pytest.raises(PermissionDeniedError):
        callers.of(f"unix-abstract:{name}")


def test_connections_beyond_the_limit_are_told_and_further_ones_closed() -> None:
    callers = Callers(per_uid=2, in_all=100)
    names = [callers.come(ANN) for _ in range(18)]
    with pytest.raises(LimitExceededError):
        callers.come(ANN)
    assert callers.of(f"unix-abstract:{callers.come(BEN)}") is BEN
    with pytest.raises(LimitExceededError) as caught:
        callers.of(f"unix-abstract:{names[2]}")
    assert caught.value.fields == {
        "limit": "connections", "setting": "limits.connections_per_uid", "caller": "uid 1", "allowed": "2",
    }  # fmt: skip
    for name in [*names[:2], *names[3:]]:
        callers.gone(name)
    assert callers.of(f"unix-abstract:{names[2]}") is ANN
    few = Callers(per_uid=2, in_all=3)
    few.come(ANN)
    few.come(BEN)
    few.come(BEN)
    assert few.used_ratios() == {"connections": 1, "all_connections": 1}
    with pytest.raises(LimitExceededError, match="limit of open files"):
        few.come(ANN)


def test_a_call_that_is_refused_is_not_counted() -> None:
    limits = CallLimits(LimitsConfig(calls_per_uid=3, leases_per_uid=1, streams_per_uid=1), in_all=8)
    with limits.held(ANN, "Attach", streams=True):
        for _ in range(5):
            with pytest.raises(LimitExceededError, match="1 leases"), limits.held(ANN, "Attach", streams=True):
                pass
        with limits.held(ANN, "Watch", streams=True), limits.held(ANN, "List", streams=False):
            with pytest.raises(LimitExceededError, match="3 calls"), limits.held(ANN, "List", streams=False):
                pass
            with limits.held(BEN, "Attach", streams=True):
                assert limits.used_ratios() == {"calls": 1, "leases": 1, "streams": 1, "all_calls": 0.5}
    assert not any(limits.used_ratios().values())
    with limits.held(ANN, "Attach", streams=True):
        pass


def test_one_user_leaves_connections_to_others_where_the_limit_of_open_files_is_low() -> None:
    callers = Callers(per_uid=4096, in_all=100)
    for _ in range(88 + 6):
        callers.come(ANN)
    with pytest.raises(LimitExceededError, match="88 connections") as caught:
        callers.come(ANN)
    assert caught.value.fields["setting"] == "RLIMIT_NOFILE"
    assert callers.of(f"unix-abstract:{callers.come(BEN)}") is BEN


@pytest.mark.parametrize(
    ("files", "shares"),
    [
        (200, FileShares(calls=29, descriptors=12, http=12, unread=100)),
        (1024, FileShares(calls=149, descriptors=64, http=64, unread=512)),
        (65536, FileShares(calls=20138, descriptors=4096, http=128, unread=32768)),
        (resource.RLIM_INFINITY, FileShares(calls=347818, descriptors=4096, http=128, unread=1 << 19)),
    ],
)
def test_listeners_together_leave_files_for_everything_else(
    monkeypatch: pytest.MonkeyPatch, files: int, shares: FileShares
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (files, files))
    assert file_shares() == shares


async def test_a_connection_that_grpc_does_not_take_is_refused_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cached.rpc.front._CONNECT_S", 0.05)
    engine = FakeEngine()
    front = Front(str(tmp_path / "cached.sock"), Callers(per_uid=9, in_all=12), engine.failures, mode=0o600)
    front.prepare()
    with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as waiting:
        full.bind(front.inner)
        full.listen(0)
        waiting.connect(front.inner)
        await front.start()
        try:
            reader, writer = await asyncio.open_unix_connection(front.path)
            async with asyncio.timeout(30):
                assert await reader.read() == b""
            writer.close()
        finally:
            await front.stop()
    counters = engine.failures._metrics.counters()
    assert counters['cached_failures_total{reason="UNAVAILABLE"}'] == 1
    assert [event.kind for event in engine.failures._events.recent] == ["rpc.refused"]
