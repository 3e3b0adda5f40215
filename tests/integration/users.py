"""A daemon that several users reach, and clients that run as these users."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import DaemonProcess
from tests.integration.support import MB, SERVE, Worker, model_files

ANN, BEN, CLO = 61001, 61002, 61003
"""Users that no host has."""
ALL_MAY_OPEN = {"access": {"socket_mode": "0666"}}

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")

Open = Callable[..., Worker]


@contextmanager
def public_folder() -> Iterator[Path]:
    """One that other users can enter, which pytest's are not."""
    with tempfile.TemporaryDirectory(prefix="cached-users-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@contextmanager
def as_uid(uid: int) -> Iterator[None]:
    """What this process connects to meanwhile takes it for that user."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def shared_daemon(
    models: Mapping[str, Mapping[str, Any]],
    *,
    tenants: Mapping[str, Any] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    around: Sequence[str] = (),
) -> Iterator[tuple[DaemonProcess, Open]]:
    """A daemon with models of 100 kB, each with this entry in the catalog, and what opens a client as a user.

    ``around``: the program that starts it.
    """
    with public_folder() as folder, ExitStack() as stack:
        entries = {}
        for number, (name, entry) in enumerate(models.items()):
            source = folder / "origin" / name
            source.mkdir(parents=True)
            for path, data in model_files(MB // 10, seed=number).items():
                (source / path).write_bytes(data)
            entries[name] = {"source": f"file://{source}", **entry}
        merged = {name: dict(values) for name, values in ALL_MAY_OPEN.items()}
        for name, values in (settings or {}).items():
            merged.setdefault(name, {}).update(values)
        command = (*around, *SERVE)
        daemon = stack.enter_context(
            DaemonProcess(folder / "d", models=entries, tenants=tenants, settings=merged, command=command)
        )
        folder.joinpath("d").chmod(0o755)

        def as_user(uid: int, *groups: int) -> Worker:
            ids = [str(item) for item in (uid, uid, *groups)]
            return stack.enter_context(Worker(daemon.socket, *ids, module="tests.integration.user_process"))

        yield daemon, as_user
