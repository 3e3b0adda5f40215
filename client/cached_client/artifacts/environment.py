"""The key of this process's environment: everything that compiled code may depend on, found without importing torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cached_client.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_SMI_TIMEOUT_S = 20.0
_SMI_QUERY: tuple[str, ...] = ("index", "uuid", "name", "compute_cap", "driver_version")
_NOTABLE_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "asimd", "sve", "sve2")


def environment_key(
    model: str,
    engine: str,
    *,
    revision: str = "",
    engine_version: str = "",
    device: str = "auto",
    **extra: str,
) -> dict[str, str]:
    """What has to be equal for compiled code to be used again, as a flat dictionary of texts.

    ``model`` and ``engine`` are names of your choice; ``engine_version`` is that of the installed package ``engine``
    unless it is given. ``device``: ``cpu`` leaves the GPU out, ``cuda`` requires one, ``auto`` takes one that is
    visible (CUDA_VISIBLE_DEVICES counts). ``extra`` adds fields (dtype, tensor-parallel size, …) or replaces one found
    here; an empty text removes it. Raises ValueError for another device, or ``cuda`` without one, and
    InvalidRequestError for a value that is no text.

    Fields: model, revision, engine, engine_version, python (implementation and ABI), torch, triton, cuda (torch's),
    libc, machine, cpu (what the processor can do, with a digest of all its flags), gpu, gpu_arch, driver.
    """
    if device not in {"auto", "cpu", "cuda"}:
        msg = f"{device!r} is not a device; use auto, cpu or cuda"
        raise ValueError(msg)
    check_texts(extra)
    found = {
        "model": model,
        "revision": revision,
        "engine": engine,
        "engine_version": engine_version or _version(engine),
        "python": f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}",
        "torch": _version("torch"),
        "triton": _version("triton"),
        "cuda": _torch_cuda(),
        "libc": "-".join(platform.libc_ver()).strip("-"),
        "machine": platform.machine(),
        "cpu": _cpu(),
    }
    if device != "cpu":
        gpus = _gpus()
        if not gpus and device == "cuda":
            msg = "there is no CUDA device to be seen here: nvidia-smi lists none"
            raise ValueError(msg)
        found |= _of_gpus(gpus)
    return {name: value for name, value in {**found, **extra}.items() if value}


def check_texts(key: Mapping[str, str]) -> None:
    """Raises InvalidRequestError unless names and values are texts: gRPC says of another only that it is a bad one.

    What else a key needs is the daemon's to say.
    """
    for name, value in key.items():
        if not _is_text(name) or not _is_text(value):
            raise InvalidRequestError(
                f"{name!r} of the key of a compile artifact is {value!r}, which is no text",
                hint='a key is a flat dictionary of texts: write {"tp": "2"}',
                value=value,
            )


def _is_text(value: object) -> bool:
    """Whether it can be sent as one: half a surrogate pair cannot."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _torch_cuda() -> str:
    """The CUDA version that torch was built for, from the file that says it: torch itself takes seconds to import."""
    spec = importlib.util.find_spec("torch") if "torch" not in sys.modules else sys.modules["torch"].__spec__
    if spec is None or not spec.origin:
        return ""
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([0-9.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else "none"


def _cpu() -> str:
    """``-march=native`` may use every flag, so all of them count; a few are shown."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    flags = sorted(set(match[1].split())) if match else []
    digest = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:12]
    return " ".join([*(flag for flag in _NOTABLE_FLAGS if flag in flags), f"flags:{digest}"])


def _gpus() -> list[dict[str, str]]:
    """The GPUs that this process may see, as nvidia-smi tells: asking CUDA would initialise it."""
    smi = shutil.which("nvidia-smi")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if smi is None or (visible is not None and visible.strip() in {"", "-1", "NoDevFiles"}):
        return []
    try:
        answer = subprocess.run(  # noqa: S603 no part of it is from elsewhere
            [smi, f"--query-gpu={','.join(_SMI_QUERY)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    if answer.returncode:
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    gpus = [dict(zip(_SMI_QUERY, row, strict=True)) for row in rows if len(row) == len(_SMI_QUERY)]
    if visible is None:
        return gpus
    wanted = [word.strip() for word in visible.split(",")]
    return [gpu for gpu in gpus if any(_is_meant(gpu, word) for word in wanted)]


def _is_meant(gpu: Mapping[str, str], word: str) -> bool:
    return word == gpu["index"] or (not word.isdecimal() and bool(word) and gpu["uuid"].startswith(word))


def _of_gpus(gpus: list[dict[str, str]]) -> dict[str, str]:
    """Kinds that are there, not how many: ranks of one kind share what they compile."""
    return {
        "gpu": _kinds(gpu["name"] for gpu in gpus),
        "gpu_arch": _kinds(f"sm_{gpu['compute_cap'].replace('.', '')}" for gpu in gpus),
        "driver": _kinds(gpu["driver_version"] for gpu in gpus),
    }


def _kinds(values: Iterable[str]) -> str:
    return " + ".join(sorted(set(values)))
