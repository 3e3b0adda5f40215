"""A descriptor socket that is served by a user without rights, in a process of its own. Needs root.

``python -m tests.integration.descriptor_process SOCKET UID NOFILE``. Root itself is exempt from the kernel's bound on
descriptors that are under way. It loads everything as root: the interpreter may lie where that user cannot read.
"""

from __future__ import annotations

import asyncio
import os
import resource
import sys
from importlib import import_module
from pathlib import Path

from cached.rpc.descriptors import FILES_LIMIT, DescriptorServer
from tests.unit.rpc_support import FakeEngine


async def serve(path: str) -> None:
    engine = FakeEngine(files=[Path("/dev/null")] * FILES_LIMIT)
    server = DescriptorServer(engine, path, mode=0o666)
    await server.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()


def main() -> None:
    path, uid, files = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    import_module("concurrent.futures.thread")  # which asyncio does when it first needs one
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    asyncio.run(serve(path))


if __name__ == "__main__":
    main()
