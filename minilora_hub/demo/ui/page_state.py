r"""What the page shows of one comparison, as plain dictionaries: built from the engine's updates. No Gradio.

A stage, which the columns are painted from, and which history, links and recordings can keep and hand back::

    {"run": 3,                another number clears the columns
     "prompt": "…",
     "sampling": {…},         as asked, see `Sampling`
     "replay": None,          or what the label of a recording says; the page then plays it at reading pace
     "columns": [{"about": {"name", "kind", "badge", "facts", "experts", …},   from `describing.describe_columns`
                  "state": "idle" | "waiting" | "writing" | the reason why it ended,
                  "log": '{"t": "Hi", …}\n…',     one line of JSON a token, see `_token_line`
                  "tokens": 3, "first": seconds, "rate": tokens/s, "step": ms, "error": None}]}

The log is text that only grows, since Gradio sends of such a text only what was added: a stage costs a visitor the new
tokens, however long the answers are. A status is the line above the columns, read aloud as it changes::

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
        sampling: how.
        token_text: how a token of an adapter's column is written on its own; see `CompareEngine.token_text`.

    Attributes:
        forwards: of the base, for this comparison; whoever advances the engine adds to it.
    """

    def __init__(
        self,
        number: int,
        about: Sequence[dict],
        prompt: str = "",
        sampling: Sampling | None = None,
        token_text: Callable[[int, str | None], str] = lambda token, adapter: str(token),
    ) -> None:
        """Start with columns that wait."""
        self.forwards = 0
        self._started = time.perf_counter()
        self._number, self._prompt, self._sampling = number, prompt, sampling
        self._token_text = token_text
        self._alone = [0] * len(about)  # forwards of each column, had it been answered alone
        blank = {"log": "", "tokens": 0, "first": None, "rate": None, "step": None, "error": None}
        self._columns: list[dict[str, Any]] = [{"about": one, "state": "waiting", **blank} for one in about]

    def add(self, update: Update) -> None:
        """Take in what one step changed in one row."""
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
        """Show columns that wait, and say why."""
        return Frame(self._stage(), status("busy", words))

    def refused(self, words: str) -> Frame:
        """Show that nothing was computed, and say why."""
        return Frame(self._stage(state="idle"), status("error", words), finished=True)

    def frame(self, *, finished: bool = False, stopped: bool = False) -> Frame:
        """Show what there is by now."""
        return Frame(self._stage(), self._summary(finished, stopped), finished)

    def _stage(self, **fields: Any) -> dict:
        sampling = None if self._sampling is None else dataclasses.asdict(self._sampling)
        columns = [{**column, **fields} for column in self._columns]
        return {
            "run": self._number,
            "prompt": self._prompt,
            "sampling": sampling,
            "replay": None,
            "columns": columns,
        }

    def _summary(self, finished: bool, stopped: bool) -> dict:
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
        """What one pass has saved: forwards that the model counted, against those of the columns one by one."""
        if not self.forwards:
            return ""
        first = [column["first"] for column in self._columns if column["first"] is not None]
        told = ["1 pass", f"{self.forwards} forwards, not {sum(self._alone)}"]
        return " · ".join([*told, f"first token {max(first):.1f} s"] if first else told)


def idle_stage(about: Sequence[dict]) -> dict:
    """Show columns that have not been asked anything yet."""
    return Comparison(0, about)._stage(state="idle")


def status(phase: str, words: str, badge: str = "") -> dict:
    """Build what the status line shows."""
    return {"phase": phase, "words": words, "badge": badge}


def text_of(column: dict) -> str:
    """Read the text of a column of a stage."""
    # Not splitlines(): a token may hold a line separator of Unicode.
    return "".join(json.loads(line)["t"] for line in column["log"].split("\n")[:-1])


def texts_only(log: str) -> str:
    """Leave of a log only what the tokens add to the text: nothing tells how probable they were, or which experts."""
    return "".join(f"{json.dumps({'t': json.loads(line)['t']}, ensure_ascii=False)}\n" for line in log.split("\n")[:-1])


def _token_line(update: Update, token_text: Callable[[int], str]) -> str:
    """Write what is told of one token.

    t: the text it added; i: its id; p: the token as it is on its own, where that is not the text; l: its logprob;
    a: the most probable tokens here, [text, logprob] each; r: for each layer with experts, the experts that served it
    and their weights in thousandths, [expert, weight, expert, weight, …]. Text held back to the end has t only.
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
    """Round to four significant digits; None where it is no finite number, which JSON cannot say."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None
