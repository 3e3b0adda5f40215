"""Jobs and results as lines of a pipe: one JSON object a line, plain ASCII, ended by a newline.

Decoding is strict: an unknown kind or field, a missing field or a value of the wrong type raises MoverError, so that a
confused peer is noticed at its first word. Text may hold lone surrogates (paths that are no UTF-8); they survive.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from cached.errors import CachedError, InvalidRequestError, MoverError
from cached.transfer.jobs import Job, Result, Word

_JOBS: dict[str, type] = {kind.__name__: kind for kind in get_args(Job)}
_SIMPLE = frozenset({str, int, float, bool, type(None)})
_RESULTS: dict[str, type] = {kind.__name__: kind for kind in get_args(Result)}

ANSWER_LIMIT_BYTES = 64 * 1024 * 1024
"""The longest answer: a listing of some hundred thousand objects."""

READY_LINE = b'{"ready": true}\n'
"""What a mover says first, once it can take jobs."""


def encode_job(request_id: int, job: Job) -> bytes:
    """The line that asks a mover for ``job``."""
    return _line({"id": request_id, "kind": type(job).__name__, "job": _plain(job)})


def encode_word(request_id: int, word: Word) -> bytes:
    """The line that says ``word`` of a request, to a mover or from it."""
    return _line({"id": request_id, "word": word.value})


def decode_job(line: bytes) -> tuple[int, Job | Word]:
    """Request id, and the job or what is said of an earlier one. Raises MoverError for anything else."""
    data = _parse(line, {"id", "kind", "job"}, {"id", "word"})
    if "word" in data:
        return _request_id(data, line), _word(data["word"], line, Word.ABORT, Word.PROCEED)
    kind = _JOBS.get(str(data["kind"]))
    if kind is None:
        raise _nonsense(f"unknown job {data['kind']!r}", line)
    return _request_id(data, line), cast("Job", _build(kind, data["job"], line))


def encode_result(request_id: int, result: Result) -> bytes:
    """The line that answers a request with a result. Raises InvalidRequestError for one that is too long.

    The daemon would take such a line for nonsense, end the mover with all that it works on, and ask another one.
    """
    line = _line({"id": request_id, "kind": type(result).__name__, "result": _plain(result)})
    if len(line) > ANSWER_LIMIT_BYTES:
        raise InvalidRequestError(
            f"this answer has {len(line)} bytes, and {ANSWER_LIMIT_BYTES} are the most: {type(result).__name__}",
            hint="hundreds of thousands of objects lie below that place: name the model's own folder",
        )
    return line


def encode_error(request_id: int, error: CachedError) -> bytes:
    """The line that answers a request with a failure."""
    return _line({"id": request_id, "error": error.to_dict()})


def decode_answer(line: bytes) -> tuple[int, Result | CachedError | Word]:
    """Request id, and the result, the error of its own type (not raised), or a word before either.

    Raises MoverError for anything else.
    """
    data = _parse(line, {"id", "kind", "result"}, {"id", "error"}, {"id", "word"})
    request_id = _request_id(data, line)
    if "word" in data:
        return request_id, _word(data["word"], line, Word.ARRIVED)
    if "error" in data:
        return request_id, _error(data["error"], line)
    kind = _RESULTS.get(str(data["kind"]))
    if kind is None:
        raise _nonsense(f"unknown result {data['kind']!r}", line)
    return request_id, cast("Result", _build(kind, data["result"], line))


def _line(data: dict[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=True, separators=(",", ":")).encode("ascii") + b"\n"


def _plain(value: object) -> object:
    if type(value) in _SIMPLE:
        return value
    kind: type = type(value)
    names = _field_names(kind)
    if names is not None:
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return dict(value)
    return value


@cache
def _field_names(kind: type) -> tuple[str, ...] | None:
    """None of what is no dataclass."""
    return tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else None


def _parse(line: bytes, *shapes: set[str]) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _nonsense("not a line of JSON", line) from error
    if not isinstance(data, dict) or set(data) not in shapes:
        raise _nonsense("not a message", line)
    return data


def _request_id(data: dict[str, Any], line: bytes) -> int:
    value = data["id"]
    if type(value) is not int:
        raise _nonsense("the request id is no number", line)
    return value


def _word(value: object, line: bytes, *allowed: Word) -> Word:
    found = next((word for word in allowed if word.value == value), None)
    if found is None:
        raise _nonsense(f"unknown word {value!r:.80}", line)
    return found


def _error(data: object, line: bytes) -> CachedError:
    if not isinstance(data, dict) or set(data) != {"reason", "message", "hint", "fields", "causes"}:
        raise _nonsense("not an error", line)
    fields = data["fields"]
    if not isinstance(fields, dict) or {"message", "hint"} & set(fields) or not isinstance(data["causes"], list):
        raise _nonsense("not an error", line)
    return CachedError.from_dict(data)


_Convert = Callable[[object, bytes], object]


def _build(kind: type, data: object, line: bytes) -> object:
    converters = _converters(kind)
    if not isinstance(data, dict) or data.keys() != converters.keys():
        raise _nonsense(f"fields of {kind.__name__} are wrong", line)
    return kind(**{name: convert(data[name], line) for name, convert in converters.items()})


@cache
def _converters(kind: type) -> dict[str, _Convert]:
    """By field. Found once for each type: looking at annotations takes longer than all the rest."""
    hints = get_type_hints(kind)
    return {field.name: _converter(hints[field.name]) for field in dataclasses.fields(kind)}


def _converter(hint: Any) -> _Convert:
    origin = get_origin(hint)
    if origin in (types.UnionType, Union):
        some = _converter(next(arm for arm in get_args(hint) if arm is not type(None)))
        optional = type(None) in get_args(hint)
        return lambda value, line: None if optional and value is None else some(value, line)
    if dataclasses.is_dataclass(hint):
        return lambda value, line: _build(cast("type", hint), value, line)
    if origin is tuple:
        item = _converter(get_args(hint)[0])
        return lambda value, line: tuple(item(entry, line) for entry in _checked(value, list, hint, line))
    if origin is Mapping:
        return lambda value, line: _texts(value, hint, line)
    return lambda value, line: value if type(value) is hint else _checked(value, hint, hint, line)


def _texts(value: object, hint: Any, line: bytes) -> object:
    texts = _checked(value, dict, hint, line)
    for entry in texts.values():
        _checked(entry, str, hint, line)
    return texts


def _checked(value: object, kind: type, hint: Any, line: bytes) -> Any:
    if type(value) is not kind:
        raise _nonsense(f"{value!r:.80} is not a {hint}", line)
    return value


def _nonsense(what: str, line: bytes) -> MoverError:
    return MoverError(f"not understood on the mover's pipe: {what}", line=repr(line[:200]))
