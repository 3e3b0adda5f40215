"""Pulls: from where, checked against what, told how, and refused how."""

from __future__ import annotations

import base64
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest

from cached.cache.checks import confirm_origin_checksum
from cached.cache.flight import BlobOrder
from cached.checksum import compose_parts, crc64nvme, new_digest
from cached.clock import SystemClock
from cached.errors import IntegrityError
from cached.level import Level
from cached.levels.base import FileRef
from cached.origins.base import OriginChecksum, OriginSpec
from cached.origins.local import LocalOrigin
from cached.transfer.fill import Fill, OriginSource, RetryPolicy, Sources
from cached.transfer.jobs import Job, Prepare, Result
from cached.transfer.worker import Worker
from tests.integration.support import MB, Site, model_files, random_bytes, refused, sha256, total_bytes
from tests.invariants import check_at_rest


def test_a_pull_brings_every_byte_to_both_levels_and_says_how(site: Site) -> None:
    files = site.add("m", model_files(40 * MB, 20 * MB))
    site.upload("m", {"pytorch_model.bin": b"x" * 1000, "original/weights.pth": b"y" * 1000})
    site.start()
    moments = site.pull("m")
    last = moments[-1]
    assert [moments[0].phase, last.phase] == ["resolving", "ready"]
    assert "transferring" in {moment.phase for moment in moments}
    assert (last.total_bytes, last.origin_bytes, last.done_bytes) == (total_bytes(files),) * 3
    assert (last.from_level, last.checked_by) == ("l3", "first-seen")
    assert [moment.done_bytes for moment in moments] == sorted(moment.done_bytes for moment in moments)
    assert any("pytorch_model.bin" in note or ".bin" in note for note in last.notes), last.notes
    asked = [Path(item.path.partition("?")[0]).name for item in site.proxy.gets()]
    firsts = list(dict.fromkeys(asked))
    assert not {"pytorch_model.bin", "weights.pth"} & set(firsts)
    small = {path for path, data in files.items() if len(data) < MB}
    # Requests in flight together reach the server in any order: eight are for the head of the first weight file.
    assert small <= set(asked[: len(small) + 8]), f"small files must come first: {asked}"
    assert site.proxy.get_bytes() == total_bytes(files)
    check_at_rest(site.daemon)
    detail = site.describe("m")
    assert {file.path: file.sha256 for file in detail.files} == {path: sha256(data) for path, data in files.items()}
    assert all(file.in_l1 and file.in_l2 and file.checked_by == "first-seen" for file in detail.files)
    for path, data in files.items():
        assert Path(detail.path, path).read_bytes() == data
    assert site.check_served("m").from_level == "l1"
    again = site.pull("m")[-1]
    assert (again.origin_bytes, again.reused_bytes) == (0, total_bytes(files))
    assert site.proxy.get_bytes() == total_bytes(files)


def test_a_pull_to_l2_takes_no_memory_and_is_promoted_when_somebody_attaches(site: Site) -> None:
    files = site.add("m", model_files(36 * MB))
    site.start()
    assert site.pull("m", level="l2")[-1].from_level == "l3"
    assert not site.daemon.segments()
    assert site.summary("m").l2_bytes == total_bytes(files)
    check_at_rest(site.daemon)
    report = site.check_served("m")
    assert (report.from_level, report.disk_bytes, report.origin_bytes) == ("l2", total_bytes(files), 0)
    assert site.proxy.get_bytes() == total_bytes(files)


def test_a_pull_that_is_not_waited_for_goes_on_by_itself(site: Site) -> None:
    site.add("m", model_files(20 * MB))
    site.start()
    site.begin("m")
    check_at_rest(site.daemon)
    assert site.summary("m").state == "ready"


def test_a_pull_whose_caller_goes_away_goes_on_by_itself(site: Site) -> None:
    site.add("m", model_files(40 * MB))
    held = site.hold("model.safetensors", after_bytes=1000)
    site.start()
    with site.cache() as cache:
        for moment in cache.pull("m"):
            if moment.phase == "transferring":
                break
    held.release()
    check_at_rest(site.daemon)
    assert site.summary("m").state == "ready"


