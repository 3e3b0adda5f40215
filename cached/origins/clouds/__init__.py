"""The origins ``gs://bucket/prefix`` (Google Cloud Storage) and ``az://container/prefix`` (Azure Blob Storage)."""

from __future__ import annotations

from cached.origins.clouds.origin import CloudOrigin

__all__ = ["CloudOrigin"]
