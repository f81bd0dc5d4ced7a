"""Progress, sizes and durations as people read them.

display = ProgressDisplay("Training", "step", total=100)
display.update(10, "loss 2.1")             # "step 10/100  loss 2.1  31 s left", or a bar on a terminal
size_text(2_500_000)                       # "2.5 MB"
duration_text(4000)                        # "1 h 6 min 40 s"
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

LINES = 20
"""How many lines of progress are printed where stderr is not a terminal."""


class ProgressDisplay:
    """Progress of long work on stderr: a bar on a terminal, else a line after each twentieth of the work.

    Args:
        label: what is done, before the bar.
        unit: what is counted, singular.
        total: how many of it there are.
        done: how many were done earlier.
        shown: whether to print anything.
    """

    def __init__(self, label: str, unit: str, *, total: int, done: int = 0, shown: bool = True) -> None:
        self._unit, self._total, self._shown = unit, total, shown
        self._first, self._started, self._printed = done, time.perf_counter(), done
        self._bar: Progress | None = None
        if shown and sys.stderr.isatty():
            self._bar = _bar(label)
            self._task = self._bar.add_task("", total=total, completed=done, facts="")
            self._bar.start()

    def update(self, done: int, facts: str) -> None:
        """Show how much is done, and what there is to say about it."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, facts=facts)
            return
        every = max(1, self._total // LINES)
        if self._shown and (done // every > self._printed // every or done == self._total):
            seconds = (time.perf_counter() - self._started) / max(done - self._first, 1) * (self._total - done)
            print(f"{self._unit} {done}/{self._total}  {facts}  {seconds:.0f} s left", file=sys.stderr)
            self._printed = done

    def close(self) -> None:
        """Stop the bar; a second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar(label: str) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    facts = TextColumn("{task.fields[facts]}")
    console = Console(stderr=True, highlight=False)
    return Progress(TextColumn(label), BarColumn(24), MofNCompleteColumn(), facts, *times, console=console)
