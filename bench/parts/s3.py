"""S3 → memory: a checkpoint of several shards from a real S3 server on this host until all of it can be used.

The limit is a reader of plain sockets, four threads with presigned GETs of 8 MiB, straight into a tmpfs mapping that is
used again and again: no checks, no page faults, no protocol but the bare minimum. Who has no pool is bound by what the
kernel does for fresh pages: the same reader has another turn, into mappings without any. The server shares the cores
with whoever reads, so the limit is one of processor time, and CPU-seconds per GB say more than GB/s.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.contest import Contestant, hold
from bench.options import Options
from bench.ours import CachedContestant
from bench.peer import PeerContestant
from bench.results import Contest, PartResult, Requirement, Role
from bench.show import turn_printer
from bench.site import BUCKET, Site, huge_page_command
from tests.integration.harness import DaemonProcess

TITLE = "S3 → memory, HTTP and TLS"

_THREADS = 4
_RANGE_BYTES = 8 << 20
_MODEL = "dense"


def run(options: Options) -> PartResult:
    """One contest for HTTP and one for TLS."""
    shard_bytes = max(1 << 20, min(512 << 20, options.size_bytes // 4))
    source = options.checkpoints.get("dense", size_bytes=options.size_bytes, shard_bytes=shard_bytes)
    warm = options.checkpoints.get("warm", size_bytes=4 << 20, shard_bytes=4 << 20)
    result = PartResult("s3", TITLE)
    for scheme in ("http", "tls"):
        if options.wants_contest(scheme):
            with Site(options.folder / scheme, tls=scheme == "tls") as site:
                site.push(_MODEL, source)
                site.push("warm", warm)
                result.contests.append(_Race(options, site, scheme, source).held())
    result.requirements = requirements(result)
    return result


def requirements(result: PartResult) -> list[Requirement]:
    """What has to be reached, from the contests that were held."""
    contests = {contest.name: contest for contest in result.contests}
    found: list[Requirement] = []
    http, tls = contests.get("http"), contests.get("tls")
    for pool, words in (("", "with the pool in use"), ("-nopool", "without a pool")):
        crc, sha = f"cached-crc{pool}", f"cached-sha256{pool}"
        if http:
            rows = (
                ("GB/s, checked by CRC64-NVME, to runai's", crc, _best(http, "runai"), "gb_per_s", 2.0, True),
                ("CPU-s/GB, checked by CRC64-NVME, to runai's", crc, _best(http, "runai"), "cpu_s_per_gb", 0.4, False),
                ("GB/s of the same, to s3torchconnector's", crc, _best(http, "s3torch"), "gb_per_s", 1.5, True),
                ("GB/s of the same, to the limit", crc, "limit", "gb_per_s", 0.8, True),
                ("GB/s, checked by SHA-256, to runai's", sha, _best(http, "runai"), "gb_per_s", 1.5, True),
                ("CPU-s/GB, checked by SHA-256, to runai's", sha, _best(http, "runai"), "cpu_s_per_gb", 0.65, False),
            )
            found += [_required(http, f"HTTP, {words}: {text}", *rest) for text, *rest in rows]
            if pool:
                text = "GB/s, checked by CRC64-NVME, to the limit into fresh memory"
                found.append(_required(http, f"HTTP, {words}: {text}", crc, "limit-fresh", "gb_per_s", 0.8, True))
        if tls:
            text = f"TLS, {words}: GB/s, checked by CRC64-NVME, to the best peer's"
            found.append(_required(tls, text, crc, _best_peer(tls), "gb_per_s", 1.0, True))
    return found


def _required(
    contest: Contest, text: str, ours: str, other: str, quantity: str, bound: float, at_least: bool
) -> Requirement:
    return Requirement(text, contest.ratio(ours, other, quantity), bound, at_least, "×")


def _best(contest: Contest, peer: str) -> str:
    """The quickest setting of a peer."""
    return _quickest(contest, lambda name: name.startswith(peer))


def _best_peer(contest: Contest) -> str:
    peers = {item.name for item in contest.standings if item.role is Role.PEER}
    return _quickest(contest, lambda name: name in peers)


def _quickest(contest: Contest, wanted: Callable[[str], bool]) -> str:
    rates = {item.name: item.median("gb_per_s") for item in contest.standings if item.measured and wanted(item.name)}
    return max(rates, key=lambda name: rates[name], default="")


class _Race:
    """One contest, against one server."""

    def __init__(self, options: Options, site: Site, scheme: str, source: Path) -> None:
        self._options = options
        self._site = site
        self._scheme = scheme
        self._files = sorted(source.glob("*.safetensors"))
        self._size_bytes = sum(path.stat().st_size for path in self._files)
        self._catalog = {"crc": site.by_crc(_MODEL), "sha256": site.by_sha256(_MODEL, source)}
        self._stack = ExitStack()

    def held(self) -> Contest:
        """All rounds."""
        options = self._options
        title = f"S3 → memory over {self._scheme.upper()}"
        contest = Contest(self._scheme, title, [], size_bytes=self._size_bytes)
        contestants = [item for item in self._contestants() if options.wants(item.name)]
        with self._stack:
            return hold(
                contest, contestants, rounds=options.rounds, memory_bytes=self._size_bytes * 5 // 4,
                report=turn_printer(options.console),
            )  # fmt: skip

    def _contestants(self) -> Iterator[Contestant]:
        yield from self._ours()
        yield from self._peers()
        yield self._limit("limit", "plain sockets (the limit)", fresh=False)
        yield self._limit("limit-fresh", "plain sockets, fresh memory (the limit without a pool)", fresh=True)

    # Ours.

    def _ours(self) -> Iterator[Contestant]:
        yield self._cached("cached-crc", "cached, CRC64-NVME", "crc", "pool")
        yield self._cached("cached-sha256", "cached, SHA-256", "sha256", "pool")
        yield self._cached("cached-crc-nopool", "cached, CRC64-NVME, no pool", "crc", "nopool")
        yield self._cached("cached-sha256-nopool", "cached, SHA-256, no pool", "sha256", "nopool")
        yield self._cached("cached-known", "cached, content known from before", "sha256", "pool", forget=False)
        yield self._cached("cached-crc-l2", "cached, CRC64-NVME, disk written behind", "crc", "l2")
        yield self._cached("cached-crc-huge", "cached, CRC64-NVME, huge pages", "crc", "huge")
        yield self._cached("cached-crc-huge-nopool", "cached, CRC64-NVME, huge pages, no pool", "crc", "huge-nopool")

    def _cached(self, name: str, title: str, check: str, kind: str, *, forget: bool = True) -> CachedContestant:
        checked_by = {"crc": "origin-checksum", "sha256": "catalog-sha256"}[check]
        daemon = check if forget else "known"
        return CachedContestant(
            name, title, start=lambda: self._daemon(daemon, check, kind), model=check, files=self._files, forget=forget,
            expected=(checked_by, "l3"), server_pids=(self._site.s3.pid,),
        )  # fmt: skip

    def _daemon(self, name: str, check: str, kind: str) -> DaemonProcess:
        """One for each way of checking and of having memory."""
        settings: dict[str, dict[str, Any]] = {
            "l1": {"capacity": f"{self._size_bytes * 3}B", "pool_bytes": f"{self._size_bytes * 5 // 4}B"},
            "l2": {"enabled": kind == "l2", "capacity": f"{self._size_bytes * 3}B"},
        }
        if kind.endswith("nopool"):
            settings["l1"]["pool_bytes"] = "0B"
        more = {"command": huge_page_command()} if kind.startswith("huge") else {}
        return self._site.daemon(f"{name}-{kind}", models={check: self._catalog[check]}, settings=settings, **more)

    # The others.

    def _peers(self) -> Iterator[Contestant]:
        uris = {"paths": self._uris(_MODEL), "warm_paths": self._uris("warm")}
        for concurrency in ("", "8", "16"):
            environment = {"RUNAI_STREAMER_MEMORY_LIMIT": "-1", "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0"}
            if concurrency:
                environment["RUNAI_STREAMER_CONCURRENCY"] = concurrency
            title = f"runai-model-streamer, {concurrency or 'default'} threads"
            yield self._peer(f"runai-{concurrency or 'default'}", title, "runai", uris, environment)
        for reader in ("sequential", "ranged"):
            order = {"reader": reader, "threads": _THREADS if reader == "sequential" else 8, "range_bytes": 32 << 20}
            yield self._peer(f"s3torch-{reader}", f"s3torchconnector, {reader}", "s3torch", self._objects(order))
        for client, threads in (("classic", 8), ("crt", 8)):
            order = {"client": client, "threads": threads, "folder": self._shm_folder()}
            yield self._peer(f"boto3-{client}", f"boto3 download_file, {client}", "boto", self._objects(order))

    def _limit(self, name: str, title: str, *, fresh: bool) -> Contestant:
        objects = [(self._site.presigned(key), size) for key, size in self._site.objects(_MODEL)]
        order = {
            "objects": objects, "threads": _THREADS, "range_bytes": _RANGE_BYTES, "folder": self._shm_folder(),
            "ca_bundle": self._site.s3.ca_bundle, "fresh": fresh,
        }  # fmt: skip
        return self._peer(name, title, "raw", order, role=Role.LIMIT, python=Path(sys.executable))

    def _peer(
        self,
        name: str,
        title: str,
        module: str,
        order: dict[str, Any],
        environment: dict[str, str] | None = None,
        *,
        role: Role = Role.PEER,
        python: Path | None = None,
    ) -> PeerContestant:
        server = self._site.s3
        trusted = {"AWS_CA_BUNDLE": server.ca_bundle, "SSL_CERT_FILE": server.ca_bundle} if server.ca_bundle else {}
        access = {**server.env(), "AWS_ENDPOINT_URL": server.endpoint_url, "AWS_REGION": "us-east-1", **trusted}
        access |= environment or {}
        return PeerContestant(
            name, title, python=python or self._options.peers_python, module=module, order=order, files=self._files,
            role=role, log=self._options.folder / f"{name}-{self._scheme}.log", environment=access,
            server_pids=(server.pid,),
        )  # fmt: skip

    def _uris(self, name: str) -> list[str]:
        return [f"s3://{BUCKET}/{key}" for key, _ in self._site.objects(name)]

    def _objects(self, order: dict[str, Any]) -> dict[str, Any]:
        site = self._site
        where = {"bucket": BUCKET, "endpoint_url": site.s3.endpoint_url, "ca_bundle": site.s3.ca_bundle}
        return {**order, **where, "objects": site.objects(_MODEL), "warm_objects": site.objects("warm")}

    def _shm_folder(self) -> str:
        folder = tempfile.mkdtemp(prefix="cached-bench-", dir="/dev/shm")
        self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder
