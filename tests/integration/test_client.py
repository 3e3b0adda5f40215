"""The client with a real daemon and a real origin: tensors while they arrive, leases, restarts, failures."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save

import cached_client
from cached_client._proto import cached_pb2 as pb
from cached_client.safetensors_header import parse_header
from cached_client.testing import FakeDaemon
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, model_files, refused, sha256
from tests.invariants import check_at_rest

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(autouse=True)
def collected(site: Site) -> Iterator[None]:
    """A caught error's traceback ties the test's frame, and its tensors, into a cycle: ended before the checks."""
    yield
    gc.collect()


def tensors_of(files: dict[str, bytes]) -> dict[str, bytes]:
    """Tensor name → its bytes, read from the source with the plain parser."""
    found: dict[str, bytes] = {}
    for path, data in files.items():
        if path.endswith(".safetensors"):
            infos = parse_header(data, len(data)).tensors.values()
            found.update((info.name, data[info.begin : info.end]) for info in infos)
    return found


def sharded(*sizes_bytes: int) -> dict[str, bytes]:
    """A model of several shards, each with tensor names of its own."""
    generator = torch.Generator().manual_seed(5)
    files = model_files(*sizes_bytes)
    for number, path in enumerate(SHARDS[: len(sizes_bytes)]):
        part = {
            f"shard{number}.{index}": torch.randint(0, 256, (size // 4,), dtype=torch.uint8, generator=generator)
            for index, size in enumerate([sizes_bytes[number]] * 4)
        }
        files[path] = save(part)
    return files


def same(tensor: torch.Tensor, expected: bytes) -> bool:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == expected


def test_a_worker_gets_every_tensor_without_a_copy(site: Site) -> None:
    weights = {
        "f32": torch.randn(300, 70),
        "bf16": torch.randn(64, 64).to(torch.bfloat16),
        "f8": torch.randn(128).to(torch.float8_e4m3fn),
        "i64": torch.arange(100),
        "bool": torch.rand(33) > 0.5,
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
    }
    files = site.add("m", {"config.json": b"{}", "model.safetensors": save(weights)})
    site.start()
    with site.attach("m") as model:
        state = model.state_dict(timeout_s=60)
        assert set(state) == set(weights)
        for name, expected in weights.items():
            assert (state[name].dtype, state[name].shape) == (expected.dtype, expected.shape)
            assert same(state[name], expected.reshape(-1).view(torch.uint8).numpy().tobytes())
        assert model.numpy("f32").shape == (300, 70)
        assert model.report is not None
        assert model.report.from_level == "l3"
        path = "model.safetensors"
        assert model.files[path].sha256 == sha256(files[path])
        segment = site.segment("m", path)
        mapped = [item for item in psutil.Process().memory_maps(grouped=False) if item.path == str(segment)]
        assert mapped, "the tensors lie in the daemon's segment"
        assert sum(item.anonymous for item in mapped) == 0, "and nothing of it was copied"
        state["f32"].add_(1)
        assert segment.read_bytes() == files[path], "a worker's write stays its own"


def test_tensors_of_the_first_shard_are_used_while_the_second_still_downloads(site: Site) -> None:
    files = site.add("m", sharded(8 * MB, 40 * MB))
    expected = tensors_of(files)
    site.start()
    held = site.hold(SHARDS[1], times=-1)
    with site.attach("m") as model:
        stream = model.stream(timeout_s=60)
        early = dict(next(stream) for _ in range(4))
        assert set(early) == {f"shard0.{index}" for index in range(4)}
        assert not model.complete
        assert model.read("config.json", timeout_s=60) == files["config.json"]
        with pytest.raises(cached_client.TimeoutExpiredError):
            model.tensor("shard1.0", timeout_s=0.1)
        held.release()
        late = dict(stream)
        assert model.complete
        assert all(same(tensor, expected[name]) for name, tensor in {**early, **late}.items())
        assert set(early) | set(late) == set(expected)
        assert model.timings["first_range"] <= model.timings["complete"]


def test_a_stream_raises_when_the_final_check_fails(site: Site) -> None:
    files = sharded(3 * MB, 4 * MB)
    site.add("m", files, sha256={SHARDS[1]: "0" * 64})
    site.start()
    with refused("INTEGRITY") as seen, site.attach("m") as model:
        for _ in model.stream(timeout_s=60):
            pass
    assert seen["path"] == SHARDS[1]
    assert seen["found"] == sha256(files[SHARDS[1]])


def test_closing_gives_the_lease_back_before_it_returns(site: Site) -> None:
    files = site.add("m", model_files(2 * MB))
    site.start()
    with site.cache() as cache:
        model = cache.attach("m", wait=True, timeout_s=60, client_name="a worker")
        [lease] = site.leases()
        assert (lease.name, lease.client_name, lease.peer_pid) == ("m", "a worker", psutil.Process().pid)
        with refused("IN_USE"):
            site.evict("m")
        kept = model.tensor("t0.weight")
        model.close()
        assert not site.leases()
        site.evict("m")
        assert same(kept, tensors_of(files)["t0.weight"]), "what was handed out stays, whatever the daemon does"
        assert cache.attach("m", wait=True, timeout_s=60).report.from_level == "l2"


@pytest.mark.parametrize("kill", [False, True], ids=["SIGTERM", "SIGKILL"])
def test_a_restart_is_not_noticed_by_a_worker_with_a_whole_model(site: Site, kill: bool) -> None:
    files = site.add("m", sharded(20 * MB, 20 * MB))
    site.start()
    with site.attach("m") as model:
        model.wait(60)
        check_at_rest(site.daemon, leases=1)
        site.daemon.restart(kill=kill)
        wait_for(lambda: len(site.leases()) == 1, "the lease to be taken up again")
        assert model.lease_lost is None
        assert all(same(model.tensor(name), data) for name, data in tensors_of(files).items())
        with refused("IN_USE"):
            site.evict("m")
    wait_for(lambda: not site.leases(), "the lease to end")


@pytest.mark.parametrize("kill", [False, True], ids=["SIGTERM", "SIGKILL"])
def test_a_restart_during_the_download_is_only_a_pause(site: Site, kill: bool) -> None:
    files = site.add("m", sharded(36 * MB, 40 * MB))
    expected = tensors_of(files)
    site.start()
    held = site.hold(SHARDS[1], times=-1, after_bytes=MB)
    with site.attach("m") as model:
        stream = model.stream(timeout_s=60)
        early = dict(next(stream) for _ in range(4))
        if kill:
            site.daemon.kill()
        else:
            assert site.daemon.terminate() == 0
        held.release()
        site.proxy.heal()
        site.daemon.start()
        late = dict(stream)
        assert {**early, **late}.keys() == expected.keys()
        assert all(same(tensor, expected[name]) for name, tensor in {**early, **late}.items())
        assert model.complete


def test_a_worker_goes_on_when_the_content_is_gone_after_a_restart(site: Site) -> None:
    files = site.add("m", model_files(2 * MB))
    site.start()
    with site.attach("m") as model:
        model.wait(60)
        for _ in range(5):
            wait_for(lambda: site.daemon.stats().active_load_count == 0, "the load to be recorded")
            resumed = len(site.daemon.log_events("pull.resumed"))
            site.daemon.kill()
            for segment in site.daemon.segments():
                segment.unlink()
            site.daemon.start()
            if len(site.daemon.log_events("pull.resumed")) == resumed:
                break  # else the index did not know yet that the pull was through, and it brings the content again
        lost = wait_for(lambda: model.lease_lost, "the lease to be lost")
        assert isinstance(lost.__cause__, cached_client.NotFoundError)
        assert all(same(model.tensor(name), data) for name, data in tensors_of(files).items())


def test_the_directory_view_is_found(site: Site) -> None:
    files = site.add("m", {**model_files(MB), "1_Pooling/config.json": b"{}"})
    site.start()
    with site.attach("m") as model:
        model.wait(60)
        link = site.daemon.models_dir / "m"
        wait_for(link.exists, "the model's name to lead to its revision: that comes once it is recorded")
        assert model.directory == link.resolve()
        for path, data in files.items():
            local = model.files[path].local_path
            assert local is not None
            assert local.read_bytes() == data
            assert model.files[path].sha256 == sha256(data)


def test_what_is_not_resident_can_be_refused(site: Site) -> None:
    site.add("m", model_files(MB))
    site.start()
    with site.cache() as cache, refused("NOT_FOUND"):
        cache.attach("m", only_if_resident=True)
    with site.cache() as cache, refused("NO_SOURCE"):
        cache.attach("unheard-of")
    site.pull("m")
    with site.cache() as cache, cache.attach("m", only_if_resident=True) as model:
        assert model.wait(60).from_level == "l1"


def test_a_daemon_that_takes_its_time_to_greet_is_not_taken_for_dead(site: Site) -> None:
    """On busy cores it does: a new connection is established by the kernel long before the daemon has a word."""
    site.start()
    with site.cache() as cache:
        site.daemon.signal(signal.SIGSTOP)
        try:
            answer = cache.connection.stub.List.future(pb.ListRequest())  # type: ignore[attr-defined]
            ended = threading.Event()
            answer.add_done_callback(lambda _: ended.set())
            assert not ended.wait(1), answer.exception()
        finally:
            site.daemon.signal(signal.SIGCONT)
        assert not answer.result(timeout=60).models


def test_a_dozen_threads_share_one_attach(site: Site) -> None:
    files = site.add("m", sharded(10 * MB, 10 * MB))
    expected = tensors_of(files)
    site.start()
    with site.attach("m") as model:
        got: list[dict[str, torch.Tensor]] = []
        threads = [threading.Thread(target=lambda: got.append(model.state_dict(timeout_s=60))) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 12
        assert all(same(tensor, expected[name]) for state in got for name, tensor in state.items())


def test_the_stand_in_opens_an_attach_as_the_daemon_does(site: Site, tmp_path: Path) -> None:
    files = site.add("m", model_files(MB))
    site.start()
    (tmp_path / "fake").mkdir()
    with FakeDaemon(tmp_path / "fake") as fake, cached_client.connect(fake.target) as other:
        fake.add("m", files)
        with site.attach("m") as real, other.attach("m") as theirs:
            real.wait(60)
            theirs.wait(60)
            assert {path: info.size_bytes for path, info in real.files.items()} == {
                path: info.size_bytes for path, info in theirs.files.items()
            }
            assert sorted(real.names()) == sorted(theirs.names())
