"""Headers of safetensors files, hostile and not: a corpus with verdicts, and a fuzzer that compares with the reference.

``corpus/NAME.safetensors`` are whole files, ``verdicts.json`` says of each what we say (``says``: a part of the error),
and what the reference library says. What fuzzing finds is added to both, by hand.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Verdict:
    """``verdict`` and ``reference``: accepted or refused, by us and by the reference library."""

    name: str
    verdict: str
    reference: str
    says: str = ""

    @property
    def content(self) -> bytes:
        return (_HERE / "corpus" / f"{self.name}.safetensors").read_bytes()


def corpus() -> list[Verdict]:
    told = json.loads((_HERE / "verdicts.json").read_text())
    assert sorted(told) == sorted(path.stem for path in (_HERE / "corpus").iterdir())
    return [Verdict(name, **entry) for name, entry in told.items()]
