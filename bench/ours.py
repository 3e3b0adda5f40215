"""``cached`` as a contestant: a model, from wherever it is evicted to, until it is ready in a worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import cached_client
from bench.cpu import measured, wait_idle
from bench.peers.fingerprint import fingerprint, fingerprint_of_files
from bench.results import Role, Sample
from cached import __version__
from cached.cli.measure.cpu import tree_cpu_s
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import DaemonProcess, segments_of, wait_for

_POOL_TICK_S = 1.2
"""Within this the daemon begins to clear what came into its pool; after it, it idles once the pool is clear."""


class CachedContestant:
    """Attaches ``model`` after evicting all that the daemon has, and waits until all of it is ready, that is checked.

    ``start`` gives the daemon. ``level`` is what it is evicted from (all levels, or only L1); with ``forget`` the model
    is removed, so that each load is the first of its content: what is known already is compared chunk by chunk with
    the record of its first load, and needs no digest of the whole. ``expected`` is the check
    that the report must name and the level that it must come from. Processor time is that of the daemon, of its movers
    (also those that ended) and of this process as the worker; ``later_cpu_s`` is what the daemon spends on the load
    afterwards: digests, writing to disk, making the next segments ready.
    """

    role = Role.OURS
    version = __version__

    def __init__(
        self,
        name: str,
        title: str,
        *,
        start: Callable[[], DaemonProcess],
        model: str,
        files: Sequence[Path],
        level: pb.Level = pb.LEVEL_UNSPECIFIED,
        forget: bool = False,
        expected: tuple[str, str] = ("origin-checksum", "l3"),
        server_pids: Sequence[int] = (),
    ) -> None:
        self.name, self.title = name, title
        self._start = start
        self._model = model
        self._files = files
        self._level = level
        self._forget = forget
        self._expected = expected
        self._server_pids = tuple(server_pids)
        self._daemon: DaemonProcess | None = None
        self._runs = 0
        self._buffer = bytearray(4 << 20)

    def prepare(self) -> None:
        """The first time, the daemon is started and loads the model once, for its pool; then it is evicted."""
        if self._daemon is None:
            self._daemon = self._start()
            self._load()
        self._evict(self._daemon)
        self._have_pool_back(self._daemon)

    def run(self) -> Sample:
        """Raises AssertionError if what came is not the checkpoint, or was not checked as it should be."""
        daemon = self._daemon
        assert daemon is not None
        server_cpu_s = tree_cpu_s(*self._server_pids)
        with cached_client.connect(str(daemon.socket)) as cache:
            cache.wait_ready(30)
            started_s = time.monotonic()
            with ExitStack() as stack:
                with measured((daemon.pid,)) as span:
                    model = stack.enter_context(cache.attach(self._model))
                    extra = self.use(model, started_s)
                    report = model.wait()
                size_bytes = sum(info.size_bytes for info in model.files.values())
            before_s = tree_cpu_s(daemon.pid)
            server_cpu_s = tree_cpu_s(*self._server_pids) - server_cpu_s
            self._settle(daemon)
            later_s = tree_cpu_s(daemon.pid) - before_s
            self._check(cache)
        self._evict(daemon)
        found = (report.checked_by, report.from_level)
        assert found == self._expected, f"checked by and loaded from {found}, not {self._expected}"
        return Sample(span.seconds, size_bytes, span.cpu_s, later_s, server_cpu_s, extra)

    def use(self, model: cached_client.Model, started_s: float) -> dict[str, float]:
        """What the worker does with a model that may still be arriving, and figures of that; nothing here."""
        return {}

    def close(self) -> None:
        """The daemon belongs to the site."""

    def _load(self) -> None:
        assert self._daemon is not None
        with cached_client.connect(str(self._daemon.socket)) as cache, cache.attach(self._model) as model:
            model.wait()
        self._settle(self._daemon)

    def _have_pool_back(self, daemon: DaemonProcess) -> None:
        """Reads what is in the pool: the host of a virtual machine may have taken it meanwhile, as in `touch_and_free`.

        A pool lies idle for as long as the others take their turns, and their memory is used all the time.
        """
        for segment in segments_of(str(daemon.state_dir), Path(f"/proc/{daemon.pid}/root/dev/shm")):
            with segment.open("rb", buffering=0) as file:
                while file.readinto(self._buffer):
                    pass

    def _settle(self, daemon: DaemonProcess) -> None:
        """Until every digest is known and nothing works for the load any more."""
        with daemon.stub() as stub:
            request = pb.DescribeRequest(ref=self._model)
            wait_for(lambda: all(file.sha256 for file in stub.Describe(request).files), "every digest")
            wait_for(lambda: not stub.Stats(pb.StatsRequest()).active_load_count, "no load")
        wait_idle(daemon.pid)

    def _evict(self, daemon: DaemonProcess) -> None:
        """All models, for they may share their content."""
        with daemon.stub() as stub:
            for model in stub.List(pb.ListRequest()).models:
                if self._forget:
                    stub.Remove(pb.RemoveRequest(ref=model.name))
                elif model.l1_bytes or model.l2_bytes:
                    stub.Evict(pb.EvictRequest(ref=model.name, level=self._level))
            wait_for(lambda: not any(level.withdrawn_bytes for level in stub.Stats(pb.StatsRequest()).levels), "memory")
        time.sleep(_POOL_TICK_S)
        wait_idle(daemon.pid)

    def _check(self, cache: cached_client.Cache) -> None:
        full = self._runs == 0
        self._runs += 1
        with cache.attach(self._model, only_if_resident=True) as model:
            found = fingerprint(((name, model.raw(name)) for name in model.names()), full=full)
        assert found == fingerprint_of_files(self._files, full=full), "what was loaded is not the checkpoint"
