"""What the service manager hears: a socket like its own, and a real daemon within a part of the unit's sandbox."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.harness import PAGES, wait_for
from tests.integration.support import MB, Site, model_files
from tests.integration.test_restart import HELD, SIZE, WEIGHTS, range_of

States = dict[str, str]


class ServiceManager:
    """The receiving end of sd_notify(3)."""

    def __init__(self, address: Path) -> None:
        self.address = address
        self.heard: list[States] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(address))

    def receive(self, timeout_s: float = 60) -> States:
        """The next message; TimeoutError if there is none."""
        self._socket.settimeout(timeout_s)
        lines = self._socket.recv(65536).decode().split("\n")
        self.heard.append(dict(line.split("=", 1) for line in lines))
        return self.heard[-1]

    def hear(self, matches: Callable[[States], object]) -> States:
        """The next message that matches; the others are in ``heard``."""
        while not matches(message := self.receive()):
            pass
        return message

    def status(self, pattern: str) -> str:
        """The next status in which the pattern is found."""
        return self.hear(lambda message: re.search(pattern, message.get("STATUS", "")))["STATUS"]

    def forget(self) -> None:
        """Drops all that was sent until now."""
        self._socket.setblocking(False)
        while True:
            try:
                self._socket.recv(65536)
            except BlockingIOError:
                return

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(site: Site, tmp_path: Path) -> Iterator[ServiceManager]:
    """Listens; the site's daemon will know of it, and is run as a service."""
    made = ServiceManager(tmp_path / "notify")
    os.mkfifo(tmp_path / "hold")
    site.settings |= PAGES
    site.started_by(sys.executable, "-m", "tests.integration.service_process")
    site.daemon.environment |= {
        "NOTIFY_SOCKET": str(made.address), "WATCHDOG_USEC": "500000", "HOLD": str(tmp_path / "hold"),
    }  # fmt: skip
    yield made
    made.close()


def test_start_reload_pull_and_drain(site: Site, manager: ServiceManager) -> None:
    site.add("quick", model_files(4 * MB, seed=2))
    site.add("slow", model_files(SIZE))
    held = site.hold("slow/" + WEIGHTS, range=range_of(HELD))
    daemon = site.daemon.start(wait=False)

    ready = manager.hear(lambda message: "READY" in message)
    assert ready["STATUS"] == "L1 0/512 MiB, L2 0/2.0 GiB, no leases"
    before = manager.heard[:-1]
    assert [message["STATUS"] for message in before if "STATUS" in message] == [
        "starting: reading what an earlier daemon left"
    ]
    assert any("EXTEND_TIMEOUT_USEC" in message for message in before)

    with site.attach("quick") as model:
        model.wait(60)
        manager.status(r"^L1 3\.\d/512 MiB, L2 .*, 1 lease")
    manager.status("no leases")

    daemon.signal(signal.SIGHUP)
    reloading = manager.hear(lambda message: "RELOADING" in message)
    assert int(reloading["MONOTONIC_USEC"]) > 0
    assert manager.hear(lambda message: "READY" in message)["STATUS"].startswith("L1 ")
    good = daemon.config_file.read_text()
    catalog = daemon.catalog_file.read_text()
    daemon.config_file.write_text(good.replace('"512MiB"', '"lots"'))
    daemon.catalog_file.write_text("{broken")
    daemon.signal(signal.SIGHUP)
    manager.hear(lambda message: "RELOADING" in message)
    refused = manager.hear(lambda message: "READY" in message)["STATUS"]
    assert "the new settings are refused, the old ones stay: " in refused
    assert "l1.capacity = 'lots'" in refused
    assert ", the catalog cannot be used: " in refused
    assert refused.endswith("L1 3.8/512 MiB, L2 0.0/2.0 GiB, no leases"), refused
    daemon.wait_event("config.refused")
    daemon.config_file.write_text(good)
    daemon.catalog_file.write_text(catalog)
    daemon.signal(signal.SIGHUP)
    manager.hear(lambda message: "RELOADING" in message)
    assert manager.hear(lambda message: "READY" in message)["STATUS"].startswith("L1 ")

    site.begin("slow")
    assert held.reached.wait(60)
    manager.status(r"no leases, pulling slow [1-9]\d %$")

    manager.forget()
    daemon.signal(signal.SIGTERM)
    stopping = manager.hear(lambda message: "STOPPING" in message)
    assert re.fullmatch(r"draining: pulling slow [1-9]\d %, 5 s left", stopping["STATUS"])
    manager.hear(lambda message: "EXTEND_TIMEOUT_USEC" in message)
    manager.status(r"slow \d+ %, [1-4] s left$")
    held.release()
    assert daemon.wait() == 0
    assert daemon.log_events("load.finished")[-1]["model"] == "slow", "what was waited for is there"


def test_an_idle_daemon_tells_nothing_but_that_it_lives(site: Site, manager: ServiceManager) -> None:
    site.start()
    manager.hear(lambda message: "READY" in message)
    for _ in range(8):  # two seconds
        assert manager.receive() == {"WATCHDOG": "1"}


def test_a_loop_that_is_held_up_is_silent_and_tells_where(site: Site, manager: ServiceManager) -> None:
    site.add("m", model_files(4 * MB))
    fifo = manager.address.with_name("hold")
    daemon = site.start()
    site.pull("m")
    manager.hear(lambda message: "WATCHDOG" in message)
    daemon.signal(signal.SIGUSR2)
    with fifo.open("wb"):  # open once the handler has opened it: the loop is held up
        manager.forget()
        with pytest.raises(TimeoutError):
            manager.receive(2.0)
        assert "State:\tS" in Path(f"/proc/{daemon.pid}/status").read_text()  # waiting, not stopped
    manager.hear(lambda message: message == {"WATCHDOG": "1"})

    daemon.signal(signal.SIGUSR2)
    with fifo.open("wb"):
        assert daemon.signal_and_wait(signal.SIGABRT) == -signal.SIGABRT  # what the watchdog sends
    assert "in hold_the_loop" in daemon.log()
    site.proxy.clear()
    site.start()
    assert site.check_served("m").from_level == "l1", "L1 is adopted, as after SIGKILL"
    assert not site.proxy.requests()


def test_an_origin_that_hangs_holds_up_no_sign_of_life(site: Site, manager: ServiceManager) -> None:
    site.add("m", model_files(4 * MB))
    site.add("here", model_files(MB, seed=2))
    daemon = site.start()
    site.pull("here")
    held = site.hold("m/" + WEIGHTS, times=-1)
    site.begin("m")
    assert held.reached.wait(60)
    manager.forget()
    for _ in range(4):
        manager.hear(lambda message: "WATCHDOG" in message)
    for page in ("healthz", "readyz"):
        with urllib.request.urlopen(f"{daemon.http}/{page}", timeout=60) as answer:
            assert answer.status == 200
    site.check_served("here")
    assert site.describe("m").summary.state != "ready", "it hangs all the time"
    site.proxy.heal()
    wait_for(lambda: site.summary("m").state == "ready", "the pull to end")


def test_a_start_that_fails_says_why(site: Site, manager: ServiceManager) -> None:
    site.check = False
    state = site.daemon.state_dir
    state.parent.mkdir(exist_ok=True)
    state.write_text("")
    daemon = site.daemon.start(wait=False)
    assert re.match(r"failed: .*state", manager.status("failed"))
    assert daemon.wait() == 1
