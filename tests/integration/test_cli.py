from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.integration.harness import DaemonProcess, wait_for

SHARD = b"\x08\0\0\0\0\0\0\0{}      "
CODE = "import sys; from cached.cli.main import main; sys.exit(main())"


@pytest.fixture
def daemon(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "tiny"}')
    (source / "model.safetensors").write_bytes(SHARD)
    models = {"tiny": {"source": f"file://{source}"}, "gone": {"source": f"file://{tmp_path}/gone"}}
    with DaemonProcess(tmp_path / "daemon", models=models) as daemon:
        daemon.wait_event("catalog.loaded")
        yield daemon


def command(daemon, *words):
    return [sys.executable, "-c", CODE, "--socket", str(daemon.socket), *words]


def cached(daemon, *words, **options):
    return subprocess.run(command(daemon, *words), capture_output=True, text=True, timeout=120, **options)


def test_a_model_comes_is_used_and_goes(daemon):
    assert cached(daemon, "path", "tiny").returncode == 3
    pulled = cached(daemon, "pull", "tiny")
    assert pulled.returncode == 0, pulled.stderr
    assert "from the origin, checked by" in pulled.stdout
    assert "there already" in cached(daemon, "pull", "tiny").stdout
    place = cached(daemon, "path", "tiny").stdout.strip()
    with open(f"{place}/model.safetensors", "rb") as file:
        assert file.read() == SHARD
    assert cached(daemon, "verify").stdout.endswith("no damage\n")
    assert json.loads(cached(daemon, "evict", "tiny", "--level", "l1", "-o", "json").stdout)["l2_freed_bytes"] == 0
    assert "from disk" in cached(daemon, "pull", "tiny").stdout
    assert cached(daemon, "rm", "tiny").returncode == 0
    assert cached(daemon, "path", "tiny").returncode == 3
    assert cached(daemon, "show", "nothing").returncode == 3
    assert cached(daemon, "pull", "gone").returncode == 3
    assert cached(daemon, "pull", "unheard").returncode == 3


def test_run_holds_a_lease_while_the_command_runs(daemon, tmp_path):
    code = "import os, sys; print(os.listdir(sys.argv[1]), os.environ['CACHED_MODEL_PATH'] == sys.argv[1]); input()"
    words = command(daemon, "run", "tiny", "--", sys.executable, "-c", code, "{path}")
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        told = process.stdout.readline() if process.stdout else ""
        assert "model.safetensors" in told
        assert told.endswith("True\n")
        (lease,) = json.loads(cached(daemon, "ps", "-o", "json").stdout)
        assert (lease["name"], lease["client_pid"], lease["complete"]) == ("tiny", process.pid, True)
        assert cached(daemon, "evict", "tiny").returncode == 1
        process.communicate("\n", timeout=60)
    assert process.returncode == 0
    wait_for(lambda: not daemon.stats().lease_count, "the lease to end")


def test_run_passes_signals_and_exit_codes_on(daemon):
    ready = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print(1, flush=True)"
    words = command(daemon, "run", "tiny", "--", sys.executable, "-c", f"{ready}; time.sleep(600)")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 7
    killed = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    assert cached(daemon, "run", "tiny", "--", sys.executable, "-c", killed).returncode == 128 + signal.SIGKILL
    assert cached(daemon, "run", "tiny", "--", "/nonexistent/command").returncode == 127
    assert cached(daemon, "run", "tiny", "--", os.devnull).returncode == 126


def test_a_wrong_checksum_in_the_catalog_ends_with_6(daemon, tmp_path):
    source = f"file://{tmp_path}/source"
    daemon.write_catalog({"tiny": {"source": source, "sha256": {"model.safetensors": "ab" * 32}}})
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: len(daemon.log_events("catalog.loaded")) > 1, "the new catalog")
    pulled = cached(daemon, "pull", "tiny")
    assert pulled.returncode == 6, pulled.stderr
    assert "model.safetensors" in pulled.stderr
    assert "hint: " in pulled.stderr
    assert cached(daemon, "path", "tiny").returncode == 3


def test_a_second_daemon_is_refused(daemon):
    second = cached(daemon, "serve", "--config", str(daemon.config_file))
    assert second.returncode == 1
    assert str(daemon.pid) in second.stderr


def test_what_was_pushed_can_be_pulled_by_its_catalog_entry(daemon, rclone_s3, tmp_path):
    rclone_s3.create_bucket("pushed")
    keys = rclone_s3.env()
    words = ("push", f"{tmp_path}/source", "s3://pushed/models/other", "--endpoint-url", rclone_s3.endpoint_url)
    pushed = cached(daemon, *words, env=os.environ | keys)
    assert pushed.returncode == 0, pushed.stderr
    assert rclone_s3.get("pushed", "models/other/model.safetensors") == SHARD
    with DaemonProcess(tmp_path / "second", models=json.loads(pushed.stdout)["models"], environment=keys) as second:
        second.wait_event("catalog.loaded")
        pulled = cached(second, "pull", "other")
        assert pulled.returncode == 0, pulled.stderr
        assert "checked by catalog-sha256" in pulled.stdout
    denied = cached(daemon, *words, env=os.environ | keys | {"AWS_SECRET_ACCESS_KEY": "wrong-secret"})
    assert denied.returncode == 1
    assert "hint: " in denied.stderr
