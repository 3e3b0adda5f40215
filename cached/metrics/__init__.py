"""The daemon's metrics for Prometheus."""

from cached.metrics.gauges import Gauges, ModelGauges, Reload
from cached.metrics.metrics import Metrics
from cached.metrics.table import DEGRADED_REASONS, HOPS, LEVELS, METRICS, SPAN_OUTCOMES, MetricInfo

__all__ = [
    "DEGRADED_REASONS",
    "HOPS",
    "LEVELS",
    "METRICS",
    "SPAN_OUTCOMES",
    "Gauges",
    "MetricInfo",
    "Metrics",
    "ModelGauges",
    "Reload",
]
