"""The status page of a real daemon, seen in a real Chromium while a model arrives."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from cached.units import MIB
from cached_client._proto import cached_pb2 as pb
from tests import browser as chrome
from tests.browser import Look, looking
from tests.integration.harness import DaemonProcess, wait_for
from tests.integration.scene import ARRIVING, MODELS, Scene
from tests.integration.support import SERVE, model_files

_HOSTILE = "<script>broken=1</script><img src=x onerror='broken=1'>\"'`"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not chrome.found():
        pytest.skip(f"no Chromium in PATH ({', '.join(chrome.NAMES)})")
    with chrome.chromium() as made:
        yield made


@pytest.fixture(scope="module")
def scene(tmp_path_factory, rclone_s3) -> Iterator[Scene]:
    with Scene(tmp_path_factory.mktemp("page"), rclone_s3, unit_bytes=MIB // 8) as made, made.arriving():
        yield made


def check_accessible(look: Look) -> None:
    found = Axe().run(look.page)
    assert found.violations_count == 0, found.generate_report()


LOOKS = [
    (1280, "light", True),
    (1280, "dark", True),
    (400, "light", True),
    (400, "dark", False),
    (1280, "light", False),
]


@pytest.mark.parametrize(("width", "scheme", "script"), LOOKS)
def test_it_fits_is_accessible_and_asks_nobody_else(browser, scene, width, scheme, script) -> None:
    with looking(browser, scene.http, width=width, scheme=scheme, script=script) as look:
        page = look.page
        expect(page.get_by_role("heading", name="Cold starts")).to_be_visible()
        assert look.overflow_px <= 0
        for text in ("Moving now", ARRIVING, "Decisions", "all is well"):
            expect(page.get_by_text(text).first).to_be_visible()
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == (scheme == "dark")
        expect(page.get_by_role("link", name="Look again")).to_be_visible(visible=not script)
        assert bool(page.locator("noscript meta[http-equiv=refresh]").count()) is not script
        if script:
            check_accessible(look)
        assert look.said == []
        assert look.strangers == []


def test_what_one_look_tells(browser, scene) -> None:
    with looking(browser, scene.http) as look:
        page = look.page
        assert page.title() == f"cached on {socket.gethostname()}"
        for level in ("L1", "L2"):
            bar = page.get_by_role("region", name=re.compile(rf"^{level}")).get_by_role("img", name=f"{level} has ")
            told = bar.get_attribute("aria-label") or ""
            for part in ("pinned 15.9 MiB", "hot 10.9 MiB", "warm", "auto", "free"):
                assert part in told, told
        assert "reserved" in told  # what arrives is written to L2 behind that
        arriving = page.get_by_role("progressbar", name=f"{ARRIVING}: pull to L1")
        assert 0 < int(arriving.get_attribute("value")) < 100
        note = page.get_by_role("listitem").filter(has=arriving)
        expect(note).to_contain_text(f"from s3://models/{ARRIVING}")
        expect(note).to_contain_text("waited for by chat-0 (pid ")
        models = page.get_by_role("table", name=re.compile("^Models, where they are"))
        expect(models.get_by_role("row")).to_have_count(1 + len(MODELS))
        expect(models.get_by_role("row").nth(1)).to_contain_text("arriving")
        row = models.get_by_role("row", name=re.compile("^all-minilm-l6-v2"))
        for text in ("ready in L1", "hot", "catalog", "10.9 MiB", "in use"):
            expect(row).to_contain_text(text)
        leases = page.get_by_role("table", name=re.compile("^Leases"))
        expect(leases.get_by_role("row", name=re.compile("chat-0"))).to_contain_text("(waits)")
        expect(page.get_by_role("region", name="Decisions")).to_contain_text("it is cold")
        starts = page.get_by_role("table", name="The last starts of workers")
        assert starts.get_by_role("row").count() == 4
        expect(page.get_by_role("table", name=re.compile("^Phases of the latest"))).to_contain_text("compile")


def test_cached_top_tells_the_same(scene) -> None:
    command = [*SERVE, "--socket", str(scene.site.daemon.socket), "top"]
    shown = subprocess.run([*command, "--once"], capture_output=True, text=True, check=True).stdout
    for told in (f"{ARRIVING}", "pull to L1", "waited for by chat-0 (pid ", "P pinned 15.9 MiB", "chat-0 (waits)"):
        assert told in shown, told
    data = json.loads(subprocess.run([*command, "-o", "json"], capture_output=True, check=True).stdout)
    move = next(move for move in data["moves"] if move["name"] == ARRIVING)
    assert (move["kind"], move["phase"], move["level"]) == ("pull", "moving", "l1")
    assert 0 < move["done_bytes"] < move["total_bytes"]
    assert 0 < move["behind_bytes"] <= move["done_bytes"]
    for use, level in zip(data["uses"], data["stats"]["levels"], strict=True):
        held = use["holdings_bytes"]
        assert sum(held.values()) == level["capacity_bytes"], "each byte is exactly one thing"
        assert held["reserved"] == level["reserved_bytes"] > 0
        assert held["partial"] == held["withdrawn"] == 0


def test_it_changes_by_itself_and_leaves_scroll_and_focus(browser, scene) -> None:
    with looking(browser, scene.http, width=400) as look, scene.site.cache() as cache:
        page = look.page
        page.evaluate("window.marker = 1")
        page.locator("summary").click()
        page.get_by_role("group", name="Models").focus()
        page.evaluate("document.activeElement.scrollLeft = 40; window.scrollTo(0, 500)")
        with cache.attach("gte-tiny", client_name=_HOSTILE) as model:
            model.wait(60)
            expect(page.get_by_text(_HOSTILE)).to_have_count(1)
        expect(page.get_by_text(_HOSTILE)).to_have_count(0)
        assert page.evaluate("[window.marker, window.broken, document.activeElement.scrollLeft]") == [1, None, 40]
        assert page.evaluate("window.scrollY") > 0
        assert page.locator("details").get_attribute("open") is None, "what was closed stays closed"
        assert look.said == []


def test_a_model_that_becomes_known_appears(browser, scene) -> None:
    with looking(browser, scene.http) as look:
        look.page.evaluate("window.marker = 1")
        scene.site.add("appeared", model_files(100_000))
        expect(look.page.get_by_role("rowheader", name="appeared")).to_be_visible(timeout=15_000)
        assert look.page.evaluate("window.marker") == 1
        scene.site.models.pop("appeared")
        scene.site.reload_catalog()
        with scene.site.rpc() as stub:
            stub.Remove(pb.RemoveRequest(ref="appeared"))


def test_a_tab_that_nobody_sees_asks_for_nothing(browser, scene) -> None:
    with looking(browser, scene.http) as look:
        page = look.page
        page.clock.install()
        page.reload()
        look.asked.clear()
        page.clock.run_for(2_100)
        wait_for(lambda: page.evaluate("1") and len(look.asked) == 1, "the page to ask again")
        hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
        tell = "document.dispatchEvent(new Event('visibilitychange'))"
        page.evaluate(hide % "true" + tell)
        page.clock.run_for(60_000)
        assert len(look.asked) == 1
        page.evaluate(hide % "false" + tell)
        wait_for(lambda: page.evaluate("1") and len(look.asked) == 2, "the page to ask at once")


def test_what_is_wrong_comes_first_and_a_daemon_that_is_gone_is_told(browser, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    models = {"lost": {"source": f"file://{tmp_path}/empty", "tier": "hot"}}
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    with (
        DaemonProcess(tmp_path / "d", models=models, settings={"http": {"listen": listen}}) as daemon,
        looking(browser, f"http://{listen}/") as look,
    ):
        page, host = look.page, socket.gethostname()
        attention = page.get_by_role("region", name="Needs attention")
        expect(attention).to_be_visible(timeout=15_000)
        for text in ("lost: ", "cached show lost has the whole error", "“A model cannot be brought”"):
            expect(attention).to_contain_text(text)
        expect(page.get_by_role("status")).to_have_text("needs attention")
        assert page.title() == f"needs attention: cached on {host}"
        check_accessible(look)
        daemon.kill()
        gone = page.get_by_role("alert").filter(has_text="The daemon is not reachable since")
        expect(gone).to_be_visible(timeout=15_000)
        assert page.title().startswith("not reachable: ")
        expect(attention).to_be_visible()  # what it said last
        daemon.start()
        expect(gone).to_be_hidden(timeout=15_000)
        expect(page).to_have_title(re.compile(f"cached on {host}$"))
