"""The metrics: what is exposed is what is declared, and the gauges follow the engine."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from cached.metrics import METRICS, Metrics
from cached.types import Level, LevelStats, OriginStats, Stats

STATS = Stats(
    levels=(
        LevelStats(Level.L1, 100, 60, 10, 5, 7, 3, "configured", 11, 12, 80),
        LevelStats(Level.L2, 900, 80, 0, 0, 0, 4, ""),
    ),
    counters={}, lease_count=2, model_count=3, active_load_count=1, mover_count=4, uptime_s=1.0, version="1",
    degraded=("l2 is read-only",), instance="ab", origins=(OriginStats("https://s3.example", 3, 40, 8),),
    prediction_precision=0.75,
)  # fmt: skip


def exposed(metrics: Metrics) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(metrics.expose().decode()):
        for sample in family.samples:
            found[sample.name + "".join(f"|{key}={value}" for key, value in sorted(sample.labels.items()))] = (
                sample.value
            )
    return found


def test_every_declared_metric_is_exposed_with_its_type_and_labels() -> None:
    metrics = Metrics("1.2")
    metrics.bind(lambda: STATS, lambda: True)
    metrics.evictions.labels(level="l1", reason="room").inc()
    metrics.admissions.labels(level="l1", verdict="transient").inc()
    metrics.retries.labels(reason="ORIGIN_UNAVAILABLE").inc()
    metrics.origin_bytes.labels(origin="s3://bucket").inc()
    metrics.origin_failovers.labels(origin="s3://bucket", reason="NOT_FOUND").inc()
    metrics.rpc.labels(method="Pull", code="OK").inc()
    metrics.load_seconds.labels(from_level="l2").observe(0.2)
    metrics.coldstart_seconds.labels(model="tiny").observe(3)
    metrics.coldstart_phase_seconds.labels(model="tiny", phase="download").observe(2)
    families = {family.name: family for family in text_string_to_metric_families(metrics.expose().decode())}
    for info in METRICS:
        family = families.pop(info.name.removesuffix("_total"))
        assert (family.type, family.documentation) == (info.type, info.help)
        assert set(family.samples[0].labels) - {"le"} == set(info.labels)
    assert [name for name in families if name.startswith("cached_")] == []


def test_gauges_follow_the_engine_at_scrape_time() -> None:
    metrics = Metrics("1.2")
    assert exposed(metrics)["cached_ready"] == 0
    metrics.bind(lambda: STATS, lambda: True)
    now = exposed(metrics)
    assert now["cached_ready"] == 1
    assert now["cached_level_bytes|kind=used|level=l1"] == 60
    assert now["cached_level_bytes|kind=pool|level=l1"] == 7
    assert now["cached_level_bytes|kind=transient|level=l1"] == 11
    assert now["cached_level_bytes|kind=hot|level=l1"] == 12
    assert now["cached_level_bytes|kind=hot_capacity|level=l1"] == 80
    assert now["cached_level_bytes|kind=capacity|level=l2"] == 900
    assert now["cached_origin_ranges|kind=width|origin=https://s3.example"] == 8
    assert now["cached_origin_ranges|kind=in_flight|origin=https://s3.example"] == 3
    assert now["cached_degraded"] == 1
    assert now["cached_build_info|version=1.2"] == 1


def test_counters_carry_their_labels_and_start_at_zero() -> None:
    metrics = Metrics()
    metrics.hits.labels(level="l1").inc(2)
    counters = metrics.counters()
    assert counters['cached_hits_total{level="l1"}'] == 2
    assert counters['cached_transfer_bytes_total{hop="l3_l1"}'] == 0
    assert counters["cached_mover_restarts_total"] == 0
    assert all("_created" not in name for name in counters)


def test_two_instances_do_not_share_state() -> None:
    first, second = Metrics(), Metrics()
    first.mover_restarts.inc()
    assert second.counters()["cached_mover_restarts_total"] == 0
