"""Secrets stay where they are: nothing that a daemon says, shows, writes or starts holds one, whatever fails."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format
from opentelemetry.proto.trace.v1.trace_pb2 import Status

import cached_client
from cached.cli.main import main
from cached_client._proto import cached_pb2 as pb
from tests.http_servers import Hub
from tests.integration.harness import PAGES, DaemonProcess, wait_for
from tests.integration.support import MB, model_files
from tests.otlp import Collector
from tests.servers import RcloneS3

WRONG_KEY = "wrong0aws0secret0key00000000000000000000"
SESSION = "session0token0of0aws"
HUB_TOKEN = "hf_token0of0the0hub"
WEB_TOKEN = "token0of0a0web0server"
SAS = "sv=2022-11-02&sig=sas0signature0of0azure"
PROXY = "password0of0the0proxy"
TYPED = "password0typed0into0a0uri"
SIGNED = "signature0in0a0presigned0url"
MISPLACED = "secret0where0no0setting0is"
SECRETS = (WRONG_KEY, SESSION, HUB_TOKEN, WEB_TOKEN, "sas0signature0of0azure", PROXY, TYPED, SIGNED, MISPLACED)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def daemon(
    rclone_s3: RcloneS3, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DaemonProcess]:
    """One whose credentials are wrong, whose proxy is away, and whose web server wants a token."""
    folder = tmp_path_factory.mktemp("secrets")
    token_file = folder / "token"
    token_file.write_text(WEB_TOKEN)
    (folder / "good").mkdir()
    for path, data in model_files(MB).items():
        (folder / "good" / path).write_bytes(data)
    rclone_s3.create_bucket("secrets")
    with Hub() as hub, ExitStack() as stack:
        models = {
            "good": {"source": f"file://{folder}/good"},
            "aws": {"source": "s3://secrets/m", "origin": {"endpoint_url": rclone_s3.endpoint_url}},
            "hub": {"source": "hf://org/none", "origin": {"endpoint": hub.url}},
            "web": {"source": "https://127.0.0.1:9/m/", "origin": {"token_file": str(token_file)}},
            "proxied": {"source": "http://store.invalid/m/", "origin": {"files": ["config.json"]}},
            "azure": {"source": "az://container/m", "origin": {"endpoint": "http://127.0.0.1:9/account"}},
        }
        environment = {
            "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": WRONG_KEY, "AWS_SESSION_TOKEN": SESSION,
            "HF_TOKEN": HUB_TOKEN, "HF_ENDPOINT": hub.url, "AZURE_STORAGE_ACCOUNT_NAME": "account",
            "AZURE_STORAGE_SAS_KEY": SAS, "HTTP_PROXY": f"http://user:{PROXY}@127.0.0.1:9",
            "NO_PROXY": "127.0.0.1", "AWS_EC2_METADATA_DISABLED": "true", "OTEL_BSP_SCHEDULE_DELAY": "50",
        }  # fmt: skip
        settings = {
            "transfer": {"retry_budget_s": 0.5, "max_attempts": 2},
            "telemetry": {"otlp_endpoint": collector.endpoint},
        } | PAGES
        yield stack.enter_context(
            DaemonProcess(folder / "d", models=models, settings=settings, environment=environment)
        )


def asked(daemon: DaemonProcess) -> Iterator[str]:
    """What everything that can be pulled, and everything that cannot, is answered with."""
    with cached_client.connect(str(daemon.socket)) as cache:
        for ref, source in (
            ("good", ""), ("aws", ""), ("hub", ""), ("web", ""), ("proxied", ""), ("azure", ""),
            ("typed", f"s3://user:{TYPED}@bucket/m"),
            ("typed2", f"https://user:{TYPED}@127.0.0.1:9/m/"),
            ("signed", f"https://127.0.0.1:9/m.safetensors?X-Amz-Signature={SIGNED}&X-Amz-Credential={SIGNED}"),
            ("signed2", f"s3://bucket/m?X-Goog-Signature={SIGNED}"),
            (f"https://user:{TYPED}@127.0.0.1:9/typed3", ""),
            (f"https://127.0.0.1:9/signed3?sig={SIGNED}", ""),
        ):  # fmt: skip
            if ref == "good":
                yield repr(list(cache.pull(ref, timeout_s=60)))
                continue
            with pytest.raises(cached_client.CacheError) as caught:
                list(cache.pull(ref, source=source, timeout_s=60))
            yield f"{caught.value} {caught.value.fields} {caught.value.__cause__!r}"


def shown(daemon: DaemonProcess) -> Iterator[str]:
    """What every method tells, and every page."""
    with daemon.stub() as stub:
        for method in ("List", "ListLeases", "Stats", "Overview", "ListArtifacts"):
            yield str(json_format.MessageToDict(getattr(stub, method)(getattr(pb, f"{method}Request")())))
        for name in [model.name for model in stub.List(pb.ListRequest()).models]:
            yield str(json_format.MessageToDict(stub.Describe(pb.DescribeRequest(ref=name))))
        watch = stub.Watch(pb.WatchRequest(replay=True), timeout=2)
        try:
            for event in watch:
                yield str(json_format.MessageToDict(event))
        except grpc.RpcError:
            pass
    for path in ("/", "/metrics", "/healthz", "/readyz"):
        with urllib.request.urlopen(daemon.http + path) as answer:
            yield answer.read().decode()


def commands(
    daemon: DaemonProcess, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[str]:
    """What the command prints in the daemon's own environment, also of settings and a catalog that are wrong."""
    wrong = folder / "wrong.toml"
    wrong.write_text(f'[s3]\nendpoint_url = "http://user:{TYPED}@store"\nsecret_access_key = "{MISPLACED}"\n')
    catalog = folder / "wrong.json"
    entries = {
        "a": {"source": f"s3://user:{TYPED}@bucket/m"}, "b": {"source": f"ftp://user:{TYPED}@host/m"},
        "c": {"source": "s3://b/m", "origin": {"endpoint_url": f"http://user:{TYPED}@host", "secret_key": MISPLACED}},
    }  # fmt: skip
    catalog.write_text(json.dumps({"models": entries}))
    for name, value in (daemon.environment | {"CACHED_SOCKET": str(daemon.socket)}).items():
        monkeypatch.setenv(name, value)
    doctor = ("doctor", "--quick", "--skip", "worker", "--config", str(daemon.config_file))
    for arguments, code, more in (
        (("config", "show", "--config", str(daemon.config_file)), 0, {}),
        (("config", "show", "--config", str(wrong)), 1, {}),
        (("config", "show"), 1, {"CACHED_S3_SECRET_ACCESS_KEY": MISPLACED}),
        (("config", "show"), 1, {"CACHED_S3_ENDPOINT_URL": f"http://user:{TYPED}@store"}),
        (("catalog", "validate", str(catalog)), 1, {}),
        (doctor, 1, {}), ((*doctor, "-o", "json"), 1, {}),
        (("ls",), 0, {}), (("ps",), 0, {}), (("show", "aws"), 0, {}), (("stats",), 0, {}), (("health",), 0, {}),
        (("pull", "aws"), 1, {}), (("pull", "typed", "--source", f"s3://user:{TYPED}@bucket/m"), 2, {}),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            for name, value in more.items():
                patch.setenv(name, value)
            capsys.readouterr()
            assert main(arguments) == code, arguments
            printed = capsys.readouterr()
        yield printed.out + printed.err


def kept(daemon: DaemonProcess) -> Iterator[str]:
    """What it has written, and what the processes that it started are called."""
    for folder in (daemon.state_dir, daemon.l2_dir, daemon.socket.parent):
        for place, _, names in os.walk(folder):
            for path in (Path(place) / name for name in names):
                if path.is_file() and not path.is_symlink():
                    yield f"{path}: {path.read_bytes().decode('latin-1')}"
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                if daemon.pid in {int(process.name), int(parent)}:
                    yield (process / "cmdline").read_text() + (process / "comm").read_text()
            except OSError:
                continue


def failed_spans(collector: Collector) -> list[str]:
    """The errors of those that a collector was sent so far."""
    return [span.status.message for span in list(collector.spans) if span.status.code == Status.STATUS_CODE_ERROR]


def test_no_secret_is_in_anything_that_comes_out(
    daemon: DaemonProcess,
    collector: Collector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = list(asked(daemon))
    wait_for(lambda: daemon.log_events("load.failed"), "a pull to have failed")
    wait_for(lambda: any("signed3" in error for error in failed_spans(collector)), "the span of the last pull")
    for name, texts in (
        ("answers", told),
        ("methods and pages", list(shown(daemon))),
        ("files and processes", list(kept(daemon))),
        ("commands", list(commands(daemon, tmp_path, monkeypatch, capsys))),
        ("log", [daemon.log(all_starts=True)]),
        ("spans", [str(span) for span in list(collector.spans)]),
    ):
        assert texts
        for text in texts:
            found = [secret for secret in SECRETS if secret in text]
            assert not found, f"{found} in {name}: {text[:3000]}"


def test_what_was_tried_really_failed_for_want_of_the_right_secret(daemon: DaemonProcess) -> None:
    """Else the search above would have had nothing to find."""
    environment = Path(f"/proc/{daemon.pid}/environ").read_text()
    assert WRONG_KEY in environment
    assert PROXY in environment
    with cached_client.connect(str(daemon.socket)) as cache, pytest.raises(cached_client.OriginDeniedError):
        list(cache.pull("aws"))
