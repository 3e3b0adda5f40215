from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest

from cached.config import (
    Config,
    Place,
    default_socket,
    describe_settings,
    example_toml,
    hub_token,
    load_config,
    origin_options,
    resolve_capacity,
)
from cached.errors import ConfigError
from cached.settings import plain_text, toml_text
from cached.units import GIB
from cached_client.connection import socket_path

ROOT = Path(__file__).parents[2]
NOBODY = Place(uid=1234, run_dir_writable=False, config_file="/nonexistent/config.toml")
SYSTEM = Place(uid=0, run_dir_writable=True, config_file="/nonexistent/config.toml")
HOME = {"HOME": "/home/someone"}


def load(text="", env=HOME, overrides=(), *, folder=None, place=NOBODY):
    file = None
    if text:
        file = folder / "config.toml"
        file.write_text(text)
    return load_config(file, env, dict(overrides), place)


def test_flags_go_over_environment_over_file_over_defaults(tmp_path):
    text = '[l1]\ncapacity = "1GiB"\npool_bytes = "2GiB"\nrequire_huge_pages = true\n'
    env = HOME | {"CACHED_L1_CAPACITY": "3GiB", "CACHED_L1_POOL_BYTES": "4GiB"}
    loaded = load(text, env, {"l1.capacity": "5GiB"}, folder=tmp_path)
    assert (loaded.config.l1.capacity, loaded.origin["l1.capacity"]) == ("5GiB", "flag --l1-capacity")
    assert (loaded.config.l1.pool_bytes, loaded.origin["l1.pool_bytes"]) == ("4GiB", "environment CACHED_L1_POOL_BYTES")
    assert loaded.config.l1.require_huge_pages is True
    assert loaded.origin["l1.require_huge_pages"] == f"file {tmp_path}/config.toml:4"
    assert (loaded.config.l1.segment_mode, loaded.origin["l1.segment_mode"]) == ("0600", "default")
    assert loaded.file == f"{tmp_path}/config.toml"


def test_every_setting_can_be_given_in_each_way(tmp_path):
    values = {
        "daemon.log_level": "debug", "daemon.log_format": "json", "l1.segment_mode": "0640",
        "s3.addressing": "path", "s3.endpoint_url": "http://127.0.0.1:9000",
        "hf.endpoint": "https://hub.example", "http.listen": "[::1]:80",
        "access.socket_mode": "0600", "policy.time_zone": "Europe/Berlin", "policy.predict": "on",
        "artifacts.destination": "s3://b/artifacts", "telemetry.otlp_endpoint": "http://127.0.0.1:4317",
        "fleet.label_prefix": "models.example.com", "limits.message_size": "2MiB",
        "tcp.listen": "[::]:9471",
    }  # fmt: skip
    kinds = {
        "true or false": True, "whole number": 7, "number": 7.5, "list of whole numbers": (3, 4), "text": "1GiB",
        "list of texts": ("/a/path", "/another"),
    }  # fmt: skip
    for setting in describe_settings():
        is_path = setting.key.endswith(
            (".socket", "_dir", ".catalog", ".path", "_bundle", "_file", ".cert", ".key", "_ca")
        )
        value = values.get(setting.key, "/a/path" if is_path else kinds[setting.type])
        section, name = setting.key.split(".")
        in_file = load(f"[{section}]\n{name} = {toml_text(value)}\n", folder=tmp_path)
        in_env = load(env=HOME | {setting.variable: plain_text(value)})
        in_flag = load(overrides={setting.key: plain_text(value)})
        for loaded in (in_file, in_env, in_flag):
            assert getattr(getattr(loaded.config, section), name) == value, setting.key
            assert loaded.origin[setting.key] != "default"


def test_a_hubs_token_is_for_the_hub_of_the_environment_unless_a_file_is_named(tmp_path):
    named, own = tmp_path / "named", tmp_path / "hf" / "token"
    own.parent.mkdir()
    named.write_text("hf_named\n")
    own.write_text("hf_own")
    env = {"HF_HOME": str(tmp_path / "hf"), "HOME": "/nowhere"}
    assert hub_token("https://huggingface.co", "", env) == "hf_own"
    assert hub_token("https://huggingface.co", "", env | {"HF_TOKEN": " hf_env "}) == "hf_env"
    assert hub_token("https://huggingface.co", "", env | {"HF_TOKEN_PATH": str(named)}) == "hf_named"
    assert hub_token("https://huggingface.co", "", {"HOME": "/nowhere"}) == ""
    for other in (env, env | {"HF_TOKEN": "hf_env"}):
        assert hub_token("https://hub.example", "", other) == ""
        assert hub_token("https://hub.example/", "", other | {"HF_ENDPOINT": "https://hub.example"}) != ""
        assert hub_token("https://hub.example", str(named), other) == "hf_named"
    for text in ("", "two words", "\xfc"):
        named.write_text(text)
        with pytest.raises(ConfigError, match="named"):
            hub_token("https://hub.example", str(named), env)


