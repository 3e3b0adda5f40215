"""Writes the Python code of the wire contract into ``client/cached_client/_proto/``.

Run by ``make proto`` in an environment that holds the oldest supported grpcio-tools: what it writes works with every
newer grpcio and protobuf, and those are what workers bring. ``--check`` writes nothing, and exits with 1 and a diff
where the committed code is not what would be written.

protoc writes one package path per .proto (``cached/v1/``), which would collide with the daemon's package ``cached``;
so the modules are moved into the client's package and their imports rewritten. The descriptor keeps the name
``cached/v1/cached.proto``: it is the contract's identity at run time.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.resources
import sys
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
OUT = ROOT.parent / "client" / "cached_client" / "_proto"
CONTRACT = "cached/v1/cached.proto"
PACKAGE = "cached_client._proto"

INIT = '"""Code generated from ``proto/cached/v1/cached.proto``. Do not edit: ``make proto`` writes it."""\n'
BANNER = "# Generated from proto/cached/v1/cached.proto by `make proto`. Do not edit.\n"


def run_protoc(out: Path) -> None:
    """Writes the modules, the message stubs and the descriptor set below ``out``."""
    builtin = importlib.resources.files("grpc_tools") / "_proto"
    code = protoc.main(
        [
            "protoc",
            f"--proto_path={ROOT}",
            f"--proto_path={builtin}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            f"--descriptor_set_out={out / 'contract.binpb'}",
            CONTRACT,
        ]
    )
    if code != 0:
        sys.exit(f"protoc failed with status {code}")


def service_stub(service: descriptor_pb2.ServiceDescriptorProto) -> list[str]:
    """Type stubs of one service: the client stub for sync and asyncio channels, the servicer for asyncio servers."""
    client = [
        f"class {service.name}Stub(Generic[_Channel]):",
        "    def __init__(self, channel: _Channel) -> None: ...",
    ]
    servicer = [f"class {service.name}Servicer:"]
    options = (
        "timeout: float | None = ..., metadata: Any = ..., credentials: grpc.CallCredentials | None = ..., "
        "wait_for_ready: bool | None = ..., compression: grpc.Compression | None = ..."
    )
    for method in service.method:
        if method.client_streaming and method.server_streaming:
            sys.exit(f"{service.name}.{method.name}: streams in both directions have no type stub yet")
        request, response = (name.rsplit(".", 1)[-1] for name in (method.input_type, method.output_type))
        types = f"cached_pb2.{request}, cached_pb2.{response}"
        kind = f"{'Stream' if method.client_streaming else 'Unary'}{'Stream' if method.server_streaming else 'Unary'}"
        sync_result = f"_CallIterator[cached_pb2.{response}]" if method.server_streaming else f"cached_pb2.{response}"
        results = (
            ("grpc.Channel", sync_result, "request_iterator: Iterator"),
            ("grpc.aio.Channel", f"grpc.aio.{kind}Call[{types}]", "request_iterator: AsyncIterator"),
        )
        for channel, result, stream in results:
            receiver = f"self: {service.name}Stub[{channel}]"
            asked = f"{stream}[cached_pb2.{request}]" if method.client_streaming else f"request: cached_pb2.{request}"
            client.append("    @overload")
            client.append(f"    def {method.name}({receiver}, {asked}, *, {options}) -> {result}: ...")
        result = f"AsyncIterator[cached_pb2.{response}]" if method.server_streaming else f"cached_pb2.{response}"
        define = "def" if method.server_streaming else "async def"
        asked = f"AsyncIterator[cached_pb2.{request}]" if method.client_streaming else f"cached_pb2.{request}"
        name = "request_iterator" if method.client_streaming else "request"
        servicer.append(
            f"    {define} {method.name}(self, {name}: {asked}, "
            f"context: grpc.aio.ServicerContext[{types}]) -> {result}: ...",
        )
    register = (
        f"def add_{service.name}Servicer_to_server("
        f"servicer: {service.name}Servicer, server: grpc.Server | grpc.aio.Server) -> None: ..."
    )
    return [*client, "", *servicer, "", register, ""]


def grpc_stubs(descriptor_set: Path) -> str:
    """The text of ``cached_pb2_grpc.pyi``; protoc itself writes none for services."""
    files = descriptor_pb2.FileDescriptorSet.FromString(descriptor_set.read_bytes())
    lines = [
        "from collections.abc import AsyncIterator, Iterator",
        "from typing import Any, Generic, overload",
        "",
        "import grpc",
        "import grpc.aio",
        "from typing_extensions import TypeVar",
        "",
        "from . import cached_pb2",
        "",
        "_T = TypeVar('_T', covariant=True)",
        "_Channel = TypeVar('_Channel', grpc.Channel, grpc.aio.Channel, default=grpc.Channel)",
        "",
        "class _CallIterator(grpc.Call, Iterator[_T]):",
        "    def __next__(self) -> _T: ...",
        "    def result(self, timeout: float | None = ...) -> _T: ...",
        "",
    ]
    for file in files.file:
        for service in file.service:
            lines += service_stub(service)
    return "\n".join(lines)


def generate() -> dict[str, str]:
    """What the folder should hold: file name -> text."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        run_protoc(out)
        made = out / "cached" / "v1"
        modules = {
            name: (made / name).read_text() for name in ("cached_pb2.py", "cached_pb2.pyi", "cached_pb2_grpc.py")
        }
        modules["cached_pb2_grpc.pyi"] = grpc_stubs(out / "contract.binpb")
    # protoc leaves the mappings that stand for a message bare, which strict type checkers call unknown.
    stubs = modules["cached_pb2.pyi"]
    stubs = stubs.replace("_Mapping]", "_Mapping[str, _Any]]").replace(
        "import ClassVar", "import Any as _Any, ClassVar"
    )
    modules["cached_pb2.pyi"] = stubs
    rewritten = {
        name: BANNER
        + text.replace("from cached.v1 import cached_pb2", "from . import cached_pb2").replace(
            "'cached.v1.cached_pb2'", f"'{PACKAGE}.cached_pb2'"
        )
        for name, text in modules.items()
    }
    return {"__init__.py": INIT, **rewritten}


def differences(wanted: dict[str, str]) -> list[str]:
    """A unified diff from what is committed to what is wanted; empty where they agree."""
    present = {path.name: path.read_text() for path in OUT.glob("*.py*") if path.is_file()}
    lines: list[str] = []
    for name in sorted(wanted.keys() | present.keys()):
        old, new = present.get(name, ""), wanted.get(name, "")
        lines += difflib.unified_diff(old.splitlines(), new.splitlines(), f"committed/{name}", f"fresh/{name}", "", "")
    return lines


def main() -> None:
    """Generates, or checks."""
    parser = argparse.ArgumentParser(description="Generate the Python code of the wire contract.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the committed code is stale")
    arguments = parser.parse_args()
    wanted = generate()
    if arguments.check:
        if lines := differences(wanted):
            sys.exit("\n".join([*lines[:60], "The generated code is stale: run `make proto` and commit."]))
        return
    OUT.mkdir(parents=True, exist_ok=True)
    for path in OUT.glob("*.py*"):
        if path.is_file() and path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (OUT / name).write_text(text)


if __name__ == "__main__":
    main()
