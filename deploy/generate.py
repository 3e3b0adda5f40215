"""Writes what of the manifests can be derived: parts of the chart's schema and README, and kustomize's base.

The chart is the one source. The schema's ``config`` and ``catalog`` come from the daemon's own settings and catalog;
the base is what the chart renders by default, less what only Helm needs. Run by ``make manifests``; ``--check`` writes
nothing, and exits with 1 and a diff where a file is not what would be written.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from cached.catalog_file import FORMATS, CatalogModel
from cached.level import Level
from cached.settings import describe_settings, sections, setting_type
from cached.types import Tier
from deploy.tools import CHART, KUSTOMIZE, template

COMPUTED = (
    "daemon.socket", "daemon.state_dir", "daemon.models_dir", "daemon.catalog", "daemon.log_format",
    "daemon.drain_timeout_s", "l1.path", "l1.capacity", "l1.transient_capacity", "l1.segment_mode",
    "l2.enabled", "l2.path", "l2.paths", "l2.capacity", "http.listen",
    "tcp.listen", "tcp.cert", "tcp.key", "tcp.client_ca", "tcp.clients", "tcp.operators",
    "fleet.node_labels", "fleet.node_name", "fleet.namespace", "fleet.slots",
)  # fmt: skip
"""Settings that other values of the chart decide, or that its paths depend on."""

_BANNER = "# Written by `make manifests` from the chart. Change deploy/helm/cached, or patch this in an overlay.\n"
_OF_HELM = re.compile(
    r"^ +(?:# Settings are read at start.*|helm\.sh/.*|checksum/.*|app\.kubernetes\.io/managed-by: .*)\n", re.MULTILINE
)
_TYPES: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
}


def outputs() -> Iterator[tuple[Path, str]]:
    """Each file, and what it should hold."""
    schema = CHART / "values.schema.json"
    yield schema, schema_text(json.loads(schema.read_text(encoding="utf-8")))
    readme = CHART / "README.md"
    yield readme, readme_text(readme.read_text(encoding="utf-8"), (CHART / "values.yaml").read_text(encoding="utf-8"))
    base = rendered(template("--set", "namespace.create=true"))
    for name in ("daemonset", "namespace", "networkpolicy", "priorityclass", "serviceaccount"):
        yield KUSTOMIZE / "base" / f"{name}.yaml", base[name]
    yield KUSTOMIZE / "base" / "config.toml", _BANNER + _data(base["configmap"], "config.toml")
    yield KUSTOMIZE / "base" / "catalog.json", _data(base["catalog"], "catalog.json")
    fleet = rendered(template("--set", "fleet.nodeLabels=true,fleet.slots=1"))
    yield KUSTOMIZE / "components" / "fleet" / "rbac.yaml", fleet["rbac"]
    monitored = rendered(template("--set", "podMonitor.enabled=true"))
    yield KUSTOMIZE / "components" / "podmonitor" / "podmonitor.yaml", monitored["podmonitor"]


# The schema.


def schema_text(schema: dict[str, Any]) -> str:
    """With the parts that the daemon knows better."""
    properties = schema["properties"]
    properties["config"] = _closed({name: _section(name) for name in sections()})
    catalog = properties["catalog"]["properties"]
    catalog["models"] = {"type": "object", "additionalProperties": _model()}
    quota = {"type": ["string", "integer"]}
    tenant = _closed({level.value: quota for level in (Level.L1, Level.L2)})
    catalog["tenants"] = {"type": "object", "additionalProperties": tenant}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _closed(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": dict(properties)}


def _section(name: str) -> dict[str, Any]:
    return _closed(
        {
            item.key.partition(".")[2]: {"description": item.doc, **_schema_of(setting_type(*item.key.split(".")))}
            for item in describe_settings()
            if item.key.startswith(f"{name}.") and item.key not in COMPUTED
        }
    )


def _model() -> dict[str, Any]:
    hints = get_type_hints(CatalogModel)
    properties = {name: _schema_of(kind) for name, kind in hints.items() if name not in ("name", "size_bytes")}
    properties["size"] = {"type": ["string", "integer"]}
    properties["tier"] = {"enum": [tier.value for tier in Tier]}
    properties["format"] = {"enum": list(FORMATS)}
    properties["origin"] = {"type": "object"}
    return _closed(dict(sorted(properties.items())))


def _schema_of(kind: Any) -> dict[str, Any]:
    if kind in _TYPES:
        return _TYPES[kind]
    if get_origin(kind) is tuple:
        return {"type": "array", "items": _schema_of(get_args(kind)[0])}
    if isinstance(kind, UnionType):
        return {}
    return {"type": "object", "additionalProperties": {"type": "string"}}


# The README.


def readme_text(text: str, values: str) -> str:
    """With the table of values between its marks."""
    begin, end = "<!-- begin values -->", "<!-- end values -->"
    head, tail = text.partition(begin)[0], text.partition(end)[2]
    rows = "".join(f"| `{key}` | {default} | {doc} |\n" for key, default, doc in described(values))
    return f"{head}{begin}\n| Value | Default | |\n|---|---|---|\n{rows}{end}{tail}"


def described(values: str) -> Iterator[tuple[str, str, str]]:
    """Key, default and comment of each value, from the text of values.yaml. A comment belongs to the line below it."""
    path: list[str] = []
    comment: list[str] = []
    for line in values.splitlines():
        if not line.strip():
            comment = []
        elif line.lstrip().startswith("#"):
            comment.append(line.strip().lstrip("# "))
        elif match := re.match(r"^((?:  )*)(\w+):\s*(.*)$", line):
            path = [*path[: len(match[1]) // 2], match[2]]
            if comment and len(path) <= 2:
                default = f"`{match[3]}`" if match[3] else ""
                yield ".".join(path), default, " ".join(comment)
            comment = []


# The base.


def rendered(text: str) -> dict[str, str]:
    """Of each template its manifests, as kustomize wants them."""
    found: dict[str, str] = {}
    for part in re.split(r"^---\n", text, flags=re.MULTILINE):
        source, _, body = part.partition("\n")
        if match := re.fullmatch(r"# Source: cached/templates/(\w+)\.yaml", source):
            body = _OF_HELM.sub("", body.strip("\n") + "\n")
            found[match[1]] = f"{found[match[1]]}---\n{body}" if match[1] in found else _BANNER + body
    return found


def _data(manifest: str, key: str) -> str:
    text: str = yaml.safe_load(manifest)["data"][key]
    return text


def main() -> int:
    """Writes or checks; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something is not fresh")
    check = parser.parse_args().check
    stale = 0
    for path, text in outputs():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old == text:
            continue
        if check:
            lines = difflib.unified_diff(old.splitlines(True), text.splitlines(True), str(path), "what it should be")
            sys.stdout.writelines(lines)
            stale += 1
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    if stale:
        print(f"{stale} files are not fresh: run `make manifests`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
