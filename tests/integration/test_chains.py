"""Chains of origins: whatever a link in front does, the model comes, and every byte of it is right."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cached.units import CHUNK_BYTES
from tests.integration.harness import wait_for
from tests.integration.part_support import content, layered
from tests.integration.support import MB, Site, model_files, refused, sha256, total_bytes
from tests.servers import CountingProxy, RcloneS3

WEIGHTS = "model.safetensors"
SIZE = CHUNK_BYTES + 2 * MB
SECOND = f"bytes={CHUNK_BYTES}-{SIZE - 1}"


@pytest.fixture
def near(site: Site) -> Iterator[CountingProxy]:
    """A cache on the node, which passes on what the store has."""
    with CountingProxy(site.server.endpoint_url) as proxy:
        yield proxy


def chained(site: Site, name: str, *endpoints: str, key: str = "", **entry: Any) -> None:
    """Puts a model into the catalog that comes from these endpoints, the last one its authority."""
    uri = site.uri(key or name)
    links = [{"source": uri, "origin": {"endpoint_url": endpoint}} for endpoint in endpoints]
    site.models[name] = {"origins": links, **entry}
    if site._daemon is not None and site.daemon.is_running:
        site.reload_catalog()


def proven(files: dict[str, bytes]) -> dict[str, str]:
    return {path: sha256(data) for path, data in files.items()}


def counted(site: Site, name: str) -> dict[str, int]:
    """A counter of the daemon's, by its labels."""
    found = site.daemon.stats().counters.items()
    return {key.partition("{")[2].rstrip("}"): int(value) for key, value in found if key.startswith(name)}


def events(site: Site, kind: str) -> list[dict[str, Any]]:
    return site.daemon.log_events(kind)


