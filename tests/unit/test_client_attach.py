"""Attaching: what a worker sees while a model arrives, when it is there, when it fails, and after it was closed."""

from __future__ import annotations

import gc
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save

import cached_client
from cached_client.errors import (
    CacheError,
    DaemonUnavailableError,
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
    OriginDeniedError,
    TimeoutExpiredError,
)
from cached_client.safetensors_header import parse_header
from cached_client.testing import FakeDaemon
from tests.unit.client_support import eventually, two_shards

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def daemon(tmp_path: Path):
    with FakeDaemon(tmp_path) as running:
        yield running


@pytest.fixture
def cache(daemon: FakeDaemon):
    with cached_client.connect(daemon.target) as connected:
        yield connected


@pytest.fixture
def files_and_tensors():
    return two_shards()


@pytest.fixture
def arriving(daemon, cache, files_and_tensors):
    """An attached model of which nothing has arrived yet."""
    daemon.add("m", files_and_tensors[0], arrived=False)
    with cache.attach("m") as model:
        yield model


def announce_file(daemon: FakeDaemon, files: dict[str, bytes], path: str) -> None:
    daemon.announce("m", path, 0, len(files[path]))


def test_a_model_that_is_there(daemon, cache, files_and_tensors) -> None:
    files, tensors = files_and_tensors
    revision = daemon.add("m", files)
    with cache.attach("m", wait=True, client_name="test") as model:
        assert (model.name, model.revision, model.complete) == ("m", revision, True)
        assert list(model.files) == list(files)
        assert model.files["config.json"].size_bytes == len(files["config.json"])
        assert model.files[FIRST].local_path is None
        assert {path: model.read(path) for path in model.files} == files
        with model.open("config.json") as config:
            assert json.load(config) == {"model_type": "test"}
        assert sorted(model.names()) == sorted(tensors)
        for name, expected in tensors.items():
            assert torch.equal(model.tensor(name), expected)
        state = model.state_dict()
        assert list(state) == model.names()
        assert all(torch.equal(state[name], tensors[name]) for name in tensors)
        assert model.report is not None
        assert (model.report.from_level, model.report.checked_by) == ("l3", "first-seen")
        assert set(model.timings) == {"opened", "first_range", "last_range", "complete"}
        assert "complete" in repr(model)
    [request] = daemon.attach_requests
    assert (request.client_name, request.resume, request.client_pid) == ("test", False, psutil.Process().pid)


def test_closing_ends_the_lease_and_spares_the_tensors(daemon, cache, files_and_tensors) -> None:
    files, tensors = files_and_tensors
    daemon.add("m", files)
    model = cache.attach("m", wait=True)
    kept = model.tensor("layer.0.weight")
    assert daemon.lease_count == 1
    model.close()
    model.close()
    assert daemon.lease_count == 0, "the daemon was told before close returned"
    assert torch.equal(kept, tensors["layer.0.weight"])
    with pytest.raises(CacheError, match="closed"):
        model.tensor("layer.0.weight")
    with pytest.raises(CacheError, match="closed"):
        model.wait()


def test_a_dropped_model_gives_its_lease_back(daemon, cache, files_and_tensors) -> None:
    daemon.add("m", files_and_tensors[0])
    kept = cache.attach("m").tensor("layer.0.weight")
    eventually(lambda: daemon.lease_count == 0, "the end of the lease")
    assert torch.equal(kept, files_and_tensors[1]["layer.0.weight"])


