"""Real vLLM on the CPU: the same greedy tokens whichever way the weights come. ``make test-vllm``."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import wait_for
from tests.integration.support import SERVE, Site, total_bytes
from tests.vllm.models import adapter, expected, llama
from tests.vllm.support import PYTHON, START_S, Comparison, Engine, Server, mapped_bytes

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

WEIGHTS = ".safetensors"


def origin_bytes(site: Site, path: str = "") -> int:
    """What the S3 server handed out of objects whose name has ``path``."""
    return site.proxy.get_bytes(path)


def weight_bytes() -> int:
    return sum(len(data) for path, data in llama().items() if path.endswith(WEIGHTS))


def cached_path(site: Site, name: str) -> str:
    """``cached pull NAME && cached path NAME``."""
    for verb in ("pull", "path"):
        command = [*SERVE, "--socket", str(site.daemon.socket), verb, name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


def staged(site: Site, name: str, worker: dict[str, str], folder: Path) -> str:
    """What ``python -m cached_client.integrations.vllm`` prints, run beside vLLM."""
    command = [str(PYTHON), "-m", "cached_client.integrations.vllm", name, "--into", str(folder)]
    done = subprocess.run(command, env=worker, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def starts(site: Site, name: str) -> list[dict[str, Any]]:
    """``cached coldstart NAME``, the newest last."""
    command = [*SERVE, "--socket", str(site.daemon.socket), "coldstart", name, "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return list(json.loads(done.stdout)["starts"])


def counting_compiler(folder: Path) -> Path:
    """A C++ compiler that writes a line for every library that it makes, into a file beside it."""
    compiler = folder / "counted-g++"
    count = '[[ " $* " =~ \\ -o\\ [^\\ ]+\\.so\\  ]] && echo "$*" >> "$0.made"'
    compiler.write_text(f'#!/bin/bash\n{count}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    return compiler


def config_only(folder: Path) -> str:
    """A directory with the configuration and the tokenizer, and nothing of the weights."""
    folder.mkdir()
    for path, data in llama().items():
        if not path.endswith(WEIGHTS):
            (folder / path).write_bytes(data)
    return str(folder)


def test_plain_vllm_serves_the_directory(site: Site, comparison: Comparison, worker, tmp_path):
    """``vllm serve $(cached path NAME)``, unmodified and without our plugins."""
    path = cached_path(site, "small-llama")
    env = worker | {"VLLM_PLUGINS": ""}
    with Server(tmp_path / "serve", env, path, "--served-model-name", "small-llama") as server:
        comparison.same("auto: vllm serve $(cached path NAME)", server.ready().tokens("small-llama"), expected())
        assert "cached:" not in server.log.text()


def test_cold_from_s3_then_reloaded_then_another_model(site: Site, comparison: Comparison, worker, tmp_path):
    """Nothing is local when vLLM begins to load: its own attach has the daemon download."""
    options = {"model": config_only(tmp_path / "config"), "model_loader_extra_config": {"model": "small-llama"}}
    with Engine(tmp_path / "engine", worker, load_format="cached", **options) as engine:
        comparison.same("cached: cold, from S3", engine.ready().tokens(), expected())
        assert origin_bytes(site, "small-llama/") == total_bytes(llama())
        [loaded] = engine.log.loads()
        assert (loaded["level"], loaded["path"], loaded["fallbacks"]) == ("l3", "views", "0")
        assert 0.99 * weight_bytes() < int(loaded["bytes"]) <= weight_bytes()
        assert site.leases() == []
        [start] = starts(site, "small-llama")
        assert {"attach", "download", "build_model", "load_weights"} <= {phase["name"] for phase in start["phases"]}
        assert start["labels"].items() >= {"engine": "vllm", "from_level": "l3", "tp": "1"}.items()

        assert min(engine.ask("zero")) > 0
        zeroed = engine.tokens()
        assert zeroed != expected()
        engine.ask("reload")
        comparison.same("cached: after reload_weights", engine.tokens(), expected(), "weights were set to zero before")
        assert engine.log.loads()[-1]["level"] == "l1"
        assert origin_bytes(site, "small-llama/") == total_bytes(llama())

        engine.ask("reload", weights_path="cached://other-llama")
        comparison.same(
            "cached: reload_weights of another model", engine.tokens(), expected(1), "beside its own tokens"
        )


def test_warm_from_memory_and_after_a_restart_of_the_daemon(site: Site, comparison: Comparison, worker, tmp_path):
    path = cached_path(site, "small-llama")
    pulled = origin_bytes(site)
    options = {"model": path, "load_format": "cached", "model_loader_extra_config": {"hold": True}}
    with Engine(tmp_path / "warm", worker, **options) as engine:
        comparison.same("cached: warm, from L1", engine.ready().tokens(), expected())
        assert engine.log.loads()[0]["level"] == "l1"
        assert [lease.name for lease in site.leases()] == ["small-llama"]

        site.daemon.restart(kill=True)
        comparison.same("cached: the daemon killed under it", engine.tokens(), expected())
        wait_for(site.leases, "the lease to be taken up again")
        engine.ask("zero")
        engine.ask("reload")
        comparison.same("cached: reload after that", engine.tokens(), expected(), "weights were set to zero before")
    with Engine(tmp_path / "after", worker, **options) as engine:
        comparison.same("cached: started after the restart", engine.ready().tokens(), expected())
        assert engine.log.loads()[0]["level"] == "l1"
    wait_for(lambda: not site.leases(), "the leases to end with the engines")
    assert origin_bytes(site) == pulled


def test_what_one_start_compiled_no_later_one_compiles_again(site: Site, comparison: Comparison, worker, tmp_path):
    """The second start has a cache folder of its own, with nothing in it, as a fresh container has."""
    compiler = counting_compiler(tmp_path)
    made = Path(f"{compiler}.made")
    extra = {"model": "small-llama", "compile_cache": True}
    options = {"model": config_only(tmp_path / "config"), "load_format": "cached", "model_loader_extra_config": extra}
    counts = []
    for start in ("first", "second"):
        env = worker | {"VLLM_CACHE_ROOT": str(tmp_path / start), "CXX": str(compiler)}
        with Engine(tmp_path / f"engine-{start}", env, enforce_eager=False, **options) as engine:
            answers = engine.ready().tokens()
            [took] = re.findall(r"init engine .* took ([0-9.]+) s", engine.log.text())
            counts.append(len(made.read_text().splitlines()))
            note = f"{counts[-1] - sum(counts[:-1])} kernels compiled, vLLM's init took {took} s"
            comparison.same(f"cached: compile cache, {start} start", answers, expected(), note)
            if start == "first":
                assert "cached: no compile cache to restore" in engine.log.text()
                wait_for(lambda: "cached: compile cache saved" in engine.log.text(), "the cache to be saved", 120)
                assert "outcome=stored" in engine.log.text()
            else:
                assert "cached: compile cache restored" in engine.log.text()
    assert counts[0] > 0
    assert counts[1] == counts[0], "the second start compiled"
    first, second = starts(site, "small-llama")
    assert [first["labels"]["from_level"], second["labels"]["from_level"]] == ["l3", "l1"]
    assert "restore_compile_cache" in {phase["name"] for phase in second["phases"]}


def test_two_ranks_share_one_download_and_one_copy(site: Site, comparison: Comparison, worker, tmp_path):
    path = config_only(tmp_path / "config")
    env = worker | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    extra = {"model": "small-llama", "hold": True}
    options = {"model": path, "load_format": "cached", "tensor_parallel_size": 2, "model_loader_extra_config": extra}
    with Engine(tmp_path / "engine", env, **options) as engine:
        comparison.same("cached: TP=2, cold, from S3", engine.ready().tokens(), expected(), "one download, one copy")
        assert origin_bytes(site, "small-llama/") == total_bytes(llama())
        assert sorted((item["rank"], item["level"]) for item in engine.log.loads()) == [("0/2", "l3"), ("1/2", "l3")]
        assert site.level("l1").used_bytes == total_bytes(llama())

        pids = [lease.client_pid for lease in site.leases()]
        assert len(set(pids)) == 2
        ranks = [mapped_bytes(pid) for pid in pids]
        for rank in ranks:  # each has read its slices, and what both need whole, in place
            assert 0.5 * weight_bytes() < rank["Rss"] < 0.9 * weight_bytes()
            assert rank["Anonymous"] == 0
        assert sum(rank["Pss"] for rank in ranks) <= 1.01 * total_bytes(llama()) < sum(rank["Rss"] for rank in ranks)

        engine.ask("zero")
        engine.ask("reload")
        comparison.same("cached: TP=2, after reload_weights", engine.tokens(), expected())
        assert [start["labels"]["tp"] for start in starts(site, "small-llama")] == ["2"], "one rank tells, and once"


def test_weights_are_handed_over_while_they_are_downloaded(site: Site, comparison: Comparison, worker, tmp_path):
    """vLLM starts on a staged folder, which began the download; the last file is held back, the others are loaded."""
    last = max(path for path in llama() if path.endswith(WEIGHTS))
    held = site.hold(last, times=-1)
    path = staged(site, "small-llama", worker, tmp_path / "staged")
    assert not list(Path(path).glob(f"*{WEIGHTS}"))
    with Engine(tmp_path / "engine", worker, model=path, load_format="cached") as engine:
        wait_for(lambda: site.leases() and engine.log.text(), "vLLM to attach", START_S)
        pid = site.leases()[0].client_pid
        wanted = 0.9 * sum(len(data) for name, data in llama().items() if name.endswith(WEIGHTS) and name != last)
        wait_for(lambda: mapped_bytes(pid)["Rss"] > wanted, "the first files to be read")
        assert not engine.log.loads()
        held.release()
        site.proxy.heal()
        comparison.same("cached: streamed, the last file held back", engine.ready().tokens(), expected())
        [loaded] = engine.log.loads()
        assert float(loaded["wait_s"]) < float(loaded["seconds"])


def test_fallback_is_loud_and_only_where_it_was_asked_for(site: Site, comparison: Comparison, worker, tmp_path):
    folder = tmp_path / "plain"
    folder.mkdir()
    for path, data in llama().items():
        (folder / path).write_bytes(data)
    extra = {"model": "not-there", "daemon_timeout_s": 1.0}
    options = {"model": str(folder), "load_format": "cached"}
    with Engine(tmp_path / "none", worker, model_loader_extra_config=extra, **options) as engine:
        with pytest.raises(AssertionError, match="vLLM ended"):
            engine.ready()
        assert "there is no model" in engine.log.text() or "not-there" in engine.log.text()
        assert "NoSourceError" in engine.log.text()
    with Engine(tmp_path / "auto", worker, model_loader_extra_config=extra | {"fallback": "auto"}, **options) as engine:
        comparison.same(
            "cached: fallback to the directory", engine.ready().tokens(), expected(), "NO_SOURCE, with a warning"
        )
        assert "cached: FALLBACK: rank 0/1" in engine.log.text()
        assert engine.log.loads()[-1]["fallbacks"] == "1"


def test_adapters_come_through_the_cache(site: Site, comparison: Comparison, worker, tmp_path):
    """``cached run NAME -- vllm serve {path} --load-format cached``, and an adapter named in a request."""
    before = (*SERVE, "--socket", str(site.daemon.socket), "run", "small-llama", "--")
    env = worker | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    options = ("--load-format", "cached", "--served-model-name", "small-llama", "--enable-lora", "--max-lora-rank", "8")
    with Server(tmp_path / "serve", env, "{path}", *options, before=before) as server:
        comparison.same("cached run NAME -- vllm serve {path}", server.ready().tokens("small-llama"), expected())
        assert origin_bytes(site, "small-lora/") == 0
        comparison.same(
            "LoRA by name, from S3", server.tokens("small-lora"), expected(adapted=True), "beside merged weights"
        )
        assert origin_bytes(site, "small-lora/") == total_bytes(adapter())
        assert "small-lora" in leased(site)

        for stranger in ("other-llama", "nobody"):  # a model of the catalog that is no adapter, and none at all
            status, _ = server.post("/v1/completions", {"model": stranger, "prompt": "a", "max_tokens": 1})
            assert status == 404
        assert origin_bytes(site, "other-llama/") == 0

        status, _ = server.post("/v1/unload_lora_adapter", {"lora_name": "small-lora"})
        assert status == 200
        wait_for(lambda: "small-lora" not in leased(site), "the adapter's lease to end")

        site.daemon.kill()
        status, answer = server.post("/v1/completions", {"model": "small-lora", "prompt": "a", "max_tokens": 1})
        assert status == 500, answer
        assert server.tokens("small-llama") == expected()
        site.daemon.start()


def leased(site: Site) -> set[str]:
    return {lease.name for lease in site.leases()}


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (
            {"modle": "small-llama"},
            "it knows compile_cache, daemon_timeout_s, fallback, gpu, hold, keep_alive_s, model, report_start",
        ),
        ({"timeout_s": "soon"}, "a number of seconds"),
        ({"fallback": "always"}, "one of 'none', 'auto'"),
    ],
)
def test_wrong_options_are_refused_by_vllms_own_entry(extra, told, worker):
    done = checked("refuse", json.dumps(extra), worker)
    assert done.returncode == 1
    assert told in done.stderr.splitlines()[-1], done.stderr[-2000:]


def test_the_loader_without_an_engine(site: Site, worker):
    done = checked("all", "small-llama", worker)
    assert done.returncode == 0, done.stderr[-4000:]
    assert origin_bytes(site) == total_bytes(llama())
    assert "already registered" not in done.stdout + done.stderr


def checked(what: str, argument: str, worker: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(PYTHON), str(Path(__file__).with_name("loader_checks.py")), what, argument]
    return subprocess.run(command, env=worker, capture_output=True, text=True, timeout=START_S, check=False)
