"""The hot set: what is always in L1, up to a budget."""

from __future__ import annotations

from collections.abc import Mapping

from cached.errors import NoRoomError
from cached.level import Level
from cached.units import format_size

_NAMED = 5


def check_hot(hot: Mapping[str, int], name: str, size_bytes: int, budget_bytes: int) -> None:
    """Whether one more model may be hot. ``hot``: bytes of those that are, scheduled ones included.

    Raises NoRoomError, naming those that have the budget, if not. A model that is hot already is not counted twice.
    """
    others = {other: taken for other, taken in hot.items() if other != name}
    taken_bytes = sum(others.values())
    if taken_bytes + size_bytes <= budget_bytes:
        return
    largest = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{other} ({format_size(taken)})" for other, taken in largest[:_NAMED]]
    if len(largest) > _NAMED:
        named.append(f"{len(largest) - _NAMED} more")
    beside = f" beside {', '.join(named)}" if named else ""
    never = size_bytes > budget_bytes
    raise NoRoomError(
        f"{name} ({format_size(size_bytes)}) does not fit into the {format_size(budget_bytes)} for hot models: "
        f"{format_size(max(0, budget_bytes - taken_bytes))} are left{beside}",
        hint=f"give hot models at least {format_size(taken_bytes + size_bytes)}"
        + ("" if never else ", or make another one warm"),
        level=Level.L1,
        needed_bytes=size_bytes,
        available_bytes=max(0, budget_bytes - taken_bytes),
        capacity_bytes=budget_bytes,
        holders=", ".join(f"{other} ({format_size(taken)})" for other, taken in largest),
        fits="never" if never else "later",
    )
