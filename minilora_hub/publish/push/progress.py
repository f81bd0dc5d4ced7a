"""What is being done, shown on stderr: a spinner and its time, a line when it is through."""

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
        """Prepare; nothing is printed where `shown` is False."""
        # Not a quiet console: its spinner would still turn, in a thread of its own.
        self._console = Console(stderr=True, highlight=False) if shown else None
        self._status: Status | None = None
        self._name = ""

    def __enter__(self) -> Stages:
        """Nothing runs yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the stage that runs; a failed one leaves no line, the error has its own."""
        if kind is None:
            self.end()
        elif self._status is not None:
            self._status.stop()

    def start(self, name: str) -> None:
        """Begin a stage, and end the one before."""
        if self._console is None:
            return
        self.end()
        self._name, self._started = name, time.perf_counter()
        self._status = self._console.status(f"{name} …")
        self._status.start()

    def end(self) -> None:
        """End the stage that runs, if one does."""
        if self._console is not None and self._status is not None:
            self._status.stop()
            self._console.print(f"✓ {self._name} ({time.perf_counter() - self._started:.1f} s)")
            self._status = None
