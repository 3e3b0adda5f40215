"""What ``--model-loader-extra-config`` may say to the load format ``cached``. Standard library only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cached_client.errors import InvalidRequestError
from cached_client.gpu.options import GpuOptions

FALLBACKS = ("none", "auto")

_GPU_KEYS = ("threads", "slot_bytes", "steps", "bind", "ahead_bytes", "buffer_bytes")


def _option(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, slots=True)
class LoaderOptions:
    """The options; the text of each is that of the documentation."""

    model: str = _option(
        "", "Name of the model in the cache, `NAME` or `NAME@REVISION`. Not needed where `--model` is its directory."
    )
    socket: str = _option(
        "", "The daemon's socket. Default: `CACHED_SOCKET`, else `/run/cached/cached.sock`, else this user's own."
    )
    source: str = _option("", "Origin of a model that is not in the catalog, e.g. `s3://bucket/llama`.")
    wait: bool = _option(False, "Wait until the model is complete and checked before the first weight is handed over.")
    timeout_s: float | None = _option(None, "Limit for the whole load. Default: as long as it takes.")
    daemon_timeout_s: float = _option(30.0, "How long to wait for a daemon that does not answer yet.")
    hold: bool = _option(
        False, "Keep the lease while the engine lives, so that a reload (sleep level 2) finds the weights in memory."
    )
    keep_alive_s: float = _option(
        0.0, "How long the model is kept in memory before others once the lease has ended; a day at most."
    )
    fallback: str = _option(
        "none",
        "`auto`: where the cache fails before the first weight, load `--model` with vLLM's own loader, with a warning."
        " Damaged content never falls back.",
    )
    ring: bool = _option(
        True, "On CUDA: copy through the client's pinned ring. Without it vLLM copies from shared memory by itself."
    )
    compile_cache: bool = _option(
        False, "Restore vLLM's compile cache before it compiles, and save it after, where the daemon lets its workers."
    )
    report_start: bool = _option(
        True, "Tell the daemon what this start consisted of, for `cached coldstart`: the first rank does, once."
    )
    gpu: GpuOptions = field(
        default_factory=GpuOptions,
        metadata={"doc": f"Tunes the ring: an object with some of {', '.join(f'`{key}`' for key in _GPU_KEYS)}."},
    )


def parse_options(extra: Mapping[str, Any] | None) -> LoaderOptions:
    """The options in ``extra``. Raises InvalidRequestError for an unknown key (with those known) and a wrong value."""
    if extra is not None and not isinstance(extra, Mapping):
        raise InvalidRequestError(
            f"--model-loader-extra-config is {type(extra).__name__}, not an object",
            hint="""for example '{"model": "llama-13b"}'""",
            value=extra,
        )
    given = dict(extra or {})
    known = {item.name: item for item in dataclasses.fields(LoaderOptions)}
    _refuse_unknown(given, known, "--model-loader-extra-config")
    checks: dict[str, Callable[[str, Any], Any]] = {
        "model": _text, "socket": _text, "source": _text, "wait": _flag, "timeout_s": _optional_seconds,
        "daemon_timeout_s": _seconds, "hold": _flag, "keep_alive_s": _seconds, "fallback": _fallback, "ring": _flag,
        "compile_cache": _flag, "report_start": _flag, "gpu": _gpu,
    }  # fmt: skip
    return LoaderOptions(**{key: checks[key](key, value) for key, value in given.items()})


def _refuse_unknown(given: Mapping[str, Any], known: Mapping[str, object] | tuple[str, ...], where: str) -> None:
    unknown = sorted(map(str, set(given) - set(known)))
    if unknown:
        raise InvalidRequestError(
            f"{where} has {', '.join(map(repr, unknown))}, which the load format 'cached' does not know",
            hint=f"it knows {', '.join(sorted(known))}",
            value=", ".join(unknown),
        )


def _wrong(key: str, value: Any, wanted: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"--model-loader-extra-config: {key} is {value!r}", hint=f"it must be {wanted}", value=value
    )


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(key, value, "text")
    return value


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false")
    return value


def _seconds(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise _wrong(key, value, "a number of seconds, 0 or more")
    return float(value)


def _optional_seconds(key: str, value: Any) -> float | None:
    return None if value is None else _seconds(key, value)


def _fallback(key: str, value: Any) -> str:
    if value not in FALLBACKS:
        raise _wrong(key, value, f"one of {', '.join(map(repr, FALLBACKS))}")
    return str(value)


def _gpu(key: str, value: Any) -> GpuOptions:
    if not isinstance(value, Mapping):
        raise _wrong(key, value, f"an object with some of {', '.join(_GPU_KEYS)}")
    _refuse_unknown(value, _GPU_KEYS, f"--model-loader-extra-config: {key}")
    for name, item in value.items():
        if name == "bind":
            _flag(f"{key}.{name}", item)
        elif isinstance(item, bool) or not isinstance(item, int):
            raise _wrong(f"{key}.{name}", item, "a whole number")
    return GpuOptions(**value)
