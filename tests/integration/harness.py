"""A real daemon for tests: ``cached serve`` as a process of its own, with its own socket, state folder and segments."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from cached.cache.build import instance_of
from cached_client._proto import cached_pb2 as pb
from cached_client._proto import cached_pb2_grpc

T = TypeVar("T")
DEADLINE_S = 60.0
"""How long anything is waited for; only a broken daemon takes this long."""
PAGES = {"http": {"listen": "127.0.0.1:0"}}
"""Settings of a daemon with HTTP pages; without them it starts sooner."""
_POLL_S = 0.02
_KEPT_ENVIRONMENT = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH", "COVERAGE_PROCESS_START")
_SERVE = "import sys; from cached.cli.main import main; sys.exit(main())"


def wait_for(condition: Callable[[], T], what: str, timeout_s: float = DEADLINE_S) -> T:
    """The condition's first true value; AssertionError when the deadline passes before there is one."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(_POLL_S)
    return value


def segments_of(state_dir: str, folder: Path = Path("/dev/shm")) -> list[Path]:
    """Shared-memory objects of the instance that has its state there, pool and ingests included."""
    instance = instance_of(state_dir)
    return sorted(path for path in folder.iterdir() if instance in path.name)


class DaemonProcess:
    """Use as a context manager: leaving it ends the daemon, whatever state it is in, and removes its segments.

    ``settings`` are sections of the configuration file and go over the defaults here; ``models`` and
    ``tenants`` are the catalog's. ``environment`` is added to a minimal one, without any AWS settings of whoever
    runs the tests.
    """

    def __init__(
        self,
        folder: Path,
        *,
        models: Mapping[str, Any] | None = None,
        tenants: Mapping[str, Any] | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = (sys.executable, "-c", _SERVE),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.socket = folder / "run" / "cached.sock"
        self.descriptor_socket = folder / "run" / "cached-fd.sock"
        self.models_dir = folder / "run" / "models"
        self.state_dir = folder / "state"
        self.l2_dir = folder / "l2"
        self.l2_dirs = [self.l2_dir]
        self.catalog_file = folder / "catalog.json"
        self.config_file = folder / "config.toml"
        self.log_file = folder / "daemon.log"
        self.environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        self.environment |= environment or {}
        self._command = tuple(command)
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self.tenants: Mapping[str, Any] = tenants or {}
        self.write_catalog(models or {})
        self.write_config(settings or {})

    # What it is given.

    def write_catalog(self, models: Mapping[str, Any]) -> None:
        """Replaces the catalog in one step; a running daemon notices by itself."""
        fresh = self.catalog_file.with_suffix(".new")
        fresh.write_text(json.dumps({"models": models, "tenants": self.tenants}))
        fresh.replace(self.catalog_file)

    def write_config(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes the configuration for the next start."""
        sections: dict[str, dict[str, Any]] = {
            "daemon": {
                "socket": str(self.socket),
                "state_dir": str(self.state_dir),
                "models_dir": str(self.models_dir),
                "catalog": str(self.catalog_file),
                "log_format": "json",
                "log_level": "debug",
                "drain_timeout_s": 5.0,
                "restart_grace_s": 0.0,
            },
            "l1": {"capacity": "512MiB", "memory_reserve_bytes": "0B", "pool_bytes": "0B"},
            "l2": {"path": str(self.l2_dir), "capacity": "2GiB"},
            "transfer": {"movers": 1, "retry_budget_s": 20.0},
            "http": {"listen": ""},
        }
        for name, values in settings.items():
            sections.setdefault(name, {}).update(values)
        lines = [
            f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
            for name, values in sections.items()
        ]
        self.config_file.write_text("\n".join(lines))

    # Its life.

    @property
    def pid(self) -> int:
        """Of the daemon that runs now."""
        return self._running().pid

    @property
    def is_running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self, *, wait: bool = True) -> Self:
        """Starts it and, unless told otherwise, waits until it serves. AssertionError with its log when it does not."""
        assert not self.is_running
        self._log_start = self.log_file.stat().st_size if self.log_file.exists() else 0
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, "serve", "--config", str(self.config_file)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Until recovery is done and everything is answered."""
        self.wait_event("daemon.ready")

    def terminate(self) -> int:
        """SIGTERM, and the exit status once it has drained."""
        return self.signal_and_wait(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: no byte of Python runs after it."""
        self.signal_and_wait(signal.SIGKILL)

    def restart(self, *, kill: bool = False) -> Self:
        """Ends it, in order or by SIGKILL, and starts it again with the same configuration and state."""
        if kill:
            self.kill()
        else:
            assert self.terminate() == 0, self.log()
        return self.start()

    def signal(self, number: int) -> None:
        """Sends a signal to the daemon only, not to its movers."""
        os.kill(self.pid, number)

    def signal_and_wait(self, number: int) -> int:
        """Sends a signal and waits for the end."""
        process = self._running()
        process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """The exit status of a daemon that ends by itself."""
        process = self._process
        assert process is not None
        try:
            return process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the daemon did not end; its log:\n{self.log()}") from None

    def close(self) -> None:
        """Ends whatever is left of it, and removes its segments; idempotent."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        for segment in self.segments():
            with contextlib.suppress(FileNotFoundError):
                segment.unlink()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()  # nobody leaves what was not entered
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            sys.stderr.write(f"--- log of {self.folder.name} ---\n{self.log()[-20000:]}\n")
        self.close()

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        return self._process

    # What it says and holds.

    def log(self, *, all_starts: bool = False) -> str:
        """Its log since it was last started, or since ever."""
        if not self.log_file.exists():
            return ""
        data = self.log_file.read_bytes()
        return data[0 if all_starts else self._log_start :].decode("utf-8", "replace")

    def log_events(self, event: str = "", *, all_starts: bool = False) -> list[dict[str, Any]]:
        """The log's events, all or those of one kind; lines that are not JSON are left out."""
        found: list[dict[str, Any]] = []
        for line in self.log(all_starts=all_starts).splitlines():
            with contextlib.suppress(ValueError):
                item = json.loads(line)
                if isinstance(item, dict) and event in ("", item.get("event")):
                    found.append(item)
        return found

    def wait_event(self, event: str, matches: Callable[[dict[str, Any]], bool] = lambda _: True) -> dict[str, Any]:
        """The first event of a kind since the start that ``matches``; fails at once if the daemon ends before it."""

        def found() -> dict[str, Any] | None:
            hit = next((item for item in self.log_events(event) if matches(item)), None)
            if hit is None and not self.is_running:
                raise AssertionError(f"the daemon ended before {event}; its log:\n{self.log()}")
            return hit

        item = wait_for(found, f"{event} in the log")
        assert item is not None
        return item

    @property
    def http(self) -> str:
        """URL of its HTTP pages, without a trailing slash; ``PAGES`` must be among its settings."""
        return f"http://{self.wait_event('daemon.ready')['http']}"

    @contextlib.contextmanager
    def stub(self) -> Iterator[cached_pb2_grpc.CacheServiceStub[grpc.Channel]]:
        """The cache service over the socket, blocking."""
        with grpc.insecure_channel(f"unix:{self.socket}") as channel:
            yield cached_pb2_grpc.CacheServiceStub(channel)

    def stats(self) -> pb.StatsResponse:
        """What Stats answers."""
        with self.stub() as stub:
            return stub.Stats(pb.StatsRequest())

    def segments(self) -> list[Path]:
        """Shared-memory objects of this daemon's instance, pool and ingests included."""
        return segments_of(str(self.state_dir))
