from __future__ import annotations

import json

import pytest

from cached.catalog_file import FORMATS, SCHEMES, Catalog, load_catalog, parse_catalog
from cached.errors import ConfigError
from cached.level import Level
from cached.origins import registry, selection
from cached.types import Tier

DIGEST = "ab" * 32
DESIGNED = """
{"models": {"llama-13b": {"source": "s3://my-bucket/models/llama-13b-hf", "tier": "hot", "format": "safetensors",
  "size": "26GB",
  "sha256": {"model-00001-of-00003.safetensors": "DIGEST"}, "hot": ["mon-fri 08:00-20:00"], "priority": 5}}}
""".replace("DIGEST", DIGEST)


def problems(text, kind="json"):
    with pytest.raises(ConfigError) as caught:
        parse_catalog(text, kind, "catalog.json")
    return caught.value.message


def problem(name="m", **entry):
    return problems(json.dumps({"models": {name: {"source": "s3://b/m"} | entry}}))


def test_the_documented_form_works():
    model = parse_catalog(DESIGNED, "json", "here").models["llama-13b"]
    assert (model.name, model.source, model.tier) == ("llama-13b", "s3://my-bucket/models/llama-13b-hf", Tier.HOT)
    assert (model.format, model.size_bytes, model.priority) == ("safetensors", 26 * 10**9, 5)
    assert model.hot == ("mon-fri 08:00-20:00",)
    assert dict(model.sha256) == {"model-00001-of-00003.safetensors": DIGEST}
    assert not model.pinned


def test_toml_says_the_same(tmp_path):
    file = tmp_path / "catalog.toml"
    file.write_text(
        '[models."qwen2.5"]\nsource = "s3://b/q"\ntier = "warm"\npinned = true\n'
        'include = ["*.gguf"]\nexclude = ["a/*"]\n'
        '[models."qwen2.5".origin]\nendpoint_url = "http://minio:9000"\nanonymous = true\naddressing = "path"\n'
    )
    model = load_catalog(file).models["qwen2.5"]
    assert (model.tier, model.pinned, model.include, model.exclude) == (Tier.WARM, True, ("*.gguf",), ("a/*",))
    assert dict(model.origin) == {"endpoint_url": "http://minio:9000", "anonymous": "true", "addressing": "path"}


def test_what_is_left_away_is_not_said():
    model = parse_catalog('{"models": {"m": {"source": "file:///m"}}}', "json", "here").models["m"]
    assert (model.tier, model.format, model.size_bytes, model.priority, model.hot) == (None, "", None, 0, ())
    assert parse_catalog('{"models": {}}', "json", "here") == Catalog({})


def test_all_problems_are_told_together():
    text = json.dumps(
        {
            "model": 1,
            "models": {
                "a": {"teir": "hot", "source": "s3//b"},
                "b": {"source": "s3://b", "tier": "hott", "size": "26 gigs"},
                "../c": {"source": "s3://b"},
                "d": 4,
            },
        }
    )
    message = problems(text)
    assert message.startswith("7 problems:")
    assert "catalog.json: model: there is no such key (did you mean 'models'?)" in message
    assert "catalog.json: models.a.teir: there is no such key (did you mean 'tier'?)" in message
    assert 'catalog.json: models.a.source = "s3//b": is not a URI (write a URI such as ' in message
    assert "models.b.tier = \"hott\": is none of hot, warm, cold, auto (did you mean 'hot'?)" in message
    assert "models.b.size = \"26 gigs\": is not a size (write bytes, or a number and a unit such as '26GB'" in message
    assert "models.../c: '../c' is not a model name" in message
    assert "models.d = 4: is not a table" in message


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"source": "s4://b/m"}, "no origin serves s4://"),
        ({"source": "s3://"}, "is not a URI"),
        ({"source": "http://h:99999/x"}, "models.m.source: source is not a URL"),
        ({"source": "https://[::1/m/"}, "models.m.source: source is not a URL"),
        ({"source": "https://h/m?key=value"}, "models.m.source: source is not a URL"),
        ({"source": "file://[x/b"}, "is not a URI of a local folder"),
        ({"source": "file:///tmp/a%00b"}, "is not a URI of a local folder"),
        ({"source": "file:///m#v2"}, "write %3F for ? and %23 for #"),
        ({"source": "hf://o/r", "origin": {"endpoint": "http://h:abc"}}, "models.m.origin.endpoint: endpoint is not"),
        ({"source": None}, "models.m.source: is missing"),
        ({"source": ["s3://b"]}, "is not text"),
        ({"format": "safetensor"}, "models.m.format"),
        ({"format": 3}, "models.m.format = 3"),
        ({"size": True}, "models.m.size = true"),
        ({"size": -1}, "models.m.size = -1"),
        ({"sha256": {"../x": DIGEST}}, "is not a path within a model"),
        ({"sha256": {"x": DIGEST.upper()}}, "models.m.sha256.x"),
        ({"sha256": {"x": 3}}, "models.m.sha256.x = 3"),
        ({"sha256": [DIGEST]}, "models.m.sha256"),
        ({"include": "*.bin"}, "models.m.include"),
        ({"exclude": [""]}, "models.m.exclude[0]"),
        ({"hot": ["mon-fry 08:00-20:00"]}, "models.m.hot[0]"),
        ({"hot": ["mon 08:00-25:00"]}, "models.m.hot[0]"),
        ({"hot": ["mon 08:00-08:00"]}, "models.m.hot[0]"),
        (
            {"hot": ["mon 08:00-09:00 Europe/Berin"]},
            'models.m.hot[0] = "mon 08:00-09:00 Europe/Berin": names no time zone',
        ),
        ({"hot": ["08:00"]}, "has no end: '08:00'"),
        ({"base": "m"}, 'models.m.base = "m": is the model itself'),
        ({"base": "../m"}, "models.m.base: '../m' is not a model name"),
        ({"base": 3}, "models.m.base = 3: is not text"),
        ({"tenant": "red"}, 'models.m.tenant = "red": there is no such tenant'),
        ({"priority": 5.5}, "models.m.priority = 5.5"),
        ({"priority": True}, "models.m.priority = true"),
        ({"priority": -1}, "models.m.priority = -1"),
        ({"pinned": "yes"}, "models.m.pinned"),
        ({"origin": {"endpoint": "http://x"}}, "did you mean 'endpoint_url'?"),
        ({"source": "hf://o/r", "origin": {"endpoint_url": "http://x"}}, "did you mean 'endpoint'?"),
        ({"source": "https://h/r", "origin": {"files": "w"}}, "models.m.origin.files"),
        ({"origin": {"addressing": "both"}}, "models.m.origin.addressing"),
        ({"origin": {"region": 1}}, "models.m.origin.region = 1"),
        ({"source": "file:///m", "origin": {"region": "x"}}, "file:// sources have no options"),
    ],
)
def test_what_is_wrong_is_named(entry, told):
    with pytest.raises(ConfigError) as caught:
        parse_catalog(json.dumps({"models": {"m": {"source": "s3://b/m"} | entry}}), "json", "c")
    error = caught.value
    assert told in f"{error.message} ({error.hint})"


