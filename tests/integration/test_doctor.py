"""`cached doctor` and `cached bench` at a real daemon, at real S3 servers, and ended in the middle."""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cached.cache.build import instance_of
from cached.cli.doctor import network
from cached.cli.doctor.checks import Finding
from cached.cli.doctor.daemons import flags, instances
from cached.cli.main import main
from tests.integration.harness import DaemonProcess, wait_for
from tests.servers import MotoS3, RcloneS3, make_certificate, s3_env
from tests.unit.host_support import Host

_RUN = "import sys; from cached.cli.main import main; sys.exit(main())"
_BUCKET = "doctor"


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _RUN, *arguments], env=_environment(folder, environment), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def _environment(folder: Path, more: dict[str, str]) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "COVERAGE_PROCESS_START") if name in os.environ}
    places = {"CACHED_DAEMON_STATE_DIR": str(folder / "bench"), "TMPDIR": str(folder), "HOME": str(folder)}
    return {**kept, **places, **more}


# A daemon.


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RcloneS3]:
    with RcloneS3(tmp_path_factory.mktemp("secure") / "buckets", tls=True) as server:
        server.seed(_BUCKET, "m/weights.bin", os.urandom(40 << 20))
        yield server


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, secure: RcloneS3) -> Iterator[DaemonProcess]:
    """Its credentials are in its environment alone."""
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "model").mkdir()
    (folder / "model/weights.bin").write_bytes(os.urandom(1 << 20))
    models = {
        "tiny": {"source": f"file://{folder}/model", "format": "all"},
        "far": {"source": f"s3://{_BUCKET}/m", "tier": "cold"},
        "farther": {"source": f"s3://{_BUCKET}/other", "tier": "cold"},
    }
    s3 = {"endpoint_url": secure.endpoint_url, "ca_bundle": secure.ca_bundle}
    with DaemonProcess(folder / "daemon", models=models, settings={"s3": s3}, environment=secure.env()) as process:
        yield process


def test_at_a_daemon_that_is_well_its_own_settings_and_credentials_are_looked_at(daemon, secure):
    secure_key = secure.env()["AWS_SECRET_ACCESS_KEY"]
    ran = run(daemon.folder, "--socket", str(daemon.socket), "doctor", "--quick", "--skip", "worker", "-o", "json")
    found: dict[str, list[dict[str, Any]]] = {}
    for item in json.loads(ran.stdout)["findings"]:
        found.setdefault(item["check"], []).append(item)
    # Without --config: it is on the daemon's command line.
    assert f"settings of {daemon.config_file}" in found["settings"][-1]["told"]
    assert found["catalog"][0]["told"] == f"{daemon.catalog_file} names 3 models"
    assert found["health"][0]["verdict"] == "ok"
    assert [item["verdict"] for item in found["sockets"]] == ["ok", "ok"]
    assert str(daemon.l2_dir) in found["l2"][0]["told"]
    told = [item["told"] for item in found["origins"]]
    assert any("(tiny): " in text and "may read it" in text for text in told), told
    assert any("(far and 1 more): list" in text and "credentials from the environment" in text for text in told), told
    assert secure_key not in ran.stdout
    assert found["memory"][0]["measured"]["budget_bytes"] == 512 << 20
    assert f"(pid {daemon.pid})" in found["limits"][0]["told"]


def test_its_segments_are_known_to_be_its(daemon, tmp_path):
    context = Host(tmp_path).context()
    context = type(context)(**{**_fields(context), "socket": str(daemon.socket), "proc": Path("/proc")})
    alive, _ = instances(context)
    assert daemon.stats().instance in alive
    assert flags(daemon.pid)["--config"] == str(daemon.config_file)


def _fields(context: Any) -> dict[str, Any]:
    return {name: getattr(context, name) for name in context.__slots__}


