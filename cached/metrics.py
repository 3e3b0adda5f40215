"""Every metric of the daemon, in one place. Each ``Metrics`` has its own registry, so tests can hold several.

Counters are plain attributes (``metrics.hits.labels(level="l1").inc()``); gauges that mirror the engine's state are
read from it at scrape time, through the function given to ``bind``. Call from the loop only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cached.types import Level, Stats

LEVELS = tuple(level.value for level in Level)
HOPS = ("l3_l1", "l3_l2", "l2_l1", "l1_l2")
PREDICTION_OUTCOMES = ("right", "wrong", "acted")
SLOT_OUTCOMES = ("acquired", "taken_over", "skipped", "lost")
HEDGE_OUTCOMES = ("won", "lost", "failed")
LEVEL_KINDS = ("used", "reserved", "capacity", "withdrawn", "pool", "transient", "hot", "hot_capacity")
_COLDSTART_BUCKETS_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0, 200.0, 400.0, 800.0)
_LOAD_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """A metric as it is exposed: its full name, ``counter``, ``gauge`` or ``histogram``, label names and help text."""

    name: str
    type: str
    labels: tuple[str, ...]
    help: str


METRICS: tuple[MetricInfo, ...] = (
    MetricInfo("cached_hits_total", "counter", ("level",), "Attaches served from a level."),
    MetricInfo("cached_misses_total", "counter", ("level",), "Attaches that a level could not serve."),
    MetricInfo(
        "cached_predictions_total", "counter", ("outcome",),
        "Predictions of use from habit: right or wrong once their time is over, and acted when a model was brought.",
    ),
    MetricInfo("cached_transfer_bytes_total", "counter", ("hop",), "Verified bytes moved over a hop."),
    MetricInfo("cached_transfer_seconds_total", "counter", ("hop",), "Wall time of transfer threads on a hop."),
    MetricInfo("cached_transfer_cpu_seconds_total", "counter", ("hop",), "CPU time of transfer threads on a hop."),
    MetricInfo(
        "cached_checksum_failures_total", "counter", ("level",), "Chunks that failed their checksum, by level."
    ),
    MetricInfo("cached_repaired_chunks_total", "counter", ("level",), "Damaged chunks that were mended at a level."),
    MetricInfo("cached_evictions_total", "counter", ("level", "reason"), "Revisions evicted from a level."),
    MetricInfo(
        "cached_admissions_total", "counter", ("level", "verdict"),
        "What became of revisions that wanted a place at a level.",
    ),
    MetricInfo("cached_evicted_bytes_total", "counter", ("level",), "Bytes that evictions took out of a level."),
    MetricInfo("cached_pulls_total", "counter", ("outcome",), "Loads: ok for those from an origin, else the error."),
    MetricInfo("cached_retries_total", "counter", ("reason",), "Transfers tried again, by the error's reason."),
    MetricInfo("cached_hedges_total", "counter", ("outcome",), "Second fetches of stalled ranges: won, lost, failed."),
    MetricInfo(
        "cached_origin_bytes_total", "counter", ("origin",),
        "Bytes of ranges that an origin delivered, whole ones; of a chain each link counts for itself.",
    ),
    MetricInfo(
        "cached_origin_failovers_total", "counter", ("origin", "reason"),
        "Ranges that a link of a chain could not serve, so that the next one was asked, by the error's reason.",
    ),
    MetricInfo("cached_mover_restarts_total", "counter", (), "Mover processes that died and were replaced."),
    MetricInfo("cached_rpc_total", "counter", ("method", "code"), "Finished RPCs by method and gRPC status code."),
    MetricInfo("cached_adopted_bytes_total", "counter", (), "L1 bytes taken over, verified, from an earlier daemon."),
    MetricInfo(
        "cached_stagger_seconds_total", "counter", ("kind",),
        "How long pulls that nobody waits for were put off: jitter by chance, slot for a slot of the fleet.",
    ),
    MetricInfo(
        "cached_fleet_slots_total", "counter", ("outcome",),
        "Slots of the fleet: acquired, taken_over (the holder was gone), skipped (the Kubernetes API was away), lost.",
    ),
    MetricInfo(
        "cached_node_label_patches_total", "counter", ("outcome",),
        "Attempts to bring the node's labels up to date that changed something, or failed.",
    ),
    MetricInfo(
        "cached_load_seconds", "histogram", ("from_level",), "Time until a load was ready, by where it came from."
    ),
    MetricInfo(
        "cached_coldstart_seconds", "histogram", ("model",), "Whole starts of workers, as they told, by model."
    ),
    MetricInfo(
        "cached_coldstart_phase_seconds", "histogram", ("model", "phase"),
        "Phases of workers' starts, as they told; names that are not standard ones count together as other.",
    ),
    MetricInfo(
        "cached_level_bytes", "gauge", ("level", "kind"),
        "Bytes at a level: used (withdrawn and pool included), reserved, capacity, withdrawn, pool; in L1 also "
        "transient (beside the capacity, until the last lease ends), hot, and hot_capacity (what hot models may take).",
    ),
    MetricInfo("cached_leases", "gauge", (), "Leases held now."),
    MetricInfo("cached_models", "gauge", (), "Models known to the cache."),
    MetricInfo("cached_active_loads", "gauge", (), "Pulls and promotions in flight."),
    MetricInfo("cached_movers", "gauge", (), "Mover processes alive."),
    MetricInfo(
        "cached_origin_ranges", "gauge", ("origin", "kind"),
        "Ranges of an origin: in_flight, waiting, and width (how many are in flight at most, as measured).",
    ),
    MetricInfo(
        "cached_prediction_precision", "gauge", (),
        "Share of predictions that came true, recent ones counting more. Absent before the first was judged.",
    ),
    MetricInfo("cached_degraded", "gauge", (), "Number of things that are degraded; 0 when all is well."),
    MetricInfo("cached_ready", "gauge", (), "1 when recovered and serving, else 0."),
    MetricInfo("cached_build_info", "gauge", ("version",), "Always 1; the daemon's version is its label."),
)  # fmt: skip
"""All of the cache's own metrics; ``process_*`` come from the Prometheus client library besides."""

