"""What the DaemonSet and the workers' examples would run, run: see tests/deploy/pods.py for what that has of a pod."""

from __future__ import annotations

import json
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import yaml

from tests.deploy.manifests import Manifest, charted, daemon_of, kustomized, one, parsed
from tests.deploy.pods import Container, Node, why_not
from tests.integration.harness import wait_for
from tests.integration.support import MB, model_files, total_bytes
from tests.servers import ACCESS_KEY, SECRET_KEY, RcloneS3

pytestmark = [pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"), pytest.mark.timeout(300)]

CREDENTIALS = f"[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
MODEL, OTHER = "llama-13b", "all-minilm-l6-v2"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


@dataclass
class Cluster:
    """One node, and the chart's objects on it."""

    node: Node
    manifests: list[Manifest]
    folder: Path
    port: int
    started: int = 0

    @property
    def pod(self) -> Manifest:
        return daemon_of(self.manifests)[0]

    def start(self) -> Container:
        """The DaemonSet's pod: its init step, then the daemon once its startup probe passes."""
        self.started += 1
        scratch = self.folder / f"pod-{self.started}"
        with Container(self.node, self.pod, "folders", scratch) as init:
            assert init.wait() == 0, init.log()
        daemon = Container(self.node, self.pod, "cached", scratch)
        try:
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                wait_for(partial(self.probe, probe, daemon), probe)
        except BaseException:
            daemon.close()
            raise
        return daemon

    def probe(self, name: str, daemon: Container) -> bool:
        """Asks as the kubelet does: what the manifest says, at the port that it names."""
        assert daemon.is_running, daemon.log()
        (container,) = self.pod["containers"]
        ask = container[name]["httpGet"]
        (port,) = [item["containerPort"] for item in container["ports"] if item["name"] == ask["port"]]
        return get(f"http://127.0.0.1:{port}{ask['path']}")[0] == 200

    def metric(self, name: str) -> float:
        text = get(f"http://127.0.0.1:{self.port}/metrics")[1]
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def worker(self, manifest: Manifest, container: str, **environment: str) -> Container:
        self.started += 1
        pod = manifest["spec"]["template"]["spec"]
        return Container(self.node, pod, container, self.folder / f"worker-{self.started}", environment)

    def python(self, manifest: Manifest, container: str, code: str) -> str:
        """What a worker's container prints that runs this instead of its own command."""
        pod = json.loads(json.dumps(manifest["spec"]["template"]["spec"]))
        next(item for item in pod["containers"] if item["name"] == container)["command"] = ["python", "-c", code]
        next(item for item in pod["containers"] if item["name"] == container)["args"] = []
        self.started += 1
        with Container(self.node, pod, container, self.folder / f"worker-{self.started}") as ran:
            assert ran.wait() == 0, ran.log()
            return ran.log()


def cluster(folder: Path, server: RcloneS3, bucket: str, *settings: str) -> Cluster:
    port = free_port()
    values = folder / "values.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    values.write_text(
        yaml.safe_dump(
            {
                "http": {"port": port, "address": "127.0.0.1"},
                "l1": {"capacity": "512Mi", "transient": "64Mi", "heap": "512Mi"},
                "l2": {"capacity": "1GiB"},
                "config": {
                    "l1": {"memory_reserve_bytes": "0B", "pool_bytes": "0B"},
                    "s3": {"endpoint_url": server.endpoint_url},
                    "transfer": {"movers": 1},
                },
                "credentials": {"secret": "s3", "awsKey": "credentials"},
                "catalog": {"models": {MODEL: {"source": f"s3://{bucket}/{MODEL}"}}},
            }
        )
    )
    manifests = parsed(charted(values, *settings))
    node = Node(folder / "node")
    node.apply(manifests)
    node.put("Secret", "s3", {"credentials": CREDENTIALS})
    return Cluster(node, manifests, folder, port)


@pytest.fixture(scope="module")
def bucket(rclone_s3: RcloneS3) -> str:
    rclone_s3.create_bucket("pods")
    for number, model in enumerate((MODEL, OTHER)):
        for path, data in model_files(20 * MB, seed=number + 1).items():
            rclone_s3.put("pods", f"{model}/{path}", data)
    return "pods"


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, rclone_s3: RcloneS3, bucket: str
) -> Iterator[tuple[Cluster, Container]]:
    made = cluster(tmp_path_factory.mktemp("cluster") / "c", rclone_s3, bucket)
    try:
        with made.start() as daemon:
            yield made, daemon
    finally:
        made.node.close()


@pytest.fixture(scope="module")
def examples() -> list[Manifest]:
    return parsed(kustomized("examples"))


def test_the_init_step_gives_the_folders_to_the_daemon(running):
    made, _ = running
    found = {
        path: (os.stat(made.node.host_path(path)).st_uid, os.stat(made.node.host_path(path)).st_mode & 0o777)
        for path in ("/run/cached", "/var/lib/cached", "/dev/shm/cached")
    }
    assert found == {"/run/cached": (9470, 0o750), "/var/lib/cached": (9470, 0o700), "/dev/shm/cached": (9470, 0o700)}


