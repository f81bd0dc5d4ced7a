"""What the page shows of one comparison, as plain dictionaries: built from the engine's updates. No Gradio.

A stage, which the columns are painted from, and which history, links and exports can keep and hand back::

    {"run": 3,              a new number clears the columns
     "prompt": "…",
     "columns": [{"about": {"name", "kind", "badge", "facts"},        from `describing.describe_columns`
                  "state": "idle" | "waiting" | "writing" | the reason why it ended,
                  "text": "…", "tokens": 3, "first": seconds, "rate": tokens/s, "step": ms, "error": None}]}

A status, the line above the columns: ``{"phase": "idle" | "busy" | "done" | "stopped" | "error", "words", "count"}``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minilora_hub.compare.engine import Update


@dataclass(frozen=True)
class Frame:
    """One picture of a running comparison.

    Attributes:
        stage: what the columns show; see the module.
        status: what the status line shows.
        finished: this is the last frame.
    """

    stage: dict
    status: dict
    finished: bool = False


class Comparison:
    """One comparison in the making.

    Args:
        number: of the run; differs from every other on this page.
        about: what is told of each column.
        prompt: what they answer.

    Attributes:
        forwards: of the base, for this comparison; whoever advances the engine adds to it.
    """

    def __init__(self, number: int, about: Sequence[dict], prompt: str = "") -> None:
        """Start with columns that wait."""
        self.forwards = 0
        self._started = time.perf_counter()
        self._number, self._prompt = number, prompt
        self._columns: list[dict[str, Any]] = [
            {
                "about": one,
                "state": "waiting",
                "text": "",
                "tokens": 0,
                "first": None,
                "rate": None,
                "step": None,
                "error": None,
            }
            for one in about
        ]

    def add(self, update: Update) -> None:
        """Take in what one step changed in one row."""
        column = self._columns[update.row]
        column["text"] += update.text
        column["state"] = update.reason or "writing"
        column["tokens"] = update.tokens
        column["first"] = update.seconds_to_first_token
        column["rate"] = update.tokens_per_second
        column["step"] = update.milliseconds_per_step
        column["error"] = update.error

    def waiting(self, words: str) -> Frame:
        """Show columns that wait, and say why."""
        return Frame(self._stage(), status("busy", words))

    def refused(self, words: str) -> Frame:
        """Show that nothing was computed, and say why."""
        return Frame(self._stage(state="idle"), status("error", words), finished=True)

    def frame(self, *, finished: bool = False, stopped: bool = False) -> Frame:
        """Show what there is by now."""
        return Frame(self._stage(), self._summary(finished, stopped), finished)

    def _stage(self, **fields) -> dict:
        return {
            "run": self._number,
            "prompt": self._prompt,
            "columns": [{**column, **fields} for column in self._columns],
        }

    def _summary(self, finished: bool, stopped: bool) -> dict:
        if not finished:
            writing = any(column["state"] != "waiting" for column in self._columns)
            return status("busy", "Writing…" if writing else "Reading the prompt…", f"{self.forwards} forwards")
        tokens = sum(column["tokens"] for column in self._columns)
        seconds = time.perf_counter() - self._started
        facts = f"{tokens} tokens by {self.forwards} forwards of the base in {seconds:.1f} s."
        failed = sum(column["state"] == "error" for column in self._columns)
        if failed:
            return status("error", f"{failed} of {len(self._columns)} columns failed. {facts}")
        return status("stopped", f"Stopped. {facts}") if stopped else status("done", f"Done. {facts}")


def idle_stage(about: Sequence[dict]) -> dict:
    """Show columns that have not been asked anything yet."""
    return Comparison(0, about)._stage(state="idle")


def status(phase: str, words: str, count: str = "") -> dict:
    """Build what the status line shows."""
    return {"phase": phase, "words": words, "count": count}
