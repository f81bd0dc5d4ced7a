"""Prompts from a file that a visitor uploads: read, bounded, and every mistake named by its line. No Gradio."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from minilora_hub.demo.runs.limits import whole_number
from minilora_hub.documents import strict_json
from minilora_hub.errors import PageError

KINDS = (".txt", ".jsonl", ".csv")
COLUMN = "prompt"


@dataclass(frozen=True)
class FileLimits:
    """How much one file may hold: prompts, bytes, and characters of one prompt."""

    rows: int = 50
    bytes: int = 500_000
    characters: int = 8000

    @classmethod
    def from_environment(cls) -> FileLimits:
        """Read MINILORA_BATCH_ROWS.

        Raises:
            ValueError: it is no whole number of at least 1.
        """
        return cls(whole_number("MINILORA_BATCH_ROWS", cls.rows))


def read_prompts(file: Path, limits: FileLimits | None = None) -> list[str]:
    """Read the prompts of a file: a line each (.txt), or the field ``prompt`` of each row (.jsonl, .csv).

    Empty lines are passed over. A .jsonl row may also be a bare text; a .csv of one column needs no header.

    Raises:
        PageError: the file is of another kind, too large, not UTF-8, empty, or a row is wrong; the message says it.
    """
    limits = limits or FileLimits()
    kind = file.suffix.lower()
    if kind not in KINDS:
        raise PageError(f"{file.name[:60]!r}: must end in {', '.join(KINDS)}")
    if (size := file.stat().st_size) > limits.bytes:
        raise PageError(f"the file is {size / 1000:,.0f} kB: at most {limits.bytes / 1000:g} kB are read")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PageError(f"the file is not UTF-8: byte {error.start} cannot be read") from None
    rows = {".txt": _lines, ".jsonl": _json_rows, ".csv": _csv_rows}[kind](text)
    if not rows:
        raise PageError("the file holds no prompts")
    if len(rows) > limits.rows:
        raise PageError(f"the file holds {len(rows)} prompts: at most {limits.rows} are run")
    for line, prompt in rows:
        if len(prompt) > limits.characters:
            raise PageError(f"line {line}: {len(prompt)} characters: a prompt has at most {limits.characters}")
    return [prompt for _, prompt in rows]


def _lines(text: str) -> list[tuple[int, str]]:
    lines = text.replace("\r\n", "\n").split("\n")  # splitlines() also splits at what may stand in a prompt
    return [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def _json_rows(text: str) -> list[tuple[int, str]]:
    rows = []
    for number, line in _lines(text):
        try:
            row = strict_json(line)
        except ValueError as error:
            raise PageError(f"line {number}: not JSON ({error})") from None
        prompt = row.get(COLUMN) if isinstance(row, dict) else row
        if not isinstance(prompt, str) or not prompt.strip():
            raise PageError(f'line {number}: must be {{"{COLUMN}": "…"}} with some text, or a text')
        rows.append((number, prompt))
    return rows


def _csv_rows(text: str) -> list[tuple[int, str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((reader.line_num, row))
    except csv.Error as error:
        raise PageError(f"line {reader.line_num}: not CSV ({error})") from None
    if not rows:
        return []
    header = [cell.strip().lower() for cell in rows[0][1]]
    if COLUMN in header:
        place, rows = header.index(COLUMN), rows[1:]
    elif all(len(row) == 1 for _, row in rows):
        place = 0
    else:
        raise PageError(
            f"line 1: a file of several columns needs a header with {COLUMN!r}; found {', '.join(header)[:80]}"
        )
    prompts = []
    for number, row in rows:
        if len(row) <= place or not row[place].strip():
            raise PageError(f"line {number}: the field {COLUMN!r} is empty")
        prompts.append((number, row[place]))
    return prompts
