"""What an origin at a hub must make of commits, tokens, redirects, and hubs that refuse or lie."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cached import checksum
from cached.errors import (
    ConfigError,
    InvalidRequestError,
    NotFoundError,
    ObjectChangedError,
    OriginDeniedError,
    OriginError,
)
from cached.origins.base import OriginChecksum, OriginSpec
from cached.origins.registry import open_origin, pinned_spec
from tests.conformance.reading import read_range
from tests.http_servers import FileServer, Hub, git_oid, sha256

DATA = bytes(range(256)) * 4000
TOKEN = "hf_right"


@pytest.fixture
def web() -> Iterator[FileServer]:
    with FileServer() as server:
        yield server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with Hub() as server:
        yield server


def read(origin: Any, item: Any, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
    buffer = bytearray(item.size_bytes - offset_bytes if length_bytes is None else length_bytes)
    read_range(origin, item, offset_bytes, memoryview(buffer))
    return bytes(buffer)


def open_hub(hub: Hub, what: str = "org/repo", **options: str) -> Any:
    return open_origin(OriginSpec(f"hf://{what}", {"endpoint": hub.url, **options}))


def test_what_a_hub_vouches_for(hub):
    hub.commit("org/repo", {"model.safetensors": DATA, "config.json": b"{}"})
    origin = open_hub(hub)
    assert [item.path for item in origin.list_objects()] == ["config.json", "model.safetensors"]
    large, small = origin.stat("model.safetensors"), origin.stat("config.json")
    assert large.checksums == (OriginChecksum("sha256", sha256(DATA)),)
    assert small.checksums == (OriginChecksum("git-sha1", git_oid(b"{}")),)
    assert checksum.part_digest("git-sha1", b"{", b"}") == small.checksums[0].value_hex
    assert read(origin, large) == DATA
    assert read(origin, small) == b"{}"


def test_a_commit_stays_readable_when_the_branch_moves_on(hub):
    first = hub.commit("org/repo", {"w": DATA, "a": b"1"})
    origin = open_hub(hub)
    listed, item = origin.list_objects(), origin.stat("w")
    hub.commit("org/repo", {"w": DATA[::-1]})
    assert read(origin, item, 0, 100) == DATA[:100]
    assert origin.stat("w").version != item.version
    spec = pinned_spec(OriginSpec("hf://org/repo", {"endpoint": hub.url}), listed)
    assert spec.uri == f"hf://org/repo@{first}"
    assert open_origin(spec).stat("a").size_bytes == 1
    assert pinned_spec(OriginSpec("hf://org/repo@x/sub dir/"), listed).uri == f"hf://org/repo@{first}/sub%20dir/"
    assert pinned_spec(OriginSpec("s3://b/x"), listed).uri == "s3://b/x"


def test_revisions_of_all_kinds(hub):
    first = hub.commit("org/repo", {"w": b"first"})
    hub.commit("org/repo", {"w": b"branch"}, branch="feature/x")
    hub.commit("org/repo", {"w": b"pull request", "sub/w": b"below"}, branch="refs/pr/1")
    hub.commit("org/repo", {"w": b"last"})
    found = {
        revision: read(open_hub(hub, f"org/repo{revision}"), open_hub(hub, f"org/repo{revision}").stat("w"))
        for revision in ("", "@main", "@feature%2Fx", "@refs/pr/1", f"@{first}", "@refs/pr/1/sub")
    }
    assert list(found.values()) == [b"last", b"last", b"branch", b"pull request", b"first", b"below"]
    with pytest.raises(NotFoundError, match="no such revision") as error:
        open_hub(hub, "org/repo@nope").list_objects()
    assert "branch, tag or commit" in error.value.hint


def test_the_token_goes_to_the_hub_and_never_to_where_it_redirects(hub, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    hub.commit("org/repo", {"w": DATA})
    hub.repositories["org/repo"].gated = True
    origin = open_hub(hub, token_file=str(tmp_path / "token"))
    assert read(origin, origin.stat("w"), 100, 5000) == DATA[100:5100]
    assert {shown for _, shown in hub.seen} == {f"Bearer {TOKEN}"}
    assert hub.cdn.leaked == []


def test_the_environments_token_is_for_its_own_endpoint_alone(hub, monkeypatch):
    hub.commit("org/repo", {"w": DATA})
    hub.repositories["org/repo"].private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(OriginDeniedError) as error:
        open_hub(hub).list_objects()
    assert "HF_ENDPOINT only" in error.value.hint
    assert {shown for _, shown in hub.seen} == {""}
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
    assert open_origin(OriginSpec("hf://org/repo")).list_objects()[0].path == "w"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(ConfigError, match="nowhere"):
        open_origin(OriginSpec("hf://org/repo"))


@pytest.mark.parametrize(("kind", "says"), [("gated", "accept the model's terms"), ("private", "may not see it")])
def test_refusals_say_what_to_do(hub, tmp_path, kind, says):
    hub.commit("org/repo", {"w": DATA})
    setattr(hub.repositories["org/repo"], kind, True)
    with pytest.raises(OriginDeniedError) as error:
        open_hub(hub).list_objects()
    assert "no token was shown" in error.value.hint
    assert "HF_TOKEN" in error.value.hint
    (tmp_path / "token").write_text("hf_wrong")
    with pytest.raises((OriginDeniedError, NotFoundError)) as second:
        open_hub(hub, token_file=str(tmp_path / "token")).list_objects()
    assert says in str(second.value) + second.value.hint
    assert "hf_wrong" not in str(second.value.to_dict())


def test_a_signed_url_that_expired_is_asked_for_again(hub):
    hub.commit("org/repo", {"w": DATA})
    origin = open_hub(hub)
    item = origin.stat("w")
    assert read(origin, item, 0, 100) == DATA[:100]
    asked = len(hub.seen)
    assert read(origin, item, 100, 100) == DATA[100:200]
    assert len(hub.seen) == asked, "a hub limits how often it may be asked: not for each range"
    hub.cdn.signature = "second-secret"
    assert read(origin, item, 200, 100) == DATA[200:300]
    assert len(hub.seen) == asked + 1
    origin.close()


def test_a_hub_that_answers_another_content_is_found_out(hub):
    hub.commit("org/repo", {"w": DATA, "small": b"12"})
    origin = open_hub(hub)
    large, small = origin.stat("w"), origin.stat("small")
    for files in hub.repositories["org/repo"].commits.values():
        files["w"], files["small"] = DATA[::-1], b"21"
    for item in (large, small):
        with pytest.raises(ObjectChangedError):
            read(origin, item, 0, 1)
    with pytest.raises(ObjectChangedError):
        read(origin, replace(large, version='"an-etag"'), 0, 1)


def test_what_is_no_hub_is_said_so(web):
    web.put("api/models/org/repo/revision/main", b"<html>")
    with pytest.raises(OriginError, match="not JSON"):
        open_origin(OriginSpec("hf://org/repo", {"endpoint": web.url})).list_objects()
    web.put("api/models/org/repo/revision/main", b"{}")
    with pytest.raises(OriginError, match="no commit") as error:
        open_origin(OriginSpec("hf://org/repo", {"endpoint": web.url})).list_objects()
    assert "Hugging Face-compatible" in error.value.hint
    commit = "a" * 40
    trees: list[Any] = [
        {},
        [{"type": "file", "path": "x", "oid": "1", "size": 1}],
        [{"type": "file", "path": "../x", "oid": commit, "size": 1}],
    ]
    for tree in trees:
        web.put(f"api/models/org/repo/tree/{commit}", json.dumps(tree).encode())
        with pytest.raises((OriginError, InvalidRequestError)):
            open_origin(OriginSpec(f"hf://org/repo@{commit}", {"endpoint": web.url})).list_objects()
