"""What is read from the engine at each scrape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cached.failures import OTHER
from cached.metrics.table import DEGRADED_REASONS, METRICS, MODEL_LABELS, ORIGIN_LABELS, MetricInfo
from cached.processes import Usage
from cached.types import LevelStats, OriginStats

_INFO = {info.name: info for info in METRICS}
_LEVEL_METRICS = {
    f"cached_level_{kind}": kind
    for kind in (
        "used_bytes", "reserved_bytes", "capacity_bytes", "withdrawn_bytes", "pool_bytes", "transient_bytes",
        "hot_bytes", "hot_capacity_bytes",
    )
} | {"cached_level_unverified_seconds": "longest_unverified_s"}  # fmt: skip
"""Metric → field of LevelStats."""


@dataclass(frozen=True, slots=True)
class ModelGauges:
    """A model that is at some level, or leased."""

    name: str
    l1_bytes: int
    l2_bytes: int
    lease_count: int


@dataclass(frozen=True, slots=True)
class Gauges:
    """The engine's state at one moment. ``degraded``: keys of DEGRADED_REASONS, or others."""

    levels: tuple[LevelStats, ...]
    origins: tuple[OriginStats, ...]
    models: tuple[ModelGauges, ...]
    model_count: int
    hot_model_count: int
    hot_ready_count: int
    quarantined_blob_count: int
    lease_count: int
    active_load_count: int
    mover_count: int
    movers: Usage
    degraded: frozenset[str]
    memory_stall_ratio: float | None = None
    prediction_precision: float | None = None


@dataclass(slots=True)
class Reload:
    """How the last reading of a file went; None while there was none."""

    successful: bool | None = None
    success_time_s: float | None = None

    def done(self, *, successful: bool) -> None:
        """It was read just now."""
        self.successful = successful
        if successful:
            self.success_time_s = time.time()


class BoundedLabel:
    """The values of a label, at most ``limit``: those that come first. All others are ``other``."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: set[str] = set()
        self._is_withheld: Callable[[str], bool] = lambda _value: False

    def of(self, value: str) -> str:
        """What it is called in the metrics."""
        if value not in self._values:
            if len(self._values) >= self._limit or self._is_withheld(value):
                return OTHER
            self._values.add(value)
        return value

    def forget(self, value: str) -> None:
        """It is gone; its place is free."""
        self._values.discard(value)

    def withhold(self, is_withheld: Callable[[str], bool]) -> list[str]:
        """From now on these are ``other``, too. Returns those of them that were shown, for their series to go."""
        self._is_withheld = is_withheld
        return [value for value in self._values if is_withheld(value)]


class State(Collector):
    """Gauges computed at scrape time; before there is an engine only what is known without one."""

    def __init__(self, version: str) -> None:
        self._version = version
        self.gauges: Callable[[], Gauges] | None = None
        self.ready: Callable[[], bool] = lambda: False
        self.limit_ratios: list[Callable[[], Mapping[str, float]]] = []
        self.catalog = Reload()
        self.config = Reload()
        self.last_pull_time_s: float | None = None
        self.models = BoundedLabel(MODEL_LABELS)
        self.origins = BoundedLabel(ORIGIN_LABELS)

    def describe(self) -> Iterator[Metric]:
        """The families, without values."""
        for info in METRICS:
            if info.type == "gauge":
                yield _gauge(info.name)

    def collect(self) -> Iterator[Metric]:
        """The families as they are now."""
        yield _gauge("cached_build_info", [((self._version,), 1)])
        yield _single("cached_ready", self.ready())
        yield _single("cached_time_seconds", time.time())
        yield from _reload("catalog", self.catalog)
        yield from _reload("config", self.config)
        yield _gauge("cached_limit_used_ratio", self._used_ratios())
        if self.last_pull_time_s is not None:
            yield _single("cached_last_pull_success_timestamp_seconds", self.last_pull_time_s)
        if self.gauges is not None:
            yield from self._of_engine(self.gauges())

    def _used_ratios(self) -> list[tuple[tuple[str, ...], float]]:
        """Of a limit that several know of, such as the listeners for calls, that of the one that is nearest to it."""
        found: dict[str, float] = {}
        for ratios in self.limit_ratios:
            for limit, ratio in ratios().items():
                found[limit] = max(ratio, found.get(limit, 0.0))
        return [((limit,), ratio) for limit, ratio in found.items()]

    def _of_engine(self, now: Gauges) -> Iterator[Metric]:
        for name, field in _LEVEL_METRICS.items():
            yield _gauge(name, [((stats.level.value,), getattr(stats, field)) for stats in now.levels])
        yield from self._of_models(now.models)
        yield from self._of_origins(now.origins)
        known = {reason if reason in DEGRADED_REASONS else OTHER for reason in now.degraded}
        yield _gauge("cached_degraded", [((reason,), reason in known) for reason in DEGRADED_REASONS])
        yield _single("cached_leases", now.lease_count)
        yield _single("cached_models", now.model_count)
        yield _single("cached_hot_models", now.hot_model_count)
        yield _single("cached_hot_models_ready", now.hot_ready_count)
        yield _single("cached_quarantined_blobs", now.quarantined_blob_count)
        yield _single("cached_active_loads", now.active_load_count)
        yield _single("cached_movers", now.mover_count)
        yield _single("cached_mover_resident_memory_bytes", now.movers.resident_bytes)
        yield _single("cached_mover_open_fds", now.movers.open_fds)
        cpu = _INFO["cached_mover_cpu_seconds_total"]
        yield CounterMetricFamily(cpu.name.removesuffix("_total"), cpu.help, value=now.movers.cpu_s)
        if now.memory_stall_ratio is not None:
            yield _single("cached_memory_stall_ratio", now.memory_stall_ratio)
        if now.prediction_precision is not None:
            yield _single("cached_prediction_precision_ratio", now.prediction_precision)

    def _of_models(self, models: Iterable[ModelGauges]) -> Iterator[Metric]:
        sizes: dict[tuple[str, ...], int] = {}
        leases: dict[tuple[str, ...], int] = {}
        for model in models:
            name = self.models.of(model.name)
            for level, size_bytes in (("l1", model.l1_bytes), ("l2", model.l2_bytes)):
                sizes[name, level] = sizes.get((name, level), 0) + size_bytes
            leases[name,] = leases.get((name,), 0) + model.lease_count
        yield _gauge("cached_model_bytes", sizes.items())
        yield _gauge("cached_model_leases", leases.items())

    def _of_origins(self, origins: Iterable[OriginStats]) -> Iterator[Metric]:
        for name, field in (("in_flight", "in_flight"), ("waiting", "waiting"), ("limit", "width")):
            found: dict[tuple[str, ...], int] = {}
            for origin in origins:
                label = (self.origins.of(origin.name),)
                found[label] = found.get(label, 0) + getattr(origin, field)
            yield _gauge(f"cached_origin_ranges_{name}", found.items())


def _reload(what: str, reload: Reload) -> Iterator[Metric]:
    if reload.successful is not None:
        yield _single(f"cached_{what}_last_reload_successful", reload.successful)
    if reload.success_time_s is not None:
        yield _single(f"cached_{what}_last_reload_success_timestamp_seconds", reload.success_time_s)


def _single(name: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, _INFO[name].help, value=float(value))


def _gauge(name: str, values: Iterable[tuple[tuple[str, ...], float]] = ()) -> GaugeMetricFamily:
    info: MetricInfo = _INFO[name]
    family = GaugeMetricFamily(name, info.help, labels=info.labels)
    for labels, value in values:
        family.add_metric(labels, float(value))
    return family
