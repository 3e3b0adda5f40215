"""Makes the pictures of docs/images: a daemon with a handful of models, a pull under way, and a real Chromium.

Run by ``make screenshots``; needs a Chromium in PATH. What they show is real, but for the starts of workers, which are
told as a worker would.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, expect
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cached.cli.top.screen import Screen
from cached.overview import Overview
from cached.rpc.overview import overview_of
from cached.units import MIB
from cached_client._proto import cached_pb2 as pb
from tests import browser as chrome
from tests.integration.harness import wait_for
from tests.integration.scene import ARRIVING, Scene
from tests.servers import RcloneS3

IMAGES = ROOT / "docs" / "images"
HOST = "gpu-node-17"
LIMIT_BYTES = 250_000
_RATE_BYTES_PER_S = 4 * MIB
_SHOWN = 0.3
"""Of the arriving model, from which on it looks as it should."""
_PICTURES = {"light": (1280, "light"), "dark": (1280, "dark"), "narrow": (400, "light")}


def main() -> int:
    """Writes all of them, or says what lacks."""
    if not chrome.found():
        sys.stderr.write(f"no Chromium in PATH ({', '.join(chrome.NAMES)})\n")
        return 1
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, RcloneS3(Path(folder) / "s3") as server:
        command = ("unshare", "--uts", "sh", "-c", f'hostname {HOST} && exec "$@"', "sh")
        around = command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else ()
        with Scene(Path(folder) / "scene", server, unit_bytes=MIB, around=around) as scene:
            with scene.arriving(_RATE_BYTES_PER_S), chrome.chromium() as browser:
                wait_for(lambda: _moving(scene), "a pull whose speed is known")
                for name, (width, scheme) in _PICTURES.items():
                    _take(browser, scene, name, width, scheme)
                _draw(overview_of(_ask(scene)))
    return 0


def _ask(scene: Scene) -> pb.OverviewResponse:
    with scene.site.daemon.stub() as stub:
        return stub.Overview(pb.OverviewRequest())


def _moving(scene: Scene) -> bool:
    moves = overview_of(_ask(scene)).moves
    return any(move.name == ARRIVING and move.done_bytes > _SHOWN * move.total_bytes for move in moves)


def _take(browser: Browser, scene: Scene, name: str, width: int, scheme: str) -> None:
    with chrome.looking(browser, scene.http, width=width, scheme=scheme) as look:
        expect(look.page.get_by_role("progressbar")).to_be_visible()
        taken = Image.open(io.BytesIO(look.page.screenshot(full_page=True)))
    path = IMAGES / f"status-{name}.png"
    taken.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < LIMIT_BYTES, f"{path.name} has {path.stat().st_size} bytes"
    print(f"{path.relative_to(ROOT)}: {taken.width}x{taken.height}, {path.stat().st_size} bytes")


def _draw(overview: Overview) -> None:
    console = Console(width=116, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Screen(overview, HOST, height=47))
    path = IMAGES / "top.svg"
    fonts = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # they are not ours to fetch
    path.write_text(fonts.sub("", console.export_svg(title="cached top")), encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    sys.exit(main())
