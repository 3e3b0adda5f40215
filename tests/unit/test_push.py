"""`cached push`: what is refused before anything is sent, and whose settings count."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cached.cli.main import main
from cached.convert.checkpoint import files_below, plan_conversion
from cached.errors import InvalidRequestError
from cached.origins.base import OriginSpec


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "part/a.json", "pytorch_model.bin"):
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.mark.parametrize(("link", "says"), [("no/such", "leads to no file"), ("{}/elsewhere", "leads to a folder")])
def test_links_that_are_not_followed_are_refused_by_name(model, tmp_path, capfd, link, says):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.json").write_text("{}")
    (model / "part/linked").symlink_to(link.format(tmp_path))
    assert main(["push", str(model), f"file://{tmp_path}/target"]) == 2
    told = capfd.readouterr().err
    assert "part/linked" in told
    assert says in told
    assert not (tmp_path / "target").exists()
    with pytest.raises(InvalidRequestError, match=f"part/linked in .*{says}"):
        plan_conversion(model)


def test_links_to_files_are_followed_and_hidden_ones_left_out(model, tmp_path, capfd):
    (tmp_path / "blob").write_bytes(b"tokens")
    (model / "tokenizer.json").symlink_to(tmp_path / "blob")
    (model / ".hidden").symlink_to("no/such")
    (model / ".folder").symlink_to(tmp_path)
    assert main(["push", str(model), f"file://{tmp_path}/target"]) == 0
    assert "5 files" in capfd.readouterr().err
    assert (tmp_path / "target/tokenizer.json").read_bytes() == b"tokens"
    assert not (tmp_path / "target/tokenizer.json").is_symlink()


def test_a_folder_that_cannot_be_read_is_not_left_out(model, monkeypatch):
    scandir = os.scandir

    def denied(path: str) -> object:
        if os.fspath(path).endswith("part"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InvalidRequestError, match="part cannot be read: Permission denied"):
        list(files_below(model))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("notauri",), "no origin serves 'notauri'"),
        (("ftp://b/x",), "no origin serves 'ftp://b/x'"),
        (("file:///t/x", "--region", "eu-1", "--anonymous"), "--region, --anonymous: of s3:// alone"),
        (("az://container/x", "--endpoint-url", "http://h"), "--endpoint-url: of s3:// alone, and az:// was given"),
    ],
)
def test_uris_and_flags_that_do_not_fit_are_refused(model, capfd, words, says):
    assert main(["push", str(model), *words]) == 2
    assert says in capfd.readouterr().err


def test_a_setting_that_is_wrong_is_called_by_the_flag_of_this_command(model, capfd):
    assert main(["push", str(model), "s3://b/x", "--endpoint-url", "foo"]) == 1
    told = capfd.readouterr().err
    assert "flag --endpoint-url" in told
    assert "--s3-" not in told


def test_the_settings_of_s3_count_however_its_scheme_is_written(model, monkeypatch):
    opened: list[OriginSpec] = []

    def open_writable(spec: OriginSpec) -> None:
        opened.append(spec)
        raise InvalidRequestError("far enough")

    monkeypatch.setattr("cached.cli.push.open_writable", open_writable)
    monkeypatch.setenv("CACHED_S3_REGION", "eu-1")
    assert main(["push", str(model), "S3://b/x", "--endpoint-url", "http://127.0.0.1:9"]) == 2
    (spec,) = opened
    assert spec.options["endpoint_url"] == "http://127.0.0.1:9"
    assert spec.options["region"] == "eu-1"