@pytest.mark.parametrize("window", ["08:00-20:00", "mon 22:00-06:00", "mon-fri,sun 00:00-24:00", "sat,sun 10:00-11:30"])
def test_windows(window):
    text = json.dumps({"models": {"m": {"source": "s3://b/m", "hot": [window]}}})
    assert parse_catalog(text, "json", "here").models["m"].hot == (window,)


def test_keys_that_are_there_twice_are_refused():
    message = problems('{"models": {"m": {"source": "s3://a", "source": "s3://b"}, "m": {"source": "s3://c"}}}')
    assert "models.m: is there twice" in message


def test_credentials_in_a_uri_are_refused_and_not_repeated():
    message = problem(source="s3://key:secret@bucket/m")
    assert "holds credentials" in message
    assert "secret" not in message


@pytest.mark.parametrize("text", ["[]", "{}", "null", "{", '{"models": []}', "[" * 5000, '{"models": {"m": null}}'])
def test_what_is_no_catalog_is_refused(text):
    problems(text)


def test_files_that_cannot_be_read_are_named(tmp_path):
    binary = tmp_path / "c.json"
    binary.write_bytes(b"\xff\xfe")
    for file, told in (
        (tmp_path / "c.yaml", "ends with .json or .toml"),
        (tmp_path / "missing.json", "cannot read the catalog"),
        (tmp_path, "ends with"),
        (binary, "is not UTF-8"),
    ):
        with pytest.raises(ConfigError, match=told):
            load_catalog(file)


def test_the_files_of_a_web_server_are_a_list():
    text = json.dumps({"models": {"m": {"source": "https://h/m", "origin": {"files": ["config.json", "w"]}}}})
    assert dict(parse_catalog(text, "json", "c").models["m"].origin) == {"files": "config.json\nw"}


def test_formats_and_schemes_are_those_that_the_origins_know():
    assert set(FORMATS) == set(selection.FORMATS)
    assert set(SCHEMES) == set(registry._READABLE)


def test_tenants_have_bounds_and_models_may_be_theirs():
    text = """{"tenants": {"red": {"l1": "100GB", "l2": "25%"}, "blue": {}},
               "models": {"m": {"source": "s3://b/m", "tenant": "red"}}}"""
    catalog = parse_catalog(text, "json", "here")
    assert catalog.models["m"].tenant == "red"
    assert {name: dict(bounds) for name, bounds in catalog.tenants.items()} == {
        "red": {Level.L1: "100GB", Level.L2: "25%"},
        "blue": {},
    }


@pytest.mark.parametrize(
    ("tenants", "told"),
    [
        ({"red": {"l1": "many"}}, 'tenants.red.l1 = "many": is neither a size nor a share'),
        ({"red": {"l2": True}}, "tenants.red.l2 = true: is neither a size nor a share"),
        ({"red": {"l3": "1GB"}}, "tenants.red.l3: there is no such key"),
        ({"red": "1GB"}, 'tenants.red = "1GB": is not a table'),
        ({"../red": {}}, "tenants.../red: '../red' is not"),
        ([], "tenants = []: is not a table"),
    ],
)
def test_what_is_wrong_with_a_tenant_is_named(tenants, told):
    assert told in problems(json.dumps({"models": {}, "tenants": tenants}))


def test_a_wrong_tenant_is_told_with_the_nearest():
    text = json.dumps({"models": {"m": {"source": "s3://b/m", "tenant": "redd"}}, "tenants": {"red": {}}})
    assert "there is no such tenant" in problems(text)
    with pytest.raises(ConfigError) as caught:
        parse_catalog(text, "json", "here")
    assert caught.value.hint == "did you mean 'red'?"


def test_an_adapter_has_a_base_that_is_none_and_may_be_unknown():
    entries = {"a": {"source": "s3://b/a", "base": "big"}, "b": {"source": "s3://b/b", "base": "a"}}
    assert 'models.b.base = "a": is an adapter itself' in problems(json.dumps({"models": entries}))
    entries["b"]["base"] = "big"
    models = parse_catalog(json.dumps({"models": entries}), "json", "here").models
    assert (models["a"].base, models["b"].base) == ("big", "big")
