"""Who holds what: the table of leases. Pure bookkeeping; times are given by the caller. Belongs to the loop."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cached.errors import InvalidRequestError, NotFoundError, PermissionDeniedError
from cached.types import Client, LeaseInfo, Peer

MAX_KEEP_ALIVE_S = 86400.0
"""A worker may ask that its model outstays its lease by a day at most: it takes room that others would be let into."""


@dataclass(slots=True, eq=False)
class Lease:
    """A worker's hold on a revision. ``peer``, ``complete`` and ``size_bytes`` are filled in as they become known.

    ``token`` is the lease's secret, which the worker presents on the descriptor socket; it is never shown or logged.
    """

    lease_id: str
    token: str
    name: str
    revision: str
    client: Client
    since_s: float
    since_time_s: float
    size_bytes: int = 0
    peer: Peer | None = None
    complete: bool = False
    keep_alive_s: float = 0.0
    """So long the model stays in memory before others once this lease has ended."""
    holds: dict[str, str] = field(default_factory=dict)
    """Ingests and blobs that it maps without a recorded revision that says so. Ingest → its blob, if that is known."""

    def __repr__(self) -> str:
        return f"Lease({self.lease_id} on {self.name}@{self.revision} by {self.holder})"

    @property
    def holder(self) -> str:
        """Who holds it, for people: ``vllm (pid 4242)``. The peer's proven pid goes before the claimed one."""
        pid = self.peer.pid if self.peer is not None else self.client.pid
        name = self.client.name or "worker"
        return f"{name} (pid {pid})" if pid else name

    def info(self) -> LeaseInfo:
        """The lease as shown to people; without its token."""
        return LeaseInfo(
            lease_id=self.lease_id,
            name=self.name,
            revision=self.revision,
            client=self.client,
            peer=self.peer,
            since_time_s=self.since_time_s,
            complete=self.complete,
            size_bytes=self.size_bytes,
        )


class LeaseTable:
    """All leases that are held now. A revision with a lease is never a victim."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self._by_token: dict[bytes, Lease] = {}
        self._counts: Counter[tuple[str, str]] = Counter()
        self._counts_by_name: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        """Oldest first, over a copy: leases may be closed while iterating."""
        return iter(list(self._leases.values()))

    def open(
        self, name: str, revision: str, client: Client, *, now_s: float, wall_s: float, size_bytes: int = 0
    ) -> Lease:
        """A new lease on ``name@revision``. ``now_s`` is monotonic, ``wall_s`` is only shown."""
        lease_id = secrets.token_hex(4)
        while lease_id in self._leases:
            lease_id = secrets.token_hex(4)
        lease = Lease(
            lease_id=lease_id,
            token=secrets.token_hex(32),
            name=name,
            revision=revision,
            client=client,
            since_s=now_s,
            since_time_s=wall_s,
            size_bytes=size_bytes,
        )
        self._leases[lease_id] = lease
        self._by_token[_key(lease.token)] = lease
        self._counts[name, revision] += 1
        self._counts_by_name[name] += 1
        return lease

    def close(self, lease_id: str) -> Lease:
        """Ends a lease and returns it. Raises NotFoundError: a lease ends once."""
        lease = self.by_id(lease_id)
        del self._leases[lease_id]
        del self._by_token[_key(lease.token)]
        held = (lease.name, lease.revision)
        self._counts[held] -= 1
        if not self._counts[held]:
            del self._counts[held]
        self._counts_by_name[lease.name] -= 1
        if not self._counts_by_name[lease.name]:
            del self._counts_by_name[lease.name]
        return lease

    def by_id(self, lease_id: str) -> Lease:
        """Raises NotFoundError. An id is no secret: it proves nothing about the caller."""
        lease = self._leases.get(lease_id)
        if lease is None:
            raise no_lease(lease_id)
        return lease

    def by_token(self, token: str) -> Lease:
        """The lease whose secret this is. Raises PermissionDeniedError.

        How long it takes tells nothing of any token: what is looked up, and compared, is a hash.
        """
        found = self._by_token.get(_key(token))
        if found is None:
            raise no_such_token()
        return found

    def authorised(self, lease_id: str, token: str) -> Lease:
        """The lease ``lease_id`` for a caller who proves that it is theirs.

        Raises NotFoundError or PermissionDeniedError.
        """
        lease = self.by_id(lease_id)
        if not hmac.compare_digest(lease.token.encode(), token.encode("utf-8", "surrogatepass")):
            raise PermissionDeniedError(
                f"the token is not that of lease {lease_id}", hint="present the token that Attach answered with"
            )
        return lease

    def count(self, name: str, revision: str | None = None) -> int:
        """How many leases a revision has, or a model over all its revisions."""
        if revision is not None:
            return self._counts.get((name, revision), 0)
        return self._counts_by_name.get(name, 0)

    def leased(self) -> frozenset[tuple[str, str]]:
        """Every (name, revision) that is held."""
        return frozenset(self._counts)

    def holds(self) -> frozenset[str]:
        """All ingests and blobs that leases map of what is no recorded revision."""
        held = (lease.holds for lease in self._leases.values() if lease.holds)
        return frozenset(each for holds in held for pair in holds.items() for each in pair if each)

    def hold(self, name: str, revision: str, ids: Mapping[str, str]) -> None:
        """The leases on a revision hold these ingests and blobs from now on: it is not going to be recorded."""
        for lease in self.of(name, revision):
            lease.holds.update(ids)

    def became(self, ingest_id: str, digest: str) -> None:
        """An ingest got its blob's name, for whichever load: who maps it maps a blob."""
        for lease in self._leases.values():
            if ingest_id in lease.holds:
                lease.holds[ingest_id] = digest

    def of(self, name: str, revision: str | None = None) -> tuple[Lease, ...]:
        """The leases of a revision, or of a model over all its revisions; oldest first."""
        return tuple(
            lease
            for lease in self._leases.values()
            if lease.name == name and (revision is None or lease.revision == revision)
        )

    def holders(self, name: str, revision: str | None = None) -> tuple[str, ...]:
        """Who holds it, for messages: ``("vllm (pid 4242)",)``; oldest first."""
        return tuple(lease.holder for lease in self.of(name, revision))

    def infos(self) -> tuple[LeaseInfo, ...]:
        """All leases as shown to people; oldest first."""
        return tuple(lease.info() for lease in self._leases.values())


def no_lease(lease_id: str) -> NotFoundError:
    """What is said of a lease that is not held, or not told of."""
    return NotFoundError(
        f"there is no lease {lease_id[:64]!r}",
        hint="it ended, or the daemon was restarted: attach again",
        ref=lease_id[:64],
    )


def no_such_token() -> PermissionDeniedError:
    """What is said of a token that is of no lease, or of one that is not told of."""
    return PermissionDeniedError(
        "the token belongs to no lease", hint="the lease ended, or the daemon was restarted: attach again"
    )


def check_keep_alive(seconds: float) -> float:
    """A keep-alive, unchanged. Raises InvalidRequestError for one below 0 or above MAX_KEEP_ALIVE_S."""
    if 0.0 <= seconds <= MAX_KEEP_ALIVE_S:
        return seconds
    raise InvalidRequestError(
        f"a keep-alive of {seconds:g} s is not possible",
        hint=f"give 0 to {MAX_KEEP_ALIVE_S:g} s; for longer make the model warm or hot, or pin it",
        value=seconds,
    )


def _key(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
