"""What a timeline consists of, and how much of it there may be: bounds that worker and daemon share."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cached_client.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PHASES: Mapping[str, str] = {
    "container_start": "the container was asked for, or its first process began, until this process began",
    "process_start": "this process began, until the timeline was made: the interpreter and what was imported before",
    "imports": "libraries are imported",
    "attach": "the daemon is asked, and the model's files are mapped",
    "download": "bytes arrive from the origin, each chunk verified",
    "promote": "bytes arrive from local disk, each chunk verified",
    "verify": "all bytes are there, and the check of whole files is awaited",
    "weights_to_gpu": "weights are copied to the device",
    "cuda_init": "the device's context is made",
    "compile": "kernels or graphs are compiled or captured",
    "warmup": "shapes are run before users come",
    "first_inference": "the first request is answered",
}
"""The standard names. Others may be used; in the daemon's metrics they count together as ``other``."""

MAX_SPANS = 64
"""Of one timeline. A start that has more of them is summed up by its caller, not listed."""
MAX_DEPTH = 8
MAX_SECONDS = 7 * 86_400.0
MAX_LABELS = 16
MAX_LABEL_CHARACTERS = 256

_NAME = re.compile(r"[a-z][a-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of time. Offsets are seconds from the timeline's begin.

    ``parent``: index of the span that it is a part of, always a lower one. ``after``: the name of phases that set its
    pace where both run: one that consumes what the other brings. ``running``: it had not ended yet, and ``end_s`` is
    when that was looked at. ``failed``: it ended with an exception.
    """

    name: str
    start_s: float
    end_s: float
    parent: int | None = None
    after: str = ""
    running: bool = False
    failed: bool = False

    @property
    def total_s(self) -> float:
        """From its begin to its end."""
        return self.end_s - self.start_s


def check_phase(name: str) -> str:
    """A phase's name, unchanged, or InvalidRequestError."""
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{name[:80]!r} is not a phase's name",
            hint="use 1 to 64 lower-case letters, digits, '_', '.' and '-', beginning with a letter",
            value=name[:80],
        )
    return name


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Labels, unchanged, or InvalidRequestError. Their keys are named as phases are."""
    if len(labels) > MAX_LABELS:
        raise InvalidRequestError(f"{len(labels)} labels; at most {MAX_LABELS} are kept", value=len(labels))
    for key, value in labels.items():
        check_phase(key)
        if len(value) > MAX_LABEL_CHARACTERS:
            raise InvalidRequestError(
                f"the label {key} has {len(value)} characters; at most {MAX_LABEL_CHARACTERS} are kept", value=key
            )
    return dict(labels)


def check_spans(spans: Sequence[Span]) -> None:
    """Raises InvalidRequestError for what no timeline has; says which span, and what is wrong with it."""
    if len(spans) > MAX_SPANS:
        raise InvalidRequestError(f"{len(spans)} phases; at most {MAX_SPANS} are kept", value=len(spans))
    depths: list[int] = []
    for index, span in enumerate(spans):
        check_phase(span.name)
        if span.after:
            check_phase(span.after)
        if not 0 <= span.start_s <= span.end_s <= MAX_SECONDS:  # NaN is not
            raise InvalidRequestError(
                f"phase {index} ({span.name}) goes from {span.start_s:g} to {span.end_s:g} s",
                hint=f"offsets are seconds from the begin, in order, {MAX_SECONDS:g} at most",
                value=span.name,
            )
        if span.parent is not None and not 0 <= span.parent < index:
            raise InvalidRequestError(
                f"phase {index} ({span.name}) is said to be a part of phase {span.parent}",
                hint="a phase comes after the one that it is a part of",
                value=span.name,
            )
        depths.append(0 if span.parent is None else depths[span.parent] + 1)
        if depths[-1] >= MAX_DEPTH:
            raise InvalidRequestError(f"phase {index} ({span.name}) is nested deeper than {MAX_DEPTH}", value=span.name)


def contained(spans: Iterable[Span]) -> list[Span]:
    """The spans with each as long as its parts: work that a phase began in another thread may outlast it."""
    found = list(spans)
    for index in range(len(found) - 1, -1, -1):
        span = found[index]
        if span.parent is not None:
            whole = found[span.parent]
            found[span.parent] = replace(
                whole, start_s=min(whole.start_s, span.start_s), end_s=max(whole.end_s, span.end_s)
            )
    return found
