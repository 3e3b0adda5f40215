"""The fault tests use the same site as the integration tests."""

from __future__ import annotations

from tests.integration.conftest import pytest_runtest_makereport, site

__all__ = ["pytest_runtest_makereport", "site"]
