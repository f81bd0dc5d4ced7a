"""Python in a process of its own, and an address where nobody answers."""

import os
import subprocess
import sys

NOWHERE = "http://127.0.0.1:9"  # the discard port: refuses connections


def silent(what: str, done: int, total: int) -> None:
    """Report no progress."""


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
