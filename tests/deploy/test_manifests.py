"""Everything that kustomize and the chart render: valid for Kubernetes, sound, and what the daemon itself accepts."""

from __future__ import annotations

import re

import kubernetes_validate
import pytest
import yaml

from cached.catalog_file import load_catalog
from cached.setting_checks import resolve_capacity
from cached.units import MIB, parse_size
from deploy.generate import described
from deploy.tools import CHART
from tests.deploy.manifests import (
    CI_VALUES,
    CUSTOM,
    OVERLAYS,
    charted,
    config_of,
    containers,
    daemon_of,
    kustomized,
    of_kind,
    one,
    parsed,
    pods,
    quantity,
)

DAEMONS = {name: (lambda name=name: kustomized(name)) for name in OVERLAYS}
DAEMONS |= {"chart": charted, **{path.stem: (lambda path=path: charted(path)) for path in CI_VALUES}}
ALL = DAEMONS | {"examples": lambda: kustomized("examples")}
VERSIONS = ("1.27", "1.37")
"""The oldest that the chart says, and the newest that is known."""


@pytest.fixture(params=ALL, ids=str)
def manifests(request):
    return parsed(ALL[request.param]())


@pytest.fixture(params=DAEMONS, ids=str)
def daemons(request):
    return parsed(DAEMONS[request.param]())


@pytest.mark.parametrize("version", VERSIONS)
def test_they_are_valid(manifests, version):
    for manifest in manifests:
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_validation_is_strict():
    broken = one(parsed(kustomized("base")), "DaemonSet")
    broken["spec"]["template"]["spec"]["hostIpc"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="hostIpc"):
        kubernetes_validate.validate(broken, "1.33", strict=True)


def test_nothing_has_more_rights_than_it_needs(manifests):
    for _, pod in pods(manifests):
        assert not {"hostIPC", "hostNetwork", "hostPID"} & pod.keys()
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            security = container["securityContext"]
            assert (security["allowPrivilegeEscalation"], security["readOnlyRootFilesystem"]) == (False, True)
            assert security["capabilities"]["drop"] == ["ALL"]
            assert "privileged" not in security
            is_init_step = container["name"] == "folders"
            assert security["capabilities"].get("add", []) == (["CHOWN", "FOWNER"] if is_init_step else [])
            user = {**pod["securityContext"], **security}
            assert (user["runAsUser"] == 0) is is_init_step
            assert is_init_step or user["runAsNonRoot"]


def test_every_container_is_bounded_and_pinned(manifests):
    for _, pod in pods(manifests):
        for container in containers(pod):
            resources = container["resources"]
            assert resources["limits"]["memory"] == resources["requests"]["memory"] or container["name"] in (
                "minio",
                "seed",
            )
            assert re.search(r":(?!latest$)[^/]+$|@sha256:[0-9a-f]{64}$", container["image"]), container["image"]


def test_tokens_are_mounted_only_where_there_is_rbac(manifests):
    has_rbac = {kind for kind in ("RoleBinding", "ClusterRoleBinding") if of_kind(manifests, kind)}
    for owner, pod in pods(manifests):
        assert pod["automountServiceAccountToken"] is (bool(has_rbac) and owner["kind"] == "DaemonSet")
        assert pod["enableServiceLinks"] is False


def test_volumes_are_those_that_are_mounted(manifests):
    for _, pod in pods(manifests):
        mounted = {mount["name"] for container in containers(pod) for mount in container["volumeMounts"]}
        assert {volume["name"] for volume in pod["volumes"]} == mounted
        for container in containers(pod):
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(paths) == len(set(paths))


