"""A file of prompts, one after the other: a table of answers that grows, and what it is saved as. No Gradio."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from minilora_hub.compare.engine import Sampling
from minilora_hub.demo.runs.runner import LiveRuns
from minilora_hub.demo.ui.page_state import text_of

ENDS = {"eos": "finished", "length": "length limit", "stop": "stop text", "stopped": "stopped", "error": "failed"}


@dataclass
class Batch:
    """A table of answers in the making.

    Attributes:
        names: of the columns, the base's first.
        total: prompts in the file.
        rows: those that were answered: ``{"prompt", "answers": [{"text", "ended", "error", "tokens"}], "error"}``.
        stopped: the visitor ended it early.
        sampling: the settings.
    """

    names: list[str]
    total: int
    sampling: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False

    @property
    def finished(self) -> bool:
        """Nothing follows."""
        return self.stopped or len(self.rows) == self.total

    @property
    def words(self) -> str:
        """Where it stands, in a sentence."""
        failed = sum(1 for row in self.rows if row["error"] or any(one["error"] for one in row["answers"]))
        troubles = f" {failed} with an error." if failed else ""
        if self.stopped:
            return f"Stopped after {len(self.rows)} of {self.total} prompts.{troubles}"
        if self.finished:
            return f"Done: {self.total} prompts.{troubles}"
        return f"Prompt {len(self.rows) + 1} of {self.total}…{troubles}"

    def to_json(self) -> str:
        """Write it for programs."""
        content = {"columns": self.names, "sampling": self.sampling, "rows": self.rows}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """Write a row a prompt: the prompt, then each column's answer; what failed says so in the last column."""
        out = io.StringIO(newline="")
        writer = csv.writer(out, lineterminator="\r\n")
        writer.writerow(["prompt", *self.names, "errors"])
        for row in self.rows:
            errors = [row["error"]] if row["error"] else [one["error"] for one in row["answers"] if one["error"]]
            texts = [one["text"] for one in row["answers"]] or [""] * len(self.names)
            writer.writerow([row["prompt"], *texts, "; ".join(errors)])
        return out.getvalue()


async def run_batch(
    runs: LiveRuns, visitor: str, prompts: Sequence[str], sampling: Sampling, written: dict[str, Any]
) -> AsyncGenerator[Batch]:
    """Answer prompts in a visitor's place, one after the other; yields the same table after each.

    A prompt that is refused, or a column that fails, is told in its row, and the next prompt follows. Whatever ends
    the visitor's run (Stop, another run, a closed tab) ends the batch; closing the iterator does, too.

    Args:
        runs: runs comparisons; not blind, and nothing of it is kept in the history.
        visitor: whose place.
        prompts: the file's.
        sampling: for all of them.
        written: what is written down of it.
    """
    batch = Batch([one["name"] for one in runs.about(visitor)], len(prompts), written)
    yield batch
    for prompt in prompts:
        # The plain class's: a blind visitor's batch shows names, which are in its table's head.
        LiveRuns.begin(runs, visitor)
        async with aclosing(LiveRuns.run(runs, visitor, prompt, sampling)) as frames:
            async for frame in frames:
                last = frame
        columns = last.stage["columns"]
        if any(column["state"] == "stopped" for column in columns):
            batch.stopped = True
            yield batch
            return
        if all(column["state"] == "idle" for column in columns):
            batch.rows.append({"prompt": prompt, "answers": [], "error": last.status["words"]})
        else:
            answers = [
                {"text": text_of(one), "ended": ENDS[one["state"]], "error": one["error"], "tokens": one["tokens"]}
                for one in columns
            ]
            batch.rows.append({"prompt": prompt, "answers": answers, "error": None})
        yield batch
