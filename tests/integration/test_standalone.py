"""A model in an ordinary folder without a daemon: the right bytes or none, each fetched once, whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from cached import errors
from cached.catalog_file import parse_catalog
from cached.cli.main import cli
from cached.config import load_config
from cached.refs import parse_ref
from cached.seed import Thoroughness, read_seed
from cached.standalone import Pulled, SeedFolder, SeedPull, Wanted, open_tools
from cached.units import CHUNK_BYTES, GIB
from tests.integration.harness import wait_for
from tests.integration.support import (
    MB,
    ROOT,
    SERVE,
    Site,
    chunk_ranges,
    flip_byte,
    model_files,
    safetensors,
    sha256,
    total_bytes,
)
from tests.servers import RcloneS3, s3_env
from tests.small_tmpfs import run_on_small_tmpfs

SHARD = "model.safetensors"


def lay(site: Site, name: str, folder: Path, **options) -> Pulled:
    """One pull in this process, with a mover of its own."""
    source = options.pop("source", "")
    catalog = parse_catalog(json.dumps({"models": site.models}), "json", "catalog").models
    config = load_config(
        None,
        {"CACHED_TRANSFER_MOVERS": "1", "CACHED_TRANSFER_RETRY_BUDGET_S": "20", "CACHED_TRANSFER_MAX_ATTEMPTS": "4"},
        {},
    ).config

    async def run() -> Pulled:
        async with open_tools(config, catalog, max_memory_bytes=GIB) as tools:
            return await SeedPull(tools, SeedFolder(folder), Wanted(parse_ref(name), source, **options)).run()

    with s3_env(site.server):
        return asyncio.run(run())


def command(site: Site, name: str, folder: Path, *words: str) -> list[str]:
    catalog = site.folder / "catalog.json"
    catalog.write_text(json.dumps({"models": site.models}))
    return [*SERVE, "pull", name, "--standalone", "--to", str(folder), "--catalog", str(catalog), *words]


def cached(site: Site, name: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | site.environment()
    return subprocess.run(
        command(site, name, folder, *words), env=environment, capture_output=True, text=True, timeout=120
    )


@contextlib.contextmanager
def started(
    site: Site, name: str, folder: Path, *words: str, more: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """The command, under way; killed at the end."""
    with subprocess.Popen(
        command(site, name, folder, *words), env=os.environ | site.environment() | dict(more or {}), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def laid(folder: Path) -> dict[str, bytes]:
    """The files that anybody sees."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cached" not in path.relative_to(folder).parts
    }


def check_laid(folder: Path, files: dict[str, bytes]) -> None:
    """Exactly these files, each of its own, with a record that says what they are, and nothing left over."""
    assert laid(folder) == files
    for path in files:
        found = (folder / path).lstat()
        assert (stat.S_ISREG(found.st_mode), found.st_nlink, found.st_mode & 0o777) == (True, 1, 0o644), path
    record = read_seed(folder)
    assert record is not None
    assert {entry.path: entry.digest for entry in record.manifest.files} == {
        path: sha256(data) for path, data in files.items()
    }
    assert sorted(os.listdir(folder / ".cached")) == ["lock", "manifest.json"]


