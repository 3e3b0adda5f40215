"""One client for all models of a store: making one takes a tenth of a second of processor time and 10 MB."""

from __future__ import annotations

import os
import threading

from cached.origins.s3.client import Connection
from cached.origins.s3.objects import Objects
from cached.origins.s3.options import S3Options

_Key = tuple[S3Options, frozenset[tuple[str, str]]]


class SharedConnection:
    """A connection and what was learned over it, for every origin of the same options. Thread-safe."""

    def __init__(self, options: S3Options, key: _Key) -> None:
        self.key = key
        self.connection = Connection(options)
        self.users = 0
        self._lock = threading.Lock()
        self._objects: dict[str, Objects] = {}

    def objects(self, bucket: str) -> Objects:
        """Those of a bucket."""
        with self._lock:
            found = self._objects.get(bucket)
            if found is None:
                found = self._objects[bucket] = Objects(self.connection)
            return found


class SharedConnections:
    """The connections of this process by all that makes them, each closed with its last user. Thread-safe.

    Beside their options that is the AWS environment, which botocore reads.

    One that a server denied access goes on for those who have it, and no one else gets it: credentials change.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[_Key, SharedConnection] = {}

    def take(self, options: S3Options) -> SharedConnection:
        """To be given back. Raises InvalidRequestError as `Connection` does."""
        aws = (item for item in os.environ.items() if item[0].startswith("AWS_"))  # noqa: TID251 - botocore reads these
        key = options, frozenset(aws)
        with self._lock:
            shared = self._open.get(key)
            if shared is None or shared.connection.denied:
                shared = self._open[key] = SharedConnection(options, key)
            shared.users += 1
            return shared

    def give_back(self, shared: SharedConnection) -> None:
        """Its user needs it no more."""
        with self._lock:
            shared.users -= 1
            unused = not shared.users
            if unused and self._open.get(shared.key) is shared:
                del self._open[shared.key]
        if unused:
            shared.connection.client.close()


CONNECTIONS = SharedConnections()
"""Of this process."""
