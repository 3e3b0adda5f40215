"""What the vLLM plugin does with the cache, beside vLLM: a rank's load, staging, adapters; with a real daemon."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

import cached_client
from cached_client.integrations.vllm.adapters import AdapterSource
from cached_client.integrations.vllm.naming import pinned_ref
from cached_client.integrations.vllm.options import LoaderOptions
from cached_client.integrations.vllm.staging import stage
from cached_client.integrations.vllm.weights import WeightLoad, may_fall_back, pull
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, model_files, total_bytes

WEIGHTS = ".safetensors"


@pytest.fixture
def files() -> dict[str, bytes]:
    """Two shards, whose tensors have names of their own."""
    files = model_files(2 * MB, 3 * MB)
    second = "model-00002-of-00002.safetensors"
    return files | {second: re.sub(rb'"t(\d)\.', rb'"u\1.', files[second])}


def tensors_of(files: dict[str, bytes]) -> dict[str, torch.Tensor]:
    return {name: value for path, data in files.items() if path.endswith(WEIGHTS) for name, value in load(data).items()}


def options(site: Site, **more: object) -> LoaderOptions:
    return LoaderOptions(socket=str(site.daemon.socket), **more)


def loaded(site: Site, ref: str, skip=None, **more: object) -> tuple[WeightLoad, dict[str, torch.Tensor]]:
    load_of_rank = WeightLoad(options(site, **more), ref, client_name="rank", rank="0/1")
    return load_of_rank, dict(load_of_rank.tensors(None, skip))


def add_adapter(site: Site, name: str = "style", base: str = "llama", peft_type: str = "LORA") -> dict[str, bytes]:
    config = json.dumps({"peft_type": peft_type, "base_model_name_or_path": base}).encode()
    weights = model_files(100_000, seed=7)["model.safetensors"]
    return site.add(name, {"adapter_config.json": config, "adapter_model.safetensors": weights}, base=base)


# A rank's load.


def test_ranks_get_every_tensor_from_one_download(site, files):
    site.add("llama", files)
    site.start()
    wanted = tensors_of(files)
    for level in ("l3", "l1"):
        done, found = loaded(site, "llama")
        assert set(found) == set(wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        timings = done.timings
        assert (timings.from_level, timings.path, timings.tensors) == (level, "views", len(wanted))
        assert timings.tensor_bytes == sum(value.nbytes for value in wanted.values())
        assert timings.attach_s <= timings.first_tensor_s <= timings.total_s
        assert timings.wait_s + timings.engine_s <= timings.total_s
    assert site.proxy.get_bytes() == total_bytes(files)
    assert site.leases() == []


def test_a_lease_is_held_on_only_where_that_was_asked_for(site):
    site.add("llama", model_files(2 * MB))
    site.start()
    done, _ = loaded(site, "llama", hold=True)
    assert [f"{lease.name}@{lease.revision}" for lease in site.leases()] == [done.ref]
    done.close()
    wait_for(lambda: not site.leases(), "the lease to end")


def test_other_ranks_experts_are_left_out(site):
    site.add("llama", model_files(2 * MB))
    site.start()
    _, found = loaded(site, "llama", lambda name: name.startswith("t1"))
    assert set(found) == {"t0.weight", "t2.weight"}


def test_a_device_is_told_in_the_timings(site):
    """The meta device takes no bytes, and the way there is that of any device without a ring."""
    site.add("llama", model_files(2 * MB))
    site.start()
    done = WeightLoad(options(site), "llama", client_name="rank", rank="0/1")
    assert {tensor.device.type for _, tensor in done.tensors("meta")} == {"meta"}
    assert (done.timings.device, done.timings.path, done.timings.fallbacks) == ("meta", "plain", ())


def test_a_load_that_is_left_early_gives_its_lease_back(site):
    site.add("llama", model_files(2 * MB))
    site.start()
    tensors = WeightLoad(options(site, hold=True), "llama", client_name="rank", rank="0/1").tensors(None)
    next(tensors)
    assert site.leases()
    tensors.close()
    wait_for(lambda: not site.leases(), "the lease to end")


def test_what_may_fall_back_and_what_may_not(site, tmp_path):
    site.add("text", {"config.json": b"{}", "model.txt": b"no weights"})
    site.start()
    with pytest.raises(cached_client.NoSourceError) as unknown:
        loaded(site, "nobody")
    with pytest.raises(cached_client.InvalidRequestError, match="no safetensors files") as weightless:
        loaded(site, "text")
    with pytest.raises(cached_client.DaemonUnavailableError) as absent:
        list(WeightLoad(LoaderOptions(socket=str(tmp_path / "no"), daemon_timeout_s=0), "llama",
                        client_name="rank", rank="0/1").tensors(None))  # fmt: skip
    assert [may_fall_back(error.value) for error in (unknown, weightless, absent)] == [True, False, True]
    assert not may_fall_back(cached_client.QuarantinedError("damaged"))


def test_a_pull_without_a_load(site):
    site.add("llama", model_files(2 * MB))
    site.start()
    ref = pull(options(site), "llama")
    assert ref == f"llama@{site.summary('llama').revision}"
    assert site.summary("llama").l1_bytes == site.summary("llama").size_bytes


# Staging.


def test_staging_takes_the_small_files_while_the_weights_are_still_to_come(site, files, tmp_path):
    site.add("llama", files)
    site.start()
    held = site.hold("/model-0", times=-1)
    environment = {"CACHED_SOCKET": str(site.daemon.socket), "PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "cached_client.integrations.vllm", "llama"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    folder = Path(done.stdout.strip())
    small = {path: data for path, data in files.items() if not path.endswith(WEIGHTS)}
    assert {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")} == small
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    assert pinned_ref(str(folder)) == folder.name == f"llama@{site.summary('llama').revision}"
    held.release()
    site.proxy.heal()
    assert subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout == done.stdout
    site.check_served("llama")


def test_staging_says_what_is_wrong(site, tmp_path):
    site.start()
    command = [sys.executable, "-m", "cached_client.integrations.vllm"]
    environment = {"CACHED_SOCKET": str(site.daemon.socket), "PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    done = subprocess.run([*command, "nobody"], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    site.add("llama", model_files(MB))
    site.reload_catalog()
    with site.attach("llama") as model, pytest.raises(cached_client.CacheError, match="cannot stage"):
        stage(model, Path("/dev/null/folder"))
    with site.attach("llama") as model:
        assert stage(model, tmp_path / "a", weights=True) == stage(model, tmp_path / "a")


# Adapters.


def test_an_adapter_is_held_for_as_long_as_it_is_used(site):
    site.add("llama", model_files(MB))
    files = add_adapter(site)
    site.start()
    source = AdapterSource(str(site.daemon.socket))
    adapter = source.find("style", "/anywhere/llama")
    assert {path.name: path.read_bytes() for path in adapter.directory.iterdir()} == files
    assert [f"{lease.name}@{lease.revision}" for lease in site.leases()] == [adapter.ref]
    del adapter
    gc.collect()
    wait_for(lambda: not site.leases(), "the lease to end")


def test_where_the_directory_is_not_to_be_seen_the_adapter_is_copied(site, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = add_adapter(site)
    site.start()
    hidden = tmp_path / "hidden"
    source = AdapterSource(str(site.daemon.socket))
    site.pull("style")
    os.rename(site.daemon.models_dir, hidden)
    try:
        adapter = source.find("style", "llama")
        folder = adapter.directory
        assert folder.is_relative_to(tmp_path)
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."} == files
        assert folder.parent.stat().st_mode & 0o777 == 0o700
        del adapter
        gc.collect()
        assert not folder.exists()
    finally:
        os.rename(hidden, site.daemon.models_dir)
        shutil.rmtree(hidden, ignore_errors=True)


def test_where_the_directorys_links_lead_nowhere_the_adapter_is_copied(site, tmp_path, monkeypatch):
    """As in a container that has the folder of the sockets, with the directory view in it, and not the segments."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = add_adapter(site)
    site.start()
    site.pull("style")
    links = {link: os.readlink(link) for link in Path(site.describe("style").path).resolve().iterdir()}
    point(links, lambda _: tmp_path / "nowhere")
    try:
        adapter = AdapterSource(str(site.daemon.socket)).find("style", "llama")
        assert {path.name: path.read_bytes() for path in adapter.directory.iterdir() if path.name[0] != "."} == files
    finally:
        point(links, links.get)