def test_a_model_is_laid_without_a_daemon_and_found_whole_again(site, tmp_path):
    files = site.add("tiny", model_files(CHUNK_BYTES + MB, CHUNK_BYTES // 2))
    folder = tmp_path / "seed"
    told = cached(site, "tiny", folder)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("tiny@")
    assert "from the origin" in told.stdout
    check_laid(folder, files)
    assert site.proxy.get_bytes() == total_bytes(files)
    site.proxy.clear()
    again = cached(site, "tiny", folder, "-o", "json")
    assert (again.returncode, site.proxy.gets()) == (0, [])
    result = json.loads(again.stdout)
    assert (result["origin_bytes"], result["kept_bytes"]) == (0, total_bytes(files))
    assert result["checked_by"] == "first-seen"
    offline = cached(site, "tiny", folder, "--offline", "--verify", "full")
    assert offline.stdout.endswith("all of it was there\n"), offline.stderr


def test_it_takes_no_shared_memory(site, tmp_path):
    files = site.add("tiny", model_files(MB))
    none = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
            'mount -t tmpfs -o ro none /dev/shm || exit 99; exec "$@"', "sh")  # fmt: skip
    told = subprocess.run(
        [*none, *command(site, "tiny", tmp_path / "seed")], env=os.environ | site.environment(), capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    if told.returncode == 99 or "unshare:" in told.stderr:
        pytest.skip(f"needs a mount namespace of its own: {told.stderr.strip()}")
    assert told.returncode == 0, told.stderr
    check_laid(tmp_path / "seed", files)


@pytest.mark.parametrize("verify", [Thoroughness.SIZE, Thoroughness.CHUNKS])
def test_what_is_missing_or_damaged_is_fetched_and_nothing_else(site, tmp_path, verify):
    files = site.add("tiny", model_files(2 * CHUNK_BYTES + MB))
    lay(site, "tiny", tmp_path)
    flip_byte(tmp_path / SHARD, CHUNK_BYTES + 5)
    (tmp_path / "config.json").unlink()
    site.proxy.clear()
    pulled = lay(site, "tiny", tmp_path, verify=verify)
    check_laid(tmp_path, files)
    assert pulled.damaged_files == (SHARD,)
    offset, length = chunk_ranges(len(files[SHARD]))[1]
    assert site.ranges(SHARD) == [f"bytes={offset}-{offset + length - 1}"]
    assert site.proxy.get_bytes() == length + len(files["config.json"])


def test_a_file_that_was_cut_short_is_fetched_again(site, tmp_path):
    files = site.add("tiny", model_files(MB))
    lay(site, "tiny", tmp_path)
    os.truncate(tmp_path / SHARD, 1000)
    (tmp_path / "config.json").unlink()
    with pytest.raises(errors.NotFoundError, match="missing"):
        lay(site, "tiny", tmp_path, offline=True)
    (tmp_path / "config.json").write_bytes(files["config.json"])
    with pytest.raises(errors.IntegrityError, match="damaged in its length"):
        lay(site, "tiny", tmp_path, offline=True)
    lay(site, "tiny", tmp_path)
    check_laid(tmp_path, files)


def test_only_full_verification_sees_a_record_that_lies(site, tmp_path):
    """Chunks are compared with the record; what the record is worth, the SHA-256 says."""
    files = site.add("tiny", model_files(MB))
    lay(site, "tiny", tmp_path)
    wrong = json.loads((tmp_path / ".cached/manifest.json").read_text().replace(sha256(files[SHARD]), "0" * 64))
    (tmp_path / ".cached/manifest.json").write_text(json.dumps(wrong))
    lay(site, "tiny", tmp_path, offline=True)
    with pytest.raises(errors.IntegrityError) as caught:
        lay(site, "tiny", tmp_path, offline=True, verify=Thoroughness.FULL)
    assert caught.value.fields["path"] == SHARD
    lay(site, "tiny", tmp_path, verify=Thoroughness.FULL)
    check_laid(tmp_path, files)


def test_over_tls_with_a_name_derived_from_the_uri(tmp_path):
    files = model_files(MB)
    with RcloneS3(tmp_path / "buckets", tls=True) as server:
        server.seed_many("models", {f"tiny/{path}": data for path, data in files.items()})
        environment = os.environ | server.env()
        environment |= {"CACHED_S3_ENDPOINT_URL": server.endpoint_url, "PYTHONPATH": str(ROOT)}
        words = [*SERVE, "pull", "s3://models/tiny", "--standalone", "--to", str(tmp_path / "seed")]
        refused = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        assert refused.returncode == 1
        assert "certificate" in refused.stderr.lower()
        environment["CACHED_S3_CA_BUNDLE"] = server.ca_bundle
        told = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        assert told.returncode == 0, told.stderr
    check_laid(tmp_path / "seed", files)


def test_what_a_server_vouches_for_is_checked(moto_site, tmp_path):
    site, files = moto_site, model_files(MB)
    for path, data in files.items():
        site.server.put(site.bucket, f"tiny/{path}", data, ChecksumAlgorithm="CRC32C")
    site.know("tiny", files)
    pulled = lay(site, "tiny", tmp_path / "good")
    assert pulled.manifest.checked_by == "origin-checksum"
    fault = site.proxy.inject("corrupt", path=SHARD, ranged=True, after_bytes=1000)
    with pytest.raises(errors.IntegrityError) as caught:
        lay(site, "tiny", tmp_path / "bad")
    assert (fault.hits, caught.value.fields["check"]) == (1, "origin-crc32c")
    assert laid(tmp_path / "bad") == {}, "nothing has its name before all is there"
    lay(site, "tiny", tmp_path / "bad")
    check_laid(tmp_path / "bad", files)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("reset", {"after_bytes": MB}),
        ("truncate", {"after_bytes": MB}),
        ("status", {"status": 503, "times": 2}),
    ],
)
def test_a_server_that_fails_now_and_then_costs_only_the_ranges_that_failed(site, tmp_path, kind, settings):
    files = site.add("tiny", model_files(CHUNK_BYTES + 2 * MB))
    fault = site.proxy.inject(kind, path=SHARD, **settings)
    lay(site, "tiny", tmp_path)
    assert fault.hits >= 1
    check_laid(tmp_path, files)
    assert len(site.proxy.gets(SHARD)) == 2 + fault.hits


