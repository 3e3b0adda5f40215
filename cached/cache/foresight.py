"""Habits of this host: models that are used at this time of day as a rule are in L1 when their time comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

import structlog

from cached.cache.background import repeat
from cached.cache.evictor import Evictor
from cached.cache.loader import Loader
from cached.cache.model import Model
from cached.cache.pulls import Pulls
from cached.cache.services import Services
from cached.level import Level
from cached.manifest import Manifest
from cached.policy import Need, Otherwise, plan
from cached.policy.predict import Prediction, Predictor
from cached.schedule import lead_s, zone_info
from cached.types import Tier

_log = structlog.get_logger(__name__)

_HABITS = "habits"
"""Name of its record in the index."""
_LOOK_S = 60.0
_BASE_ASKED_S = 60.0
_WRITE_S = 600.0


class Foresight:
    """Loop only. ``mode``: ``auto`` acts on predictions while they pay, ``on`` always; ``off`` learns nothing.

    Predictions are made and judged whether they are acted on or not. Acting on one means to bring a model that is at
    some level of this host already, or has its origin, to L1: into free room, or in the place of what is worth less.
    """

    def __init__(
        self, services: Services, pulls: Pulls, loader: Loader, evictor: Evictor, *, mode: str, time_zone: str
    ) -> None:
        self._services = services
        self._pulls = pulls
        self._loader = loader
        self._evictor = evictor
        self._mode = mode
        self._time_zone = time_zone
        self._predictor = Predictor(time_zone)
        self._acted: set[tuple[str, float]] = set()
        self._changed = False
        self._written_s = services.clock.monotonic_s()

    @property
    def precision(self) -> float | None:
        """The share of predictions that came true, recent ones counting more; None before the first was judged."""
        return self._predictor.precision

    def attached(self, model: Model) -> None:
        """What an attach says beside the model's own demand: of its habits, and of its base.

        Who asks for an adapter needs its base. That counts as a request for the base unless somebody has it leased, or
        had or wanted it within the last minute: a worker that attaches both has asked for it once.
        """
        services, base = self._services, model.base_model
        if self._mode != "off":
            self._predictor.used(model.name, services.clock.wall_s())
            self._changed = True
        now_s = services.clock.monotonic_s()
        if base is not None and not base.lease_count and now_s - base.last_used_s >= _BASE_ASKED_S:
            base.last_used_s, manifest = now_s, base.current
            hit = manifest is not None and services.registry.whole_at(manifest, Level.L1)
            services.history.asked(base.name, hit=hit)

    def forget(self, name: str) -> None:
        """A model was removed: its habits are, too."""
        self._predictor.forget(name)
        self._changed = True

    def load(self) -> None:
        """Takes up what earlier daemons learned; what cannot be read is begun anew, and logged."""
        record: Mapping[str, Any] | None = self._services.registry.index.policy(_HABITS)
        if record is None or self._mode == "off":
            return
        try:
            self._predictor = Predictor.from_records(record, self._time_zone)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            _log.warning("foresight.unreadable", cause=repr(error))

    def write(self) -> None:
        """Makes it durable, if anything changed."""
        if self._changed:
            self._changed = False
            registry, record = self._services.registry, self._predictor.to_records()
            registry.write(lambda: registry.index.put_policy(_HABITS, record))

    async def run(self) -> None:
        """Until cancelled; what was learned is written then."""
        if self._mode == "off":
            return
        try:
            await repeat(self._services.clock, _LOOK_S, self._step, what="foresight", failures=self._services.failures)
        finally:
            self.write()

    async def _step(self) -> None:
        self.look()
        now_s = self._services.clock.monotonic_s()
        if now_s - self._written_s >= _WRITE_S:
            self._written_s = now_s
            self.write()

    def look(self) -> None:
        """Makes, judges and, where that pays, acts on predictions. Meant to be called about once a minute."""
        models, history = self._services.registry.models, self._services.history
        leads = {name: lead_s(history.load_s(model)) for name, model in models.items()}
        due = self._predictor.due(self._services.clock.wall_s(), leads)
        for came_true in self._predictor.judged:
            self._services.metrics.predictions.labels(outcome="right" if came_true else "wrong").inc()
            self._changed = True
        self._acted &= {(prediction.name, prediction.start_s) for prediction in due}
        if self._mode == "on" or self._predictor.pays:
            for prediction in due:
                self._act(prediction)

    def _act(self, prediction: Prediction) -> None:
        """Once for each prediction: what went again since was worth less than what came."""
        key = (prediction.name, prediction.start_s)
        model = self._services.registry.models.get(prediction.name)
        if key in self._acted or model is None or model.tier[0] not in {Tier.WARM, Tier.AUTO}:
            return
        self._acted.add(key)
        manifest = model.current
        if manifest is not None and self._is_missing(manifest) and self._earns_its_place(model, manifest):
            self._services.metrics.predictions.labels(outcome="acted").inc()
            begins = datetime.fromtimestamp(prediction.start_s, zone_info(self._time_zone))
            self._services.events.emit(
                "model.expected",
                f"{model.name} is brought to L1: on {prediction.share:.0%} of such days it was used from "
                f"{begins:%H:%M} on",
                name=model.name,
                revision=manifest.revision,
                share=round(prediction.share, 3),
                start_time_s=prediction.start_s,
            )
            self._pulls.bring(manifest)

    def _is_missing(self, manifest: Manifest) -> bool:
        registry = self._services.registry
        if registry.whole_at(manifest, Level.L1) or registry.is_quarantined(manifest):
            return False
        return not self._loader.active(manifest.name) and (bool(manifest.source) or registry.is_here(manifest))

    def _earns_its_place(self, model: Model, manifest: Manifest) -> bool:
        """Whether the policy would let it in, if the attach that is expected had come already."""
        registry, snapshot = self._services.registry, self._evictor.snapshot()
        missing_bytes = sum(blob.record.size_bytes for blob in registry.blobs_of(manifest) if not blob.at(Level.L1))
        absent = self._evictor.newcomer(model.name, manifest.revision)
        newcomer = replace(absent, requests=absent.requests.asked(self._services.clock.wall_s()))
        need = Need(Level.L1, missing_bytes, model.name, newcomer, Otherwise.SKIP)
        planned = plan(replace(snapshot, needs=(need,)), self._services.clock.monotonic_s())
        decision = planned.decision(Level.L1)
        return planned.shortfall is None and decision is not None and decision.admitted