def point(links, to):
    for link in links:
        link.unlink()
        link.symlink_to(to(link))


def test_only_adapters_of_this_base_are_served(site):
    site.add("llama", model_files(MB))
    site.add("mistral", model_files(MB, seed=3))
    add_adapter(site)
    site.start()
    source = AdapterSource(str(site.daemon.socket))
    for path in ("llama", "mistral"):
        site.pull(path)
    assert source.find("nobody", "llama") is None
    assert source.find("org/name with spaces", "llama") is None
    assert source.find("mistral", str(site.daemon.models_dir / "llama")) is None
    assert source.find("style", str(site.daemon.models_dir / "mistral")) is None
    assert site.proxy.get_bytes("style/") == 0
    assert source.find("style", str(site.daemon.models_dir / "llama")) is not None


def test_what_is_no_lora_adapter_is_refused(site):
    add_adapter(site, "prefix", peft_type="PREFIX_TUNING")
    site.add("bare", model_files(MB), base="llama")
    site.start()
    source = AdapterSource(str(site.daemon.socket))
    with pytest.raises(cached_client.FormatError, match="PREFIX_TUNING"):
        source.find("prefix", "llama")
    with pytest.raises(cached_client.FormatError, match="no LoRA adapter"):
        source.find("bare", "llama")
    wait_for(lambda: not site.leases(), "the leases to end")
