"""A folder with a model's small files, for workers that do not see the daemon's directory view.

vLLM wants a directory: it reads the configuration and the tokenizer before any load format is asked. In a container
that has only the daemon's socket this makes one. The weights stay where they are.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cached_client.errors import CacheError
from cached_client.integrations.vllm.naming import STAGED_MARK
from cached_client.patterns import ANY_WEIGHTS_SUFFIX

if TYPE_CHECKING:
    from cached_client.attach import Model


def default_folder() -> Path:
    """This user's own, in the folder for temporary files: readable by nobody else."""
    folder = Path(tempfile.gettempdir()) / f"cached-vllm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise CacheError(f"{folder} belongs to somebody else", hint="remove it, or say where with --into")
    return folder


def stage(model: Model, into: Path, *, weights: bool = False, timeout_s: float | None = None) -> Path:
    """Copies a model's small files (with ``weights``, all) to ``into/NAME@REVISION``; returns that folder.

    Waits for those files only, which arrive first. What is there already is used. The folder appears whole, by a
    rename. It names the revision, so that the load format ``cached`` loads the weights of just that one. Raises
    CacheError.
    """
    ref = f"{model.name}@{model.revision}"
    folder = into / ref
    if (folder / STAGED_MARK).is_file() and not weights:
        return folder
    fresh = into / f".{secrets.token_hex(8)}"
    try:
        fresh.mkdir(mode=0o700, parents=True)
        for path in model.files:
            if weights or not path.endswith(ANY_WEIGHTS_SUFFIX):
                target = fresh / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(model.view(path, timeout_s))
        (fresh / STAGED_MARK).write_text(f"{ref}\n", encoding="utf-8")
        os.rename(fresh, folder)
    except OSError as error:
        if (folder / STAGED_MARK).is_file():
            return folder  # somebody else staged the same meanwhile
        raise CacheError(f"cannot stage {ref} in {into}: {error.strerror}", hint="say where with --into") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder
