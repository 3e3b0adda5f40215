"""The readers of catalog and settings: whatever is in the file, a typed error that can be told, or what it says."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.access import AccessList
from cached.catalog_file import Catalog, CatalogModel, load_catalog, parse_catalog
from cached.config import LoadedConfig, Place, load_config
from cached.errors import ConfigError
from cached.settings import describe_settings
from cached.units import MAX_SIZE_BYTES, parse_size

NOBODY = Place(uid=1234, run_dir_writable=False, config_file="/nonexistent/config.toml")
HOME = {"HOME": "/home/someone"}
DIGITS = "9" * 5000
"""More than Python makes a number of in one go."""

DEEP = 100_000
WRITTEN = {"@digits@": DIGITS, "@deep@": "[" * DEEP, "@nested@": "[" * 500 + "]" * 500, "@infinity@": "1e999"}
"""What no writer of JSON makes: put in where its key stands in quotes."""

HOSTILE: tuple[Any, ...] = (
    *WRITTEN, "\0", "a\0b", "\ud800", "s3://b/\udfff", "s3://b/m", "s3://b/\0", DIGITS, f"{DIGITS}GB", f"{'9' * 400}GB",
    f"{DIGITS}%", "1e400GB", "9223372036854775807", "9223372036854775808", "²", "²GB", "root", "../x", "x" * 5000, "",
    "mon-fri 99:99-00:00", "08:00-20:00 \0", "08:00-20:00 ../../etc/passwd", f"08:00-20:00 {'z' * 5000}", "25%", "hot",
    2**63 - 1, 2**63, 10**300, -1, 0, 1.5, float("nan"), float("inf"), True, None, [], {}, [[]], ["\ud800"], ["\0"],
    {"\ud800": "\0"}, {"source": "s3://b/m"}, {"l1": "25%"},
)  # fmt: skip


def written(value: object) -> str:
    """As JSON, with what only a hand writes."""
    text = json.dumps(value)
    for key, raw in WRITTEN.items():
        text = text.replace(f'"{key}"', raw)
    return text


def told(error: ConfigError) -> None:
    """It can be logged, answered over the wire, and shown by the service manager."""
    for text in (error.message, error.hint, error.chain, str(error), *error.fields.values()):
        text.encode()


def texts_of(value: object) -> list[str]:
    """All texts within what was read."""
    if isinstance(value, str):
        return [value]
    if dataclasses.is_dataclass(value):
        return texts_of([getattr(value, item.name) for item in dataclasses.fields(value)])
    if isinstance(value, Mapping):
        return texts_of([*value.keys(), *value.values()])
    return [text for item in value for text in texts_of(item)] if isinstance(value, (list, tuple)) else []


def read(text: str, kind: str) -> Catalog | None:
    """None where it was refused."""
    try:
        catalog = parse_catalog(text, kind, "here")
    except ConfigError as error:
        told(error)
        return None
    for found in texts_of(catalog):
        assert "\0" not in found.encode().decode()
    assert all((model.size_bytes or 0) <= MAX_SIZE_BYTES for model in catalog.models.values())
    return catalog


def start_of(text: str) -> str:
    """For names of cases, which must not be thousands of characters long."""
    return text[:40]


def model_of(entry: str) -> str:
    return f'{{"models": {{"m": {{"source": "s3://b/m", {entry}}}}}}}'


@pytest.mark.parametrize(
    "entry",
    [
        f'"priority": {DIGITS}', f'"size": {DIGITS}', f'"size": "{"9" * 400}GB"', f'"size": {2**63}', '"size": "8EiB"',
        '"access": {"users": ["a\\u0000b"]}', '"access": {"users": ["\\ud800"]}', '"access": {"groups": ["\\ud800"]}',
        '"source": "s3://b/\\ud800"', '"\\ud800": 1', '"origin": {"region": "\\u0000"}', f'"tier": {"[" * DEEP}',
        f'"tier": {"[" * 900}{"]" * 900}', '"include": ["\\udc80"]',
    ],
    ids=start_of,
)  # fmt: skip
def test_a_json_catalog_that_no_parser_foresaw_is_refused(entry: str) -> None:
    assert read(model_of(entry), "json") is None


@pytest.mark.parametrize(
    "value",
    [DIGITS, f"0x{'f' * 5000}", f'"{"9" * 400}GB"', "[" * 5000, "[" * 200 + "]" * 200, '"\\u0000"', "inf"],
    ids=start_of,
)
@pytest.mark.parametrize("key", ["priority", "size", "tier", "source", "hot"])
def test_a_toml_catalog_that_no_parser_foresaw_is_refused(key: str, value: str) -> None:
    assert read(f"[models.m]\n{key} = {value}\n", "toml") is None


@pytest.mark.parametrize("size", [f"{'9' * 400}GB", DIGITS, "9223372036854775808", "8388608TiB"], ids=start_of)
def test_a_size_is_one_that_there_can_be(size: str) -> None:
    with pytest.raises(ValueError, match="is more than a size can be"):
        parse_size(size)
    assert parse_size("8388607TiB") == 8388607 * 2**40


ENTRY_KEYS = (
    *({"size_bytes": "size", "front": "origins"}.get(key, key) for key in CatalogModel.__dataclass_fields__), "l1", "x",
)  # fmt: skip
LEAVES = st.sampled_from(HOSTILE) | st.text(max_size=8)
VALUES = LEAVES | st.lists(LEAVES, max_size=3)
ACCESS = st.dictionaries(st.sampled_from([*AccessList.__dataclass_fields__, "users", "groups"]), VALUES, max_size=3)
TABLES = st.dictionaries(
    st.sampled_from(ENTRY_KEYS), VALUES | ACCESS | st.dictionaries(st.text(max_size=3), LEAVES, max_size=2), max_size=4
)
NAMES = st.sampled_from(["a", "b", "..", "\0", "\ud800", "x" * 500]) | st.text(max_size=4)
CATALOGS = st.fixed_dictionaries(
    {"models": st.dictionaries(NAMES, TABLES | LEAVES, max_size=3)},
    optional={"tenants": st.dictionaries(NAMES, TABLES, max_size=2)},
)


@given(CATALOGS | VALUES)
def test_any_json_is_a_catalog_or_a_typed_error(value: object) -> None:
    read(written(value), "json")


SOUND = {"m": {"source": "s3://b/m", "size": "26GB", "priority": 5, "hot": ["mon-fri 08:00-20:00"], "pinned": True}}
SOUND_JSON = json.dumps({"models": SOUND}).encode()
SOUND_TOML = b'[models.m]\nsource = "s3://b/m"\nsize = "26GB"\npriority = 5\nhot = ["mon-fri 08:00-20:00"]\n'
SCRAPS = st.binary(max_size=6) | st.sampled_from(
    [
        DIGITS.encode(), b"[" * 3000, b"{" * 3000, b"\\ud800", b"\\u0000", b"\0", b"\xed\xa0\x80", b'"', b"1e9999",
        b"0x" + b"f" * 5000,
    ]
)  # fmt: skip


@given(st.sampled_from([("c.json", SOUND_JSON), ("c.toml", SOUND_TOML)]), st.data())
def test_any_bytes_are_a_catalog_or_a_typed_error(file: tuple[str, bytes], data: st.DataObject) -> None:
    name, content = file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(spliced(content, data))
        try:
            load_catalog(path)
        except ConfigError as error:
            told(error)


def spliced(content: bytes, data: st.DataObject) -> bytes:
    """With something else in some places, or something else entirely."""
    for _ in range(data.draw(st.integers(0, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 30)))
        content = content[:start] + data.draw(SCRAPS) + content[end:]
    return content


def settings(text: bytes, overrides: Mapping[str, str] | None = None) -> LoadedConfig | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_bytes(text)
        try:
            return load_config(path, HOME, overrides or {}, NOBODY)
        except ConfigError as error:
            told(error)
            return None


@pytest.mark.parametrize(
    "value",
    [
        DIGITS, f"0x{'f' * 5000}", "[" * 5000, "[" * 200 + "]" * 200, f'"{"9" * 400}GB"', '"/a\\u0000b"',
        '["/\\u0000"]',
    ],
    ids=start_of,
)  # fmt: skip
@pytest.mark.parametrize(
    "key", ["l1.capacity", "daemon.state_dir", "daemon.drain_timeout_s", "transfer.nice", "l2.paths"]
)
def test_settings_that_no_parser_foresaw_are_refused(key: str, value: str) -> None:
    section, name = key.split(".")
    assert settings(f"[{section}]\n{name} = {value}\n".encode()) is None


KEYS = tuple(item.key for item in describe_settings())
QUOTED = [json.dumps(item) for item in HOSTILE if isinstance(item, str) and item.isascii()]
RAW = st.sampled_from([*QUOTED, *WRITTEN.values(), "-1", "nan"])
TEXTS = st.text(max_size=8) | st.sampled_from([DIGITS, "\udc80", "²"])


@given(st.dictionaries(st.sampled_from(KEYS), RAW, max_size=4), st.data())
def test_any_settings_file_is_settings_or_a_typed_error(values: dict[str, str], data: st.DataObject) -> None:
    lines = [f"[{key.split('.')[0]}]\n{key.split('.')[1]} = {value}\n" for key, value in values.items()]
    settings(spliced("".join(lines).encode(), data))


@given(
    st.dictionaries(st.sampled_from(KEYS), st.text(max_size=8) | st.sampled_from([DIGITS, "\udc80", "²"]), max_size=3)
)
def test_any_text_of_a_variable_or_flag_is_a_setting_or_a_typed_error(overrides: dict[str, str]) -> None:
    settings(b"", overrides)
