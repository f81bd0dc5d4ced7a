"""Pages in a process of their own: `PageServer` starts `page_server.py`, which serves them on request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
STAGE_ADAPTERS = ("lora", "dora", "mix")


class PageServer:
    """A process that serves pages for as long as the `with` block lasts.

    Args:
        environment: variables of the process.
    """

    def __init__(self, **environment: str) -> None:
        self._environment = {"OMP_NUM_THREADS": "1", **environment}
        self._environment["PYTHONPATH"] = f"{TESTS.parent}{os.pathsep}{TESTS}"

    def __enter__(self) -> PageServer:
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "demo" / "page_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | self._environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait(timeout=30)
        self.process.stdout.close()

    def ask(self, **request: Any) -> Any:
        """Send a request and return the answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        lines = iter(self.process.stdout.readline, "")
        for line in lines:
            if line.startswith(("[", "{", '"')) or line.strip().isdigit():
                return json.loads(line)
        raise AssertionError("the page server ended; see its traceback above")

    def serve(self, page: str, **arguments: Any) -> Served:
        """Serve a page; see the functions of `page_server.py`."""
        return Served(self, self.ask(serve=page, **arguments))


class Served:
    """A page that is served.

    Attributes:
        address: of the page.
    """

    def __init__(self, server: PageServer, address: str) -> None:
        self.server, self.address = server, address

    def forwards(self) -> int:
        """Return how many forwards its engine has computed."""
        return self.server.ask(forwards=self.address)

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
