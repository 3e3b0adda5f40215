"""Spans of pulls and attaches for an OpenTelemetry collector, over OTLP/gRPC. Imported only where that is switched on.

Everything is sent by a thread of the SDK, in batches, from a bounded queue: with the collector away spans are lost, and
nothing else is. The SDK's own variables hold: ``OTEL_TRACES_SAMPLER``, ``OTEL_RESOURCE_ATTRIBUTES``, ``OTEL_BSP_…``,
``OTEL_EXPORTER_OTLP_HEADERS``.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar

import structlog
from opentelemetry import context, trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cached.logs import redact_text
from cached.tracing import Attributes, Span, Tracer, carrying, current_trace_id

_log = structlog.get_logger(__name__)

_EXPORT_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 2.0
_request: ContextVar[Attributes] = ContextVar("cached_request_attributes")


class OtelTracer(Tracer):
    """Sends spans to a collector. ``on_exported`` hears of each batch, ``exported`` or ``failed``, from a thread."""

    def __init__(self, endpoint: str, *, version: str, on_exported: Callable[[str, int], None]) -> None:
        """``endpoint``: a URL such as http://collector:4317; empty: as the environment says."""
        # What the SDK would say with every batch is told once, below.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        ours = {"service.name": "cached", "service.version": version, "host.name": socket.gethostname()}
        resource = Resource.create(ours).merge(OTELResourceDetector().detect())
        exporter = OTLPSpanExporter(endpoint=endpoint or None, timeout=_EXPORT_TIMEOUT_S)
        self._provider = TracerProvider(resource=resource, id_generator=_Ids(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_Watched(exporter, on_exported)))
        self._tracer = self._provider.get_tracer("cached", version)
        self._propagator = TraceContextTextMapPropagator()

    @contextlib.contextmanager
    def request(self, headers: Mapping[str, str], attributes: Attributes) -> Iterator[None]:
        """See Tracer; the caller's sampling decision holds, too."""
        token = context.attach(self._propagator.extract(headers))
        told = _request.set(attributes)
        try:
            with super().request(headers, attributes):
                yield
        finally:
            _request.reset(told)
            context.detach(token)

    def start(self, name: str, attributes: Attributes = {}, *, server: bool = False) -> Span:  # noqa: B006
        """See Tracer."""
        if not server:
            return _OtelSpan(self._tracer.start_span(name, attributes=_shown(attributes)))
        request = _request.get({})
        if request:  # https://opentelemetry.io/docs/specs/semconv/rpc/rpc-spans/
            name = f"{request['rpc.service']}/{request['rpc.method']}"
        every = _shown({**request, **attributes})
        return _OtelSpan(self._tracer.start_span(name, kind=trace.SpanKind.SERVER, attributes=every))

    def close(self) -> None:
        """See Tracer."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSE_TIMEOUT_S)


class _OtelSpan(Span):
    def __init__(self, span: trace.Span) -> None:
        super().__init__(trace.format_trace_id(span.get_span_context().trace_id))
        self._span = span

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        token = context.attach(trace.set_span_in_context(self._span))
        try:
            with carrying(self.trace_id):
                yield
        finally:
            context.detach(token)

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(_shown(attributes))

    def event(self, name: str) -> None:
        self._span.add_event(name)

    def link(self, other: Span) -> None:
        if isinstance(other, _OtelSpan) and other.trace_id != self.trace_id:
            self._span.add_link(other._span.get_span_context())  # noqa: SLF001 one of us

    def fail(self, error: BaseException) -> None:
        self._span.set_attribute("error.type", str(getattr(error, "reason", type(error).__name__)))
        self._span.set_status(trace.Status(trace.StatusCode.ERROR, redact_text(str(error))))

    def end(self) -> None:
        if self._span.is_recording():
            self._span.end()


def _shown(attributes: Attributes) -> dict[str, str | int | float]:
    """Without secrets: a collector is read by more people than the daemon's log."""
    return {key: redact_text(value) if isinstance(value, str) else value for key, value in attributes.items()}


class _Ids(RandomIdGenerator):
    """A request that came without a trace has its id before its first span."""

    def generate_trace_id(self) -> int:
        known = current_trace_id()
        return int(known, 16) if known else super().generate_trace_id()


class _Watched(SpanExporter):
    """Tells once when the collector does not take spans, and once when it does again."""

    def __init__(self, exporter: SpanExporter, on_exported: Callable[[str, int], None]) -> None:
        self._exporter = exporter
        self._on_exported = on_exported
        self._works = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        works = result is SpanExportResult.SUCCESS
        self._on_exported("exported" if works else "failed", len(spans))
        if works != self._works:
            self._works = works
            if works:
                _log.info("telemetry.recovered")
            else:
                _log.warning("telemetry.failed", hint="is the collector there, and does it speak OTLP over gRPC?")
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)
