"""Reading a range of an origin in one piece."""

from __future__ import annotations

from cached.origins.base import Origin, OriginObject


def read_range(origin: Origin, item: OriginObject, offset_bytes: int, view: memoryview) -> None:
    """Fills ``view`` with the bytes from ``offset_bytes``."""
    with origin.open_range(item, offset_bytes, len(view)) as read_into:
        read_into(view)
