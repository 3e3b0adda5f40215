"""The metrics: what is exposed is what is declared, and the gauges follow the engine."""

from __future__ import annotations

import ast
import dataclasses
import shutil
import subprocess

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics_families
from prometheus_client.parser import text_string_to_metric_families

from cached.level import Level
from cached.metrics import DEGRADED_REASONS, METRICS, Gauges, Metrics, ModelGauges
from cached.metrics.table import MODEL_LABELS, ORIGIN_LABELS
from cached.processes import Usage
from cached.types import LevelStats, OriginStats
from tests.docs.documents import ROOT

GAUGES = Gauges(
    levels=(
        LevelStats(Level.L1, 100, 60, 10, 5, 7, 3, "configured", 11, 12, 80, 7200.0),
        LevelStats(Level.L2, 900, 80, 0, 0, 0, 4, ""),
    ),
    origins=(OriginStats("https://s3.example", 3, 40, 8),),
    models=(ModelGauges("tiny", 60, 80, 2),),
    model_count=3, hot_model_count=2, hot_ready_count=1, quarantined_blob_count=1, lease_count=2,
    active_load_count=1, mover_count=4, movers=Usage(1.5, 1000, 12), degraded=frozenset({"l2", "new"}),
    memory_stall_ratio=0.25, prediction_precision=0.75,
)  # fmt: skip
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"
TRACE = "0af7651916cd43dd8448eb211c80319c"


def text_of(metrics: Metrics) -> str:
    return metrics.expose()[0].decode()


def exposed(metrics: Metrics) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text_of(metrics)):
        for sample in family.samples:
            found[sample.name + "".join(f"|{key}={value}" for key, value in sorted(sample.labels.items()))] = (
                sample.value
            )
    return found


@pytest.fixture
def metrics() -> Metrics:
    """With something in each metric."""
    metrics = Metrics("1.2")
    metrics.bind(lambda: GAUGES, lambda: True)
    metrics.bind_limits(lambda: {"leases": 0.5})
    metrics.evictions.labels(level="l1", reason="room").inc()
    metrics.admissions.labels(level="l1", verdict="transient").inc()
    metrics.retries.labels(reason="ORIGIN_UNAVAILABLE").inc()
    metrics.answered("Stats", "OK", 0.001, trace_id=TRACE)
    metrics.loaded(Level.L2, 0.2, trace_id=TRACE, load_id="ab12cd34")
    metrics.load_opened(0.1, trace_id=TRACE, load_id="ab12cd34")
    metrics.attached("tiny", Level.L2, 0.3, trace_id=TRACE, lease_id="12345678")
    metrics.pulled(1e9)
    metrics.delivered("s3://bucket", 1)
    metrics.failed_over("s3://bucket", "NOT_FOUND")
    metrics.coldstarted("tiny", 3.0, {"download": 2.0})
    metrics.catalog.done(successful=True)
    metrics.config.done(successful=True)
    return metrics


def test_every_declared_metric_is_exposed_with_its_type_and_labels(metrics: Metrics) -> None:
    families = {family.name: family for family in text_string_to_metric_families(text_of(metrics))}
    for info in METRICS:
        family = families.pop(info.name.removesuffix("_total"))
        assert (family.type, family.documentation) == (info.type, info.help)
        assert set(family.samples[0].labels) - {"le"} == set(info.labels)
    assert [name for name in families if name.startswith("cached_")] == []


