"""A worker process of the churn: holds its share of the leases, and exchanges them as fast as it can until told to end.

``python -m bench.churn.worker ORDER.json``. See ``bench.churn.told`` for how it tells and ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cached_client
from bench.churn.models import ChurnModel, load
from bench.churn.told import Told, run_until_told
from cached_client._proto import cached_pb2 as pb

_TIMEOUT_S = 60.0
_SHORT_S = 0.002
_CHECKED_SHARE = 0.25
"""Of the attaches: one file is read whole, and its SHA-256 compared."""

_FOCUS = 30
"""Models that are in demand at one moment; another one joins them, and one leaves, every so often."""

_FOCUS_STEP_S = 1.5


class Churner(threading.Thread):
    """One thread of a worker: holds ``leases`` models and exchanges one after the other."""

    def __init__(self, socket: str, models: list[ChurnModel], leases: int, told: Told, ending: threading.Event) -> None:
        super().__init__()
        self._socket = socket
        self._cache = cached_client.connect(socket)
        self._models = models
        self._leases = leases
        self._told = told
        self._ending = ending
        self._rng = random.Random()
        self._held: list[tuple[ChurnModel, cached_client.Model]] = []
        self._ways: list[tuple[int, Callable[[], None]]] = [
            (70, self._exchange), (8, self._look_again), (6, self._list), (4, self._describe), (3, self._drop),
            (2, self._connect_anew), (2, self._no_patience), (1, self._overview),
        ]  # fmt: skip

    @property
    def held(self) -> int:
        """Leases right now."""
        return len(self._held)

    def run(self) -> None:
        """Until it is told to end; then all is given back."""
        weights = [weight for weight, _ in self._ways]
        try:
            while not self._ending.is_set():
                full = len(self._held) >= self._leases
                self._do(self._rng.choices(self._ways, weights)[0][1] if full else self._attach)
        finally:
            while self._held:
                self._held.pop()[1].close()
            self._cache.close()

    def _do(self, way: Callable[[], None]) -> None:
        what = way.__name__.lstrip("_")
        try:
            way()
        except cached_client.CacheError as error:
            self._told.failed(what, error.reason, str(error))
            if error.reason in ("UNAVAILABLE", "DAEMON_UNAVAILABLE"):
                self._ending.wait(0.05)

    def _chosen(self) -> ChurnModel:
        """One of those that are in demand now, rarely any: all threads of all workers agree on which these are."""
        count = len(self._models)
        if self._rng.random() < 0.05:
            return self._models[self._rng.randrange(count)]
        first = int(time.monotonic() / _FOCUS_STEP_S) * 7
        return self._models[(first + 7 * self._rng.randrange(_FOCUS)) % count]

    # The ways.

    def _exchange(self) -> None:
        """Releases the oldest, or any; then attaches another."""
        at = 0 if self._rng.random() < 0.8 else self._rng.randrange(len(self._held))
        _, model = self._held.pop(at)
        began_s = time.perf_counter()
        model.close()
        self._told.did("release", time.perf_counter() - began_s)
        self._attach()

    def _attach(self) -> None:
        chosen = self._chosen()
        share = self._rng.random()
        if share < 0.2:
            self._attach_part(chosen)
            return
        began_s = time.perf_counter()
        model = self._cache.attach(chosen.name, timeout_s=_TIMEOUT_S, wait=share < 0.8, client_name="churn")
        seconds = time.perf_counter() - began_s
        self._held.append((chosen, model))
        report = model.report
        key = f"attach, from {report.from_level}" if report else "attach, not waited for"
        self._told.did("attach", seconds, key)
        if self._rng.random() < _CHECKED_SHARE:
            self._check(chosen, model)

    def _attach_part(self, chosen: ChurnModel) -> None:
        path, tensors = self._rng.choice(list(chosen.tensors.items()))
        wanted = [self._rng.choice(list(tensors))]
        rest_follows = self._rng.random() < 0.3
        files = [] if rest_follows else ["config.json", path][: self._rng.randint(0, 2)]
        began_s = time.perf_counter()
        model = self._cache.attach(
            chosen.name, timeout_s=_TIMEOUT_S, wait=True, only=None if rest_follows else wanted,
            first=wanted if rest_follows else None, files=files, client_name="churn",
        )  # fmt: skip
        self._told.did("attach a part", time.perf_counter() - began_s)
        self._held.append((chosen, model))
        for file in files:
            self._compare(chosen, model, file)
        self._told.did("tensor read and checked")
        if hashlib.sha256(model.raw(wanted[0], _TIMEOUT_S)).hexdigest() != tensors[wanted[0]]:
            self._told.is_wrong(f"{wanted[0]} of {chosen.name}@{model.revision}, attached alone, has other bytes")

    def _look_again(self) -> None:
        """At what has been held for a while: evictions of others must not have touched it."""
        self._check(*self._rng.choice(self._held))

    def _check(self, chosen: ChurnModel, model: cached_client.Model) -> None:
        if not model.partial:
            self._compare(chosen, model, self._rng.choice(list(chosen.digests)))

    def _compare(self, chosen: ChurnModel, model: cached_client.Model, path: str) -> None:
        digest = hashlib.sha256(model.view(path, _TIMEOUT_S)).hexdigest()
        self._told.did("file read and checked")
        if digest != chosen.digests[path]:
            self._told.is_wrong(f"{chosen.name}@{model.revision}/{path} has the SHA-256 {digest}")

    def _list(self) -> None:
        began_s = time.perf_counter()
        self._cache.list()
        self._told.did("list", time.perf_counter() - began_s)

    def _describe(self) -> None:
        chosen, model = self._rng.choice(self._held)
        if not model.files:
            self._told.did("describe")  # a selection of tensors alone
        elif set(model.files) - set(chosen.digests):
            self._told.is_wrong(f"{chosen.name} has files of others: {sorted(model.files)}")
        else:
            self._told.did("describe")

    def _overview(self) -> None:
        stub = self._cache.connection.stub
        request = pb.OverviewRequest(models=20, leases=20, events=20, moves=20)
        self._cache.connection.call(stub.Overview, request, timeout_s=_TIMEOUT_S)
        self._told.did("overview")

    def _drop(self) -> None:
        """Forgets one without closing it, as code that crashed out of a function does."""
        self._held.pop(self._rng.randrange(len(self._held)))
        self._told.did("lease dropped")

    def _connect_anew(self) -> None:
        """A process's whole way: a channel of its own, an attach, everything closed again."""
        with cached_client.connect(self._socket) as cache:
            model = cache.attach(self._chosen().name, timeout_s=_TIMEOUT_S)
            if self._rng.random() < 0.5:
                model.close()
        self._told.did("connection made anew")

    def _no_patience(self) -> None:
        """Gives up, mostly before the daemon has answered."""
        with contextlib.suppress(cached_client.TimeoutExpiredError):
            self._cache.attach(self._chosen().name, timeout_s=_SHORT_S, wait=True).close()
        self._told.did("attach given up")


def main() -> None:
    """Until told to end. Exits with 1 if a thread ended before."""
    order = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    told, ending = Told(), threading.Event()
    models = load(Path(order["models"]))
    share, rest = divmod(order["leases"], order["threads"])
    threads = [
        Churner(order["socket"], models, share + (number < rest), told, ending) for number in range(order["threads"])
    ]
    run_until_told(threads, told, ending, lambda: sum(thread.held for thread in threads))


if __name__ == "__main__":
    main()
