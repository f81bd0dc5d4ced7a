"""A page in a process of its own: tests/tiny_stand_ins.py, or another script of that kind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


class Serving:
    """A page over a base that never ends and two parrots, for as long as the `with` block lasts.

    Args:
        script: another page's, which takes the port and `arguments`.
        arguments: of the script.
        environment: variables of the process.
    """

    def __init__(self, script: str = "tiny_stand_ins.py", *arguments: str, **environment: str) -> None:
        self._command = [sys.executable, str(TESTS / script), str(free_port()), *arguments]
        self._environment = {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", **environment}

    def __enter__(self) -> Serving:
        self.process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | self._environment,
        )
        lines = iter(self.process.stdout.readline, "")
        self.address = next((line.strip() for line in lines if line.startswith("http")), "")
        if not self.address:
            self.__exit__()
            raise AssertionError("the page did not start; see its traceback above")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait(timeout=30)
        self.process.stdout.close()

    def ask(self, what: str) -> int:
        """Ask the running page for a number."""
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def forwards(self) -> int:
        """How many forwards the engine has computed."""
        return self.ask("forwards")

    def settled(self, within: float = 20.0) -> int:
        """Wait until the engine computes no more, and return its count of forwards."""
        before, deadline = self.forwards(), time.monotonic() + within
        while time.monotonic() < deadline:
            time.sleep(0.4)  # more than ten steps
            now = self.forwards()
            if now == before:
                return now
            before = now
        raise AssertionError("the engine still computes")
