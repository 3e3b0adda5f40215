"""The service manager's notification protocol (sd_notify(3)), as far as the daemon uses it. Standard library only.

Without a notification socket every call does nothing. A manager that went away is not an error: the message is dropped.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

_PATIENCE_S = 1.0
"""How long a state waits for a manager that is busy: without READY=1 it would give the daemon up."""


class Notifier:
    """Sends states to the service manager. Never raises for an unreachable one, and waits a second for it at most."""

    def __init__(self, address: str = "", watchdog_s: float | None = None) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s = watchdog_s
        """Interval at which the manager expects ``watchdog``; None when it does not watch."""

    @property
    def is_heard(self) -> bool:
        """Whether there is a manager to tell anything."""
        return bool(self._address)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Notifier:
        """From NOTIFY_SOCKET, and WATCHDOG_USEC if WATCHDOG_PID is absent or this process."""
        watchdog_s = None
        microseconds = environment.get("WATCHDOG_USEC", "")
        if microseconds.isdigit() and environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            watchdog_s = int(microseconds) / 1e6
        return cls(environment.get("NOTIFY_SOCKET", ""), watchdog_s)

    def ready(self, status: str = "") -> None:
        """Start-up, or a reload, is finished."""
        self._send("READY=1", *_status(status), patience_s=_PATIENCE_S)

    def reloading(self) -> None:
        """A reload began; ``ready`` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", patience_s=_PATIENCE_S)

    def stopping(self, status: str = "") -> None:
        """The daemon begins to drain."""
        self._send("STOPPING=1", *_status(status), patience_s=_PATIENCE_S)

    def status(self, text: str) -> None:
        """One line for ``systemctl status``. Dropped where the manager is busy, as all that comes again."""
        self._send(*_status(text))

    def extend_timeout(self, timeout_s: float) -> None:
        """Asks for this much more time to start or stop, from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(timeout_s * 1e6)}")

    def watchdog(self) -> None:
        """The loop lives."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str, patience_s: float = 0.0) -> None:
        if not self._address or not lines:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(patience_s)
            try:
                sock.sendto("\n".join(lines).encode(errors="backslashreplace"), self._address)
            except OSError:
                return  # the manager is gone or its queue is full; there is nobody to tell


def _status(text: str) -> tuple[str, ...]:
    # systemd drops a message with a NUL in it, and READY=1 with it.
    return (f"STATUS={' '.join(text.split())}".replace("\0", "\\0"),) if text else ()
