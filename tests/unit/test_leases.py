from __future__ import annotations

import pytest

from cached.errors import NotFoundError, PermissionDeniedError
from cached.leases import Lease, LeaseTable
from cached.types import Client, Peer


def opened(table: LeaseTable, name: str = "llama", revision: str = "aaaa", **client: object) -> Lease:
    return table.open(name, revision, Client(**client), now_s=1.0, wall_s=2.0, size_bytes=5)  # type: ignore[arg-type]


def test_open_count_close() -> None:
    table = LeaseTable()
    first, second = opened(table), opened(table, revision="bbbb")
    assert (table.count("llama"), table.count("llama", "aaaa"), len(table)) == (2, 1, 2)
    assert table.leased() == {("llama", "aaaa"), ("llama", "bbbb")}
    assert table.close(first.lease_id) is first
    assert (table.count("llama", "aaaa"), table.leased()) == (0, {("llama", "bbbb")})
    with pytest.raises(NotFoundError, match=first.lease_id):
        table.close(first.lease_id)
    assert list(table) == [second]


def test_a_lease_is_found_by_its_token_only() -> None:
    table = LeaseTable()
    leases = [opened(table) for _ in range(3)]
    for lease in leases:
        assert table.by_token(lease.token) is lease
        assert table.authorised(lease.lease_id, lease.token) is lease
    for wrong in ("", leases[0].lease_id, leases[0].token[:-1], "\udcff", leases[0].token.upper() + "x"):
        with pytest.raises(PermissionDeniedError):
            table.by_token(wrong)
        with pytest.raises(PermissionDeniedError):
            table.authorised(leases[0].lease_id, wrong)
    with pytest.raises(PermissionDeniedError):
        table.authorised(leases[0].lease_id, leases[1].token)
    token = leases[0].token
    table.close(leases[0].lease_id)
    with pytest.raises(PermissionDeniedError):
        table.by_token(token)


def test_tokens_are_long_distinct_and_never_shown() -> None:
    table = LeaseTable()
    leases = [opened(table) for _ in range(50)]
    assert len({lease.token for lease in leases}) == len({lease.lease_id for lease in leases}) == 50
    for lease in leases:
        assert len(bytes.fromhex(lease.token)) == 32
        assert lease.token not in repr(lease)
        assert lease.token not in repr(lease.info())


def test_holders_name_people_and_prefer_the_proven_pid() -> None:
    table = LeaseTable()
    opened(table, pid=7)
    known = table.open("llama", "aaaa", Client(name="vllm", pid=4242), now_s=0, wall_s=0)
    table.open("llama", "aaaa", Client(), now_s=0, wall_s=0)
    opened(table, name="other", pid=9)
    assert table.holders("llama", "aaaa") == ("worker (pid 7)", "vllm (pid 4242)", "worker")
    known.peer = Peer(pid=77, uid=1000, gid=1000)
    assert table.holders("llama")[1] == "vllm (pid 77)"


def test_info_shows_what_became_known() -> None:
    table = LeaseTable()
    lease = opened(table, pid=3)
    assert not table.infos()[0].complete
    lease.complete, lease.peer = True, Peer(3, 1, 2)
    (info,) = table.infos()
    assert (info.complete, info.peer, info.size_bytes, info.since_time_s) == (True, Peer(3, 1, 2), 5, 2.0)


def test_leases_may_be_closed_while_iterating() -> None:
    table = LeaseTable()
    for _ in range(5):
        opened(table)
    for lease in table:
        table.close(lease.lease_id)
    assert len(table) == 0
