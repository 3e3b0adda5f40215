"""Between timelines and the messages of ``cached.v1``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached_client._proto import cached_pb2 as pb
from cached_client.coldstart.spans import Span

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def to_message(spans: Iterable[Span], labels: Mapping[str, str]) -> pb.ColdStart:
    """Its phases and labels; the caller says whose they are."""
    return pb.ColdStart(
        labels=labels,
        phases=[
            pb.ColdStartPhase(
                name=span.name,
                start_s=span.start_s,
                end_s=span.end_s,
                parent=span.parent,
                after=span.after,
                running=span.running,
                failed=span.failed,
            )
            for span in spans
        ],
    )


def spans_of(message: pb.ColdStart) -> list[Span]:
    """The phases of a message, unchecked: see `check_spans`."""
    return [
        Span(
            name=phase.name,
            start_s=phase.start_s,
            end_s=phase.end_s,
            parent=phase.parent if phase.HasField("parent") else None,
            after=phase.after,
            running=phase.running,
            failed=phase.failed,
        )
        for phase in message.phases
    ]
