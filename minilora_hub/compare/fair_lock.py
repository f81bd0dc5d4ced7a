"""A lock that threads get in the order in which they asked for it."""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """Like `threading.Lock`, in a ``with`` statement, but first come, first served.

    A thread that releases a `threading.Lock` and asks for it again at once nearly always gets it, so that of two
    threads that compute step by step one would hardly advance.
    """

    def __init__(self) -> None:
        self._state = threading.Lock()  # held for a moment, around the two fields
        self._held = False
        self._waiting: deque[threading.Lock] = deque()  # one per thread that waits, which it cannot get yet

    def __enter__(self) -> FairLock:
        """Wait for the lock."""
        with self._state:
            if not self._held:
                self._held = True
                return self
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            turn.acquire()
        except BaseException:  # Ctrl-C in the main thread
            with self._state:
                given = turn not in self._waiting
                if not given:
                    self._waiting.remove(turn)
            if given:
                self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Give it to the thread that waits longest."""
        with self._state:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False