def test_a_uri_needs_no_catalog(site: Site) -> None:
    files = model_files(2 * MB)
    site.upload("elsewhere/tiny", files)
    site.files["tiny"] = files
    site.start()
    last = site.pull(site.uri("elsewhere/tiny"))[-1]
    assert last.phase == "ready"
    site.check_served("tiny", last.name)


def test_a_model_with_an_empty_file_and_a_nested_one(site: Site) -> None:
    files = site.add("m", {**model_files(MB), "1_Pooling/config.json": b"{}", "vocab.txt": b""})
    site.start()
    site.pull("m")
    assert len(site.describe("m").files) == len(files)
    site.check_served("m")


def test_what_cannot_be_resolved_is_refused_with_what_to_do(site: Site) -> None:
    site.add("empty", {})
    site.know("nobucket", {})
    site.models["nobucket"]["source"] = "s3://there-is-no-such-bucket/m"
    site.start()
    with refused("NO_SOURCE") as seen:
        site.pull("unheard-of")
    assert "--source" in seen["hint"]
    with refused("NOT_FOUND") as seen:
        site.pull("nobucket")
    assert "there-is-no-such-bucket" in seen["message"]
    with refused("NOT_FOUND"):
        site.pull("empty")
    assert "there-is-no-such-bucket" in site.describe("nobucket").last_error


def test_wrong_credentials_are_named_and_a_retry_with_right_ones_works(site: Site) -> None:
    site.add("m", model_files(2 * MB))
    right = dict(site.daemon.environment)
    site.daemon.environment["AWS_SECRET_ACCESS_KEY"] = "wrong/secret"
    site.start()
    with refused("ORIGIN_DENIED") as seen:
        site.pull("m")
    assert "environment" in seen["hint"]
    assert "wrong/secret" not in str(seen)
    check_at_rest(site.daemon)
    site.daemon.environment = right
    site.daemon.restart()
    site.pull("m")
    site.check_served("m")
    assert not site.describe("m").last_error


@pytest.mark.parametrize("algorithm", ["CRC64NVME", "SHA256", "CRC32C"])
def test_the_origins_own_checksums_vouch_for_the_content(moto_site: Site, algorithm: str) -> None:
    site = moto_site
    files = model_files(7 * MB)
    upload(site, "m", files, algorithm)
    site.know("m", files)
    site.start()
    assert site.pull("m")[-1].checked_by == "origin-checksum"
    site.check_served("m")


@pytest.mark.parametrize("algorithm", ["sha256", "crc32c"])
async def test_composite_checksums_vouch_part_by_part(tmp_path: Path, algorithm: str) -> None:
    """In process: the S3 servers of the tests do not tell the sizes of an object's parts, as AWS does."""
    data = random_bytes(20 * MB, 3)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "w.safetensors").write_bytes(data)
    target = tmp_path / "target"
    target.write_bytes(bytes(len(data)))
    sizes = (8 * MB, 8 * MB, 4 * MB)
    parts = [data[sum(sizes[:number]) : sum(sizes[: number + 1])] for number in range(3)]
    value = compose_parts(algorithm, [digest_hex(algorithm, part) for part in parts])
    item = LocalOrigin(OriginSpec(f"file://{tmp_path}/source", {})).stat("w.safetensors")
    worker = Worker()

    class InProcess:
        async def run(self, job: Job, *, key: str | None = None, priority: int = 0) -> Result:
            return worker.perform(job)

        def prepare(self, job: Prepare) -> None:
            """There is nobody to prepare."""

        def prefer(self, path: str, offsets: Collection[int], by: int) -> None:
            """Nothing ever waits."""

        async def settled(self, path: str) -> bool:
            """Nothing is ever under way."""
            return True

    for expected, vouched in ((value, True), ("0" * 64, False)):
        source = OriginSource(
            OriginSpec(f"file://{tmp_path}/source", {}),
            replace(item, checksums=(OriginChecksum(algorithm, expected, sizes),)),
        )
        ref = FileRef(str(target), target.stat().st_ino, len(data), memory=False)
        fill = Fill(
            key="k", runner=InProcess(), clock=SystemClock(), target=ref, sources=Sources(origin=source),
            retry=RetryPolicy(max_attempts=1, budget_s=1.0), width=2,
        )  # fmt: skip
        await fill.run()
        order = BlobOrder(Level.L1, len(data), "m", "w.safetensors", origin=source)
        if vouched:
            assert order.vouched
            await confirm_origin_checksum(InProcess(), order, fill)
        else:
            with pytest.raises(IntegrityError) as caught:
                await confirm_origin_checksum(InProcess(), order, fill)
            assert caught.value.fields["found"] == value
    worker.close()


