"""A session's niceness where the kernel puts changes off, as it does for all but root: in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cached import priority

SESSION = Path("/proc/self/autogroup")
BUSY = """
import sys, threading, time
from pathlib import Path
from cached import priority

session = Path("/proc/self/autogroup")
for _ in range(500):  # for a tenth of a second from now on it is put off
    try:
        session.write_text("1")
        break
    except BlockingIOError:
        time.sleep(0.01)
else:
    sys.exit("this machine's kernel takes no change of anybody but root")
"""
pytestmark = pytest.mark.skipif(not SESSION.exists(), reason="the kernel has no groups of sessions")


def run_as_a_user(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BUSY + code]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv(1) of util-linux")
        command = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode and done.stderr.startswith("this machine's kernel"):
        pytest.skip(done.stderr.strip())
    assert not done.returncode, done.stderr
    return done


def test_a_change_that_is_put_off_is_made_later() -> None:
    done = run_as_a_user(f"""
priority.make_way({os.nice(0) + 7})
while any(thread.name == "nice" for thread in threading.enumerate()):
    time.sleep(0.01)
print(session.read_text(), end="")
""")
    assert done.stdout.endswith(f" nice {os.nice(0) + 7}\n")
    assert not done.stderr


def test_a_change_that_is_put_off_for_too_long_is_told() -> None:
    done = run_as_a_user("""
priority._ATTEMPTS, priority._AGAIN_S = 3, 0.001
priority._nice_session(7)
""")
    assert done.stderr == "this session was not given niceness 7: the kernel took too many others' meanwhile\n"


def test_an_old_kernel_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(priority, "_SESSION", str(tmp_path / "none" / "autogroup"))
    priority._nice_session(7)
    assert capfd.readouterr().err == ""