def test_what_is_referred_to_is_there(manifests):
    there = {(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in manifests}
    # Of the values' own cluster:
    others = {"cached-credentials", "corporate-ca", "models-of-the-platform", "azure", "cached-tls"}
    for owner, pod in pods(manifests):
        space = owner["metadata"]["namespace"]
        for volume in pod["volumes"]:
            for kind, key, name in (("ConfigMap", "configMap", "name"), ("Secret", "secret", "secretName"),
                                    ("PersistentVolumeClaim", "persistentVolumeClaim", "claimName")):  # fmt: skip
                if key in volume and volume[key][name] not in others:
                    assert (kind, space, volume[key][name]) in there
        if (account := pod.get("serviceAccountName", "default")) != "default":
            assert ("ServiceAccount", space, account) in there
        if (priority := pod.get("priorityClassName", "system-node-critical")) != "system-node-critical":
            assert ("PriorityClass", None, priority) in there
    for binding in (*of_kind(manifests, "RoleBinding"), *of_kind(manifests, "ClusterRoleBinding")):
        assert (binding["roleRef"]["kind"], binding["metadata"].get("namespace"), binding["roleRef"]["name"]) in there
        for subject in binding["subjects"]:
            assert ("ServiceAccount", subject["namespace"], subject["name"]) in there


def test_selectors_select(manifests):
    labels = [(owner["metadata"]["namespace"], labels_of(owner)) for owner, _ in pods(manifests)]
    for manifest in manifests:
        spec = manifest.get("spec", {})
        wanted = {
            "DaemonSet": lambda spec=spec: spec["selector"]["matchLabels"],
            "Deployment": lambda spec=spec: spec["selector"]["matchLabels"],
            "NetworkPolicy": lambda spec=spec: spec["podSelector"]["matchLabels"],
            "PodDisruptionBudget": lambda spec=spec: spec["selector"]["matchLabels"],
            "PodMonitor": lambda spec=spec: spec["selector"]["matchLabels"],
            "Service": lambda spec=spec: spec["selector"],
        }.get(manifest["kind"])
        if wanted:
            space = manifest["metadata"]["namespace"]
            assert [found for where, found in labels if where == space and wanted().items() <= found.items()], manifest


def labels_of(owner):
    return owner["metadata"]["labels"] if owner["kind"] == "Pod" else owner["spec"]["template"]["metadata"]["labels"]


def test_ports_that_are_named_are_there(manifests):
    ports = {
        port["name"]: port["containerPort"]
        for _, pod in pods(manifests) for container in pod["containers"] for port in container.get("ports", ())
    }  # fmt: skip
    for _, pod in pods(manifests):
        for container in containers(pod):
            own = {port["name"] for port in container.get("ports", ())}
            probes = [container[name] for name in container if name.endswith("Probe")]
            assert {probe["httpGet"]["port"] for probe in probes} <= own
    for policy in of_kind(manifests, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", ()):
            assert {port["port"] for port in rule["ports"]} <= ports.keys()
    for monitor in of_kind(manifests, "PodMonitor"):
        assert [(end["port"], end["path"]) for end in monitor["spec"]["podMetricsEndpoints"]] == [("http", "/metrics")]
    for service in of_kind(manifests, "Service"):
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports.keys()


# The daemon.


def test_the_daemon_accepts_its_settings(daemons, tmp_path):
    pod, container = daemon_of(daemons)
    config = config_of(daemons, tmp_path)
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert (config.daemon.socket, config.daemon.state_dir) == ("/run/cached/cached.sock", "/var/lib/cached")
    assert config.daemon.catalog.rpartition("/")[0] in mounts
    assert mounts[config.l1.path]["name"] == "l1"
    assert {path for path in config.l2.folders if path.startswith("/var/lib/cached-drives")} == {
        path for path in mounts if path.startswith("/var/lib/cached-drives")
    }
    ports = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
    assert config.http.listen.rpartition(":")[2] == ports["http"]
    assert config.tcp.listen.rpartition(":")[2] == ports.get("grpc", "")
    for file in filter(None, (config.tcp.cert, config.tcp.key, config.tcp.client_ca)):
        assert mounts[file.rpartition("/")[0]]["name"] == "tls"
    assert not config.http.listen.startswith("127.")  # the kubelet asks from outside of the pod
    assert pod["terminationGracePeriodSeconds"] >= config.daemon.drain_timeout_s + 35
    # Workers see the folder of the sockets: links that lead nowhere for them must not be in it.
    assert config.daemon.models_dir.startswith("/run/cached/") is (config.l1.segment_mode == "0640")


def test_memory_holds_all_of_l1_and_the_daemon_itself(daemons, tmp_path):
    pod, container = daemon_of(daemons)
    config = config_of(daemons, tmp_path)
    l1 = parse_size(config.l1.capacity)
    needed = l1 + resolve_capacity(config.l1.transient_capacity, l1)
    limit = quantity(container["resources"]["limits"]["memory"])
    assert limit >= needed + 500 * MIB
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    (l1_volume,) = [volume for volume in pod["volumes"] if volume["name"] == "l1"]
    if "emptyDir" in l1_volume:
        assert l1_volume["emptyDir"]["medium"] == "Memory"
        assert needed <= quantity(l1_volume["emptyDir"]["sizeLimit"]) < limit
    else:
        assert l1_volume["hostPath"]["path"].startswith("/dev/shm/")  # of its own: never all of the node's


def test_the_daemon_accepts_its_catalog(daemons, tmp_path):
    pod, _ = daemon_of(daemons)
    (name,) = [volume["configMap"]["name"] for volume in pod["volumes"] if volume["name"] == "catalog"]
    found = [item for item in of_kind(daemons, "ConfigMap") if item["metadata"]["name"] == name]
    if not found:
        assert name == "models-of-the-platform"
        return
    file = tmp_path / "catalog.json"
    file.write_text(found[0]["data"]["catalog.json"])
    load_catalog(file)


def test_the_catalog_is_a_folder_with_a_name_that_stays(daemons):
    """A file that is mounted by itself (subPath) is never exchanged, and a new name would restart the daemons."""
    pod, container = daemon_of(daemons)
    assert not [mount for mount in container["volumeMounts"] if "subPath" in mount]
    (name,) = [volume["configMap"]["name"] for volume in pod["volumes"] if volume["name"] == "catalog"]
    assert name.endswith(("-catalog", "-of-the-platform"))


def test_two_daemons_never_share_a_node(daemons):
    strategy = one(daemons, "DaemonSet")["spec"]["updateStrategy"]["rollingUpdate"]
    assert strategy["maxSurge"] == 0
    assert strategy["maxUnavailable"] != 0


def test_a_second_daemon_shares_nothing_of_the_node():
    values = next(path for path in CI_VALUES if path.stem.startswith("second-daemon"))
    first, second = daemon_of(parsed(charted()))[0], daemon_of(parsed(charted(values)))[0]
    paths = [{v["hostPath"]["path"] for v in pod["volumes"] if "hostPath" in v} for pod in (first, second)]
    assert len(paths[0]) == len(paths[1]) == 3
    assert not paths[0] & paths[1]
    users = [pod["containers"][0]["securityContext"]["runAsUser"] for pod in (first, second)]
    assert users[0] != users[1]


def test_kustomize_and_the_chart_render_the_same_daemon():
    kustomize, chart = parsed(kustomized("base")), parsed(charted())
    assert without_what_differs(kustomize) == without_what_differs(chart)


def without_what_differs(manifests):
    """The names of generated ConfigMaps, and what only Helm adds."""
    kinds = ("DaemonSet", "ServiceAccount", "PriorityClass", "NetworkPolicy")
    text = yaml.safe_dump([one(manifests, kind) for kind in kinds])
    text = re.sub(r"(cached-config)-[a-z0-9]{10}\b", r"\1", text)
    return re.sub(r"(?m)^ *(helm\.sh/chart|app\.kubernetes\.io/managed-by|checksum/config): .*\n", "", text)


# Workers.


def test_workers_have_the_sockets_folder_and_nothing_else_of_the_daemon():
    for name in ("examples", "overlays/tenant"):
        for owner, pod in pods(parsed(kustomized(name))):
            if owner["kind"] == "DaemonSet":
                continue
            of_the_node = {v["name"]: v["hostPath"] for v in pod["volumes"] if "hostPath" in v}
            reads_files = owner["metadata"]["name"] == "llama-cpp"
            allowed = [{"path": "/run/cached", "type": "Directory"}]
            if reads_files:
                allowed.append({"path": "/dev/shm/cached", "type": "Directory"})
            assert list(of_the_node.values()) == ([] if name == "overlays/tenant" else allowed)
            for container in containers(pod):
                shared = [mount for mount in container["volumeMounts"] if mount["name"] in {*of_the_node, "cached"}]
                assert shared
                assert all(mount["readOnly"] for mount in shared)
                assert shared[0]["mountPath"] == "/run/cached"
            assert pod["securityContext"]["supplementalGroups"] == [9470]


def test_a_restricted_namespace_gets_the_sockets_by_a_claim():
    tenant = parsed(kustomized("overlays/tenant"))
    spaces = {item["metadata"]["name"]: item["metadata"]["labels"] for item in of_kind(tenant, "Namespace")}
    level = "pod-security.kubernetes.io/enforce"
    assert {name: labels[level] for name, labels in spaces.items()} == {"cached": "privileged", "team-a": "restricted"}
    volume, claim = one(tenant, "PersistentVolume"), one(tenant, "PersistentVolumeClaim")
    assert volume["spec"]["hostPath"]["path"] == "/run/cached"
    assert volume["spec"]["claimRef"] == {key: claim["metadata"][key] for key in ("name", "namespace")}
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert volume["spec"]["accessModes"] == claim["spec"]["accessModes"] == ["ReadOnlyMany"]


def test_workers_prefer_nodes_where_the_model_is_ready():
    rollout = one(parsed(kustomized("examples")), "Deployment", "vllm-replicas")["spec"]["template"]["spec"]
    model = rollout["containers"][0]["env"][0]["value"]
    affinity = rollout["affinity"]["nodeAffinity"]
    assert list(affinity) == ["preferredDuringSchedulingIgnoredDuringExecution"]
    terms = [item["preference"]["matchExpressions"][0]["key"] for item in next(iter(affinity.values()))]
    assert terms == [f"l1.models.cached.local/{model}", f"models.cached.local/{model}"]  # fleet.label_prefix


# What is generated.


def test_every_value_is_told():
    values = (CHART / "values.yaml").read_text()
    told = {key for key, _, _ in described(values)}
    tree = yaml.safe_load(values)
    leaves = {
        f"{key}.{inner}" if isinstance(value, dict) and value else key
        for key, value in tree.items() for inner in (value if isinstance(value, dict) and value else ("",))
    }  # fmt: skip
    assert leaves <= told
