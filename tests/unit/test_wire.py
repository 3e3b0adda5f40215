from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.errors import CachedError, IntegrityError, InvalidRequestError, MoverError, NoRoomError, all_errors
from cached.levels.base import FileRef
from cached.origins.base import OriginChecksum, OriginObject, OriginSpec
from cached.transfer import wire
from cached.transfer.jobs import (
    Checksum,
    Clear,
    Copy,
    Digests,
    Fetch,
    Hash,
    Hashed,
    Hedge,
    Listing,
    ListObjects,
    Moved,
    PartDigests,
    ReadTexts,
    StatObjects,
    Texts,
    Upload,
    Word,
)

sizes = st.integers(0, 2**63)
crcs = st.integers(0, 2**64 - 1)
seconds = st.floats(0, 1e9)
paths = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.binary().map(lambda raw: raw.decode("utf-8", "surrogateescape")),
)
texts = st.text(st.characters(exclude_categories=["Cs"]))
files = st.builds(FileRef, paths, sizes, sizes, st.booleans())
specs = st.builds(OriginSpec, texts, st.dictionaries(texts, texts))
checksums = st.builds(OriginChecksum, texts, texts, st.lists(sizes).map(tuple))
objects = st.builds(OriginObject, paths, sizes, texts, st.lists(checksums, max_size=3).map(tuple))

fetches = st.builds(Fetch, specs, objects, sizes, sizes, files)
jobs = st.one_of(
    st.builds(ListObjects, specs),
    st.builds(StatObjects, specs, st.lists(paths).map(tuple)),
    fetches,
    st.builds(Hedge, fetches),
    st.builds(Copy, files, files, sizes, sizes, st.none() | crcs),
    st.builds(Checksum, files, sizes, sizes),
    st.builds(Hash, texts, files, sizes, sizes, st.booleans()),
    st.builds(PartDigests, files, texts, st.lists(sizes).map(tuple)),
    st.builds(Clear, files),
    st.builds(Upload, specs, files, paths),
    st.builds(ReadTexts, specs, st.lists(objects, max_size=3).map(tuple), sizes),
)
results = st.one_of(
    st.builds(Listing, st.lists(objects, max_size=3).map(tuple)),
    st.builds(Moved, crcs, sizes, seconds, seconds),
    st.builds(Hashed, texts, sizes, seconds),
    st.builds(Digests, st.lists(texts).map(tuple)),
    st.builds(Texts, st.lists(texts).map(tuple)),
)
errors = st.builds(
    lambda kind, message, hint, fields: kind(message, hint=hint, **fields),
    st.sampled_from(sorted(all_errors().values(), key=lambda kind: kind.reason)),
    paths,
    texts,
    st.dictionaries(st.sampled_from(["path", "cause", "expected", "level"]), paths),
)


def is_one_line(line: bytes) -> bool:
    return line.endswith(b"\n") and line.count(b"\n") == 1 and line.isascii()


@given(sizes, jobs)
def test_a_job_survives_the_pipe(number, job):
    line = wire.encode_job(number, job)
    assert is_one_line(line)
    assert wire.decode_job(line) == (number, job)


@given(sizes)
def test_words_survive_the_pipe_their_own_way(number):
    for word in (Word.ABORT, Word.PROCEED):
        assert wire.decode_job(wire.encode_word(number, word)) == (number, word)
        with pytest.raises(MoverError):
            wire.decode_answer(wire.encode_word(number, word))
    assert wire.decode_answer(wire.encode_word(number, Word.ARRIVED)) == (number, Word.ARRIVED)
    with pytest.raises(MoverError):
        wire.decode_job(wire.encode_word(number, Word.ARRIVED))


@given(sizes, results)
def test_a_result_survives_the_pipe(number, result):
    line = wire.encode_result(number, result)
    assert is_one_line(line)
    assert wire.decode_answer(line) == (number, result)


@given(sizes, errors)
def test_an_error_arrives_as_its_own_type(number, error):
    line = wire.encode_error(number, error)
    assert is_one_line(line)
    found_number, found = wire.decode_answer(line)
    assert isinstance(found, CachedError)
    assert (found_number, type(found), found.to_dict()) == (number, type(error), error.to_dict())


def test_error_fields_keep_their_names_and_text():
    """As far as it can be written down: what is no text of a file's name is escaped."""
    _, found = wire.decode_answer(wire.encode_error(1, IntegrityError("bad", path="a\udcff", offset_bytes=16)))
    assert isinstance(found, IntegrityError)
    assert found.fields == {"path": r"a\udcff", "offset_bytes": "16"}
    _, found = wire.decode_answer(wire.encode_error(1, NoRoomError("full", hint="make room")))
    assert isinstance(found, NoRoomError)
    assert found.hint == "make room"


JOB = json.loads(wire.encode_job(7, Checksum(FileRef("/x", 1, 2, True), 0, 2)))
ANSWER = json.loads(wire.encode_result(7, Moved(1, 2, 0.5, 0.25)))


def changed(message, *path_and_value):
    copy = json.loads(json.dumps(message))
    *path, last, value = path_and_value
    place = copy
    for name in path:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(copy).encode() + b"\n"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"hello\n",
        b"\xff\xfe\n",
        b"[1]\n",
        b"[" * 100_000 + b"\n",
        b"null\n",
        wire.READY_LINE,
        changed(JOB, "id", "7"),
        changed(JOB, "id", True),
        changed(JOB, "kind", "Explode"),
        changed(JOB, "kind", ["Checksum"]),
        changed(JOB, "kind", "Moved"),
        changed(JOB, "kind", ...),
        changed(JOB, "extra", 1),
        changed(JOB, "job", None),
        changed(JOB, "job", "source", "/x"),
        changed(JOB, "job", "source", "memory", 1),
        changed(JOB, "job", "source", "inode", 1.0),
        changed(JOB, "job", "source", "path", None),
        changed(JOB, "job", "offset_bytes", ...),
        changed(JOB, "job", "other", 1),
    ],
)
def test_anything_else_is_no_job(line):
    with pytest.raises(MoverError):
        wire.decode_job(line)


@pytest.mark.parametrize(
    "line",
    [
        b"Traceback (most recent call last):\n",
        changed(ANSWER, "kind", "Checksum"),
        changed(ANSWER, "id", None),
        changed(ANSWER, "result", "crc64", "1"),
        changed(ANSWER, "result", "busy_s", ...),
        changed(ANSWER, "error", {}),
        b'{"id": 1, "error": {"reason": "INTEGRITY"}}\n',
        b'{"id": 1, "error": {"reason": "INTEGRITY", "message": "m", "hint": "", "fields": {"message": "twice"}}}\n',
        b'{"id": 1, "error": "failed"}\n',
    ],
)
def test_anything_else_is_no_answer(line):
    with pytest.raises(MoverError):
        wire.decode_answer(line)


def test_an_answer_that_is_too_long_is_refused_where_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = Listing((OriginObject("a" * 2000, 1, "v"),))
    monkeypatch.setattr(wire, "ANSWER_LIMIT_BYTES", 2000)
    with pytest.raises(InvalidRequestError, match=r"has \d+ bytes, and 2000 are the most: Listing") as caught:
        wire.encode_result(1, listing)
    assert not caught.value.retryable
    assert "folder" in caught.value.hint
