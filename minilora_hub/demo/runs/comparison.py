"""One finished comparison: what was asked, with which settings, of which weights, and what came. No Gradio.

It is what a vote is about, what a share link restores, what the history lists, and what an export holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from minilora_hub.demo.ui.page_state import text_of
from minilora_hub.documents import Scalar, strict_json
from minilora_hub.errors import PageError

VERSION = 1
UNKNOWN = "unknown"


def now() -> str:
    """Return the time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Weights:
    """Which weights a column ran.

    Attributes:
        hash: of the adapter's file, ``"sha256:…"``; for the base, the fingerprint of its checkpoint; or ``"unknown"``.
        revision: the commit on the Hub that they were fetched from, None where they come from a folder.
    """

    hash: str = UNKNOWN
    revision: str | None = None


@dataclass(frozen=True)
class Record:
    """A prompt, the settings, and what each column made of it.

    Attributes:
        prompt: what the visitor asked.
        sampling: name of a setting -> its value.
        base: the base's name, on the Hub if it is from there.
        stage: what the columns showed at the end, the base's first; see `minilora_hub.demo.ui.page_state`.
        status: what the status line showed.
        weights: for each column.
        time: when it ended, ISO 8601, UTC.
    """

    prompt: str
    sampling: dict[str, Scalar]
    base: str
    stage: dict[str, Any]
    status: dict[str, str]
    weights: tuple[Weights, ...]
    time: str = field(default_factory=now)

    @property
    def columns(self) -> list[dict[str, Any]]:
        """What each column showed: ``about``, ``state``, ``log`` and the numbers."""
        return list(self.stage["columns"])

    @property
    def names(self) -> list[str]:
        """What the columns are called."""
        return [column["about"]["name"] for column in self.columns]

    @property
    def complete(self) -> bool:
        """Whether every column came to its end, without an error and without being stopped."""
        return all(column["state"] in ("eos", "length", "stop") for column in self.columns)

    @property
    def memory(self) -> int:
        """Bytes of memory that it takes."""
        return _size_of(self.__dict__, set())

    def to_json(self) -> str:
        """Write it as JSON that `from_json` reads."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Record:
        """Read what `to_json` wrote.

        Raises:
            PageError: it is damaged, or of another version.
        """
        try:
            content = strict_json(text)
            version = content.pop("version")
            if version != VERSION:
                raise PageError(f"it was stored by another version of minilora_hub ({version!r})")
            record = cls(weights=tuple(Weights(**one) for one in content.pop("weights")), **content)
            texts = [text_of(column) for column in record.columns]
            if not record.names or len(texts) != len(record.weights) or not isinstance(record.sampling, dict):
                raise ValueError("its columns do not fit together")
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise PageError(f"what was stored is damaged ({type(error).__name__}: {error})") from None
        return record


def _size_of(thing: Any, seen: set[int]) -> int:
    """Memory of parsed JSON and of what is in it; `seen` holds the ids of what was counted already."""
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    size = sys.getsizeof(thing)
    if isinstance(thing, Weights):
        thing = thing.__dict__
    if isinstance(thing, dict):
        size += sum(_size_of(key, seen) + _size_of(value, seen) for key, value in thing.items())
    elif isinstance(thing, (list, tuple)):
        size += sum(_size_of(value, seen) for value in thing)
    return size


def answer_hash(text: str) -> str:
    """Return the hash of an answer."""
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()}"


def exported_json(record: Record) -> str:
    """Write a comparison for programs: one object, indented; the answers as texts, with the numbers beside them."""
    columns = [
        {
            "name": column["about"]["name"],
            "kind": column["about"]["kind"],
            "weights": weights.hash,
            "revision": weights.revision,
            "answer": text_of(column),
            "ended": column["state"],
            "error": column["error"],
            "tokens": column["tokens"],
            "seconds_to_first_token": column["first"],
            "tokens_per_second": column["rate"],
            "milliseconds_per_step": column["step"],
        }
        for column, weights in zip(record.columns, record.weights, strict=True)
    ]
    content = {
        "prompt": record.prompt,
        "sampling": record.sampling,
        "base": record.base,
        "time": record.time,
        "summary": record.status["words"],
        "columns": columns,
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def exported_markdown(record: Record) -> str:
    """Write a comparison for readers. Texts are in fences that they cannot leave, names are escaped."""
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in record.sampling.items())
    lines = ["| | | tokens | tokens/s | first token |", "| --- | --- | ---: | ---: | ---: |"]
    answers = []
    for column in record.columns:
        name = escaped(column["about"]["name"])
        numbers = [_number(column, *one) for one in (("tokens", "{:d}"), ("rate", "{:.1f}"), ("first", "{:.2f} s"))]
        lines.append(f"| {name} | {escaped(column['about']['facts'])} | {' | '.join(numbers)} |")
        answers.append(f"## {name}\n\n{fenced(text_of(column)) if text_of(column) else 'No text.'}")
        if column["error"]:
            answers.append(f"Failed: {escaped(column['error'])}")
    told = f"{escaped(record.status['words'])} {record.time}. Base: {escaped(record.base)}. Settings: {settings}."
    parts = ["# One prompt, side by side", fenced(record.prompt), told, "\n".join(lines), *answers]
    return "\n\n".join(parts) + "\n"


def _number(column: dict[str, Any], name: str, form: str) -> str:
    return "" if column[name] is None else form.format(column[name])


def escaped(text: str) -> str:
    """Make a text one line that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", " ".join(text.split()))


def fenced(text: str) -> str:
    """Put a text between fences longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
