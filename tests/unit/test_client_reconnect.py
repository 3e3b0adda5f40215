"""The daemon is restarted, or gone for good, while a worker holds a model."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import cached_client
from cached_client import _lease
from cached_client.errors import CacheError, IntegrityError, LeaseLostError, NotFoundError, error_of_reason
from cached_client.safetensors_header import parse_header
from cached_client.testing import FakeDaemon
from tests.unit.client_support import eventually, two_shards

FIRST = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def daemon(tmp_path: Path):
    with FakeDaemon(tmp_path) as running:
        yield running


@pytest.fixture
def cache(daemon: FakeDaemon):
    with cached_client.connect(daemon.target) as connected:
        yield connected


@pytest.fixture(scope="module")
def files():
    return two_shards()[0]


@pytest.fixture(scope="module")
def tensors():
    return two_shards()[1]


def test_a_complete_model_does_not_notice(daemon, cache, files, tensors) -> None:
    revision = daemon.add("m", files)
    with cache.attach("m", wait=True) as model:
        view = model.view(FIRST)
        daemon.stop()
        assert all(torch.equal(model.tensor(name), tensors[name]) for name in tensors)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.stream())
        assert dict(model.files), "what needs the daemon is left out, not failed"
        daemon.start()
        eventually(lambda: daemon.lease_count == 1 and model._lease._held, "the lease was taken up again")
        again = daemon.attach_requests[-1]
        assert (again.ref, again.resume) == (f"m@{revision}", True)
        assert model.view(FIRST).obj is view.obj, "the mapping is the same"
        assert model.lease_lost is None
    assert daemon.lease_count == 0, "and close ends the new lease"


def test_several_restarts(daemon, cache, files) -> None:
    daemon.add("m", files)
    with cache.attach("m", wait=True) as model:
        for _ in range(3):
            daemon.stop()
            daemon.start()
            eventually(lambda: daemon.lease_count == 1, "the lease was taken up again")
        assert model.complete


def test_the_model_goes_on_without_a_lease_when_the_content_is_gone(daemon, cache, files, tensors, caplog) -> None:
    daemon.add("m", files)
    with cache.attach("m", wait=True) as model:
        daemon.stop()
        daemon.remove("m")
        daemon.start()
        lost = eventually(lambda: model.lease_lost, "the lease was lost")
        assert isinstance(lost, LeaseLostError)
        assert isinstance(lost.__cause__, NotFoundError)
        assert "goes on from its mappings" in caplog.text
        assert all(torch.equal(model.tensor(name), tensors[name]) for name in tensors)
        assert model.complete


@pytest.mark.parametrize("reason", ["LIMIT_EXCEEDED", "MOVER_FAILED", "LEVEL_FAILED", "ORIGIN_UNAVAILABLE", "INTERNAL"])
def test_a_lease_is_asked_for_again_until_the_daemon_says_that_the_content_is_gone(
    daemon, cache, files, tensors, reason
) -> None:
    daemon.add("m", files)
    news = daemon._models["m"].news
    error = error_of_reason(reason, "not now")
    with cache.attach("m", wait=True) as model:
        daemon.stop()
        news.insert(0, error)  # said once the lease is opened: its content could not be confirmed
        daemon.start()
        eventually(lambda: len(daemon.attach_requests) >= 4, "asked again and again")
        assert model.lease_lost is None
        assert model._lease._delay_s >= 4 * _lease._FIRST_DELAY_S, "rarer and rarer"
        news.remove(error)
        eventually(lambda: model._lease._delay_s == _lease._FIRST_DELAY_S, "the lease was taken up again")
        assert daemon.lease_count == 1
        assert all(request.resume for request in daemon.attach_requests[1:])
        daemon.stop()
        news.insert(0, error)
        daemon.start()
        asked = len(daemon.attach_requests)
        eventually(lambda: len(daemon.attach_requests) > asked, "asked again")
        daemon.remove("m")
        assert isinstance(eventually(lambda: model.lease_lost, "the lease was lost").__cause__, NotFoundError)
        assert all(torch.equal(model.tensor(name), tensors[name]) for name in tensors)


@pytest.mark.parametrize("reason", ["NOT_FOUND", "QUARANTINED", "PERMISSION_DENIED"])
def test_what_the_daemon_says_for_good_ends_a_lease(daemon, cache, files, reason) -> None:
    daemon.add("m", files)
    with cache.attach("m", wait=True) as model:
        daemon.stop()
        daemon._models["m"].news.insert(0, error_of_reason(reason, "never again"))
        daemon.start()
        lost = eventually(lambda: model.lease_lost, "the lease was lost")
        assert lost.__cause__.reason == reason
        assert len(daemon.attach_requests) == 2


def test_a_download_goes_on_after_a_restart(daemon, cache, files, tensors) -> None:
    daemon.add("m", files, arrived=False)
    first = next(iter(parse_header(files[FIRST], len(files[FIRST])).tensors.values()))
    with cache.attach("m") as model:
        daemon.announce("m", INDEX, 0, len(files[INDEX]))
        daemon.announce("m", FIRST, 0, first.end)
        stream = model.stream(timeout_s=60)
        name, early = next(stream)
        daemon.stop()
        daemon.start()
        for path, content in files.items():
            daemon.announce("m", path, 0, len(content))
        daemon.complete("m")
        rest = dict(stream)
        assert model.complete
        assert {name, *rest} == set(tensors)
        assert torch.equal(early, tensors[name])
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in rest.items())
        assert not daemon.attach_requests[-1].resume, "it is still to be pulled"


def test_segments_that_were_begun_anew_are_mapped_again(daemon, cache, files, tensors) -> None:
    daemon.add("m", files, arrived=False)
    first = next(iter(parse_header(files[FIRST], len(files[FIRST])).tensors.values()))
    with cache.attach("m") as model:
        daemon.announce("m", INDEX, 0, len(files[INDEX]))
        daemon.announce("m", FIRST, 0, first.end)
        early = model.tensor(first.name, timeout_s=20)
        daemon.stop()
        daemon.remove("m")
        daemon.add("m", files, arrived=False)  # new segments, nothing in them
        daemon.start()
        eventually(lambda: len(daemon.attach_requests) == 2, "attached again")
        eventually(lambda: not model._arrivals.spans(list(files).index(FIRST)), "what was announced is forgotten")
        for path, content in files.items():
            daemon.announce("m", path, 0, len(content))
        daemon.complete("m")
        state = model.state_dict(timeout_s=60)
        assert all(torch.equal(state[name], tensors[name]) for name in tensors)
        assert torch.equal(early, tensors[first.name]), "what was handed out stays valid"
        assert early.data_ptr() != state[first.name].data_ptr()


def test_a_failure_after_a_restart_is_the_answer(daemon, cache, files) -> None:
    daemon.add("m", files, arrived=False)
    with cache.attach("m") as model:
        daemon.stop()
        daemon.remove("m")
        daemon.start()
        with pytest.raises(NotFoundError):
            model.wait(timeout_s=60)


def test_other_files_under_the_same_name_are_refused(daemon, cache, files) -> None:
    daemon.add("m", files, arrived=False)
    with cache.attach("m") as model:
        daemon.stop()
        revision = model.revision
        daemon.remove("m")
        daemon.add("m", {"other": b"content"}, arrived=False)
        daemon._models["m"].revision = revision
        daemon.start()
        with pytest.raises(IntegrityError, match="not what they were"):
            model.wait(timeout_s=60)


def test_closing_while_the_daemon_is_gone(daemon, cache, files, monkeypatch) -> None:
    monkeypatch.setattr(_lease, "_FIRST_DELAY_S", 600.0)
    daemon.add("m", files)
    model = cache.attach("m", wait=True)
    daemon.stop()
    model.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "cached-lease"]


def test_waiting_ends_when_the_model_is_closed(daemon, cache, files) -> None:
    daemon.add("m", files, arrived=False)
    model = cache.attach("m")
    caught = []

    def wait() -> None:
        try:
            model.wait()
        except CacheError as error:
            caught.append(error.reason)

    waiter = threading.Thread(target=wait)
    waiter.start()
    model.close()
    waiter.join(20)
    assert caught == ["CLOSED"]


def test_pauses_grow_and_differ() -> None:
    class Quiet(_lease.Lease):
        def __init__(self):
            self._delay_s = _lease._FIRST_DELAY_S

    pauses = [[lease._next_delay_s() for _ in range(10)] for lease in (Quiet(), Quiet())]
    assert pauses[0] != pauses[1]
    for one in pauses:
        assert one[0] <= 0.1
        assert 2.5 <= one[-1] <= 5.0


def test_a_program_may_end_without_closing_anything(daemon, files) -> None:
    daemon.add("m", files)
    code = (
        "import sys, cached_client\n"
        "model = cached_client.connect(sys.argv[1]).attach('m', wait=True)\n"
        "print(model.complete)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, daemon.target], capture_output=True, text=True, check=True, timeout=60
    )
    assert (ended.stdout, ended.stderr) == ("True\n", "")
    eventually(lambda: daemon.lease_count == 0, "the lease ended with the process")