def test_prometheus_finds_nothing_wrong_with_names_types_and_help(metrics: Metrics) -> None:
    promtool = shutil.which("promtool") or pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    done = subprocess.run([promtool, "check", "metrics"], input=text_of(metrics), capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_openmetrics_has_exemplars_and_the_plain_text_has_not(metrics: Metrics) -> None:
    body, content_type = metrics.expose(f"{OPEN_METRICS},text/plain;q=0.5")
    assert content_type.startswith(OPEN_METRICS)
    found = {
        family.name: sample.exemplar.labels
        for family in open_metrics_families(body.decode())
        for sample in family.samples
        if sample.exemplar
    }
    assert found == {
        "cached_attach_seconds": {"trace_id": TRACE, "lease": "12345678"},
        "cached_load_seconds": {"trace_id": TRACE, "load": "ab12cd34"},
        "cached_load_wait_seconds": {"trace_id": TRACE, "load": "ab12cd34"},
        "cached_rpc_seconds": {"trace_id": TRACE},
    }
    body, content_type = metrics.expose("text/html")
    assert content_type.startswith("text/plain; version=0.0.4")
    assert TRACE not in body.decode()


def test_gauges_follow_the_engine_at_scrape_time() -> None:
    metrics = Metrics("1.2")
    assert exposed(metrics)["cached_ready"] == 0
    assert "cached_leases" not in exposed(metrics)
    metrics.bind(lambda: GAUGES, lambda: True)
    now = exposed(metrics)
    assert now["cached_ready"] == 1
    assert now["cached_level_used_bytes|level=l1"] == 60
    assert now["cached_level_pool_bytes|level=l1"] == 7
    assert now["cached_level_unverified_seconds|level=l1"] == 7200
    assert now["cached_level_transient_bytes|level=l1"] == 11
    assert now["cached_level_hot_bytes|level=l1"] == 12
    assert now["cached_level_hot_capacity_bytes|level=l1"] == 80
    assert now["cached_level_capacity_bytes|level=l2"] == 900
    assert now["cached_origin_ranges_limit|origin=https://s3.example"] == 8
    assert now["cached_origin_ranges_in_flight|origin=https://s3.example"] == 3
    assert now["cached_model_bytes|level=l2|model=tiny"] == 80
    assert now["cached_hot_models"] - now["cached_hot_models_ready"] == 1
    assert now["cached_mover_cpu_seconds_total"] == 1.5
    assert now["cached_build_info|version=1.2"] == 1


def test_what_is_degraded_is_a_fixed_set_of_reasons() -> None:
    metrics = Metrics()
    metrics.bind(lambda: GAUGES, lambda: True)
    now = exposed(metrics)
    assert {reason for reason in DEGRADED_REASONS if now[f"cached_degraded|reason={reason}"]} == {"l2", "other"}


def test_every_reason_that_the_code_gives_has_its_name() -> None:
    given = set()
    for path in (ROOT / "cached").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("degraded.began"):
                given.add(ast.unparse(node.args[0]).strip("'"))
    assert given - {"level.value", "OTHER"} == DEGRADED_REASONS.keys() - {"other", "l1"}


def test_models_and_origins_beyond_a_number_count_together() -> None:
    metrics = Metrics()
    many = GAUGES.__class__(
        **{field.name: getattr(GAUGES, field.name) for field in dataclasses.fields(GAUGES)}
        | {
            "models": tuple(ModelGauges(f"m{number}", 1, 0, 1) for number in range(2 * MODEL_LABELS)),
            "origins": tuple(OriginStats(f"s3://{number}", 1, 0, 8) for number in range(2 * ORIGIN_LABELS)),
        }
    )
    metrics.bind(lambda: many, lambda: True)
    now = exposed(metrics)
    assert now["cached_model_bytes|level=l1|model=other"] == MODEL_LABELS
    assert sum(name.startswith("cached_model_leases") for name in now) == MODEL_LABELS + 1
    assert now["cached_origin_ranges_in_flight|origin=other"] == ORIGIN_LABELS
    metrics.attached("new", Level.L1, 0.001, trace_id="", lease_id="")
    assert exposed(metrics)["cached_model_attaches_total|from_level=l1|model=other"] == 1
    metrics.coldstarted("m0", 1.0, {"attach": 0.5})
    metrics.forget_model("m0")
    metrics.attached("new", Level.L1, 0.001, trace_id="", lease_id="")
    now = exposed(metrics)
    assert now["cached_model_attaches_total|from_level=l1|model=new"] == 1
    assert not any("cached_coldstart" in name and "m0" in name for name in now)


def test_files_that_were_read_tell_how_that_went() -> None:
    metrics = Metrics()
    assert "cached_catalog_last_reload_successful" not in exposed(metrics)
    metrics.catalog.done(successful=True)
    then = exposed(metrics)["cached_catalog_last_reload_success_timestamp_seconds"]
    metrics.catalog.done(successful=False)
    now = exposed(metrics)
    assert now["cached_catalog_last_reload_successful"] == 0
    assert now["cached_catalog_last_reload_success_timestamp_seconds"] == then


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
