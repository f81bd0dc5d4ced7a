"""Queue of comparisons: some take turns at computing, the others wait, with an estimate of the time. No Gradio.

A comparison that runs computes a step (or, where steps are short, some of them) and then lets the next one compute, so
that a short answer does not wait for a long one. Waiting times come from the steps that were measured so far.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

SMOOTHING = 0.1
"""Weight of the newest measurement in a running mean."""


@dataclass(frozen=True)
class Waiting:
    """How long a comparison waits."""

    position: int  # 1 for the next to run
    seconds: float | None  # until it runs; None before anything was measured


@dataclass(eq=False)
class Ticket:
    """A comparison's place in a `WaitingQueue`."""

    steps: int  # the most that it may take
    done: int = 0  # that it has taken
    running: asyncio.Event = field(default_factory=asyncio.Event)  # set once it may compute

    async def wait(self, seconds: float) -> None:
        """Wait until it may compute, but no longer than this."""
        try:
            await asyncio.wait_for(self.running.wait(), seconds)
        except TimeoutError:
            return


class WaitingQueue:
    """At most `at_once` comparisons that run, and at most `longest` that wait. All calls come from one event loop."""

    def __init__(self, at_once: int, longest: int) -> None:
        self._at_once, self._longest = at_once, longest
        self._running: list[Ticket] = []
        self._waiting: list[Ticket] = []
        self._step_seconds: float | None = None
        self._used = 1.0  # share of the steps asked for that answers take; they often end earlier

    def __len__(self) -> int:
        """Count the comparisons that run or wait."""
        return len(self._running) + len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether the next comparison has to wait."""
        return len(self._running) >= self._at_once

    def join(self, steps: int) -> Ticket:
        """Add a comparison of at most `steps` steps.

        Raises:
            ValueError: too many wait already.
        """
        if self.full and len(self._waiting) >= self._longest:
            raise ValueError(f"the queue is full, with {len(self._waiting)} waiting: try again in some minutes")
        ticket = Ticket(steps)
        self._waiting.append(ticket)
        self._start_next()
        return ticket

    def leave(self, ticket: Ticket, finished: bool = False) -> None:
        """Remove a comparison, and start the next one; to be called at least once.

        Args:
            ticket: the comparison's.
            finished: whether its answers ended by themselves; their length improves the estimates.
        """
        if finished and ticket.done and ticket in self._running:
            self._used += SMOOTHING * (min(1.0, ticket.done / ticket.steps) - self._used)
        for tickets in (self._running, self._waiting):
            if ticket in tickets:
                tickets.remove(ticket)
        self._start_next()

    def stepped(self, ticket: Ticket, steps: int, seconds: float) -> None:
        """Record that a comparison took this many steps in this many seconds."""
        ticket.done += steps
        if steps > 0:
            before = seconds / steps if self._step_seconds is None else self._step_seconds
            self._step_seconds = before + SMOOTHING * (seconds / steps - before)

    def waiting(self, ticket: Ticket) -> Waiting:
        """Return the position and the estimated waiting time of a comparison that waits."""
        index = self._waiting.index(ticket)
        if self._step_seconds is None:
            return Waiting(index + 1, None)
        running, before = ([self._left(one) for one in some] for some in (self._running, self._waiting[:index]))
        return Waiting(index + 1, self._step_seconds * steps_until_start(running, before, self._at_once))

    def _left(self, ticket: Ticket) -> float:
        """Estimate the steps that a comparison will still take, at least one."""
        return max(1.0, self._used * ticket.steps - ticket.done)

    def _start_next(self) -> None:
        while self._waiting and not self.full:
            ticket = self._waiting.pop(0)
            self._running.append(ticket)
            ticket.running.set()


def steps_until_start(running: Sequence[float], before: Sequence[float], at_once: int) -> float:
    """Count the steps, of all comparisons together, until one that waits may run.

    Args:
        running: steps left of each comparison that runs; they take turns.
        before: steps left of each that waits in front of it.
        at_once: how many run at once.
    """
    left, waiting, passed = sorted(running), list(before), 0.0
    while True:
        while waiting and len(left) < at_once:
            left.append(waiting.pop(0))
        if len(left) < at_once:
            return passed
        left.sort()
        shortest = left.pop(0)
        passed += shortest * (len(left) + 1)
        left = [steps - shortest for steps in left]
