from __future__ import annotations

import os

import pytest

from cached.config import load_config
from cached.errors import InvalidRequestError, LevelError, NotFoundError
from cached.levels.disk import DiskLevel
from cached.standalone import MIN_MEMORY_BYTES
from cached.standalone.engine import sized
from cached.transfer.jobs import Threads
from cached.units import CHUNK_BYTES, GIB, MIB

CONFIG = load_config(None, {}, {"transfer.movers": "4"}).config


@pytest.mark.parametrize("memory_bytes", [MIN_MEMORY_BYTES, 512 * MIB, GIB, 4 * GIB])
def test_buffers_of_all_threads_fit_into_the_memory(memory_bytes):
    movers, ranges = sized(CONFIG, memory_bytes)
    threads = Threads(local=2, origin=max(2, -(-ranges // movers)), hedge=2)
    buffers = movers * (threads.local + threads.origin + threads.hedge)
    assert (1 + movers) * 96 * MIB + buffers * CHUNK_BYTES <= memory_bytes
    assert 2 <= ranges <= CONFIG.transfer.max_ranges


def test_more_memory_means_more_ranges():
    assert sized(CONFIG, 4 * GIB)[1] > sized(CONFIG, GIB)[1] > sized(CONFIG, MIN_MEMORY_BYTES)[1]
    with pytest.raises(InvalidRequestError, match="of memory at least"):
        sized(CONFIG, MIN_MEMORY_BYTES - MIB)


def test_a_file_that_is_taken_in_is_an_ingest_from_then_on(tmp_path):
    level, file = DiskLevel(tmp_path / "l2"), tmp_path / "file"
    level.scan()
    file.write_bytes(b"damaged")
    ref = level.take_in(str(file), "one")
    assert (level.ingest("one"), file.exists()) == (ref, False)
    assert level.scan().ingests == {"one": 7}
    file.write_bytes(b"another")
    with pytest.raises(LevelError):
        level.take_in(str(file), "one")
    os.link(file, tmp_path / "second")
    with pytest.raises(LevelError, match="2 names"):
        level.take_in(str(file), "two")
    with pytest.raises(NotFoundError):
        level.take_in(str(tmp_path / "nothing"), "three")
