"""An OpenAI-style server as something that can be warmed up and kept warm: POST /v1/completions."""

from __future__ import annotations

import http.client
import itertools
import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cached_client.errors import EndpointError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_FIRST_TOKEN, _TOKENS = 100, 800
"""Every vocabulary in use has these; the control tokens of most lie outside of them."""

_ANSWER_BYTES = 64 * 1024 * 1024
_TOLD_BYTES = 2000


class CompletionsEndpoint:
    """Called with ``(batch_size, length)`` it asks for that many completions of prompts of that many tokens.

    The prompts are lists of token ids, so that they have exactly the length asked for, and no two calls send the same
    ones: a server that keeps the computed prefixes of earlier prompts would only look them up. ``prompt`` makes other
    ones: it gets the length and the number of the prompt, and returns a text or a list of token ids.

    Args:
        url: of the server, with or without ``/v1``.
        model: its name there.
        max_tokens: tokens asked for each completion.
        timeout_s: of one call; compilation may be in it.
        api_key: sent as bearer token, if given.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        max_tokens: int = 1,
        timeout_s: float = 600.0,
        api_key: str = "",
        prompt: Callable[[int, int], str | Sequence[int]] | None = None,
    ) -> None:
        if not _is_http(url):
            raise InvalidRequestError(f"{url!r} is not an http or https address", value=url)
        base = url.rstrip("/")
        self.url: str = f"{base if base.endswith('/v1') else base + '/v1'}/completions"
        self.model: str = model
        self._max_tokens = max_tokens
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._prompt = prompt or _tokens
        self._numbers = itertools.count()

    def __call__(self, batch_size: int = 1, length: int = 1) -> list[str]:
        """The completions' texts. Raises EndpointError for any other answer than that many of them."""
        prompts = [self._prompt(length, next(self._numbers)) for _ in range(batch_size)]
        body = {"model": self.model, "prompt": prompts, "max_tokens": self._max_tokens, "temperature": 0}
        answer = self._post(json.dumps(body).encode())
        try:
            texts = [str(choice["text"]) for choice in json.loads(answer)["choices"]]
        except (ValueError, KeyError, TypeError) as error:
            raise self._failed(f"its answer is no list of completions: {answer[:200]!r}", 200) from error
        if len(texts) != batch_size:
            raise self._failed(f"it gave {len(texts)} completions for {batch_size} prompts", 200)
        return texts

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, body, self._headers)  # noqa: S310 its scheme was checked
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as response:  # noqa: S310 as above
                data: bytes = response.read(_ANSWER_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                raise self._failed(_told(_begin_of(error)) or str(error.reason), error.code) from error
        except (OSError, http.client.HTTPException) as error:  # URLError, timeouts, resets; what is no HTTP
            raise self._failed(str(getattr(error, "reason", error)) or type(error).__name__, 0) from error
        return data

    def _failed(self, cause: str, status: int) -> EndpointError:
        answered = f" answered {status}" if status else " did not answer"
        return EndpointError(
            f"{self.url}{answered}: {cause}",
            hint="is the server up, and does it serve that model under that name?",
            url=self.url,
            status=status or "",
            cause=cause,
        )


def _tokens(length: int, number: int) -> list[int]:
    """Another prompt for each number, from its first token on."""
    return [_FIRST_TOKEN + (31 * number + 7 * position) % _TOKENS for position in range(length)]


def _is_http(url: str) -> bool:
    try:
        return urlsplit(url).scheme in {"http", "https"}
    except ValueError:  # e.g. half an IPv6 address
        return False


def _begin_of(error: urllib.error.HTTPError) -> bytes:
    """Of the body; empty where it does not come: the status says enough."""
    try:
        return error.read(_TOLD_BYTES)
    except (OSError, http.client.HTTPException):
        return b""


def _told(body: bytes) -> str:
    """The message of an error in OpenAI's form, else the beginning of the body."""
    try:
        answer: Any = json.loads(body)
        told = answer.get("error", answer)
        return str(told.get("message", told))[:500]
    except (ValueError, AttributeError):
        return body.decode("utf-8", "replace")[:500]
