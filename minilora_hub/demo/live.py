"""From the engine's updates to what the page shows: a comparison as a stream of small dictionaries. No Gradio.

All torch work of the page happens in one thread, whoever asked for it: threads that compute at once fight over the
cores.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from minilora_hub.compare.engine import Column, CompareEngine, Sampling, Update
from minilora_hub.demo.linked import LinkedAdapters, temporary_folder
from minilora_hub.errors import AdapterError

FRAME_SECONDS = 0.04
"""A fast machine makes more tokens than a screen can show; they are gathered for this long before the page is told."""


@dataclass(frozen=True)
class Frame:
    """One picture of a running comparison.

    Attributes:
        columns: what each column of the run shows, or None where it has not changed.
        status: what the status line shows.
        finished: this is the last frame.
        linked: whether the run is of an adapter that a link named, beside the base, and not of the page's own.
    """

    columns: list[dict | None]
    status: dict
    finished: bool = False
    linked: bool = False


class LiveRuns:
    """Runs comparisons for the page's visitors, one after the other, and stops them when asked.

    Args:
        engine: the models.
        links: the adapters that visitors' links name; None where links are not followed.
    """

    def __init__(self, engine: CompareEngine, links: LinkedAdapters | None = None) -> None:
        """Start without visitors; see the class."""
        self.engine, self.links = engine, links
        self._opened: dict[str, str] = {}
        self._opening = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="minilora-compute")
        self._runs: dict[str, tuple[int, threading.Event]] = {}
        self._numbers = count(1)
        self._busy = 0

    async def open(self, visitor: str, name: str) -> Column:
        """Show a visitor the adapter that a link named, beside the base. One link is followed at a time.

        Raises:
            AdapterError: it cannot be; the message says why.
        """
        if self.links is None:
            raise AdapterError("this page shows its own adapters only")
        loop = asyncio.get_running_loop()
        async with self._opening:
            column = self.links.get(name)
            if column is None:
                with temporary_folder() as folder:
                    await asyncio.to_thread(self.links.fetch, name, Path(folder))
                    column = await loop.run_in_executor(self._thread, self.links.load, name, Path(folder))
        self.stop(visitor)
        self._opened[visitor] = name
        return column

    def columns_of(self, visitor: str) -> tuple[Column, ...]:
        """Return the columns a visitor sees.

        Raises:
            AdapterError: the adapter was put away, since other visitors opened others.
        """
        name = self._opened.get(visitor)
        if self.links is None or name is None:
            return self.engine.columns
        linked = self.links.get(name)
        if linked is None:
            raise AdapterError(f"{name} was put away, as other visitors have opened others: reload the page")
        return self.engine.columns[0], linked

    def begin(self, visitor: str) -> Frame:
        """Take a place for a visitor's next comparison, and end the one that may still run."""
        self.stop(visitor)
        number = next(self._numbers)
        self._runs[visitor] = (number, threading.Event())
        words = "Waiting for another visitor's comparison to end…" if self._busy else "Reading the prompt…"
        linked = visitor in self._opened
        amount = 2 if linked else len(self.engine.columns)
        return Frame([_blank(number, "waiting") for _ in range(amount)], _status("busy", words), linked=linked)

    def stop(self, visitor: str) -> None:
        """End a visitor's comparison within one step, whether it waits or runs; nothing happens if there is none."""
        if visitor in self._runs:
            self._runs[visitor][1].set()

    def leave(self, visitor: str) -> None:
        """Forget a visitor who closed the page."""
        self.stop(visitor)
        self._runs.pop(visitor, None)
        self._opened.pop(visitor, None)

    async def run(self, visitor: str, prompt: str, sampling: Sampling) -> AsyncIterator[Frame]:
        """Answer a prompt in the place taken by `begin`.

        Leaving the iterator early, by closing or cancelling it, ends the computation within one step.
        """
        number, stop = self._runs.get(visitor) or (next(self._numbers), threading.Event())
        linked = visitor in self._opened
        pictures = [_blank(number, "waiting") for _ in range(2 if linked else len(self.engine.columns))]
        try:
            updates = self.engine.stream(prompt, sampling, stop, self.columns_of(visitor))
        except (ValueError, AdapterError) as error:
            status = _status("error", f"{error}")
            yield Frame([_blank(number, "idle") for _ in pictures], status, finished=True, linked=linked)
            return
        forwards, started = self.engine.forwards, time.perf_counter()
        loop = asyncio.get_running_loop()
        self._busy += 1
        try:
            finished = False
            while not finished:
                changed, finished = await loop.run_in_executor(self._thread, _advance, updates)
                for update in changed:
                    _paint(pictures[update.row], update)
                done = self.engine.forwards - forwards
                status = _summary(pictures, done, time.perf_counter() - started, finished, stop.is_set())
                touched = {update.row for update in changed}
                columns = [dict(picture) if index in touched else None for index, picture in enumerate(pictures)]
                yield Frame(columns, status, finished, linked)
        finally:
            self._busy -= 1
            stop.set()
            self._thread.submit(updates.close)


def _advance(updates: Iterator[Update]) -> tuple[list[Update], bool]:
    """Gather updates for one frame; the flag tells whether the stream has ended."""
    gathered, until = [], time.perf_counter() + FRAME_SECONDS
    for update in updates:
        gathered.append(update)
        if time.perf_counter() >= until:
            return gathered, False
    return gathered, True


def _blank(number: int, state: str) -> dict:
    return {
        "run": number,
        "state": state,
        "text": "",
        "tokens": 0,
        "first": None,
        "rate": None,
        "step": None,
        "error": None,
    }


def _paint(picture: dict, update: Update) -> None:
    picture["text"] += update.text
    picture["state"] = update.reason or "writing"
    picture["tokens"] = update.tokens
    picture["first"] = update.seconds_to_first_token
    picture["rate"] = update.tokens_per_second
    picture["step"] = update.milliseconds_per_step
    picture["error"] = update.error


def _status(phase: str, words: str, count: str = "") -> dict:
    return {"phase": phase, "words": words, "count": count}


def _summary(pictures: list[dict], forwards: int, seconds: float, finished: bool, stopped: bool) -> dict:
    if not finished:
        writing = any(picture["state"] != "waiting" for picture in pictures)
        return _status("busy", "Writing…" if writing else "Reading the prompt…", f"{forwards} forwards")
    tokens = sum(picture["tokens"] for picture in pictures)
    facts = f"{tokens} tokens by {forwards} forwards of the base in {seconds:.1f} s."
    failed = sum(picture["state"] == "error" for picture in pictures)
    if failed:
        return _status("error", f"{failed} of {len(pictures)} columns failed. {facts}")
    return _status("stopped", f"Stopped. {facts}") if stopped else _status("done", f"Done. {facts}")
