r"""State of one comparison on the page, as plain dictionaries built from the engine's updates. No Gradio.

A *stage* is the state of all columns. The page renders it; the history, share links and replays store it::

    {"run": 3,                another number clears the columns
     "prompt": "…",
     "sampling": {…},         the common settings, see `Sampling`
     "replay": None,          or the label of a replay, which the page then plays at reading pace
     "expected": None,        or the right answer, if the prompt has one
     "columns": [{"about": {"name", "kind", "badge", "facts", "experts", …},   from `columns.describe_columns`
                  "state": "idle" | "waiting" | "writing" | the reason why the answer ended,
                  "log": '{"t": "Hi", …}\n…',     one line of JSON a token, see `_token_line`
                  "tokens": 3, "first": seconds, "rate": tokens/s, "step": ms, "error": None,
                  "sampling": {…},        the settings in which this column differs from the common ones
                  "right": None | whether the finished answer is the expected one,
                  "html": None | the finished answer, rendered from Markdown and sanitised,
                  "before": [[role, text], …] of the earlier turns,
                  "route": {"adapter", "similarity", "runner_up"}, of the column "auto" only}]}

The log is an append-only string, because Gradio then sends only the appended part: each token crosses the network once,
however long the answers are. A *status* is the content of the line above the columns::

    {"phase": "idle" | "busy" | "done" | "stopped" | "error", "words": "…", "badge": "…", "hint": "explains the badge"}
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from markdown_it import MarkdownIt

from minilora_hub.compare.answer import Turns
from minilora_hub.compare.engine import Sampling, Update
from minilora_hub.demo.runs.examples import is_right
from minilora_hub.demo.runs.rates import CommonRates
from minilora_hub.formatting import counted

ENDED = ("eos", "length", "stop")
"""States of an answer that ended by itself."""


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
        sampling: the common settings.
        token_text: returns the text of a single token, for an adapter; see `CompareEngine.token_text`.
        expected: the right answer, if the prompt has one.
        before: the earlier turns of each column's conversation.
        own: the settings in which each column differs from the common ones.

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
        expected: str | None = None,
        before: Sequence[Turns] | None = None,
        own: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.forwards = 0
        self._rates, self._expected = CommonRates(), expected
        self._started = time.perf_counter()
        self._number, self._prompt, self._sampling = number, prompt, sampling
        self._token_text = token_text
        self._alone = [0] * len(about)  # forward passes that each column would have needed alone
        blank = {"log": "", "tokens": 0, "first": None, "rate": None, "step": None, "error": None, "right": None}
        self._columns: list[dict[str, Any]] = [
            {"about": one, "state": "waiting", **blank, "html": None, "before": [list(turn) for turn in turns]}
            | {"sampling": dict(settings)}
            for one, turns, settings in zip(about, before or [()] * len(about), own or [{}] * len(about), strict=True)
        ]
        self._rows = [*range(len(about))]  # the column of each row of the updates

    def only(self, index: int, columns: Sequence[dict[str, Any]]) -> None:
        """Keep these columns, and answer only that of `index` again; the updates have one row.

        Args:
            index: its place.
            columns: the columns; the ``sampling`` of those that are kept is how they differ from this comparison's.
        """
        kept = with_html({"columns": columns})["columns"]
        self._columns = [self._columns[index] if at == index else column for at, column in enumerate(kept)]
        self._rows = [index]

    def routed(self, name: str, choice: dict[str, Any]) -> None:
        """Say which adapter answers the column of this name, and why."""
        for column in self._columns:
            if column["about"]["name"] == name:
                column["route"] = choice

    def add(self, update: Update) -> None:
        """Add one step's update of one column."""
        column = self._columns[self._rows[update.row]]
        if update.token_id is not None or update.text:
            adapter = answering(column)
            column["log"] += _token_line(update, lambda token: self._token_text(token, adapter)) + "\n"
        self._alone[update.row] = update.forwards_alone or self._alone[update.row]
        column["state"] = update.reason or "writing"
        column["tokens"] = update.tokens
        column["first"] = _rounded(update.seconds_to_first_token)
        column["rate"] = _rounded(self._rates.add(update))
        column["step"] = _rounded(update.milliseconds_per_step)
        column["error"] = update.error
        if self._expected is not None and update.reason in ENDED:
            column["right"] = is_right(text_of(column), self._expected)
        if update.finished:
            column["html"] = rendered(text_of(column))

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
            "expected": self._expected,
            "columns": [{**column, **fields} for column in self._columns],
        }

    def _status(self, finished: bool, stopped: bool) -> dict:
        if not finished:
            writing = any(column["state"] != "waiting" for column in self._answered)
            return self._counted("busy", "Writing…" if writing else "Reading the prompt…")
        tokens = sum(column["tokens"] for column in self._answered)
        facts = f"{counted(tokens, 'token')} in {time.perf_counter() - self._started:.1f} s."
        failed = sum(column["state"] == "error" for column in self._answered)
        if failed:
            return self._counted("error", f"{failed} of {len(self._answered)} columns failed. {facts}")
        return self._counted("stopped", f"Stopped. {facts}") if stopped else self._counted("done", f"Done. {facts}")

    @property
    def _answered(self) -> list[dict[str, Any]]:
        """The columns of this run: all, unless one is answered again."""
        return [self._columns[index] for index in self._rows]

    def _counted(self, phase: str, words: str) -> dict:
        """Return a status with the counted steps, and what they mean."""
        if not self.forwards:
            return status(phase, words)
        steps, columns = counted(self.forwards, "step"), counted(len(self._rows), "column")
        longest = max(self._answered, key=lambda column: column["tokens"])
        parts = [f"{steps} for {'all ' if len(self._rows) > 1 else ''}{columns}"]
        parts += [f"{longest['step']:.0f} ms a step"] if longest["step"] else []
        first = [column["first"] for column in self._answered if column["first"] is not None]
        parts += [f"first token {max(first):.1f} s"] if first else []
        hint = (
            "One pass: each step runs the base once for all columns together, so they share the time of a step. "
            f"One column after the other would take {counted(sum(self._alone), 'step')}."
        )
        if self._rates.steps:
            hint += f" Tokens/s are those of the first {counted(self._rates.steps, 'token')}, while all columns wrote."
        return status(phase, words, " · ".join(parts), hint)


