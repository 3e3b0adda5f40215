"""What one bucket sees of a thousand nodes that want one model: ``python -m bench.fleet`` simulates and writes JSON.

A calculation, not a measurement: nodes and bucket are figures (``Site``), time is made up, and what decides when a node
begins is the daemon's own code: its jitter, its polls, and its rule for the slots of holders that are gone.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.figures import short
from bench.results import FOLDER
from bench.tables import table
from cached.cache.stagger import start_delay_s
from cached.fleet.kube import LeaseState
from cached.fleet.slots import LEASE_S, Watched, poll_delay_s
from cached.units import CHUNK_BYTES

FILE = FOLDER / "fleet" / "scale.json"
"""What was found last; docs/scale.md is made from it."""

_RENEW_S = LEASE_S / 3
_GBIT = 1e9 / 8
_SEED = 6


@dataclass(frozen=True, slots=True)
class Site:
    """A cluster and its bucket. ``get_per_s``: of one prefix, as S3 documents it; a request brings 16 MiB."""

    nodes: int = 1000
    model_bytes: int = 140 * 10**9
    nic_gbit_per_s: float = 100.0
    bucket_gbit_per_s: float = 400.0
    get_per_s: float = 5500.0

    @property
    def bucket_bytes_per_s(self) -> float:
        """What it gives to all nodes together."""
        return min(self.bucket_gbit_per_s * _GBIT, self.get_per_s * CHUNK_BYTES)


@dataclass(frozen=True, slots=True)
class Case:
    """How the fleet is set up. ``from_bucket``: the share of each node's bytes that its chain leaves to the bucket.

    ``near_gbit_per_s``: what the link in front gives one node; 0: there is none. ``dying``: of the nodes that pull.
    """

    title: str
    jitter_s: float = 0.0
    slots: int = 0
    from_bucket: float = 1.0
    near_gbit_per_s: float = 0.0
    dying: float = 0.0


@dataclass(frozen=True, slots=True)
class Found:
    """Of a case. ``demand``: the most that pulling nodes could take at once, over what the bucket gives.

    ``range_s``: what a range of 16 MiB from the bucket takes then, with 32 in flight from each node to all links.
    ``api_first_per_s``, ``api_later_per_s``: requests in the busiest second, and in the busiest after the first minute.
    Times are since all were told.
    """

    title: str
    half_ready_s: float
    all_ready_s: float
    most_pulling: int
    demand: float
    range_s: float
    bucket_bytes: float
    api_first_per_s: int
    api_later_per_s: int


CASES = (
    Case("every node at once"),
    Case("jitter of 10 min", jitter_s=600),
    Case("jitter of 1 h", jitter_s=3600),
    Case("4 slots", slots=4),
    Case("16 slots", slots=16),
    Case("16 slots, jitter of 10 min", slots=16, jitter_s=600),
    Case("the same, 1 % of the holders die", slots=16, jitter_s=600, dying=0.01),
    Case("chain: a cache serves 95 %", from_bucket=0.05, near_gbit_per_s=50),
    Case("chain: P2P serves 99.5 %", from_bucket=0.005, near_gbit_per_s=50),
    Case("the same, jitter of 1 min", jitter_s=60, from_bucket=0.005, near_gbit_per_s=50),
)

BEGIN, POLL = 0, 1
_RANGES = 32


class Simulation:
    """One case, by events. The bucket shares itself out evenly; so each node's rate is the same at every moment."""

    def __init__(self, site: Site, case: Case, seed: int) -> None:
        self.site, self.case = site, case
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.events: list[tuple[float, int, int, int]] = []
        self.attempts = [0] * site.nodes
        self.watched = [Watched() for _ in range(site.nodes)]
        self.leases: list[tuple[str, float, float]] = [("", 0.0, 0.0)] * case.slots
        """Holder, since when, and when it dies."""
        self.held: dict[int, int] = {}
        self.sent_bytes = 0.0
        """To each node that pulled all the time; a node is through when this has grown by what it needs."""
        self.pulling: list[tuple[float, int]] = []
        self.ready_s: list[float] = []
        self.most_pulling = 0
        self.polls: dict[int, int] = {}

    def run(self) -> Found:
        """Until every node has the model."""
        for node in range(self.site.nodes):
            self._at(start_delay_s(self.case.jitter_s, self.rng), BEGIN, node)
        while self.events or self.pulling:
            self._step()
        return self._found()

    def _step(self) -> None:
        rate = self._rate()
        next_s = self.events[0][0] if self.events else float("inf")
        if self.pulling:
            end_s = self.now_s + (self.pulling[0][0] - self.sent_bytes) / rate
            if end_s <= next_s:
                self._pass(end_s, rate)
                self._through(heapq.heappop(self.pulling)[1])
                return
        self._pass(next_s, rate)
        _, kind, _, node = heapq.heappop(self.events)
        if kind == BEGIN and not self.case.slots:
            self._pull(node, dies=False)
        else:
            self._poll(node)

    def _rate(self) -> float:
        """Bytes a second from the bucket to each node: what it can take, or its share of the bucket."""
        return min(self._fastest(), self.site.bucket_bytes_per_s / max(1, len(self.pulling)))

    def _fastest(self) -> float:
        """What a node can take from the bucket: its NIC's rate, or as its cache keeps up with the rest."""
        case, nic = self.case, self.site.nic_gbit_per_s * _GBIT
        if not case.near_gbit_per_s:
            return nic
        return min(nic, case.near_gbit_per_s * _GBIT / (1 - case.from_bucket)) * case.from_bucket

    def _poll(self, node: int) -> None:
        slot = self.rng.randrange(self.case.slots)
        self.polls[int(self.now_s)] = self.polls.get(int(self.now_s), 0) + 1
        self.attempts[node] += 1
        if self.watched[node].is_free(str(slot), self._lease(slot), self.now_s):
            dies = self.rng.random() < self.case.dying
            dies_s = self.now_s + self.rng.uniform(1, 10) if dies else float("inf")
            self.leases[slot] = (f"node-{node}", self.now_s, dies_s)
            self.held[node] = slot
            self._pull(node, dies=dies)
        else:
            self._at(self.now_s + poll_delay_s(self.attempts[node], self.rng), POLL, node)

    def _lease(self, slot: int) -> LeaseState:
        holder, since_s, dies_s = self.leases[slot]
        renewals = int((min(self.now_s, dies_s) - since_s) / _RENEW_S)
        return LeaseState(holder, LEASE_S, version=f"{holder} {renewals}") if holder else LeaseState()

    def _pull(self, node: int, *, dies: bool) -> None:
        """One that dies holds its slot, and begins again when it is back: 5 minutes later."""
        if dies:
            self.held.pop(node)
            self._at(self.now_s + 300, BEGIN, node)
            return
        heapq.heappush(self.pulling, (self.sent_bytes + self.site.model_bytes * self.case.from_bucket, node))
        self.most_pulling = max(self.most_pulling, len(self.pulling))

    def _through(self, node: int) -> None:
        self.ready_s.append(self.now_s)
        if node in self.held:
            self.leases[self.held.pop(node)] = ("", 0.0, 0.0)

    def _pass(self, until_s: float, rate: float) -> None:
        self.sent_bytes += (until_s - self.now_s) * rate
        self.now_s = until_s

    def _at(self, time_s: float, kind: int, node: int) -> None:
        heapq.heappush(self.events, (time_s, kind, self.rng.getrandbits(30), node))

    def _found(self) -> Found:
        site, case = self.site, self.case
        share = min(self._fastest(), site.bucket_bytes_per_s / self.most_pulling)
        return Found(
            title=case.title,
            half_ready_s=sorted(self.ready_s)[site.nodes // 2 - 1],
            all_ready_s=max(self.ready_s),
            most_pulling=self.most_pulling,
            demand=self.most_pulling * self._fastest() / site.bucket_bytes_per_s,
            range_s=CHUNK_BYTES / (share / (_RANGES * case.from_bucket)),
            bucket_bytes=site.nodes * site.model_bytes * case.from_bucket,
            api_first_per_s=max(self.polls.values(), default=0),
            api_later_per_s=max((count for second, count in self.polls.items() if second > 60), default=0),
        )


def simulate(site: Site, cases: tuple[Case, ...] = CASES, seed: int = _SEED) -> list[Found]:
    """Every case, the same for the same seed."""
    return [Simulation(site, case, seed).run() for case in cases]


def as_json(site: Site, found: list[Found]) -> dict[str, Any]:
    """What the file holds."""
    return {"site": dataclasses.asdict(site), "seed": _SEED, "found": [dataclasses.asdict(item) for item in found]}


def fleet_text(file: Path = FILE) -> str:
    """The table of docs/scale.md, from the file."""
    data = json.loads(file.read_text())
    site = Site(**data["site"])
    told = (
        f"{site.nodes} nodes with {site.nic_gbit_per_s:g} Gbit/s each, a model of {site.model_bytes / 1e9:g} GB, a "
        f"bucket that gives {site.bucket_gbit_per_s:g} Gbit/s and {site.get_per_s:g} GETs a second."
    )
    heads = (
        "Set-up", "half ready", "all ready", "most that pull at once", "demand / bucket", "a range takes",
        "TB from the bucket", "API requests/s, first", "later",
    )  # fmt: skip
    return f"{told}\n\n{table(heads, list(_rows(data['found'])))}"


def _rows(found: list[dict[str, Any]]) -> Iterator[list[str]]:
    for row in found:
        item = Found(**row)
        yield [
            item.title, _time(item.half_ready_s), _time(item.all_ready_s), str(item.most_pulling),
            f"{short(item.demand)}x", f"{short(item.range_s)} s", short(item.bucket_bytes / 1e12),
            str(item.api_first_per_s or "–"), str(item.api_later_per_s or "–"),
        ]  # fmt: skip


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def main() -> None:
    """Writes the file, and prints the table."""
    FILE.parent.mkdir(exist_ok=True)
    site = Site()
    FILE.write_text(json.dumps(as_json(site, simulate(site)), indent=1) + "\n")
    print(fleet_text())


if __name__ == "__main__":
    main()
