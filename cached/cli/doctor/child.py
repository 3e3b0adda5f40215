"""Experiments run in child processes: a fresh interpreter, with an environment of their own, and a limit of time."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from cached.cli.doctor.checks import Context

CHILD_TIMEOUT_S = 120.0


def run_child(
    context: Context, code: str, arguments: Sequence[str] = (), environment: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """The JSON object that the code prints last. ``environment``: changes, None takes a variable away.

    Raises what ``run_python`` raises.
    """
    env = dict(context.environment)
    for name, value in (environment or {}).items():
        env.pop(name, None)
        if value is not None:
            env[name] = value
    return run_python(context.python, code, env, arguments)


def run_python(python: str, code: str, environment: Mapping[str, str], arguments: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON object that the code prints last.

    Raises ValueError, with the last line of what the child wrote to standard error, when it fails or takes too long,
    and OSError where there is no such interpreter.
    """
    try:
        done = subprocess.run(  # noqa: S603 the operator's own interpreter, and code from here
            [python, "-c", code, *arguments],
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=CHILD_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"an experiment took longer than {CHILD_TIMEOUT_S:g} s") from error
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ValueError(f"an experiment with {python} failed: {told[-1]}")
    try:
        found = dict(json.loads(done.stdout.strip().splitlines()[-1]))
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(f"an experiment with {python} printed no result") from error
    return found