def test_calls_and_attaches_at_the_running_daemon_and_at_one_of_its_own(daemon, tmp_path):
    ran = run(daemon.folder, "--socket", str(daemon.socket), "pull", "tiny")
    assert ran.returncode == 0, ran.stderr
    arguments = ("bench", "--only", "call", "--only", "attach", "--size", "32MiB", "-o", "json")
    data = json.loads(run(daemon.folder, "--socket", str(daemon.socket), *arguments).stdout)
    assert [item["hop"] for item in data["hops"]] == ["call", "attach"]
    assert all("the running daemon (tiny)" in item["about"] and item["value"] > 0 for item in data["hops"])
    assert data["hardware"]["kernel"]
    own = json.loads(run(tmp_path, "--socket", str(tmp_path / "none.sock"), *arguments).stdout)
    assert all("a daemon of its own" in item["about"] and item["value"] > 0 for item in own["hops"])
    assert not list(Path("/dev/shm").glob("cached-bench-*"))


# Origins.


def origins(folder: Path, uri: str, **settings: str) -> list[Finding]:
    named = {name.replace("__", "."): value for name, value in settings.items()}
    return list(network.origins(Host(folder).context(named, sources=(uri,))))


def test_every_link_of_a_chain_is_looked_at(tmp_path):
    links = [f"file://{tmp_path}/near", f"file://{tmp_path}/far"]
    (tmp_path / "far").mkdir()
    catalog = tmp_path / "catalog.json"
    catalog.write_text(json.dumps({"models": {"m": {"origins": links}}}))
    found = list(network.origins(Host(tmp_path).context({"daemon.catalog": str(catalog)})))
    assert {finding.told.partition(" ")[0]: str(finding.verdict) for finding in found} == {
        links[0]: "problem", links[1]: "ok",
    }  # fmt: skip


def problem(found: Sequence[Finding]) -> Finding:
    (finding,) = [finding for finding in found if finding.verdict == "problem"]
    return finding


def test_a_bucket_that_can_be_read(secure, tmp_path):
    with s3_env(secure):
        found = origins(
            tmp_path, f"s3://{_BUCKET}/m", s3__endpoint_url=secure.endpoint_url, s3__ca_bundle=secure.ca_bundle
        )
    assert {finding.verdict for finding in found} == {"ok", "advice"}
    way, access = found[:2]
    assert "1 address, connects in" in way.told
    assert way.measured["certificate_days"] > 20
    assert "credentials from the environment (AWS_ACCESS_KEY_ID)" in access.told
    assert {"list_ms", "describe_ms", "read_ms", "skew_s"} <= set(access.measured)
    assert any("ignores If-Match" in finding.told for finding in found)
    assert any("first-seen" in finding.told for finding in found)
    shown = " ".join(finding.told + finding.mend for finding in found)
    assert not any(secret in shown for secret in secure.env().values() if len(secret) > 12 and "/" in secret)


@pytest.mark.parametrize(
    ("uri", "environment", "told", "mend"),
    [
        ("s3://doctor/m", {"AWS_SECRET_ACCESS_KEY": "wrong-wrong"}, "SignatureDoesNotMatch", "write the pair of keys"),
        ("s3://doctor/m", {"AWS_ACCESS_KEY_ID": "AKIAUNKNOWN"}, "InvalidAccessKeyId", "does not know the access key"),
        ("s3://doctor/m", {"AWS_ACCESS_KEY_ID": ""}, "no usable credentials", "AWS_ACCESS_KEY_ID and AWS_SECRET"),
        ("s3://nothing/m", {}, "there is no bucket 'nothing'", "bucket's right name"),
        ("s3://doctor/nothing/", {}, "there are no objects below", "aws s3 ls"),
    ],
)
def test_a_bucket_that_cannot_be_read_says_why(secure, tmp_path, uri, environment, told, mend):
    environment = dict(environment)
    if environment.get("AWS_ACCESS_KEY_ID") == "":
        environment["AWS_SECRET_ACCESS_KEY"] = ""
    with s3_env(secure, **environment):
        found = origins(tmp_path, uri, s3__endpoint_url=secure.endpoint_url, s3__ca_bundle=secure.ca_bundle)
    finding = problem(found)
    assert told in finding.told
    assert mend in finding.mend
    assert "wrong-wrong" not in finding.told


