"""Cgroups of both versions, from a host and from within containers."""

from __future__ import annotations

from pathlib import Path

import pytest

from cached.cgroups import Cgroups
from tests.unit.host_support import Host

GIB = 1 << 30


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def cgroups(host: Host) -> Cgroups:
    return Cgroups(host.proc, host.sys)


def test_version_2_the_tightest_level_counts_and_page_cache_is_free(host):
    host.put("proc/self/cgroup", "0::/kubepods/pod1/c1\n")
    stat = f"shmem {GIB}\ninactive_file {2 * GIB}\nactive_file {GIB}\nanon 5\n"
    host.cgroup_2("kubepods/pod1/c1", max="max", current=5 * GIB, stat=stat, swap=0)
    host.cgroup_2("kubepods/pod1", max=20 * GIB, current=18 * GIB, stat=stat, cpu="250000 100000")
    host.cgroup_2("kubepods", max=100 * GIB, current=30 * GIB, high=90 * GIB, cpu="max 100000", pids=100, pids_now=40)
    found = cgroups(host).memory()
    assert [cgroup.limit_bytes for cgroup in found] == [None, 20 * GIB, 100 * GIB]
    assert [cgroup.left_bytes for cgroup in found] == [None, 5 * GIB, 70 * GIB]
    assert (found[0].shmem_bytes, found[0].swap_bytes, found[2].high_bytes) == (GIB, 0, 90 * GIB)
    assert cgroups(host).memory_left_bytes() == 5 * GIB
    assert cgroups(host).processors() == 2.5
    assert cgroups(host).tasks_left() == 60


def test_version_2_within_a_container_its_own_cgroup_is_the_root(host):
    host.cgroup_2("", max=4 * GIB, current=GIB)
    assert cgroups(host).memory_left_bytes() == 3 * GIB
    # Without a cgroup namespace the path is the host's, of which nothing is mounted.
    host.put("proc/self/cgroup", "0::/system.slice/docker-abc.scope\n")
    assert cgroups(host).memory_left_bytes() == 3 * GIB


@pytest.mark.parametrize("seen", [True, False], ids=["on the host", "in a container"])
def test_version_1(host, seen):
    host.put("proc/self/cgroup", "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n2:pids:/docker/abc\n0::/\n")
    place = "docker/abc" if seen else ""
    memory = f"sys/fs/cgroup/memory/{place}"
    host.put(f"{memory}/memory.limit_in_bytes", str(8 * GIB))
    host.put(f"{memory}/memory.usage_in_bytes", str(5 * GIB))
    host.put(f"{memory}/memory.memsw.limit_in_bytes", str(8 * GIB))
    host.put(f"{memory}/memory.stat", f"shmem 1\ntotal_shmem {2 * GIB}\ntotal_inactive_file {GIB}\n")
    if seen:
        host.put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
        host.put("sys/fs/cgroup/memory/memory.usage_in_bytes", "1")
        host.put("sys/fs/cgroup/memory/memory.stat", "cache 0\n")
    host.put(f"sys/fs/cgroup/cpu,cpuacct/{place}/cpu.cfs_quota_us", "150000")
    host.put(f"sys/fs/cgroup/cpu,cpuacct/{place}/cpu.cfs_period_us", "100000")
    host.put(f"sys/fs/cgroup/pids/{place}/pids.max", "max")
    found = cgroups(host).memory()
    assert (found[0].limit_bytes, found[0].shmem_bytes, found[0].swap_bytes) == (8 * GIB, 2 * GIB, 0)
    assert [cgroup.limit_bytes for cgroup in found[1:]] == ([None, None] if seen else [])[: len(found) - 1]
    assert cgroups(host).memory_left_bytes() == 4 * GIB
    assert cgroups(host).processors() == 1.5
    assert cgroups(host).tasks_left() is None


def test_where_nothing_can_be_read_nothing_limits(tmp_path):
    nowhere = Cgroups(tmp_path / "proc", tmp_path / "sys")
    assert nowhere.memory() == []
    assert (nowhere.memory_left_bytes(), nowhere.processors(), nowhere.tasks_left()) == (None, None, None)
