"""What origins that are reached over HTTP have in common: their options, from text, and their URLs."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NoReturn

from cached.errors import InvalidRequestError

_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

NET_OPTIONS = ("ca_bundle", "connect_timeout_s", "read_timeout_s")


@dataclass(frozen=True, slots=True)
class NetOptions:
    """How to connect. ``ca_bundle``: file of certificate authorities to trust; empty: the system's."""

    ca_bundle: str = ""
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 20.0


def net_options(given: Mapping[str, str]) -> NetOptions:
    """Of NET_OPTIONS, what is given. Raises InvalidRequestError."""
    bundle = given.get("ca_bundle", "")
    if bundle and not os.path.isfile(bundle):
        refuse("ca_bundle", f"there is no CA bundle {bundle!r}", "name the PEM file of the certificate authority")
    return NetOptions(
        ca_bundle=bundle,
        connect_timeout_s=seconds("connect_timeout_s", given.get("connect_timeout_s") or "5"),
        read_timeout_s=seconds("read_timeout_s", given.get("read_timeout_s") or "20"),
    )


def check_known(scheme: str, given: Mapping[str, str], known: Collection[str]) -> None:
    """Raises InvalidRequestError for an option that origins of this scheme have not."""
    for name in given:
        if name not in known:
            refuse(name, f"{scheme}:// origins have no option {name!r}", f"they have: {', '.join(sorted(known))}")


def truth(name: str, text: str) -> bool:
    """``true`` or ``false``. Raises InvalidRequestError."""
    if text.lower() not in _TRUTH:
        refuse(name, f"{name} cannot be {text!r}", "write true or false")
    return _TRUTH[text.lower()]


def seconds(name: str, text: str) -> float:
    """A duration in seconds. Raises InvalidRequestError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.05 <= value <= 86400:
        refuse(name, f"{name} cannot be {text!r}", "write a number greater than 0")
    return value


def refuse(name: str, message: str, hint: str) -> NoReturn:
    """Raises InvalidRequestError for an option."""
    raise InvalidRequestError(message, hint=hint, value=name)


def bearer(token: str) -> str:
    """The Authorization header for a token; empty for none."""
    return f"Bearer {token}" if token else ""
