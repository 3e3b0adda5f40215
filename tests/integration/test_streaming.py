"""Cold attaches that stream: what comes first, what is announced when, and that a reader does not wait for the rest."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import cached_client
from cached.cache import build
from cached.origins.base import OriginSpec
from cached.transfer.jobs import Prepare
from cached.transfer.pool import MoverPool
from cached.units import CHUNK_BYTES
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import DEADLINE_S
from tests.integration.hosts import Host, MovedClock, pull
from tests.integration.mover_support import pool_of, until
from tests.integration.support import MB, Site, model_files, sha256, total_bytes

PIECE_BYTES = CHUNK_BYTES // 8
PIECES = [f"bytes={at}-{at + PIECE_BYTES - 1}" for at in range(0, CHUNK_BYTES, PIECE_BYTES)]
SHARDS = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]


def announced(site: Site, ref: str) -> list[pb.AttachResponse]:
    """All messages of an attach up to its completion."""
    messages = []
    with site.daemon.stub() as stub:
        stream = stub.Attach(pb.AttachRequest(ref=ref, client_name="test"), timeout=DEADLINE_S)
        for message in stream:
            messages.append(message)
            if message.HasField("complete"):
                break
        stream.cancel()
    return messages


def test_tensors_of_the_first_file_are_yielded_while_the_last_file_is_held(site: Site) -> None:
    files = site.add("m", model_files(2 * CHUNK_BYTES, 2 * CHUNK_BYTES))
    second = max(path for path in files if path.endswith(".safetensors"))
    # Two files of the same tensor names make no model: this one has its own.
    files[second] = files[second].replace(b'"t', b'"u')
    site.put(f"m/{second}", files[second])
    site.start()
    held = site.hold(second, times=-1)
    with site.attach("m") as model:
        arriving = model.stream(timeout_s=DEADLINE_S)
        name, tensor = next(arriving)
        assert (name, len(tensor)) == ("t0.weight", model.info("t0.weight").shape[0])
        assert [next(arriving)[0] for _ in range(2)] == ["t1.weight", "t2.weight"]
        assert site.proxy.get_bytes(second) == 0
        assert site.proxy.get_bytes() <= total_bytes(files) - len(files[second])
        assert not model.complete
        held.times = 0
        held.release()
        assert [name for name, _ in arriving] == ["u0.weight", "u1.weight", "u2.weight"]
        assert model.complete


def test_files_are_asked_for_in_order_and_the_head_of_the_first_by_all_connections(site: Site) -> None:
    sizes = [len(data) for data in (site.add("m", model_files(*[2 * CHUNK_BYTES + MB] * 3))[path] for path in SHARDS)]
    site.settings |= {"transfer": {"movers": 1, "max_ranges": 2, "hedging": False}}
    site.start()
    assert site.pull("m")[-1].phase == "ready"
    asked = [(item.path.rpartition("/")[2], item.range) for item in site.proxy.gets("model-0")]
    rest = [
        (path, f"bytes={at}-{min(at + CHUNK_BYTES, size) - 1}")
        for path, size in zip(SHARDS, sizes, strict=True)
        for at in range(0, size, CHUNK_BYTES)
    ]
    expected = [(SHARDS[0], piece) for piece in PIECES] + rest[1:]
    assert sorted(asked) == sorted(expected)
    # Two are under way at any time, so neighbours may overtake each other at the proxy.
    assert all(abs(asked.index(item) - place) <= 2 for place, item in enumerate(expected))
    small = [place for place, item in enumerate(site.proxy.gets()) if item.path.endswith(".json")]
    assert max(small) < len(small) + 2


@pytest.mark.parametrize("kind", ["reset", "truncate", "status"])
def test_a_head_of_which_a_piece_fails_comes_as_other_chunks_do(site: Site, kind: str) -> None:
    files = site.add("m", model_files(2 * CHUNK_BYTES))
    fault = site.proxy.inject(kind, range=PIECES[3], after_bytes=100_000)  # type: ignore[arg-type]
    site.start()
    assert site.pull("m")[-1].phase == "ready"
    assert fault.hits == 1
    asked = [item.range for item in site.proxy.gets("model.safetensors")]
    assert asked.count(f"bytes=0-{CHUNK_BYTES - 1}") == 1
    with site.attach("m") as model:
        assert sha256(bytes(model.view("model.safetensors"))) == sha256(files["model.safetensors"])


def test_the_pieces_of_a_damaged_head_are_not_taken_for_what_they_should_be(site: Site) -> None:
    files = site.add("m", model_files(2 * CHUNK_BYTES))
    site.start()
    assert site.pull("m")[-1].phase == "ready"
    site.evict("m", "all")
    fault = site.proxy.inject("corrupt", range=PIECES[5], after_bytes=10)
    with site.attach("m") as model:
        model.wait(DEADLINE_S)
        assert sha256(bytes(model.view("model.safetensors"))) == sha256(files["model.safetensors"])
    assert fault.hits == 1


def test_announcements_are_joined_and_begin_with_small_files_and_the_head(site: Site) -> None:
    many = {f"extra/{number:03}.json": b"%d" % number for number in range(300)}
    files = site.add("m", {**model_files(4 * CHUNK_BYTES), **many})
    site.start()
    began_s = time.monotonic()
    opened, *messages = announced(site, "m")
    took_s = time.monotonic() - began_s
    batches = [message.ranges_ready.ranges for message in messages if message.HasField("ranges_ready")]
    # The pace is the daemon's own: the longer it took, the more there may be.
    assert len(batches) <= 2 + took_s / 0.01
    seen: dict[int, list[tuple[int, int]]] = {}
    for batch in batches:
        assert [(item.file_index, item.offset_bytes) for item in batch] == sorted(
            (item.file_index, item.offset_bytes) for item in batch
        )
        for item in batch:
            seen.setdefault(item.file_index, []).append((item.offset_bytes, item.offset_bytes + item.length_bytes))
    sizes = {item.index: item.size_bytes for item in opened.opened.files}
    assert sum(sizes.values()) == total_bytes(files)
    for index, ranges in seen.items():
        ends = [0, *(end for _, end in sorted(ranges))]
        assert [begin for begin, _ in sorted(ranges)] == ends[:-1], "each byte once"
        assert ends[-1] == sizes[index]
    assert seen.keys() == sizes.keys()
    weights = max(sizes, key=lambda index: sizes[index])
    assert weights == max(sizes), "the small files have the first numbers"


def test_a_failure_is_told_at_once_to_who_streams(site: Site) -> None:
    site.add("m", model_files(2 * CHUNK_BYTES), sha256={"model.safetensors": "f" * 64})
    site.start()
    with site.attach("m") as model, pytest.raises(cached_client.IntegrityError):
        for _ in model.stream(timeout_s=DEADLINE_S):
            pass


async def test_all_movers_are_started_for_an_origin_that_is_about_to_be_read() -> None:
    async with pool_of(movers=3, threads=1) as pool:
        pool.prepare(Prepare(OriginSpec("file:///")))
        await until(lambda: pool.active_movers == 3 and not pool.in_flight, "all started")
        pids = pool.pids
        pool.prepare(Prepare(OriginSpec("file:///")))
        await until(lambda: not pool.in_flight, "prepared again")
        pool.prepare(Prepare(OriginSpec("nonsense://")))  # nobody hears of it
        await until(lambda: not pool.in_flight, "refused")
        assert pool.pids == pids
        assert pool.restarts == 0


async def test_movers_open_an_origin_while_it_is_listed_unless_nothing_is_missing_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[str] = []

    class Recorded(MoverPool):
        def prepare(self, job: Prepare) -> None:
            prepared.append(job.origin.uri)
            super().prepare(job)

    monkeypatch.setattr(build, "MoverPool", Recorded)
    host = Host(tmp_path, MovedClock("2026-11-20T07:00"))
    host.add("m")
    source = host.models["m"]["source"]
    async with host.run() as cache:
        await pull(cache, "m")
        assert prepared == [source], "a new one"
        await pull(cache, "m")
        assert prepared == [source], "it is here"
        await cache.evict("m", None)
        await pull(cache, "m")
        assert prepared == [source, source], "it is known, and is not here"
