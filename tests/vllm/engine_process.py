"""vLLM's offline engine in a process of its own, for tests. Run by the Python that has vLLM::

    python engine_process.py ANSWERS_FD '{"model": ..., "load_format": ...}'

Standard input has one request a line, ``{"do": METHOD, ...}``; answers are JSON lines on the descriptor.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def zero(worker: Any) -> int:
    """Runs in each rank: sets every weight to zero; how many there were."""
    parameters = list(worker.model_runner.get_model().parameters())
    for parameter in parameters:
        parameter.data.zero_()
    return len(parameters)


class _Engine:
    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        settings = {"enforce_eager": True, "max_model_len": 128, "dtype": "float32", "seed": 0}
        self._llm = LLM(**settings | options)

    def generate(self, prompts: list[str], tokens: int) -> list[list[int]]:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return [list(done.outputs[0].token_ids) for done in self._llm.generate(prompts, parameters, use_tqdm=False)]

    def zero(self) -> list[int]:
        return self._llm.collective_rpc(zero)

    def reload(self, **options: Any) -> bool:
        self._llm.collective_rpc("reload_weights", kwargs=options)
        self._llm.reset_prefix_cache()
        return True


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w")
    engine = _Engine(json.loads(sys.argv[2]))
    answers.write('"ready"\n')
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(getattr(engine, request.pop("do"))(**request)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
