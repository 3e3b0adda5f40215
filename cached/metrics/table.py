"""Every metric of the daemon: its name, type, labels and help text, as it is exposed and documented."""

from __future__ import annotations

from dataclasses import dataclass

from cached.failures import KINDS, PARTS
from cached.level import Level

LEVELS = tuple(level.value for level in Level)
HOPS = ("l3_l1", "l3_l2", "l2_l1", "l1_l2")
PREDICTION_OUTCOMES = ("right", "wrong", "acted")
PULL_OUTCOMES = (
    "ok", "INTEGRITY", "INTERNAL", "LEVEL_FAILED", "MOVER_FAILED", "NOT_FOUND", "NO_ROOM", "NO_SOURCE",
    "OBJECT_CHANGED", "ORIGIN_DENIED", "ORIGIN_FAILED", "ORIGIN_PROTOCOL", "ORIGIN_UNAVAILABLE", "QUARANTINED",
)  # fmt: skip
"""Shown as 0 from the start: an alert would not see the first of a kind. Others are shown once they happened."""

SLOT_OUTCOMES = ("acquired", "taken_over", "skipped", "lost")
HEDGE_OUTCOMES = ("won", "lost", "failed")
SPAN_OUTCOMES = ("exported", "failed")
FAILURE_REASONS = tuple(kind.reason for kind in KINDS)

MODEL_LABELS = 50
"""Models with series of their own; the first that are used. All others count together as ``other``."""

ORIGIN_LABELS = 20
"""The same of origins."""

DEGRADED_REASONS = {about: part.meaning for about, part in PARTS.items()}
"""What can be degraded: the values of a label, so a fixed set."""

ATTACH_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0,
)  # fmt: skip
COLDSTART_BUCKETS_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0, 200.0, 400.0, 800.0)
LAG_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
LOAD_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
RPC_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.0, 10.0)


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """A metric as it is exposed: its full name, ``counter``, ``gauge`` or ``histogram``, label names and help text."""

    name: str
    type: str
    labels: tuple[str, ...]
    help: str


