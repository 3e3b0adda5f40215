"""The body of a GET, straight into the caller's memory."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import Any

from cached.origins.net.exchange import LongBodyError, Reply, receiver

_BUFFERED_BYTES = io.DEFAULT_BUFFER_SIZE
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_LENGTH = re.compile(r"\d{1,19}")


def range_problem(fields: Mapping[str, Any], offset_bytes: int, length_bytes: int, size_bytes: int) -> str:
    """What is wrong with the range of an answer, or empty.

    ``fields``: ContentRange and ContentLength. Judged by these, not by the status: rclone answers 200. An answer
    without Content-Range is the whole object, and right only if that was asked for.
    """
    answered = str(fields.get("ContentRange") or "")
    length = fields.get("ContentLength")
    if answered:
        match = _RANGE.fullmatch(answered.strip())
        if match is None or (int(match[1]), int(match[2])) != (offset_bytes, offset_bytes + length_bytes - 1):
            return f"its Content-Range is {answered[:80]!r}"
        if match[3] != "*" and int(match[3]) != size_bytes:
            return f"the object has {match[3]} bytes instead of {size_bytes}"
    elif length_bytes != size_bytes:
        return "it is the whole object instead of a range"
    if length is not None and (not _LENGTH.fullmatch(str(length)) or int(length) != length_bytes):
        return f"it announces {str(length)[:80]} bytes instead of {length_bytes}"
    return ""


class Body:
    """The body of an answer: ``begin`` it, read it, and ``end`` it in any case. Raises what sockets raise."""

    def __init__(self) -> None:
        self._raw: Any = None
        self._inner: Any = None
        self._receive: Callable[[memoryview], int] | None = None
        self._finished = False

    def begin(self, raw: Any) -> None:
        """The answer is there, with nothing read of its body: a Reply, or a response of urllib3's."""
        self._raw = raw
        if isinstance(raw, Reply):
            return
        # urllib3's own readinto goes through its buffer; http.client's reads from the socket into the view.
        inner: Any = getattr(raw, "_fp", None)
        self._inner = inner if hasattr(inner, "readinto") else raw

    def read_into(self, view: memoryview) -> int:
        """Fills ``view``; the count of bytes, less than asked for if the body ends early."""
        done_bytes = 0
        while done_bytes < len(view):
            count = (self._receive or self._read_first)(view[done_bytes:] if done_bytes else view)
            if not count:
                break
            done_bytes += count
        return done_bytes

    def finish(self) -> None:
        """Everything was read: a chunked body ends with a marker that has to be read before the next request.

        Raises LongBodyError where more comes.
        """
        if isinstance(self._raw, Reply):
            self._finished = self._raw.finish()
            return
        if self._receive is not None:
            self._inner.length = 0
        if self._inner.read(1):
            raise LongBodyError
        self._finished = True

    def end(self) -> None:
        """Gives the connection back if the body was read to its end, else closes it."""
        if self._raw is None:
            return
        if not self._finished:
            self._raw.close()
        self._raw.release_conn()

    def _read_first(self, view: memoryview) -> int:
        """What came with the headers, or more. From then on a body of known length is received from the socket itself.

        The layers above it cost more for 64 KiB (for 16 KiB, with TLS) than copying them does.
        """
        if isinstance(self._raw, Reply):
            count = self._raw.take_received(view)
            if not self._raw.received:
                self._receive = self._raw.receive
            return count or self._raw.receive(view)
        buffered = getattr(self._inner, "fp", None)
        if len(view) <= _BUFFERED_BYTES or self._inner.length is None or not isinstance(buffered, io.BufferedReader):
            return int(self._inner.readinto(view))
        count = buffered.readinto1(view)  # takes all that is buffered, or else what the socket has
        self._receive = receiver(buffered.raw._sock)  # noqa: SLF001
        return count
