"""Keeps the labels of this daemon's node those of the models that are ready on it, for the cluster's scheduler."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Iterator

import structlog

from cached.cache.background import repeat
from cached.cache.services import Services
from cached.fleet.kube import KubeApi, KubeError
from cached.fleet.labels import MAX_MODELS, Ready, changes, labels_of, ours
from cached.level import Level
from cached.refs import artifact_digest

_log = structlog.get_logger(__name__)

_LOOK_S = 1.0
_BURST, _BURST_S = 5, 60.0
"""So many patches in so long at most: what changes meanwhile goes with the next one."""
_COMPARE_S = 300.0
"""Somebody else may have changed our labels."""
_FIRST_RETRY_S, _MAX_RETRY_S = 2.0, 120.0
_LEAVE_S = 3.0


class NodeLabels:
    """Loop only; the API is asked in a thread, one request at a time. That it is away is told, and tried again."""

    def __init__(self, services: Services, api: KubeApi, *, prefix: str) -> None:
        self._services = services
        self._api = api
        self._prefix = prefix
        self._have: dict[str, str] | None = None
        self._seen = -1
        self._patched_s: deque[float] = deque(maxlen=_BURST)
        self._failures = 0
        self._not_before_s = 0.0
        self._compare_at_s = 0.0

    async def run(self) -> None:
        """Until cancelled; the labels go then, as far as that can be done within seconds."""
        try:
            await repeat(
                self._services.clock, _LOOK_S, self._step, what="node_labels", failures=self._services.failures
            )
        finally:
            await self._leave()

    async def _step(self) -> None:
        clock, registry = self._services.clock, self._services.registry
        now_s = clock.monotonic_s()
        if now_s < self._not_before_s:
            return
        compare = self._have is None or now_s >= self._compare_at_s
        if not compare and registry.changes == self._seen:
            return
        seen = registry.changes
        try:
            if compare:
                self._have = ours(self._prefix, await asyncio.to_thread(self._api.node_labels))
                self._compare_at_s = now_s + _COMPARE_S * random.uniform(0.9, 1.1)  # noqa: S311 not a secret
            await self._patch(labels_of(self._prefix, self._ready()))
        except KubeError as error:
            self._failed(error)
            return
        self._seen, self._failures = seen, 0
        self._services.degraded.ended("node_labels")

    async def _patch(self, want: dict[str, str]) -> None:
        found = changes(self._have or {}, want)
        if not found:
            return
        await asyncio.to_thread(self._api.patch_labels, found)
        self._have = want
        self._services.metrics.node_label_patches.labels(outcome="ok").inc()
        self._patched_s.append(self._services.clock.monotonic_s())
        if len(self._patched_s) == _BURST:
            self._not_before_s = self._patched_s[0] + _BURST_S
        _log.info("node_labels.patched", node=self._api.node_name, labels=len(want), changed=len(found))

    def _failed(self, error: KubeError) -> None:
        self._have = None  # what came of a patch without an answer has to be looked at
        self._failures += 1
        self._services.metrics.node_label_patches.labels(outcome="failed").inc()
        longest_s = min(_MAX_RETRY_S, _FIRST_RETRY_S * 2.0 ** (self._failures - 1))
        delay_s = error.retry_after_s + longest_s * random.uniform(0.5, 1.0)  # noqa: S311 not a secret
        self._not_before_s = self._services.clock.monotonic_s() + delay_s
        self._services.degraded.began("node_labels", f"the node's labels are not up to date: {error}", error)
        _log.warning("node_labels.failed", chain=error.chain, failures=self._failures, retry_in_s=round(delay_s, 1))

    def _ready(self) -> Iterator[Ready]:
        """The current revisions that are whole here, and may be used."""
        registry = self._services.registry
        found = []
        for model in registry.models.values():
            manifest = model.current
            if manifest is None or artifact_digest(model.name) or registry.is_quarantined(manifest):
                continue
            in_l1 = registry.whole_at(manifest, Level.L1)
            if in_l1 or registry.whole_at(manifest, Level.L2):
                found.append(Ready(model.name, manifest.revision, in_l1, model.priority))
        if len(found) > MAX_MODELS:
            _log.debug("node_labels.too_many", models=len(found), labelled=MAX_MODELS)
        yield from found

    async def _leave(self) -> None:
        """A node whose daemon is gone attracts nobody."""
        if not self._have:
            return
        try:
            async with asyncio.timeout(_LEAVE_S):
                await asyncio.to_thread(self._api.patch_labels, changes(self._have, {}))
        except (KubeError, TimeoutError) as error:
            _log.warning("node_labels.left_behind", cause=str(error) or "no answer in time")
