"""`cached push`: what is refused before anything is sent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cached.cli.main import main
from cached.convert.checkpoint import files_below, plan_conversion
from cached.errors import InvalidRequestError


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
