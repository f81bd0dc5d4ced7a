"""Python in a process of its own, an address where nobody answers, and waiting for what another thread does."""

import os
import subprocess
import sys
import time

NOWHERE = "http://127.0.0.1:9"  # the discard port: refuses connections


def silent(what: str, done: int, total: int) -> None:
    """Report no progress."""


def wait_until(condition, seconds=30.0):
    """Wait for a condition, or fail."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
