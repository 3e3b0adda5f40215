"""One look at the daemon, as the status page and `cached top` show it: its values, and the words for them."""

from __future__ import annotations

from cached.overview.values import Holding, LevelUse, Limits, Move, MoveKind, MovePhase, Overview, Problem

__all__ = ["Holding", "LevelUse", "Limits", "Move", "MoveKind", "MovePhase", "Overview", "Problem"]