def test_l2_is_one_folder_or_several(tmp_path):
    several = load('[l2]\npaths = ["/a/l2", "/b/l2"]\n', folder=tmp_path).config.l2
    assert (several.path, several.folders) == ("", ("/a/l2", "/b/l2"))
    assert load(overrides={"l2.path": "/a"}).config.l2.folders == ("/a",)
    assert load(env=HOME | {"CACHED_L2_PATHS": "~/x, y"}).config.l2.folders == (
        os.path.expanduser("~/x"),
        os.path.abspath("y"),
    )
    for wrong in ('paths = ["/a", "b"]', 'paths = ["/a", "/a/"]', "paths = [1]", 'path = "/a"\npaths = ["/b"]'):
        with pytest.raises(ConfigError) as caught:
            load(f"[l2]\n{wrong}\n", folder=tmp_path)
        assert caught.value.fields["key"] == "l2.paths"


def test_problems_of_the_file_are_told_together_with_line_value_and_what_is_right(tmp_path):
    text = '[l1]\ncapasity = "1GiB"\ncapacity = "lots"\n\n[transfer]\nmovers = "4"\nmax_attempts = 0\n[lll]\n'
    with pytest.raises(ConfigError) as caught:
        load(text, folder=tmp_path)
    message, file = caught.value.message, tmp_path / "config.toml"
    assert f"{file}:2: l1.capasity: there is no such setting (did you mean 'l1.capacity'?)" in message
    assert f"{file}:3: l1.capacity = 'lots': cannot be used (write a size such as '64GiB', or a share" in message
    assert f"{file}:6: transfer.movers = '4': cannot be used (write whole number, such as 0)" in message
    assert f"{file}:7: transfer.max_attempts = 0: cannot be used (write a number from 1 to 100)" in message
    assert f"{file}:8: lll: there is no such setting" in message
    assert caught.value.fields["key"] == "l1.capasity"
    assert caught.value.fields["file"] == str(file)


def test_one_problem_gives_its_remedy_as_the_hint():
    with pytest.raises(ConfigError, match=r"flag --http-listen: http\.listen = 'here'") as caught:
        load(overrides={"http.listen": "here"})
    assert "127.0.0.1:9470" in caught.value.hint
    assert caught.value.fields["value"] == "'here'"


