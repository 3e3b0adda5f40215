"""Mapped files: zero-copy, private, and alive for as long as anything looks at them."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from cached_client.errors import IntegrityError
from cached_client.segment import MappedFile


@pytest.fixture
def segment():
    """A memory file of three pages and a bit, counting up."""
    descriptor = os.memfd_create("test")
    os.write(descriptor, bytes(range(256)) * 50)
    yield descriptor
    os.close(descriptor)


def reader(descriptor: int) -> int:
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)


def mapped(descriptor: int) -> MappedFile:
    return MappedFile(reader(descriptor), os.fstat(descriptor).st_size)


def is_mapped() -> bool:
    return any("memfd:test" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_shows_what_is_written_later_and_has_the_exact_length(segment: int) -> None:
    file = mapped(segment)
    assert len(file.view) == file.size_bytes == 12800
    os.pwrite(segment, b"later", 100)
    assert bytes(file.view[100:105]) == b"later"


def test_a_write_stays_private(segment: int) -> None:
    first, second = mapped(segment), mapped(segment)
    torch.frombuffer(first.view, dtype=torch.uint8).add_(1)
    assert first.view[0] == 1
    assert second.view[0] == 0
    assert os.pread(segment, 1, 0) == b"\0"


def test_unmapped_when_the_last_view_is_gone_not_before(segment: int) -> None:
    file = mapped(segment)
    tensor = torch.frombuffer(file.view[8:16], dtype=torch.float64)
    array = np.frombuffer(file.view, dtype=np.uint8)[3:]
    file.close()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        _ = file.view
    del file
    gc.collect()
    assert is_mapped()
    assert array[0] == 3
    del array
    gc.collect()
    assert tensor.shape == (1,)
    assert is_mapped()
    del tensor
    gc.collect()
    assert not is_mapped()


def test_closing_without_views_unmaps_at_once(segment: int) -> None:
    file = mapped(segment)
    gone = weakref.ref(file.view.obj) if hasattr(file.view.obj, "__weakref__") else None
    file.close()
    assert not is_mapped()
    assert gone is None or gone() is None


def test_keeps_at_most_one_descriptor_and_none_after_close(segment: int) -> None:
    before = psutil.Process().num_fds()
    file = mapped(segment)
    assert psutil.Process().num_fds() <= before + 1
    file.close()
    assert psutil.Process().num_fds() == before


def test_refuses_a_file_of_another_length_and_closes_it(segment: int) -> None:
    before = psutil.Process().num_fds()
    with pytest.raises(IntegrityError, match="12800 bytes where 12801"):
        MappedFile(reader(segment), 12801)
    assert psutil.Process().num_fds() == before


def test_empty_files() -> None:
    descriptor = os.memfd_create("empty")
    assert mapped(descriptor).view.nbytes == 0
    os.close(descriptor)
    assert MappedFile.empty().view.nbytes == 0


def test_identity_tells_whether_it_is_the_same_file(segment: int) -> None:
    other = os.memfd_create("other")
    try:
        assert mapped(segment).identity == mapped(segment).identity
        assert mapped(segment).identity != mapped(other).identity
    finally:
        os.close(other)