METRICS: tuple[MetricInfo, ...] = (
    # Demand.
    MetricInfo("cached_hits_total", "counter", ("level",), "Attaches served from a level."),
    MetricInfo("cached_misses_total", "counter", ("level",), "Attaches that a level could not serve."),
    MetricInfo(
        "cached_attach_seconds", "histogram", ("from_level",),
        "Time from an attach to all of its bytes being ready, by where most of them came from.",
    ),
    MetricInfo(
        "cached_model_attaches_total", "counter", ("model", "from_level"),
        "Attaches that got all of their bytes, by model and where most of them came from.",
    ),
    MetricInfo("cached_pulls_total", "counter", ("outcome",), "Loads: ok for those from an origin, else the error."),
    MetricInfo(
        "cached_load_seconds", "histogram", ("from_level",), "Time until a load was ready, by where it came from."
    ),
    MetricInfo("cached_load_wait_seconds", "histogram", (), "Time from a load's beginning until it had its room."),
    MetricInfo("cached_active_loads", "gauge", (), "Pulls and promotions in flight."),
    MetricInfo("cached_leases", "gauge", (), "Leases held now."),
    MetricInfo(
        "cached_limit_used_ratio", "gauge", ("limit",),
        "Share of a limit that is used: of leases, calls, streams, connections, descriptor_connections and "
        "unread_descriptors of a user by the one who has the most of them, of all_calls and the like by everybody.",
    ),
    MetricInfo(
        "cached_last_pull_success_timestamp_seconds", "gauge", (),
        "Unix time at which a load from an origin last succeeded. Absent before the first.",
    ),
    # Failure.
    MetricInfo(
        "cached_failures_total", "counter", ("reason",),
        "Failures by reason: of loads, calls and work in the background. One that many wait for counts once.",
    ),
    # Movement.
    MetricInfo("cached_transfer_bytes_total", "counter", ("hop",), "Verified bytes moved over a hop."),
    MetricInfo("cached_transfer_seconds_total", "counter", ("hop",), "Wall time of transfer threads on a hop."),
    MetricInfo("cached_transfer_cpu_seconds_total", "counter", ("hop",), "CPU time of transfer threads on a hop."),
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
    MetricInfo("cached_origin_ranges_in_flight", "gauge", ("origin",), "Ranges that are being read from an origin."),
    MetricInfo("cached_origin_ranges_waiting", "gauge", ("origin",), "Ranges that wait for their turn at an origin."),
    MetricInfo(
        "cached_origin_ranges_limit", "gauge", ("origin",), "Ranges in flight to an origin at most, as measured."
    ),
    MetricInfo("cached_adopted_bytes_total", "counter", (), "L1 bytes taken over, verified, from an earlier daemon."),
    # The fleet.
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
    # Integrity.
    MetricInfo(
        "cached_checksum_failures_total", "counter", ("level",), "Chunks that failed their checksum, by level."
    ),
    MetricInfo("cached_repaired_chunks_total", "counter", ("level",), "Damaged chunks that were mended at a level."),
    MetricInfo("cached_scrubbed_bytes_total", "counter", ("level",), "Bytes that the scrubber read again at a level."),
    MetricInfo(
        "cached_level_unverified_seconds", "gauge", ("level",),
        "Time since the blob of a level that waits longest for a look was found right; 0 where there is none.",
    ),
    MetricInfo("cached_quarantined_blobs", "gauge", (), "Blobs that are damaged and could not be mended."),
    # What is where.
    MetricInfo("cached_models", "gauge", (), "Models known to the cache."),
    MetricInfo("cached_model_bytes", "gauge", ("model", "level"), "Bytes of a model's current revision at a level."),
    MetricInfo("cached_model_leases", "gauge", ("model",), "Leases held on a model now."),
    MetricInfo("cached_hot_models", "gauge", (), "Models that are hot now, and so are wanted in L1 always."),
    MetricInfo("cached_hot_models_ready", "gauge", (), "Hot models that are in L1, verified."),
    MetricInfo(
        "cached_level_used_bytes", "gauge", ("level",),
        "Bytes that a level holds; withdrawn, pool and transient included.",
    ),
    MetricInfo("cached_level_reserved_bytes", "gauge", ("level",), "Bytes at a level that are promised to loads."),
    MetricInfo(
        "cached_level_capacity_bytes", "gauge", ("level",), "Bytes that a level may hold now; transient included."
    ),
    MetricInfo(
        "cached_level_withdrawn_bytes", "gauge", ("level",), "Evicted bytes at a level that workers still map."
    ),
    MetricInfo("cached_level_pool_bytes", "gauge", ("level",), "Memory that holds nothing, kept for the next blob."),
    MetricInfo(
        "cached_level_transient_bytes", "gauge", ("level",),
        "Bytes of models that a level holds beside its budget, until their last lease ends.",
    ),
    MetricInfo("cached_level_hot_bytes", "gauge", ("level",), "What hot models take once all of them are there."),
    MetricInfo("cached_level_hot_capacity_bytes", "gauge", ("level",), "What hot models may take."),
    # Policy.
    MetricInfo("cached_evictions_total", "counter", ("level", "reason"), "Revisions evicted from a level."),
    MetricInfo("cached_evicted_bytes_total", "counter", ("level",), "Bytes that evictions took out of a level."),
    MetricInfo(
        "cached_admissions_total", "counter", ("level", "verdict"),
        "What became of revisions that wanted a place at a level.",
    ),
    MetricInfo(
        "cached_predictions_total", "counter", ("outcome",),
        "Predictions of use from habit: right or wrong once their time is over, and acted when a model was brought.",
    ),
    MetricInfo(
        "cached_prediction_precision_ratio", "gauge", (),
        "Share of predictions that came true, recent ones counting more. Absent before the first was judged.",
    ),
    # Starts of workers.
    MetricInfo(
        "cached_coldstart_seconds", "histogram", ("model",), "Whole starts of workers, as they told, by model."
    ),
    MetricInfo(
        "cached_coldstart_phase_seconds", "histogram", ("model", "phase"),
        "Phases of workers' starts, as they told; names that are not standard ones count together as other.",
    ),
    # The daemon.
    MetricInfo("cached_build_info", "gauge", ("version",), "Always 1; the daemon's version is its label."),
    MetricInfo("cached_ready", "gauge", (), "1 when recovered and serving, else 0."),
    MetricInfo("cached_degraded", "gauge", ("reason",), "1 for what does not work as it should, else 0."),
    MetricInfo(
        "cached_catalog_last_reload_successful", "gauge", (),
        "1 when the catalog could be used when it was last read, else 0. Absent without a catalog.",
    ),
    MetricInfo(
        "cached_catalog_last_reload_success_timestamp_seconds", "gauge", (),
        "Unix time at which the catalog was last taken over. Absent before that.",
    ),
    MetricInfo(
        "cached_config_last_reload_successful", "gauge", (),
        "1 when the settings could be used when they were last read, else 0.",
    ),
    MetricInfo(
        "cached_config_last_reload_success_timestamp_seconds", "gauge", (),
        "Unix time at which the settings were last taken over.",
    ),
    MetricInfo("cached_rpc_total", "counter", ("method", "code"), "Finished RPCs by method and gRPC status code."),
    MetricInfo("cached_rpc_seconds", "histogram", ("method",), "Time to answer an RPC; streams are not counted."),
    MetricInfo(
        "cached_event_loop_lag_seconds", "histogram", (),
        "How much later than asked for the daemon's event loop ran a timer; looked at every second.",
    ),
    MetricInfo("cached_time_seconds", "gauge", (), "The host's clock, Unix time."),
    MetricInfo(
        "cached_memory_stall_ratio", "gauge", (),
        "Share of the last 10 s in which all tasks of the host waited for memory. Absent where the kernel has no PSI.",
    ),
    MetricInfo("cached_movers", "gauge", (), "Mover processes alive."),
    MetricInfo("cached_mover_restarts_total", "counter", (), "Mover processes that died and were replaced."),
    MetricInfo("cached_mover_cpu_seconds_total", "counter", (), "CPU time of all mover processes, also ended ones."),
    MetricInfo(
        "cached_mover_resident_memory_bytes", "gauge", (), "Memory of the mover processes' own; weights are not in it."
    ),
    MetricInfo("cached_mover_open_fds", "gauge", (), "Open descriptors of the mover processes."),
    MetricInfo(
        "cached_telemetry_spans_total", "counter", ("outcome",),
        "OpenTelemetry spans by what became of them: exported, or failed when the collector did not take them.",
    ),
)  # fmt: skip
"""All of the cache's own metrics; ``process_*`` come from the Prometheus client library besides."""
