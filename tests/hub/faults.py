"""Faults that tests inject into the answers of the server."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field

KINDS = ("status", "drop", "slow", "corrupt", "truncate")


@dataclass
class Fault:
    """One rule: which requests it meets, and what happens to them.

    kind "status" answers `status` with `headers`; "drop" closes the connection without an answer; "slow" waits
    `delay` seconds first; "corrupt" flips a byte of the file (of an upload's body, else of the answer's); "truncate"
    stops in the middle of the answer's body. With `applied`, "status" and "drop" let the request take effect and only
    lose its answer. `nth` counts matching requests from 1 and starts there; `times` is how often it fires, None for
    ever after.
    """

    method: str | None
    path: re.Pattern[str]
    kind: str
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    times: int | None = 1
    nth: int | None = None
    delay: float = 0.1
    applied: bool = False
    seen: int = 0
    fired: int = 0

    def meets(self, method: str, path: str) -> bool:
        """Count the request if it matches, and say whether the fault fires on it."""
        if self.method not in {None, method} or not self.path.search(path):
            return False
        self.seen += 1
        if self.seen < (self.nth or 1) or (self.times is not None and self.fired >= self.times):
            return False
        self.fired += 1
        return True


class Faults:
    """The rules in force. The first one that fires on a request decides."""

    def __init__(self) -> None:
        """Start without faults."""
        self._rules: list[Fault] = []
        self._lock = threading.Lock()

    def add(
        self,
        *,
        kind: str,
        method: str | None = None,
        path_regex: str = "",
        status: int = 500,
        headers: dict[str, str] | None = None,
        times: int | None = 1,
        nth: int | None = None,
        delay: float = 0.1,
        applied: bool = False,
    ) -> Fault:
        """Inject a fault (see `Fault`) and return it: its `fired` says how often it struck.

        `path_regex` is searched in the unquoted path, without the query.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        fault = Fault(method, re.compile(path_regex), kind, status, dict(headers or {}), times, nth, delay, applied)
        with self._lock:
            self._rules.append(fault)
        return fault

    def clear(self) -> None:
        """Remove every fault."""
        with self._lock:
            self._rules.clear()

    def take(self, method: str, path: str) -> Fault | None:
        """Return the fault that strikes this request, if one does."""
        with self._lock:
            return next((fault for fault in self._rules if fault.meets(method, path)), None)


def corrupted(data: bytes) -> bytes:
    """Flip one byte in the middle of `data`."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :] if data else data
