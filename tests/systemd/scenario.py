"""Runs within the container, as root, with the daemon's own Python: an administrator's day with the service."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

CACHED = "/opt/cached/bin/cached"
CONFIG = Path("/etc/cached/config.toml")
DEADLINE_S = 60


def sh(command: str, code: int = 0) -> str:
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    print(f"$ {command}\n{done.stdout}{done.stderr}", flush=True)
    assert done.returncode == code, f"{command}: {done.returncode}, not {code}"
    return done.stdout + done.stderr


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}; {show('StatusText')}"
        time.sleep(0.1)


def show(key: str) -> str:
    return subprocess.run(
        ["systemctl", "show", "cached", "--value", "-p", key], capture_output=True, text=True
    ).stdout.strip()


def configure(**settings: str) -> None:
    """Edits the installed example, as people do."""
    text = CONFIG.read_text()
    for key, value in settings.items():
        text, count = re.subn(rf"(?m)^#?{key} = .*$", f'{key} = "{value}"', text, count=1)  # l1.capacity is the first
        assert count == 1, key
    CONFIG.write_text(text)


def listed() -> str:
    (line,) = re.findall(r"(?m)^m +ready .*$", sh(f"{CACHED} ls"))
    return line


def install() -> None:
    sh(f"{CACHED} install-service --l1-mount 400MiB")
    configure(catalog="/etc/cached/catalog.json", capacity="300MiB", memory_reserve_bytes="0B", pool_bytes="0B")
    Path("/etc/cached/catalog.json").write_text('{"models": {"m": {"source": "file:///srv/m"}}}')
    said = sh(f"{CACHED} install-service --l1-mount 400MiB --enable")
    assert "kept, it was edited: /etc/cached/config.toml" in said
    assert "nothing to do" in sh(f"{CACHED} install-service --l1-mount 400MiB --enable")
    assert show("ActiveState") == "active"
    assert show("StatusText").startswith("L1 0/300 MiB, L2 0/")


def use_it_within_the_sandbox() -> None:
    sh(f"{CACHED} pull m")
    wait_for(lambda: show("StatusText").startswith("L1 57.2/300 MiB"), "the pulled model in the status")
    assert list(Path("/dev/cached").glob("cached.*.blob.*"))
    assert not list(Path("/dev/shm").glob("cached.*")), "L1 is in its own mount"
    assert "huge=advise" in sh("findmnt --noheadings --output OPTIONS /dev/cached")
    assert Path("/run/cached/models/m/model.safetensors").stat().st_size == 60_000_000
    assert "1 lease" in sh(f"{CACHED} run m -- sh -c 'sleep 2; systemctl show cached -p StatusText'")
    pid = show("MainPID")
    status = Path(f"/proc/{pid}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    assert "CapEff:\t0000000000000000" in status
    inside = f"nsenter --target {pid} --mount "
    for folder in ("/dev/shm", "/dev/cached"):
        sh(inside + f"touch {folder}/probe")
        sh(inside + f"rm {folder}/probe")
    for path in ("/etc/probe", "/usr/probe", "/srv/m/probe"):
        sh(inside + f"touch {path}", code=1)
    assert sh(inside + "ls -A /root /home").split() == ["/home:", "/root:"]


def every_way_of_the_bytes_within_it() -> None:
    """Disk to memory, O_DIRECT where the file system has it, and a name that is resolved for an origin by HTTP."""
    sh(f"{CACHED} evict m --level l1")
    sh(f"{CACHED} pull m --level l1")
    assert listed().count("57.2 MiB") == 3
    assert re.search(r'cached_transfer_bytes_total{hop="l2_l1"} +60,000,0', sh(f"{CACHED} stats"))
    server = subprocess.Popen([sys.executable, "-m", "http.server", "--directory", "/srv/web", "8000"])
    try:
        sh("curl --silent --fail --retry 20 --retry-connrefused --output /dev/null http://localhost:8000/SHA256SUMS")
        assert "9.5 MiB in " in sh(f"{CACHED} pull web --source http://localhost:8000/")
    finally:
        server.kill()
        server.wait()
    sh(f"{CACHED} rm web")


def reload_it() -> None:
    configure(capacity="lots")
    sh("systemctl reload cached")
    wait_for(lambda: "the new settings are refused" in show("StatusText"), "the refusal in the status")
    assert show("ActiveState") == "active"
    configure(capacity="250MiB")
    sh("systemctl reload cached")
    wait_for(lambda: show("StatusText").startswith("L1 57.2/250 MiB"), "the new budget in the status")


def restart_it() -> None:
    socket_folder = os.stat("/run/cached").st_ino
    for words in (["restart cached"], ["stop cached", "start cached"]):
        for word in words:
            sh(f"systemctl {word}")
        wait_for(lambda: show("StatusText").startswith("L1 57.2/250 MiB"), "L1 to be adopted")
        assert re.search(r"cached_adopted_bytes_total +60,000,062", sh(f"{CACHED} stats"))
        assert os.stat("/run/cached").st_ino == socket_folder, "containers that mount it find the next daemon"


def put_l2_on_another_drive() -> None:
    """As the documents say; what is in memory is copied there by itself."""
    sh("install -d -o cached -g cached -m 0700 /srv/l2")
    drop_in = Path("/etc/systemd/system/cached.service.d/l2.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Unit]\nRequiresMountsFor=/srv/l2\n[Service]\nReadWritePaths=/srv/l2\n")
    Path("/etc/default/cached").write_text("CACHED_L2_PATH=/srv/l2\n")
    sh("systemctl daemon-reload")
    sh("systemctl restart cached")
    wait_for(lambda: len(list(Path("/srv/l2/blobs").glob("*/*"))) == 3, "the copies in the new L2")


def hang_it() -> None:
    """Stopped, the loop cannot report: the watchdog must end it, and the next daemon must have everything."""
    drop_in = Path("/run/systemd/system/cached.service.d/watchdog.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nWatchdogSec=3\n")
    sh("systemctl daemon-reload")
    sh("systemctl restart cached")
    os.kill(int(show("MainPID")), signal.SIGSTOP)
    wait_for(lambda: show("NRestarts") == "1" and show("ActiveState") == "active", "a new daemon")
    log = sh("journalctl --unit cached --no-pager --output cat")
    assert "Watchdog timeout (limit 3s)!" in log
    assert "asyncio/base_events.py" in log, "where the loop was"
    wait_for(lambda: show("StatusText").startswith("L1 57.2/250 MiB"), "L1 to be adopted")
    assert listed().count("57.2 MiB") == 3  # its size, at L1 and at L2


def fail_to_start_it() -> None:
    configure(capacity="lots")
    sh("systemctl restart cached", code=1)
    wait_for(lambda: show("ActiveState") == "failed", "the manager to give up")
    assert "l1.capacity = 'lots'" in sh("journalctl --unit cached --no-pager --output cat --lines 20")
    print("status:", show("StatusText"))
    configure(capacity="250MiB")
    sh("systemctl reset-failed cached")
    sh("systemctl start cached")


def uninstall() -> None:
    sh(f"{CACHED} uninstall-service")
    sh("systemctl status cached", code=4)
    assert list(Path("/var/lib/cached/l2/blobs").glob("*/*")), "what was cached stays"


DAY = (
    install,
    use_it_within_the_sandbox,
    every_way_of_the_bytes_within_it,
    reload_it,
    restart_it,
    put_l2_on_another_drive,
    hang_it,
    fail_to_start_it,
    uninstall,
)
for step in DAY:
    print(f"=== {step.__name__}", flush=True)
    step()
print("=== done", flush=True)
