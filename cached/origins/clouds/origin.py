"""CloudOrigin: listing, describing, reading and uploading objects of Google's and Azure's stores, through obstore."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from cached.errors import IntegrityError, InvalidRequestError, NotFoundError, OriginUnavailableError
from cached.origins.base import Abort, OriginObject, OriginSpec, ReadInto
from cached.origins.clouds.failures import CloudFailures
from cached.origins.clouds.places import (
    GoogleToken,
    content_url,
    google_checksum,
    import_obstore,
    open_store,
    parse_place,
)
from cached.origins.net.reading import read_nothing
from cached.origins.net.session import Session
from cached.refs import check_path

T = TypeVar("T")
_PIECE_BYTES = 1 << 20
_PART_BYTES = 16 << 20
_WHOLE_BYTES = 2 * _PART_BYTES
_MAX_PARTS = 9_000
_UPLOAD_RETRIES = 5
_VERSION = ";version:"


class CloudOrigin:
    """See Origin and WritableOrigin. One may be used by any number of threads.

    Options: GS_OPTIONS and AZ_OPTIONS. Credentials are found by google-auth, or by obstore in Azure's usual places.
    """

    def __init__(self, spec: OriginSpec) -> None:
        self._place = parse_place(spec)
        self._failures = CloudFailures(self._place)
        self._token = GoogleToken(self._place) if self._place.scheme == "gs" and not self._place.anonymous else None
        self._lock = threading.Lock()
        self._store: Any = None
        self._session: Session | None = None
        self._loop: _LoopThread | None = None
        self._one_object: bool | None = False if self._place.only_prefix else None

    def prepare(self) -> None:
        """See Origin."""
        self._opened()

    def list_objects(self) -> list[OriginObject]:
        """See Origin."""
        found = self._list()
        if found:
            return sorted((self._listed(meta) for meta in found), key=lambda item: item.path)
        if not self._place.only_prefix:
            return [_described(check_path(self._place.last_part), self._head(self._place.key, ""))]
        raise self._failures.missing("")

    def stat(self, path: str) -> OriginObject:
        """See Origin. Google tells a CRC32C of each object; of Azure's MD5, which is optional there, no use is made."""
        key = self._key(path)
        item = _described(path, self._head(key, path))
        if self._place.scheme != "gs":
            return item
        answer = self._heads().head(content_url(self._place, key), path)
        checksum = google_checksum(answer.headers.get("x-goog-hash", ""))
        generation = answer.headers.get("x-goog-generation", "")
        if checksum is None or generation != item.version.partition(_VERSION)[2]:
            return item
        return OriginObject(path, item.size_bytes, item.version, (checksum,))

    @contextmanager
    def open_range(
        self, item: OriginObject, offset_bytes: int, length_bytes: int, abort: Abort | None = None
    ) -> Iterator[ReadInto]:
        """See Origin. A range without bytes costs a HEAD."""
        key = self._key(item.path)
        if not length_bytes:
            self._check_version(item, self._head(key, item.path))
            yield read_nothing
            return
        end_bytes = offset_bytes + length_bytes
        asked = f"bytes={offset_bytes}-{end_bytes - 1}"
        etag, _, version = item.version.partition(_VERSION)
        options: dict[str, Any] = {"range": (offset_bytes, end_bytes)}
        options |= {"version": version} if version and self._place.scheme == "gs" else {"if_match": f'"{etag}"'}
        read = _Read(self._looped(), self._failures, item.path, abort)
        store = self._ready()
        try:
            answer = read.wait(lambda: import_obstore().get_async(store, key, options=options))
        except NotFoundError:
            # Google has no such generation any more: is the object there?
            self._check_version(item, self._head(key, item.path))
            raise
        except import_obstore().exceptions.PreconditionError:
            raise self._failures.changed(item.path, item.version, "another version") from None
        except OriginUnavailableError as error:
            if error.fields["cause"] == "416":
                raise self._failures.changed(item.path, item.version, "a shorter object") from None
            raise
        self._check_version(item, answer.meta)
        if tuple(answer.range) != (offset_bytes, end_bytes) or answer.meta["size"] != item.size_bytes:
            found = f"bytes {answer.range[0]}-{answer.range[1] - 1}/{answer.meta['size']}"
            raise self._failures.wrong_range(item.path, asked, f"it is {found}")
        read.begin(answer, asked, length_bytes)
        yield read.into
        read.finish()

    def upload_file(self, local_path: Path, path: str, progress: Callable[[int], None] | None = None) -> OriginObject:
        """See WritableOrigin. For az:// only. What is stored is compared by size."""
        key = f"{self._place.base}{check_path(path)}"
        if not local_path.is_file():
            raise NotFoundError(f"{local_path} is not a file", hint="name a file that is there", path=local_path)
        store = open_store(self._place, self._token, retries=_UPLOAD_RETRIES)
        sent = _Sent(local_path, progress)
        with self._failures.typed(path):
            if (size_bytes := local_path.stat().st_size) > _WHOLE_BYTES:
                import_obstore().put(store, key, sent.pieces(), chunk_size=max(_PART_BYTES, size_bytes // _MAX_PARTS))
            else:
                import_obstore().put(store, key, b"".join(sent.pieces()), use_multipart=False)
        with self._lock:
            self._one_object = False
        stored = self.stat(path)
        sent.compare(stored)
        return stored

    def close(self) -> None:
        """See Origin. A later call connects anew."""
        with self._lock:
            loop, self._loop, self._store = self._loop, None, None
            session, self._session = self._session, None
        if loop is not None:
            loop.close()
        if session is not None:
            session.close()

    def _opened(self) -> Any:
        with self._lock:
            if self._store is None:
                self._store = open_store(self._place, self._token, retries=0)
            return self._store

    def _ready(self) -> Any:
        """The store, with credentials that are good for now: what is wrong with them obstore could not tell."""
        if self._token is not None:
            self._token()
        return self._opened()

    def _looped(self) -> _LoopThread:
        with self._lock:
            if self._loop is None:
                self._loop = _LoopThread()
            return self._loop

    def _heads(self) -> Session:
        """For what obstore does not tell of an object."""
        with self._lock:
            if self._session is None:
                authorization = self._token.header if self._token else str
                self._session = Session(
                    self._place.net, self._failures, home=self._place.endpoint, authorization=authorization
                )
            return self._session

    def _list(self, limit: int = 0) -> list[Any]:
        found: list[Any] = []
        with self._failures.typed(""):
            for page in import_obstore().list(self._ready(), prefix=self._place.key or None):
                found.extend(
                    meta for meta in page if not meta["path"].endswith("/") and meta["path"] != self._place.key
                )
                if limit and found:
                    break
        return found

    def _listed(self, meta: Any) -> OriginObject:
        key = str(meta["path"])
        try:
            return _described(check_path(key.removeprefix(self._place.base)), meta)
        except InvalidRequestError as error:
            raise InvalidRequestError(
                f"the key {key[:200]!r} in {self._place.container!r} cannot be a file of a model: {error}",
                hint=f"rename or remove that object; {error.hint}",
                value=key[:200],
            ) from error

    def _head(self, key: str, path: str) -> Any:
        with self._failures.typed(path):
            return import_obstore().head(self._ready(), key)

    def _key(self, path: str) -> str:
        check_path(path)
        if path == self._place.last_part and self._is_one_object():
            return self._place.key
        return f"{self._place.base}{path}"

    def _is_one_object(self) -> bool:
        """Whether the URI names one object; asked once, and only where a path could mean both."""
        if self._one_object is None:
            one = not self._list(limit=1)
            with self._lock:
                self._one_object = one
        return bool(self._one_object)

    def _check_version(self, item: OriginObject, meta: Any) -> None:
        expected_etag, _, expected = item.version.partition(_VERSION)
        found_etag, _, found = _marker(meta).partition(_VERSION)
        if expected_etag != found_etag or (expected and found and expected != found):
            raise self._failures.changed(item.path, item.version, _marker(meta))


class _LoopThread:
    """An event loop in a thread of its own: obstore's calls can be given up there, and nowhere else."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="clouds", daemon=True)
        self._thread.start()

    def wait(self, work: Coroutine[Any, Any, T], abort: Abort | None) -> T:
        """The result. Raises concurrent.futures.CancelledError after an abort."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)

        def cancel() -> None:
            future.cancel()

        with abort.calling(cancel) if abort else nullcontext():
            return future.result()

    def close(self) -> None:
        """Nothing may be waited for any more."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Read:
    """One range, as its pieces come."""

    def __init__(self, loop: _LoopThread, failures: CloudFailures, path: str, abort: Abort | None) -> None:
        self._loop = loop
        self._failures = failures
        self._path = path
        self._abort = abort
        self._stream: Any = None
        self._piece = memoryview(b"")
        self._asked = ""
        self._length_bytes = 0
        self._done_bytes = 0

    def wait(self, call: Callable[[], Any]) -> Any:
        """The result of a call of obstore's. Raises CachedError, and obstore's PreconditionError."""
        try:
            return self._loop.wait(_awaited(call), self._abort)
        except CancelledError:
            raise self._failures.make(
                OriginUnavailableError, "the read was given up", self._path, cause="aborted", hint="try again"
            ) from None
        except import_obstore().exceptions.PreconditionError:
            raise
        except Exception as error:  # noqa: BLE001 `told` raises again what is none of obstore's
            raise self._failures.told(error, self._path) from None

    def begin(self, answer: Any, asked: str, length_bytes: int) -> None:
        """The answer is the right one."""
        self._stream = answer.stream(min_chunk_size=_PIECE_BYTES)
        self._asked = asked
        self._length_bytes = length_bytes

    def into(self, view: memoryview) -> None:
        """See ReadInto."""
        at = 0
        while at < len(view):
            if not self._piece:
                self._next()
            count = min(len(view) - at, len(self._piece))
            view[at : at + count] = self._piece[:count]
            self._piece = self._piece[count:]
            at += count
        self._done_bytes += at

    def finish(self) -> None:
        """Raises if more comes than was asked for, or something was broken at the end."""
        if self._done_bytes == self._length_bytes and (
            self._piece or self.wait(lambda: anext(self._stream, None)) is not None
        ):
            raise self._failures.wrong_range(self._path, self._asked, "it has more bytes than were asked for")

    def _next(self) -> None:
        piece = self.wait(lambda: anext(self._stream, None))
        if piece is None:
            problem = f"the body ended after {self._done_bytes} of {self._length_bytes} bytes"
            raise self._failures.wrong_range(self._path, self._asked, problem)
        self._piece = memoryview(piece)


async def _awaited(call: Callable[[], Any]) -> Any:
    return await call()  # obstore begins its work in the running loop


class _Sent:
    """A file on its way up."""

    def __init__(self, local_path: Path, progress: Callable[[int], None] | None) -> None:
        self._local_path = local_path
        self._progress = progress
        self._size_bytes = 0

    def pieces(self) -> Iterator[bytes]:
        """Its content, counted."""
        with self._local_path.open("rb") as file:
            while piece := file.read(_PART_BYTES):
                self._size_bytes += len(piece)
                yield piece
                if self._progress is not None:
                    self._progress(len(piece))

    def compare(self, stored: OriginObject) -> None:
        """Raises IntegrityError unless what is stored has the size of what was read."""
        if stored.size_bytes != self._size_bytes:
            raise IntegrityError(
                f"{stored.path} has {stored.size_bytes} bytes after the upload of {self._size_bytes}",
                hint="something else wrote there meanwhile; upload it again",
                path=stored.path,
                check="size",
                expected=self._size_bytes,
                found=stored.size_bytes,
            )


def _marker(meta: Any) -> str:
    """ETag and, where it is told (Google's listings do not), version or generation."""
    etag = str(meta.get("e_tag") or "").removeprefix("W/").strip('"')
    etag = etag or f"modified:{meta['last_modified'].timestamp():.0f}"
    return f"{etag}{_VERSION}{meta['version']}" if meta.get("version") else etag


def _described(path: str, meta: Any) -> OriginObject:
    return OriginObject(path=path, size_bytes=int(meta["size"]), version=_marker(meta))