def test_nothing_of_ours_stays_behind(daemon, files_and_tensors) -> None:
    daemon.add("m", files_and_tensors[0])

    def round_trips():
        with cached_client.connect(daemon.target) as cache:
            cache.attach("m", wait=True).state_dict()
            with cache.attach("m") as model:
                list(model.stream())
                assert model.files
            cache.attach("m")
            with pytest.raises(OriginDeniedError):
                cache.attach("broken", wait=True)

    daemon.add("broken", files_and_tensors[0], arrived=False)
    daemon.fail("broken", OriginDeniedError("no"))
    round_trips()
    gc.collect()
    before = psutil.Process().num_fds()
    gc.disable()  # as engines do: nothing of ours may wait for a collection
    try:
        for _ in range(10):
            round_trips()
        eventually(lambda: psutil.Process().num_fds() <= before, "all descriptors closed")
    finally:
        gc.enable()
    assert not [thread for thread in threading.enumerate() if thread.name == "cached-lease"]


def test_tensors_are_views_of_one_private_mapping(daemon, cache, files_and_tensors) -> None:
    files, tensors = files_and_tensors
    daemon.add("m", files)
    header = parse_header(files[FIRST], len(files[FIRST]))
    with cache.attach("m") as model, cache.attach("m") as other:
        base = torch.frombuffer(model.view(FIRST).obj, dtype=torch.uint8).data_ptr()
        for name, info in header.tensors.items():
            assert model.tensor(name).data_ptr() == base + info.begin
            assert model.state_dict()[name].data_ptr() == base + info.begin
            assert model.numpy(name).ctypes.data == base + info.begin
        model.tensor("layer.0.weight").zero_()
        assert not model.tensor("layer.0.weight").any(), "a write is seen by whoever reads the same mapping"
        assert torch.equal(other.tensor("layer.0.weight"), tensors["layer.0.weight"])
        assert model.view(FIRST).readonly


def test_a_tensor_can_be_used_as_soon_as_its_bytes_are_there(daemon, arriving, files_and_tensors) -> None:
    files, tensors = files_and_tensors
    content = files[FIRST]
    first, second = list(parse_header(content, len(content)).tensors.values())[:2]
    with pytest.raises(TimeoutExpiredError, match="did not arrive") as caught:
        arriving.tensor(first.name, timeout_s=0.05)
    assert caught.value.fields["timeout_s"] == "0.05"

    announce_file(daemon, files, INDEX)
    daemon.announce("m", FIRST, 0, first.end)
    assert torch.equal(arriving.tensor(first.name, timeout_s=20), tensors[first.name])
    assert arriving.info(second.name, timeout_s=20).shape == tuple(tensors[second.name].shape)
    with pytest.raises(TimeoutExpiredError):
        arriving.tensor(second.name, timeout_s=0.05)
    assert not arriving.complete
    with pytest.raises(TimeoutExpiredError):
        arriving.wait(timeout_s=0.05)

    waited = []
    waiter = threading.Thread(target=lambda: waited.append(arriving.tensor(second.name, timeout_s=20)))
    waiter.start()
    daemon.announce("m", FIRST, first.end, second.end - 1)
    daemon.announce("m", FIRST, second.end - 1, second.end)
    waiter.join(20)
    assert torch.equal(waited[0], tensors[second.name])


def test_stream_yields_in_the_order_of_arrival(daemon, arriving, files_and_tensors) -> None:
    files, tensors = files_and_tensors
    infos = {path: list(parse_header(files[path], len(files[path])).tensors.values()) for path in (FIRST, SECOND)}
    announce_file(daemon, files, INDEX)
    stream = arriving.stream(timeout_s=60)

    daemon.announce("m", SECOND, 0, infos[SECOND][0].end)
    name, tensor = next(stream)
    assert name == infos[SECOND][0].name
    assert torch.equal(tensor, tensors[name])

    last = infos[FIRST][-1]
    daemon.announce("m", FIRST, last.begin, last.end)  # of a file whose header is not there yet
    daemon.announce("m", SECOND, infos[SECOND][0].end, infos[SECOND][1].end)
    assert next(stream)[0] == infos[SECOND][1].name
    daemon.announce("m", FIRST, 0, infos[FIRST][0].begin)
    assert next(stream)[0] == last.name

    announce_file(daemon, files, FIRST)
    announce_file(daemon, files, SECOND)
    rest: list[str] = []
    collector = threading.Thread(target=lambda: rest.extend(name for name, _ in stream))
    collector.start()
    seen = {infos[SECOND][0].name, infos[SECOND][1].name, last.name}
    eventually(lambda: len(rest) == len(tensors) - len(seen), "every tensor was yielded")
    assert collector.is_alive(), "it must not end before the model is complete"
    daemon.complete("m")
    collector.join(20)
    assert not collector.is_alive()
    assert sorted([*rest, *seen]) == sorted(tensors)


