"""The operator's process of the churn: moves models about below the workers, as fast as it can.

``python -m bench.churn.operator ORDER.json``; it tells and ends as a worker does.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cached_client
from bench.churn.models import load
from bench.churn.told import Told, run_until_told
from cached_client._proto import cached_pb2 as pb

_TIMEOUT_S = 60.0
_MARKED = 4
"""Models that are hot, or pinned, at one time by each thread; the next one takes the place of the first."""


class Operator(threading.Thread):
    """One thread of it."""

    def __init__(self, socket: str, names: list[str], told: Told, ending: threading.Event) -> None:
        super().__init__()
        self._cache = cached_client.connect(socket)
        self._names = names
        self._told = told
        self._ending = ending
        self._rng = random.Random()
        self._hot: list[str] = []
        self._pinned: list[str] = []
        self._ways: list[tuple[int, Callable[[], None]]] = [
            (10, self._pull), (3, self._pull_left), (8, self._evict), (4, self._tier), (2, self._hot_one),
            (3, self._pin), (2, self._remove), (2, self._verify), (2, self._watch), (1, self._leases),
        ]  # fmt: skip

    def run(self) -> None:
        """Until it is told to end; then nothing is hot or pinned any more."""
        weights = [weight for weight, _ in self._ways]
        try:
            while not self._ending.is_set():
                self._do(self._rng.choices(self._ways, weights)[0][1])
        finally:
            while self._hot:
                self._do(self._hot_no_more)
            while self._pinned:
                self._do(self._unpin)
            self._cache.close()

    def _do(self, way: Callable[[], None]) -> None:
        what = way.__name__.lstrip("_").replace("_", " ")
        began_s = time.perf_counter()
        try:
            way()
        except cached_client.CacheError as error:
            self._told.failed(what, error.reason, str(error))
            if error.reason in ("UNAVAILABLE", "DAEMON_UNAVAILABLE"):
                self._ending.wait(0.05)
        else:
            self._told.did(what, time.perf_counter() - began_s)

    def _call(self, method: str, request: Any) -> Any:
        connection = self._cache.connection
        return connection.call(getattr(connection.stub, method), request, timeout_s=_TIMEOUT_S)

    def _any(self) -> str:
        return self._rng.choice(self._names)

    def _pull(self) -> None:
        for _ in self._cache.pull(self._any(), level=self._rng.choice(("l1", "l2")), timeout_s=_TIMEOUT_S):
            pass

    def _pull_left(self) -> None:
        """Begun, and not watched to its end."""
        progress = self._cache.pull(self._any(), level=self._rng.choice(("l1", "l2")))
        for _ in itertools.islice(progress, self._rng.randint(1, 2)):
            pass

    def _evict(self) -> None:
        level = self._rng.choice((pb.LEVEL_L1, pb.LEVEL_L2, pb.LEVEL_UNSPECIFIED))
        self._call("Evict", pb.EvictRequest(ref=self._any(), level=level))

    def _tier(self) -> None:
        name = self._any()
        if name not in self._hot:
            tier = self._rng.choice((pb.TIER_WARM, pb.TIER_COLD, pb.TIER_AUTO))
            self._call("SetTier", pb.SetTierRequest(ref=name, tier=tier, what_if=self._rng.random() < 0.3))

    def _hot_one(self) -> None:
        if len(self._hot) >= _MARKED:
            self._hot_no_more()
        name = self._any()
        self._hot.append(name)
        self._call("SetTier", pb.SetTierRequest(ref=name, tier=pb.TIER_HOT))

    def _pin(self) -> None:
        if len(self._pinned) >= _MARKED:
            self._unpin()
        name = self._any()
        self._pinned.append(name)
        self._call("Pin", pb.PinRequest(ref=name))

    def _hot_no_more(self) -> None:
        self._call("SetTier", pb.SetTierRequest(ref=self._hot.pop(0), tier=pb.TIER_AUTO))

    def _unpin(self) -> None:
        self._call("Unpin", pb.UnpinRequest(ref=self._pinned.pop(0)))

    def _remove(self) -> None:
        self._call("Remove", pb.RemoveRequest(ref=self._any()))

    def _verify(self) -> None:
        stub = self._cache.connection.stub
        request = pb.VerifyRequest(ref=self._any(), repair=True)
        for answer in self._cache.connection.stream(stub.Verify, request, timeout_s=_TIMEOUT_S):
            if answer.HasField("damage"):
                self._told.is_wrong(f"verify found damage: {answer.damage}")

    def _watch(self) -> None:
        stub = self._cache.connection.stub
        for _ in itertools.islice(self._cache.connection.stream(stub.Watch, pb.WatchRequest(), timeout_s=5), 20):
            pass

    def _leases(self) -> None:
        self._call("ListLeases", pb.ListLeasesRequest())


def main() -> None:
    """Until told to end."""
    order = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    told, ending = Told(), threading.Event()
    names = [model.name for model in load(Path(order["models"]))]
    threads = [Operator(order["socket"], names, told, ending) for _ in range(order["threads"])]
    run_until_told(threads, told, ending, lambda: 0)


if __name__ == "__main__":
    main()