def test_damage_that_the_catalog_knows_is_never_laid(site, tmp_path):
    files = model_files(MB)
    site.add("tiny", files, sha256={path: sha256(data) for path, data in files.items()})
    site.proxy.inject("corrupt", path=SHARD, after_bytes=5000)
    failed = cached(site, "tiny", tmp_path / "seed")
    assert failed.returncode == 6
    assert "not what the catalog says" in failed.stderr
    assert laid(tmp_path / "seed") == {}
    pulled = lay(site, "tiny", tmp_path / "seed")
    assert pulled.manifest.checked_by == "catalog-sha256"
    check_laid(tmp_path / "seed", files)


def test_an_object_that_changes_under_way_is_never_mixed(site, tmp_path):
    site.add("tiny", model_files(CHUNK_BYTES + MB, seed=1))
    later = model_files(CHUNK_BYTES + MB, seed=2)
    hold = site.hold(SHARD)
    one_by_one = {"CACHED_TRANSFER_MAX_RANGES": "1"}
    with started(site, "tiny", tmp_path / "seed", more=one_by_one) as process:
        assert hold.reached.wait(60)
        site.upload("tiny", later)
        site.proxy.heal()
        _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    check_laid(tmp_path / "seed", later)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_it_goes_on_with_the_chunks_that_were_verified(site, tmp_path, number):
    files = site.add("tiny", model_files(3 * CHUNK_BYTES + MB))
    ranges = chunk_ranges(len(files[SHARD]))
    last = f"bytes={ranges[3][0]}-{len(files[SHARD]) - 1}"
    hold, folder = site.hold(SHARD, range=last), tmp_path / "seed"
    with started(site, "tiny", folder) as process:
        assert hold.reached.wait(60)
        journals = folder / ".cached/journals"
        wait_for(lambda: sum(file.read_text().count("chunk ") for file in journals.iterdir()) == 5, "five chunks")
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert laid(folder) == {}
    if number != signal.SIGKILL:
        assert (process.returncode, "are verified and kept" in told) == (130, True), told
        assert "the same command goes on from there" in told
    site.proxy.heal()
    site.proxy.clear()
    pulled = lay(site, "tiny", folder)
    check_laid(folder, files)
    assert site.ranges(SHARD) == [last]
    assert pulled.resumed_bytes == 3 * CHUNK_BYTES
    assert pulled.origin_bytes == ranges[3][1]