def test_a_stream_whose_last_check_fails_raises(daemon, arriving, files_and_tensors) -> None:
    for path in files_and_tensors[0]:
        announce_file(daemon, files_and_tensors[0], path)
    stream = arriving.stream(timeout_s=60)
    got = [next(stream) for _ in files_and_tensors[1]]
    assert len(got) == 7
    daemon.fail("m", IntegrityError("the digest differs", hint="pull again", path=FIRST))
    with pytest.raises(IntegrityError, match="the digest differs"):
        next(stream)
    with pytest.raises(IntegrityError):
        arriving.tensor("layer.0.weight")
    with pytest.raises(IntegrityError):
        arriving.state_dict()


def test_stream_of_some_names(daemon, cache, files_and_tensors) -> None:
    daemon.add("m", files_and_tensors[0])
    with cache.attach("m") as model:
        assert [name for name, _ in model.stream(names=["layer.5.bias"])] == ["layer.5.bias"]
        assert list(model.stream(names=[])) == []
        seen: list[str] = []
        with pytest.raises(NotFoundError, match="'nope'"):
            seen.extend(name for name, _ in model.stream(names=["nope", "layer.0.weight"]))
        assert not seen or seen == ["layer.0.weight"]
        with pytest.raises(InvalidRequestError, match=r"list of names.*\['layer\.5\.bias'\]"):
            next(model.stream(names="layer.5.bias"))


