"""Takes what a client has to send, within a time: a call that only begins would be held, and counted, for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import grpc.aio
from google.protobuf.message import DecodeError

from cached.errors import InvalidRequestError, TimeoutExpiredError

T = TypeVar("T")
FIRST_S = 60.0
"""For the first message of a call; it usually comes with the call itself."""
GONE_S = 0.2
"""Until gRPC, too, knows that a connection has ended, and cancels its calls."""


async def in_time(message: Awaitable[T], timeout_s: float | None = None) -> T:
    """The message, within FIRST_S unless told. Raises TimeoutExpiredError."""
    timeout_s = FIRST_S if timeout_s is None else timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            return await message
    except TimeoutError as error:
        raise TimeoutExpiredError(
            f"the call began, but its first message did not come within {timeout_s:g} s",
            hint="send the request with the call",
            what="the first message", timeout_s=timeout_s,
        ) from error  # fmt: skip


async def only_request(context: grpc.aio.ServicerContext[Any, Any], timeout_s: float | None = None) -> Any:
    """The request of a call that has one. Raises InvalidRequestError or TimeoutExpiredError."""
    try:
        request = await in_time(context.read(), timeout_s)
    except DecodeError as error:
        raise InvalidRequestError("the request cannot be read", hint="use the contract in proto/cached/v1") from error
    if request is grpc.aio.EOF:
        await asyncio.sleep(GONE_S)  # a caller that went away looks the same
        raise InvalidRequestError("the call ended before its request came", hint="send one message")
    return request
