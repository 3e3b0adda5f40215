"""Which file of a model holds which tensor, as far as the files' headers have arrived."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from cached_client._selected import left_out
from cached_client.errors import FormatError, NotFoundError
from cached_client.patterns import INDEX_PATH, WEIGHTS_SUFFIX, weight_files
from cached_client.safetensors_header import LENGTH_BYTES, Header, TensorInfo, header_length, parse_header
from cached_client.weight_map import files_named_by

if TYPE_CHECKING:
    from cached_client._arrivals import Arrivals, Deadline
    from cached_client._selected import Selected


class TensorIndex:
    """Tensor names of a model, read from the header of each of its weight files.

    The weight files are those that ``model.safetensors.index.json`` names; without it every ``*.safetensors`` at the
    top of the model; without any there, all of them. So a repository that carries its weights twice (say, in its
    maker's own layout too) is read once. Any thread may use it.
    """

    def __init__(self, arrivals: Arrivals, selected: Selected | None = None) -> None:
        """``selected``: the model has these tensors and no others; nothing has to be read for that."""
        self._arrivals = arrivals
        self._selected = selected
        self._paths = [info.path for info in arrivals.infos()]
        self._lock = threading.Lock()
        self._weight_files: list[int] | None = None
        self._headers: dict[int, Header] = {}
        self._file_of: dict[str, int] = {}

    def weight_files(self) -> list[int] | None:
        """Indices of the weight files in the order of their paths; None while the model's index has not arrived."""
        if self._weight_files is None:
            self._weight_files = self._choose() if self._selected is None else list(self._selected.headers)
        return self._weight_files

    def header(self, file_index: int) -> Header | None:
        """The header of a weight file, None while it has not arrived. Raises FormatError."""
        if file_index not in self._headers:
            header = self._read(file_index)
            if header is None:
                return None
            self._register(file_index, header)
        return self._headers[file_index]

    def find(self, name: str, deadline: Deadline) -> tuple[int, TensorInfo]:
        """The file and place of a tensor; waits for headers. Raises NotFoundError once every header lacks it."""
        return self._arrivals.wait_for(lambda: self._try_find(name), deadline, f"the header that lists {name!r}")

    def tensors(self, deadline: Deadline) -> dict[str, tuple[int, TensorInfo]]:
        """All tensors, in the order of files and bytes; waits for every header."""
        headers = self._arrivals.wait_for(self._all_headers, deadline, "the headers of the weight files")
        return {name: (index, info) for index, header in headers.items() for name, info in header.tensors.items()}

    def names(self, deadline: Deadline) -> list[str]:
        """The names of `tensors`."""
        headers = self._arrivals.wait_for(self._all_headers, deadline, "the headers of the weight files")
        return [name for header in headers.values() for name in header.tensors]

    def _try_find(self, name: str) -> tuple[int, TensorInfo] | None:
        if name not in self._file_of and self._all_headers() is not None and name not in self._file_of:
            if self._selected is not None:
                raise left_out("tensor", name)
            raise NotFoundError(f"the model has no tensor {name!r}", hint="names() lists its tensors", tensor=name)
        index = self._file_of.get(name)
        return None if index is None else (index, self._headers[index].tensors[name])

    def _all_headers(self) -> dict[int, Header] | None:
        """The headers by file, or None while one is missing; those that have arrived are read in any case."""
        files = self.weight_files()
        if files is None:
            return None
        headers = {index: header for index in files if (header := self.header(index)) is not None}
        return headers if len(headers) == len(files) else None

    def _read(self, file_index: int) -> Header | None:
        if self._selected is not None:
            return self._selected.headers[file_index]
        size_bytes = self._arrivals.infos()[file_index].size_bytes
        path = self._paths[file_index]
        first = self._arrivals.view(file_index, 0, min(LENGTH_BYTES, size_bytes))
        if first is None:
            return None
        prefix_bytes = LENGTH_BYTES + header_length(first, size_bytes, path=path)
        prefix = self._arrivals.view(file_index, 0, prefix_bytes)
        return None if prefix is None else parse_header(prefix, size_bytes, path=path)

    def _register(self, file_index: int, header: Header) -> None:
        with self._lock:
            if file_index in self._headers:
                return
            if not self._file_of.keys().isdisjoint(header.tensors):
                name = next(name for name in header.tensors if name in self._file_of)
                first, second = self._paths[self._file_of[name]], self._paths[file_index]
                raise FormatError(
                    f"the tensor {name!r} is in {first} and in {second}",
                    hint="choose one set of weight files with include and exclude patterns in the catalog",
                    path=second,
                    tensor=name,
                )
            self._headers[file_index] = header
            self._file_of.update(dict.fromkeys(header.tensors, file_index))

    def _choose(self) -> list[int] | None:
        named: set[str] = set()
        weights = {path for path in self._paths if path.endswith(WEIGHTS_SUFFIX)}
        if INDEX_PATH in self._paths and weights:
            file_index = self._paths.index(INDEX_PATH)
            content = self._arrivals.view(file_index, 0, self._arrivals.infos()[file_index].size_bytes)
            if content is None:
                return None
            named = files_named_by(bytes(content))
            missing = sorted(named - weights)
            if missing and named & weights:
                raise FormatError(
                    f"{INDEX_PATH} names {missing[0]!r}, which the model does not have",
                    hint="the model is incomplete at its origin, or its selection leaves the file out",
                    path=INDEX_PATH,
                )
        return [self._paths.index(path) for path in weight_files(self._paths, named)]
