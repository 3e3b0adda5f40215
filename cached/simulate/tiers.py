"""What an operator says of models, for a simulation: the host's catalog, or only names and tiers."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cached.errors import InvalidRequestError
from cached.simulate.setup import Standing
from cached.types import Tier

_HINT = 'write {"models": {"NAME": {"tier": "hot", "priority": 5}}}, or give a catalog'
_MAX_PRIORITY = 1000


def read_tiers(path: Path) -> dict[str, Standing]:
    """Tiers, priorities and pins by model, from JSON or, where the name says so, TOML.

    What else a catalog says is not read. Raises InvalidRequestError naming the file, the model and what is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{path} cannot be read: {error}", hint=_HINT, value=str(path)) from error
    models = data.get("models", data) if isinstance(data, dict) else None
    if not isinstance(models, dict):
        raise InvalidRequestError(f"{path} has no table of models", hint=_HINT, value=str(path))
    return {name: _standing(path, name, said) for name, said in models.items()}


def _standing(path: Path, name: str, said: Any) -> Standing:
    table: Mapping[str, Any] = {"tier": said} if isinstance(said, str) else said
    if not isinstance(table, dict):
        raise _wrong(path, name, f"{said!r} is neither a tier nor a table")
    tier, priority, pinned = table.get("tier", "auto"), table.get("priority", 0), table.get("pinned", False)
    if tier not in list(Tier):
        raise _wrong(path, name, f"tier {tier!r} is not one of {', '.join(Tier)}")
    if type(priority) is not int or not 0 <= priority <= _MAX_PRIORITY:
        raise _wrong(path, name, f"priority {priority!r} is not a whole number from 0 to {_MAX_PRIORITY}")
    if type(pinned) is not bool:
        raise _wrong(path, name, f"pinned {pinned!r} is neither true nor false")
    return Standing(Tier(tier), priority, pinned)


def _wrong(path: Path, name: str, what: str) -> InvalidRequestError:
    return InvalidRequestError(f"{path}: {name}: {what}", hint=_HINT, value=str(path))
