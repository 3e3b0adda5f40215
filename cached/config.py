"""The daemon's configuration: the only reader of the configuration file and of the environment.

Order: defaults < file < ``CACHED_SECTION_KEY`` environment < flags. Whatever is unknown or wrong is a ConfigError that
names the key, the value and what would be right; all problems are reported together.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from cached.errors import ConfigError
from cached.problems import Problem, nearest, report_problems, shown
from cached.setting_checks import PATH_CHECKS, resolve_capacity
from cached.settings import (
    TYPE_WORDS,
    AccessConfig,
    ArtifactsConfig,
    CatalogConfig,
    Config,
    DaemonConfig,
    FleetConfig,
    HttpConfig,
    HubConfig,
    L1Config,
    L2Config,
    LimitsConfig,
    S3Config,
    ScrubConfig,
    Setting,
    TcpConfig,
    TelemetryConfig,
    TransferConfig,
    describe_settings,
    origin_defaults,
    origin_options,
    sections,
    setting_type,
)

__all__ = [
    "AccessConfig",
    "ArtifactsConfig",
    "CatalogConfig",
    "Config",
    "DaemonConfig",
    "FleetConfig",
    "HttpConfig",
    "HubConfig",
    "L1Config",
    "L2Config",
    "LimitsConfig",
    "LoadedConfig",
    "Place",
    "S3Config",
    "ScrubConfig",
    "Setting",
    "TcpConfig",
    "TelemetryConfig",
    "TransferConfig",
    "default_socket",
    "describe_settings",
    "example_toml",
    "flag_name",
    "hub_endpoint",
    "hub_token",
    "load_config",
    "origin_defaults",
    "origin_options",
    "process_environment",
    "proxy_of",
    "read_token",
    "resolve_capacity",
    "wants_telemetry",
]

PUBLIC_HUB = "https://huggingface.co"
SYSTEM_RUN_DIR = "/run/cached"
SYSTEM_STATE_DIR = "/var/lib/cached"
SYSTEM_CONFIG_FILE = "/etc/cached/config.toml"

_MAX_TOKEN_BYTES = 64 * 1024
_NOT_SETTINGS = re.compile(r"CACHED_(ADDRESS|CONFIG|MODEL_PATH|TLS_(CA|CERT|KEY)|SERVICE_.*|PORT|PORT_.*)")
"""Variables of ours that are no settings, and those that Kubernetes sets in every pod beside a Service named cached."""
_LISTS: dict[Any, type] = {tuple[int, ...]: int, tuple[str, ...]: str}
_SOCKET = "daemon.socket"
_SHORT_NAMES = {"CACHED_SOCKET": _SOCKET}
_ENTRY = re.compile(r"""\s*["']?([\w-]+)["']?\s*=""")
_SECTION = re.compile(r"\s*\[\s*([\w-]+)\s*\]")
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """``origin``: for each ``section.key``, where its value is from; ``file``: the file that was read, or empty."""

    config: Config
    origin: Mapping[str, str]
    file: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """What of the host the defaults depend on. ``here()`` looks; tests make their own."""

    uid: int
    run_dir_writable: bool
    config_file: str = SYSTEM_CONFIG_FILE

    @classmethod
    def here(cls) -> Place:
        """This process on this host."""
        return cls(uid=os.geteuid(), run_dir_writable=os.access(SYSTEM_RUN_DIR, os.W_OK | os.X_OK))


def example_toml() -> str:
    """A configuration file with every setting commented out at its default."""
    lines = [
        "# Settings of cached. Each line that is commented out shows its default.",
        "# Order: defaults < this file < CACHED_SECTION_KEY environment < flags; see `cached config show`.",
    ]
    section = ""
    for setting in describe_settings():
        head, key = setting.key.split(".")
        if head != section:
            section = head
            lines += ["", f"# {sections()[head].__doc__}", f"[{head}]"]
        lines += ["", f"# {setting.doc}", f"#{key} = {setting.default}"]
    return "\n".join(lines) + "\n"


def default_socket(env: Mapping[str, str], place: Place | None = None) -> str:
    """Where a daemon of this user listens, and so where its clients look, unless told otherwise."""
    place = place or Place.here()
    if place.uid == 0 or place.run_dir_writable:
        return f"{SYSTEM_RUN_DIR}/cached.sock"
    if env.get("XDG_RUNTIME_DIR"):
        return f"{env['XDG_RUNTIME_DIR']}/cached/cached.sock"
    return f"/tmp/cached-{place.uid}/cached.sock"  # noqa: S108 the daemon makes this folder 0700 and checks its owner


def process_environment() -> dict[str, str]:
    """A copy of this process's environment: everything else asks here."""
    return dict(os.environ)


def take_environment(variables: Mapping[str, str]) -> None:
    """Adds variables to this process's environment, for libraries that read it by themselves (botocore, say)."""
    os.environ.update(variables)


def proxy_of(url: str) -> str:
    """The proxy that the environment (``HTTPS_PROXY``, ``NO_PROXY``, …) names for this URL, or empty."""
    import urllib.request  # with the HTTP client behind it: a tenth of what a command takes to start

    parts = urlsplit(url)
    if urllib.request.proxy_bypass_environment(parts.netloc.rpartition("@")[2]):  # type: ignore[attr-defined]
        return ""
    return urllib.request.getproxies_environment().get(parts.scheme, "")


def hub_endpoint(env: Mapping[str, str]) -> str:
    """Where ``hf://`` is, unless the settings or the catalog say otherwise: ``HF_ENDPOINT``, else the public hub."""
    return (env.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/")


def wants_telemetry(section: TelemetryConfig, env: Mapping[str, str]) -> bool:
    """Whether spans are to be sent: by the settings, or by the variables of OpenTelemetry itself."""
    if section.otlp_endpoint:
        return True
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true" or env.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return bool(env.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or env.get("OTEL_EXPORTER_OTLP_ENDPOINT"))


def hub_token(endpoint: str, token_file: str, env: Mapping[str, str]) -> str:
    """The token to show to a hub; empty: none. Never logged, never an option of an origin.

    From ``token_file``, else where Hugging Face's own tools have it: ``HF_TOKEN``, else the file that ``HF_TOKEN_PATH``
    names, else ``token`` in ``HF_HOME`` or in ~/.cache/huggingface. Those are for ``hub_endpoint`` alone: another
    endpoint gets a token only from ``token_file``. Raises ConfigError if ``token_file`` cannot be read.
    """
    if token_file:
        return read_token(token_file)
    if endpoint.rstrip("/") != hub_endpoint(env):
        return ""
    if token := (env.get("HF_TOKEN") or env.get("HUGGING_FACE_HUB_TOKEN") or "").strip():
        return token
    home = env.get("HF_HOME") or os.path.join(
        env.get("XDG_CACHE_HOME") or os.path.join(env.get("HOME") or "/", ".cache"), "huggingface"
    )
    file = env.get("HF_TOKEN_PATH") or os.path.join(home, "token")
    try:
        return read_token(file)
    except ConfigError:
        if env.get("HF_TOKEN_PATH"):
            raise
        return ""


def read_token(file: str) -> str:
    """The token that a file holds. Raises ConfigError if there is none."""
    hint = "write the token, and nothing else, into a file that the daemon's user may read"
    try:
        with open(file, encoding="ascii") as opened:
            token = opened.read(_MAX_TOKEN_BYTES).strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", "") or "it is not ASCII"
        raise ConfigError(
            f"cannot read the token in {file}: {why}", hint=hint, file=file, key="token_file", value=file
        ) from None
    if not token or any(char <= " " or char > "~" for char in token):
        raise ConfigError(f"{file} holds no token", hint=hint, file=file, key="token_file", value=file)
    return token


def flag_name(key: str) -> str:
    """``l1.capacity`` → ``--l1-capacity``; settings of the daemon itself have no prefix."""
    return "--" + key.removeprefix("daemon.").replace(".", "-").replace("_", "-")


def load_config(
    path: Path | None,
    env: Mapping[str, str],
    overrides: Mapping[str, str],
    place: Place | None = None,
    flag_of: Callable[[str], str] = flag_name,
) -> LoadedConfig:
    """Reads and checks all settings. Raises ConfigError naming every problem.

    ``overrides``: ``section.key`` → text, from flags, which the command calls ``flag_of(section.key)``. Without
    ``path``, ``CACHED_CONFIG`` or else the system's file if it is there.
    """
    place = place or Place.here()
    found = _Found()
    file = _config_file(path, env, place)
    if file:
        _read_file(file, found)
    _read_environment(env, found)
    for key, text in overrides.items():
        found.text(key, text, f"flag {flag_of(key)}")
    found.require_one_of("l2.path", "l2.paths")
    report_problems(found.problems, file=file)
    config = _with_places(_build(found.values), env, place)
    origin = {item.key: found.origin.get(item.key, "default") for item in describe_settings()}
    return LoadedConfig(config=config, origin=origin, file=file)


class _Found:
    """Values as they are found, later ones over earlier ones, and every problem on the way."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origin: dict[str, str] = {}
        self.problems: list[Problem] = []
        self._known = {item.key: item for item in describe_settings()}

    def typed(self, key: str, value: object, where: str, source: str) -> None:
        """A value of the file."""
        if not self._is_known(key, where):
            return
        kind = setting_type(*key.split("."))
        if kind is float and type(value) is int:
            with suppress(OverflowError):  # then it is beyond every bound, too
                value = float(value)
        elif isinstance(value, list) and kind in _LISTS and all(type(item) is _LISTS[kind] for item in value):
            value = tuple(value)
        elif type(value) is not kind:
            self._refuse(key, value, where, f"write {TYPE_WORDS[kind]}, such as {self._known[key].default}")
            return
        self._take(key, value, where, source)

    def text(self, key: str, text: str, where: str) -> None:
        """A value of a variable or flag. A relative path is relative to the current folder."""
        if not self._is_known(key, where):
            return
        kind = setting_type(*key.split("."))
        if key == _SOCKET:
            text = _socket_path(text)
            if "://" in text:
                self._refuse(key, text, where, "write a path, or unix:///path")
                return
        try:
            value = _from_text(text, kind)
        except ValueError:
            self._refuse(key, text, where, f"write {TYPE_WORDS[kind]}, such as {self._known[key].default}")
            return
        if text and _metadata(key)["check"] in PATH_CHECKS:
            value = tuple(map(_absolute, value)) if isinstance(value, tuple) else _absolute(value)
        self._take(key, value, where, where)

    def unknown(self, where: str, name: str, known: Sequence[str]) -> None:
        """Something that is no setting. Its value is not told: it may be a secret in what was taken for its place."""
        self.problems.append(Problem(where, name, "", "there is no such setting", nearest(name, known)))

    def require_one_of(self, first: str, second: str) -> None:
        """Two settings that say the same thing in different ways."""
        if self.values.get(first) and self.values.get(second):
            self._refuse(second, self.values[second], self.origin[second], f"one of {first} and {second}, not both")

    def _is_known(self, key: str, where: str) -> bool:
        if key in self._known:
            return True
        self.unknown(where, key, tuple(self._known))
        return False

    def _take(self, key: str, value: object, where: str, source: str) -> None:
        if any("\0" in text for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str)):
            self._refuse(key, value, where, "write it without NUL")
            return
        if right := _metadata(key)["check"](value):
            self._refuse(key, value, where, f"write {right}")
            return
        self.values[key] = value
        self.origin[key] = source

    def _refuse(self, key: str, value: object, where: str, right: str) -> None:
        self.problems.append(Problem(where, key, shown(value), "cannot be used", right))


def _metadata(key: str) -> Mapping[str, Any]:
    section, name = key.split(".")
    return next(item.metadata for item in dataclasses.fields(sections()[section]) if item.name == name)


def _from_text(text: str, kind: Any) -> Any:
    if kind is bool:
        if text.strip().lower() not in _BOOLEANS:
            raise ValueError(text)
        return _BOOLEANS[text.strip().lower()]
    if kind == tuple[int, ...]:
        return tuple(int(part) for part in text.replace(",", " ").split())
    if kind == tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return kind(text)


def _socket_path(text: str) -> str:
    """The path in ``unix:///path``, ``unix:path`` or a plain path, as clients read it: they share the variable."""
    if not text.startswith("unix:"):
        return text
    path = unquote(text.removeprefix("unix:"))
    return path.removeprefix("//") if path.startswith("///") else path


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _config_file(path: Path | None, env: Mapping[str, str], place: Place) -> str:
    if path is not None:
        return str(path)
    return env.get("CACHED_CONFIG") or (place.config_file if os.path.exists(place.config_file) else "")


def _read_file(file: str, found: _Found) -> None:
    try:
        text = Path(file).read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except OSError as error:
        hint = "give the right path with --config or CACHED_CONFIG, and let the daemon's user read it"
        raise ConfigError(f"cannot read {file}: {error.strerror}", hint=hint, file=file, key="", value="") from error
    except (ValueError, OverflowError, RecursionError) as error:  # also numbers of thousands of digits
        hint = 'write TOML, such as:  [l1]  capacity = "64GiB"'
        raise ConfigError(f"{file} is not TOML: {error}", hint=hint, file=file, key="", value="") from error
    lines = _lines_of(text)
    for section, entries in data.items():
        where = f"{file}:{lines[section]}" if section in lines else file
        if section not in sections():
            found.unknown(where, section, tuple(sections()))
        elif not isinstance(entries, dict):
            found.problems.append(Problem(where, section, shown(entries), "is a section", f"write [{section}]"))
        else:
            for name, value in entries.items():
                key = f"{section}.{name}"
                line = f"{file}:{lines[key]}" if key in lines else file
                found.typed(key, value, line, f"file {line}")


def _lines_of(text: str) -> dict[str, int]:
    """``section`` and ``section.key`` → line number; what is written in rarer ways is simply not in it."""
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if match := _SECTION.match(line):
            section = match[1]
            lines.setdefault(section, number)
        elif match := _ENTRY.match(line):
            lines.setdefault(f"{section}.{match[1]}" if section else match[1], number)
    return lines


def _read_environment(env: Mapping[str, str], found: _Found) -> None:
    variables = {item.variable: item.key for item in describe_settings()}
    for name in sorted(env):
        if not name.startswith("CACHED_") or _NOT_SETTINGS.fullmatch(name):
            continue
        key = _SHORT_NAMES.get(name) or variables.get(name)
        if key is None:
            found.unknown(f"environment {name}", name, [*variables, *_SHORT_NAMES])
        else:
            found.text(key, env[name], f"environment {name}")


def _build(values: Mapping[str, Any]) -> Config:
    made = {
        section: kind(**{key.split(".")[1]: value for key, value in values.items() if key.startswith(f"{section}.")})
        for section, kind in sections().items()
    }
    return Config(**made)


def _with_places(config: Config, env: Mapping[str, str], place: Place) -> Config:
    """Fills in the paths whose defaults depend on the host."""
    daemon = config.daemon
    socket = daemon.socket or default_socket(env, place)
    state_dir = daemon.state_dir or _default_state_dir(env, place)
    models_dir = daemon.models_dir or os.path.join(os.path.dirname(socket), "models")
    default_l2 = os.path.join(state_dir, "l2")
    return dataclasses.replace(
        config,
        daemon=dataclasses.replace(daemon, socket=socket, state_dir=state_dir, models_dir=models_dir),
        l2=config.l2 if config.l2.paths else dataclasses.replace(config.l2, path=config.l2.path or default_l2),
    )


def _default_state_dir(env: Mapping[str, str], place: Place) -> str:
    if env.get("STATE_DIRECTORY"):
        return env["STATE_DIRECTORY"].split(":")[0]  # from systemd's StateDirectory=
    if place.uid == 0:
        return SYSTEM_STATE_DIR
    home = env.get("HOME") or f"/tmp/cached-{place.uid}"  # noqa: S108 the daemon makes it 0700 and checks its owner
    return os.path.join(env.get("XDG_STATE_HOME") or os.path.join(home, ".local/state"), "cached")
