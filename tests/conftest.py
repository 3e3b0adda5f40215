"""What holds for every test: nothing of the developer's own environment leaks in, and nothing reaches the network."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import structlog
import uvloop

pytest_plugins = ["tests.cloud_servers", "tests.fault.plugin", "tests.servers"]

# Read by the daemon, by boto3 and by Hugging Face's libraries. Removed before any test module is imported, so that
# servers started by module- and session-scoped fixtures do not inherit them either.
_PREFIXES = ("CACHED_", "AWS_", "BOTO_", "HF_", "HUGGINGFACE_", "RCLONE_", "AZURE_", "GOOGLE_")
_FIXED = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "HF_HUB_OFFLINE": "1",
    "NO_PROXY": "localhost,127.0.0.1,::1",
    "no_proxy": "localhost,127.0.0.1,::1",
    "TOKENIZERS_PARALLELISM": "false",
}


def pytest_configure(config: pytest.Config) -> None:
    for name in list(os.environ):
        if name.startswith(_PREFIXES):
            del os.environ[name]
    os.environ.update(_FIXED)
    # Two busy cores make any deadline flaky, and no test asserts on the wall clock.
    # No judgement by the clock: not of an example's run (deadline), nor of its making (too_slow).
    hypothesis.settings.register_profile(
        "project", deadline=None, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("project")


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The daemon's loop, which is stricter than asyncio's own with whoever writes to what is closed."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """Commands that are run in this process set up logging for all of it; the next test finds it as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    if root.handlers == handlers and root.level == level:
        return
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("cached").setLevel(logging.NOTSET)
    logging.captureWarnings(False)
    structlog.reset_defaults()
