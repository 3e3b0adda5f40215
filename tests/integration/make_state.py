"""Makes tests/integration/data/state-layout-N.tar.xz: what a daemon leaves behind, small enough to be committed.

python -m tests.integration.make_state [CHECKOUT]    CHECKOUT: of the version that shall write it; this one by default

Once a layout has its archive, that stays as it is: it stands for the hosts that still have such a folder.
"""

from __future__ import annotations

import io
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import cached_client
from cached.layout import LAYOUT
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import DaemonProcess
from tests.integration.support import ROOT, SERVE, model_files

DATA = Path(__file__).parent / "data"
SIZE = 20_000
NAME = "tiny"


def archive_of(layout: int) -> Path:
    return DATA / f"state-layout-{layout}.tar.xz"


def expected_files() -> dict[str, bytes]:
    return model_files(SIZE, seed=5)


def make(checkout: Path) -> None:
    source = Path(tempfile.gettempdir()) / "cached-state" / NAME  # this path is in the index
    source.mkdir(parents=True)
    for path, data in expected_files().items():
        (source / path).write_bytes(data)
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PYTHONPATH": f"{checkout}:{checkout}/client"}
        daemon = DaemonProcess(
            Path(folder),
            models={NAME: {"source": f"file://{source}"}},
            environment=environment,
            command=(sys.executable, "-P", *SERVE[1:]),  # -P: not the code of the working folder
        )
        with (
            daemon,
            cached_client.connect(str(daemon.socket)) as cache,
        ):
            assert list(cache.pull(NAME, timeout_s=60))[-1].phase == "ready"
            with daemon.stub() as stub:
                stub.Pin(pb.PinRequest(ref=NAME))
            assert daemon.terminate() == 0
            pack(Path(folder), archive_of(LAYOUT))
    shutil.rmtree(source.parent)


def pack(folder: Path, target: Path) -> None:
    """State and L2, without a trace of who made it and when."""

    def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for name in ("state", "l2"):
            archive.add(folder / name, name, filter=anonymous)
    target.write_bytes(buffer.getvalue())


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)
