"""The daemon's metrics. Each ``Metrics`` has its own registry, so tests can hold several.

Counters are plain attributes (``metrics.hits.labels(level="l1").inc()``); gauges that mirror the engine's state are
read from it at scrape time, through the function given to ``bind``. Call from the loop only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder

from cached.failures import OTHER
from cached.level import Level
from cached.metrics.gauges import Gauges, Reload, State
from cached.metrics.table import (
    ATTACH_BUCKETS_S,
    COLDSTART_BUCKETS_S,
    FAILURE_REASONS,
    HEDGE_OUTCOMES,
    HOPS,
    LAG_BUCKETS_S,
    LEVELS,
    LOAD_BUCKETS_S,
    METRICS,
    PREDICTION_OUTCOMES,
    PULL_OUTCOMES,
    RPC_BUCKETS_S,
    SLOT_OUTCOMES,
    SPAN_OUTCOMES,
)

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
        self.scrubbed_bytes = self._counter("cached_scrubbed_bytes_total", LEVELS[:2])
        self.evictions = self._counter("cached_evictions_total")
        self.admissions = self._counter("cached_admissions_total")
        self.evicted_bytes = self._counter("cached_evicted_bytes_total", LEVELS[:2])
        self.pulls = self._counter("cached_pulls_total", PULL_OUTCOMES)
        self.failures = self._counter("cached_failures_total", FAILURE_REASONS)
        self.retries = self._counter("cached_retries_total")
        self.hedges = self._counter("cached_hedges_total", HEDGE_OUTCOMES)
        self._origin_bytes = self._counter("cached_origin_bytes_total")
        self._origin_failovers = self._counter("cached_origin_failovers_total")
        self.stagger_seconds = self._counter("cached_stagger_seconds_total", ("jitter", "slot"))
        self.fleet_slots = self._counter("cached_fleet_slots_total", SLOT_OUTCOMES)
        self.node_label_patches = self._counter("cached_node_label_patches_total", ("ok", "failed"))
        self.mover_restarts = self._counter("cached_mover_restarts_total")
        self.rpc = self._counter("cached_rpc_total")
        self.adopted_bytes = self._counter("cached_adopted_bytes_total")
        self.telemetry_spans = self._counter("cached_telemetry_spans_total", SPAN_OUTCOMES)
        self._model_attaches = self._counter("cached_model_attaches_total")
        self._attach_seconds = self._histogram("cached_attach_seconds", ATTACH_BUCKETS_S, LEVELS)
        self._load_seconds = self._histogram("cached_load_seconds", LOAD_BUCKETS_S, LEVELS)
        self._load_wait_seconds = self._histogram("cached_load_wait_seconds", LOAD_BUCKETS_S)
        self._rpc_seconds = self._histogram("cached_rpc_seconds", RPC_BUCKETS_S)
        self.event_loop_lag_seconds = self._histogram("cached_event_loop_lag_seconds", LAG_BUCKETS_S)
        self._coldstart_seconds = self._histogram("cached_coldstart_seconds", COLDSTART_BUCKETS_S)
        self._coldstart_phase_seconds = self._histogram("cached_coldstart_phase_seconds", COLDSTART_BUCKETS_S)
        self._state = State(version)
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

    def _histogram(self, name: str, buckets_s: tuple[float, ...], values: tuple[str, ...] = ()) -> Histogram:
        info = _INFO[name]
        histogram = Histogram(info.name, info.help, info.labels, registry=self.registry, buckets=buckets_s)
        for value in values:
            histogram.labels(value)
        return histogram

    # What happened. An exemplar leads from a bucket to the log lines, events and spans of one that fell into it.

    def attached(self, model: str, from_level: Level, seconds: float, *, trace_id: str, lease_id: str) -> None:
        """An attach got all of its bytes."""
        exemplar = _exemplar(trace_id=trace_id, lease=lease_id)
        self._attach_seconds.labels(from_level=from_level.value).observe(seconds, exemplar)
        self._model_attaches.labels(model=self._state.models.of(model), from_level=from_level.value).inc()

    def load_opened(self, seconds: float, *, trace_id: str, load_id: str) -> None:
        """A load had waited for its turn, and its room, for so long."""
        self._load_wait_seconds.observe(seconds, _exemplar(trace_id=trace_id, load=load_id))

    def loaded(self, from_level: Level, seconds: float, *, trace_id: str, load_id: str) -> None:
        """A load was ready after so long."""
        exemplar = _exemplar(trace_id=trace_id, load=load_id)
        self._load_seconds.labels(from_level=from_level.value).observe(seconds, exemplar)

    def pulled(self, time_s: float) -> None:
        """A load from an origin succeeded at this Unix time."""
        self.pulls.labels(outcome="ok").inc()
        self._state.last_pull_time_s = time_s

    def delivered(self, origin: str, length_bytes: int) -> None:
        """An origin, or a link of a chain, brought a range."""
        self._origin_bytes.labels(origin=self._state.origins.of(origin)).inc(length_bytes)

    def failed_over(self, origin: str, reason: str) -> None:
        """A link of a chain could not, and the next one is asked."""
        self._origin_failovers.labels(origin=self._state.origins.of(origin), reason=reason).inc()

    def answered(self, method: str, code: str, seconds: float | None, *, trace_id: str) -> None:
        """An RPC ended. ``seconds`` is None for a stream: it takes as long as somebody listens."""
        self.rpc.labels(method=method, code=code).inc()
        if seconds is not None:
            self._rpc_seconds.labels(method=method).observe(seconds, _exemplar(trace_id=trace_id))

    def show_coldstarts(self, model: str, phases: set[str]) -> None:
        """A model's series begin at 0, so that a rate over them has a first point."""
        name = self._state.models.of(model)
        self._coldstart_seconds.labels(model=name)
        for phase in phases:
            self._coldstart_phase_seconds.labels(model=name, phase=phase)

    def coldstarted(self, model: str, total_s: float, phases_s: dict[str, float]) -> None:
        """A worker told of its start."""
        name = self._state.models.of(model)
        for phase, seconds in sorted(phases_s.items()):
            self._coldstart_phase_seconds.labels(model=name, phase=phase).observe(seconds)
        self._coldstart_seconds.labels(model=name).observe(total_s)

    def forget_model(self, model: str) -> None:
        """Drops a model's series: they would stay for ever, and models come and go."""
        if self._state.models.of(model) == OTHER:
            return
        self._state.models.forget(model)
        for metric in (self._model_attaches, self._coldstart_seconds, self._coldstart_phase_seconds):
            metric.remove_by_labels({"model": model})

    def withhold_models(self, is_withheld: Callable[[str], bool]) -> None:
        """Whoever reads the metrics is not to know of these models: they are counted as ``other`` from now on."""
        for model in self._state.models.withhold(is_withheld):
            self.forget_model(model)

    # Where the rest comes from.

    def bind(self, gauges: Callable[[], Gauges], ready: Callable[[], bool]) -> None:
        """Gives the gauges their source. Both functions are called at each scrape and must not block."""
        self._state.gauges = gauges
        self._state.ready = ready

    @property
    def catalog(self) -> Reload:
        """The last reading of the catalog."""
        return self._state.catalog

    @property
    def config(self) -> Reload:
        """The last reading of the settings."""
        return self._state.config

    def bind_limits(self, used_ratios: Callable[[], Mapping[str, float]]) -> None:
        """One more who knows how far limits of what callers may have are used. Called at each scrape."""
        self._state.limit_ratios.append(used_ratios)

    def counters(self) -> dict[str, float]:
        """Every counter as in /metrics: ``cached_hits_total{level="l1"}`` → value; no braces without labels."""
        found: dict[str, float] = {}
        for counter in self._counters:
            for family in counter.collect():
                for sample in family.samples:
                    if sample.name.endswith("_total"):
                        found[_sample_key(sample.name, sample.labels)] = sample.value
        return found

    def expose(self, accept: str = "") -> tuple[bytes, str]:
        """What /metrics answers, and its content type: OpenMetrics, with exemplars, where ``accept`` says so."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


def _exemplar(**labels: str) -> dict[str, str]:
    return {name: value for name, value in labels.items() if value}


def _sample_key(name: str, labels: dict[str, str]) -> str:
    if not labels:
        return name
    inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return f"{name}{{{inside}}}"
