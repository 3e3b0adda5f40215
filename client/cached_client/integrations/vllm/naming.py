"""From the directory that vLLM was given to the model's name in the cache. Standard library only."""

from __future__ import annotations

import os
import re

from cached_client.errors import InvalidRequestError

STAGED_MARK = ".cached-model"
"""The file of a staged folder that names the revision it was made of."""

SCHEME = "cached://"

_VIEWS = ".views"  # of the daemon's directory view: NAME is a link to .views/NAME@REVISION
_PINNED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,127})@([0-9a-f]{4,64})")


def pinned_ref(path: str) -> str:
    """``NAME@REVISION`` if ``path`` says which: ``cached://REF``, a directory of the view, or a staged one; else empty.

    A ``cached://`` reference is as it was written, so it may be without a revision.
    """
    if path.startswith(SCHEME):
        return path.removeprefix(SCHEME)
    folder = os.path.realpath(path)
    above, last = os.path.split(folder)
    if os.path.basename(above) == _VIEWS and _PINNED.fullmatch(last):
        return last
    try:
        with open(os.path.join(folder, STAGED_MARK), encoding="utf-8") as file:
            text = file.read(256).strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return text if _PINNED.fullmatch(text) else ""


def name_of(ref: str) -> str:
    """The name in ``NAME`` or ``NAME@REVISION``."""
    return ref.partition("@")[0]


def choose_ref(path: str, configured: str) -> str:
    """What to attach for a model at ``path`` where the options name ``configured`` (which may be empty).

    The directory counts, for it pins the revision whose configuration vLLM has read. Raises InvalidRequestError if
    there is no name, or if the two name different models.
    """
    pinned = pinned_ref(path)
    if not pinned and not configured:
        raise InvalidRequestError(
            f"--load-format cached does not know which model of the cache {path!r} is",
            hint='give --model the output of `cached path NAME`, or --model-loader-extra-config \'{"model": "NAME"}\'',
            value=path,
        )
    if not pinned or not configured:
        return pinned or configured
    same = pinned.startswith(configured) if "@" in configured else name_of(pinned) == configured
    if not same:
        raise InvalidRequestError(
            f"{path!r} is {pinned} of the cache, but --model-loader-extra-config names the model {configured!r}",
            hint="leave `model` out, or give --model the directory of that model",
            value=configured,
        )
    return pinned
