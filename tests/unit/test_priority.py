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
pytestmark = pytest.mark.skipif(not SESSION.exists(), reason="the kernel has no groups of sessions")


def run_as_a_user(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys, threading, time\nfrom cached import priority\n{code}"]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv(1) of util-linux")
        command = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", *command]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)


def test_a_change_that_is_put_off_is_made_later() -> None:
    done = run_as_a_user(f"""
open(priority._SESSION, "w").write("1")  # closed at once: for a tenth of a second from now on others are put off
priority.make_way({os.nice(0) + 7})
while any(thread.name == "nice" for thread in threading.enumerate()):
    time.sleep(0.01)
print(open(priority._SESSION).read(), end="")
""")
    if done.stderr:
        pytest.skip(f"others change sessions all the time on this machine: {done.stderr}")
    assert done.stdout.endswith(f" nice {os.nice(0) + 7}\n")


def test_a_change_that_is_put_off_for_too_long_is_told() -> None:
    """Each change that the kernel takes makes it put off the next."""
    done = run_as_a_user("""
priority._ATTEMPTS, priority._AGAIN_S = 3, 0.001
for _ in range(20):
    priority._nice_session(7)
""")
    told = set(done.stderr.splitlines())
    assert told == {"this session was not given niceness 7: the kernel took too many others' meanwhile"}


def test_an_old_kernel_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(priority, "_SESSION", str(tmp_path / "none" / "autogroup"))
    priority._nice_session(7)
    assert capfd.readouterr().err == ""
