"""vLLM's processes, as a test holds them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.integration.harness import wait_for
from tests.integration.support import ROOT
from tests.vllm.models import NEW_TOKENS, PROMPTS

PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
"""Of the environment with vLLM and the client; the daemon and the tests run in another one."""

START_S = 400.0
_KEPT = ("PATH", "HOME", "LANG", "TMPDIR")


def environment(socket_path: Path | None = None, **more: str) -> dict[str, str]:
    """Of a worker: no credentials, and no other way to weights than the daemon's socket."""
    base = {name: os.environ[name] for name in _KEPT if name in os.environ}
    base["PATH"] = f"{PYTHON.parent}:{base['PATH']}"
    base |= {
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    if socket_path is not None:
        base["CACHED_SOCKET"] = str(socket_path)
    return base | more


@dataclass
class VllmLog:
    """What vLLM printed."""

    path: Path

    def text(self) -> str:
        return self.path.read_text(errors="replace") if self.path.exists() else ""

    def loads(self) -> list[dict[str, str]]:
        """The lines that the plugin wrote of its loads."""
        lines = re.findall(r"cached: loaded (.*)", self.text())
        return [dict(re.findall(r"(\w+)=(\S+)", line)) for line in lines]


class Process:
    """A process of vLLM, in a session of its own; leaving the context ends all of it."""

    def __init__(self, command: list[str], folder: Path, env: dict[str, str], **options: Any) -> None:
        self.log = VllmLog(folder / "vllm.log")
        with self.log.path.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=folder, start_new_session=True, **options
            )

    def check(self) -> None:
        """Fails if it has ended."""
        if self._process.poll() is not None:
            raise AssertionError(f"vLLM ended with {self._process.returncode}:\n{self.log.text()[-6000:]}")

    def wait(self) -> int:
        return self._process.wait(START_S)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Engine(Process):
    """The offline engine; `ready` waits for it, so that a test may do something while it starts."""

    def __init__(self, folder: Path, env: dict[str, str], **options: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        reading, writing = os.pipe()
        command = [str(PYTHON), str(Path(__file__).with_name("engine_process.py")), str(writing), json.dumps(options)]
        super().__init__(command, folder, env, stdin=subprocess.PIPE, pass_fds=(writing,), text=True)
        os.close(writing)
        self._answers = os.fdopen(reading)

    def ready(self) -> Self:
        assert self._receive() == "ready"
        return self

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def tokens(self) -> tuple[tuple[int, ...], ...]:
        return tuple(map(tuple, self.ask("generate", prompts=PROMPTS, tokens=NEW_TOKENS)))

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        super().close()
        self._answers.close()

    def _receive(self) -> Any:
        line = self._answers.readline()
        if not line:
            self._process.wait(60)
            self.check()
        return json.loads(line)


class Server(Process):
    """``vllm serve``, begun by ``before`` (such as ``cached run``); leaving the context ends it."""

    def __init__(
        self, folder: Path, env: dict[str, str], model: str, *options: str, before: tuple[str, ...] = ()
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [*before, str(PYTHON.parent / "vllm"), "serve", model, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--enforce-eager", "--max-model-len", "128", "--dtype", "float32", *options]
        super().__init__(command, folder, env)

    def ready(self) -> Self:
        wait_for(self._answers, "vLLM to answer", START_S)
        return self

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and answer."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                text = answer.read().decode()
                status = answer.status
        except urllib.error.HTTPError as error:
            text, status = error.read().decode(), error.code
        with contextlib.suppress(ValueError):
            return status, json.loads(text)
        return status, text

    def tokens(self, model: str) -> tuple[tuple[int, ...], ...]:
        """Of one completion for each prompt."""
        found = []
        for prompt in PROMPTS:
            body = {
                "model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True,
            }  # fmt: skip
            status, answer = self.post("/v1/completions", body)
            assert status == 200, answer
            found.append(tuple(answer["choices"][0]["token_ids"]))
        return tuple(found)

    def _answers(self) -> bool:
        self.check()
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
            return True
        return False


def mapped_bytes(pid: int) -> dict[str, int]:
    """Rss, Pss and Anonymous, in bytes, of all segments that a process maps."""
    sums = dict.fromkeys(("Rss", "Pss", "Anonymous"), 0)
    ours = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, value = line.partition(":")
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = "/dev/shm/cached." in line
        elif ours and key in sums:
            sums[key] += int(value.split()[0]) * 1024
    return sums


@dataclass
class Comparison:
    """The greedy tokens of each way to load, for a table at the end of the run."""

    rows: list[tuple[str, bool, tuple[int, ...], str]] = field(default_factory=list)

    def same(
        self, what: str, tokens: tuple[tuple[int, ...], ...], wanted: tuple[tuple[int, ...], ...], note: str = ""
    ) -> None:
        """Notes them, and fails if they differ."""
        self.rows.append((what, tokens == wanted, tokens[0], note))
        assert tokens == wanted, what
