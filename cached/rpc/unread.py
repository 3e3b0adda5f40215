"""Descriptors that were sent and that their receivers have not read: who holds how many back, and how many may be.

The kernel counts them for the daemon's user, and takes none from it any more beyond its limit of open files: who asks
and never reads would keep all others from theirs. They stay counted when the daemon closes its end, until the receiver
reads or is gone.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from collections import Counter

from cached.errors import LimitExceededError, UnavailableError
from cached.open_files import HINT, SETTING
from cached.types import Peer

_LOOK_S = 0.01
_FIRST_WAIT_S, _LAST_WAIT_S = 0.001, 0.25
_INT = struct.Struct("i")


def is_read(connection: socket.socket) -> bool:
    """Whether everything that was sent by this Unix socket was read, or its other end is gone."""
    answer: bytes = fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(_INT.size))
    return not _INT.unpack(answer)[0]


async def until_read(connection: socket.socket) -> None:
    """The kernel tells nobody: it has to be asked."""
    wait_s = _FIRST_WAIT_S
    while not is_read(connection):
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, _LAST_WAIT_S)


class Unread:
    """Loop only. A user may hold back as many as then are left for all others, so several cannot take all of it."""

    def __init__(self, in_all: int) -> None:
        self._in_all = in_all
        self._held: dict[socket.socket, tuple[int, int]] = {}
        self._per_uid: Counter[int] = Counter()
        self._looked_s = 0.0

    def used_ratios(self) -> dict[str, float]:
        """How far the limits are used: that of each user by the one who has the most, and that of all."""
        self._look()
        most, left = max(self._per_uid.values(), default=0), self._in_all - self._per_uid.total()
        return {
            "unread_descriptors": 2 * most / (most + left) if most else 0.0,
            "all_unread_descriptors": 1 - left / self._in_all,
        }

    async def take(self, connection: socket.socket, peer: Peer, count: int, timeout_s: float) -> None:
        """Before so many are sent. Waits for room; raises LimitExceededError or UnavailableError if there is none."""
        loop = asyncio.get_running_loop()
        end_s, wait_s = loop.time() + timeout_s, _FIRST_WAIT_S
        while not self._fits(peer.uid, count):
            if loop.time() >= end_s:
                raise self._error(peer)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _LAST_WAIT_S)
        self._held[connection] = peer.uid, count
        self._per_uid[peer.uid] += count

    def forget(self, connection: socket.socket) -> None:
        """They were read, or not sent; idempotent."""
        uid, count = self._held.pop(connection, (0, 0))
        self._per_uid[uid] -= count
        if not self._per_uid[uid]:
            del self._per_uid[uid]

    def count(self, connection: socket.socket) -> int:
        """How many this one's peer has not read."""
        return 0 if is_read(connection) else self._held.get(connection, (0, 0))[1]

    def _fits(self, uid: int, count: int) -> bool:
        if not self._has_room(uid, count):
            self._look()
        return self._has_room(uid, count)

    def _has_room(self, uid: int, count: int) -> bool:
        left = self._in_all - self._per_uid.total() - count
        return left >= 0 and (uid not in self._per_uid or self._per_uid[uid] + count <= left)

    def _look(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        for connection in [connection for connection in self._held if is_read(connection)]:
            self.forget(connection)

    def _error(self, peer: Peer) -> LimitExceededError | UnavailableError:
        if not (held := self._per_uid[peer.uid]):
            return UnavailableError("others do not read the descriptors that they asked for", hint=HINT, uid=peer.uid)
        return LimitExceededError(
            f"uid {peer.uid} has {held} descriptors that it asked for and does not read, and gets no more",
            hint="read each answer of the descriptor socket, or close the connection",
            limit="unread descriptors", setting=SETTING, caller=f"uid {peer.uid}", allowed=held,
        )  # fmt: skip
