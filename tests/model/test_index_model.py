"""The index against dictionaries, over restarts, transactions that fail, and a database that is locked at times."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cached.errors import LevelError
from cached.index import Index, ModelRecord
from cached.manifest import BlobRecord

NAMES = st.sampled_from(["a", "b", "c"])
DIGESTS = NAMES.map(lambda letter: letter * 64)


class UndoneError(Exception):
    pass


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.index = Index(self.folder / "index")
        self.models: dict[str, ModelRecord] = {}
        self.blobs: dict[str, BlobRecord] = {}
        self.other: sqlite3.Connection | None = None

    def write(self, *, model: ModelRecord | str | None = None, blob: BlobRecord | str | None = None) -> None:
        """One or two writes as one; a string deletes."""
        with self.index.transact():
            if isinstance(model, ModelRecord):
                self.index.put_model(model)
            elif model is not None:
                self.index.delete_model(model)
            if isinstance(blob, BlobRecord):
                self.index.put_blob(blob)
            elif blob is not None:
                self.index.delete_blob(blob)

    @rule(
        model=st.none() | NAMES | st.builds(ModelRecord, NAMES, attach_count=st.integers(0, 5)),
        blob=st.none()
        | DIGESTS
        | st.builds(BlobRecord, DIGESTS, st.just(1), st.integers(0, 9).map(lambda crc: (crc,))),
    )
    def change(self, model: ModelRecord | str | None, blob: BlobRecord | str | None) -> None:
        try:
            self.write(model=model, blob=blob)
        except LevelError:
            assert self.other is not None
        if isinstance(model, ModelRecord):
            self.models[model.name] = model
        elif model is not None:
            self.models.pop(model, None)
        if isinstance(blob, BlobRecord):
            self.blobs[blob.digest] = blob
        elif blob is not None:
            self.blobs.pop(blob, None)

    @rule(name=NAMES, digest=DIGESTS)
    def undo(self, name: str, digest: str) -> None:
        with pytest.raises(UndoneError), self.index.transact():
            self.write(model=ModelRecord(name, attach_count=77), blob=digest)
            self.write(model=name, blob=BlobRecord(digest, 0, ()))
            raise UndoneError

    @rule()
    def lock(self) -> None:
        if self.other is None:
            self.other = sqlite3.connect(self.folder / "index" / "cache.db", isolation_level=None)
            self.other.execute("BEGIN IMMEDIATE")
            self.index._store._cache._timeout = 0
            self.index._store._cache.close()

    @rule()
    def unlock(self) -> None:
        if self.other is not None:
            self.other.execute("ROLLBACK")
            self.other.close()
            self.other = None
            self.index.flush()

    @rule()
    def restart(self) -> None:
        self.unlock()
        self.index.close()
        self.index = Index(self.folder / "index")
        assert self.index.warnings == []

    @invariant()
    def agrees(self) -> None:
        assert {record.name: record for record in self.index.models()} == self.models
        assert {record.digest: record for record in self.index.blobs()} == self.blobs

    def teardown(self) -> None:
        self.restart()
        self.agrees()
        self.index.close()
        shutil.rmtree(self.folder)


IndexMachine.TestCase.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestIndex = IndexMachine.TestCase
