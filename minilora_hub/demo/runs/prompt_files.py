"""Read files of prompts, and answer the prompts one after the other in a table. No Gradio."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilora_hub.compare.engine import Sampling
from minilora_hub.demo.runs.assertions import Assertion, passes, read_assertions
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.demo.runs.own_sampling import in_words, settings_of
from minilora_hub.demo.runs.visitor import Visitor
from minilora_hub.demo.ui.page_state import text_of
from minilora_hub.documents import Scalar, strict_json
from minilora_hub.errors import PageError
from minilora_hub.evaluation.metrics import wilson_interval

KINDS = (".txt", ".jsonl", ".csv")
FIELD = "prompt"
CSV_FIELDS = (FIELD, "expected", "__expected")
MOST_BYTES = 500_000
ENDS = {"eos": "finished", "length": "length limit", "stop": "stop text", "stopped": "stopped", "error": "failed"}


@dataclass(frozen=True)
class FilePrompt:
    """A prompt of a file, and what its answers are checked for."""

    text: str
    assertions: tuple[Assertion, ...] = ()


def read_prompts(file: Path, limits: PageLimits) -> list[FilePrompt]:
    """Read the prompts of a file: one a line (.txt), or the field ``prompt`` of each row (.jsonl, .csv).

    Empty lines are skipped. A .jsonl row may also be a string; a .csv with one column needs no header. Rows may say
    what is expected of the answer, see `read_assertions`.

    Raises:
        PageError: the file is of another kind, too large, not UTF-8, empty, or a row is wrong.
    """
    kind = file.suffix.lower()
    if kind not in KINDS:
        raise PageError(f"{file.name[:60]!r}: must end in {', '.join(KINDS)}")
    if (size := file.stat().st_size) > MOST_BYTES:
        raise PageError(f"the file is {size / 1000:,.0f} kB: at most {MOST_BYTES / 1000:g} kB are read")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PageError(f"the file is not UTF-8: byte {error.start} cannot be read") from None
    rows = {".txt": _lines, ".jsonl": _json_rows, ".csv": _csv_rows}[kind](text)
    if not rows:
        raise PageError("the file holds no prompts")
    if len(rows) > limits.file_prompts:
        raise PageError(f"the file holds {len(rows)} prompts: at most {limits.file_prompts} are run")
    found = []
    for line, row in rows:
        prompt = row[FIELD]
        if len(prompt) > limits.prompt:
            raise PageError(f"line {line}: {len(prompt)} characters: a prompt has at most {limits.prompt}")
        try:
            found.append(FilePrompt(prompt, read_assertions(row)))
        except ValueError as error:
            raise PageError(f"line {line}: {error}") from None
    return found


def _lines(text: str) -> list[tuple[int, dict[str, Any]]]:
    lines = text.replace("\r\n", "\n").split("\n")  # splitlines() also splits at characters that a prompt may contain
    return [(number, {FIELD: line.strip()}) for number, line in enumerate(lines, 1) if line.strip()]


def _json_rows(text: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, found in _lines(text):
        line = found[FIELD]
        try:
            row = strict_json(line)
        except ValueError as error:
            raise PageError(f"line {number}: not JSON ({error})") from None
        row = row if isinstance(row, dict) else {FIELD: row}
        prompt = row.get(FIELD)
        if not isinstance(prompt, str) or not prompt.strip():
            raise PageError(f'line {number}: must be {{"{FIELD}": "…"}} with a non-empty string, or a string')
        rows.append((number, row))
    return rows


def _csv_rows(text: str) -> list[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise PageError(f"line {reader.line_num}: not CSV ({error})") from None
    if not rows:
        return []
    header = [cell.strip().lower() for cell in rows[0][1]]
    if FIELD in header:
        rows = rows[1:]
    elif all(len(row) == 1 for _, row in rows):
        header = [FIELD]
    else:
        raise PageError(
            f"line 1: a file of several columns needs a header with {FIELD!r}; found {', '.join(header)[:80]}"
        )
    found = [
        (number, {name: cell for name, cell in zip(header, row, strict=False) if name in CSV_FIELDS})
        for number, row in rows
    ]
    for number, row in found:
        if not row.get(FIELD, "").strip():
            raise PageError(f"line {number}: the field {FIELD!r} is empty")
    return found


@dataclass
class PromptTable:
    """The answers to a file of prompts, as far as they were computed."""

    names: list[str]  # of the columns, the base's first; with the settings that a column has of its own
    total: int  # prompts in the file
    sampling: dict[str, Scalar]
    rows: list[dict[str, Any]] = field(default_factory=list)  # {"prompt", "answers", "error"}, see `run_prompts`
    stopped: bool = False

    @property
    def rates(self) -> list[dict[str, float] | None]:
        """For each column the answers that pass, those that were checked, and Wilson's 95% interval of the share."""
        found: list[dict[str, float] | None] = []
        for column in range(len(self.names)):
            checked = [row["answers"][column]["passed"] for row in self.rows if row["answers"]]
            passed = [one for one in checked if one is not None]
            low, high = wilson_interval(sum(passed), len(passed)) if passed else (0.0, 1.0)
            found.append({"passed": sum(passed), "n": len(passed), "low": low, "high": high} if passed else None)
        return found

    @property
    def finished(self) -> bool:
        """Whether no more rows will be added."""
        return self.stopped or len(self.rows) == self.total

    @property
    def words(self) -> str:
        """The progress, as a sentence."""
        failed = sum(1 for row in self.rows if row["error"] or any(one["error"] for one in row["answers"]))
        troubles = f" {failed} with an error." if failed else ""
        if self.stopped:
            return f"Stopped after {len(self.rows)} of {self.total} prompts.{troubles}"
        if self.finished:
            return f"Done: {self.total} prompts.{troubles}"
        return f"Prompt {len(self.rows) + 1} of {self.total}…{troubles}"


async def run_prompts(
    visitor: Visitor, prompts: Sequence[FilePrompt], sampling: Sampling, system: str = ""
) -> AsyncGenerator[PromptTable]:
    """Answer prompts for a visitor, one after the other; yield the same table after each.

    Names are shown even in blind mode, and nothing is added to the history. A rejected prompt or a failed column is an
    error in its row, and the next prompt follows. Anything that ends the visitor's comparison (Stop, another run, a
    closed tab) also ends the table, as does closing the iterator.
    """
    names = [
        one["name"] + (f" ({in_words(own)})" if own else "")
        for one, own in zip(visitor.about(), visitor.own(), strict=True)
    ]
    table = PromptTable(names, len(prompts), settings_of(sampling, system))
    yield table
    for prompt in prompts:
        visitor.begin()
        async with aclosing(visitor.run(prompt.text, sampling, system)) as frames:
            async for frame in frames:
                last = frame
        columns = last.stage["columns"]
        if any(column["state"] == "stopped" for column in columns):
            table.stopped = True
            yield table
            return
        row: dict[str, Any] = {"prompt": prompt.text, "answers": [], "error": None}
        if all(column["state"] == "idle" for column in columns):
            row["error"] = last.status["words"]
        else:
            row["answers"] = [
                {
                    "text": text_of(one),
                    "ended": ENDS[one["state"]],
                    "error": one["error"],
                    "tokens": one["tokens"],
                    # In a thread, because a pattern may take a while.
                    "passed": await asyncio.to_thread(passes, prompt.assertions, text_of(one)),
                }
                for one in columns
            ]
        table.rows.append(row)
        yield table
