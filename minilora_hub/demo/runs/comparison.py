"""A finished comparison, which votes, share links, history and exports refer to. No Gradio."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from minilora_hub.demo.runs.own_sampling import in_words
from minilora_hub.demo.ui.page_state import ENDED, text_of
from minilora_hub.documents import Scalar, strict_json
from minilora_hub.errors import PageError
from minilora_hub.formatting import block, inline

VERSION = 2
"""Since 2 columns may have settings of their own, which a reader of 1 would not show."""
UNKNOWN = "unknown"
COLUMN_BYTES = 4000
"""Upper bound of the bytes of a column without its log and its error."""


def now() -> str:
    """Return the time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Weights:
    """The weights that a column ran.

    Attributes:
        hash: hash of the adapter's file, ``"sha256:…"``; for the base, its checkpoint's fingerprint; or ``"unknown"``.
        revision: their commit on the Hub, None where they come from a folder.
    """

    hash: str = UNKNOWN
    revision: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A prompt, the settings, and the answer of each column.

    Attributes:
        prompt: the prompt.
        sampling: {setting: value}; a column's own are in the stage, see `sampling_of`.
        base: the base's name; its id on the Hub if it has one.
        stage: the columns' state at the end, the base's first; see `minilora_hub.demo.ui.page_state`.
        status: content of the status line.
        weights: the weights of each column.
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
        """The columns of the stage."""
        return list(self.stage["columns"])

    @property
    def names(self) -> list[str]:
        """The columns' names."""
        return [column["about"]["name"] for column in self.columns]

    def sampling_of(self, column: dict[str, Any]) -> dict[str, Scalar]:
        """Return the settings of one of its columns."""
        return self.sampling | (column.get("sampling") or {})

    @property
    def complete(self) -> bool:
        """Whether every answer ended by itself, without an error and without being stopped."""
        return all(column["state"] in ENDED for column in self.columns)

    @property
    def memory(self) -> int:
        """Bytes of memory that it takes."""
        texts = [self.prompt, *(column[name] for column in self.columns for name in ("log", "error"))]
        texts += [text for column in self.columns for _, text in column.get("before", ())]
        return COLUMN_BYTES * len(self.columns) + sum(sys.getsizeof(text) for text in texts)

    def to_json(self) -> str:
        """Write it as JSON that `from_json` reads."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Comparison:
        """Parse the output of `to_json`.

        Raises:
            PageError: it is damaged, or of another version.
        """
        try:
            content = strict_json(text)
            version = content.pop("version")
            if version not in (1, VERSION):
                raise PageError(f"the comparison was stored by another version of minilora_hub ({version!r})")
            weights = tuple(Weights(**one) for one in content.pop("weights"))
            comparison = cls(weights=weights, **content)
            texts = [text_of(column) for column in comparison.columns]
            for column in comparison.columns:
                comparison.sampling_of(column)
            if not comparison.names or len(texts) != len(weights) or not isinstance(comparison.sampling, dict):
                raise ValueError("its columns do not fit together")
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise PageError(f"the stored comparison is damaged ({type(error).__name__}: {error})") from None
        return comparison


def answer_hash(text: str) -> str:
    """Return the hash of an answer."""
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()}"


def exported_json(comparison: Comparison) -> str:
    """Export a comparison as JSON: one indented object, with each answer as one string."""
    columns = [
        {
            "name": column["about"]["name"],
            "kind": column["about"]["kind"],
            "weights": weights.hash,
            "revision": weights.revision,
            "sampling": comparison.sampling_of(column),
            **({"route": column["route"]} if column.get("route") else {}),
            "before": column.get("before", []),
            "answer": text_of(column),
            "right": column.get("right"),
            "ended": column["state"],
            "error": column["error"],
            "tokens": column["tokens"],
            "seconds_to_first_token": column["first"],
            "tokens_per_second": column["rate"],
            "milliseconds_per_step": column["step"],
        }
        for column, weights in zip(comparison.columns, comparison.weights, strict=True)
    ]
    content = {
        "prompt": comparison.prompt,
        "expected": comparison.stage.get("expected"),
        "sampling": comparison.sampling,
        "base": comparison.base,
        "time": comparison.time,
        "summary": comparison.status["words"],
        "columns": columns,
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def exported_markdown(comparison: Comparison) -> str:
    """Export a comparison as Markdown. Texts are in code fences that they cannot close, and names are escaped."""
    settings = in_words(comparison.sampling)
    rows = ["| | | | tokens | tokens/s | first token |", "| --- | --- | --- | ---: | ---: | ---: |"]
    answers = []
    for column in comparison.columns:
        name, text, about = inline(column["about"]["name"]), text_of(column), column["about"]
        facts = f"{inline(about['kind'])} | {inline(about['facts'])}"
        rate = "" if column["rate"] is None else f"{column['rate']:.1f}"
        first = "" if column["first"] is None else f"{column['first']:.2f} s"
        rows.append(f"| {name} | {facts} | {column['tokens']} | {rate} | {first} |")
        earlier = "".join(f"{inline(role)}, earlier:\n\n{block(said)}\n\n" for role, said in column.get("before", ()))
        own = f"Its own settings: {inline(in_words(column['sampling']))}.\n\n" if column.get("sampling") else ""
        if route := column.get("route"):
            chosen = f"Answered by {inline(route['adapter'])}, chosen by the prompt"
            own = f"{chosen}: similarity {route['similarity']:.3f}.\n\n{own}"
        answers.append(f"## {name}\n\n{own}{earlier}{block(text) if text else 'No text.'}")
        if column["error"]:
            answers.append(f"Failed: {inline(column['error'])}")
    summary = f"{inline(comparison.status['words'])} {comparison.time}. Base: {inline(comparison.base)}."
    parts = ["# One prompt, side by side", block(comparison.prompt), f"{summary} Settings: {settings}."]
    return "\n\n".join([*parts, "\n".join(rows), *answers]) + "\n"