def idle_stage(about: Sequence[dict], own: Sequence[Mapping[str, Any]] | None = None) -> dict:
    """Return the stage of columns before their first prompt."""
    return RunningComparison(0, about, own=own).stage(state="idle")


def status(phase: str, words: str, badge: str = "", hint: str = "") -> dict:
    """Return the content of the status line."""
    return {"phase": phase, "words": words, "badge": badge, "hint": hint}


def answering(column: dict) -> str | None:
    """Return the name of the adapter that answers a column of a stage; None for the base."""
    route = column.get("route")
    return route["adapter"] if route else column["about"].get("adapter")


def text_of(column: dict) -> str:
    """Return the text of a column of a stage."""
    # Not splitlines(), because a token may contain a Unicode line separator.
    return "".join(json.loads(line)["t"] for line in column["log"].split("\n")[:-1])


@cache
def _markdown() -> MarkdownIt:
    """Return a renderer that escapes HTML, and links only to the web and to mail; pictures would be fetched."""
    return MarkdownIt("js-default").disable("image")


def rendered(text: str) -> str:
    """Return Markdown as HTML that is safe to insert into a page."""
    return _markdown().render(text)


def with_html(stage: dict) -> dict:
    """Return a stage with the HTML of its answers, which is not stored."""
    return {**stage, "columns": [{**column, "html": rendered(text_of(column))} for column in stage["columns"]]}


def without_html(stage: dict) -> dict:
    """Return a stage as it is stored."""
    return {**stage, "columns": [{**column, "html": None} for column in stage["columns"]]}


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
