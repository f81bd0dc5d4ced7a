r"""State of one comparison on the page, as plain dictionaries built from the engine's updates. No Gradio.

A *stage* is the state of all columns. The page renders it; the history, share links and replays store it::

    {"run": 3,                another number clears the columns
     "prompt": "…",
     "sampling": {…},         the settings, see `Sampling`
     "replay": None,          or the label of a replay, which the page then plays at reading pace
     "columns": [{"about": {"name", "kind", "badge", "facts", "experts", …},   from `columns.describe_columns`
                  "state": "idle" | "waiting" | "writing" | the reason why the answer ended,
                  "log": '{"t": "Hi", …}\n…',     one line of JSON a token, see `_token_line`
                  "tokens": 3, "first": seconds, "rate": tokens/s, "step": ms, "error": None}]}

The log is an append-only string, because Gradio then sends only the appended part: each token crosses the network once,
however long the answers are. A *status* is the content of the line above the columns::

    {"phase": "idle" | "busy" | "done" | "stopped" | "error", "words": "…", "badge": "…"}
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minilora_hub.compare.engine import Sampling, Update


@dataclass(frozen=True)
class Frame:
    """The state of the page at one moment of a comparison: its stage, its status, and whether it is the last one."""

    stage: dict
    status: dict
    finished: bool = False


class RunningComparison:
    """State of a comparison while it runs.

    Args:
        number: number of the run, unique on this page.
        about: description of each column.
        prompt: the prompt.
        sampling: the settings.
        token_text: returns the text of a single token, for an adapter; see `CompareEngine.token_text`.

    Attributes:
        forwards: forward passes of the base for this comparison, counted by the caller.
    """

    def __init__(
        self,
        number: int,
        about: Sequence[dict],
        prompt: str = "",
        sampling: Sampling | None = None,
        token_text: Callable[[int, str | None], str] = lambda token, adapter: str(token),
    ) -> None:
        self.forwards = 0
        self._started = time.perf_counter()
        self._number, self._prompt, self._sampling = number, prompt, sampling
        self._token_text = token_text
        self._alone = [0] * len(about)  # forward passes that each column would have needed alone
        blank = {"log": "", "tokens": 0, "first": None, "rate": None, "step": None, "error": None}
        self._columns: list[dict[str, Any]] = [{"about": one, "state": "waiting", **blank} for one in about]

    def add(self, update: Update) -> None:
        """Add one step's update of one column."""
        column = self._columns[update.row]
        if update.token_id is not None or update.text:
            adapter = column["about"].get("adapter")
            column["log"] += _token_line(update, lambda token: self._token_text(token, adapter)) + "\n"
        self._alone[update.row] = update.forwards_alone or self._alone[update.row]
        column["state"] = update.reason or "writing"
        column["tokens"] = update.tokens
        column["first"] = _rounded(update.seconds_to_first_token)
        column["rate"] = _rounded(update.tokens_per_second)
        column["step"] = _rounded(update.milliseconds_per_step)
        column["error"] = update.error

    def waiting(self, words: str) -> Frame:
        """Return the frame of a waiting comparison, with a message."""
        return Frame(self.stage(), status("busy", words))

    def refused(self, words: str) -> Frame:
        """Return the frame of a rejected comparison, with the reason."""
        return Frame(self.stage(state="idle"), status("error", words), finished=True)

    def frame(self, *, finished: bool = False, stopped: bool = False) -> Frame:
        """Return the frame with all updates so far."""
        return Frame(self.stage(), self._status(finished, stopped), finished)

    def stage(self, **fields: Any) -> dict:
        """Return the stage; `fields` replace those of every column."""
        return {
            "run": self._number,
            "prompt": self._prompt,
            "sampling": None if self._sampling is None else dataclasses.asdict(self._sampling),
            "replay": None,
            "columns": [{**column, **fields} for column in self._columns],
        }

    def _status(self, finished: bool, stopped: bool) -> dict:
        if not finished:
            writing = any(column["state"] != "waiting" for column in self._columns)
            return status("busy", "Writing…" if writing else "Reading the prompt…", self._badge())
        tokens = sum(column["tokens"] for column in self._columns)
        facts = f"{tokens} tokens in {time.perf_counter() - self._started:.1f} s."
        failed = sum(column["state"] == "error" for column in self._columns)
        if failed:
            return status("error", f"{failed} of {len(self._columns)} columns failed. {facts}", self._badge())
        if stopped:
            return status("stopped", f"Stopped. {facts}", self._badge())
        return status("done", f"Done. {facts}", self._badge())

    def _badge(self) -> str:
        """Return the counted forward passes, and how many the columns would need one by one."""
        if not self.forwards:
            return ""
        first = [column["first"] for column in self._columns if column["first"] is not None]
        parts = ["1 pass", f"{self.forwards} forwards, not {sum(self._alone)}"]
        return " · ".join([*parts, f"first token {max(first):.1f} s"] if first else parts)


def idle_stage(about: Sequence[dict]) -> dict:
    """Return the stage of columns before their first prompt."""
    return RunningComparison(0, about).stage(state="idle")


def status(phase: str, words: str, badge: str = "") -> dict:
    """Return the content of the status line."""
    return {"phase": phase, "words": words, "badge": badge}


def text_of(column: dict) -> str:
    """Return the text of a column of a stage."""
    # Not splitlines(), because a token may contain a Unicode line separator.
    return "".join(json.loads(line)["t"] for line in column["log"].split("\n")[:-1])


def texts_only(log: str) -> str:
    """Reduce a log to the text of each token, without probabilities and experts."""
    return "".join(f"{json.dumps({'t': json.loads(line)['t']}, ensure_ascii=False)}\n" for line in log.split("\n")[:-1])


def _token_line(update: Update, token_text: Callable[[int], str]) -> str:
    """Return the log line of one token.

    t: the text it adds; i: its id; p: the token's own text, if that differs; l: its logprob; a: the most probable
    tokens at this position, [text, logprob] each; r: for each layer with experts, the experts that served the token and
    their weights in thousandths, [expert, weight, expert, weight, …]. Text that is flushed at the end has t only.
    """
    line: dict[str, Any] = {"t": update.text}
    if update.token_id is not None:
        line["i"] = update.token_id
        alone = token_text(update.token_id)
        if alone != update.text:
            line["p"] = alone
        line["l"] = _rounded(update.logprob)
        line["a"] = [[token_text(token), _rounded(logprob)] for token, logprob in update.alternatives]
    if update.experts is not None and update.expert_weights is not None:
        layers = zip(update.experts, update.expert_weights, strict=True)
        line["r"] = [
            [number for expert, weight in zip(*layer, strict=True) for number in (expert, round(1000 * weight))]
            for layer in layers
        ]
    return json.dumps(line, ensure_ascii=False, separators=(",", ":"))


def _rounded(value: float | None) -> float | None:
    """Round to four significant digits; None if the value is not finite, which JSON cannot represent."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None
