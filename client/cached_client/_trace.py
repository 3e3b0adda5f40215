"""Passes the worker's trace on to the daemon, where the worker uses OpenTelemetry. Nothing is imported for that.

What the daemon does for the worker is then a part of the worker's own trace.
"""

from __future__ import annotations

import sys


def trace_metadata() -> tuple[tuple[str, str], ...] | None:
    """The current span as gRPC metadata (W3C trace context); None where there is none, or no OpenTelemetry."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(headers)
    return tuple(headers.items()) or None