def test_the_catalogs_sha256_is_the_strongest_check(site: Site) -> None:
    files = model_files(20 * MB)
    site.add("m", files, sha256={path: sha256(data) for path, data in files.items()})
    site.start()
    assert site.pull("m")[-1].checked_by == "catalog-sha256"
    site.check_served("m")


def test_a_catalog_sha256_of_one_file_leaves_the_others_first_seen(site: Site) -> None:
    files = model_files(3 * MB)
    site.add("m", files, sha256={"model.safetensors": sha256(files["model.safetensors"])})
    site.start()
    assert site.pull("m")[-1].checked_by == "first-seen"
    checked = {file.path: file.checked_by for file in site.describe("m").files}
    assert checked["model.safetensors"] == "catalog-sha256"


@pytest.mark.parametrize("level", ["l1", "l2"])
def test_a_wrong_sha256_commits_nothing_and_is_named(site: Site, level: str) -> None:
    files = model_files(36 * MB)
    wrong = "0" * 64
    site.add("m", files, sha256={"model.safetensors": wrong})
    site.start()
    with refused("INTEGRITY") as seen:
        site.pull("m", level=level)
    assert seen["path"] == "model.safetensors"
    assert (seen["expected"], seen["found"]) == (wrong, sha256(files["model.safetensors"]))
    assert seen["check"] == "catalog-sha256"
    assert "catalog" in seen["hint"]
    check_at_rest(site.daemon)
    assert {site.level(name).used_bytes for name in ("l1", "l2")} == {0}
    assert "catalog" in site.describe("m").last_error
    site.models["m"]["sha256"] = {"model.safetensors": sha256(files["model.safetensors"])}
    site.reload_catalog()
    site.pull("m", level=level)
    site.check_served("m")
    check_at_rest(site.daemon)


def test_a_body_that_is_not_what_the_origin_vouches_for_is_refused(moto_site: Site) -> None:
    site = moto_site
    files = model_files(5 * MB)
    upload(site, "m", files, "CRC64NVME")
    site.know("m", files)
    site.proxy.inject("corrupt", path="model.safetensors", after_bytes=2 * MB)
    site.start()
    with refused("INTEGRITY") as seen:
        site.pull("m")
    assert (seen["path"], seen["check"]) == ("model.safetensors", "origin-crc64nvme")
    assert seen["expected"] == f"{crc64nvme(files['model.safetensors']):016x}"
    check_at_rest(site.daemon)
    assert {site.level(name).used_bytes for name in ("l1", "l2")} == {0}
    site.pull("m")
    site.check_served("m")


def test_a_sha256_in_the_catalog_for_a_file_that_is_not_there(site: Site) -> None:
    site.add("m", model_files(MB), sha256={"modell.safetensors": "0" * 64})
    site.start()
    with refused("INVALID_REQUEST") as seen:
        site.pull("m")
    assert "modell.safetensors" in seen["message"]


def upload(site: Site, name: str, files: dict[str, bytes], algorithm: str) -> None:
    """Puts objects with a checksum of the whole object."""
    for path, data in files.items():
        value = base64.b64encode(bytes.fromhex(digest_hex(algorithm.lower(), data))).decode()
        checksum = {"ChecksumAlgorithm": algorithm, f"Checksum{algorithm}": value}
        site.server.put(site.bucket, f"{name}/{path}", data, **checksum)


def digest_hex(algorithm: str, data: bytes) -> str:
    if algorithm == "crc64nvme":
        return f"{crc64nvme(data):016x}"
    digest = new_digest(algorithm)
    digest.update(memoryview(data))
    return digest.hexdigest()
