"""Reads ``model.safetensors.index.json``: which weight file has which tensor. The daemon uses it too."""

from __future__ import annotations

import json

from cached_client.errors import FormatError
from cached_client.patterns import INDEX_PATH


def parse_weight_map(content: bytes) -> dict[str, str]:
    """The file of each tensor. Raises FormatError for anything else than an index."""
    try:
        weight_map = json.loads(content)["weight_map"]
        if set(map(type, weight_map.values())) <= {str}:
            return dict(weight_map)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise FormatError(
        f"{INDEX_PATH} has no weight_map of tensor names to files",
        hint="the file is damaged at its origin; without it, every *.safetensors at the top of the model is read",
        path=INDEX_PATH,
    )


def files_named_by(content: bytes) -> set[str]:
    """The weight files of an index. Raises FormatError."""
    return set(parse_weight_map(content).values())
