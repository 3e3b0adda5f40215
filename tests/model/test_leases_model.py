"""The table of leases against a plain list."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from cached.errors import NotFoundError, PermissionDeniedError
from cached.leases import Lease, LeaseTable
from cached.types import Client, Peer

NAMES = st.sampled_from(["llama", "qwen"])
REVISIONS = st.sampled_from(["aaaa", "bbbb"])


class LeaseMachine(RuleBasedStateMachine):
    opened = Bundle("opened")

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable()
        self.held: list[Lease] = []
        self.ended: list[Lease] = []

    @rule(target=opened, name=NAMES, revision=REVISIONS, pid=st.integers(0, 9))
    def open(self, name: str, revision: str, pid: int) -> Lease:
        lease = self.table.open(name, revision, Client(pid=pid), now_s=1.0, wall_s=2.0)
        self.held.append(lease)
        return lease

    @rule(lease=consumes(opened))
    def close(self, lease: Lease) -> None:
        assert self.table.close(lease.lease_id) is lease
        self.held.remove(lease)
        self.ended.append(lease)

    @rule(lease=opened, pid=st.integers(1, 9))
    def complete(self, lease: Lease, pid: int) -> None:
        lease.complete, lease.peer = True, Peer(pid, 0, 0)

    @rule()
    def nothing_opens_an_ended_lease(self) -> None:
        for lease in self.ended:
            with pytest.raises(NotFoundError):
                self.table.close(lease.lease_id)
            with pytest.raises(PermissionDeniedError):
                self.table.by_token(lease.token)

    @invariant()
    def agrees(self) -> None:
        assert list(self.table) == self.held
        assert [info.lease_id for info in self.table.infos()] == [lease.lease_id for lease in self.held]
        assert self.table.leased() == {(lease.name, lease.revision) for lease in self.held}
        for name in ("llama", "qwen"):
            of_name = [lease for lease in self.held if lease.name == name]
            assert self.table.count(name) == len(of_name)
            assert self.table.holders(name) == tuple(lease.holder for lease in of_name)
            for revision in ("aaaa", "bbbb"):
                of_revision = [lease for lease in of_name if lease.revision == revision]
                assert self.table.count(name, revision) == len(of_revision)
                assert self.table.of(name, revision) == tuple(of_revision)
        for lease in self.held:
            assert self.table.by_token(lease.token) is lease
            assert self.table.authorised(lease.lease_id, lease.token) is lease


TestLeases = LeaseMachine.TestCase
