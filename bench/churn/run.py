"""One run of the churn: the site, its daemon and its crew, what befalls them, and what is found of it all."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from bench.churn.crew import Crew, Tally
from bench.churn.models import ChurnModel, make_models, save
from bench.churn.samples import Sample, Sampler, children
from bench.site import Site
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import DaemonProcess, wait_for
from tests.invariants import check_at_rest, check_stopped

_PART_L1, _PART_L2 = 0.45, 0.6
"""Budgets, of what all models need; of few models so much that the largest fits."""

_LEAST_BYTES = 60_000_000

_CATALOG_OUT = 5
"""Models that are missing from every other catalog."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run. Periods are seconds between two of a kind; 0: never."""

    duration_s: float = 3600.0
    models: int = 200
    leases: int = 1000
    workers: int = 8
    threads: int = 3
    seed: int = 1
    sample_s: float = 5.0
    worker_kill_s: float = 12.0
    worker_stop_s: float = 17.0
    mover_kill_s: float = 7.0
    catalog_s: float = 9.0
    daemon_kill_s: float = 0.0


@dataclass
class Outcome:
    """What came of it."""

    plan: Plan
    samples: list[Sample] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    happened: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    before: Sample = field(default_factory=dict)
    after: Sample = field(default_factory=dict)
    seconds: float = 0.0
    model_bytes: int = 0


def run(plan: Plan, folder: Path, say: Callable[[str], None]) -> Outcome:
    """Whatever is wrong is among the outcome's problems; raises only where it could not be tried."""
    outcome = Outcome(plan)
    models = make_models(folder / "sources", plan.models, plan.seed)
    blobs = {
        digest: (folder / "sources" / model.name / path) for model in models for path, digest in model.digests.items()
    }
    outcome.model_bytes = sum(path.stat().st_size for path in blobs.values())
    say(f"{plan.models} models, {outcome.model_bytes / 1e6:.0f} MB in {len(blobs)} blobs")
    save(models, folder / "models.json")
    with Site(folder / "site") as site:
        for model in models:
            site.push(model.name, folder / "sources" / model.name)
        _Run(outcome, site, models, folder, say).run()
    return outcome