_INFO = {info.name: info for info in METRICS}


class _Registry(CollectorRegistry):
    """Leaves out the ``_created`` series, which double the exposition and which nothing here reads.

    The library's own switch for them is global to the process.
    """

    def collect(self) -> Iterator[Metric]:
        for family in super().collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class Metrics:
    """The daemon's metrics and the registry that holds them."""

    def __init__(self, version: str = "") -> None:
        self.registry: CollectorRegistry = _Registry()
        self._counters: list[Counter] = []
        self.hits = self._counter("cached_hits_total", LEVELS)
        self.misses = self._counter("cached_misses_total", LEVELS[:2])
        self.predictions = self._counter("cached_predictions_total", PREDICTION_OUTCOMES)
        self.transfer_bytes = self._counter("cached_transfer_bytes_total", HOPS)
        self.transfer_seconds = self._counter("cached_transfer_seconds_total", HOPS)
        self.transfer_cpu_seconds = self._counter("cached_transfer_cpu_seconds_total", HOPS)
        self.checksum_failures = self._counter("cached_checksum_failures_total", LEVELS)
        self.repaired_chunks = self._counter("cached_repaired_chunks_total", LEVELS[:2])
        self.evictions = self._counter("cached_evictions_total")
        self.admissions = self._counter("cached_admissions_total")
        self.evicted_bytes = self._counter("cached_evicted_bytes_total", LEVELS[:2])
        self.pulls = self._counter("cached_pulls_total", ("ok",))
        self.retries = self._counter("cached_retries_total")
        self.hedges = self._counter("cached_hedges_total", HEDGE_OUTCOMES)
        self.origin_bytes = self._counter("cached_origin_bytes_total")
        self.origin_failovers = self._counter("cached_origin_failovers_total")
        self.mover_restarts = self._counter("cached_mover_restarts_total")
        self.rpc = self._counter("cached_rpc_total")
        self.adopted_bytes = self._counter("cached_adopted_bytes_total")
        self.stagger_seconds = self._counter("cached_stagger_seconds_total", ("jitter", "slot"))
        self.fleet_slots = self._counter("cached_fleet_slots_total", SLOT_OUTCOMES)
        self.node_label_patches = self._counter("cached_node_label_patches_total", ("ok", "failed"))
        self.load_seconds = self._histogram("cached_load_seconds", _LOAD_BUCKETS_S)
        self.coldstart_seconds = self._histogram("cached_coldstart_seconds", _COLDSTART_BUCKETS_S)
        self.coldstart_phase_seconds = self._histogram("cached_coldstart_phase_seconds", _COLDSTART_BUCKETS_S)
        self._state = _StateCollector(version)
        self.registry.register(self._state)
        ProcessCollector(registry=self.registry)

    def _counter(self, name: str, values: tuple[str, ...] = ()) -> Counter:
        """A counter whose label ``values`` are shown as 0 from the start, so that rates have a first point."""
        info = _INFO[name]
        counter = Counter(name.removesuffix("_total"), info.help, info.labels, registry=self.registry)
        for value in values:
            counter.labels(value)
        self._counters.append(counter)
        return counter

    def _histogram(self, name: str, buckets_s: tuple[float, ...]) -> Histogram:
        info = _INFO[name]
        return Histogram(info.name, info.help, info.labels, registry=self.registry, buckets=buckets_s)

    def forget_coldstarts(self, model: str) -> None:
        """Drops the series of a model's starts: they would stay for ever, and models come and go."""
        self.coldstart_seconds.remove_by_labels({"model": model})
        self.coldstart_phase_seconds.remove_by_labels({"model": model})

    def bind(self, stats: Callable[[], Stats], ready: Callable[[], bool]) -> None:
        """Gives the gauges their source. Both functions are called at each scrape and must not block."""
        self._state.stats = stats
        self._state.ready = ready

    def counters(self) -> dict[str, float]:
        """Every counter as in /metrics: ``cached_hits_total{level="l1"}`` → value; no braces without labels."""
        found: dict[str, float] = {}
        for counter in self._counters:
            for family in counter.collect():
                for sample in family.samples:
                    if sample.name.endswith("_total"):
                        found[_sample_key(sample.name, sample.labels)] = sample.value
        return found

    def expose(self) -> bytes:
        """The text exposition format, as /metrics answers it."""
        return generate_latest(self.registry)