def test_in_time_or_not_at_all(site, tmp_path):
    files = site.add("tiny", model_files(CHUNK_BYTES + MB))
    site.hold(SHARD, times=-1)
    late = cached(site, "tiny", tmp_path / "seed", "--timeout", "3s")
    assert late.returncode == 4
    assert "are verified and kept" in late.stderr
    site.proxy.heal()
    lay(site, "tiny", tmp_path / "seed")
    check_laid(tmp_path / "seed", files)


def test_of_two_at_once_the_second_waits_and_fetches_nothing(site, tmp_path):
    files = site.add("tiny", model_files(CHUNK_BYTES + MB))
    hold = site.hold(SHARD, range=f"bytes={CHUNK_BYTES}-{CHUNK_BYTES + MB - 1}")
    with started(site, "tiny", tmp_path / "seed") as first:
        assert hold.reached.wait(60)
        impatient = cached(site, "tiny", tmp_path / "seed", "--timeout", "1s")
        assert impatient.returncode == 4
        assert f"another pull (pid {first.pid}) uses" in impatient.stderr
        with started(site, "tiny", tmp_path / "seed", "-o", "json") as second:
            site.proxy.heal()
            assert first.wait(60) == 0
            result = json.loads(second.communicate(timeout=60)[0])
    assert result["origin_bytes"] == 0
    assert site.proxy.get_bytes(SHARD) == len(files[SHARD])
    check_laid(tmp_path / "seed", files)


def test_a_new_revision_takes_the_place_of_the_old_one(site, tmp_path):
    old = site.add("tiny", model_files(CHUNK_BYTES, MB, seed=1))
    lay(site, "tiny", tmp_path)
    new = {**old, **model_files(MB, seed=2)}
    del new["model-00002-of-00002.safetensors"]
    site.server.delete(site.bucket, "tiny/model-00002-of-00002.safetensors")
    site.upload("tiny", {path: new[path] for path in ("config.json", "tokenizer.json", SHARD)})
    site.proxy.clear()
    pulled = lay(site, "tiny", tmp_path)
    check_laid(tmp_path, new)
    assert pulled.removed_files == ("model-00002-of-00002.safetensors",)
    assert not site.proxy.gets("model-00001"), "what stayed is not fetched again"


def test_the_same_content_twice_is_fetched_once_where_that_is_known(site, tmp_path):
    files = model_files(MB)
    files["unet/model.safetensors"] = files["vae/model.safetensors"] = files[SHARD]
    known = site.add("known", files, sha256={path: sha256(data) for path, data in files.items()})
    lay(site, "known", tmp_path / "known")
    check_laid(tmp_path / "known", known)
    assert len(site.proxy.gets(SHARD)) == 1
    site.add("unknown", files)
    lay(site, "unknown", tmp_path / "unknown")
    check_laid(tmp_path / "unknown", files)


def test_what_others_laid_is_not_replaced_without_a_word(site, tmp_path):
    files = site.add("tiny", model_files(MB))
    site.add("other", model_files(MB, seed=9))
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "config.json").write_text("mine too")
    with pytest.raises(errors.InvalidRequestError, match=r"would replace: config\.json"):
        lay(site, "tiny", tmp_path)
    assert laid(tmp_path) == {"README.md": b"mine", "config.json": b"mine too"}
    lay(site, "tiny", tmp_path, force=True)
    assert laid(tmp_path) == {**files, "README.md": b"mine"}
    with pytest.raises(errors.InvalidRequestError, match="holds tiny, not other"):
        lay(site, "other", tmp_path)
    lay(site, "other", tmp_path, force=True)
    assert laid(tmp_path) == {**site.files["other"], "README.md": b"mine"}


