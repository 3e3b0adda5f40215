"""The origin ``https://host/folder/`` (or ``http://``) with a list of its files, or ``https://host/path/one.file``."""

from __future__ import annotations

from cached.origins.http.origin import HttpOrigin

__all__ = ["HttpOrigin"]
