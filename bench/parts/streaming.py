"""Cold attach while downloading: seconds to the first and to the last tensor, beside the pull alone.

The daemon is idle and has no mover when the clock starts, so what is measured begins with starting one. Two contestants
take turns: one attaches and waits until the model is ready (the pull alone), the other one attaches and goes through
``model.stream()``, which ends when the last tensor was handed out and the model is ready. Three checkpoints: a single
file, many shards, and a mixture of experts with more than 10,000 tensors; and two networks: the server on this host at
full speed, and behind a link of 200 MB/s. The limit of the second is what the pull alone takes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import cached_client
from bench.checkpoints import Kind, dense, moe, total_bytes
from bench.contest import hold
from bench.link import Link
from bench.options import Options
from bench.ours import CachedContestant
from bench.results import Contest, FigureTable, PartResult, Requirement
from bench.show import turn_printer
from bench.site import Site
from tests.integration.harness import DaemonProcess, wait_for

TITLE = "Cold attach while downloading: first and last tensor"

_LINK_BYTES_PER_S = 200e6
_LINK_SHARE = 4
"""Over the link, a checkpoint smaller by this: it is the latency that counts there, and rounds are long."""
_FIRST_TENSOR_S = 0.5
_FIRST, _LAST = "first tensor s", "last tensor s"


@dataclass(frozen=True, slots=True)
class _Shape:
    name: str
    title: str
    files: int
    kind: Kind


_SHAPES = (
    _Shape("single", "a single file", 1, dense),
    _Shape("shards", "16 shards", 16, dense),
    _Shape("moe", "a mixture of experts, more than 10,000 tensors", 4, moe),
)


def run(options: Options) -> PartResult:
    """A contest for each checkpoint and network."""
    result = PartResult("streaming", TITLE)
    for link in (False, True):
        for shape in _SHAPES:
            name = f"{shape.name}-link" if link else shape.name
            if options.wants_contest(name):
                result.contests.append(_held(options, name, shape, link=link))
    result.requirements = [found for contest in result.contests for found in requirements(contest)]
    result.tables = [_table(result.contests)]
    return result


def requirements(contest: Contest) -> list[Requirement]:
    """What has to be reached."""
    stream = contest.get("cached-stream")
    return [
        Requirement(
            f"{contest.title}: seconds of the streaming attach, to those of the pull alone",
            contest.ratio("cached-stream", "cached-pull", "seconds"), 1.15, at_least=False, unit="×",
        ),
        Requirement(
            f"{contest.title}: seconds from the attach to the first tensor",
            stream.median(_FIRST) if stream else None, _FIRST_TENSOR_S, at_least=False, unit="s",
        ),
    ]  # fmt: skip


def _table(contests: Sequence[Contest]) -> FigureTable:
    rows = []
    for contest in contests:
        pull, stream = contest.get("cached-pull"), contest.get("cached-stream")
        if pull and stream:
            rows.append(
                [
                    contest.title, contest.size_bytes / 1e9, stream.median(_FIRST), stream.median(_LAST),
                    stream.median("seconds"), pull.median("seconds"), contest.ratio(stream.name, pull.name, "seconds"),
                ]
            )  # fmt: skip
    heads = ["checkpoint", "GB", "first tensor, s", "last tensor, s", "stream ends, s", "pull alone, s", "ratio"]
    return FigureTable("timeline", "Seconds from the attach, medians", heads, rows)


def _held(options: Options, name: str, shape: _Shape, *, link: bool) -> Contest:
    size_bytes = options.size_bytes // (_LINK_SHARE if link else 1)
    source = options.checkpoints.get(
        name, size_bytes=size_bytes, shard_bytes=max(1 << 20, -(-size_bytes // shape.files)), kind=shape.kind
    )
    files = sorted(source.glob("*.safetensors"))
    title = shape.title[0].upper() + shape.title[1:] + (", over a link of 200 MB/s" if link else "")
    contest = Contest(name, title, [], size_bytes=total_bytes(source))
    with _site(options.folder / name, name, source, link=link) as (site, origin):
        models = {name: {**site.by_crc(name), "origin": origin}}

        def start(kind: str) -> Callable[[], DaemonProcess]:
            return lambda: _daemon(site, kind, models, contest.size_bytes)

        servers = (site.s3.pid,)
        contestants = [
            ColdContestant(
                "cached-pull", "attach and wait (the pull alone)", start=start("pull"), model=name, files=files,
                server_pids=servers,
            ),
            StreamingContestant(
                "cached-stream", "attach and stream", start=start("stream"), model=name, files=files,
                server_pids=servers, count=_tensor_count(source),
            ),
        ]  # fmt: skip
        chosen = [item for item in contestants if options.wants(item.name)]
        return hold(
            contest, chosen, rounds=options.rounds, memory_bytes=contest.size_bytes * 5 // 4,
            report=turn_printer(options.console),
        )  # fmt: skip


@contextmanager
def _site(folder: Path, name: str, source: Path, *, link: bool) -> Iterator[tuple[Site, dict[str, str]]]:
    """The server with the checkpoint, and the origin's options that reach it over the network that is wanted."""
    with Site(folder) as site:
        site.push(name, source)
        with Link(site.s3.endpoint_url, _LINK_BYTES_PER_S) if link else nullcontext() as relay:
            yield site, {**site.s3.options(), **({"endpoint_url": relay.url} if relay else {})}


def _daemon(site: Site, kind: str, models: dict[str, Any], size_bytes: int) -> DaemonProcess:
    return site.daemon(
        kind,
        models=models,
        settings={
            "l1": {"capacity": f"{size_bytes * 3}B", "pool_bytes": f"{size_bytes * 5 // 4}B"},
            "l2": {"enabled": False},
            "transfer": {"idle_timeout_s": 1.0},
        },
    )


def _tensor_count(source: Path) -> int:
    return len(json.loads((source / "model.safetensors.index.json").read_text())["weight_map"])


class ColdContestant(CachedContestant):
    """Before each round everything is evicted, and the daemon's movers have ended."""

    def prepare(self) -> None:
        """Untimed."""
        super().prepare()
        daemon = self._daemon
        assert daemon is not None
        wait_for(lambda: not daemon.stats().mover_count, "no mover")


class StreamingContestant(ColdContestant):
    """Goes through ``stream()``, of which ``count`` tensors are expected."""

    def __init__(self, *args: Any, count: int, **more: Any) -> None:
        super().__init__(*args, **more)
        self._count = count

    def use(self, model: cached_client.Model, started_s: float) -> dict[str, float]:
        """Seconds to the first and to the last tensor. Raises AssertionError for a stream that misses tensors."""
        first_s = last_s = 0.0
        count = 0
        for _, tensor in model.stream():
            assert isinstance(tensor, torch.Tensor)
            last_s = time.monotonic() - started_s
            first_s = first_s or last_s
            count += 1
        assert count == self._count
        return {_FIRST: first_s, _LAST: last_s}