def test_unknown_variables_are_errors_but_not_those_of_kubernetes():
    with pytest.raises(ConfigError) as caught:
        load(env=HOME | {"CACHED_L1_CAPACTY": "1GiB"})
    assert "CACHED_L1_CAPACITY" in caught.value.hint
    ours = {"CACHED_SERVICE_HOST": "10.0.0.1", "CACHED_PORT_9470_TCP": "tcp://10.0.0.1:9470", "CACHED_PORT": "tcp://x"}
    load(env=HOME | ours | {"CACHED_MODEL_PATH": "/x", "OTHER": "1"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("l1.capacity", "0%"), ("l1.capacity", "101%"), ("l1.require_huge_pages", "Auto"), ("l1.segment_mode", "0888"),
        ("l1.segment_mode", "0044"), ("daemon.socket", "/" + "x" * 100), ("daemon.socket", "/a,b.sock"),
        ("http.listen", "127.0.0.1:70000"),
        ("access.uids", "1,-2"), ("access.uids", "root"), ("daemon.reflection", "maybe"), ("transfer.movers", "1.5"),
        ("transfer.nice", "20"), ("s3.endpoint_url", "minio:9000"), ("daemon.drain_timeout_s", "nan"),
        ("daemon.drain_timeout_s", "inf"), ("daemon.log_level", "verbose"), ("l1.nothing", "1"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(key, value):
    with pytest.raises(ConfigError, match=re.escape(key)):
        load(overrides={key: value})


def test_relative_paths_are_for_flags_and_not_for_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(overrides={"daemon.catalog": "c.json"}).config.daemon.catalog == f"{tmp_path}/c.json"
    with pytest.raises(ConfigError, match=r"daemon\.catalog = 'c.json'"):
        load('[daemon]\ncatalog = "c.json"\n', folder=tmp_path)


@pytest.mark.parametrize("text", ["[l1\n", "l1 = 3\n", b"\xff"])
def test_a_file_that_is_no_configuration_is_named(tmp_path, text):
    file = tmp_path / "c.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=re.escape(str(file))):
        load_config(file, {}, {}, NOBODY)


def test_the_file_is_that_of_the_caller_then_the_variable_then_the_systems(tmp_path):
    files = {}
    for name in ("flag", "variable", "system"):
        files[name] = tmp_path / f"{name}.toml"
        files[name].write_text(f'[l1]\nsegment_group = "{name}"\n')
    place = Place(1234, run_dir_writable=False, config_file=str(files["system"]))
    env = HOME | {"CACHED_CONFIG": str(files["variable"])}
    assert load_config(files["flag"], env, {}, place).config.l1.segment_group == "flag"
    assert load_config(None, env, {}, place).config.l1.segment_group == "variable"
    assert load_config(None, HOME, {}, place).config.l1.segment_group == "system"
    with pytest.raises(ConfigError, match=r"cannot read .*missing"):
        load_config(tmp_path / "missing.toml", HOME, {}, place)


def test_places_depend_on_who_runs_the_daemon():
    system = load(place=SYSTEM).config
    assert (system.daemon.socket, system.daemon.state_dir) == ("/run/cached/cached.sock", "/var/lib/cached")
    assert (system.daemon.models_dir, system.l2.path) == ("/run/cached/models", "/var/lib/cached/l2")
    user = load(env=HOME | {"XDG_RUNTIME_DIR": "/run/user/1234"}).config
    assert user.daemon.socket == "/run/user/1234/cached/cached.sock"
    assert user.daemon.state_dir == "/home/someone/.local/state/cached"
    assert load(env=HOME | {"XDG_STATE_HOME": "/s"}).config.l2.path == "/s/cached/l2"
    assert default_socket({}, NOBODY) == "/tmp/cached-1234/cached.sock"
    moved = load(overrides={"daemon.socket": "/x/y.sock", "daemon.state_dir": "/z"}).config
    assert (moved.daemon.models_dir, moved.l2.path) == ("/x/models", "/z/l2")


def test_the_short_name_of_the_socket_is_the_same_setting():
    loaded = load(env=HOME | {"CACHED_SOCKET": "/x/y.sock"})
    assert loaded.config.daemon.socket == "/x/y.sock"
    assert loaded.origin["daemon.socket"] == "environment CACHED_SOCKET"


@pytest.mark.parametrize(
    "text", ["unix:///run/x.sock", "unix:/run/x.sock", "unix:x.sock", "x.sock", "unix:///a%20b.sock", "unix:////x"]
)
def test_the_socket_is_where_clients_look(text):
    where = str(socket_path(text))
    for variable in ("CACHED_SOCKET", "CACHED_DAEMON_SOCKET"):
        assert load(env=HOME | {variable: text}).config.daemon.socket == where
    assert load(overrides={"daemon.socket": text}).config.daemon.socket == where


def test_the_socket_is_no_other_uri():
    with pytest.raises(ConfigError, match="http://h/x") as error:
        load(env=HOME | {"CACHED_SOCKET": "http://h/x"})
    assert "unix:///path" in error.value.hint


def test_capacities():
    assert resolve_capacity("50%", 64 * GIB) == 32 * GIB
    assert resolve_capacity(" 12.5 % ", 800) == 100
    assert resolve_capacity("64GiB", 1) == 64 * GIB
    for text in ("0%", "100.1%", "-1%", "%", "half"):
        with pytest.raises(ValueError, match="not a s"):
            resolve_capacity(text, 100)


def test_origin_options_hold_what_is_set():
    options = origin_options(load(overrides={"s3.anonymous": "yes", "s3.region": "eu-1"}).config.s3)
    assert options["anonymous"] == "true"
    assert options["region"] == "eu-1"
    assert options["connect_timeout_s"] == "5.0"
    assert not {"endpoint_url", "profile", "ca_bundle"} & set(options)


def test_the_example_has_every_setting_at_its_default():
    text = (ROOT / "systemd/config.toml").read_text()
    assert text == example_toml(), "write it again: cached config example > systemd/config.toml"
    active = tomllib.loads(re.sub(r"(?m)^#(?=\w+ = )", "", text))
    for setting in describe_settings():
        section, name = setting.key.split(".")
        value = active[section][name]
        default = getattr(getattr(Config(), section), name)
        assert (tuple(value) if isinstance(value, list) else value) == default
    assert not [key for section in tomllib.loads(text).values() for key in section], "a setting is not commented out"


def test_the_example_with_every_line_active_is_accepted(tmp_path):
    text = re.sub(r"(?m)^#(?=\w+ = )", "", example_toml())
    assert load(text, folder=tmp_path).config == load().config
