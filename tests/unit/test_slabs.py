"""Buffers of a mover's threads: as many as are used at once, however many threads there are."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cached.transfer.ranges import Slabs
from cached.units import CHUNK_BYTES


def test_jobs_after_each_other_take_the_same_buffer_in_whatever_thread() -> None:
    slabs = Slabs()
    seen: list[memoryview] = []

    def job() -> None:
        view = slabs.view()
        assert slabs.view() is view, "within a job it stays the same"
        seen.append(view)
        slabs.give_back()

    for _ in range(5):
        thread = threading.Thread(target=job)
        thread.start()
        thread.join()
    assert len(seen[0]) == CHUNK_BYTES
    assert all(view is seen[0] for view in seen)


def test_jobs_at_the_same_time_have_buffers_of_their_own() -> None:
    slabs, together = Slabs(), threading.Barrier(4)

    def job(_: int) -> int:
        view = slabs.view()
        together.wait(30)
        slabs.give_back()
        return id(view)

    with ThreadPoolExecutor(4) as executor:
        first, second = (set(executor.map(job, range(4))) for _ in range(2))
    assert len(first) == 4
    assert first == second


def test_a_job_without_a_buffer_gives_none_back() -> None:
    slabs = Slabs()
    slabs.give_back()
    view = slabs.view()
    slabs.give_back()
    slabs.give_back()
    with ThreadPoolExecutor(1) as executor:
        other = executor.submit(slabs.view).result()
    assert other is view
    assert slabs.view() is not view


def test_what_a_burst_needed_is_let_go_once_nobody_needed_it_for_a_while() -> None:
    clock = [0.0]
    slabs, together = Slabs(lambda: clock[0]), threading.Barrier(4)
    seen: list[weakref.ref[Any]] = []

    def job(_: int) -> None:
        seen.append(weakref.ref(slabs.view().obj))
        together.wait(30)
        slabs.give_back()

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(job, range(4)))
    for clock[0] in (5.0, 10.0, 15.0):
        assert len([mapping for mapping in seen if mapping() is not None]) == 4
        slabs.view()
        slabs.give_back()
    assert len([mapping for mapping in seen if mapping() is not None]) == 1
