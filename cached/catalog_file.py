"""The catalog: which models this host shall know, from where, and how soon they are wanted.

JSON or TOML, by the file's suffix. All problems are collected and reported together, each with its key's path, its
value and what would be right.
"""

from __future__ import annotations

import contextlib
import grp
import json
import pwd
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from cached.access import AccessList
from cached.errors import ConfigError, InvalidRequestError, encodable
from cached.level import Level
from cached.problems import Problem, nearest, report_problems, shown
from cached.refs import artifact_digest, check_digest, check_name, check_path
from cached.schedule import WindowError, parse_window
from cached.setting_checks import resolve_capacity
from cached.types import Tier
from cached.units import MAX_SIZE_BYTES, parse_size
from cached.urls import check_url, local_path

FORMATS: Final = ("auto", "safetensors", "gguf", "all")
ORIGIN_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "az": ("account", "endpoint", "anonymous", "ca_bundle"),
    "file": (),
    "gs": ("credentials_file", "endpoint", "anonymous", "ca_bundle"),
    "hf": ("endpoint", "token_file", "ca_bundle"),
    "http": ("files", "list", "token_file", "ca_bundle"),
    "https": ("files", "list", "token_file", "ca_bundle"),
    "s3": ("endpoint_url", "region", "profile", "anonymous", "addressing", "ca_bundle"),
}
"""Of each scheme of sources, what its origin table may hold."""
SCHEMES: Final = tuple(ORIGIN_KEYS)
"""Of sources. A test compares both with what the origins support."""

_CHECKED: Final[Mapping[str, Callable[[str], str]]] = {
    "file": local_path, "http": partial(check_url, "source"), "https": partial(check_url, "source"),
}  # fmt: skip
"""Of schemes whose sources are URLs: raises InvalidRequestError as the origin does, without the text of a URL."""
_MAX_BYTES: Final = 16 * 1024 * 1024
_MAX_PRIORITY: Final = 1000
_NO_ID: Final = 2**32 - 1
_MAX_LINKS: Final = 8
_KEY_CHARS: Final = 300
_IN_LINK: Final = 'options of a link stand in it: {"source": "s3://BUCKET/PREFIX", "origin": {"endpoint_url": "…"}}'
_LEVELS: Final = (Level.L1, Level.L2)
_ALL_KEYS: Final = tuple(sorted({key for keys in ORIGIN_KEYS.values() for key in keys}))
_HINT: Final = "correct the file, and check it with: cached catalog validate FILE"


@dataclass(frozen=True, slots=True)
class CatalogLink:
    """A nearer place of a model's objects, with its options, that is asked for bytes before the model's source."""

    source: str
    origin: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """What the catalog says of one model. Of all values but ``name`` and ``source``, empty or None means: nothing said.

    ``hot``: weekly windows such as ``mon-fri 08:00-20:00 Europe/Berlin``, which ``schedule.parse_window`` reads.
    ``sha256``: path within the model → digest. ``origin``: options of its origin, by name, as text. A model of higher
    ``priority`` is evicted later within its tier, and confirmed earlier after a restart. ``base``: the model that it is
    an adapter of, which the catalog need not know. ``tenant``: one of the catalog's. ``front``: of a chain
    (``origins``) all links but the last, which is ``source`` with ``origin``. ``access``: who may know of it; None: its
    tenant's list counts.
    """

    name: str
    source: str
    tier: Tier | None = None
    format: str = ""
    size_bytes: int | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    hot: tuple[str, ...] = ()
    priority: int = 0
    pinned: bool = False
    origin: Mapping[str, str] = field(default_factory=dict)
    base: str = ""
    tenant: str = ""
    front: tuple[CatalogLink, ...] = ()
    access: AccessList | None = None


@dataclass(frozen=True, slots=True)
class Catalog:
    """All models and tenants of the catalog, by name, in the file's order.

    A tenant is a group of models that have a quota together: at each level that it has one for a size, or a share of
    the level, as text. ``access``: of tenants that have one, the list for those of their models that have none.
    """

    models: Mapping[str, CatalogModel] = field(default_factory=dict)
    tenants: Mapping[str, Mapping[Level, str]] = field(default_factory=dict)
    access: Mapping[str, AccessList] = field(default_factory=dict)


