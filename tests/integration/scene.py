"""A host with something to see: models in mixed tiers, a pull over a slow link, leases, decisions, starts of workers.

For the tests of the status page and of ``cached top``, and for their pictures in the documents.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cached_client
from cached.units import CHUNK_BYTES, MIB
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import PAGES, wait_for
from tests.integration.support import Site, model_files
from tests.servers import CountingProxy, RcloneS3


@dataclass(frozen=True, slots=True)
class Known:
    """A model of the scene. ``size``: of its weights, in units of the scene."""

    size: float
    entry: Mapping[str, Any]
    pulled: bool = True


MODELS = {
    "all-minilm-l6-v2": Known(87, {"tier": "hot"}, pulled=False),
    "bge-small-en-v1.5": Known(127, {"tier": "warm", "pinned": True}),
    "whisper-tiny": Known(144, {}),
    "gte-tiny": Known(43, {"tier": "warm", "priority": 5}),
    "smollm2-135m-instruct": Known(257, {"tier": "warm"}, pulled=False),
    "smollm2-135m-lora-support": Known(18, {"base": "smollm2-135m-instruct"}),
    "e5-small-v2": Known(127, {"tier": "cold"}),
    "ms-marco-minilm-l6": Known(87, {}),
    "paraphrase-minilm-l3": Known(66, {}, pulled=False),
}
ARRIVING = "smollm2-135m-instruct"


class Scene:
    """Made by entering it; leaving it ends everything. ``around``: a program that starts the daemon.

    ``unit_bytes``: of the sizes above. Pictures take a MiB; with less than an eighth of one nothing arrives in parts.
    """

    def __init__(self, folder: Path, server: RcloneS3, *, unit_bytes: int, around: tuple[str, ...] = ()) -> None:
        server.create_bucket("models")
        self._stack = contextlib.ExitStack()
        self._unit_bytes = unit_bytes
        self.proxy = self._stack.enter_context(CountingProxy(server.endpoint_url))
        self.site = Site(folder, server, self.proxy, "models", check=False, around=around)
        self.site.settings = PAGES | {
            "l1": {"capacity": self._size(720), "hot_capacity": self._size(180)},
            "l2": {"capacity": self._size(2048)},
            "transfer": {"max_attempts": 100, "retry_budget_s": 600.0},
        }

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.proxy.heal()
        self._stack.close()

    @property
    def http(self) -> str:
        """URL of the status page."""
        return f"{self.site.daemon.http}/"

    def _size(self, units: float) -> str:
        return f"{units * self._unit_bytes / MIB:g}MiB"

    def _build(self) -> None:
        site = self.site
        self._stack.callback(site.close)
        for seed, (name, known) in enumerate(MODELS.items(), 1):
            site.add(name, model_files(int(known.size * self._unit_bytes), seed=seed), **known.entry)
        site.start()
        wait_for(lambda: site.summary("all-minilm-l6-v2").l2_bytes, "the hot model")
        for name, known in MODELS.items():
            if known.pulled:
                site.pull(name, level="l2" if name == "e5-small-v2" else "l1")
        with self._lease("e5-small-v2", "batch embedder"):
            pass  # a cold model stays in memory no longer than it is used
        self._stack.enter_context(self._lease("all-minilm-l6-v2", "embeddings-0"))
        self._stack.enter_context(self._lease("all-minilm-l6-v2", "embeddings-1"))
        self._stack.enter_context(self._lease("whisper-tiny", "transcribe"))
        self._tell_starts()

    @contextlib.contextmanager
    def _lease(self, name: str, client: str) -> Iterator[Any]:
        with self.site.cache() as cache, cache.attach(name, client_name=client) as model:
            model.wait(60)
            yield model

    def _tell_starts(self) -> None:
        with self.site.daemon.stub() as stub:
            for number, (name, level, weights_s) in enumerate(
                (("whisper-tiny", "l3", 2.9), ("all-minilm-l6-v2", "l2", 0.9), ("all-minilm-l6-v2", "l1", 0.05))
            ):
                stub.ReportColdStart(pb.ReportColdStartRequest(cold_start=_start(name, level, weights_s, number)))

    @contextlib.contextmanager
    def arriving(self, rate_bytes_per_s: float = 0.0) -> Iterator[cached_client.Model]:
        """A worker attaches a model that comes slowly, at so much a connection; inside, some of it is there.

        0: its second chunk does not come until this is left.
        """
        weights = f"{ARRIVING}/model"
        if rate_bytes_per_s:
            self.proxy.inject("slow", times=-1, path=weights, rate_bytes_per_s=rate_bytes_per_s)
        else:
            second = f"bytes={CHUNK_BYTES}-{2 * CHUNK_BYTES - 1}"
            self.proxy.inject("hold", times=-1, path=weights, range=second)
        try:
            with self.site.cache() as cache, cache.attach(ARRIVING, client_name="chat-0", wait=False) as model:
                wait_for(lambda: 0 < self.site.summary(ARRIVING).progress < 1, "bytes to arrive")
                yield model
        finally:
            self.proxy.heal()


def _start(name: str, level: str, weights_s: float, number: int) -> pb.ColdStart:
    arrive = "download" if level == "l3" else "promote" if level == "l2" else "attach"
    loaded_s = 1.1 + weights_s
    phases = [
        ("process_start", 0.0, 0.2), ("imports", 0.2, 1.7), ("attach", 1.0, 1.1), (arrive, 1.1, loaded_s),
        ("weights_to_gpu", 1.7, max(2.0, loaded_s + 0.2)), ("compile", max(2.0, loaded_s + 0.2), loaded_s + 2.6),
        ("warmup", loaded_s + 2.6, loaded_s + 3.1), ("first_inference", loaded_s + 3.1, loaded_s + 3.2),
    ]  # fmt: skip
    return pb.ColdStart(
        name=name,
        client_name=f"worker-{number}",
        started_time_s=time.time() - 30,
        total_s=loaded_s + 3.2,
        phases=[
            pb.ColdStartPhase(name=phase, start_s=start, end_s=end, after=arrive if phase == "weights_to_gpu" else "")
            for phase, start, end in phases
        ],
        labels={"from_level": level, "engine": "example"},
    )
