"""The line of those who want to compute: some take turns, the others wait, and are told how long. No Gradio.

Whoever has a place computes a step (or, where steps are short, some of them) and lets the next one: a short answer does
not wait for a long one to end. Times are not guessed but measured on the steps of the last minutes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

SMOOTHING = 0.1
"""Weight of the newest measurement in a running mean."""


@dataclass(frozen=True)
class Waiting:
    """Where somebody stands.

    Attributes:
        position: 1 for the next to get a place.
        seconds: until then, as far as can be told; None before anything was measured.
    """

    position: int
    seconds: float | None


class Ticket:
    """Somebody's place in the line. Made by `Line.join`, given back by `leave`."""

    def __init__(self, line: Line, steps: int) -> None:
        """Stand at the end; see `Line.join`."""
        self._line, self.steps = line, steps
        self.done = 0
        self._admitted = asyncio.Event()

    @property
    def admitted(self) -> bool:
        """Whether it has a place among those who compute."""
        return self._admitted.is_set()

    async def wait(self, seconds: float) -> None:
        """Wait for a place, but no longer than this."""
        try:
            await asyncio.wait_for(self._admitted.wait(), seconds)
        except TimeoutError:
            return

    def waiting(self) -> Waiting:
        """Tell where it stands."""
        return self._line.waiting(self)

    def stepped(self, steps: int, seconds: float) -> None:
        """Note how many steps were computed in how many seconds."""
        self.done += steps
        self._line.measured(steps, seconds)

    def leave(self, finished: bool = False) -> None:
        """Give the place to the next.

        Args:
            finished: whether the answers came to their own end; how long they became tells how long others may.
        """
        self._line.leave(self, finished)


class Line:
    """Those who compute in turns and those who wait. All calls come from one event loop.

    Args:
        at_once: the most that compute.
        longest: the most that wait.
    """

    def __init__(self, at_once: int, longest: int) -> None:
        """Start empty; see the class."""
        self._at_once, self._longest = at_once, longest
        self._running: list[Ticket] = []
        self._waiting: list[Ticket] = []
        self._step_seconds: float | None = None
        self._used = 1.0  # of the steps that were asked for; answers often end before

    def __len__(self) -> int:
        """Count those who compute and those who wait."""
        return len(self._running) + len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether the next one has to wait."""
        return len(self._running) >= self._at_once

    def join(self, steps: int) -> Ticket:
        """Take a place, or the end of the line.

        Args:
            steps: the most steps that are asked for.

        Raises:
            ValueError: too many wait already.
        """
        if self.full and len(self._waiting) >= self._longest:
            raise ValueError(f"the line is full, with {len(self._waiting)} waiting: try again in some minutes")
        ticket = Ticket(self, steps)
        self._waiting.append(ticket)
        self._admit()
        return ticket

    def leave(self, ticket: Ticket, finished: bool) -> None:
        """See `Ticket.leave`."""
        if finished and ticket.done and ticket in self._running:
            self._used += SMOOTHING * (min(1.0, ticket.done / ticket.steps) - self._used)
        for tickets in (self._running, self._waiting):
            if ticket in tickets:
                tickets.remove(ticket)
        self._admit()

    def measured(self, steps: int, seconds: float) -> None:
        """See `Ticket.stepped`."""
        if steps > 0:
            before = seconds / steps if self._step_seconds is None else self._step_seconds
            self._step_seconds = before + SMOOTHING * (seconds / steps - before)

    def waiting(self, ticket: Ticket) -> Waiting:
        """See `Ticket.waiting`."""
        position = self._waiting.index(ticket) + 1
        if self._step_seconds is None:
            return Waiting(position, None)
        running = [self._left(other) for other in self._running]
        before = [self._left(other) for other in self._waiting[: position - 1]]
        return Waiting(position, self._step_seconds * steps_until_place(running, before, self._at_once))

    def _left(self, ticket: Ticket) -> float:
        """Steps that it may still take: as much of its limit as others used, at least one."""
        return max(1.0, self._used * ticket.steps - ticket.done)

    def _admit(self) -> None:
        while self._waiting and not self.full:
            ticket = self._waiting.pop(0)
            self._running.append(ticket)
            ticket._admitted.set()


def steps_until_place(running: Sequence[float], before: Sequence[float], places: int) -> float:
    """Count the steps of all together until one who waits gets a place.

    Args:
        running: steps left of each that computes; they take turns.
        before: steps left of each that waits before.
        places: how many compute at once.
    """
    left, waiting, passed = sorted(running), list(before), 0.0
    while True:
        while waiting and len(left) < places:
            left.append(waiting.pop(0))
        if len(left) < places:
            return passed
        left.sort()
        shortest = left.pop(0)
        passed += shortest * (len(left) + 1)
        left = [steps - shortest for steps in left]
