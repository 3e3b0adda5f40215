"""The files of the service: what they are made from, and where they go."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import cached
from cached.config import example_toml
from cached.errors import InvalidRequestError
from cached.units import parse_size

UNIT = "cached.service"
USER = "cached"
MOUNT = "dev-cached.mount"
LOCAL_PREFIX = "/usr/local"
DISTRIBUTION_PREFIX = "/usr"
CONFIG_FILE = "/etc/cached/config.toml"
_SIZE_OPTION = re.compile(r"(?m)^(Options=.*\bsize=)[^,\n]*")
_PROGRAM = re.compile(r"(?m)^(ExecStart=)\S+")


class Kind(Enum):
    """What a file is for, and so who has to hear of it."""

    USER = "sysusers.d"
    TEMPORARY = "tmpfiles.d"
    CONFIGURATION = "configuration"
    UNIT = "unit"


@dataclass(frozen=True, slots=True)
class ServiceFile:
    """A file as it shall be. A configuration is the administrator's once it is there, and never written over."""

    kind: Kind
    path: str
    text: str


def sources() -> Path:
    """The folder of the unit files: within the package, and in a checkout beside it."""
    package = Path(cached.__file__).parent
    packed = package / "systemd"
    return packed if packed.is_dir() else package.parent / "systemd"


def service_files(*, program: str, prefix: str = LOCAL_PREFIX, l1_mount: str = "") -> tuple[ServiceFile, ...]:
    """All files, in the order in which they are written.

    ``program``: the absolute path of `cached`. ``l1_mount``: the size of a tmpfs of L1's own; empty: none. Raises
    InvalidRequestError for a path or size that cannot stand in a unit.
    """
    library = f"{prefix.rstrip('/')}/lib"
    if not program.startswith("/") or re.search(r"[\s\"'\\%$;]", program):
        raise InvalidRequestError(
            f"{program!r} cannot be the program of a unit",
            hint="it takes an absolute path without blanks, quotes and %; name one with --program",
            value=program,
        )
    units = f"{library}/systemd/system"
    made = [
        ServiceFile(Kind.USER, f"{library}/{Kind.USER.value}/cached.conf", _source("sysusers.conf")),
        ServiceFile(Kind.TEMPORARY, f"{library}/{Kind.TEMPORARY.value}/cached.conf", _source("tmpfiles.conf")),
        ServiceFile(Kind.CONFIGURATION, CONFIG_FILE, example_toml()),
        ServiceFile(Kind.UNIT, f"{units}/{UNIT}", _PROGRAM.sub(rf"\g<1>{program}", _source(UNIT))),
    ]
    if l1_mount:
        mount = _SIZE_OPTION.sub(rf"\g<1>{mount_size(l1_mount)}", _source(MOUNT))
        made.append(ServiceFile(Kind.UNIT, f"{units}/{MOUNT}", mount))
        made.append(ServiceFile(Kind.UNIT, f"{units}/{UNIT}.d/l1-mount.conf", _source("l1-mount.conf")))
    return tuple(made)


def mount_size(text: str) -> str:
    """``"400GiB"`` as an option of a tmpfs mount: bytes; a share of the host's memory stays one."""
    if re.fullmatch(r"[1-9]\d?%", text):
        return text
    try:
        return str(parse_size(text))
    except ValueError as error:
        raise InvalidRequestError(
            f"--l1-mount: {error}", hint="a size such as 400GiB, or a share of the memory such as 60%", value=text
        ) from None


def _source(name: str) -> str:
    return (sources() / name).read_text(encoding="utf-8")