@pytest.mark.parametrize("planted", ["folder", "file", "out"])
def test_links_that_were_planted_lead_nowhere(site, tmp_path, planted):
    site.add("tiny", {**model_files(MB), "unet/model.safetensors": safetensors(MB, 5)})
    outside, seed = tmp_path / "outside", tmp_path / "seed"
    outside.mkdir()
    seed.mkdir()
    (outside / "config.json").write_text("precious")
    target = {"folder": "unet", "file": "config.json", "out": ".cached"}[planted]
    (seed / target).symlink_to(outside / "config.json" if planted == "file" else outside)
    with pytest.raises(errors.InvalidRequestError):
        lay(site, "tiny", seed)
    if planted == "file":
        lay(site, "tiny", seed, force=True)  # the link is replaced, never followed
        check_laid(seed, site.files["tiny"])
    assert laid(outside) == {"config.json": b"precious"}


def test_names_that_lead_out_of_the_folder_are_refused(moto_site, tmp_path):
    site, folder = moto_site, tmp_path / "below" / "seed"
    site.know("evil", model_files(MB))
    site.upload("evil", model_files(MB))
    site.server.put(site.bucket, "evil/../../evil.json", b"{}")
    failed = cached(site, "evil", folder)
    assert failed.returncode != 0
    assert "is not a path within a model" in failed.stderr, failed.stderr
    assert not (tmp_path / "evil.json").exists()
    assert laid(folder) == {}


def test_nothing_takes_the_place_of_the_record(site, tmp_path):
    site.add("sly", {**model_files(MB), ".cached/manifest.json": b"{}"}, format="all")
    with pytest.raises(errors.InvalidRequestError, match="the record of the pull"):
        lay(site, "sly", tmp_path)


def test_a_disk_without_room_is_told_before_a_byte_comes(site, tmp_path):
    site.add("tiny", model_files(CHUNK_BYTES + MB))
    words = command(site, "tiny", tmp_path / "seed")
    (tmp_path / "seed").mkdir()
    code = f"""
import json, subprocess, sys
told = subprocess.run({words!r}, capture_output=True, text=True)
print(json.dumps([told.returncode, told.stderr]))
"""
    with s3_env(site.server):
        status, told = json.loads(run_on_small_tmpfs(tmp_path / "seed", "size=8m", code))
    assert status == 5, told
    assert "free, and 17.0 MiB are to come" in told
    assert not site.proxy.gets()


def test_a_folder_that_cannot_be_written_is_told(site, tmp_path):
    files = site.add("tiny", model_files(MB))
    seed = tmp_path / "seed"
    seed.mkdir()
    words, verify = command(site, "tiny", seed), command(site, "tiny", seed, "--offline")
    code = f"""
import json, os, subprocess, sys
run = lambda words: subprocess.run(words, capture_output=True, text=True)
fresh = run({words!r})
os.system(sys.argv[1])
print(json.dumps([[told.returncode, told.stderr] for told in (fresh, run({words!r}), run({verify!r}))]))
"""
    with s3_env(site.server):
        printed = run_on_small_tmpfs(seed, "size=64m", code, remount="mount -o remount,ro {folder}")
    fresh, again, offline = json.loads(printed)
    assert fresh[0] == offline[0] == 0, printed
    assert again[0] == 1
    assert "Read-only file system" in again[1]
    assert site.proxy.get_bytes() == total_bytes(files)


def test_what_cannot_be_meant_is_refused(site, tmp_path):
    alone = ["--standalone", "--to", str(tmp_path / "seed")]
    for words in (["--to", "d"], ["--standalone"], ["--force"], [*alone, "--tier", "hot"], [*alone, "--no-wait"]):
        told = CliRunner().invoke(cli, ["pull", "x", *words])
        assert told.exit_code == 2, told.output
        assert "--standalone" in told.output
    unknown = cached(site, "x", tmp_path / "seed")
    assert unknown.returncode == 3
    assert "nothing says where to get x from" in unknown.stderr
    two = cached(site, site.uri("x"), tmp_path / "seed", "--source", site.uri("y"))
    assert two.returncode == 2
    assert "two sources are given" in two.stderr
    small = cached(site, "x", tmp_path / "seed", "--max-memory", "10MiB")
    assert small.returncode == 2
