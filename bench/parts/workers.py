"""N workers of one host: separate processes that attach the same model at the same moment.

Cold, the model is in S3 only, and all of them wait for the one download; warm, it is in memory. PSS is the sum over the
workers of how much their proportional share of memory has grown since they were connected, with every byte of every
tensor read: a model that all of them share counts once. What the origin sent is counted by the S3 server's own process
(all bytes that it wrote, protocol included). For comparison: as many processes that load the files with safetensors
from the page cache, which shares memory too, but brings nothing.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.checkpoints import total_bytes
from bench.contest import touch_and_free
from bench.cpu import wait_idle
from bench.options import Options
from bench.results import Cell, FigureTable, PartResult, Requirement
from bench.site import Site
from bench.worker import Worker
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import DaemonProcess

TITLE = "N workers of one host"

_COUNTS = (1, 2, 4, 8)
_MODEL = "dense"
_HEADS = [
    "workers",
    "last ready, s",
    "first ready, s",
    "PSS of all, of the model",
    "own copies, MB",
    "origin sent, of the model",
]


@dataclass(slots=True)
class _Group:
    """What one count of workers was found to need, over all rounds."""

    last_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    pss: list[float] = field(default_factory=list)
    own_mb: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)

    def row(self, count: int) -> list[Cell]:
        columns = (self.last_s, self.first_s, self.pss, self.own_mb, self.sent)
        return [count, *(statistics.median(column) if column else None for column in columns)]


def run(options: Options) -> PartResult:
    """A table each for cold, warm and safetensors."""
    source = options.checkpoints.get(_MODEL, size_bytes=options.size_bytes, shard_bytes=options.size_bytes // 4)
    result = PartResult("workers", TITLE)
    with Site(options.folder / "site") as site:
        site.push(_MODEL, source)
        settings: dict[str, dict[str, Any]] = {
            "l1": {"capacity": "60%", "pool_bytes": "auto"},
            "l2": {"enabled": False},
        }
        daemon = site.daemon("workers", models={_MODEL: site.by_crc(_MODEL)}, settings=settings)
        race = _Race(options, site, daemon, source)
        cold = {count: race.groups(count, "cold") for count in _COUNTS}
        warm = {count: race.groups(count, "warm") for count in _COUNTS}
        plain = {count: race.groups(count, "plain") for count in _COUNTS}
    megabytes = f"{total_bytes(source, '*.safetensors') / 1e6:,.0f} MB"
    for name, title, groups in (
        ("cold", f"cached, cold: {megabytes} from S3, attached by all at once", cold),
        ("warm", "cached, warm: the model is in memory", warm),
        ("plain", "safetensors load_file, files in the page cache", plain),
    ):
        result.tables.append(FigureTable(name, title, _HEADS, [group.row(count) for count, group in groups.items()]))
    most = _COUNTS[-1]
    sent = max((value for group in cold.values() for value in group.sent), default=None)
    pss = max((value for group in [*cold.values(), *warm.values()] for value in group.pss), default=None)
    result.requirements = [
        Requirement(f"bytes from the origin for up to {most} workers, to the model's", sent, 1.05, False, "×"),
        Requirement(f"PSS of up to {most} workers together, to the model's", pss, 1.2, False, "×"),
    ]
    return result


class _Race:
    def __init__(self, options: Options, site: Site, daemon: DaemonProcess, source: Path) -> None:
        self._options = options
        self._site = site
        self._daemon = daemon
        self._paths = [str(path) for path in sorted(source.glob("*.safetensors"))]
        self._size_bytes = total_bytes(source, "*.safetensors")

    def groups(self, count: int, how: str) -> _Group:
        """All rounds of so many workers."""
        group = _Group()
        for number in range(self._options.rounds):
            self._round(group, count, how, number)
        last_s, pss = statistics.median(group.last_s), statistics.median(group.pss)
        self._options.console.print(f"  {how:<6} {count} workers: {last_s:7.3f} s, PSS {pss:.2f} of the model")
        return group

    def _round(self, group: _Group, count: int, how: str, number: int) -> None:
        order: dict[str, Any] = {"paths": self._paths}
        if how != "plain":
            order = {"socket": str(self._daemon.socket), "model": _MODEL}
        log = self._options.folder / "logs" / f"{how}.log"
        with ExitStack() as stack:
            workers = [stack.enter_context(Worker("member", order, log)) for _ in range(count)]
            _all(workers, "ready")
            if how == "cold":
                self._evict(first=number == 0)
                touch_and_free(self._size_bytes * 5 // 4)
            sent = _written_bytes(self._site.s3.pid)
            answers = _all(workers, "load")
            sent = _written_bytes(self._site.s3.pid) - sent
            _all(workers, "read")
            accounts = _all(workers, "account")
            for answer in answers:
                assert answer["size_bytes"] > 0.99 * self._size_bytes, "a worker did not load all of it"
            group.last_s.append(max(answer["seconds"] for answer in answers))
            group.first_s.append(min(answer["seconds"] for answer in answers))
            group.pss.append(sum(account["pss_bytes"] for account in accounts) / self._size_bytes)
            group.own_mb.append(sum(account["own_bytes"] for account in accounts) / 1e6)
            if how != "plain":
                group.sent.append(sent / self._size_bytes)
            _all(workers, "close")

    def _evict(self, *, first: bool) -> None:
        """Out of memory; the first time it is brought once, so that the pool is filled as in a daemon at work."""
        with self._daemon.stub() as stub:
            if first:
                for _ in stub.Pull(pb.PullRequest(ref=_MODEL)):
                    pass
            stub.Evict(pb.EvictRequest(ref=_MODEL))
        wait_idle(self._daemon.pid)


def _all(workers: Sequence[Worker], what: str) -> list[dict[str, Any]]:
    """All at once."""
    for worker in workers:
        worker.tell(do=what)
    return [worker.hear() for worker in workers]


def _written_bytes(pid: int) -> int:
    found = re.search(r"^wchar: (\d+)", Path(f"/proc/{pid}/io").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0