def test_certificates_that_are_not_trusted(secure, tmp_path):
    other, _ = make_certificate(tmp_path / "other")
    with s3_env(secure):
        by_itself = problem(origins(tmp_path, f"s3://{_BUCKET}/m", s3__endpoint_url=secure.endpoint_url))
        strange = problem(
            origins(tmp_path, f"s3://{_BUCKET}/m", s3__endpoint_url=secure.endpoint_url, s3__ca_bundle=str(other))
        )
        elsewhere = secure.endpoint_url.replace("127.0.0.1", "127.0.0.2")
        named = problem(
            origins(tmp_path, f"s3://{_BUCKET}/m", s3__endpoint_url=elsewhere, s3__ca_bundle=secure.ca_bundle)
        )
    assert "is signed by itself (localhost)" in by_itself.told
    assert "CACHED_S3_CA_BUNDLE=" in by_itself.mend
    assert str(other) in strange.told
    assert "does not take connections" in named.told or "is for other names: localhost, 127.0.0.1" in named.told


def test_servers_that_are_not_there(tmp_path, secure):
    with s3_env(secure):
        closed = problem(origins(tmp_path, "s3://doctor/m", s3__endpoint_url="http://127.0.0.1:1"))
        unknown = problem(origins(tmp_path, "s3://doctor/m", s3__endpoint_url="http://no-such-host.invalid"))
        plain = secure.endpoint_url.replace("https", "http")
        spoken = problem(origins(tmp_path, "s3://doctor/m", s3__endpoint_url=plain))
    assert "does not take connections on port 1 (Connection refused)" in closed.told
    assert "the name no-such-host.invalid is not known here" in unknown.told
    assert "https://" in spoken.mend
    assert problem(origins(tmp_path, "file:///no/such/folder")).told == "file:///no/such/folder: it is not there"


@pytest.mark.parametrize(
    "uri",
    ["http://host:99999/x", "https://[::1/m/", "file://[x/b", "file:///tmp/a%00b", f"file:///{'x' * 5000}"],
)
def test_a_source_that_cannot_be_one_does_not_hide_the_others(tmp_path: Path, uri: str) -> None:
    found = list(network.origins(Host(tmp_path).context({}, sources=(uri, tmp_path.as_uri()))))
    assert [finding.verdict for finding in found][-1] == "ok"
    assert found[0].verdict in {"problem", "not measured"}
    assert found[0].told


def test_checksums_conditions_and_a_proxy(moto_s3: MotoS3, tmp_path, monkeypatch):
    moto_s3.create_bucket(_BUCKET)
    moto_s3.put(_BUCKET, "m/a.safetensors", b"x" * 1000, ChecksumAlgorithm="SHA256")
    with s3_env(moto_s3):
        found = origins(tmp_path, f"s3://{_BUCKET}/m", s3__endpoint_url=moto_s3.endpoint_url)
        assert {finding.verdict for finding in found} == {"ok"}
        assert any("a.safetensors has sha256" in finding.told for finding in found)
        assert not any("If-Match" in finding.told for finding in found)
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("no_proxy", "")
        assert "its proxy http://127.0.0.1:1" in problem(
            origins(tmp_path, f"s3://{_BUCKET}/m", s3__endpoint_url=moto_s3.endpoint_url)
        ).told  # fmt: skip


class _OtherTime(BaseHTTPRequestHandler):
    """A store whose clock differs, and that refuses what is signed at another time."""

    ahead = dt.timedelta()

    def do_GET(self) -> None:
        text = b"<Error><Code>RequestTimeTooSkewed</Code><Message>too far off</Message></Error>"
        self.send_response_only(403)
        self.send_header("Date", format_datetime(dt.datetime.now(dt.UTC) + self.ahead, usegmt=True))
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(text)

    do_HEAD = do_GET  # noqa: N815 the server's name for it

    def log_message(self, *_arguments: object) -> None:
        """Quiet."""


