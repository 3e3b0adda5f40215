"""Verdicts of `cached doctor` on hosts that are laid out as their /proc and /sys would tell of them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cached.cache.build import instance_of
from cached.cli.doctor import bounds, daemon, gpu, memory, storage, topology
from cached.cli.doctor.access import obstacle
from cached.cli.doctor.checks import Finding
from cached.cli.measure.facts import block_device, mount_of, pcie_link
from cached.cli.measure.scratch import left_behind
from tests.small_tmpfs import run_on_small_tmpfs
from tests.unit.host_support import Host, user

GIB = 1 << 30


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder that every user may enter; those of pytest are for its own user."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def verdicts(found) -> list[str]:
    return [finding.verdict for finding in found]


def only(found) -> Finding:
    (finding,) = found
    return finding


def worst(found) -> Finding:
    return max(found, key=lambda finding: ["ok", "not measured", "advice", "problem"].index(finding.verdict))


# Memory.


@pytest.mark.parametrize(("capacity", "verdict"), [("40GiB", "ok"), ("60GiB", "advice"), ("65GiB", "problem")])
def test_the_budget_is_compared_with_the_hosts_memory(host, capacity, verdict):
    finding = only(memory.host_memory(host.context({"l1.capacity": capacity})))
    assert finding.verdict == verdict
    assert bool(finding.mend) is (verdict != "ok")
    assert finding.measured["memory_bytes"] == 64 * GIB


def test_a_kernel_that_promises_no_more_than_it_has(host):
    host.put("proc/sys/vm/overcommit_memory", "2\n")
    host.memory(total=64, available=60, limit=20, committed=10)
    finding = worst(memory.host_memory(host.context({"l1.capacity": "32GiB"})))
    assert (finding.verdict, finding.mend) == ("problem", "sysctl -w vm.overcommit_memory=0")
    assert verdicts(memory.host_memory(host.context({"l1.capacity": "8GiB"}))) == ["ok", "ok"]


def test_a_mount_smaller_than_the_budget(host, tmp_path):
    place = os.statvfs(tmp_path)
    total_bytes = place.f_blocks * place.f_frsize
    host.memory(total=4096, available=4096)
    host.mount("/", "tmpfs", "tmpfs", options="rw,nosuid,nodev")
    context = host.context({"l1.capacity": str(total_bytes + GIB)}, shm=tmp_path)
    finding = worst(memory.shared_memory(context))
    assert finding.verdict == "advice"
    assert finding.mend.startswith("mount -o remount,size=")
    in_pod = host.context(
        {"l1.capacity": f"{3 * total_bytes}"}, shm=tmp_path, environment={"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    )
    finding = worst(memory.shared_memory(in_pod))
    assert finding.verdict == "problem"
    assert finding.mend.startswith("mount an emptyDir at /dev/shm: {medium: Memory, sizeLimit: ")


def test_a_mount_that_is_wrong(host, tmp_path):
    host.mount("/", "ext4", "/dev/vda1")
    assert only(memory.shared_memory(host.context(shm=tmp_path))).verdict == "problem"
    host.mount("/", "tmpfs", "tmpfs", options="ro,nosuid,nodev")
    told = [finding.told for finding in memory.shared_memory(host.context({"l1.capacity": "1MiB"}, shm=tmp_path))]
    assert any("read-only" in text for text in told)
    host.mount("/", "tmpfs", "tmpfs")
    finding = worst(memory.shared_memory(host.context({"l1.capacity": "1MiB"}, shm=tmp_path)))
    assert (finding.verdict, finding.mend) == ("advice", f"mount -o remount,nosuid,nodev {tmp_path}")
    finding = worst(memory.shared_memory(host.context({"l1.capacity": "1MiB"}, shm=tmp_path, service=user())))
    assert "someone may not create segments" in finding.told


def test_a_real_mount_that_is_too_small(tmp_path):
    printed = run_on_small_tmpfs(
        "/dev/shm",
        "size=32m,mode=1777,nosuid,nodev",
        "import json; from cached.cli.connect import Globals; from cached.cli.doctor import memory\n"
        "from cached.cli.doctor.checks import Context, settings_for\n"
        "settings, _ = settings_for(None, {'CACHED_L1_CAPACITY': '1GiB', 'HOME': '/'}, {})\n"
        "context = Context(Globals(''), '/no.sock', 'python', {}, settings=settings)\n"
        "found = [*memory.shared_memory(context), *memory.huge_pages(context)]\n"
        "print(json.dumps([[finding.verdict, finding.told, finding.measured] for finding in found]))",
    )
    (verdict, told, measured), (second, why, _) = json.loads(printed)
    assert (verdict, measured["mount_bytes"]) == ("problem", 32 << 20)
    assert "/dev/shm is 32.0 MiB, L1 is configured 1GiB" in told
    assert (second, why) == ("not measured", "/dev/shm has too little room left to measure in")


def test_huge_pages_of_a_real_mount_are_seen(tmp_path):
    printed = run_on_small_tmpfs(
        "/dev/shm",
        "size=600m,mode=1777,huge=advise",
        "import json; from cached.cli.connect import Globals; from cached.cli.doctor import memory\n"
        "from cached.cli.doctor.checks import Context\n"
        "(found,) = memory.huge_pages(Context(Globals(''), '/no.sock', 'python', {}))\n"
        "print(json.dumps([found.verdict, found.told, found.measured['huge_page_share']]))",
    )
    verdict, told, share = json.loads(printed)
    if share < 0.5:  # this kernel has none to give
        assert (verdict, "gave none" in told) == ("advice", True)
    else:
        assert (verdict, "gives huge pages (huge=advise)" in told) == ("ok", True)


def test_segments_of_daemons_that_are_gone(host, tmp_path):
    shm = tmp_path / "shm"
    shm.mkdir()
    context = host.context(shm=shm)
    assert only(memory.segments(context)).told == "no segments are left"
    own = instance_of(context.config.daemon.state_dir)
    (shm / f"cached.{own}.blob.ab").write_bytes(b"x" * 8192)
    finding = only(memory.segments(context))
    assert finding.verdict == "advice"
    assert "1 segments with 8.0 KiB wait for a daemon" in finding.told
    (shm / "cached.0123456789ab.blob.cd").write_bytes(b"x" * 4096)
    (shm / "cached.measure-1.ingest.ef").write_bytes(b"x" * 4096)
    left, mine, lost = memory.segments(context)
    assert left.mend == f"rm -r {shm}/cached.measure-1.ingest.ef"
    assert "state folder" in mine.told
    assert lost.mend.startswith(f"rm {shm}/cached.0123456789ab.*")
    # A daemon that does not answer may own them.
    host.put("proc/77/cmdline", "/usr/bin/python3\0/usr/bin/cached\0serve\0--config\0/etc/x.toml\0")
    assert [finding.verdict for finding in memory.segments(context)][-1] == "not measured"


def test_only_what_a_dead_process_left_is_left_behind(host, tmp_path):
    (tmp_path / ".cached-measure-41-ab").write_text("")
    (tmp_path / ".cached-measure-42-cd").write_text("")
    host.put("proc/42/stat", "")
    assert left_behind(tmp_path, host.proc) == [tmp_path / ".cached-measure-41-ab"]


# What bounds the process.


@pytest.mark.parametrize(
    ("limit", "verdict"), [(16, "problem"), (32, "advice"), (40, "ok")], ids=["less", "no heap", "enough"]
)
def test_a_pod_with_a_limit(host, limit, verdict):
    host.put("proc/self/cgroup", "0::/kubepods.slice/pod1\n")
    host.cgroup_2("kubepods.slice/pod1", max=limit * GIB, current=GIB, stat=f"shmem {GIB}\n")
    finding = only(bounds.memory_cgroup(host.context({"l1.capacity": "32GiB"})))
    assert finding.verdict == verdict
    assert finding.measured["shmem_bytes"] == GIB
    assert finding.mend == ("" if verdict == "ok" else "resources.limits.memory: 33Gi   (or a smaller l1.capacity)")


def test_a_cgroup_of_version_1_and_one_that_is_slowed_down(host):
    host.put("proc/self/cgroup", "4:memory:/x\n0::/\n")
    host.put("sys/fs/cgroup/memory/x/memory.limit_in_bytes", str(8 * GIB))
    host.put("sys/fs/cgroup/memory/x/memory.usage_in_bytes", "0")
    host.put("sys/fs/cgroup/memory/x/memory.stat", "")
    finding = only(bounds.memory_cgroup(host.context({"l1.capacity": "32GiB"})))
    assert (finding.verdict, finding.mend.partition("=")[0]) == (
        "problem", "systemctl edit cached, [Service] MemoryMax",
    )  # fmt: skip
    host.put("proc/self/cgroup", "0::/\n")
    host.cgroup_2("", max="max", current=0, high=16 * GIB)
    finding = worst(bounds.memory_cgroup(host.context({"l1.capacity": "32GiB"})))
    assert (finding.verdict, finding.mend) == ("advice", "MemoryHigh=infinity in the unit")


def test_the_daemons_cgroup_and_limits_count_not_ours(host):
    host.put("proc/5/cgroup", "0::/system.slice/cached.service\n")
    host.cgroup_2("system.slice/cached.service", max=GIB, current=0)
    host.put("proc/5/limits", "Limit Soft Hard Units\nMax open files            512                  512     files\n")
    context = host.context({"l1.capacity": "32GiB"}, pid=5)
    assert "the daemon's (pid 5)" in only(bounds.memory_cgroup(context)).told
    finding = next(iter(bounds.process_limits(context)))
    assert (finding.verdict, finding.mend) == ("problem", "systemctl edit cached, [Service] LimitNOFILE=65536")
    # One of another namespace is not seen at all.
    assert "this process's" in only(bounds.memory_cgroup(host.context(pid=6))).told


def test_limits_that_are_low(host):
    context = host.context({"transfer.movers": "4"})
    assert set(verdicts(bounds.process_limits(context))) == {"ok"}
    host.limits(files=1024, locked=65536, processes=100)
    files, locked, tasks = bounds.process_limits(context)
    assert (files.verdict, locked.verdict, tasks.verdict) == ("advice", "advice", "problem")
    assert locked.mend == "systemctl edit cached, [Service] LimitMEMLOCK=infinity"
    assert "64.0 KiB" in locked.told
    host.limits()
    host.cgroup_2("", pids=300, pids_now=200)
    assert worst(bounds.process_limits(context)).told.startswith("this process's limits leave 100 processes")


def test_swap(host):
    assert only(bounds.swap(host.context())).verdict == "ok"
    host.put("proc/swaps", "Filename Type Size Used Priority\n/dev/sda2 partition 8388604 2048 -2\n")
    finding = only(bounds.swap(host.context()))
    assert finding.verdict == "advice"
    assert "MemorySwapMax=0" in finding.mend
    assert finding.measured["swap_used_bytes"] == 2 << 20
    host.cgroup_2("", max="max", current=0, swap=0)
    assert only(bounds.swap(host.context())).verdict == "ok"
    (host.sys / "fs/cgroup/memory.swap.max").unlink()
    host.mount("/dev/shm", "tmpfs", "tmpfs", options="rw,noswap")
    assert "noswap" in only(bounds.swap(host.context())).told


@pytest.mark.parametrize(("stalled", "verdict"), [("0.00", "ok"), ("2.50", "advice"), ("7.00", "problem")])
def test_pressure(host, stalled, verdict):
    assert only(bounds.pressure(host.context())).verdict == "not measured"
    host.put("proc/pressure/memory", f"some avg10=9.00 avg60=0\nfull avg10={stalled} avg60=0.00 avg300=0 total=1\n")
    finding = only(bounds.pressure(host.context()))
    assert (finding.verdict, finding.measured["memory_percent"]) == (verdict, float(stalled))


def test_a_quota_below_the_movers(host):
    host.cgroup_2("", cpu="250000 100000")
    finding = only(bounds.processors(host.context({"transfer.movers": "4"})))
    assert finding.verdict == "advice"
    assert "transfer.movers = 2" in finding.mend
    assert only(bounds.processors(host.context({"transfer.movers": "2"}))).verdict == "ok"


def test_kernels(host):
    assert only(bounds.kernel(host.context())).told == "Linux 6.8.0-45-generic"
    host.put("proc/sys/kernel/osrelease", "6.12.9\n")
    assert only(bounds.kernel(host.context())).verdict == "ok"  # nothing is pinned without a GPU
    host.gpu("0000:3b:00.0")
    assert "pins 2 GB at most" in only(bounds.kernel(host.context())).told
    host.put("proc/sys/kernel/osrelease", "5.4.0-generic\n")
    assert "MADV_POPULATE_WRITE" in only(bounds.kernel(host.context())).told


# GPUs, nodes, clock.


def test_an_h100_host(host):
    for index in range(8):
        host.gpu(f"0000:{index:02x}:00.0", node=index // 4, now_speed="2.5")
    host.driver()
    for name in ("nvidiactl", "nvidia-uvm", "nvidia0"):
        os.chmod(host.put(f"dev/{name}", ""), 0o666)
    context = host.context(tool=lambda _command: "NVIDIA H100 80GB HBM3, Enabled\n")
    driver, *links, nodes = gpu.gpu(context)
    assert (driver.verdict, driver.told) == ("ok", "driver 550.54.15")
    assert set(verdicts(links)) == {"ok"}
    assert "NVIDIA H100 80GB HBM3 at 0000:00:00.0, on NUMA node 0: PCIe gen 5 x16, 63 GB/s at most" in links[0].told
    assert "now gen 1 x16: links of idle GPUs slow down" in links[0].told
    assert links[0].measured["bar1_bytes"] == 128 * GIB
    assert nodes.verdict == "ok"


def test_a_gpu_in_a_narrow_slot_without_a_driver_or_rights(host):
    host.gpu("0000:3b:00.0", now_width=4)
    driver, link, nodes = gpu.gpu(host.context())
    assert (driver.verdict, driver.mend) == ("problem", "modprobe nvidia")
    assert (link.verdict, link.measured["width"]) == ("problem", 4)
    assert "lspci -vv -s 0000:3b:00.0" in link.mend
    assert (nodes.verdict, "without its GPUs" in nodes.told) == ("advice", True)
    host.driver()
    os.chmod(host.put("dev/nvidiactl", ""), 0o600)
    *_, nodes = gpu.gpu(host.context(worker=user()))
    assert nodes.verdict == "problem"
    assert nodes.told == f"someone may not open {host.root}/dev/nvidiactl"
    slow = gpu.gpu(host.context(tool=lambda _command: "NVIDIA H100, Disabled\n"))
    assert "nvidia-persistenced" in next(iter(slow)).mend


def test_no_gpu_is_no_problem(host):
    assert only(gpu.gpu(host.context())).verdict == "ok"


def test_shared_memory_on_one_of_two_nodes(host):
    host.node(0, cpus="0-31", memory_gib=512, shmem_gib=100)
    assert only(topology.numa(host.context())).told == "one NUMA node"
    host.node(1, cpus="32-63", memory_gib=512, shmem_gib=2)
    host.gpu("0000:3b:00.0", node=1)
    finding = only(topology.numa(host.context()))
    assert finding.verdict == "advice"
    assert "GPUs on 1" in finding.told
    assert finding.mend.startswith("mount -o remount,mpol=interleave /dev/shm")
    host.mount("/dev/shm", "tmpfs", "tmpfs", options="rw,mpol=interleave:0-1")
    host.put("proc/sys/kernel/numa_balancing", "1\n")
    spread, balancing = topology.numa(host.context())
    assert spread.verdict == "ok"
    assert balancing.mend == "sysctl -w kernel.numa_balancing=0"


@pytest.mark.parametrize(
    ("state", "service", "verdict"),
    [((True, 0.01), "yes", "ok"), ((True, 5.0), "yes", "advice"), ((False, 16.0), "yes", "advice"),
     ((False, 16.0), "no", "advice")],
)  # fmt: skip
def test_the_clock(host, monkeypatch, state, service, verdict):
    monkeypatch.setattr(topology, "clock_state", lambda: topology.ClockState(*state))
    finding = only(topology.clock(host.context(tool=lambda _command: f"{service}\n")))
    assert finding.verdict == verdict
    assert ("nothing keeps" in finding.told) is (not state[0] and service == "no")


def test_the_kernels_own_clock_is_asked():
    assert topology.clock_state().error_s >= 0


# Storage.


def test_l2_on_nvme(host, tmp_path):
    drive = host.drive("nvme0n1", "259:1", model="SAMSUNG MZQL2 \n")
    for name, text in (("max_link_speed", "16.0 GT/s PCIe"), ("max_link_width", "4")):
        (drive.parent / name).write_text(text)
    host.mount(str(tmp_path), "xfs", "/dev/nvme0n1p1", device="259:1")
    finding = only(storage.l2(host.context({"l2.capacity": "1MiB"})))
    assert finding.verdict == "ok", finding
    assert "xfs on nvme0n1 SAMSUNG MZQL2 (PCIe gen 4 x4, 7.9 GB/s at most)" in finding.told


@pytest.mark.parametrize(
    ("fs_type", "options", "verdict", "text"),
    [
        ("tmpfs", "rw", "problem", "this is memory"),
        ("xfs", "ro", "problem", "read-only"),
        ("nfs4", "rw", "advice", "network storage"),
        ("overlay", "rw", "advice", "container's own layer"),
    ],
)
def test_l2_where_it_should_not_be(host, tmp_path, fs_type, options, verdict, text):
    host.mount(str(tmp_path), fs_type, "server:/x", options=options)
    finding = worst(storage.l2(host.context({"l2.capacity": "1MiB"})))
    assert finding.verdict == verdict
    assert text in finding.told
    assert finding.mend


def test_l2_that_is_slow_by_its_making(host, tmp_path):
    host.drive("nvme0n1", "259:1", scheduler="bfq")
    host.mount(str(tmp_path), "ext4", "/dev/nvme0n1p1", device="259:1")
    assert "scheduler" in worst(storage.l2(host.context({"l2.capacity": "1MiB"}))).mend
    host.drive("sda", "8:1", rotational=1)
    host.mount(str(tmp_path), "ext4", "/dev/sdap1", device="8:1")
    assert "rotates" in worst(storage.l2(host.context({"l2.capacity": "1MiB"}))).told
    two = host.context({"l2.paths": f"{tmp_path}/a,{tmp_path}/b", "l2.capacity": "1MiB"})
    assert any("are on one drive" in finding.told for finding in storage.l2(two))


def test_l2_without_room_or_rights(host, tmp_path):
    host.mount(str(tmp_path), "ext4", "/dev/vda1")
    (tmp_path / "l2/blobs").mkdir(parents=True)
    place = os.statvfs(tmp_path)
    all_bytes = place.f_blocks * place.f_frsize
    found = list(storage.l2(host.context({"l2.capacity": f"{all_bytes}"}, service=user())))
    assert (found[0].verdict, found[0].mend.startswith('l2.capacity = "')) == ("advice", True)
    assert found[-1].verdict == "problem"
    assert "someone may not write to" in found[-1].told
    off = only(storage.l2(host.context({"l2.enabled": "false"})))
    assert "l2.enabled = false" in off.told


def test_l2_is_measured_and_leaves_nothing(host, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_MEASURED_BYTES", 32 << 20)
    finding = only(storage.l2_speed(host.context()))
    assert finding.verdict in {"ok", "advice"}
    assert finding.measured["read_gb_per_s"] > 0
    assert finding.measured["write_gb_per_s"] > 0
    assert not list(tmp_path.glob(".cached-measure-*"))
    monkeypatch.setattr(storage, "_SLOW_READ_GB_PER_S", 1e6)
    assert "a promotion of 100 GB takes" in worst(storage.l2_speed(host.context())).told


def test_mounts_drives_and_links(host, tmp_path):
    host.mount("/", "ext4", "/dev/vda1", device="254:1")
    host.mount("/data with space".replace(" ", "\\040"), "btrfs", "/dev/nvme0n1p1", device="0:33")
    mount = mount_of("/data with space/l2", host.proc)
    assert mount is not None
    assert (mount.fs_type, mount.point) == ("btrfs", "/data with space")
    assert block_device(mount, host.sys) is None
    drive = host.drive("nvme0n1", "259:1")
    (host.sys / "class/block").mkdir(parents=True)
    (host.sys / "class/block/nvme0n1p1").symlink_to(drive / "nvme0n1p1")
    assert block_device(mount, host.sys) == drive
    assert pcie_link(drive) is None
    assert mount_of("/database", host.proc).point == "/"


# The daemon's settings, its unit, its folders.


def test_settings_that_do_not_fit_the_unit(host):
    def systemctl(_command):
        return "LoadState=loaded\nTimeoutStopUSec=1min 30s\nMemoryMax=8589934592\nRemoveIPC=yes\n"

    context = host.context({"daemon.drain_timeout_s": "120", "l1.capacity": "32GiB"}, tool=systemctl)
    stop, ipc, limit, _ = daemon.settings(context)
    assert stop.verdict == "problem"
    assert "drains for 120 s, and systemd kills it after 90 s" in stop.told
    assert stop.mend == "systemctl edit cached, [Service] TimeoutStopSec=140"
    assert (ipc.verdict, limit.verdict) == ("problem", "problem")
    fitting = host.context({"daemon.drain_timeout_s": "20", "l1.capacity": "4GiB"}, tool=systemctl)
    assert verdicts(daemon.settings(fitting)) == ["problem", "ok"]
    assert verdicts(daemon.settings(host.context())) == ["ok"]


def test_durations_of_systemctl():
    assert daemon.seconds("1min 30s") == 90
    assert daemon.seconds("40s") == 40
    assert daemon.seconds("infinity") is None


def test_an_l2_larger_than_its_file_system(host):
    assert verdicts(daemon.settings(host.context({"l2.capacity": "900TiB"}))) == ["problem", "ok"]


def test_the_state_folder(host, tmp_path):
    context = host.context()
    assert "is not there yet" in only(daemon.state(context)).told
    finding = only(daemon.state(host.context(service=user())))
    assert (finding.verdict, finding.mend) == ("problem", f"install -d -m 0700 -o someone {tmp_path}/state")
    (tmp_path / "state").mkdir(mode=0o700)
    assert only(daemon.state(context)).verdict == "ok"
    os.chmod(tmp_path / "state", 0o777)
    assert only(daemon.state(context)).mend == f"chmod 0700 {tmp_path}/state"


def test_a_catalog_that_cannot_be_used(host, tmp_path):
    catalog = tmp_path / "catalog.json"
    context = host.context({"daemon.catalog": str(catalog)})
    assert only(daemon.catalog(context)).verdict == "problem"
    catalog.write_text('{"models": {"a": {"source": "nothing"}}}')
    assert only(daemon.catalog(context)).mend == f"cached catalog validate {catalog}"
    catalog.write_text('{"models": {"a": {"source": "s3://bucket/a"}}}')
    assert only(daemon.catalog(context)).measured == {"models": 1}
    os.chmod(catalog, 0o600)
    finding = only(daemon.catalog(host.context({"daemon.catalog": str(catalog)}, service=user())))
    assert finding.mend == f"chmod a+rX {catalog}"


def test_who_may_pass(tmp_path):
    (tmp_path / "a").mkdir(mode=0o750)
    file = tmp_path / "a/file"
    file.write_text("")
    os.chmod(file, 0o640)
    gid = file.stat().st_gid
    assert obstacle(user("x", 4242), file, os.R_OK) == str(tmp_path / "a")
    assert obstacle(user("x", 4242, gid), file, os.R_OK) == ""
    assert obstacle(user("x", 4242, gid), file, os.W_OK) == str(file)
    assert obstacle(user("root", 0), file, os.W_OK) == ""
    with pytest.raises(FileNotFoundError):
        obstacle(user("root", 0), tmp_path / "none", os.R_OK)
