"""Reports of workers' starts, between the wire and the engine. What comes is checked before anything is kept of it."""

from __future__ import annotations

from math import isfinite

from cached import types
from cached.errors import InvalidRequestError
from cached.refs import check_name, parse_ref
from cached.rpc.converters import text
from cached_client import errors as client_errors
from cached_client._proto import cached_pb2 as pb
from cached_client.coldstart.message import spans_of, to_message
from cached_client.coldstart.spans import MAX_SECONDS, Span, check_labels, check_spans

_CLIENT_NAME_LIMIT = 256
_LATEST_TIME_S = 253_402_300_800.0
"""The year 10000, after which nobody can write dates."""


def cold_start_of(message: pb.ColdStart) -> types.ColdStart:
    """A worker's report. Raises InvalidRequestError, saying what of it cannot be."""
    check_name(message.name)
    if message.revision:
        parse_ref(f"{message.name}@{message.revision}")
    spans = spans_of(message)
    try:
        check_spans(spans)
        labels = check_labels(dict(message.labels))
    except client_errors.InvalidRequestError as error:
        raise InvalidRequestError(error.message, hint=error.hint, **error.fields) from error
    longest_s = max((span.end_s for span in spans), default=0.0)
    if not (isfinite(message.total_s) and longest_s <= message.total_s <= MAX_SECONDS):
        raise InvalidRequestError(
            f"total_s is {message.total_s:g}",
            hint=f"it is at least the end of the last phase ({longest_s:g}), and {MAX_SECONDS:g} at most",
            value=message.total_s,
        )
    if not 0 <= message.started_time_s <= _LATEST_TIME_S:  # NaN is not
        raise InvalidRequestError(
            f"started_time_s is {message.started_time_s:g}", hint="it is a Unix time", value=message.started_time_s
        )
    return types.ColdStart(
        name=message.name,
        revision=message.revision,
        client_name=message.client_name[:_CLIENT_NAME_LIMIT],
        started_time_s=message.started_time_s,
        total_s=message.total_s,
        phases=tuple(_phase_of(span) for span in spans),
        labels=labels,
    )


def _phase_of(span: Span) -> types.ColdStartPhase:
    return types.ColdStartPhase(span.name, span.start_s, span.end_s, span.parent, span.after, span.running, span.failed)


def cold_start_message(value: types.ColdStart) -> pb.ColdStart:
    """What is kept of a report."""
    spans = [
        Span(item.name, item.start_s, item.end_s, item.parent, item.after, item.running, item.failed)
        for item in value.phases
    ]
    message = to_message(spans, {key: text(item) for key, item in value.labels.items()})
    message.name = value.name
    message.revision = value.revision
    message.client_name = text(value.client_name)
    message.started_time_s = value.started_time_s
    message.total_s = value.total_s
    message.reported_time_s = value.reported_time_s
    return message
