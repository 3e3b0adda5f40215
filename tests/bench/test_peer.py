"""A peer in a process of its own: what it answers is checked, and its failures keep their words."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.checkpoints import write_checkpoint
from bench.peer import PeerContestant
from bench.results import Role, Unavailable
from bench.site import Site

MIB = 1 << 20


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with Site(folder) as site:
        for seed, name in enumerate(("model", "other")):
            source = write_checkpoint(folder / name, size_bytes=4 * MIB, shard_bytes=2 * MIB, seed=seed)
            site.push(name, source)
        yield site


def raw(site, tmp_path, checked_against, *, key=None, python=sys.executable, fresh=False):
    objects = [(site.presigned(name), size) for name, size in site.objects("model")]
    if key:
        objects = [(site.presigned(key), size) for _, size in objects]
    order = {
        "objects": objects, "threads": 2, "range_bytes": MIB, "folder": str(tmp_path), "ca_bundle": "", "fresh": fresh,
    }  # fmt: skip
    files = sorted((site.folder / checked_against).glob("*.safetensors"))
    return PeerContestant(
        "raw", "plain sockets", python=Path(python), module="raw", order=order, files=files, role=Role.LIMIT,
        log=tmp_path / "raw.log", server_pids=(site.s3.pid,),
    )  # fmt: skip


@pytest.fixture
def closing():
    with ExitStack() as stack:

        def close_at_the_end(peer):
            stack.callback(peer.close)
            return peer

        yield close_at_the_end


@pytest.mark.parametrize("fresh", [False, True])
def test_a_peer_that_loads_the_checkpoint_is_measured_round_after_round(site, tmp_path, closing, fresh):
    peer = closing(raw(site, tmp_path, "model", fresh=fresh))
    for _ in range(3):
        peer.prepare()
        sample = peer.run()
        assert sample.seconds > 0
        assert sample.cpu_s >= 0
        assert sample.size_bytes == pytest.approx(4 * MIB, rel=0.01)


def test_a_peer_that_loads_something_else_is_found_out(site, tmp_path, closing):
    peer = closing(raw(site, tmp_path, "other"))
    peer.prepare()
    for _ in range(2):  # in full, and by some blocks
        with pytest.raises(RuntimeError, match="is not the checkpoint"):
            peer.run()


def test_what_a_peer_raises_is_told(site, tmp_path, closing):
    peer = closing(raw(site, tmp_path, "model", key="model/nosuch.safetensors"))
    peer.prepare()
    with pytest.raises(RuntimeError, match=r"HTTP/1\.1 404"):
        peer.run()


def test_a_peer_that_is_not_installed_or_ends_by_itself(site, tmp_path, closing):
    with pytest.raises(Unavailable, match="not installed"):
        closing(raw(site, tmp_path, "model", python=tmp_path / "python")).prepare()
    with pytest.raises(RuntimeError, match="it ended"):
        closing(raw(site, tmp_path, "model", python="/bin/false")).prepare()
