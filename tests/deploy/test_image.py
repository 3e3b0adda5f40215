"""The image: clean by hadolint's rules, its numbers those of the chart, its steps carried out."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import cached
from deploy.tools import CHART
from tests.deploy.manifests import daemon_of, kustomized, parsed

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "deploy" / "image"
DOCKERFILE = (IMAGES / "Dockerfile").read_text()
HADOLINT = Path(sys.executable).with_name("hadolint")


def instructions(text: str = DOCKERFILE) -> list[tuple[str, str]]:
    """(instruction, its argument on one line), in order."""
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^#.*\n", "", text))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def given(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


@pytest.mark.parametrize("file", sorted(IMAGES.glob("*Dockerfile")), ids=lambda path: path.name)
def test_hadolint(file):
    done = subprocess.run([HADOLINT, "--failure-threshold", "style", file], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_finds_faults():
    done = subprocess.run([HADOLINT, "-"], input="FROM python\n", capture_output=True, text=True)
    assert "DL3006" in done.stdout


def test_the_base_is_pinned_and_everything_is_installed_by_hash():
    (base,) = [rest for rest in given("ARG") if rest.startswith("PYTHON_IMAGE=")]
    assert re.search(r"/python:\d+\.\d+\.\d+-slim-\w+$", base)
    assert [rest.split()[0] for rest in given("FROM")] == ["${PYTHON_IMAGE}"] * 2
    for command in re.findall(r"/pip (?:--python \S+ )?install [^&]*", " ".join(given("RUN"))):
        assert "--no-deps" in command
        assert ("--require-hashes" in command and "--only-binary :all:" in command) or "--no-index" in command
    assert not re.search(r"apt-get|gcc|build-essential", DOCKERFILE)


def test_it_runs_as_the_user_that_the_manifests_name():
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    user = f"{values['user']['uid']}:{values['user']['gid']}"
    assert given("USER") == [user]
    assert f"useradd --uid {values['user']['uid']} --gid {values['user']['gid']}" in " ".join(given("RUN"))
    _, container = daemon_of(parsed(kustomized("base")))
    security = container["securityContext"]
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == user
    assert given("EXPOSE") == [str(container["ports"][0]["containerPort"])]


def test_versions_are_those_of_the_package():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == cached.__version__
    assert f'image.version="{cached.__version__}"' in DOCKERFILE
    tags = {
        image.get("newTag") for path in (ROOT / "deploy" / "kubernetes").rglob("kustomization.yaml")
        for image in yaml.safe_load(path.read_text()).get("images", ())
    }  # fmt: skip
    assert tags == {cached.__version__}


def test_it_ends_in_exec_form():
    """A shell as the first process would keep SIGTERM to itself."""
    assert json.loads(given("ENTRYPOINT")[0]) == ["cached"]
    assert json.loads(given("CMD")[0]) == ["serve"]
    check = given("HEALTHCHECK")[0].partition("CMD ")[2]
    assert json.loads(check)[0] == "python3"
    assert given("STOPSIGNAL") == ["SIGTERM"]


def test_the_build_context_holds_what_is_copied():
    ignored = (IMAGES / "Dockerfile.dockerignore").read_text()
    allowed = {line[1:] for line in ignored.splitlines() if line.startswith("!")}
    copied = {
        part.rstrip("/") for rest in given("COPY") if not rest.startswith("--from") for part in shlex.split(rest)[:-1]
    }
    assert copied == allowed
    assert all((ROOT / path).exists() for path in copied)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_first_stage_carried_out_gives_an_environment_that_works(tmp_path):
    """Its COPY and RUN steps with another root, and without a compiler in reach. The second stage copies the result."""
    places = {name: tmp_path / name.strip("/") for name in ("/src", "/build", "/opt/cached", "/wheels")}
    places["/src"].mkdir()
    (tmp_path / "opt").mkdir()
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "python3"):
        (tools / name).symlink_to(os.path.realpath(sys.executable) if name == "python3" else shutil.which(name))
    # Bytecode is only for speed, and takes half of the time. No is yes here: pip's flag is --no-compile.
    environment = {"PATH": str(tools), "HOME": str(tmp_path), "PIP_NO_COMPILE": "0"}
    environment |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
    stage = DOCKERFILE.split("\nFROM ")[1]
    for word, rest in instructions(f"FROM {stage}"):
        if word == "COPY":
            *sources, target = shlex.split(rest)
            for source in sources:
                copy(ROOT / source, places["/src"] / target, keep_name=target.endswith("/"))
        elif word == "RUN":
            script = rest
            for name, path in places.items():
                script = re.sub(rf"(?<![\w.]){name}\b", str(path), script)
            done = subprocess.run(
                ["sh", "-euc", script], cwd=places["/src"], env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
    command = places["/opt/cached"] / "bin" / "cached"
    said = subprocess.run([command, "version"], env={"PATH": ""}, capture_output=True, text=True)
    assert cached.__version__ in said.stdout, said.stderr
    code = (
        "from importlib.metadata import distributions as d; print(*sorted({x.metadata['Name'].lower() for x in d()}))"
    )
    installed = subprocess.run(
        [command.with_name("python3"), "-c", code], capture_output=True, text=True
    ).stdout.split()
    assert {"boto3", "grpcio", "obstore", "cached", "cached-client"} <= set(installed)
    assert not {"pip", "hatchling", "pytest", "torch"} & set(installed)
    checked = subprocess.run(
        [Path(sys.executable).with_name("uv"), "pip", "check", "--python", command.with_name("python3")],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stderr


def copy(source: Path, target: Path, *, keep_name: bool) -> None:
    """As COPY does: a folder's content, a file into a folder that ends with a slash."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.mkdir(parents=True, exist_ok=True) if keep_name else target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
