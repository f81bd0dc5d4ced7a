"""Show the stages of a long command on stderr: a spinner with its time, and a line for each finished stage."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.status import Status


class Stages:
    """Stages of a long command, one after the other.

    with Stages(shown=True) as stages:
        stages.start("Building")
        stages.start("Checking")        # ends the one before
    """

    def __init__(self, shown: bool) -> None:
        # None, because the spinner of a quiet console would still run in a thread.
        self._console = Console(stderr=True, highlight=False) if shown else None
        self._status: Status | None = None

    def __enter__(self) -> Stages:
        """Return self; `start` begins the first stage."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the current stage; a failed stage prints no line, because the error is printed."""
        if kind is None:
            self.end()
        elif self._status is not None:
            self._status.stop()

    def start(self, name: str) -> None:
        """End the current stage, and begin another."""
        self.end()
        if self._console is not None:
            self._name, self._started = name, time.perf_counter()
            self._status = self._console.status(f"{name} …")
            self._status.start()

    def end(self) -> None:
        """End the current stage, if any."""
        if self._console is not None and self._status is not None:
            self._status.stop()
            self._console.print(f"✓ {self._name} ({time.perf_counter() - self._started:.1f} s)")
            self._status = None