def test_a_failed_load_reaches_everyone_who_waits(daemon, arriving) -> None:
    caught = []

    def wait(action):
        try:
            action()
        except CacheError as error:
            caught.append(error)

    actions = [arriving.wait, arriving.names, lambda: arriving.tensor("x"), lambda: list(arriving.stream())]
    threads = [threading.Thread(target=wait, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    daemon.fail("m", OriginDeniedError("no", hint="credentials", uri="s3://b"))
    for thread in threads:
        thread.join(20)
    assert [type(error) for error in caught] == [OriginDeniedError] * 4
    assert caught[0].fields == {"uri": "s3://b"}
    assert len({id(error) for error in caught}) == 4, "each thread has an error of its own"


def test_names_that_do_not_exist(daemon, cache, files_and_tensors) -> None:
    daemon.add("m", files_and_tensors[0])
    with cache.attach("m") as model:
        for action in (model.tensor, model.numpy, model.raw, model.info):
            with pytest.raises(NotFoundError) as caught:
                action("nope")
            assert caught.value.fields == {"tensor": "nope"}
        with pytest.raises(NotFoundError) as caught:
            model.read("nope.txt")
        assert caught.value.fields == {"path": "nope.txt"}


def attach_complete(daemon, cache, files):
    daemon.add("m", files)
    return cache.attach("m", wait=True)


def test_a_model_without_safetensors(daemon, cache) -> None:
    with attach_complete(daemon, cache, {"model.gguf": b"GGUF...."}) as model:
        assert model.names() == []
        assert list(model.stream()) == []
        assert model.read("model.gguf") == b"GGUF...."
    with attach_complete(daemon, cache, {}) as model:
        assert model.state_dict() == {}
        assert dict(model.files) == {}


def test_more_files_than_one_descriptor_request_takes(daemon, cache) -> None:
    files = {f"{index:03}.safetensors": save({f"t{index}": torch.tensor([index])}) for index in range(150)}
    with attach_complete(daemon, cache, files) as model:
        assert [int(model.tensor(f"t{index}")) for index in range(150)] == list(range(150))


def test_damage_is_reported_and_those_bytes_are_refused(daemon, cache, files_and_tensors) -> None:
    files, tensors = files_and_tensors
    daemon.add("m", files)
    told: list[cached_client.DamagedRange] = []
    with cache.attach("m", wait=True, on_damaged=told.append) as model:
        info = model.info("layer.1.weight")
        daemon.damage("m", FIRST, info.begin + 5, 1)
        eventually(lambda: told, "the callback")
        assert model.damaged == tuple(told)
        assert told[0].path == FIRST
        with pytest.raises(IntegrityError, match="attach again") as caught:
            model.tensor("layer.1.weight")
        assert caught.value.fields["path"] == FIRST
        assert torch.equal(model.tensor("layer.0.weight"), tensors["layer.0.weight"])


def test_damage_before_the_end_of_a_state_dict_is_no_part_of_it(daemon, arriving, files_and_tensors) -> None:
    files, _ = files_and_tensors
    with ThreadPoolExecutor(1) as pool:
        state = pool.submit(arriving.state_dict, timeout_s=20)
        for path, content in files.items():
            daemon.announce("m", path, 0, len(content))
        eventually(lambda: "last_range" in arriving.timings and not state.done(), "all was announced")
        daemon.damage("m", FIRST, len(files[FIRST]) - 8, 8)
        eventually(lambda: arriving.damaged, "the damage is known")
        daemon.complete("m")
        with pytest.raises(IntegrityError, match="damaged"):
            state.result(20)


def test_a_callback_may_close_the_model_while_another_thread_does(daemon, cache) -> None:
    files, _ = two_shards()
    daemon.add("m", files)
    damaged, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def on_damaged(_: object) -> None:
        damaged.set()
        go_on.wait(20)
        model.close()
        closed.set()

    model = cache.attach("m", wait=True, on_damaged=on_damaged)
    daemon.damage("m", FIRST, 0, 8)
    assert damaged.wait(20)
    model.close()  # the callback is not waited for
    go_on.set()
    assert closed.wait(20)
    assert daemon.lease_count == 0


def test_a_callback_that_raises_costs_nothing(daemon, cache, files_and_tensors, caplog) -> None:
    daemon.add("m", files_and_tensors[0])

    def broken(_):
        raise ZeroDivisionError

    with cache.attach("m", wait=True, on_damaged=broken) as model:
        daemon.damage("m", "config.json", 0, 1)
        eventually(lambda: "on_damaged raised" in caplog.text, "the log")
        assert model.tensor("layer.0.weight") is not None
        assert daemon.lease_count == 1


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.register_buffer("scale", torch.zeros(2))


def test_load_into_a_module(daemon, cache) -> None:
    source = {name: torch.randn_like(tensor) for name, tensor in Net().state_dict().items()}
    with attach_complete(daemon, cache, {"model.safetensors": save(source)}) as model:
        real = Net().to(torch.float64)
        assert model.load_into(real).missing_keys == []
        assert real.linear.weight.dtype == torch.float64
        assert torch.equal(real.linear.weight.float(), source["linear.weight"])

        with torch.device("meta"):
            meta = Net()
        model.load_into(meta)
        assert torch.equal(meta.linear.weight, source["linear.weight"])
        assert meta.linear.weight.data_ptr() == model.tensor("linear.weight").data_ptr(), "zero-copy"
        assert isinstance(meta.linear.weight, torch.nn.Parameter)
        assert torch.equal(meta.scale, source["scale"])

        bigger = torch.nn.Module()
        bigger.net = Net()
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_into(bigger)
        assert model.load_into(bigger, strict=False).unexpected_keys


def test_state_dict_on_a_device(daemon, cache, files_and_tensors) -> None:
    files, tensors = files_and_tensors
    with attach_complete(daemon, cache, files) as model:
        state = model.state_dict(device="cpu")
        assert all(torch.equal(state[name], tensors[name]) for name in tensors)
        assert {tensor.device.type for tensor in model.state_dict(device="meta").values()} == {"meta"}


def test_attach_can_give_up(daemon, cache, files_and_tensors) -> None:
    daemon.add("m", files_and_tensors[0], arrived=False)
    with pytest.raises(TimeoutExpiredError, match="the model m did not arrive within"):
        cache.attach("m", wait=True, timeout_s=0.2)
    eventually(lambda: daemon.lease_count == 0, "the lease was given back")


def test_who_gives_up_does_not_wait_for_the_descriptor_socket(daemon, cache, monkeypatch: pytest.MonkeyPatch) -> None:
    files, _ = two_shards()
    daemon.add("m", files)
    asked, answer = threading.Event(), threading.Event()

    def hang(connection: socket.socket, request: dict[str, object]) -> None:
        asked.set()
        answer.wait(60)

    monkeypatch.setattr(daemon, "_answer", hang)
    with ThreadPoolExecutor(1) as pool:
        attach = pool.submit(cache.attach, "m", timeout_s=0.5)
        assert asked.wait(20)
        with pytest.raises(TimeoutExpiredError):
            attach.result(20)  # a worker's own limit, and not the 30 seconds of an answer
        assert not any(thread.name == "cached-lease" for thread in threading.enumerate())
    answer.set()


def test_without_a_daemon(tmp_path: Path) -> None:
    with cached_client.connect(str(tmp_path / "none.sock")) as cache, pytest.raises(DaemonUnavailableError):
        cache.attach("m")


def test_without_a_descriptor_socket(daemon, cache, files_and_tensors, tmp_path: Path) -> None:
    daemon.add("m", files_and_tensors[0])
    daemon.announced_descriptor_socket = "/nowhere/other.sock"
    with pytest.raises(DaemonUnavailableError) as caught:
        cache.attach("m")
    assert caught.value.fields["target"] == str(tmp_path / "other.sock")
    eventually(lambda: daemon.lease_count == 0, "the lease was given back")


def test_in_a_container_the_sockets_folder_is_mounted_elsewhere(daemon, cache, files_and_tensors) -> None:
    daemon.add("m", files_and_tensors[0])
    daemon.announced_descriptor_socket = "/run/cached-of-the-host/descriptors.sock"
    with cache.attach("m", wait=True) as model:
        assert model.read("config.json") == files_and_tensors[0]["config.json"]


def test_closing_the_cache_closes_its_models(daemon, files_and_tensors) -> None:
    daemon.add("m", files_and_tensors[0])
    with cached_client.connect(daemon.target) as cache:
        model = cache.attach("m")
    assert daemon.lease_count == 0
    with pytest.raises(CacheError, match="closed"):
        model.read("config.json")


def test_many_threads_read_one_model_while_it_arrives(daemon, arriving, files_and_tensors) -> None:
    files, tensors = files_and_tensors
    results = []
    readers = [
        threading.Thread(target=lambda: results.append(dict(arriving.stream(timeout_s=60)))) for _ in range(4)
    ] + [threading.Thread(target=lambda: results.append(arriving.state_dict(timeout_s=60))) for _ in range(4)]
    for reader in readers:
        reader.start()
    for path, content in files.items():
        for begin in range(0, len(content), 5000):
            daemon.announce("m", path, begin, min(begin + 5000, len(content)))
    daemon.complete("m")
    for reader in readers:
        reader.join(60)
    assert len(results) == 8
    for result in results:
        assert all(torch.equal(result[name], tensors[name]) for name in tensors)


def test_numpy_arrays(daemon, cache, files_and_tensors) -> None:
    with attach_complete(daemon, cache, files_and_tensors[0]) as model:
        array = model.numpy("layer.0.weight")
        assert array.dtype == np.float32
        assert np.array_equal(array, files_and_tensors[1]["layer.0.weight"].numpy())
