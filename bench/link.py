"""A network of limited bandwidth on one host: a relay of TCP whose connections share so many bytes a second.

``python -m bench.link HOST:PORT BYTES_PER_S`` prints the port that it listens on. Only what comes back from the server
is limited. Bytes stay in the kernel (splice), so the relay itself costs little.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Self

_PIECE_BYTES = 256 << 10
_BURST_S = 0.005


class Link:
    """A context manager: the relay as a process of its own, in front of ``http://HOST:PORT``."""

    def __init__(self, upstream_url: str, bytes_per_s: float) -> None:
        command = [sys.executable, "-m", "bench.link", upstream_url.removeprefix("http://"), str(bytes_per_s)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    @property
    def pid(self) -> int:
        """Of the relay."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()


class _Budget:
    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_s = 0.0

    def take(self, size_bytes: int) -> None:
        """Sleeps until so much may pass; whoever asks first goes first."""
        with self._lock:
            now_s = time.monotonic()
            self._free_s = max(self._free_s, now_s - _BURST_S) + size_bytes / self._bytes_per_s
            wait_s = self._free_s - now_s
        if wait_s > 0:
            time.sleep(wait_s)


def _pump(source: socket.socket, sink: socket.socket, budget: _Budget | None) -> None:
    outlet, inlet = os.pipe()
    try:
        fcntl.fcntl(inlet, fcntl.F_SETPIPE_SZ, 4 * _PIECE_BYTES)
        with suppress(OSError):  # either side went away
            while count := os.splice(source.fileno(), inlet, _PIECE_BYTES):
                if budget is not None:
                    budget.take(count)
                while count:
                    count -= os.splice(outlet, sink.fileno(), count)
    finally:
        os.close(outlet)
        os.close(inlet)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def main(upstream: str, bytes_per_s: float) -> None:
    """Relays until it is killed."""
    host, _, port = upstream.rpartition(":")
    budget = _Budget(bytes_per_s)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            near, _ = listener.accept()
            far = socket.create_connection((host, int(port)))
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_pump, args=(near, far, None), daemon=True).start()
            threading.Thread(target=_pump, args=(far, near, budget), daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
