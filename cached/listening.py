"""Accepts connections for as long as a listener lives, whatever happens to one of them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

_AGAIN_S = 0.5
_TELL_AGAIN_S = 60.0


async def accept_each(
    listener: socket.socket,
    serve: Callable[[socket.socket], Coroutine[Any, Any, None]],
    tasks: set[asyncio.Task[None]],
    ended: Callable[[asyncio.Task[None]], None],
    failed: Callable[[OSError], None],
) -> None:
    """Serves each connection in a task of its own: in ``tasks`` until it is over, and then told to ``ended``.

    ``failed``: why none can be taken, at most once a minute while that is so.
    """
    loop = asyncio.get_running_loop()
    tell_at_s = 0.0
    while True:
        try:
            connection, _ = await loop.sock_accept(listener)
        except OSError as error:
            # Out of descriptors, usually: those who wait are served when some are back.
            if (now_s := loop.time()) >= tell_at_s:
                tell_at_s = now_s + _TELL_AGAIN_S
                failed(error)
            await asyncio.sleep(_AGAIN_S)
            continue
        task = asyncio.create_task(serve(connection))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(ended)
        close_after(task, connection)
        # So that it counts itself before the next one is taken: of those that wait no accept would let it run.
        await asyncio.sleep(0)


def close_after(task: asyncio.Task[None], owned: socket.socket) -> None:
    """Also for a task that is cancelled before its first step, where a ``with`` inside it would never be reached."""
    task.add_done_callback(lambda _: owned.close())
