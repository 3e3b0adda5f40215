"""Overviews: their words, their way over the wire, how fast things are, and who is at the other end of a socket."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
from pathlib import Path

import pytest

from cached.cache.pace import WINDOW_S, Pace, Written, speed_bytes_per_s
from cached.level import Level
from cached.overview import Holding, Limits, MoveKind, MovePhase, Problem, words
from cached.rpc.overview import limits_of, overview_message, overview_of
from cached.rpc.peers import container_of, peer_of
from cached.types import Peer, RevisionState
from cached.units import MIB
from cached_client._proto import cached_pb2 as pb
from tests.unit.rpc_support import LEASE, OVERVIEW, SUMMARY
from tests.unit.test_converters import unset

ROOT = Path(__file__).resolve().parents[2]
MOVE = OVERVIEW.moves[0]


# Over the wire.


def test_an_overview_comes_out_as_it_went_in() -> None:
    message = overview_message(OVERVIEW)
    assert not {name for name in unset(message) if name.split(".")[0] in {"moves", "uses"}}
    came = overview_of(pb.OverviewResponse.FromString(message.SerializeToString()))
    assert OVERVIEW.leases[0].peer
    peer = dataclasses.replace(OVERVIEW.leases[0].peer, gid=-1)  # which nobody is told
    leases = (dataclasses.replace(OVERVIEW.leases[0], peer=peer),)
    assert came == dataclasses.replace(OVERVIEW, cold_starts=(), leases=leases)
    assert [start.name for start in message.cold_starts] == ["tiny"]


def test_words_of_a_newer_daemon_do_no_harm() -> None:
    message = overview_message(OVERVIEW)
    message.moves[0].kind, message.moves[0].phase = "teleport", "folding"
    message.models[0].checked_by = "oracle"
    message.uses[0].holdings_bytes["gold"] = 5
    came = overview_of(message)
    assert (came.moves[0].kind, came.moves[0].phase) == (MoveKind.PULL, MovePhase.MOVING)
    assert set(came.uses[0].holdings_bytes) == set(Holding)


def test_nobody_can_ask_for_more_than_one_answer_holds() -> None:
    assert limits_of(pb.OverviewRequest()) == Limits()
    huge = limits_of(pb.OverviewRequest(models=2**31, leases=2**31, events=2**31, moves=2**31, cold_starts=2**31))
    assert max(dataclasses.astuple(huge)) <= 10_000


# Words.


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"speed_bytes_per_s": 2e6, "total_bytes": 200 * MIB, "done_bytes": 100 * MIB},
         "100 MiB of 200 MiB, 2.0 MB/s, 52.4 s left"),
        ({"speed_bytes_per_s": 0.0}, "400 B of 1000 B, nothing verified lately"),
        ({"speed_bytes_per_s": 0.0, "elapsed_s": 0.5}, "400 B of 1000 B"),
        ({"phase": MovePhase.RESOLVING}, "asking the origin what it has"),
        ({"phase": MovePhase.WAITING}, "1000 B, waits for its turn or for room"),
        ({"phase": MovePhase.VERIFYING}, "1000 B, all here; checking the whole"),
        ({"phase": MovePhase.WRITING, "speed_bytes_per_s": 0.0},
         "usable; written to L2: 300 B of 900 B, nothing verified lately"),
        ({"kind": MoveKind.WRITE, "phase": MovePhase.WRITING, "elapsed_s": 0.0, "speed_bytes_per_s": 0.0},
         "300 B of 900 B"),
    ],
)  # fmt: skip
def test_how_far_a_move_is(changes, told) -> None:
    assert words.progress_text(dataclasses.replace(MOVE, **changes)) == told


def test_where_a_move_comes_from_and_who_waits() -> None:
    assert words.kind_text(MOVE) == "pull to L1"
    assert words.source_text(MOVE) == "s3://b/tiny"
    assert words.source_text(dataclasses.replace(MOVE, kind=MoveKind.PROMOTE)) == "L2"
    assert words.waiting_text(MOVE) == "vllm (pid 7) and 1 more"
    assert words.waiting_text(dataclasses.replace(MOVE, waiting=(), waiting_count=0)) == ""


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"l1_bytes": 100, "progress": 0.0}, "ready in L1"),
        ({"l1_bytes": 0, "progress": 0.25}, "ready in L2, 25 %"),
        ({"state": RevisionState.PULLING, "progress": 0.5}, "arriving, 50 %"),
        ({"state": RevisionState.ABSENT}, "not here"),
        ({"state": RevisionState.QUARANTINED}, "quarantined"),
    ],
)
def test_the_state_of_a_model(changes, told) -> None:
    assert words.state_text(dataclasses.replace(SUMMARY, **changes)) == told


@pytest.mark.parametrize(
    ("peer", "told"),
    [
        (LEASE.peer, "python3 in pod 1c7f9e0b, pid 13, uid 14"),
        (Peer(0, 1000, 1000), "pid 12 by its own word, uid 1000"),
        (None, "pid 12 by its own word"),
    ],
)
def test_a_process_is_told_by_the_kernel_if_it_can(peer, told) -> None:
    assert words.process_text(dataclasses.replace(LEASE, peer=peer)) == told


def test_every_degraded_part_has_its_advice_and_its_runbook() -> None:
    """Also those that are told by other modules from now on."""
    sources = "\n".join(path.read_text() for path in (ROOT / "cached").rglob("*.py"))
    keys = set(re.findall(r'degraded\["(\w+)"\] = ', sources)) | {"l1", "l2", "model"}
    headings = re.findall(r"^#+ (.*)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    unknown = words.advice(Problem("something new", "it broke"))
    assert unknown.runbook in headings
    for key in keys:
        found = words.advice(Problem(key, "it broke", "tiny"))
        assert found is not unknown
        assert found != unknown, f"no advice for degraded[{key!r}]"
        assert "{" not in found.text
        assert found.runbook in headings, found.runbook


# How fast.


def test_a_pace_is_of_the_last_seconds() -> None:
    pace = Pace(100.0)
    for step in range(40):
        pace.add(100.0 + step, 10)
    assert speed_bytes_per_s([pace], 139.5) == pytest.approx(10, rel=0.1)
    assert speed_bytes_per_s([pace], 139.0 + 2 * WINDOW_S) == 0
    assert speed_bytes_per_s([], 100.0) == 0


def test_files_that_follow_each_other_make_one_speed() -> None:
    first, second = Pace(0.0), Pace(5.0)
    for step in range(5):
        first.add(step + 0.5, 10)
        second.add(5 + step + 0.5, 10)
    assert speed_bytes_per_s([first, second], 10.0) == pytest.approx(10)


def test_a_chunk_that_is_written_counts_once() -> None:
    written = Written("ab", 100, Pace(0.0))
    for _ in range(2):
        written.add(0, 60, 1.0)
    assert written.done_bytes == 60


# Who it is.

_ID = "4f0c" * 16
_SLICE = "kubepods-burstable.slice/kubepods-burstable-pod1c7f9e0b_22aa_4c1d_9f00_0123456789ab.slice"


@pytest.mark.parametrize(
    ("cgroup", "told"),
    [
        (f"0::/kubepods.slice/{_SLICE}/cri-containerd-{_ID}.scope\n", "pod 1c7f9e0b"),
        (f"0::/kubepods/besteffort/pod1c7f9e0b-22aa-4c1d-9f00-0123456789ab/{_ID}\n", "pod 1c7f9e0b"),
        (f"0::/system.slice/docker-{_ID}.scope\n", "container 4f0c4f0c4f0c"),
        ("0::/system.slice/vllm@0.service\n", "vllm@0.service"),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-x.service\n", "run-x.service"),
        ("0::/\n", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_where_a_process_runs_by_its_control_group(cgroup, told) -> None:
    assert container_of(cgroup) == told


def test_a_peer_is_what_the_kernel_says() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = peer_of(ours)
    assert (peer.pid, peer.uid, peer.gid) == (os.getpid(), os.geteuid(), os.getegid())
    assert peer.process == Path("/proc/self/comm").read_text().strip()


def test_bars_have_room_for_every_word() -> None:
    assert set(words.HOLDINGS) == set(Holding)
    assert words.level_of(SUMMARY) is Level.L2
