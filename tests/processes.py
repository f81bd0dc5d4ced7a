"""Python in a process of its own, an address where nobody answers, and waiting for what another thread does."""

from __future__ import annotations

import gc
import multiprocessing.connection
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

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


def free_port() -> int:
    """Return a port of this machine that is free."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


class Forked:
    """Processes that are forked from one which has imported what training needs and has done nothing else.

    Importing torch, transformers and TRL takes much longer than a tiny run. What is said about importing or about the
    command line needs `run_python` or a command.

    Args:
        said: file that receives what they write to stdout and stderr.
    """

    def __init__(self, said: Path) -> None:
        self.said = said
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([f"minilora_hub.training.{name}" for name in ("run", "trainer", "loop")])

    def run(self, function: Callable, *arguments: object, seconds: float = 300.0) -> int:
        """Call a function of a module in a process; its exit status as `subprocess` returns it."""
        return self._ended([self._started(function, arguments)], seconds)

    def run_two(self, function: Callable, *arguments: object, seconds: float = 300.0) -> int:
        """Call it in two processes that meet as torchrun's do; 0, or the exit status of the first to fail."""
        group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        group["MASTER_PORT"] = str(free_port())
        processes = [self._started(function, arguments, **group, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
        return self._ended(processes, seconds)

    def _started(self, function: Callable, arguments: tuple, **environment: str) -> BaseProcess:
        process = self._context.Process(target=_call, args=(self.said, os.environ | environment, function, arguments))
        process.start()
        return process

    @staticmethod
    def _ended(processes: list[BaseProcess], seconds: float) -> int:
        running, end = {process.sentinel: process for process in processes}, time.monotonic() + seconds
        try:
            while running:
                ended = multiprocessing.connection.wait([*running], max(end - time.monotonic(), 0))
                if not ended:
                    raise TimeoutError(f"a process still runs after {seconds} s")
                for sentinel in ended:
                    process = running.pop(sentinel)
                    process.join()
                    if process.exitcode:
                        return process.exitcode
            return 0
        finally:
            for process in processes:
                process.kill()
                process.join()


def _call(said: Path, environment: dict[str, str], function: Callable, arguments: tuple) -> None:
    """What each process does."""
    with said.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    gc.freeze()  # as in conftest.py
    function(*arguments)