def load_catalog(path: Path, check: Callable[[bytes], object] = lambda _data: None) -> Catalog:
    """Reads a catalog file; blocks. Raises ConfigError naming every problem.

    ``check`` sees the file's bytes before anything is made of them, and raises what is to be raised.
    """
    kind = {".json": "json", ".toml": "toml"}.get(path.suffix.lower())
    if kind is None:
        raise _unusable(f"{path}: a catalog's name ends with .json or .toml", str(path), "rename the file")
    data = _read(path)
    check(data)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _unusable(f"{path} is not UTF-8: {error}", str(path), "save it as UTF-8") from error
    return parse_catalog(text, kind, str(path))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        hint = "give the right path, and let the daemon's user read it"
        raise _unusable(f"cannot read the catalog {path}: {error.strerror}", str(path), hint) from error
    if len(data) > _MAX_BYTES:
        raise _unusable(f"{path} is larger than 16 MiB", str(path), "give the path of a catalog")
    return data


def parse_catalog(text: str, kind: str, where: str) -> Catalog:
    """A catalog from its text. ``kind``: ``json`` or ``toml``; ``where`` names it in errors. Raises ConfigError."""
    try:
        data: Any = json.loads(text, object_pairs_hook=_Pairs) if kind == "json" else tomllib.loads(text)
    except (ValueError, OverflowError, RecursionError) as error:  # also numbers of thousands of digits
        hint = 'write, for instance: {"models": {"NAME": {"source": "s3://BUCKET/PREFIX", "tier": "warm"}}}'
        raise _unusable(f"{where} is not {kind.upper()}: {error}", where, hint) from error
    reader = _Reader(where)
    catalog = reader.catalog(data)
    report_problems(reader.problems, file=where, hint=_HINT)
    return catalog


