"""Links lead somewhere, code compiles, commands exist, names in prose are names in the code, files stay small."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from docs import generate
from tests.docs.documents import DOCUMENTS, ROOT, anchors, blocks, text_of, without_code

LINK = re.compile(r"(?<!\!)\[[^\]]+\]\(([^)\s]+)\)")
MAX_LINES = 500


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in LINK.findall(without_code(path.read_text())):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked.read_text()), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_compiles_and_uses_what_there_is(path):
    for code in blocks(path.read_text(), "python"):
        tree = ast.parse(code)
        compile(tree, str(path), "exec")
        for name in used_of(tree, "model"):
            assert name in members(ROOT / "client/cached_client/attach.py", "Model"), name
        for name in used_of(tree, "cache"):
            assert name in members(ROOT / "client/cached_client/cache.py", "Cache"), name


def used_of(tree: ast.AST, variable: str) -> set[str]:
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == variable
    }


def test_the_readme_shows_python():
    assert blocks(text_of("README.md"), "python")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_targets_exist(path):
    text = path.read_text()
    code = "\n".join(blocks(text, "bash")) + "\n" + "\n".join(re.findall(r"`((?:cached|make) [^`]+)`", text))
    commands = {name: {word for option in command.params for word in (*option.opts, *option.secondary_opts)}
                for name, command in generate.verbs()}  # fmt: skip
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    for line in re.split(r"\n|;|&&|\|", code):
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        if words[:1] != ["cached"] or len(words) < 2 or words[1].startswith(("-", "[")):
            continue
        name = next((name for name in (" ".join(words[1:3]), words[1]) if name in commands), None)
        assert name is not None, line
        given = words[1 : words.index("--")] if "--" in words else words
        for word in given:
            if word.startswith("-"):
                assert word.partition("=")[0] in commands[name] | {"--help"}, line


def test_the_readme_shows_the_command_line():
    shown = "\n".join(blocks(text_of("README.md"), "bash"))
    assert [
        verb for verb in ("serve", "pull", "ls", "run", "path", "push", "health") if f"cached {verb}" not in shown
    ] == []


@pytest.mark.parametrize(
    "document", ["docs/data-flow.md", "docs/architecture.md", "docs/semantics.md", "docs/policy.md"]
)
def test_functions_that_are_named_exist(document):
    """``Class.member`` and ``package.module.name`` in backticks."""
    classes = classes_by_name()
    for name in re.findall(r"`((?:\w+\.)+\w+)(?:\(\))?`", without_code(text_of(document))):
        owner, _, member = name.rpartition(".")
        if owner in classes:
            assert any(member in members(path, owner) for path in classes[owner]), name
        elif owner.startswith(("cached.", "levels.", "policy.", "origins.", "transfer.", "cache.", "rpc.")):
            assert is_in_module(owner.removeprefix("cached."), member), name


def classes_by_name() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for package in generate.PACKAGES:
        for path in package.rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, []).append(path)
    return found


def members(path: Path, name: str) -> set[str]:
    """Methods and attributes of a class and its bases in the same folder, those set on ``self`` included."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)}
            stored = {
                item.attr
                for item in ast.walk(node)
                if isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store)
            }
            fields = {
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            inherited = [members(other, base) for base in bases for other in path.parent.glob("*.py") if other != path]
            return methods.union(stored, fields, *inherited)
    return set()


def is_in_module(module: str, name: str) -> bool:
    """A module of that dotted name (below the daemon's package) that defines it."""
    path = ROOT / "cached" / f"{module.replace('.', '/')}.py"
    if not path.exists():
        return (ROOT / "cached" / module.replace(".", "/") / f"{name}.py").exists()
    return name in re.findall(r"^(?:async def|def|class) (\w+)", path.read_text(), re.MULTILINE)


def test_the_house_names_every_top_level_module_and_only_what_exists():
    house = text_of("docs/architecture.md").split("<!-- begin house -->")[1].split("<!-- end house -->")[0]
    named = {line.split()[0] for line in house.splitlines() if re.match(r"  \S", line)}
    for package in generate.PACKAGES:
        for path in package.iterdir():
            if path.suffix == ".py" and path.name != "__init__.py":
                assert path.name in named, path
            elif (path / "__init__.py").exists():
                assert f"{path.name}/" in named, path
    files = {path.name for package in generate.PACKAGES for path in package.rglob("*.py")}
    assert set(re.findall(r"^ +(\S+\.py) ", house, re.MULTILINE)) <= files


def test_the_layers_are_those_that_are_enforced():
    contract = text_of("pyproject.toml").split('id = "layers"')[1].split("layers = [")[1].split("]")[0]
    enforced = [set(re.findall(r"\w+", line)) for line in re.findall(r'"([^"]+)"', contract)]
    told = blocks(text_of("docs/architecture.md").split("## Layers")[1], "")[0].splitlines()
    assert [set(re.findall(r"\w+", re.split(r"\s{2,}", line)[0])) for line in told] == enforced


def test_top_level_folders_are_told():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    folders = {path.split("/")[0] for path in listed if "/" in path and not path.startswith(".")}
    told = text_of("docs/architecture.md")
    assert [name for name in sorted(folders) if f"{name}/" not in told] == []


def test_no_file_is_too_long_to_be_read():
    long = {}
    for folder in ("cached", "client", "tests", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text().splitlines())
            if "_proto" not in path.parts and lines > MAX_LINES:
                long[str(path.relative_to(ROOT))] = lines
    assert long == {}
