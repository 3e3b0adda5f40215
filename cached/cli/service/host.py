"""The host, or the folder of an image, that the service is installed into: its files, and systemd's programs."""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cached.cli.service.files import UNIT, Kind, ServiceFile
from cached.errors import InvalidRequestError, NotFoundError, UnavailableError

_MANAGER = Path("/run/systemd/system")
"""There while systemd manages the host; see sd_booted(3)."""


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one file. ``word``: write, replace, keep or nothing; ``diff``: of what is replaced."""

    file: ServiceFile
    word: str
    diff: str = ""

    @property
    def writes(self) -> bool:
        """Whether anything is written."""
        return self.word in {"write", "replace"}


class Host:
    """``root``: empty for this host, else a folder that is the root of another one, as an image is built."""

    def __init__(self, root: str = "") -> None:
        self.root = os.path.abspath(root).rstrip("/") if root else ""  # systemd's programs take no relative one

    def path(self, path: str) -> Path:
        """Where a path of the installed host is now."""
        return Path(f"{self.root}{path}")

    def require(self, what: str) -> None:
        """Raises UnavailableError where no systemd runs, InvalidRequestError for a user who may not ``what``."""
        if self.root:
            return
        if not _MANAGER.is_dir() or not shutil.which("systemctl"):
            raise UnavailableError(
                "systemd does not manage this host",
                hint="`cached install-service --print` shows the unit; --root DIR installs into an image; elsewhere "
                "run `cached serve` under your own supervisor",
            )
        if os.geteuid() != 0:
            raise InvalidRequestError(
                f"only root may {what}", hint=f"sudo {shutil.which('cached') or 'cached'} …", value=os.geteuid()
            )

    def change(self, file: ServiceFile) -> Change:
        """What has to be done for a file; nothing is touched."""
        target = self.path(file.path)
        try:
            with _told(target, "read"):
                found = target.read_text(encoding="utf-8", errors="replace")
        except NotFoundError:
            return Change(file, "write")
        if found == file.text:
            return Change(file, "nothing")
        if file.kind is Kind.CONFIGURATION:
            return Change(file, "keep")
        lines = difflib.unified_diff(
            found.splitlines(), file.text.splitlines(), "as it was", "as it is now", lineterm="", n=0
        )
        return Change(file, "replace", "\n".join(lines))

    def write(self, file: ServiceFile) -> None:
        """In one step, readable for all: none of these files holds a secret."""
        target = self.path(file.path)
        with _told(target, "written"):
            for folder in reversed(target.parents):
                if not folder.is_dir():
                    folder.mkdir(mode=0o755)
                    folder.chmod(0o755)
            fresh = target.with_name(f".{target.name}.new")
            fresh.write_text(file.text, encoding="utf-8")
            fresh.chmod(0o644)
            fresh.replace(target)

    def remove(self, file: ServiceFile) -> None:
        """A file, and the folder of drop-ins that it leaves empty."""
        target = self.path(file.path)
        with _told(target, "removed"):
            target.unlink()
            if target.parent.name == f"{UNIT}.d" and not any(target.parent.iterdir()):
                target.parent.rmdir()

    def has_user(self, name: str) -> bool:
        """Whether the host's own list of users has this one."""
        try:
            lines = self.path("/etc/passwd").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return False
        return any(line.startswith(f"{name}:") for line in lines)

    def shadows(self, name: str, prefix: str) -> Iterator[str]:
        """Units of the same name that systemd takes before the one of this prefix."""
        for folder in ("/etc", "/run", "/usr/local/lib"):
            path = f"{folder}/systemd/system/{name}"
            if folder == f"{prefix}/lib":
                return
            if self.path(path).is_file():
                yield path

    def sysusers(self, file: str) -> list[str]:
        """The command that makes the user."""
        return ["systemd-sysusers", *self._root(), str(self.path(file))]

    def tmpfiles(self, file: str) -> list[str]:
        """The command that takes the rules for temporary files into account."""
        return ["systemd-tmpfiles", *self._root(), "--create", str(self.path(file))]

    def systemctl(self, *arguments: str) -> list[str]:
        """A command to the manager, or for an image to its links."""
        return ["systemctl", *self._root(), *arguments]

    def _root(self) -> list[str]:
        return [f"--root={self.root}"] if self.root else []


@contextmanager
def _told(target: Path, what: str) -> Iterator[None]:
    """Raises NotFoundError where it is not there, InvalidRequestError for anything else in its way."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError(f"{target} is not there", hint="look at the folder of --root", path=target) from error
    except OSError as error:
        raise InvalidRequestError(
            f"{target} cannot be {what}: {error.strerror}",
            hint=f"look at {error.filename or target}, and remove what is in the way",
            value=target,
        ) from error


def run(command: Sequence[str]) -> None:
    """Raises UnavailableError with what the program said."""
    if shutil.which(command[0]) is None:
        raise UnavailableError(f"{command[0]} is not installed", hint="it is part of the package systemd")
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed programs
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise UnavailableError(f"{' '.join(command)} ended with {done.returncode}: {said}", hint="journalctl -xe")


def is_active(unit: str) -> bool:
    """Whether the manager runs the unit."""
    command = ["systemctl", "is-active", "--quiet", unit]
    return shutil.which("systemctl") is not None and subprocess.run(command, check=False).returncode == 0  # noqa: S603