def test_a_worker_pulls_and_attaches_with_nothing_but_the_sockets_folder(running, examples):
    made, _ = running
    vllm = one(examples, "Deployment", "vllm")
    with made.worker(vllm, "pull") as init:
        assert init.wait() == 0, init.log()
    told = json.loads(made.python(vllm, "vllm", ATTACH).splitlines()[-1])
    assert told == {"bytes": total_bytes(model_files(20 * MB, seed=1)), "segments": [], "directory": None, "uid": 1000}


ATTACH = f"""
import json, os, cached_client
with cached_client.connect() as cache, cache.attach("{MODEL}", wait=True) as model:
    size_bytes = sum(len(model.view(path)) for path in model.files)
    segments = [name for name in (*os.listdir("/dev/shm"), *os.listdir("/dev")) if name.startswith("cached")]
    print(json.dumps({{"bytes": size_bytes, "segments": segments, "directory": model.directory, "uid": os.getuid()}}))
"""


def test_the_example_worker_gets_ready_once_the_catalog_names_its_model(running, examples, bucket):
    """The kubelet exchanges the folder of a ConfigMap by a link; the daemon notices, and is not restarted."""
    made, daemon = running
    worker = one(examples, "Deployment", "worker")
    made.node.apply(examples)
    catalog = one(made.manifests, "ConfigMap", "cached-catalog")
    models = json.loads(catalog["data"]["catalog.json"])["models"] | {OTHER: {"source": f"s3://{bucket}/{OTHER}"}}
    made.node.put("ConfigMap", "cached-catalog", {"catalog.json": json.dumps({"models": models})})
    wait_for(lambda: daemon.log().count('"event": "catalog.loaded"') == 2, "the exchanged catalog")
    port = free_port()
    with made.worker(worker, "worker", PORT=str(port)) as process:
        path = worker["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]["path"]
        wait_for(lambda: get(f"http://127.0.0.1:{port}{path}")[0] == 200, f"readiness: {process.log()}")
        assert process.terminate() == 0


def test_a_new_pod_finds_what_the_old_one_had_in_memory(tmp_path, rclone_s3, bucket, examples):
    made = cluster(tmp_path / "c", rclone_s3, bucket)
    vllm = one(examples, "Deployment", "vllm")
    try:
        with made.start() as daemon:
            with made.worker(vllm, "pull") as init:
                assert init.wait() == 0, init.log()
            assert daemon.terminate() == 0, daemon.log()
        with made.start() as daemon:
            wait_for(lambda: made.metric("cached_adopted_bytes_total") >= 20 * MB, "the segments to be adopted")
            assert json.loads(made.python(vllm, "vllm", ATTACH).splitlines()[-1])["bytes"] > 20 * MB
            assert made.metric('cached_transfer_bytes_total{from="l3"') == 0
            assert daemon.terminate() == 0, daemon.log()
    finally:
        made.node.close()


def test_a_program_that_maps_files_reads_them_through_the_directory_view(tmp_path, rclone_s3, bucket, examples):
    made = cluster(tmp_path / "c", rclone_s3, bucket, "directoryView=true")
    reader = one(examples, "Deployment", "llama-cpp")
    read = f"""
import hashlib, os
path = "/run/cached/models/{MODEL}/model.safetensors"
print(os.path.dirname(os.path.realpath(path)), hashlib.sha256(open(path, "rb").read()).hexdigest())
"""
    try:
        with made.start():
            with made.worker(reader, "pull", MODEL=MODEL) as init:
                assert init.wait() == 0, init.log()
            place, digest = made.python(reader, "llama", read).split()
            blob = next(made.node.host_path("/dev/shm/cached").glob("cached.*.blob." + digest))
            assert (place, blob.stat().st_size) == ("/dev/cached", 20 * MB)
    finally:
        made.node.close()


def test_the_seed_of_the_trial_makes_a_model(running, rclone_s3):
    made, _ = running
    trial = parsed(kustomized("overlays/minio"))
    seed = one(trial, "Job", "seed")
    made.node.apply(
        [item for item in trial if item["kind"] == "ConfigMap" and item["metadata"]["name"].startswith("seed")]
    )
    for volume in seed["spec"]["template"]["spec"]["volumes"]:
        if "secret" in volume:
            made.node.put("Secret", volume["secret"]["secretName"], {"credentials": CREDENTIALS})
    with made.worker(seed, "seed", CACHED_S3_ENDPOINT_URL=rclone_s3.endpoint_url) as job:
        assert job.wait() == 0, job.log()
    (model,) = yaml.safe_load(one(trial, "ConfigMap", "cached-catalog")["data"]["catalog.json"])["models"].values()
    bucket, _, prefix = model["source"].removeprefix("s3://").partition("/")
    held = rclone_s3.client().list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]
    assert {item["Key"].rpartition("/")[2] for item in held} == {"config.json", "model.safetensors"}
    rclone_s3.client().delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": item["Key"]} for item in held]})
