"""Compile artifacts through the whole: a worker saves on one host, another restores on the next, by way of S3."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import cached_client
from cached.cli.main import main
from cached_client import artifacts
from cached_client._proto import cached_pb2 as pb
from cached_client.artifacts.archive import PIECE_BYTES
from cached_client.descriptors import DescriptorClient
from tests.integration.harness import DaemonProcess, wait_for
from tests.integration.support import MB, SERVE, Site, flip_byte, model_files, random_bytes, refused
from tests.invariants import check_at_rest

KEY = {"model": "llama-13b", "engine": "torch", "engine_version": "2.13.0", "gpu_arch": "sm_90", "driver": "580.65.06"}
FILES = {"fxgraph/ab/graph": random_bytes(200_000, 1), "cd/kernel.so": random_bytes(1_500_000, 2), "e/empty": b""}


@pytest.fixture
def host(site: Site) -> Site:
    """Workers may save, and S3 is the destination."""
    site.settings["artifacts"] = {"save": True, "destination": site.uri("artifacts")}
    return site


@contextlib.contextmanager
def another_host(site: Site, **settings: object) -> Iterator[DaemonProcess]:
    """A daemon with nothing of its own that knows the same destination."""
    own = {**site.settings, "artifacts": {"destination": site.uri("artifacts"), **settings}}
    environment = site.environment()
    daemon = DaemonProcess(site.folder / "b", settings=own, environment=environment, command=SERVE)
    with daemon:
        yield daemon
        gc.collect()  # an error that was raised holds the frames that map what it is about
        check_at_rest(daemon)


def fill(folder: Path, files: Mapping[str, bytes] = FILES) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save(daemon: DaemonProcess, folder: Path, key: Mapping[str, str] = KEY, **options: str) -> artifacts.Saved:
    with cached_client.connect(str(daemon.socket)) as cache:
        return artifacts.save(cache, folder, key, timeout_s=60, **options)


def restore(daemon: DaemonProcess, folder: Path, key: Mapping[str, str] = KEY) -> artifacts.Restored | artifacts.Missed:
    with cached_client.connect(str(daemon.socket)) as cache:
        return artifacts.restore(cache, folder, key, timeout_s=60)


def known(daemon: DaemonProcess, *, remote: bool = False) -> list[pb.Artifact]:
    with daemon.stub() as stub:
        return list(stub.ListArtifacts(pb.ListArtifactsRequest(remote=remote)).artifacts)


def uploaded(daemon: DaemonProcess) -> pb.Artifact:
    return wait_for(lambda: [item for item in known(daemon) if item.source], "the upload")[0]


def key_of(site: Site, name: str, path: str) -> str:
    return f"artifacts/{name.removeprefix('artifact.')}/{path}"


def test_what_one_host_compiled_another_restores(host: Site, tmp_path: Path) -> None:
    folder = fill(tmp_path / "in")
    (folder / "cd/kernel.so").chmod(0o755)
    with_a = host.start()
    saved = save(with_a, folder)
    assert (saved.outcome, saved.files) == ("stored", len(FILES))
    assert save(with_a, folder).outcome == "same"
    item = uploaded(with_a)
    assert (dict(item.key), item.sha256, list(item.levels)) == (KEY, saved.sha256, [pb.LEVEL_L2])
    assert item.source == f"{host.uri('artifacts')}/{item.name.removeprefix('artifact.')}"
    with another_host(host) as with_b:
        assert [(i.name, list(i.levels)) for i in known(with_b, remote=True)] == [(item.name, [])]
        first = restore(with_b, tmp_path / "out")
        assert isinstance(first, artifacts.Restored)
        assert (first.sha256, first.added_files, first.from_level) == (saved.sha256, len(FILES), "l3")
        assert contents(tmp_path / "out") == FILES
        assert os.access(tmp_path / "out/cd/kernel.so", os.X_OK)
        wait_for(lambda: list(known(with_b)[0].levels) == [pb.LEVEL_L2], "it to be on disk, and no longer in memory")
        gets = len(host.proxy.requests("GET"))
        second = restore(with_b, tmp_path / "again")
        assert isinstance(second, artifacts.Restored)
        assert second.from_level == "l2"
        assert len(host.proxy.requests("GET")) == gets, "the second start asks nobody"
        third = restore(with_b, tmp_path / "out")
        assert isinstance(third, artifacts.Restored)
        assert (third.added_files, third.kept_files) == (0, len(FILES))


def test_nothing_is_restored_across_a_difference(host: Site, tmp_path: Path) -> None:
    save(host.start(), fill(tmp_path / "in"))
    uploaded(host.daemon)
    save(host.daemon, fill(tmp_path / "in"), {"model": "quite", "engine": "another"})
    with another_host(host) as fresh:
        for daemon, field in itertools.product((host.daemon, fresh), ("driver", "gpu_arch", "engine_version", "cuda")):
            missed = restore(daemon, tmp_path / "out", KEY | {field: "other"})
            assert isinstance(missed, artifacts.Missed)
            assert missed.differences == (artifacts.Difference(field, "other", KEY.get(field, "")),)
            assert field in missed.reason
            assert not (tmp_path / "out").exists()
        assert not known(fresh)
    nothing = restore(host.daemon, tmp_path / "out", {"model": "m", "engine": "e"})
    assert isinstance(nothing, artifacts.Missed)


def test_what_is_wrong_at_the_destination_is_refused(host: Site, tmp_path: Path) -> None:
    save(host.start(), fill(tmp_path / "in"))
    item = uploaded(host.daemon)
    archive, key = key_of(host, item.name, item.archive_path), key_of(host, item.name, "key.json")
    data = host.server.get(host.bucket, archive)
    wrong = {
        "a flipped bit": (archive, data[:999_999] + bytes([data[999_999] ^ 1]) + data[1_000_000:]),
        "cut off": (archive, data[: 1024 * 1024]),
        "another archive": (archive, b"".join(artifacts.Archive(fill(tmp_path / "x", {"evil": b"x"})).pieces())),
        "another key": (key, json.dumps({"format": 1, "key": KEY | {"driver": "1"}}).encode()),
    }
    right = {path: host.server.get(host.bucket, path) for path in (archive, key)}
    with another_host(host) as fresh:
        for damage, (path, content) in wrong.items():
            host.put(path, content)
            with refused("INTEGRITY") as seen:
                restore(fresh, tmp_path / "out")
            assert seen["check"] == "name-sha256", damage
            assert not (tmp_path / "out").exists()
            assert not known(fresh)
            host.put(path, right[path])
        host.server.delete(host.bucket, key)  # as while it is being uploaded
        assert isinstance(restore(fresh, tmp_path / "out"), artifacts.Missed)
        host.put(key, right[key])
        assert isinstance(restore(fresh, tmp_path / "out"), artifacts.Restored)


# Saves that compete, and saves that fail.


@contextlib.contextmanager
def half_sent(daemon: DaemonProcess, archive: artifacts.Archive) -> Iterator[tuple[threading.Event, list[str]]]:
    """A save that has sent half of its bytes, and goes on with the event; how it ended is in the list."""
    go_on, ended = threading.Event(), []

    def messages() -> Iterator[pb.PutArtifactRequest]:
        with DescriptorClient(daemon.descriptor_socket) as descriptors:
            ticket = descriptors.ticket()
        size_bytes = archive.size_bytes
        yield pb.PutArtifactRequest(
            offer=pb.ArtifactOffer(ticket=ticket, key=KEY, size_bytes=size_bytes, sha256=archive.sha256())
        )
        for number, piece in enumerate(archive.pieces()):
            if number == 2:
                go_on.wait(60)
            yield pb.PutArtifactRequest(data=piece)

    def send() -> None:
        with cached_client.connect(str(daemon.socket)) as cache:
            try:
                answer = cache.connection.call(cache.connection.stub.PutArtifact, messages())
                ended.append(pb.PutArtifactResponse.Outcome.Name(answer.outcome))
            except cached_client.CacheError as error:
                ended.append(error.reason)

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send)
        try:
            wait_for(lambda: any(level.reserved_bytes for level in daemon.stats().levels), "the save to be under way")
            yield go_on, ended
        finally:
            go_on.set()
            sending.result(60)


def test_of_two_saves_at_once_one_wins(host: Site, tmp_path: Path) -> None:
    daemon = host.start()
    mine = artifacts.Archive(fill(tmp_path / "mine"))
    others = fill(tmp_path / "other", FILES | {"more": b"1"})
    with half_sent(daemon, mine) as (_, ended):
        assert save(daemon, others).outcome == "busy"
        assert isinstance(restore(daemon, tmp_path / "early"), artifacts.Missed), "nothing of it is seen before its end"
    assert ended == ["OUTCOME_STORED"]
    assert save(daemon, others).outcome == "other"
    assert save(daemon, others, replaces="ab" * 32).outcome == "other", "it does not replace what it has not seen"
    replaced = save(daemon, others, replaces=mine.sha256())
    assert replaced.outcome == "stored"
    wait_for(lambda: [(item.generation, bool(item.source)) for item in known(daemon)] == [(2, True)], "the new one")
    assert isinstance(restore(daemon, tmp_path / "out"), artifacts.Restored)
    assert contents(tmp_path / "out") == FILES | {"more": b"1"}
    check_at_rest(daemon)  # of the first one nothing is left
    with another_host(host) as fresh:
        restored = restore(fresh, tmp_path / "late")
        assert isinstance(restored, artifacts.Restored)
        assert restored.sha256 == replaced.sha256


def test_one_that_was_evicted_is_saved_again(host: Site, tmp_path: Path) -> None:
    del host.settings["artifacts"]["destination"]
    daemon, folder = host.start(), fill(tmp_path / "in")
    for _ in range(2):
        assert save(daemon, folder).outcome == "stored"
        assert isinstance(restore(daemon, tmp_path / "out"), artifacts.Restored)
        wait_for(lambda: not host.leases(), "its lease to end")
        host.evict(known(daemon)[0].name, "all")
    assert isinstance(restore(daemon, tmp_path / "out"), artifacts.Missed)


def test_what_is_damaged_here_is_replaced_by_what_is_saved(host: Site, tmp_path: Path) -> None:
    """The key has the same content in every generation, and so the same file."""
    del host.settings["artifacts"]["destination"]
    daemon = host.start()
    assert save(daemon, fill(tmp_path / "in")).outcome == "stored"
    name = known(daemon)[0].name
    for blob in daemon.l2_dir.glob("blobs/*/*"):
        flip_byte(blob, 100)
    host.verify(name, repair=True)
    assert isinstance(restore(daemon, tmp_path / "out"), artifacts.Missed)
    assert save(daemon, tmp_path / "in").outcome == "stored"
    assert isinstance(restore(daemon, tmp_path / "out"), artifacts.Restored)
    assert contents(tmp_path / "out") == FILES


def test_a_daemon_that_is_killed_during_a_save_keeps_nothing_of_it(host: Site, tmp_path: Path) -> None:
    daemon = host.start()
    with half_sent(daemon, artifacts.Archive(fill(tmp_path / "in"))) as (go_on, ended):
        daemon.kill()
        go_on.set()
    assert ended == ["DAEMON_UNAVAILABLE"]
    daemon.start()
    assert not known(daemon)
    check_at_rest(daemon)
    assert host.level("l2").used_bytes == 0
    assert save(daemon, tmp_path / "in").outcome == "stored"
    assert isinstance(restore(daemon, tmp_path / "out"), artifacts.Restored)
    daemon.restart(kill=True)
    again = restore(daemon, tmp_path / "again")
    assert isinstance(again, artifacts.Restored)
    assert contents(tmp_path / "again") == FILES


def offered(daemon: DaemonProcess, data: list[bytes], *, ticket: str = "", **changes: object) -> pb.PutArtifactResponse:
    whole = b"".join(data)
    with DescriptorClient(daemon.descriptor_socket) as descriptors, cached_client.connect(str(daemon.socket)) as cache:
        offer = {
            "ticket": ticket or descriptors.ticket(), "key": KEY, "size_bytes": len(whole),
            "sha256": hashlib.sha256(whole).hexdigest(), **changes,
        }  # fmt: skip
        first = pb.PutArtifactRequest(offer=pb.ArtifactOffer(**offer))
        messages = [first, *(pb.PutArtifactRequest(data=piece) for piece in data)]
        return cache.connection.call(cache.connection.stub.PutArtifact, iter(messages))


WRONG_SAVES: list[tuple[list[bytes], dict[str, object], str]] = [
    ([b"a" * 100], {"sha256": "ab" * 32}, "INTEGRITY"),
    ([b"a" * 100], {"size_bytes": 99}, "INTEGRITY"),
    ([b"a" * 100], {"size_bytes": 101}, "INTEGRITY"),
    ([b"a" * 100], {"sha256": "nonsense"}, "INVALID_REQUEST"),
    ([b"a" * 100], {"key": {"model": "m"}}, "INVALID_REQUEST"),
    ([b"a" * 100], {"ticket": "forged"}, "PERMISSION_DENIED"),
    ([b"a" * 100], {"size_bytes": 3 * 1024**3}, "INVALID_REQUEST"),
    ([b""], {}, "INVALID_REQUEST"),
    ([b"a" * (PIECE_BYTES + 1)], {}, "INVALID_REQUEST"),
]


def test_a_save_that_is_wrong_leaves_nothing(host: Site) -> None:
    host.settings["artifacts"]["max_size"] = "2GiB"
    host.start()
    for data, changes, reason in WRONG_SAVES:
        with refused(reason):
            offered(host.daemon, data, **changes)
    assert not known(host.daemon)
    check_at_rest(host.daemon)
    assert host.level("l2").used_bytes == 0
    with host.rpc() as stub:
        assert not stub.List(pb.ListRequest()).models


def test_a_ticket_is_good_for_one_save(host: Site) -> None:
    host.start()
    with DescriptorClient(host.daemon.descriptor_socket) as descriptors:
        ticket = descriptors.ticket()
    assert offered(host.daemon, [b"a" * 100], ticket=ticket).outcome == pb.PutArtifactResponse.OUTCOME_STORED
    with refused("PERMISSION_DENIED"):
        offered(host.daemon, [b"b" * 100], ticket=ticket, key=KEY | {"driver": "1"})
    # Nobody said that it is an archive: whoever restores it finds out, and gets nothing.
    with refused("INTEGRITY"):
        restore(host.daemon, host.folder / "out")
    assert not (host.folder / "out").exists()


def test_where_saving_is_off_artifacts_are_restored_and_never_saved(host: Site, tmp_path: Path) -> None:
    save(host.start(), fill(tmp_path / "in"))
    uploaded(host.daemon)
    with another_host(host) as reader:
        assert isinstance(restore(reader, tmp_path / "out"), artifacts.Restored)
        with refused("PERMISSION_DENIED") as seen:
            save(reader, fill(tmp_path / "in", {"more": b"1"}), KEY | {"driver": "1"})
        assert "artifacts.save" in seen["hint"]
        assert len(known(reader)) == 1


def test_the_largest_size_holds_for_saving_and_for_what_the_destination_has(host: Site, tmp_path: Path) -> None:
    save(host.start(), fill(tmp_path / "in"))
    uploaded(host.daemon)
    with another_host(host, save=True, max_size="1MiB") as small:
        for act in (
            lambda: save(small, tmp_path / "in", KEY | {"driver": "1"}),
            lambda: restore(small, tmp_path / "out"),
        ):
            with refused("INVALID_REQUEST") as seen:
                act()
            assert seen["max_bytes"] == str(1024**2)


def test_a_full_disk_refuses_a_save_and_keeps_what_it_has(host: Site, tmp_path: Path) -> None:
    host.settings["l2"] = {"capacity": "12MB"}
    host.add("m", model_files(11 * MB), pinned=True)
    host.start()
    host.pull("m")
    wait_for(lambda: host.summary("m").l2_bytes, "the copy on disk")
    with refused("NO_ROOM") as seen:
        save(host.daemon, fill(tmp_path / "in"))
    assert seen["level"] == "l2"
    assert not known(host.daemon)
    assert host.summary("m").l2_bytes


def test_an_upload_that_fails_is_told_and_tried_again_also_after_a_restart(host: Site, tmp_path: Path) -> None:
    daemon = host.start()
    # The save itself looks at the destination, which works; only writing to it does not.
    fault = host.proxy.inject("status", times=-1, method="PUT", status=403)
    assert save(daemon, fill(tmp_path / "in")).outcome == "stored"
    item = wait_for(lambda: [item for item in known(daemon) if item.upload_error], "the failure to be told")[0]
    assert not item.source
    assert any("artifact" in problem for problem in daemon.stats().degraded)
    assert isinstance(restore(daemon, tmp_path / "out"), artifacts.Restored), "this host has it anyhow"
    daemon.kill()
    fault.times = 0
    daemon.start()
    uploaded(daemon)
    assert not known(daemon)[0].upload_error
    assert not daemon.stats().degraded


def test_a_destination_that_does_not_answer_keeps_nobody_from_saving(host: Site, tmp_path: Path) -> None:
    host.settings["transfer"] = {"max_attempts": 2}
    daemon = host.start()
    fault = host.proxy.inject("status", times=-1, status=403)
    assert save(daemon, fill(tmp_path / "in")).outcome == "stored"
    assert isinstance(restore(daemon, tmp_path / "out"), artifacts.Restored)
    with refused("ORIGIN_DENIED"):
        restore(daemon, tmp_path / "out", KEY | {"driver": "1"})
    fault.times = 0


def test_nothing_else_gets_an_artifacts_name(host: Site, tmp_path: Path) -> None:
    host.upload("evil", {"key.json": b"{}", "model.safetensors": b"x" * 100})
    host.start()
    name = f"artifact.{'ab' * 32}"
    for source in (host.uri("evil"), "file:///tmp"):
        with refused("INVALID_REQUEST") as seen:
            host.pull(name, source=source)
        assert "artifacts.destination" in seen["hint"]
    with refused("NOT_FOUND"):
        host.pull(name)


# As workers and people use it.


def test_a_compile_cache_is_restored_before_and_saved_after(host: Site, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/as/before")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    host.start()

    def worker(name: str, new: Mapping[str, bytes], **options: object) -> artifacts.CompileCache:
        with (
            host.cache() as cache,
            artifacts.compile_cache(
                cache,
                model="m",
                engine="torch",
                directory=tmp_path / name,
                set_environment=True,
                strict=True,
                **options,
            ) as session,
        ):
            fill(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]), new)
            assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / name / "triton")
        assert os.environ["TRITON_CACHE_DIR"] == "/as/before"
        assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
        return session

    first = worker("first", {"a": b"1"})
    assert isinstance(first.restored, artifacts.Missed)
    assert first.saved
    assert first.saved.outcome == "stored"
    second = worker("second", {})
    assert isinstance(second.restored, artifacts.Restored)
    assert second.saved is None, "nothing new, nothing to save"
    third = worker("third", {"b": b"2"})
    assert third.saved
    assert third.saved.outcome == "stored", "what it had restored is replaced by that and what is new"
    last = worker("last", {"c": b"3"}, save_new=False)
    assert last.saved is None
    assert contents(tmp_path / "last") == {"inductor/a": b"1", "inductor/b": b"2", "inductor/c": b"3"}
    other = worker("other", {"d": b"4"}, device="cpu", revision="r2")
    assert isinstance(other.restored, artifacts.Missed)


def test_a_cache_that_does_not_work_keeps_no_worker_from_starting(tmp_path: Path, caplog) -> None:
    with cached_client.connect(str(tmp_path / "nobody.sock")) as cache:
        with artifacts.compile_cache(cache, model="m", engine="e", directory=tmp_path / "d") as session:
            fill(tmp_path / "d", {"a": b"1"})
        assert isinstance(session.error, cached_client.DaemonUnavailableError)
        assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
        with (
            pytest.raises(cached_client.DaemonUnavailableError),
            artifacts.compile_cache(cache, model="m", engine="e", directory=tmp_path / "d", strict=True),
        ):
            pass


def test_the_command(host: Site, tmp_path: Path, capsys) -> None:
    host.start()
    fill(tmp_path / "in")
    (tmp_path / "in" / "link").symlink_to("elsewhere")
    key = ["--model", "llama-13b", "--engine", "torch", "--device", "cpu"]

    def run(*words: str, code: int = 0) -> str:
        assert main(["--socket", str(host.daemon.socket), *words]) == code, capsys.readouterr()
        captured = capsys.readouterr()
        return captured.out + captured.err

    assert "nothing of" not in run("artifact", "ls")
    answer = run("artifact", "save", str(tmp_path / "in"), *key)
    assert "saved 3 files" in answer
    assert "left out: link" in answer
    assert "was there already" in run("artifact", "save", str(tmp_path / "in"), *key)
    (tmp_path / "in" / "more").write_bytes(b"1")
    assert "--replace takes its place" in run("artifact", "save", str(tmp_path / "in"), *key)
    assert "saved 4 files" in run("artifact", "save", str(tmp_path / "in"), *key, "--replace")
    missed = run("artifact", "restore", str(tmp_path / "out"), *key, "--key", "dtype=bf16", code=3)
    assert "the nearest differs in dtype" in missed
    assert "restored 4 files" in run("artifact", "restore", str(tmp_path / "out"), *key)
    uploaded(host.daemon)
    listed = run("artifact", "ls").splitlines()
    assert len(listed) == 2
    assert "L2 S3" in listed[1]
    name = listed[1].split()[0]
    assert "artifact." not in run("ls")
    assert f"artifact.{name}" in run("ls", "--all")
    removed = run("artifact", "rm", name)
    assert "it is still at s3://" in removed
    assert not known(host.daemon)
    assert json.loads(run("artifact", "ls", "--remote", "-o", "json"))[0]["key"]["model"] == "llama-13b"
    assert "there is no artifact" in run("artifact", "rm", name, code=3)
    assert json.loads(run("artifact", "key", *key, "-o", "json"))["engine"] == "torch"
