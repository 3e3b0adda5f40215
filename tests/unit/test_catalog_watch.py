"""What keeps the engine's catalog that of the file: it outlives whatever a file brings about."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from cached import catalog_watch
from cached.cache.events import EventBus
from cached.cache.failures import Failures
from cached.catalog_file import Catalog
from cached.catalog_watch import CatalogWatch
from cached.clock import SystemClock
from cached.errors import CachedError
from cached.metrics import Metrics


class Engine:
    """As much of the engine as the watch needs."""

    def __init__(self) -> None:
        self.failures = Failures(EventBus(SystemClock()), Metrics(), SystemClock())
        self.names: list[str] = []
        self.told: list[str] = []
        self.bug: Exception | None = None

    def set_catalog(self, catalog: Catalog) -> None:
        if self.bug is not None:
            raise self.bug
        self.names = list(catalog.models)

    def tell(self, kind: str, *_message: str, **_fields: object) -> None:
        self.told.append(kind)


class Host:
    """A file, and what watches it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "catalog.json"
        self.engine = Engine()
        self.metric = Metrics().catalog
        self.watch = CatalogWatch(str(self.path), self.engine, self.metric)  # type: ignore[arg-type]

    def write(self, *names: str) -> None:
        models = ", ".join(f'"{name}": {{"source": "s3://b/{name}"}}' for name in names)
        self.path.write_text(f'{{"models": {{{models}}}}}')


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.write("a")
    return host


async def test_what_nobody_foresaw_is_told_and_the_mended_file_is_read(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    await host.watch.load()
    assert host.engine.names == ["a"]
    host.write("a", "b")
    host.engine.bug = ValueError("nobody foresaw this")
    await host.watch.load()
    assert host.watch.problem == "the catalog cannot be used: an internal error"
    assert host.engine.failures.degraded["catalog"] == host.watch.problem
    assert not host.watch.missing, "the one before is in use"
    assert host.metric.successful is False
    assert "nobody foresaw this" in capsys.readouterr().out

    host.engine.bug = None
    host.write("a", "b", "c")
    await host.watch.load()
    assert (host.engine.names, host.watch.problem, dict(host.engine.failures.degraded)) == (["a", "b", "c"], "", {})
    assert host.metric.successful


async def test_what_could_not_be_read_is_read_once_it_can_be_though_it_did_not_change(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Mock(wraps=host.engine.failures.report)
    monkeypatch.setattr(host.engine.failures, "report", report)
    with monkeypatch.context() as short:
        short.setattr(Path, "open", Mock(side_effect=OSError(errno.EMFILE, os.strerror(errno.EMFILE))))
        for _ in range(3):
            await host.watch.load()
    assert "Too many open files" in host.watch.problem
    assert [call.args[0] for call in report.call_args_list] == ["catalog.refused"], "once"
    await host.watch.load()
    assert (host.engine.names, host.watch.problem) == (["a"], "")


async def test_a_changed_file_with_the_same_mistake_is_told_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Mock(wraps=host.engine.failures.report)
    monkeypatch.setattr(host.engine.failures, "report", report)
    for text in ("{broken", "{broken "):
        host.path.write_text(text)
        for _ in range(2):
            await host.watch.load()
    assert len(report.call_args_list) == 2


async def test_reloading_goes_on_after_one_that_failed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_watch, "POLL_S", 0.01)
    calls: list[str] = []

    async def reload() -> None:
        calls.append("reload")
        raise (ValueError("nobody foresaw this") if len(calls) == 1 else CachedError("or this"))

    running = asyncio.create_task(host.watch.run(reload))
    for count in (1, 2, 3):
        host.watch.reload_soon()
        while len(calls) < count:
            await asyncio.sleep(0)
            assert not running.done()
    while not host.engine.told:
        await asyncio.sleep(0)
        assert not running.done()
    assert host.engine.told == ["catalog.loaded"], "and the file is looked at as before"
    running.cancel()
