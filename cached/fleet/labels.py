"""Which labels a node should have for the models on it. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MAX_MODELS = 100
"""A node object is written to etcd whole, with every heartbeat of its status: it must stay small."""

_MAX_NAME = 63
_HASH_DIGITS = 8
_REVISION_DIGITS = 12
_ALLOWED = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Ready:
    """A model that is whole on this host; ``in_l1``: in memory. Higher ``priority`` is labelled first."""

    name: str
    revision: str
    in_l1: bool
    priority: int = 0


def label_name(model: str) -> str:
    """The model's name as a label's: unchanged where it may be one, else shortened and cleaned, with a hash of it."""
    if len(model) <= _MAX_NAME and _ALLOWED.fullmatch(model):
        return model
    digest = hashlib.sha256(model.encode()).hexdigest()[:_HASH_DIGITS]
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", model)[: _MAX_NAME - _HASH_DIGITS - 1].strip("-._")
    return f"{kept}-{digest}" if kept else digest


def labels_of(prefix: str, models: Iterable[Ready]) -> dict[str, str]:
    """``PREFIX/NAME`` → revision for each model, and ``l1.PREFIX/NAME`` besides for those in memory.

    At most MAX_MODELS: those in memory first, then by priority and name.
    """
    chosen = sorted(models, key=lambda model: (not model.in_l1, -model.priority, model.name))[:MAX_MODELS]
    labels = {}
    for model in chosen:
        revision = model.revision[:_REVISION_DIGITS]
        labels[f"{prefix}/{label_name(model.name)}"] = revision
        if model.in_l1:
            labels[f"l1.{prefix}/{label_name(model.name)}"] = revision
    return labels


def ours(prefix: str, labels: Mapping[str, str]) -> dict[str, str]:
    """Those that we may touch."""
    return {key: value for key, value in labels.items() if key.startswith((f"{prefix}/", f"l1.{prefix}/"))}


def changes(have: Mapping[str, str], want: Mapping[str, str]) -> dict[str, str | None]:
    """What to patch: new and other values, and None for what has to go."""
    gone: dict[str, str | None] = dict.fromkeys(have.keys() - want.keys())
    return gone | {key: value for key, value in want.items() if have.get(key) != value}