@pytest.mark.parametrize(("minutes", "verdict"), [(-2, "advice"), (60, "problem")])
def test_a_clock_that_differs_from_the_stores(secure, tmp_path, monkeypatch, minutes, verdict):
    monkeypatch.setattr(_OtherTime, "ahead", dt.timedelta(minutes=minutes))
    with ThreadingHTTPServer(("127.0.0.1", 0), _OtherTime) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with s3_env(secure):
            found = origins(tmp_path, "s3://doctor/m", s3__endpoint_url=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    skew = next(finding for finding in found if "this clock is" in finding.told and "skew_s" in finding.measured)
    assert skew.verdict == verdict
    assert abs(skew.measured["skew_s"] + 60 * minutes) < 30
    assert "RequestTimeTooSkewed" in found[-1].told
    assert "timedatectl" in found[-1].mend


# The bench.


def test_an_origin_is_fetched_from_by_the_real_movers(secure, tmp_path):
    environment = secure.env() | {
        "CACHED_S3_ENDPOINT_URL": secure.endpoint_url, "CACHED_S3_CA_BUNDLE": secure.ca_bundle,
    }  # fmt: skip
    arguments = ("bench", "--only", "origin", "--size", "40MB", "--source", f"s3://{_BUCKET}/m", "-o", "json")
    ran = run(tmp_path, *arguments, **environment)
    (hop,) = json.loads(ran.stdout)["hops"]
    assert hop["value"] > 0, ran.stderr
    assert hop["cpu_s_per_gb"] > 0
    assert 0 < hop["more"]["size_bytes"] <= 40e6
    assert "processors serve and receive" in hop["expected"]


def test_hops_within_the_host(tmp_path):
    (tmp_path / "bench/l2").mkdir(parents=True)
    hops = ("memcpy", "crc64", "sha256", "shm-fresh", "shm-recycled", "l2-write", "l2-read")
    only = [word for hop in hops for word in ("--only", hop)]
    ran = run(tmp_path, "bench", "--quick", "--size", "32MiB", *only, "-o", "json")
    data = json.loads(ran.stdout)
    assert [item["hop"] for item in data["hops"]] == list(hops), ran.stderr
    for item in data["hops"]:
        assert item["outcome"] in {"as expected", "slower", "measured"}, item
        assert bool(item["reasons"]) is (item["outcome"] == "slower")
        assert item["value"] > 0
    assert not list((tmp_path / "bench/l2").iterdir())


def test_what_cannot_be_measured_says_why(tmp_path, capsys):
    def bench(*arguments: str) -> str:
        assert main(["--socket", str(tmp_path / "none.sock"), "bench", "--quick", *arguments]) == 0
        return capsys.readouterr().out

    table = bench("--only", "crc64", "--only", "origin")
    assert "no origin is known: give one with --source URI" in table
    assert "1 not measured" in table.splitlines()[-1]
    (hop,) = json.loads(bench("--only", "origin", "--source", "file:///no/such/folder", "-o", "json"))["hops"]
    assert (hop["outcome"], hop["value"]) == ("not measured", None)
    assert "/no/such/folder" in hop["note"]
    assert main(["bench", "--size", "1B"]) == 2


@pytest.mark.parametrize(
    ("hop", "number"),
    [("l2-read", signal.SIGINT), ("l2-read", signal.SIGTERM), ("origin", signal.SIGINT), ("attach", signal.SIGINT)],
)
def test_ended_in_the_middle_nothing_is_left(tmp_path, hop, number):
    place = tmp_path / "bench/l2"
    place.mkdir(parents=True)
    (tmp_path / "model").mkdir()
    if hop == "origin":
        with (tmp_path / "model/weights.bin").open("wb") as file:
            file.truncate(1 << 30)
    arguments = ["bench", "--only", hop, "--size", "512MiB", "--source", f"file://{tmp_path}/model"]
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN, "--socket", str(tmp_path / "none.sock"), *arguments],
        env=_environment(tmp_path, {}), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    marks = {
        "l2-read": lambda: list(place.glob(".cached-measure-*")),
        "origin": lambda: list(Path("/dev/shm").glob(f"cached.measure-{process.pid}.*")),
        "attach": lambda: list(Path("/dev/shm").glob(f"cached-bench-{process.pid}-*/run/cached.sock")),
    }
    (found, *_) = wait_for(marks[hop], f"the middle of {hop}")
    daemons = {instance_of(str(found.parent.parent / "state"))}
    process.send_signal(number)
    assert process.wait(60) in {130, 143}
    assert not list(place.iterdir())
    assert not list(Path("/dev/shm").glob(f"cached-bench-{process.pid}-*"))
    assert not list(Path("/dev/shm").glob(f"cached.measure-{process.pid}.*"))
    assert not [path for path in Path("/dev/shm").glob("cached.*") if path.name.split(".")[1] in daemons]
