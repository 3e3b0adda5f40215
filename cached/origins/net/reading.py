"""One range of an object, from its request to its last byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from cached.errors import CachedError
from cached.origins.base import Abort, ReadInto
from cached.origins.net.body import Body
from cached.origins.net.connections import interruptible
from cached.origins.net.exchange import LongBodyError


class RangeFailures(Protocol):
    """What reading needs of an origin's errors."""

    raised: tuple[type[BaseException], ...]
    """What the layers below raise, for ``translate``."""

    def translate(self, error: BaseException, path: str, *, expected_version: str = "") -> CachedError:
        """The typed error for one of ``raised``."""
        ...

    def wrong_range(self, path: str, asked: str, problem: str) -> CachedError:
        """The answer is not the range that was asked for."""
        ...


@contextmanager
def range_read(
    begin: Callable[[Body], None],
    failures: RangeFailures,
    path: str,
    asked: str,
    length_bytes: int,
    abort: Abort | None,
) -> Iterator[ReadInto]:
    """Reads what ``begin`` asked for: see Origin.open_range.

    ``begin`` sends the request, begins the body with the answer, and only then looks whether it is the right one.
    ``asked``: the Range header, for errors.
    """
    done_bytes = 0
    body = Body()

    def read_into(view: memoryview) -> None:
        nonlocal done_bytes
        try:  # not ``typed``, which costs more: this runs some thousand times for a GB
            done_bytes += (count := body.read_into(view))
        except failures.raised as error:
            raise failures.translate(error, path) from None
        if count != len(view):
            raise failures.wrong_range(path, asked, f"the body ended after {done_bytes} of {length_bytes} bytes")

    try:
        # Left before the connection goes back to the pool: a late abort must not hit its next user.
        with interruptible(abort):
            begin(body)
            yield read_into
            if done_bytes == length_bytes:
                try:
                    body.finish()
                except LongBodyError as error:
                    raise failures.wrong_range(path, asked, str(error)) from None
                except failures.raised as error:
                    raise failures.translate(error, path) from None
    finally:
        body.end()


def read_nothing(view: memoryview) -> None:
    """The ReadInto of a range without bytes."""
    if view:
        msg = "the range has no bytes"
        raise ValueError(msg)
