"""What the vLLM plugin keeps and tells of a start, beside vLLM: the compile cache, the timeline; with a real daemon."""

from __future__ import annotations

import json
import logging
import subprocess
from pathlib import Path

import pytest

import cached_client
from cached_client import artifacts
from cached_client.integrations.vllm.compile_cache import STILL_S, CompileCache
from cached_client.integrations.vllm.options import LoaderOptions
from cached_client.integrations.vllm.start import LoadStart
from cached_client.integrations.vllm.weights import WeightLoad
from tests.integration.harness import wait_for
from tests.integration.support import MB, SERVE, Site, model_files, random_bytes

KEY = {"model": "llama", "revision": "abcd", "engine": "vllm", "tp": "1", "config": "ef01"}
GRAPH = "torch_aot_compile/0a1b/rank_0_0/model"
KERNEL = "torch_aot_compile/0a1b/inductor_cache/ab/kernel.so"
OTHER = "torch_aot_compile/ffff/rank_0_0/model"


@pytest.fixture
def host(site: Site) -> Site:
    """Workers may save, and S3 is the destination."""
    site.settings["artifacts"] = {"save": True, "destination": site.uri("artifacts")}
    site.start()
    return site


def compile_into(folder: Path, *paths: str, size_bytes: int = 1000) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(random_bytes(size_bytes, len(path)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def begun(site: Site, folder: Path, used: tuple[str, ...] = (), **key: str) -> CompileCache:
    cache = CompileCache(str(site.daemon.socket), folder, KEY | key, lambda: [str(folder / path) for path in used])
    cache.restore()
    cache.begin(0.0)
    return cache


def restored(site: Site, folder: Path, **key: str) -> dict[str, bytes]:
    """What an engine that starts with nothing gets."""
    CompileCache(str(site.daemon.socket), folder, KEY | key).restore()
    return contents(folder) if folder.exists() else {}


def artifacts_of(site: Site) -> int:
    with site.daemon.stub() as stub:
        from cached_client._proto import cached_pb2 as pb

        return len(stub.ListArtifacts(pb.ListArtifactsRequest()).artifacts)


def test_what_has_come_to_rest_is_saved_and_restored_for_the_same_key_only(host, tmp_path):
    engine = begun(host, tmp_path / "a")
    compile_into(tmp_path / "a", KERNEL)
    assert engine.look(20.0)
    assert engine.look(20.0 + STILL_S / 2)
    assert engine.saved is None, "it was still for too short a time"
    compile_into(tmp_path / "a", GRAPH)
    assert engine.look(20.0 + STILL_S)
    assert engine.saved is None, "something came meanwhile"
    assert engine.look(20.0 + 2 * STILL_S)
    assert engine.saved is not None
    assert (engine.saved.outcome, engine.saved.files) == ("stored", 2)
    assert restored(host, tmp_path / "b") == contents(tmp_path / "a")
    for other in ({"tp": "2"}, {"revision": "abce"}, {"config": "ef02"}, {"driver": "580"}):
        assert restored(host, tmp_path / "c", **other) == {}


def test_an_engine_that_goes_on_compiling_replaces_what_it_saved(host, tmp_path):
    engine = begun(host, tmp_path / "a")
    compile_into(tmp_path / "a", KERNEL)
    engine.look(1.0)
    engine.look(1.0 + STILL_S)
    compile_into(tmp_path / "a", GRAPH, size_bytes=1)
    engine.look(50.0)
    engine.look(50.0 + STILL_S)
    assert engine.saved is not None
    assert (engine.saved.outcome, engine.saved.files) == ("stored", 2)
    assert artifacts_of(host) == 1
    assert restored(host, tmp_path / "b") == contents(tmp_path / "a")


def test_nothing_is_saved_until_the_engine_is_warm(host, tmp_path):
    """A compiler may think for long over one file."""
    warm: list[bool] = []
    engine = CompileCache(str(host.daemon.socket), tmp_path / "a", KEY, is_warm=lambda: bool(warm))
    engine.begin(0.0)
    compile_into(tmp_path / "a", KERNEL)
    for now_s in (1.0, 100.0, 200.0):
        assert engine.look(now_s)
    compile_into(tmp_path / "a", GRAPH)
    warm.append(True)
    for now_s in (201.0, 201.0 + STILL_S / 2):
        assert engine.look(now_s)
    assert engine.saved is None
    engine.look(201.0 + STILL_S)
    assert engine.saved is not None
    assert engine.saved.files == 2


def test_what_other_engines_have_in_the_folder_stays_out(host, tmp_path):
    compile_into(tmp_path / "a", OTHER, "1234567890/rank_0_0/backbone/graph.py")
    engine = begun(host, tmp_path / "a")
    compile_into(tmp_path / "a", KERNEL, GRAPH)
    engine.look(1.0)
    engine.look(1.0 + STILL_S)
    assert set(restored(host, tmp_path / "b")) == {KERNEL, GRAPH}


def test_what_was_compiled_here_before_is_saved_where_the_engine_names_it(host, tmp_path):
    compile_into(tmp_path / "a", KERNEL, GRAPH, OTHER)
    engine = begun(host, tmp_path / "a", used=("torch_aot_compile/0a1b/inductor_cache", "../elsewhere"))
    engine.look(1.0)
    engine.look(1.0 + STILL_S)
    assert set(restored(host, tmp_path / "b")) == {KERNEL, GRAPH}


def test_after_a_restore_only_a_good_part_more_is_worth_a_save(host, tmp_path):
    first = begun(host, tmp_path / "a")
    compile_into(tmp_path / "a", KERNEL, size_bytes=10_000)
    first.look(1.0)
    first.look(1.0 + STILL_S)
    again = begun(host, tmp_path / "b")
    assert set(contents(tmp_path / "b")) == {KERNEL}
    compile_into(tmp_path / "b", GRAPH, size_bytes=2_000)
    again.look(1.0)
    again.look(1.0 + STILL_S)
    assert again.saved is None
    compile_into(tmp_path / "b", f"{GRAPH}.more", size_bytes=2_000)
    again.look(20.0)
    again.look(20.0 + STILL_S)
    assert again.saved is not None
    assert (again.saved.outcome, again.saved.files) == ("stored", 3)


def test_a_daemon_that_lets_nobody_save_is_asked_once(site, tmp_path, caplog):
    site.start()
    engine = begun(site, tmp_path / "a")
    compile_into(tmp_path / "a", KERNEL)
    assert engine.look(1.0)
    with caplog.at_level(logging.WARNING, "vllm.cached"):
        assert not engine.look(1.0 + STILL_S), "it goes on looking"
    [told] = [record.getMessage() for record in caplog.records if record.name == "vllm.cached"]
    assert "artifacts.save" in told


def test_without_a_daemon_it_is_logged_and_given_up(tmp_path, caplog):
    engine = CompileCache(str(tmp_path / "no.sock"), tmp_path / "a", KEY)
    with caplog.at_level(logging.WARNING, "vllm.cached"):
        assert engine.restore() is None
        engine.begin(0.0)
        compile_into(tmp_path / "a", KERNEL)
        looked = [engine.look(number * STILL_S) for number in range(1, 5)]
    assert looked == [True, True, True, False]
    assert [record.getMessage().rpartition("; ")[2] for record in caplog.records][1:] == [
        "it will be tried again", "it will be tried again", "it is left at that",
    ]  # fmt: skip


def test_a_thread_watches_the_folder(host, tmp_path, monkeypatch):
    monkeypatch.setattr("cached_client.integrations.vllm.compile_cache.STILL_S", 0.0)
    monkeypatch.setattr("cached_client.integrations.vllm.compile_cache._POLL_S", 0.01)
    engine = CompileCache(str(host.daemon.socket), tmp_path / "a", KEY)
    engine.watch()
    compile_into(tmp_path / "a", KERNEL)
    wait_for(lambda: engine.saved, "the thread to save")
    assert isinstance(
        artifacts.restore(cached_client.connect(str(host.daemon.socket)), tmp_path / "b", KEY), artifacts.Restored
    )


# The start.


def loaded(site: Site, name: str) -> LoadStart:
    start = LoadStart({"engine": "vllm", "tp": "1"})
    start.step("build_model")
    load = WeightLoad(LoaderOptions(socket=str(site.daemon.socket)), name, client_name="r", rank="0/1", start=start)
    start.step("load_weights")
    for _ in load.tensors(None):
        pass
    start.step("process_weights")
    return start


def starts(site: Site, name: str) -> list[dict]:
    command = [*SERVE, "--socket", str(site.daemon.socket), "coldstart", name, "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)["starts"]


def test_a_start_is_told_with_its_phases_and_where_the_weights_came_from(site):
    site.add("llama", model_files(2 * MB))
    site.start()
    for level, arrives in (("l3", {"download"}), ("l1", set())):
        loaded(site, "llama").report(str(site.daemon.socket))
        told = starts(site, "llama")[-1]
        assert told["labels"] == {"engine": "vllm", "tp": "1", "from_level": level}
        phases = {phase["name"]: phase for phase in told["phases"]}
        assert {"process_start", "build_model", "attach", "load_weights", "process_weights"} | arrives <= set(phases)
        assert ("download" in phases) is bool(arrives)
        assert phases["load_weights"].get("after", "") == ("download" if arrives else "")
        assert phases["build_model"]["end_s"] == phases["load_weights"]["start_s"]


def test_a_start_that_cannot_be_told_is_logged(site, tmp_path, caplog):
    site.add("llama", model_files(MB))
    site.start()
    start = loaded(site, "llama")
    with caplog.at_level(logging.WARNING, "vllm.cached"):
        start.report(str(tmp_path / "no.sock"))
    assert "the start was not reported: DAEMON_UNAVAILABLE" in caplog.text
    unloaded = LoadStart({})
    unloaded.step("build_model")
    unloaded.report(str(site.daemon.socket))
    assert starts(site, "llama") == []
