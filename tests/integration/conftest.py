"""Fixtures of the tests of the whole: an S3 server, a proxy before it, and a daemon that knows them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.integration.hosts import remove_segments
from tests.integration.support import Site
from tests.servers import CountingProxy, MotoS3, RcloneS3, S3Server

_BUCKETS = itertools.count(1)


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report


@pytest.fixture(autouse=True)
def no_segments() -> Iterator[None]:
    """Nothing stays in shared memory of engines in the test's own process."""
    yield
    remove_segments()


@pytest.fixture
def site(request: pytest.FixtureRequest, tmp_path: Path, rclone_s3: RcloneS3) -> Iterator[Site]:
    """A site with rclone; see Site."""
    yield from _site(request, tmp_path, rclone_s3)


@pytest.fixture
def moto_site(request: pytest.FixtureRequest, tmp_path: Path, moto_s3: MotoS3) -> Iterator[Site]:
    """A site with moto: slow, but it knows checksums and versions; see Site."""
    yield from _site(request, tmp_path, moto_s3)


def _site(request: pytest.FixtureRequest, tmp_path: Path, server: S3Server) -> Iterator[Site]:
    bucket = f"site-{next(_BUCKETS)}"
    server.create_bucket(bucket)
    with CountingProxy(server.endpoint_url) as proxy:
        made = Site(tmp_path, server, proxy, bucket)
        try:
            yield made
        finally:
            # One that has failed is not told twice, and its objects stay to be looked at.
            failed = request.node.stash.get(_FAILED, False)
            made.check = made.check and not failed
            made.close()
            if isinstance(server, RcloneS3) and not failed:
                shutil.rmtree(server.folder / bucket)
