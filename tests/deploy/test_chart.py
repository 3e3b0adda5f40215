"""The chart as people use it: lint, what it refuses and how, what it says."""

from __future__ import annotations

import subprocess

import pytest

from cached.settings import describe_settings
from deploy.generate import COMPUTED, outputs
from deploy.tools import CHART, helm
from tests.deploy.manifests import CI_VALUES, charted, config_text, daemon_of, one, parsed


@pytest.mark.parametrize("values", [None, *CI_VALUES], ids=lambda path: path.stem if path else "defaults")
def test_lint(values):
    helm("lint", "--strict", CHART, *(("--values", values) if values else ()))


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ('l1.capacity="64GiB"', "/l1/capacity"),
        ("l1.capacity=64", "/l1/capacity"),
        ('l1.capcity="64Gi"', "capcity"),
        ('l1.volume="tmpfs"', "/l1/volume"),
        ('l1.hostPath="dev/shm"', "/l1/hostPath"),
        ('l2.capacity="120%"', "/l2/capacity"),
        ("user.uid=0", "/user/uid"),
        ("http.port=80", "/http/port"),
        ("replicas=2", "replicas"),
        ('image.digest="sha256:1"', "/image/digest"),
        ("config.transfer.mover=2", "mover"),
        ('config.transfer.movers="two"', "/config/transfer/movers"),
        ('config.l1.capacity="1TiB"', "capacity"),
        ('config.tcp.listen="0.0.0.0:9471"', "listen"),
        ('tcp={"port": 9471, "clients": ["a.example"]}', "/tcp"),
        ('tcp={"port": 9471, "secret": "tls"}', "/tcp"),
        ('tcp={"port": 80, "secret": "tls", "clients": ["a.example"]}', "/tcp/port"),
        ('config.daemon.state_dir="/data"', "state_dir"),
        ('catalog.models.m={"sourc": "s3://bucket/m"}', "sourc"),
        ('catalog.models.m={"source": "s3://bucket/m", "tier": "hottest"}', "/catalog/models/m/tier"),
        ('catalog.tenants.t={"l3": "10%"}', "l3"),
        ('credentials.awsKey="aws"', "/credentials/secret"),
        ('catalog={"existingConfigMap": "mine", "models": {"m": {"source": "s3://bucket/m"}}}', "/catalog/models"),
        ("maxUnavailable=0", "/maxUnavailable"),
        ("fleet.slots=-1", "/fleet/slots"),
        ('tolerations=[{"key": "gpu", "effect": "Never"}]', "effect"),
        ("hostIPC=true", "hostIPC"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_its_name(setting, named):
    with pytest.raises(subprocess.CalledProcessError) as refused:
        charted(None, setting)
    assert "values don't meet the specifications of the schema" in refused.value.stderr
    assert named in refused.value.stderr


def test_settings_of_the_daemon_keep_their_types():
    text = config_text(
        parsed(charted(None, 'config.transfer={"movers": 2, "hedging": false, "retry_budget_s": 1.5}',
                       'config.access={"gids": [9470, 20]}', 'config.s3={"endpoint_url": "https://s3.example.com/?a=<b>&c"}'))
    )  # fmt: skip
    assert "movers = 2\n" in text
    assert "hedging = false\n" in text
    assert "retry_budget_s = 1.5\n" in text
    assert "gids = [9470,20]" in text
    assert r'endpoint_url = "https://s3.example.com/?a=\u003cb\u003e\u0026c"' in text  # the same to TOML


def test_what_the_chart_computes_is_a_setting():
    known = {item.key for item in describe_settings()}
    assert set(COMPUTED) <= known


def test_changed_settings_restart_the_daemons_and_a_changed_catalog_does_not():
    def template_of(*settings):
        return one(parsed(charted(None, *settings)), "DaemonSet")["spec"]["template"]

    assert template_of() != template_of("config.transfer.movers=2")
    assert template_of() == template_of('catalog.models.m={"source": "s3://bucket/m"}')


@pytest.mark.parametrize("size", ["512Mi", "16Gi", "2Ti"])
def test_memory_is_the_sum(size):
    megabytes = {"512Mi": 512, "16Gi": 16 << 10, "2Ti": 2 << 20}[size] + 4 * 1024 + 2 * 1024
    _, container = daemon_of(parsed(charted(None, f'l1.capacity="{size}"')))
    expected = f"{megabytes // 1024}Gi" if megabytes % 1024 == 0 else f"{megabytes}Mi"
    assert container["resources"]["limits"]["memory"] == expected


def test_what_is_said_after_the_installation():
    """``helm install --dry-run=client`` speaks with no cluster, and is what renders NOTES.txt."""
    said = helm("install", "cached", CHART, "--namespace", "cached", "--dry-run=client", "--set", "l1.capacity=8Gi")
    notes = said.partition("NOTES:")[2]
    assert "8Gi of L1 each (14Gi of memory)" in notes
    assert "kubectl label namespace cached pod-security.kubernetes.io/enforce=privileged" in notes
    assert "The catalog is empty" in notes
    assert "supplementalGroups: [9470]" in notes


def test_what_is_generated_is_fresh():
    assert [str(path) for path, text in outputs() if not path.exists() or path.read_text() != text] == []
