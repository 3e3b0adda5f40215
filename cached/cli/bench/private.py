"""A daemon for one measurement: a real one, with a socket, a state folder and one generated model of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import cached_client
from cached.cache.build import instance_of
from cached.cli.measure.scratch import FOLDER_PREFIX, undisturbed
from cached.levels.shm import SHM_FOLDER
from cached.units import MIB

MODEL = "bench"
_TENSORS = 32
_START_S = 30.0
_STOP_S = 10.0
_SERVE = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: it ends with whoever measures
if os.getppid() != int(sys.argv.pop(1)):
    sys.exit(1)
from cached.cli.main import main
sys.exit(main())
"""


class PrivateDaemon:
    """A context manager: within it the model is whole in L1; after it daemon, folder and segments are gone.

    Raises OSError with the daemon's last words where it does not start, and CacheError where the load fails.
    """

    def __init__(self, size_bytes: int, environment: Mapping[str, str]) -> None:
        self._size_bytes = size_bytes
        self._environment = {name: value for name, value in environment.items() if not name.startswith("CACHED_")}
        self._folder = Path()
        self._process: subprocess.Popen[bytes] | None = None
        self.socket = ""

    def __enter__(self) -> Self:
        # Short enough for a socket's path, whatever TMPDIR says; and the model's source is to be no disk.
        self._folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", dir=SHM_FOLDER))
        try:
            self._start()
            self._load()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def _start(self) -> None:
        self.socket = str(self._folder / "run/cached.sock")
        sections: dict[str, dict[str, object]] = {
            "daemon": {
                "socket": self.socket, "state_dir": str(self._folder / "state"), "drain_timeout_s": 0.0,
                "restart_grace_s": 0.0, "log_level": "warning", "catalog": str(self._catalog()),
            },
            "l1": {"capacity": f"{self._size_bytes + 64 * MIB}B", "pool_bytes": "0B", "memory_reserve_bytes": "0B"},
            "l2": {"enabled": False},
            "http": {"listen": ""},
        }  # fmt: skip
        config = self._folder / "config.toml"
        config.write_text(
            "\n".join(
                f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
                for name, values in sections.items()
            )
        )
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, and code from here
                [sys.executable, "-P", "-c", _SERVE, str(os.getpid()), "serve", "--config", str(config)],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for whoever measures
            )

    def _catalog(self) -> Path:
        """Names the model, a file of random bytes, as checkpoints are. It goes once it is loaded."""
        path = self._folder / "catalog.json"
        path.write_text(json.dumps({"models": {MODEL: {"source": f"file://{self._folder}/model"}}}))
        (self._folder / "model").mkdir()
        write_checkpoint(self._folder / "model/model.safetensors", self._size_bytes)
        return path

    def _load(self) -> None:
        deadline_s = time.monotonic() + _START_S
        with cached_client.connect(self.socket) as cache:
            while True:
                if self._process is not None and self._process.poll() is not None:
                    raise OSError(f"the daemon did not start: {self._last_words()}")
                with contextlib.suppress(cached_client.CacheError):
                    cache.wait_ready(1.0)
                    break
                if time.monotonic() > deadline_s:
                    raise OSError(f"the daemon was not ready within {_START_S:g} s: {self._last_words()}")
            with cache.attach(MODEL) as model:
                model.wait()
        shutil.rmtree(self._folder / "model")

    def _last_words(self) -> str:
        lines = (self._folder / "log").read_text(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else "it said nothing"

    def _end(self) -> None:
        """To its end even if another Ctrl-C comes: it takes seconds at most."""
        with undisturbed():
            self._stop()
            prefix = f"cached.{instance_of(str(self._folder / 'state'))}."
            for path in Path(SHM_FOLDER).glob(f"{prefix}*"):
                path.unlink(missing_ok=True)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def write_checkpoint(path: Path, size_bytes: int) -> None:
    """A safetensors file of about this size: equal tensors of bfloat16 with random bytes."""
    each_bytes = max(2, size_bytes // _TENSORS // 2 * 2)
    header: dict[str, object] = {}
    for index in range(_TENSORS):
        offsets = [index * each_bytes, (index + 1) * each_bytes]
        header[f"layer.{index}.weight"] = {"dtype": "BF16", "shape": [each_bytes // 2], "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = os.urandom(min(each_bytes, MIB))
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(_TENSORS):
            left = each_bytes
            while left:
                left -= file.write(block[: min(left, len(block))])
