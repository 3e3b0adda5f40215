"""A daemon that finds seeds takes its models from them: not a byte comes from the origin, and nothing is believed."""

from __future__ import annotations

import json
import os

import pytest

from cached.checksum import crc64nvme
from cached.errors import IntegrityError
from cached.seed import SeedRecord, read_seed
from cached.units import CHUNK_BYTES
from tests.integration.support import MB, Site, chunk_ranges, flip_byte, model_files, refused, sha256
from tests.integration.test_standalone import lay

SHARD = "model.safetensors"


def seeded(site: Site, name: str, *, known: bool = True, size_bytes: int = CHUNK_BYTES + MB) -> dict[str, bytes]:
    """A model with its seed, and a daemon's settings that name the folder of seeds. What was counted is forgotten."""
    files = model_files(size_bytes)
    site.add(name, files, **({"sha256": {path: sha256(data) for path, data in files.items()}} if known else {}))
    site.settings["l2"] = {"seed_dirs": [str(site.folder / "seeds")]}
    lay(site, name, site.folder / "seeds" / name)
    site.proxy.clear()
    return files


def test_a_model_whose_content_the_catalog_knows_comes_without_a_word_to_the_origin(site):
    seeded(site, "tiny")
    site.proxy.inject("status", times=-1)
    site.start()
    report = site.check_served("tiny")
    assert (report.origin_bytes, report.disk_bytes > CHUNK_BYTES) == (0, True)
    assert site.proxy.requests() == []
    assert {file.checked_by for file in site.describe("tiny").files} == {"catalog-sha256"}
    site.daemon.restart()
    assert site.pull("tiny")[-1].phase == "ready"
    site.evict("tiny")
    assert site.check_served("tiny").origin_bytes == 0, "what came from the seed is in L2 as everything is"
    damages, verified = site.verify("tiny")
    assert (damages, verified.damaged_chunks) == ([], 0)


def test_without_digests_the_origin_is_asked_what_it_has_and_for_nothing_else(site):
    seeded(site, "tiny", known=False)
    site.start()
    assert site.pull("tiny", level="l2")[-1].phase == "ready"
    assert site.check_served("tiny").origin_bytes == 0
    assert site.proxy.gets() == []
    assert site.proxy.requests("HEAD"), "the version there is the one of the seed"


def test_an_origin_that_is_gone_is_not_missed(site):
    seeded(site, "tiny", known=False)
    site.settings["transfer"] = {"max_attempts": 1}
    site.proxy.inject("status", times=-1)
    site.proxy.inject("status", times=-1, method="HEAD")
    site.start()
    assert site.check_served("tiny").origin_bytes == 0
    assert site.daemon.log_events("seed.used")


def test_what_a_seed_has_damaged_is_fetched(site):
    files = seeded(site, "tiny")
    site.start()
    flip_byte(site.folder / "seeds/tiny" / SHARD, CHUNK_BYTES + 3)
    report = site.check_served("tiny")
    offset, length = chunk_ranges(len(files[SHARD]))[1]
    assert site.ranges() == [f"bytes={offset}-{offset + length - 1}"]
    assert report.origin_bytes == length
    assert site.daemon.log_events("seed.damaged")


def test_a_seed_that_lies_is_found_out_and_not_asked_again(site):
    files = seeded(site, "tiny")
    folder = site.folder / "seeds/tiny"
    flip_byte(folder / SHARD, 5000)
    record = read_seed(folder)
    assert record is not None
    blob = record.blobs[sha256(files[SHARD])].to_dict()
    data = (folder / SHARD).read_bytes()
    crcs = [crc64nvme(memoryview(data)[at : at + size]) for at, size in chunk_ranges(len(data))]
    forged = record.to_text().replace(blob["crc64"], "".join(f"{crc:016x}" for crc in crcs))
    (folder / ".cached/manifest.json").write_text(forged)
    site.start()
    with refused("INTEGRITY"):
        site.pull("tiny")
    assert site.daemon.log_events("seed.refused")
    assert site.check_served("tiny").origin_bytes == len(files[SHARD])


def test_a_damaged_seed_of_an_object_that_was_stored_again_is_no_dead_end(site):
    """The seed knows a version that the origin has no more: it is asked what it has now."""
    files, source = model_files(CHUNK_BYTES + MB), site.folder / "source"
    source.mkdir()
    for path, data in files.items():
        (source / path).write_bytes(data)
    digests = {path: sha256(data) for path, data in files.items()}
    site.models["tiny"] = {"source": source.as_uri(), "sha256": digests}
    site.files["tiny"] = files
    site.settings["l2"] = {"seed_dirs": [str(site.folder / "seeds")]}
    lay(site, "tiny", site.folder / "seeds" / "tiny")
    os.utime(source / SHARD)
    flip_byte(site.folder / "seeds/tiny" / SHARD, 3)
    site.start()
    assert site.pull("tiny")[-1].phase == "ready"
    site.check_served("tiny")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 1}', "\xff"])
def test_a_record_that_cannot_be_read_is_told_and_passed_over(tmp_path, text):
    (tmp_path / ".cached").mkdir()
    (tmp_path / ".cached/manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(IntegrityError, match="cannot be used"):
        read_seed(tmp_path)


def test_a_record_is_read_as_it_was_written(site):
    seeded(site, "tiny")
    text = (site.folder / "seeds/tiny/.cached/manifest.json").read_text()
    assert SeedRecord.from_text(text).to_text() == text
    assert json.loads(text)["manifest"]["name"] == "tiny"