class _Run:
    def __init__(
        self, outcome: Outcome, site: Site, models: list[ChurnModel], folder: Path, say: Callable[[str], None]
    ) -> None:
        self._outcome, self._plan, self._say = outcome, outcome.plan, say
        self._folder = folder
        self._rng = random.Random(self._plan.seed)
        self._said: set[str] = set()
        self._catalog = {model.name: _entry(site, model, number) for number, model in enumerate(models)}
        heap = folder / "heap.jsonl"
        self._daemon: DaemonProcess = site.daemon(
            "churn",
            models=self._catalog,
            settings={
                "l1": {"capacity": f"{max(_LEAST_BYTES, int(_PART_L1 * outcome.model_bytes))}B", "pool_bytes": "auto"},
                "l2": {"capacity": f"{max(_LEAST_BYTES, int(_PART_L2 * outcome.model_bytes))}B"},
                "transfer": {"movers": 2, "idle_timeout_s": 10.0},
                "http": {"listen": "127.0.0.1:0"},
                "daemon": {"log_level": "info"},
            },
            command=(sys.executable, "-m", "bench.churn.observed", str(heap)),
        )
        self._began_s = time.monotonic()
        self._sampler = Sampler(self._daemon, heap, self._began_s)

    def run(self) -> None:
        """Warm up, churn, rest."""
        self._warm_up()
        self._outcome.before = self._sampler.take()
        self._began_s = self._sampler.began_s = time.monotonic()
        crew = Crew(
            self._folder / "crew", self._daemon.socket, self._folder / "models.json", workers=self._plan.workers,
            leases=self._plan.leases, threads=self._plan.threads,
        )  # fmt: skip
        self._outcome.tally = crew.tally
        with crew:
            self._churn(crew)
            self._outcome.seconds = time.monotonic() - self._began_s
            self._outcome.problems += crew.end()
        self._outcome.problems += crew.tally.wrong
        self._rest()
        self._outcome.problems += [
            f"the daemon met what nobody foresaw: {line['exception']}"
            for line in self._daemon.log_events("internal.traceback", all_starts=True)
        ]

    def _warm_up(self) -> None:
        """One of each: what is imported at the first use is not growth."""
        with self._daemon.stub() as stub:
            for name in list(self._catalog)[:3]:
                for _ in stub.Pull(pb.PullRequest(ref=name, level=pb.LEVEL_L1)):
                    pass
                stub.Evict(pb.EvictRequest(ref=name))
        check_at_rest(self._daemon)

    def _churn(self, crew: Crew) -> None:
        plan = self._plan
        due = {
            self._kill_worker: plan.worker_kill_s, self._stop_worker: plan.worker_stop_s,
            self._kill_mover: plan.mover_kill_s, self._change_catalog: plan.catalog_s,
            self._kill_daemon: plan.daemon_kill_s, self._sample: plan.sample_s, self._report: 30.0,
        }  # fmt: skip
        next_s = {way: time.monotonic() + period_s for way, period_s in due.items() if period_s}
        until_s = self._began_s + plan.duration_s
        while (now_s := time.monotonic()) < until_s and not self._outcome.problems:
            for way in [way for way, at_s in next_s.items() if at_s <= now_s]:
                way(crew)
                next_s[way] = time.monotonic() + due[way] * self._rng.uniform(0.7, 1.3)
            self._outcome.problems += crew.fallen()
            if not self._daemon.is_running:
                self._outcome.problems.append(f"the daemon ended; its log:\n{self._daemon.log()[-5000:]}")
            time.sleep(0.1)

    # What befalls them.

    def _kill_worker(self, crew: Crew) -> None:
        crew.replace_worker(self._rng.randrange(len(crew.workers)))
        self._outcome.happened["workers killed"] += 1

    def _stop_worker(self, crew: Crew) -> None:
        """For two seconds: whoever waits for it does so, and nobody else may."""
        worker = self._rng.choice(crew.workers)
        worker.signal(signal.SIGSTOP)
        time.sleep(2)
        worker.signal(signal.SIGCONT)
        self._outcome.happened["workers stopped and continued"] += 1

    def _kill_mover(self, _crew: Crew) -> None:
        """The youngest: the oldest lives on, so that it would be seen to grow."""
        movers = children(self._daemon.pid)[1:]
        if movers:
            with suppress(ProcessLookupError):
                os.kill(movers[-1], signal.SIGKILL)
                self._outcome.happened["movers killed"] += 1

    def _change_catalog(self, _crew: Crew) -> None:
        """Every other time a few models are missing, and all have other priorities."""
        self._outcome.happened["catalogs loaded"] += 1
        if self._outcome.happened["catalogs loaded"] % 2:
            out = set(self._rng.sample(list(self._catalog), min(_CATALOG_OUT, len(self._catalog) - 1)))
            chosen = {
                name: {**entry, "priority": self._rng.randint(0, 9)}
                for name, entry in self._catalog.items()
                if name not in out
            }
        else:
            chosen = self._catalog
        self._daemon.write_catalog(chosen)

    def _kill_daemon(self, _crew: Crew) -> None:
        self._daemon.restart(kill=True)
        self._outcome.happened["daemons killed"] += 1

    # What is seen.

    def _sample(self, crew: Crew) -> None:
        try:
            sample = self._sampler.take()
        except (OSError, grpc.RpcError) as error:
            self._outcome.problems.append(f"the daemon could not be looked at: {error}")
            return
        sample |= {"done": crew.tally.done, "told_leases": crew.leases}
        sample["log_mb"] = self._daemon.log_file.stat().st_size / 1e6
        sample["state_mb"] = _size_of(self._daemon.state_dir) / 1e6
        self._outcome.samples.append(sample)

    def _report(self, crew: Crew) -> None:
        for what, text in crew.tally.unexpected(self._plan.daemon_kill_s > 0).items():
            if what not in self._said:
                self._said.add(what)
                self._say(f"unexpected: {what}: {text}")
        if self._outcome.samples:
            last = self._outcome.samples[-1]
            shown = {
                "done": "done",
                "leases": "leases",
                "rss_mb": "RSS",
                "anonymous_mb": "anonymous",
                "python_blocks": "blocks",
                "tasks": "tasks",
                "descriptors": "descriptors",
                "threads": "threads",
                "mover_anonymous_mb": "mover",
                "l1_used_mb": "L1",
                "l2_used_mb": "L2",
                "segments": "segments",
            }
            figures = "  ".join(f"{title} {last.get(name, 0):.0f}" for name, title in shown.items())
            self._say(f"{last['at_s']:6.0f} s  {figures}  refused {sum(crew.tally.errors.values())}")

    def _rest(self) -> None:
        """Everything was given back: the promises hold, and an orderly stop leaves nothing."""
        daemon = self._daemon
        if not daemon.is_running:
            return
        daemon.write_catalog(self._catalog)
        try:
            wait_for(lambda: not daemon.stats().lease_count, "every lease has ended")
            self._give_up_parts()
            check_at_rest(daemon)
            wait_for(lambda: not children(daemon.pid), "every mover has ended")
            self._outcome.after = self._sampler.take()
            pid = daemon.pid
            daemon.terminate()
            check_stopped(daemon, pid)
        except AssertionError as error:
            self._outcome.problems.append(f"afterwards: {error}")

    def _give_up_parts(self) -> None:
        """What was brought of models of which only a part was wanted may stay for the next who wants it.

        An operator whose call a kill of the daemon cut off may have left a model hot or pinned.
        """
        with self._daemon.stub() as stub:
            wait_for(lambda: not stub.Stats(pb.StatsRequest()).active_load_count, "no load is under way")
            for model in stub.List(pb.ListRequest()).models:
                if model.pinned:
                    stub.Unpin(pb.UnpinRequest(ref=model.name))
                if model.tier == pb.TIER_HOT:
                    stub.SetTier(pb.SetTierRequest(ref=model.name, tier=pb.TIER_AUTO))
                stub.Evict(pb.EvictRequest(ref=model.name, level=pb.LEVEL_L1))


def _entry(site: Site, model: ChurnModel, number: int) -> dict[str, Any]:
    """Half of them are checked by the catalog's SHA-256, half by the origin's checksums."""
    entry = site.by_crc(model.name)
    return {**entry, "sha256": model.digests} if number % 2 else entry


def _size_of(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.lstat().st_size
    return total