class _Pairs(dict[str, Any]):
    """A JSON object that remembers which keys it had twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.doubled = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]


class _Reader:
    """Reads the parsed text and collects what is wrong. A value that is wrong is read as if nothing had been said."""

    def __init__(self, where: str) -> None:
        self.problems: list[Problem] = []
        self._where = where

    def catalog(self, data: Any) -> Catalog:
        self._texts_within(data)
        if self.problems:
            return Catalog()
        top = self._table("(top level)", data)
        self._known_keys("", top, ("models", "tenants"))
        if "models" not in top:
            self._refuse("models", None, "is missing", 'write {"models": {…}}; it may be empty')
        models: dict[str, CatalogModel] = {}
        for name, entry in self._table("models", top.get("models", {})).items():
            key = f"models.{name}"
            if self._checked(key, name, check_name) is not None and (model := self._model(key, name, entry)):
                models[name] = model
        tenants, access = self._tenants(top.get("tenants", {}))
        for model in models.values():
            self._relations(model, models, tenants)
        return Catalog(MappingProxyType(models), MappingProxyType(tenants), MappingProxyType(access))

    def _texts_within(self, data: Any) -> None:
        """Refuses keys and values that nothing could take: with a NUL, or half of a surrogate pair, which JSON has."""
        waiting = [("", data)]
        while waiting:
            key, value = waiting.pop()
            if isinstance(value, dict):
                waiting += [(f"{key}.{name}".lstrip(".")[:_KEY_CHARS], item) for name, item in value.items()]
                for name in filter(_is_no_text, value):
                    self._refuse(f"{key}.{name}".lstrip("."), None, "holds what is no character", "correct the key")
            elif isinstance(value, list):
                waiting += [(f"{key}[{index}]"[:_KEY_CHARS], item) for index, item in enumerate(value)]
            elif isinstance(value, str) and _is_no_text(value):
                self._refuse(key, value, "holds what is no character", "correct it: a NUL, or half a surrogate pair")

    def _tenants(self, value: Any) -> tuple[dict[str, Mapping[Level, str]], dict[str, AccessList]]:
        tenants: dict[str, Mapping[Level, str]] = {}
        access: dict[str, AccessList] = {}
        for name, entry in self._table("tenants", value).items():
            key = f"tenants.{name}"
            table = self._table(key, entry)
            self._known_keys(key, table, ("access", *(level.value for level in _LEVELS)))
            if self._checked(key, name, check_name) is not None:
                bounds = {level: self._bound(f"{key}.{level}", table.get(level.value)) for level in _LEVELS}
                tenants[name] = MappingProxyType({level: bound for level, bound in bounds.items() if bound})
                if (found := self._access(f"{key}.access", table.get("access"))) is not None:
                    access[name] = found
        return tenants, access

    def _access(self, key: str, value: Any) -> AccessList | None:
        """Users and groups, by number or by the name that this host knows; an empty list lets in operators alone."""
        if value is None:
            return None
        table = self._table(key, value)
        self._known_keys(key, table, ("gids", "groups", "uids", "users"))
        uids = self._ids(f"{key}.uids", table.get("uids", []))
        gids = self._ids(f"{key}.gids", table.get("gids", []))
        for name in self._texts(f"{key}.users", table.get("users", []), "a user of this host, such as 'serving'"):
            with self._refused_if_unknown(f"{key}.users", name, "user", "uids"):
                uids.add(pwd.getpwnam(name).pw_uid)
        for name in self._texts(f"{key}.groups", table.get("groups", []), "a group of this host, such as 'team-a'"):
            with self._refused_if_unknown(f"{key}.groups", name, "group", "gids"):
                gids.add(grp.getgrnam(name).gr_gid)
        return AccessList(frozenset(uids), frozenset(gids))

    @contextlib.contextmanager
    def _refused_if_unknown(self, key: str, name: str, what: str, ids: str) -> Iterator[None]:
        try:
            yield
        except (KeyError, ValueError):  # ValueError: what no name can be
            self._refuse(key, name, f"this host has no such {what}", f"create it, or write its number under {ids}")

    def _ids(self, key: str, value: Any) -> set[int]:
        if not isinstance(value, list) or not all(type(item) is int and 0 <= item < _NO_ID for item in value):
            self._refuse(key, value, "is not a list of numeric ids", "write whole numbers, such as [1001, 1002]")
            return set()
        return set(value)

    def _bound(self, key: str, value: Any) -> str:
        """A size or a share, as text."""
        if value is None:
            return ""
        if type(value) is int and 0 < value <= MAX_SIZE_BYTES:
            return str(value)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                resolve_capacity(value, 1)
                return value
        self._refuse(key, value, "is neither a size nor a share", "write a size such as '100GB', or a share: '25%'")
        return ""

    def _relations(self, model: CatalogModel, models: Mapping[str, CatalogModel], tenants: Collection[str]) -> None:
        """What a model says of others."""
        key, base = f"models.{model.name}.base", models.get(model.base)
        if model.base == model.name:
            self._refuse(key, model.base, "is the model itself", "name the model that it is an adapter of")
        elif base is not None and base.base:
            right = f"write the model that both are adapters of: {base.base!r}"
            self._refuse(key, model.base, "is an adapter itself", right)
        if model.tenant and model.tenant not in tenants:
            right = nearest(model.tenant, tuple(tenants)) if tenants else 'add it: {"tenants": {"NAME": {"l1": "25%"}}}'
            self._refuse(f"models.{model.name}.tenant", model.tenant, "there is no such tenant", right)

    def _model(self, key: str, name: str, entry: Any) -> CatalogModel | None:
        known = tuple(CatalogModel.__dataclass_fields__)
        keys = {"size_bytes": "size", "front": "origins"}
        readers = {keys.get(item, item) for item in known if item != "name"}
        table = self._table(key, entry)
        if not isinstance(entry, dict):
            return None
        self._known_keys(key, table, tuple(sorted(readers)))
        if artifact_digest(name):
            self._refuse(key, name, "is the name of a compile artifact", "call the model something else")
        *front, last = self._links(key, table)
        return CatalogModel(
            name=name,
            source=last.source,
            front=tuple(front),
            tier=self._tier(f"{key}.tier", table.get("tier")),
            format=self._word(f"{key}.format", table.get("format"), FORMATS),
            size_bytes=self._size(f"{key}.size", table.get("size")),
            sha256=self._digests(f"{key}.sha256", table.get("sha256", {})),
            include=self._texts(f"{key}.include", table.get("include", []), "a pattern such as '*.safetensors'"),
            exclude=self._texts(f"{key}.exclude", table.get("exclude", []), "a pattern such as '*.bin'"),
            hot=self._windows(f"{key}.hot", table.get("hot", [])),
            priority=self._priority(f"{key}.priority", table.get("priority", 0)),
            pinned=self._truth(f"{key}.pinned", table.get("pinned", False)),
            origin=last.origin,
            base=self._name(f"{key}.base", table.get("base")),
            tenant=self._name(f"{key}.tenant", table.get("tenant")),
            access=self._access(f"{key}.access", table.get("access")),
        )

    def _links(self, key: str, table: Mapping[str, Any]) -> list[CatalogLink]:
        """Where a model comes from: of ``origins`` each link, of ``source`` the only one. At least one."""
        if "origins" not in table:
            if table.get("source") is None:
                self._refuse(
                    f"{key}.source", None, "is missing", "write the URI that the model comes from: s3://BUCKET/PREFIX"
                )
            return [self._link(key, table)]
        for name in ("source", "origin"):
            if name in table:
                right = "keep one of source and origins" if name == "source" else _IN_LINK
                self._refuse(f"{key}.{name}", None, "stands beside origins", right)
        value = table["origins"]
        if not isinstance(value, list) or not 1 <= len(value) <= _MAX_LINKS:
            right = f"write a list of 1 to {_MAX_LINKS} URIs, the nearest first, the authority last"
            self._refuse(f"{key}.origins", value, "is not a chain", right)
            return [CatalogLink("")]
        links = [self._entry(f"{key}.origins[{index}]", entry) for index, entry in enumerate(value)]
        places = [(link.source, tuple(sorted(link.origin.items()))) for link in links]
        if len(set(places)) < len(places):
            self._refuse(f"{key}.origins", None, "names a link twice", "keep the first of them")
        return links

    def _entry(self, key: str, entry: Any) -> CatalogLink:
        if isinstance(entry, str):
            return CatalogLink(self._source(key, entry))
        if not isinstance(entry, dict) or entry.get("source") is None:
            self._refuse(key, entry, "is no link", f"write a URI, or {_IN_LINK}")
            return CatalogLink("")
        table = self._table(key, entry)
        self._known_keys(key, table, ("origin", "source"))
        return self._link(key, table)

    def _link(self, key: str, table: Mapping[str, Any]) -> CatalogLink:
        source = self._source(f"{key}.source", table.get("source"))
        return CatalogLink(source, self._origin(f"{key}.origin", table.get("origin", {}), source))

    def _name(self, key: str, value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, str):
            return self._checked(key, value, check_name) or ""
        self._refuse(key, value, "is not text", "write a name in quotes")
        return ""

    def _source(self, key: str, value: Any) -> str:
        if value is None:
            return ""
        right = "write a URI such as 's3://BUCKET/PREFIX', 'hf://ORG/REPO' or 'file:///models/NAME'"
        if not isinstance(value, str):
            self._refuse(key, value, "is not text", right)
            return ""
        scheme, separator, rest = value.partition("://")
        if not separator or not rest.strip("/"):
            self._refuse(key, value, "is not a URI", right)
        elif scheme not in SCHEMES:
            schemes = [f"{item}://" for item in SCHEMES]
            self._refuse(key, value, f"no origin serves {scheme}://", nearest(f"{scheme}://", schemes))
        elif "@" in rest.split("/", 1)[0]:
            self._refuse(
                key, f"{scheme}://…", "holds credentials", "leave them to the environment, a profile or a file"
            )
        elif scheme in _CHECKED:
            return value if self._checked(key, value, _CHECKED[scheme]) else ""
        else:
            return value
        return ""

    def _tier(self, key: str, value: Any) -> Tier | None:
        word = self._word(key, value, tuple(item.value for item in Tier))
        return Tier(word) if word else None

    def _word(self, key: str, value: Any, words: tuple[str, ...]) -> str:
        if value is None or (isinstance(value, str) and value in words):
            return str(value or "")
        self._refuse(key, value, f"is none of {', '.join(words)}", nearest(shown(value, str), words))
        return ""

    def _size(self, key: str, value: Any) -> int | None:
        if value is None:
            return None
        if type(value) is int and 0 < value <= MAX_SIZE_BYTES:
            return value
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return parse_size(value)
        self._refuse(key, value, "is not a size", "write bytes, or a number and a unit such as '26GB' or '24GiB'")
        return None

    def _digests(self, key: str, value: Any) -> Mapping[str, str]:
        digests: dict[str, str] = {}
        for path, digest in self._table(key, value).items():
            known_path = self._checked(f"{key}.{path}", path, check_path)
            if not isinstance(digest, str):
                self._refuse(f"{key}.{path}", digest, "is not text", "write 64 lower-case hexadecimal digits")
            elif (good := self._checked(f"{key}.{path}", digest, check_digest)) and known_path:
                digests[path] = good
        return MappingProxyType(digests)

    def _windows(self, key: str, value: Any) -> tuple[str, ...]:
        windows = self._texts(key, value, "a window such as 'mon-fri 08:00-20:00 Europe/Berlin' or '22:00-06:00'")
        for index, window in enumerate(windows):
            try:
                parse_window(window)
            except WindowError as error:
                self._refuse(f"{key}[{index}]", window, error.wrong, error.right)
        return windows

    def _texts(self, key: str, value: Any, right: str) -> tuple[str, ...]:
        if not isinstance(value, list):
            self._refuse(key, value, "is not a list", f"write a list; each entry {right}")
            return ()
        for index, item in enumerate(value):
            if not isinstance(item, str) or not item:
                self._refuse(f"{key}[{index}]", item, "cannot be used", f"write {right}")
        return tuple(item for item in value if isinstance(item, str) and item)

    def _priority(self, key: str, value: Any) -> int:
        if type(value) is int and 0 <= value <= _MAX_PRIORITY:
            return value
        self._refuse(
            key, value, "is not a priority", f"write a whole number from 0 to {_MAX_PRIORITY}; higher is earlier"
        )
        return 0

    def _truth(self, key: str, value: Any) -> bool:
        if isinstance(value, bool):
            return value
        self._refuse(key, value, "is neither true nor false", "write true or false, without quotes")
        return False

    def _origin(self, key: str, value: Any, source: str) -> Mapping[str, str]:
        table = self._table(key, value)
        scheme = source.partition("://")[0]
        known = ORIGIN_KEYS.get(scheme, ())
        if table and source and not known:
            self._refuse(key, dict(table), f"{scheme}:// sources have no options", "remove it")
            return {}
        options: dict[str, str] = {}
        for name, item in table.items():
            if name not in known:
                self._refuse(f"{key}.{name}", None, "there is no such key", nearest(name, known or _ALL_KEYS))
            elif name == "anonymous":
                options[name] = "true" if self._truth(f"{key}.{name}", item) else "false"
            elif name == "addressing":
                options[name] = self._word(f"{key}.{name}", item, ("auto", "path", "virtual"))
            elif name == "files":
                options[name] = "\n".join(self._texts(f"{key}.{name}", item, "a path below the source"))
            elif not isinstance(item, str):
                self._refuse(f"{key}.{name}", item, "is not text", "write text in quotes")
            elif name == "endpoint" and item and self._checked(f"{key}.{name}", item, partial(check_url, name)) is None:
                continue
            else:
                options[name] = item
        return MappingProxyType(options)

    def _table(self, key: str, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            self._refuse(key, value, "is not a table of keys and values", "write {…} in JSON, [SECTION] in TOML")
            return {}
        for doubled in value.doubled if isinstance(value, _Pairs) else ():
            path = doubled if key.startswith("(") else f"{key}.{doubled}"
            self._refuse(path, None, "is there twice", "keep one of them")
        return value

    def _known_keys(self, key: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
        for name in table:
            if name not in known:
                self._refuse(f"{key}.{name}".lstrip("."), None, "there is no such key", nearest(name, known))

    def _checked(self, key: str, text: str, check: Callable[[str], str]) -> str | None:
        """The text if the check lets it pass; else its words become a problem."""
        try:
            return check(text)
        except InvalidRequestError as error:
            self._refuse(key, None, error.message, error.hint)
            return None

    def _refuse(self, key: str, value: Any, wrong: str, right: str) -> None:
        text = "" if value is None else shown(value, partial(json.dumps, ensure_ascii=False, default=str))
        self.problems.append(Problem(self._where, key[:_KEY_CHARS], text, wrong, right))


def _is_no_text(value: str) -> bool:
    return "\0" in value or encodable(value) != value


def _unusable(message: str, where: str, hint: str) -> ConfigError:
    return ConfigError(message, hint=hint, file=where, key="", value="")
