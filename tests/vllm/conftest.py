"""What the tests within vLLM share: a site with the model, and the table at the end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import _FAILED, pytest_runtest_makereport
from tests.integration.support import Site
from tests.servers import CountingProxy, RcloneS3
from tests.vllm.models import NEW_TOKENS, PROMPTS, adapter, llama
from tests.vllm.support import PYTHON, Comparison, environment

__all__ = ["pytest_runtest_makereport"]  # the same hook here

_BUCKETS = itertools.count(1)
_COMPARISON = Comparison()


@pytest.fixture
def comparison() -> Comparison:
    return _COMPARISON


@pytest.fixture
def site(request: pytest.FixtureRequest, tmp_path: Path, rclone_s3: RcloneS3) -> Iterator[Site]:
    """A daemon that knows ``small-llama``, ``other-llama`` and the adapter ``small-lora``; nothing of them is local."""
    assert PYTHON.exists(), f"no environment with vLLM at {PYTHON}: `make test-vllm` builds it"
    bucket = f"vllm-{next(_BUCKETS)}"
    rclone_s3.create_bucket(bucket)
    with CountingProxy(rclone_s3.endpoint_url) as proxy:
        made = Site(tmp_path, rclone_s3, proxy, bucket)
        made.settings = {"l1": {"capacity": "1GiB"}, "transfer": {"retry_budget_s": 600.0}}
        made.settings["artifacts"] = {"save": True, "destination": made.uri("artifacts")}
        made.add("small-llama", llama())
        made.add("other-llama", llama(1))
        made.add("small-lora", adapter(), base="small-llama")
        try:
            made.start()
            yield made
        finally:
            made.check = not request.node.stash.get(_FAILED, False)
            made.close()


@pytest.fixture
def worker(site: Site) -> dict[str, str]:
    """The environment of a worker of the site."""
    return environment(site.daemon.socket)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _COMPARISON.rows:
        return
    count = f"{len(PROMPTS)} prompts of {NEW_TOKENS} tokens"
    terminalreporter.section(f"greedy tokens beside transformers, {count}")
    width = max(len(row[0]) for row in _COMPARISON.rows)
    for what, same, tokens, note in sorted(_COMPARISON.rows):
        first = " ".join(f"{token:>4}" for token in tokens[:6])
        terminalreporter.write_line(
            f"{what:<{width}}  {'equal' if same else 'DIFFERENT':<9}  {first} …  {note}".rstrip()
        )
