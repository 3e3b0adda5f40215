"""`cached push`: what is refused before anything is sent, whose settings count, and how it is ended."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cached.cli.main import main
from cached.convert.checkpoint import files_below, plan_conversion
from cached.errors import InvalidRequestError
from cached.origins.base import OriginSpec


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "part/a.json", "pytorch_model.bin"):
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.mark.parametrize(("link", "says"), [("no/such", "leads to no file"), ("{}/elsewhere", "leads to a folder")])
def test_links_that_are_not_followed_are_refused_by_name(model, tmp_path, capfd, link, says):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.json").write_text("{}")
    (model / "part/linked").symlink_to(link.format(tmp_path))
    assert main(["push", str(model), f"file://{tmp_path}/target"]) == 2
    told = capfd.readouterr().err
    assert "part/linked" in told
    assert says in told
    assert not (tmp_path / "target").exists()
    with pytest.raises(InvalidRequestError, match=f"part/linked in .*{says}"):
        plan_conversion(model)


def test_links_to_files_are_followed_and_hidden_ones_left_out(model, tmp_path, capfd):
    (tmp_path / "blob").write_bytes(b"tokens")
    (model / "tokenizer.json").symlink_to(tmp_path / "blob")
    (model / ".hidden").symlink_to("no/such")
    (model / ".folder").symlink_to(tmp_path)
    assert main(["push", str(model), f"file://{tmp_path}/target"]) == 0
    assert "5 files" in capfd.readouterr().err
    assert (tmp_path / "target/tokenizer.json").read_bytes() == b"tokens"
    assert not (tmp_path / "target/tokenizer.json").is_symlink()


def test_a_folder_that_cannot_be_read_is_not_left_out(model, monkeypatch):
    scandir = os.scandir

    def denied(path: str) -> object:
        if os.fspath(path).endswith("part"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InvalidRequestError, match="part cannot be read: Permission denied"):
        list(files_below(model))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("notauri",), "no origin serves 'notauri'"),
        (("ftp://b/x",), "no origin serves 'ftp://b/x'"),
        (("file:///t/x", "--region", "eu-1", "--anonymous"), "--region, --anonymous: of s3:// alone"),
        (("az://container/x", "--endpoint-url", "http://h"), "--endpoint-url: of s3:// alone, and az:// was given"),
    ],
)
def test_uris_and_flags_that_do_not_fit_are_refused(model, capfd, words, says):
    assert main(["push", str(model), *words]) == 2
    assert says in capfd.readouterr().err


def test_a_setting_that_is_wrong_is_called_by_the_flag_of_this_command(model, capfd):
    assert main(["push", str(model), "s3://b/x", "--endpoint-url", "foo"]) == 1
    told = capfd.readouterr().err
    assert "flag --endpoint-url" in told
    assert "--s3-" not in told


def test_the_settings_of_s3_count_however_its_scheme_is_written(model, monkeypatch):
    opened: list[OriginSpec] = []

    def open_writable(spec: OriginSpec) -> None:
        opened.append(spec)
        raise InvalidRequestError("far enough")

    monkeypatch.setattr("cached.cli.push.open_writable", open_writable)
    monkeypatch.setenv("CACHED_S3_REGION", "eu-1")
    assert main(["push", str(model), "S3://b/x", "--endpoint-url", "http://127.0.0.1:9"]) == 2
    (spec,) = opened
    assert spec.options["endpoint_url"] == "http://127.0.0.1:9"
    assert spec.options["region"] == "eu-1"


class SlowS3(ThreadingHTTPServer):
    """Takes what is sent in minutes. ``seen``: what it was asked for; ``on_put`` answers, or None: it is slow."""

    daemon_threads = True

    def __init__(self, on_put: Callable[[str], int | None]) -> None:
        super().__init__(("127.0.0.1", 0), SlowS3Requests)
        self.seen: list[tuple[str, str]] = []
        self.on_put = on_put

    def handle_error(self, *_: object) -> None:
        """Connections are meant to end."""


class SlowS3Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: SlowS3

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer(200, b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>")

    def do_DELETE(self) -> None:
        self.answer(204)

    def do_PUT(self) -> None:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        left = int(self.headers.get("Content-Length") or 0)
        status = self.server.on_put(self.path)
        while left and (data := self.rfile.read(min(left, 100_000))):
            left -= len(data)
            time.sleep(0.5 if status is None else 0)
        self.answer(status or 200)

    def answer(self, status: int, body: bytes = b"") -> None:
        self.server.seen.append((self.command, self.path))
        self.send_response(status)
        self.send_header("ETag", '"x"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def slow_s3(on_put: Callable[[str], int | None]) -> Iterator[SlowS3]:
    with SlowS3(on_put) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield server
        finally:
            server.shutdown()


def pushed(model: Path, server: SlowS3, monkeypatch: pytest.MonkeyPatch) -> int:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    return main(["push", str(model), "s3://bucket/m", "--endpoint-url", f"http://127.0.0.1:{server.server_port}"])


def test_an_interrupt_ends_what_is_being_sent_and_leaves_no_parts(tmp_path, monkeypatch, capfd):
    (tmp_path / "large.safetensors").write_bytes(bytes(33 << 20))
    (tmp_path / "small.safetensors").write_bytes(bytes(9 << 20))
    interrupted_s: list[float] = []

    def on_put(path: str) -> int | None:
        if "uploadId" in path and not interrupted_s:
            interrupted_s.append(time.monotonic())
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        return None

    with slow_s3(on_put) as server:
        assert pushed(tmp_path, server, monkeypatch) == 130
        assert time.monotonic() - interrupted_s[0] < 9
        assert ("DELETE", "/bucket/m/large.safetensors?uploadId=u") in server.seen
    assert capfd.readouterr().err.endswith("interrupted\n")


def test_a_file_that_fails_ends_the_others(model, monkeypatch, capfd):
    for name in ("a.json", "b.json"):
        (model / name).write_bytes(bytes(9 << 20))
    (model / "config.json").write_bytes(bytes(1000))
    began_s = time.monotonic()
    with slow_s3(lambda path: 403 if "config" in path else None) as server:
        assert pushed(model, server, monkeypatch) == 1
    assert time.monotonic() - began_s < 9
    assert "config.json" in capfd.readouterr().err
