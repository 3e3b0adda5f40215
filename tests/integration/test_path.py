"""`cached path`: the directory at once, once somebody has brought the model, or brought by itself; exit codes."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.integration.harness import wait_for
from tests.integration.support import MB, SERVE, Site, model_files

WEIGHTS = "model.safetensors"


def command(site: Site, *words: str) -> list[str]:
    return [*SERVE, "--socket", str(site.daemon.socket), "path", *words]


def path_of(site: Site, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(site, *words), capture_output=True, text=True, timeout=100)


def check_place(site: Site, told: str, name: str = "m") -> None:
    assert told.endswith("\n")
    place = Path(told[:-1])
    assert {file: (place / file).read_bytes() for file in os.listdir(place)} == site.files[name]


def test_it_waits_for_a_pull_of_somebody_else_and_gives_up_in_time(site: Site) -> None:
    site.add("m", model_files(3 * MB))
    site.start()
    ran = path_of(site, "m")
    assert (ran.returncode, ran.stdout) == (3, "")
    assert "--wait" in ran.stderr
    ran = path_of(site, "unheard-of", "--wait", "--timeout", "30s")
    assert (ran.returncode, ran.stdout) == (3, "")
    ran = path_of(site, "m", "--wait", "--timeout", "300ms")
    assert (ran.returncode, ran.stdout) == (4, "")
    assert "--pull" in ran.stderr, "nobody brings it"
    held = site.hold(WEIGHTS, times=-1)
    site.begin("m")
    ran = path_of(site, "m", "--wait", "--timeout", "300ms")
    assert (ran.returncode, ran.stdout) == (4, "")
    assert "on its way" in ran.stderr
    with subprocess.Popen(
        command(site, "m", "--wait"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as waits:
        assert waits.stderr
        assert "m: pulling" in waits.stderr.readline()
        held.release()
        told, _ = waits.communicate(timeout=60)
    assert waits.returncode == 0
    check_place(site, told)


def test_it_pulls_if_told_to(site: Site) -> None:
    site.add("m", model_files(3 * MB))
    site.upload("free", model_files(2 * MB))
    site.files["free"] = model_files(2 * MB)
    site.start()
    ran = path_of(site, "m", "--pull")
    assert ran.returncode == 0, ran.stderr
    check_place(site, ran.stdout)
    asked = len(site.proxy.gets(""))
    assert path_of(site, "m", "--pull").stdout == ran.stdout
    assert len(site.proxy.gets("")) == asked, "what is there is not asked for again"
    ran = path_of(site, "free", "--pull", "--source", site.uri("free"), "--timeout", "60s")
    assert ran.returncode == 0, ran.stderr
    check_place(site, ran.stdout, "free")
    site.hold(WEIGHTS, times=-1)
    site.add("slow", model_files(3 * MB, seed=7))
    site.reload_catalog()
    ran = path_of(site, "slow", "--pull", "--timeout", "1s")
    assert (ran.returncode, ran.stdout) == (4, "")


def test_it_waits_for_a_daemon_that_starts(site: Site) -> None:
    site.add("m", model_files(MB))
    waits = subprocess.Popen(command(site, "m", "--pull", "--timeout", "90s"), stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: waits.poll() is None and Path(f"/proc/{waits.pid}/stat").exists(), "the command to run")
        site.start()
        told, _ = waits.communicate(timeout=90)
    finally:
        waits.kill()
        waits.wait()
    assert waits.returncode == 0
    check_place(site, told)


@pytest.mark.parametrize("words", [("m", "--wait"), ("m", "--pull")])
def test_without_a_daemon_it_gives_up_in_time_and_not_before(tmp_path: Path, words: tuple[str, ...]) -> None:
    began_s = time.monotonic()
    command = [*SERVE, "--socket", str(tmp_path / "no.sock"), "path", *words, "--timeout", "2s"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (4, "")
    assert time.monotonic() - began_s >= 2
    assert "waiting for the daemon" in ran.stderr
    assert "no daemon in time: the cache daemon does not answer on" in ran.stderr


@pytest.mark.parametrize("word", ["--wait", "--pull"])
def test_a_daemon_that_is_restarted_is_waited_for(site: Site, word: str) -> None:
    site.add("m", model_files(3 * MB))
    site.start()
    held = site.hold(WEIGHTS, times=-1)
    if word == "--wait":
        site.begin("m")
    with subprocess.Popen(
        command(site, "m", word, "--timeout", "90s"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as waits:
        assert waits.stderr
        assert "m: " in waits.stderr.readline()
        site.daemon.kill()
        for line in waits.stderr:
            if "waiting for the daemon" in line:
                break
        assert waits.poll() is None
        held.release()
        site.start()
        if word == "--wait":
            site.begin("m")
        told, _ = waits.communicate(timeout=60)
    assert waits.returncode == 0
    check_place(site, told)


@pytest.mark.parametrize("words", [("m", "--timeout", "1s"), ("m", "--wait", "--source", "s3://b/m")])
def test_options_that_mean_nothing_are_refused(words: tuple[str, ...]) -> None:
    ran = subprocess.run([*SERVE, "path", *words], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "is for --" in ran.stderr
