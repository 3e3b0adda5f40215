"""What `cached bench` expects of a host, by what its hardware says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cached.cli.bench import local, origin, workers
from cached.cli.bench.hop import Expectation, Outcome, Setting, judged, judged_ms
from cached.cli.measure.facts import mount_of
from cached.cli.measure.scratch import Span
from cached.origins.base import OriginSpec
from tests.unit.host_support import Host

GB = 1_000_000_000


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def setting(host: Host) -> Setting:
    context = host.context()
    return Setting(
        context.config, context.socket, "python", 64 << 20, quick=True, spec=None, no_spec="none", environment={},
        proc=host.proc, sys=host.sys,
    )  # fmt: skip


def test_a_rate_is_judged_by_the_least_that_is_well():
    expected = Expectation(2.0, "2 GB/s")
    slow = judged("x", "", Span(GB, 1.0, 0.5), expected, reasons="why", check="numa")
    assert (slow.outcome, slow.value, slow.cpu_s_per_gb) == (Outcome.SLOWER, 1.0, 0.5)
    assert judged("x", "", Span(3 * GB, 1.0), expected).outcome is Outcome.EXPECTED
    assert judged("x", "", Span(GB, 1.0), None).outcome is Outcome.UNKNOWN
    assert judged_ms("x", "", 3.0, expected).outcome is Outcome.SLOWER
    assert judged_ms("x", "", 1.0, expected).outcome is Outcome.EXPECTED
    assert (Span(0, 0.0).gb_per_s, Span(0, 0.0).cpu_s_per_gb) == (0.0, 0.0)


def test_a_drive_is_expected_to_use_its_link(host, tmp_path):
    drive = host.drive("nvme0n1", "259:1")
    (drive.parent / "max_link_speed").write_text("32.0 GT/s PCIe")
    (drive.parent / "max_link_width").write_text("4")
    host.mount("/", "xfs", "/dev/nvme0n1p1", device="259:1")
    assert mount_of(tmp_path, host.proc) is not None
    found = local._of_the_drive(setting(host), tmp_path, 0.4, 1.0)
    assert found.least == pytest.approx(0.4 * 15.752)
    assert found.shown == "40% and more of PCIe gen 5 x4, 15.8 GB/s"
    host.mount("/", "ext4", "/dev/vda1", device="254:1")
    assert local._of_the_drive(setting(host), tmp_path, 0.4, 1.0).least == 1.0


@pytest.mark.parametrize(
    ("mbit_per_s", "shown"),
    [("10000", "1.2 GB/s of eth0"), ("100000", "64.0 GB/s that 64 processors"), ("-1", "64.0 GB/s that 64 processors")],
)
def test_an_origin_is_expected_to_use_the_network_card(host, monkeypatch, mbit_per_s, shown):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(origin, "is_local", lambda _host: False)
    host.put("proc/net/route", "Iface Destination Gateway\nlo 0000007F 0\neth0 00000000 0102A8C0\n")
    host.put("sys/class/net/eth0/speed", mbit_per_s)
    if mbit_per_s == "100000":
        monkeypatch.setattr(origin, "_CPU_S_PER_GB", {"https": 10.0})
        shown = "6.4 GB/s that 64 processors"
    found = origin._expected(setting(host), OriginSpec("https://store.example/model"))
    assert found is not None
    assert found.shown.startswith(shown)
    assert found.least == pytest.approx(float(found.shown.split()[0]) / 2, rel=0.05)


def test_of_a_folder_nothing_is_expected_and_a_local_server_shares_the_processors(host):
    assert origin._expected(setting(host), OriginSpec("file:///models")) is None
    found = origin._expected(setting(host), OriginSpec("http://127.0.0.1:9000/model"))
    assert found is not None
    assert "processors serve and receive" in found.shown
    assert not origin.is_local("no-such-host.invalid")


def test_without_a_gpu_it_is_not_measured(host):
    (found,) = workers.gpu(setting(host))
    assert (found.outcome, found.note) == (Outcome.NOT_MEASURED, "no GPU")


def test_without_an_origin_it_is_not_measured(host):
    (found,) = origin.origin(replace(setting(host), no_spec="no origin is known"))
    assert (found.outcome, found.note) == (Outcome.NOT_MEASURED, "no origin is known")
