"""NVMe → memory, cold: a checkpoint that lies on the local drive, nothing of it in the page cache, until it is ready.

The limit is fio with direct reads into its own buffers: no checks, and no memory that anybody else could use. It reads
into small pages, as it usually does, and into huge ones, which a drive fills faster. All contestants read the files of
a daemon's disk level, the peers by links that have the names of the checkpoint's files. `cached` compares every chunk
with its checksum; nobody else checks anything.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cached_client
from bench.contest import Contestant, hold
from bench.fio import FioContestant, make_cold
from bench.options import Options
from bench.ours import CachedContestant
from bench.peer import PeerContestant
from bench.results import Contest, PartResult, Requirement, Role
from bench.show import turn_printer
from bench.site import huge_page_command
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import DaemonProcess, wait_for

TITLE = "NVMe → memory, cold page cache"

_SERVE = (sys.executable, "-c", "import sys; from cached.cli.main import main; sys.exit(main())")
_MODEL = "model"
_FIO = ((8, 2 << 20, True), (8, 4 << 20, True), (8, 16 << 20, True), (8, 2 << 20, False))
"""Threads, block sizes, and whether into huge pages. Eight threads of 2 MiB are what the movers of two cores have."""


def run(options: Options) -> PartResult:
    """One contest for a checkpoint of several files, one for a single file."""
    result = PartResult("nvme", TITLE)
    for name, title, count in (("shards", "four files", 4), ("single", "a single file", 1)):
        if options.wants_contest(name):
            shard_bytes = options.size_bytes // count
            source = options.checkpoints.get(name, size_bytes=options.size_bytes, shard_bytes=shard_bytes)
            with ExitStack() as stack:
                result.contests.append(_Race(options, stack, name, title, source).held())
    result.requirements = [found for contest in result.contests for found in requirements(contest)]
    return result


def requirements(contest: Contest) -> list[Requirement]:
    """What has to be reached: of fio as it is usually run, and of fio at its best, with huge pages."""
    limits = [item for item in contest.standings if item.role is Role.LIMIT and item.measured]
    best = max(limits, key=lambda item: item.median("gb_per_s"), default=None)
    rows = (
        ("cached", "with the pool in use", "limit-8x2m", "fio's, the same block size and threads"),
        ("cached", "with the pool in use", best.name if best else "", "fio's best, into huge pages"),
        ("cached-huge", "huge pages, with the pool in use", best.name if best else "", "fio's best, into huge pages"),
    )
    return [
        Requirement(
            f"{contest.title}, {words}: GB/s, every chunk checked, to {of}", contest.ratio(ours, limit), 0.9, unit="×"
        )
        for ours, words, limit, of in rows
    ]


class ColdCached(CachedContestant):
    """Evicted from L1 alone, and its files made cold, before each round."""

    def __init__(self, name: str, title: str, race: _Race, kind: str, files: Sequence[Path]) -> None:
        super().__init__(
            name, title, start=lambda: race.daemon(kind), model=_MODEL, files=files, level=pb.LEVEL_L1,
            expected=("first-seen", "l2"),
        )  # fmt: skip
        self._race, self._kind = race, kind

    def prepare(self) -> None:
        """Untimed."""
        super().prepare()
        make_cold(self._race.blobs(self._kind))


class ColdPeer(PeerContestant):
    """Its files are made cold before each round."""

    cold: Sequence[Path] = ()

    def prepare(self) -> None:
        """Untimed."""
        super().prepare()
        make_cold(self.cold)


class _Race:
    """One contest over one checkpoint."""

    def __init__(self, options: Options, stack: ExitStack, name: str, title: str, source: Path) -> None:
        self._options = options
        self._stack = stack
        self._name, self._title, self._source = name, f"NVMe → memory, {title}", source
        self._files = sorted(source.glob("*.safetensors"))
        self._size_bytes = sum(path.stat().st_size for path in self._files)
        self._daemons: dict[str, DaemonProcess] = {}

    def held(self) -> Contest:
        """All rounds."""
        options = self._options
        contest = Contest(self._name, self._title, [], size_bytes=self._size_bytes)
        contestants = [item for item in self._contestants() if options.wants(item.name)]
        return hold(
            contest, contestants, rounds=options.rounds, memory_bytes=self._size_bytes * 5 // 4,
            report=turn_printer(options.console),
        )  # fmt: skip

    def daemon(self, kind: str) -> DaemonProcess:
        """The daemon of that kind, with the model in both levels; started if it is not."""
        if kind not in self._daemons:
            settings: dict[str, dict[str, Any]] = {
                "daemon": {"log_level": "info"},
                "l1": {"capacity": f"{self._size_bytes * 3}B", "pool_bytes": f"{self._size_bytes * 5 // 4}B"},
                "l2": {"capacity": f"{self._size_bytes * 3}B"},
                "transfer": {"movers": 0, "idle_timeout_s": 3600.0},
                "http": {"listen": ""},
            }
            if kind.endswith("nopool"):
                settings["l1"]["pool_bytes"] = "0B"
            # A socket's path is short; the temporary folder's may not be.
            short = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="cached-")))
            settings["daemon"]["socket"] = str(short / "cached.sock")
            daemon = DaemonProcess(
                self._options.folder / f"{self._name}-{kind}", models={_MODEL: {"source": f"file://{self._source}"}},
                settings=settings, command=huge_page_command() if kind.startswith("huge") else _SERVE,
            )  # fmt: skip
            daemon.socket, daemon.descriptor_socket = short / "cached.sock", short / "cached-fd.sock"
            self._daemons[kind] = self._stack.enter_context(daemon)
            self._fill(daemon)
        return self._daemons[kind]

    def blobs(self, kind: str) -> list[Path]:
        """The weight files as that daemon has them on disk, in the order of the checkpoint's."""
        with self.daemon(kind).stub() as stub:
            digests = {file.path: file.sha256 for file in stub.Describe(pb.DescribeRequest(ref=_MODEL)).files}
        folder = self.daemon(kind).l2_dir / "blobs"
        return [folder / digests[path.name][:2] / digests[path.name] for path in self._files]

    def _fill(self, daemon: DaemonProcess) -> None:
        with cached_client.connect(str(daemon.socket)) as cache, cache.attach(_MODEL) as model:
            model.wait()
        with daemon.stub() as stub:
            wait_for(lambda: not stub.Stats(pb.StatsRequest()).active_load_count, "the copy on disk")

    def _contestants(self) -> Iterator[Contestant]:
        yield ColdCached("cached", "cached", self, "pool", self._files)
        yield ColdCached("cached-nopool", "cached, no pool", self, "nopool", self._files)
        yield ColdCached("cached-huge", "cached, huge pages", self, "huge", self._files)
        yield ColdCached("cached-huge-nopool", "cached, huge pages, no pool", self, "huge-nopool", self._files)
        yield from self._peers()
        for threads, block_bytes, huge in _FIO:
            yield FioContestant(
                f"limit-{threads}x{block_bytes >> 20}m" + ("-huge" if huge else ""), self.blobs("pool"),
                threads=threads, block_bytes=block_bytes, huge=huge, folder=self._options.folder / "fio-buffers",
            )  # fmt: skip

    def _peers(self) -> Iterator[Contestant]:
        yield self._peer("safetensors", "safetensors load_file", "loadfile")
        for concurrency in ("", "8"):
            environment = {"RUNAI_STREAMER_MEMORY_LIMIT": "-1"}
            environment |= {"RUNAI_STREAMER_CONCURRENCY": concurrency} if concurrency else {}
            words = concurrency or "default"
            yield self._peer(f"runai-{words}", f"runai-model-streamer, {words} threads", "runai", environment)
        yield self._peer("fastsafetensors", "fastsafetensors, without a GPU", "fastsafe")
        yield self._peer("instanttensor", "InstantTensor, without a GPU", "instant")

    def _peer(self, name: str, title: str, module: str, environment: dict[str, str] | None = None) -> PeerContestant:
        links = self._links()
        warm = self._options.checkpoints.get("warm", size_bytes=4 << 20, shard_bytes=4 << 20)
        order = {"paths": list(map(str, links)), "warm_paths": [str(next(warm.glob("*.safetensors")))]}
        peer = ColdPeer(
            name, title, python=self._options.peers_python, module=module, order=json.loads(json.dumps(order)),
            files=self._files, log=self._options.folder / f"{name}-{self._name}.log", environment=environment,
        )  # fmt: skip
        peer.cold = links
        return peer

    def _links(self) -> list[Path]:
        folder = self._options.folder / f"{self._name}-links"
        folder.mkdir(exist_ok=True)
        links = []
        for path, blob in zip(self._files, self.blobs("pool"), strict=True):
            link = folder / path.name
            if not link.is_symlink():
                link.symlink_to(blob)
            links.append(link)
        return links