def _sample_key(name: str, labels: dict[str, str]) -> str:
    if not labels:
        return name
    inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return f"{name}{{{inside}}}"


class _StateCollector(Collector):
    """Gauges computed at scrape time; before ``bind`` only build info and ready 0 are shown."""

    def __init__(self, version: str) -> None:
        self._version = version
        self.stats: Callable[[], Stats] | None = None
        self.ready: Callable[[], bool] = lambda: False

    def describe(self) -> Iterator[Metric]:
        for info in METRICS:
            if info.type == "gauge":
                yield _gauge(info.name)

    def collect(self) -> Iterator[Metric]:
        build = _gauge("cached_build_info")
        build.add_metric([self._version], 1)
        yield build
        yield _gauge("cached_ready", float(self.ready()))
        if self.stats is None:
            return
        stats = self.stats()
        levels = _gauge("cached_level_bytes")
        for level in stats.levels:
            sizes = (
                level.used_bytes, level.reserved_bytes, level.capacity_bytes, level.withdrawn_bytes, level.pool_bytes,
                level.transient_bytes, level.hot_bytes, level.hot_capacity_bytes,
            )  # fmt: skip
            for kind, size_bytes in zip(LEVEL_KINDS, sizes, strict=True):
                levels.add_metric([level.level.value, kind], size_bytes)
        yield levels
        yield _gauge("cached_leases", stats.lease_count)
        yield _gauge("cached_models", stats.model_count)
        yield _gauge("cached_active_loads", stats.active_load_count)
        yield _gauge("cached_movers", stats.mover_count)
        ranges = _gauge("cached_origin_ranges")
        for origin in stats.origins:
            ranges.add_metric([origin.name, "in_flight"], origin.in_flight)
            ranges.add_metric([origin.name, "waiting"], origin.waiting)
            ranges.add_metric([origin.name, "width"], origin.width)
        yield ranges
        if stats.prediction_precision is not None:
            yield _gauge("cached_prediction_precision", stats.prediction_precision)
        yield _gauge("cached_degraded", len(stats.degraded))


def _gauge(name: str, value: float | None = None) -> GaugeMetricFamily:
    info = _INFO[name]
    if value is not None:
        return GaugeMetricFamily(name, info.help, value=value)
    return GaugeMetricFamily(name, info.help, labels=info.labels or None)
