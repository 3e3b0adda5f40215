"""Signed catalogs: what is taken, what is refused, and how keys take each other's place."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cached import signatures
from cached.catalog_file import load_catalog
from cached.cli.main import main
from cached.errors import ConfigError
from cached.signatures import CatalogGuard, generate_key, sign

CATALOG = b'{"models": {"a": {"source": "s3://bucket/a"}}}'


class Signer:
    """A key pair in files."""

    def __init__(self, folder: Path, name: str) -> None:
        private, public, self.key_id = generate_key()
        self.key, self.public = str(folder / name), str(folder / f"{name}.pub")
        Path(self.key).write_bytes(private)
        Path(self.key).chmod(0o600)
        Path(self.public).write_bytes(public)


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    path = tmp_path / "catalog.json"
    path.write_bytes(CATALOG)
    return path


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return Signer(tmp_path, "one")


@pytest.fixture
def other(tmp_path: Path) -> Signer:
    return Signer(tmp_path, "two")


def put(catalog: Path, text: str) -> None:
    Path(f"{catalog}.sig").write_text(text)


def check(catalog: Path, *public: str, taken: str = "") -> signatures.Signed:
    return CatalogGuard(public, taken).check(str(catalog), catalog.read_bytes())


def test_what_one_of_the_keys_signed_is_taken(catalog: Path, signer: Signer, other: Signer) -> None:
    put(catalog, sign(CATALOG, [signer.key]))
    assert check(catalog, other.public, signer.public).key_id == signer.key_id


@pytest.mark.parametrize("at", range(len(CATALOG)))
def test_a_flipped_byte_of_the_catalog_is_refused(catalog: Path, signer: Signer, at: int) -> None:
    put(catalog, sign(CATALOG, [signer.key]))
    catalog.write_bytes(CATALOG[:at] + bytes([CATALOG[at] ^ 1]) + CATALOG[at + 1 :])
    with pytest.raises(ConfigError, match="one of the two was changed or exchanged"):
        load_catalog(catalog, signatures.check_of([signer.public], catalog))


def test_every_part_of_the_signature_counts(catalog: Path, signer: Signer) -> None:
    good = json.loads(sign(CATALOG, [signer.key]))
    entry = good["signatures"][0]
    raw = bytearray(base64.b64decode(entry["signature"]))
    for at in range(0, len(raw), 7):
        changed = bytearray(raw)
        changed[at] ^= 0x10
        put(catalog, json.dumps({**good, "signatures": [{**entry, "signature": base64.b64encode(changed).decode()}]}))
        with pytest.raises(ConfigError, match="changed or exchanged"):
            check(catalog, signer.public)
    put(catalog, json.dumps({**good, "signatures": [{**entry, "signed_at": entry["signed_at"] - 1}]}))
    with pytest.raises(ConfigError, match="changed or exchanged"):
        check(catalog, signer.public)


def test_another_key_is_named_and_refused_even_under_the_name_of_ours(
    catalog: Path, signer: Signer, other: Signer
) -> None:
    text = sign(CATALOG, [other.key])
    put(catalog, text)
    with pytest.raises(ConfigError, match=f"is signed by {other.key_id}, and not with any .*{signer.key_id}"):
        check(catalog, signer.public)
    put(catalog, text.replace(other.key_id, signer.key_id))
    with pytest.raises(ConfigError, match="changed or exchanged"):
        check(catalog, signer.public)


def test_without_a_signature_it_is_refused(catalog: Path, signer: Signer) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the catalog's signature .*catalog.json.sig") as raised:
        check(catalog, signer.public)
    assert "cached catalog sign" in raised.value.hint
    put(catalog, json.dumps({"format": 1, "signatures": []}))
    with pytest.raises(ConfigError, match="is signed by nobody"):
        check(catalog, signer.public)


def test_signatures_of_two_catalogs_do_not_stand_for_each_other(tmp_path: Path, signer: Signer) -> None:
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    first.write_bytes(CATALOG)
    second.write_bytes(CATALOG.replace(b"bucket/a", b"bucket/b"))
    put(first, sign(second.read_bytes(), [signer.key]))
    put(second, sign(first.read_bytes(), [signer.key]))
    for path in (first, second):
        with pytest.raises(ConfigError, match="changed or exchanged"):
            check(path, signer.public)


def test_keys_take_each_others_place(catalog: Path, signer: Signer, other: Signer) -> None:
    put(catalog, sign(CATALOG, [signer.key, other.key]))
    for public in (signer.public, other.public):
        assert check(catalog, public)
    good = json.loads(Path(f"{catalog}.sig").read_text())
    good["signatures"][0]["signature"] = good["signatures"][1]["signature"]
    put(catalog, json.dumps(good))
    assert check(catalog, signer.public, other.public).key_id == other.key_id  # one good one is enough
    with pytest.raises(ConfigError, match="changed or exchanged"):
        check(catalog, signer.public)


def test_an_older_catalog_is_refused_once_a_newer_one_was_taken(
    catalog: Path, signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = str(tmp_path / "taken")
    now_s = signatures.time.time()
    old = sign(CATALOG, [signer.key])
    monkeypatch.setattr(signatures.time, "time", lambda: now_s + 100)
    put(catalog, sign(CATALOG, [signer.key]))
    guard = CatalogGuard([signer.public], taken)
    signed = guard.check(str(catalog), CATALOG)
    put(catalog, old)
    assert guard.check(str(catalog), CATALOG)  # the newer one was looked at, but not taken
    guard.taken(signed)
    for again in (guard, CatalogGuard([signer.public], taken)):
        with pytest.raises(ConfigError, match=r"before the one of \d{4}-.* UTC that was taken") as raised:
            again.check(str(catalog), CATALOG)
        assert "sign it again" in raised.value.hint
    Path(taken).write_text("rubbish")
    with pytest.raises(ConfigError, match="cannot read when the last catalog was signed"):
        guard.check(str(catalog), CATALOG)


def test_a_signature_from_the_future_is_refused(catalog: Path, signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = signatures.time.time()
    monkeypatch.setattr(signatures.time, "time", lambda: now_s + 2 * 86400)
    put(catalog, sign(CATALOG, [signer.key]))
    assert check(catalog, signer.public)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="more than a day from now"):
        check(catalog, signer.public)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "{}", '{"format": 2, "signatures": []}', '{"format": 1, "signatures": {}}"', "[" * 50000,
        '{"format": 1, "signatures": [{"key_id": 1, "signed_at": 1, "signature": ""}]}',
        '{"format": 1, "signatures": [{"key_id": "a", "signed_at": "1", "signature": ""}]}',
        '{"format": 1, "signatures": [{"key_id": "a", "signed_at": -1, "signature": ""}]}',
        '{"format": 1, "signatures": [{"key_id": "a", "signed_at": 1, "signature": "é"}]}',
    ],
)  # fmt: skip
def test_what_is_no_signature_file_is_told_so(catalog: Path, signer: Signer, text: str) -> None:
    put(catalog, text)
    with pytest.raises(ConfigError, match="is not the signature of a catalog"):
        check(catalog, signer.public)


def test_keys_that_cannot_be_used(tmp_path: Path, signer: Signer) -> None:
    with pytest.raises(ConfigError, match="holds no public Ed25519 key"):
        CatalogGuard([signer.key])
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        CatalogGuard([str(tmp_path / "nothing")])
    with pytest.raises(ConfigError, match="holds no private Ed25519 key"):
        Path(signer.public).chmod(0o600)
        sign(CATALOG, [signer.public])
    Path(signer.key).chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others"):
        sign(CATALOG, [signer.key])


def test_the_library_is_loaded_only_where_it_is_asked_for() -> None:
    code = "import sys, cached.daemon, cached.cli.main; assert 'cryptography' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_commands_make_keys_sign_and_verify(
    tmp_path: Path, catalog: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> tuple[int, str]:
        code = main(["catalog", *arguments])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    key, public = str(tmp_path / "catalog.key"), str(tmp_path / "catalog.key.pub")
    code, text = command("keygen", key)
    assert (code, "public_keys = " in text) == (0, True)
    assert Path(key).stat().st_mode & 0o777 == 0o600
    code, text = command("keygen", key)
    assert (code, "no key is ever overwritten" in text) == (1, True)

    assert command("sign", str(catalog), "--key", key)[0] == 0
    code, text = command("verify", str(catalog), "--public-key", public)
    assert (code, "is valid (1 model), and signed by" in text) == (0, True)
    catalog.write_bytes(CATALOG + b" ")
    code, text = command("verify", str(catalog), "--public-key", public)
    assert (code, "changed or exchanged" in text) == (1, True)
    catalog.write_text("{")
    code, text = command("sign", str(catalog), "--key", key)
    assert (code, "is not JSON" in text) == (1, True)