def refuse(near: CountingProxy) -> str:
    """An endpoint that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{found.getsockname()[1]}"


Break = Callable[[CountingProxy], str | None]


def broken(kind: Any, **settings: Any) -> Break:
    def inject(near: CountingProxy) -> None:
        near.inject(kind, **settings)

    return inject


FAULTS: dict[str, tuple[Break, bool]] = {
    "refuses-connections": (refuse, False),
    "denies": (broken("status", times=-1, status=403), False),
    "has-nothing": (broken("status", times=-1, status=404), False),
    "fails": (broken("status", times=-1, status=500), False),
    "fails-for-ranges": (broken("status", times=-1, status=503, path=WEIGHTS), False),
    "stalls": (broken("hold", times=-1, path=WEIGHTS, after_bytes=MB), False),
    "dies-in-the-middle": (broken("reset", times=-1, path=WEIGHTS, range=SECOND, after_bytes=MB), True),
    "lies-about-length": (broken("short_length", times=-1, path=WEIGHTS, range=SECOND, after_bytes=1000), True),
    "lies-about-range": (broken("wrong_range", times=-1, path=WEIGHTS, range=SECOND), True),
    "changes-version": (broken("etag", times=-1, path=WEIGHTS, range=SECOND), True),
}
"""What the link in front does, and whether some of the weights come from it nevertheless."""


def test_whatever_a_link_in_front_does_the_next_one_serves_what_it_cannot(site: Site) -> None:
    site.settings |= {"s3": {"read_timeout_s": 0.6}, "transfer": {"hedging": False}}
    site.start()
    with contextlib.ExitStack() as stack:
        for seed, (name, (breaks, partly)) in enumerate(FAULTS.items(), 1):
            near = stack.enter_context(CountingProxy(site.server.endpoint_url))
            site.proxy.clear()
            files = model_files(SIZE, seed=seed)
            site.upload(name, files)
            site.files[name] = files
            endpoint = breaks(near) or near.endpoint_url
            chained(site, name, endpoint, site.proxy.endpoint_url, sha256=proven(files), tier="cold")
            assert site.pull(name)[-1].phase == "ready", name
            site.check_served(name)
            came = counted(site, "cached_origin_bytes_total")
            from_near = came.get(f'origin="{endpoint}"', 0)
            assert (from_near >= CHUNK_BYTES) == partly, (name, from_near)
            assert site.proxy.get_bytes(name) == total_bytes(files) - from_near, name
            failovers = counted(site, "cached_origin_failovers_total")
            assert any(endpoint in labels for labels in failovers), name
            near.heal()
    skipped = {event["origin"] for event in events(site, "origin.skipped")}
    assert len(skipped) >= 4


def test_a_healthy_link_in_front_spares_the_store_and_is_shown(site: Site, near: CountingProxy) -> None:
    files = site.files["m"] = model_files(SIZE)
    site.upload("m", files)
    chained(site, "m", near.endpoint_url, site.proxy.endpoint_url, sha256=proven(files))
    site.start()
    site.pull("m")
    site.check_served("m")
    assert site.proxy.get_bytes() == 0, "the authority was asked what there is, and for no byte"
    assert near.get_bytes() == total_bytes(files)
    note = next(note for note in site.describe("m").notes if note.startswith("came from"))
    assert near.endpoint_url in note
    assert f"asked for bytes before the source: {near.endpoint_url}" in site.describe("m").notes
    assert site.proxy.endpoint_url not in note
    assert site.describe("m").summary.checked_by == "catalog-sha256"


def test_bytes_that_fail_the_check_of_the_whole_are_blamed_on_their_link(site: Site, near: CountingProxy) -> None:
    files = site.files["m"] = model_files(SIZE)
    site.upload("m", files)
    near.inject("corrupt", path=WEIGHTS, range=SECOND, after_bytes=77, times=1)
    chained(site, "m", near.endpoint_url, site.proxy.endpoint_url, sha256=proven(files))
    site.start()
    assert site.pull("m")[-1].phase == "ready"
    site.check_served("m")
    (blamed,) = events(site, "origin.blamed")
    assert blamed["origin"] == near.endpoint_url
    assert blamed["path"] == WEIGHTS
    assert site.proxy.get_bytes(WEIGHTS) == SIZE, "the whole file came again, from the authority"
    assert counted(site, "cached_origin_failovers_total") == {f'origin="{near.endpoint_url}",reason="INTEGRITY"': 1}


def test_a_stale_copy_of_the_same_length_is_found_out_by_the_authoritys_checksum(
    moto_site: Site, rclone_s3: RcloneS3
) -> None:
    site, old = moto_site, model_files(2 * MB, seed=8)
    files = site.files["m"] = model_files(2 * MB, seed=9)
    for path, data in files.items():
        site.server.put(site.bucket, f"m/{path}", data, ChecksumAlgorithm="CRC64NVME")
    rclone_s3.create_bucket("stale")
    rclone_s3.seed_many("stale", {f"m/{path}": old[path] for path in files})
    links: list[tuple[Any, str]] = [(rclone_s3, "stale"), (site.proxy, site.bucket)]
    site.models["m"] = {
        "origins": [
            {"source": f"s3://{bucket}/m", "origin": {"endpoint_url": place.endpoint_url}} for place, bucket in links
        ]
    }
    site.start()
    assert site.pull("m")[-1].phase == "ready"
    site.check_served("m")
    assert site.describe("m").summary.checked_by == "origin-checksum"
    blamed = {event["path"] for event in events(site, "origin.blamed")}
    assert blamed, "the check of the whole has found it out"
    assert counted(site, "cached_origin_bytes_total")[f'origin="{site.proxy.endpoint_url}"'] >= total_bytes(files)


def test_a_chunk_whose_checksum_is_known_comes_from_the_next_link(site: Site, near: CountingProxy) -> None:
    files = site.files["m"] = model_files(SIZE)
    site.upload("m", files)
    chained(site, "m", near.endpoint_url, site.proxy.endpoint_url)
    site.start()
    site.pull("m")
    blob = site.l2_blob("m", WEIGHTS)
    site.evict("m")
    with blob.open("r+b") as file:
        file.seek(CHUNK_BYTES + 5)
        file.write(b"damage")
    near.clear()
    site.proxy.clear()
    near.inject("corrupt", path=WEIGHTS, range=SECOND, after_bytes=9, times=1)
    site.check_served("m")
    assert [item.range for item in near.gets(WEIGHTS)] == [SECOND]
    assert [item.range for item in site.proxy.gets(WEIGHTS)] == [SECOND]
    assert len(events(site, "origin.blamed")) == 1


def test_what_nobody_vouches_for_comes_from_one_link_and_only_at_the_same_version(
    site: Site, near: CountingProxy, tmp_path: Any
) -> None:
    files = site.files["same"] = model_files(SIZE)
    site.upload("same", files)
    chained(site, "same", near.endpoint_url, site.proxy.endpoint_url)
    with RcloneS3(tmp_path / "stale") as stale:
        stale.seed_many(site.bucket, {f"other/{path}": data for path, data in model_files(SIZE, seed=8).items()})
        site.files["other"] = model_files(SIZE, seed=9)
        site.upload("other", site.files["other"])
        chained(site, "other", stale.endpoint_url, site.proxy.endpoint_url)
        site.start()
        site.pull("same")
        site.check_served("same")
        assert near.get_bytes() == total_bytes(files)
        assert site.proxy.get_bytes() == 0
        site.pull("other")
        site.check_served("other")  # the older version in the cache has the same lengths
        assert site.proxy.get_bytes("other") == total_bytes(site.files["other"])
    assert site.describe("same").summary.checked_by == "first-seen"


def test_one_link_is_never_finished_by_another_where_nothing_proves_the_whole(site: Site, near: CountingProxy) -> None:
    files = site.files["m"] = model_files(SIZE)
    site.upload("m", files)
    site.settings |= {"transfer": {"max_attempts": 2}}
    near.inject("reset", path=WEIGHTS, range=SECOND, times=-1, after_bytes=MB)
    chained(site, "m", near.endpoint_url, site.proxy.endpoint_url)
    site.start()
    assert site.pull("m")[-1].phase == "ready"
    site.check_served("m")
    assert site.proxy.get_bytes(WEIGHTS) == SIZE, "all of that file came from one place"


def test_while_the_authority_is_away_the_nearest_says_what_there_is(site: Site, near: CountingProxy) -> None:
    files = site.files["m"] = model_files(MB)
    site.upload("m", files)
    site.settings |= {"transfer": {"max_attempts": 2}}
    chained(site, "m", near.endpoint_url, refuse(near))
    site.start()
    assert site.pull("m")[-1].phase == "ready"
    site.check_served("m")
    detail = site.describe("m")
    assert detail.summary.checked_by == "first-seen"
    assert any("authority is away" in note for note in detail.notes)


def test_an_authority_that_refuses_is_the_last_word(site: Site, near: CountingProxy) -> None:
    site.upload("m", model_files(MB))
    site.proxy.inject("status", times=-1, status=403)
    chained(site, "m", near.endpoint_url, site.proxy.endpoint_url)
    site.start()
    with refused("ORIGIN_DENIED"):
        site.pull("m")
    assert near.get_bytes() == 0


def test_when_all_links_are_down_one_error_names_each_and_its_cause(site: Site, near: CountingProxy) -> None:
    files = model_files(SIZE)
    site.upload("m", files)
    site.settings |= {"transfer": {"max_attempts": 2, "retry_budget_s": 1.0}}
    gone = refuse(near)
    near.inject("status", times=-1, status=503, path=WEIGHTS)
    site.proxy.inject("status", times=-1, status=500, path=WEIGHTS)
    chained(site, "m", gone, near.endpoint_url, site.proxy.endpoint_url, sha256=proven(files))
    site.start()
    with refused("ORIGIN_UNAVAILABLE") as seen:
        site.pull("m")
    assert "none of the 3 origins" in seen["message"]
    for endpoint in (gone, near.endpoint_url, site.proxy.endpoint_url):
        assert endpoint in seen["message"], seen["message"]
    near.heal()
    site.proxy.heal()
    site.files["m"] = files
    assert site.pull("m")[-1].phase == "ready"
    site.check_served("m")


def test_a_chain_of_the_command_line_is_remembered_across_a_restart(site: Site) -> None:
    files = site.files["m"] = model_files(MB)
    site.upload("m", files)
    site.upload("mirror/m", files)
    source = f"{site.uri('mirror/m')} {site.uri('m')}"
    site.start()
    site.pull("m", source=source)
    assert site.describe("m").summary.source == source
    assert site.proxy.get_bytes("mirror/") == total_bytes(files)
    site.evict("m", "l1")
    site.evict("m", "l2")
    site.proxy.clear()
    site.daemon.kill()
    site.start()
    site.check_served("m")
    assert site.proxy.get_bytes("mirror/") == total_bytes(files)


def test_an_interrupted_pull_goes_on_over_the_chain_with_what_was_verified(site: Site, near: CountingProxy) -> None:
    files = site.files["m"] = model_files(SIZE)
    site.upload("m", files)
    held = near.inject("hold", path=WEIGHTS, range=SECOND, times=1)
    chained(site, "m", near.endpoint_url, site.proxy.endpoint_url, sha256=proven(files))
    site.start()
    site.begin("m")
    assert held.reached.wait(60)
    wait_for(lambda: site.summary("m").progress * total_bytes(files) >= CHUNK_BYTES, "the first chunk")
    site.daemon.kill()
    near.heal()
    near.clear()
    near.inject("status", times=-1, status=500)
    site.start()
    wait_for(lambda: site.summary("m").state == "ready", "the pull to go on by itself")
    site.check_served("m")
    assert [item.range for item in site.proxy.gets(WEIGHTS)] == [SECOND]


def test_a_part_of_a_model_comes_from_the_authority_alone(site: Site, near: CountingProxy) -> None:
    files = layered(1, 1, 1)
    site.upload("m", files)
    near.inject("corrupt", times=-1, path=WEIGHTS, after_bytes=77)
    chained(site, "m", near.endpoint_url, site.proxy.endpoint_url, sha256=proven(files))
    site.start()
    with site.cache() as cache, cache.attach("m", timeout_s=60, only=["layers.1.weight"]) as model:
        model.wait(60)
        assert model.numpy("layers.1.weight").tobytes() == content(files, "layers.1.weight")
    assert near.get_bytes() == 0
    site.evict("m")
