"""Signed catalogs and a daemon that runs: the old one stays when the new one is not signed as it should be."""

from __future__ import annotations

import json
import shutil
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from cached.signatures import generate_key, sign
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import PAGES, DaemonProcess, wait_for


def keys(folder: Path, name: str) -> tuple[str, str]:
    private, public, _ = generate_key()
    (folder / name).write_bytes(private)
    (folder / name).chmod(0o600)
    (folder / f"{name}.pub").write_bytes(public)
    return str(folder / name), str(folder / f"{name}.pub")


def catalog(*names: str) -> bytes:
    return json.dumps({"models": {name: {"source": f"file:///nowhere/{name}"} for name in names}}).encode()


def deliver(daemon: DaemonProcess, data: bytes, *signers: str) -> None:
    """The signature first, so that a daemon that looks in between refuses the pair, and looks again."""
    beside = Path(f"{daemon.catalog_file}.sig")
    beside.unlink(missing_ok=True)
    if signers:
        beside.write_text(sign(data, signers))
    fresh = daemon.catalog_file.with_suffix(".new")
    fresh.write_bytes(data)
    fresh.replace(daemon.catalog_file)
    look(daemon)


def look(daemon: DaemonProcess) -> None:
    """It would by itself, within two seconds."""
    if daemon.is_running:
        daemon.signal(signal.SIGHUP)


def names(daemon: DaemonProcess) -> set[str]:
    with daemon.stub() as stub:
        return {model.name for model in stub.List(pb.ListRequest()).models if model.source}


def degraded(daemon: DaemonProcess) -> str:
    return "\n".join(daemon.stats().degraded)


def metric(daemon: DaemonProcess, line: str) -> bool:
    with urllib.request.urlopen(daemon.http + "/metrics", timeout=20) as answer:
        return f"\n{line}\n" in answer.read().decode()


def test_a_running_daemon_takes_only_what_is_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (old, old_public), (new, new_public) = keys(tmp_path, "old"), keys(tmp_path, "new")
    trusted = str(tmp_path / "trusted.pub")
    shutil.copy(old_public, trusted)
    settings: dict[str, Any] = {"catalog": {"public_keys": [trusted]}} | PAGES
    daemon = DaemonProcess(tmp_path / "d", settings=settings)
    deliver(daemon, catalog("a"), old)
    with daemon:
        loaded = daemon.wait_event("catalog.loaded")
        assert loaded["signed_by"]
        assert names(daemon) == {"a"}
        first = Path(f"{daemon.catalog_file}.sig").read_text()

        deliver(daemon, catalog("b"))
        wait_for(lambda: "cannot read the catalog's signature" in degraded(daemon), "health to say so")
        assert names(daemon) == {"a"}
        assert daemon.log_events("catalog.refused")[-1]["kept_old"] is True
        assert metric(daemon, "cached_catalog_last_reload_successful 0.0")
        assert metric(daemon, 'cached_degraded{reason="catalog"} 1.0')

        deliver(daemon, catalog("c"), new)
        wait_for(lambda: "not with any of catalog.public_keys" in degraded(daemon), "the other key to be refused")
        deliver(daemon, catalog("d"), old)
        daemon.catalog_file.write_bytes(catalog("e"))
        look(daemon)
        wait_for(lambda: "changed or exchanged" in degraded(daemon), "the exchanged catalog to be refused")
        assert names(daemon) <= {"a", "d"}

        # Another key takes the old one's place: first both sign, then the hosts trust the new one, then it signs alone.
        later_s = time.time() + 60
        monkeypatch.setattr(time, "time", lambda: later_s)  # in this process: the daemon has its own clock
        deliver(daemon, catalog("f"), old, new)
        wait_for(lambda: names(daemon) >= {"f"}, "what both signed")
        assert not degraded(daemon)
        shutil.copy(new_public, trusted)
        deliver(daemon, catalog("g"), new)
        wait_for(lambda: names(daemon) >= {"g"}, "what the new one signed")

        # The first catalog again, signed by the old key: also after a restart, and then there is none.
        daemon.terminate()
        shutil.copy(old_public, trusted)
        Path(f"{daemon.catalog_file}.sig").write_text(first)
        daemon.catalog_file.write_bytes(catalog("a"))
        daemon.start()
        refused = daemon.wait_event("catalog.refused")
        assert "that was taken" in refused["error"]
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(daemon.http + "/readyz", timeout=20)
        with raised.value as answer:
            assert "the catalog is not loaded" in answer.read().decode()
