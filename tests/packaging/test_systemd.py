"""The unit files, and the command that installs them."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cached.cli.main import main
from cached.cli.service.files import Kind, ServiceFile, service_files
from cached.cli.service.host import Host
from cached.cli.service.reach import needed_paths, obstacles
from cached.config import Config, Place, example_toml, load_config
from cached.errors import InvalidRequestError

FOLDER = Path(__file__).parents[2] / "systemd"
UNIT = (FOLDER / "cached.service").read_text()
needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
needs_root_tools = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("systemd-sysusers"), reason="needs root and systemd's programs"
)
Installed = Callable[..., tuple[int, str]]


def setting(name):
    return re.findall(rf"(?m)^{name}=(.*)$", UNIT)[0]


@pytest.fixture
def image(tmp_path):
    """The root of an image, with a program to be started."""
    program = tmp_path / "image" / "opt" / "cached" / "bin" / "cached"
    program.parent.mkdir(parents=True)
    shutil.copy("/bin/true", program)
    return tmp_path / "image"


@pytest.fixture
def command(image, capfd) -> Installed:
    """Runs install-service or uninstall-service on the image; its exit code, and all that it printed."""

    def run(verb: str, *arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        code = main([f"{verb}-service", "--root", str(image), *arguments])
        return code, "".join(capfd.readouterr())

    return run


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text("utf-8", "replace")
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


# The files.


@needs_systemd
def test_the_units_are_valid(tmp_path):
    """Those of the service, of its mount, and of the drop-in that joins them."""
    program = shutil.which("true") or ""
    for file in service_files(program=program, l1_mount="60%"):
        if "/systemd/system/" in file.path:
            target = tmp_path / file.path.partition("/systemd/system/")[2]
            target.parent.mkdir(exist_ok=True)
            target.write_text(file.text)
    for unit in ("cached.service", "dev-cached.mount"):
        done = subprocess.run(
            ["systemd-analyze", "verify", str(tmp_path / unit)], capture_output=True, text=True,
            env=os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        )  # fmt: skip
        assert "cached" not in done.stderr, done.stderr
        assert done.returncode == 0, done.stderr


@needs_systemd
def test_the_unit_is_a_sandbox(tmp_path):
    unit = tmp_path / "cached.service"
    unit.write_text(UNIT.replace("/usr/bin/cached", "/bin/true"))
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=15", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_units_folders_are_those_of_a_system_daemon():
    env = {"STATE_DIRECTORY": f"/var/lib/{setting('StateDirectory')}"}  # as systemd sets it
    config = load_config(None, env, {}, Place(uid=990, run_dir_writable=True, config_file="/nonexistent")).config
    assert config.daemon.socket == f"/run/{setting('RuntimeDirectory')}/cached.sock"
    assert config.daemon.state_dir == "/var/lib/cached"
    assert int(setting("TimeoutStopSec")) > Config().daemon.drain_timeout_s


def test_the_units_user_is_the_one_that_is_made():
    assert re.search(rf"(?m)^u {setting('User')} ", (FOLDER / "sysusers.conf").read_text())


def test_sizes_of_the_mount():
    def options(size):
        files = service_files(program="/usr/bin/cached", l1_mount=size)
        (text,) = (file.text for file in files if file.path.endswith(".mount"))
        return re.findall(r"(?m)^Options=(.*)$", text)

    assert options("1GiB") == ["size=1073741824,huge=advise,mode=0750,uid=cached,gid=cached,nosuid,nodev,noexec"]
    assert options("60%")[0].startswith("size=60%,")
    for wrong in ("lots", "0%", "100%", "size=1,mode=0777"):
        with pytest.raises(InvalidRequestError, match="--l1-mount"):
            options(wrong)


# The command.


def test_printed_files_are_complete(command: Installed, image: Path):
    code, said = command("install", "--print", "--program", "/opt/my/cached", "--l1-mount", "8GiB")
    assert code == 0
    assert "# /usr/local/lib/systemd/system/cached.service\n" in said
    changed = [line for line in difflib.ndiff(UNIT.splitlines(), said.splitlines()) if line.startswith("- ")]
    assert changed == ["- ExecStart=/usr/bin/cached serve"]
    assert "\nExecStart=/opt/my/cached serve\n" in said
    assert example_toml() in said
    assert list(contents(image)) == ["opt/cached/bin/cached"]


def test_a_root_may_be_relative_and_what_is_in_the_way_is_told(image: Path, capfd, monkeypatch):
    monkeypatch.chdir(image.parent)
    assert Host("image").path("/etc/x") == image / "etc/x"
    assert Host("image").systemctl("enable") == ["systemctl", f"--root={image}", "enable"]
    install = ["install-service", "--root", "image", "--program", "/opt/cached/bin/cached", "--dry-run"]
    assert main(install) == 0
    for blocked, why in (("usr/local", "Not a"), ("usr/local/lib/systemd/system/cached.service/x", "Is a")):
        (image / blocked).parent.mkdir(parents=True)
        (image / blocked).touch()
        assert main(install) == main([word for word in install if word != "--dry-run"]) == 2
        told = capfd.readouterr().err
        assert re.search(rf"{image}/usr/local/lib/\S+ cannot be read: {why} directory", told)
        shutil.rmtree(image / "usr")
    (image / "run").touch()
    with pytest.raises(InvalidRequestError, match="/run/x/y cannot be written"):
        Host("image").write(ServiceFile(Kind.UNIT, "/run/x/y", "text"))


@needs_root_tools
def test_install_again_and_uninstall(command: Installed, image: Path):
    program = ("--program", "/opt/cached/bin/cached")
    code, said = command("install", *program, "--enable", "--dry-run")
    assert code == 0
    assert "would be written: /usr/local/lib/systemd/system/cached.service" in said
    assert list(contents(image)) == ["opt/cached/bin/cached"]

    code, said = command("install", *program, "--enable")
    assert code == 0, said
    unit = image / "usr/local/lib/systemd/system/cached.service"
    config = image / "etc/cached/config.toml"
    assert "\nExecStart=/opt/cached/bin/cached serve\n" in unit.read_text()
    assert config.read_text() == example_toml()
    assert stat.S_IMODE(unit.stat().st_mode) == stat.S_IMODE(config.stat().st_mode) == 0o644
    assert re.search(r"(?m)^cached:.*:/var/lib/cached:/usr/sbin/nologin$", (image / "etc/passwd").read_text())
    assert re.search(r"(?m)^cached:", (image / "etc/group").read_text())
    assert (image / "etc/systemd/system/multi-user.target.wants/cached.service").is_symlink()

    before = contents(image)
    code, said = command("install", *program, "--enable")
    assert code == 0
    assert said.endswith("nothing to do\n"), said
    assert contents(image) == before

    config.write_text('[l1]\ncapacity = "64GiB"\n')
    code, said = command("install", "--program", "/srv/cached")
    assert "kept, it was edited: /etc/cached/config.toml" in said
    assert "    +ExecStart=/srv/cached serve" in said, "what is lost by replacing it is shown"
    assert "64GiB" in config.read_text()

    code, said = command("uninstall")
    assert code == 0, said
    assert "left as it is: /etc/cached, /var/lib/cached" in said
    left = contents(image)
    assert config.is_file()
    assert not [path for path in left if path.startswith("usr/local")]
    assert not (image / "etc/systemd/system/multi-user.target.wants/cached.service").is_symlink()
    code, said = command("uninstall")
    assert code == 3
    assert "is not installed" in said


@needs_root_tools
def test_an_older_unit_that_goes_before_is_told(command: Installed, image: Path):
    older = image / "etc/systemd/system/cached.service"
    older.parent.mkdir(parents=True)
    older.write_text("[Service]\n")
    _, said = command("install", "--program", "/opt/cached/bin/cached", "--dry-run")
    assert "careful: systemd takes /etc/systemd/system/cached.service instead" in said


@pytest.mark.skipif(Path("/run/systemd/system").is_dir(), reason="systemd manages this host")
def test_where_no_systemd_runs_nothing_is_written(capfd):
    assert main(["install-service", "--program", "/usr/bin/true"]) == 1
    said = "".join(capfd.readouterr())
    assert "systemd does not manage this host" in said
    assert "--root DIR installs into an image" in said
    assert not Path("/usr/local/lib/systemd/system/cached.service").exists()


def test_a_program_that_the_service_cannot_reach_is_refused(capfd, tmp_path):
    """This checkout's: pytest's folders are below /tmp, which the unit hides, whatever their modes."""
    program = tmp_path / "cached"
    program.write_text("#!/bin/sh\n")
    assert main(["install-service", "--dry-run", "--program", str(program)]) == 2
    said = "".join(capfd.readouterr())
    assert f"{program}: the service cannot see /tmp (PrivateTmp= in its unit)" in said
    assert "python3 -m venv /opt/cached" in said


@pytest.fixture
def open_folder():
    """One that everybody may enter and the unit does not hide, unlike pytest's."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="test-cached-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.parametrize("closed", ["folder", "file"])
def test_modes_that_keep_the_services_user_out(open_folder, closed):
    inner = open_folder / "venv"
    inner.mkdir(mode=0o755)
    program = inner / "cached"
    program.write_text("")
    program.chmod(0o755)
    assert list(obstacles(program)) == []
    target, mode = (inner, 0o750) if closed == "folder" else (program, 0o700)
    target.chmod(mode)
    assert list(obstacles(program)) == [f"{target}: mode {mode:04o} keeps the service's user out"]
    link = open_folder / "link"
    link.symlink_to(program)
    assert list(obstacles(link)) == [f"{target}: mode {mode:04o} keeps the service's user out"]
    program.unlink()
    inner.chmod(0o755)
    assert list(obstacles(program)) == [f"{program}: No such file or directory"]


def test_everything_that_a_start_reads_is_looked_at():
    paths = needed_paths("/opt/cached/bin/cached")
    assert Path("/opt/cached/bin/cached") in paths
    assert Path(sys.executable) in paths
    assert any((path / "daemon.py").is_file() for path in paths)
    assert any((path / "attach.py").is_file() for path in paths)
