"""``cached serve`` as the unit runs it, as far as a process can do that to itself; and its loop can be held up.

python -m tests.integration.service_process serve …: no new privileges, no memory that is writable and executable, in
the movers too. SIGUSR2 holds the main thread, and with it the loop, until somebody opens the FIFO that HOLD names and
closes it again; all other threads go on.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from types import FrameType

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_MDWE = 65
_PR_MDWE_REFUSE_EXEC_GAIN = 1


def hold_the_loop(_number: int, _frame: FrameType | None) -> None:
    with open(os.environ["HOLD"], "rb") as fifo:
        fifo.read()


def enter_sandbox() -> None:
    """What of the unit's sandbox needs no privilege; MDWE needs Linux 6.3, and is left out before that."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    libc.prctl(_PR_SET_MDWE, _PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)


if __name__ == "__main__":
    enter_sandbox()
    signal.signal(signal.SIGUSR2, hold_the_loop)
    from cached.cli.main import main

    sys.exit(main())
