"""Queue of comparisons: a bounded number run concurrently, the others wait with a time estimate. No Gradio.

Running comparisons advance side by side, so that a short answer does not wait for a long one. Waiting times are
estimated from the mean time of a comparison's step, divided by the number of those that run meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

SMOOTHING = 0.1
"""Weight of the newest measurement in a running mean."""


@dataclass(frozen=True)
class Waiting:
    """Position and estimated waiting time of a comparison."""

    position: int  # 1 for the next to run
    seconds: float | None  # until it runs; None before anything was measured


@dataclass(eq=False)
class Ticket:
    """A comparison's place in a `WaitingQueue`."""

    steps: int  # maximum steps
    done: int = 0  # steps computed so far
    running: asyncio.Event = field(default_factory=asyncio.Event)  # set once it may compute

    async def wait(self, seconds: float) -> None:
        """Wait until the comparison may compute, at most this many seconds."""
        try:
            await asyncio.wait_for(self.running.wait(), seconds)
        except TimeoutError:
            return


class WaitingQueue:
    """At most `at_once` running and at most `longest` waiting comparisons. All calls come from one event loop."""

    def __init__(self, at_once: int, longest: int) -> None:
        self._at_once, self._longest = at_once, longest
        self._running: list[Ticket] = []
        self._waiting: list[Ticket] = []
        self._step_seconds: float | None = None
        self._used = 1.0  # mean share of the requested steps that answers use, as they often end earlier

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
            ValueError: the queue is full.
        """
        if self.full and len(self._waiting) >= self._longest:
            raise ValueError(f"the queue is full, with {len(self._waiting)} waiting: try again in some minutes")
        ticket = Ticket(steps)
        self._waiting.append(ticket)
        self._start_next()
        return ticket

    def leave(self, ticket: Ticket, finished: bool = False) -> None:
        """Remove a comparison, and start the next one. Must be called for every ticket; repeated calls are ignored.

        Args:
            ticket: the comparison's.
            finished: whether its answers ended without a stop, so that their length is used for estimates.
        """
        if finished and ticket.done and ticket in self._running:
            self._used += SMOOTHING * (min(1.0, ticket.done / ticket.steps) - self._used)
        for tickets in (self._running, self._waiting):
            if ticket in tickets:
                tickets.remove(ticket)
        self._start_next()

    def stepped(self, ticket: Ticket, steps: int, seconds: float) -> None:
        """Record that a comparison took this many steps in this many seconds, beside the others that run."""
        ticket.done += steps
        if steps > 0:
            own = seconds / steps / max(1, len(self._running))
            before = own if self._step_seconds is None else self._step_seconds
            self._step_seconds = before + SMOOTHING * (own - before)

    def waiting(self, ticket: Ticket) -> Waiting:
        """Return the position and the estimated waiting time of a waiting comparison."""
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
    """Return the number of steps, of all comparisons together, until a waiting comparison may run.

    Args:
        running: steps left of each comparison that runs, as if they took turns.
        before: steps left of each comparison that waits before it.
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
