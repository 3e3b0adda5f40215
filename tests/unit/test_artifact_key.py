"""Keys of compile artifacts: what is in them, their one document, and how artifacts lie at an origin."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cached.cache import artifact_key
from cached.catalog_file import parse_catalog
from cached.config import Place, load_config
from cached.errors import ConfigError, IntegrityError, InvalidRequestError, NotFoundError
from cached.origins.base import OriginObject
from cached.refs import artifact_digest, artifact_name
from cached_client.artifacts import Difference, differences, environment_key
from cached_client.errors import InvalidRequestError as ClientInvalidRequestError

KEY = {"model": "m", "engine": "torch", "engine_version": "2.13"}
SHA = "ab" * 32


def test_a_key_has_one_document_and_so_one_name():
    document = artifact_key.key_document(KEY)
    assert document == artifact_key.key_document(dict(reversed(KEY.items())))
    assert json.loads(document) == {"format": 1, "key": KEY}
    name = artifact_key.name_of(KEY)
    assert artifact_digest(name)
    assert artifact_key.parse_document(document, name) == KEY
    assert artifact_key.name_of(KEY | {"driver": "1"}) != name


@pytest.mark.parametrize(
    "key",
    [
        {}, {"model": "m"}, {"engine": "e"}, {**KEY, "model": ""}, {**KEY, "Bad": "x"}, {**KEY, "a b": "x"},
        {**KEY, "x": ""}, {**KEY, "x": "a\nb"}, {**KEY, "x": "a" * 600}, {**KEY, **{f"f{i}": "x" for i in range(70)}},
    ],
)  # fmt: skip
def test_what_is_no_key_is_refused(key):
    with pytest.raises(InvalidRequestError, match="key of a compile artifact"):
        artifact_key.key_document(key)


@pytest.mark.parametrize(
    "document",
    [
        b"", b"{}", b"[]", b"null", b"\xff", json.dumps({"format": 1, "key": KEY}).encode(),
        artifact_key.key_document(KEY | {"driver": "2"}), artifact_key.key_document(KEY) + b" ",
        json.dumps({"format": 1, "key": [1]}).encode(), b"[" * 100_000,
    ],
)  # fmt: skip
def test_only_its_own_document_is_an_artifacts_key(document):
    with pytest.raises(IntegrityError, match="is not the document that gave it its name"):
        artifact_key.parse_document(document, artifact_key.name_of(KEY))


def listed(*paths: str, size_bytes: int = 10) -> list[OriginObject]:
    return [OriginObject(path, size_bytes, "v") for path in paths]


def test_the_latest_archive_counts_and_of_two_the_same_on_every_host():
    name = artifact_key.name_of(KEY)
    paths = [artifact_key.archive_path(*item) for item in ((1, "aa" * 32), (2, "cc" * 32), (2, "bb" * 32))]
    key, archive = artifact_key.choose(name, listed("key.json", *paths, "README"), 100)
    assert (key.path, archive.path) == ("key.json", paths[2])
    for missing in (paths, ["key.json"], ["key.json", "evil.tar", "1-aa.tar"]):
        with pytest.raises(NotFoundError):
            artifact_key.choose(name, listed(*missing), 100)
    with pytest.raises(InvalidRequestError, match="at most"):
        artifact_key.choose(name, listed("key.json", *paths, size_bytes=101), 100)


def test_only_artifacts_come_from_the_destination():
    place = artifact_key.Destination("s3://b/artifacts/", 100)
    assert place.source_of(artifact_name(SHA)) == f"s3://b/artifacts/{SHA}"
    assert place.source_of("m") == artifact_key.Destination("", 100).source_of(artifact_name(SHA)) == ""


def test_no_model_of_the_catalog_has_an_artifacts_name():
    name = artifact_name(SHA)
    with pytest.raises(ConfigError, match="is the name of a compile artifact"):
        parse_catalog(json.dumps({"models": {name: {"source": "s3://b/m"}}}), "json", "catalog.json")
    assert artifact_digest("artifact.v1") == artifact_digest(name + "0") == ""


@pytest.mark.parametrize("uri", ["s3:/b", "s3://", "http://x/y", "/folder", "file://folder", "s3://b/p?x=1"])
def test_a_destination_is_a_uri_that_can_be_written_to(uri):
    place = Place(uid=1000, run_dir_writable=False, config_file="/nowhere")
    with pytest.raises(ConfigError, match=r"artifacts\.destination"):
        load_config(None, {"HOME": "/h", "CACHED_ARTIFACTS_DESTINATION": uri}, {}, place)


# What the client makes of its environment.


def test_differences_are_told_field_by_field():
    assert differences(KEY, {"model": "m", "engine": "vllm", "driver": "1"}) == (
        Difference("driver", "", "1"),
        Difference("engine", "torch", "vllm"),
        Difference("engine_version", "2.13", ""),
    )
    assert str(Difference("driver", "", "1")) == "driver: wanted nothing, found 1"
    assert differences(KEY, dict(KEY)) == ()


def test_the_environments_key_needs_no_torch_and_names_its_version():
    program = (
        "import sys, json; from cached_client.artifacts import environment_key;"
        "key = environment_key('m', 'torch', device='cpu', dtype='bf16', libc='');"
        "assert not {'torch', 'grpc', 'numpy'} & set(sys.modules); print(json.dumps(key))"
    )
    key = json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    import torch

    assert key["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert key["engine_version"] == key["torch"]
    assert key["cuda"] == (torch.version.cuda or "none")
    assert key["dtype"] == "bf16"
    assert key["python"] == sys.implementation.cache_tag
    assert "flags:" in key["cpu"]
    assert not {"libc", "gpu", "gpu_arch", "driver", "revision"} & set(key)
    artifact_key.key_document(key)  # the daemon takes it


H200 = "0, GPU-aaaa, NVIDIA H200, 9.0, 580.65.06\n"
L4 = "1, GPU-bbbb, NVIDIA L4, 8.9, 580.65.06\n"


@pytest.mark.parametrize(
    ("listing", "visible", "expected"),
    [
        (H200, None, ("NVIDIA H200", "sm_90", "580.65.06")),
        (H200 + H200, None, ("NVIDIA H200", "sm_90", "580.65.06")),
        (H200 + L4, None, ("NVIDIA H200 + NVIDIA L4", "sm_89 + sm_90", "580.65.06")),
        (H200 + L4, "1", ("NVIDIA L4", "sm_89", "580.65.06")),
        (H200 + L4, "GPU-aa", ("NVIDIA H200", "sm_90", "580.65.06")),
        (H200, "", None),
        (H200, "-1", None),
        ("", None, None),
    ],
)
def test_the_key_names_the_gpus_that_can_be_seen(tmp_path, monkeypatch, listing, visible, expected):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '{listing}'\n".replace("\n'", "\\n'"))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    key = environment_key("m", "vllm", engine_version="1")
    assert (tuple(key.get(name) for name in ("gpu", "gpu_arch", "driver")) if "gpu" in key else None) == expected
    assert "gpu" not in environment_key("m", "vllm", device="cpu")
    if expected is None:
        with pytest.raises(ValueError, match="no CUDA device"):
            environment_key("m", "vllm", device="cuda")


def test_nvidia_smi_that_fails_is_no_gpu(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert "gpu" not in environment_key("m", "vllm")


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="not a device"):
        environment_key("m", "vllm", device="tpu")


@pytest.mark.parametrize("value", [2, 0, None, b"2", "\ud800"])
def test_a_field_of_ones_own_is_a_text(value):
    with pytest.raises(ClientInvalidRequestError, match=r"'tp' of the key .* is no text"):
        environment_key("m", "vllm", device="cpu", tp=value)
