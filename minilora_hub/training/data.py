"""Read rows of training data, each with its location. Files and data sets are read in `sources.py`.

The fields of a row determine its kind, the first of these that matches:

    messages             [{"role": "user", "content": …}, …]; the loss covers the assistant's turns
    prompt, completion   texts, or lists of messages
    text                 plain text; of a .txt or .md file, each passage of whole paragraphs

Rows of ShareGPT and Alpaca become messages (see `row_formats`). Other fields are ignored, except `tools`, which is
passed to the chat template. A message with `weight` 0 (or `loss` false) has no loss. Torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minilora_hub.formatting import lone_surrogate
from minilora_hub.training.row_formats import (
    ROLES,
    as_messages,
    check_learnable,
    check_turn,
    parsed_tools,
)
from minilora_hub.training.sources import BadRow, is_file, read_values

KINDS = {"messages": ("messages",), "prompt and completion": ("prompt", "completion"), "text": ("text",)}


@dataclass(frozen=True)
class Row:
    """A valid row: its location (``"data.jsonl:3"``), its kind, its fields, and the folder of its file, if any."""

    place: str
    kind: str
    fields: dict[str, Any]
    folder: Path | None = None


def read_rows(
    sources: tuple[str, ...],
    *,
    split: str = "train",
    revision: str | None = None,
    check: Callable[[str, Any], Row | BadRow] | None = None,
) -> Iterator[Row | BadRow]:
    """Read every row of files, or of one data set on the Hub.

    Args:
        sources: paths of files, or an id on the Hub.
        split: the split of a Hub data set.
        revision: its branch, tag or commit.
        check: makes a row of (place, parsed value). Default: `checked`.

    Raises:
        DataError: a file is missing, empty, of an unknown kind or cannot be read at all.
    """
    for source in sources:
        folder = Path(source).expanduser().parent if is_file(source) else None
        for place, value in read_values((source,), split, revision):
            row = value if isinstance(value, BadRow) else (check or checked)(place, value)
            yield replace(row, folder=folder) if isinstance(row, Row) else row


def checked(place: str, value: Any) -> Row | BadRow:
    """Return a parsed value as a row of a known kind, or as a bad row with the reason."""
    try:
        return _row(place, value)
    except ValueError as error:
        return BadRow(place, str(error))


def _row(place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"is a {type(value).__name__}: each row must be an object with named fields")
    check_learnable(value)
    fields = as_messages({name: content for name, content in value.items() if content is not None})
    fields["tools"] = parsed_tools(fields.get("tools"))
    present = {name for name, content in fields.items() if content is not None}
    kind = next((kind for kind, names in KINDS.items() if present.issuperset(names)), None)
    if kind is None:
        for names in KINDS.values():
            missing = set(names) - present
            if missing < set(names):
                raise ValueError(f"has no {' and no '.join(sorted(missing))} beside {sorted(set(names) & present)}")
        raise ValueError(
            f"has the fields {sorted(present)}; needed are messages, prompt and completion, text, conversations, or "
            "instruction and output"
        )
    _check_values(kind, fields)
    kept = {name: fields[name] for name in (*KINDS[kind], "tools") if fields.get(name) is not None}
    if surrogate := lone_surrogate(kept):
        raise ValueError(f"contains a lone surrogate, {surrogate}, which no tokenizer can encode: repair the text")
    return Row(place, kind, kept)


def _check_values(kind: str, fields: dict[str, Any]) -> None:
    texts = {name: fields[name] for name in KINDS[kind] if isinstance(fields[name], str) and kind != "messages"}
    for name in KINDS[kind]:
        if name in texts:
            if not texts[name].strip() and name != "prompt":
                raise ValueError(f"{name} is empty")
        elif kind == "text":
            raise ValueError(f"text is a {type(fields[name]).__name__}, not a string")
        else:
            _check_messages(name, fields[name])
    if kind == "messages":
        if not any(turn["role"] == "assistant" for turn in fields["messages"]):
            raise ValueError("messages: has no turn of the assistant, so there is nothing to train on")
    elif len(texts) == 1 and kind != "text":
        raise ValueError("prompt and completion must both be strings, or both be lists of messages")
    elif not texts:
        roles = {turn["role"] for turn in fields["completion"]}
        if roles != {"assistant"}:
            raise ValueError(f"completion: has turns of {sorted(roles)}; they must be the assistant's")


def _check_messages(name: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        got = type(value).__name__ if value else f"empty {type(value).__name__}"
        raise ValueError(f"{name} must be a list of messages, got {got}")
    for number, turn in enumerate(value, 1):
        try:
            if not isinstance(turn, dict) or turn.get("role") not in ROLES:
                got = repr(turn.get("role")) if isinstance(turn, dict) else type(turn).__name__
                raise ValueError(f"must have a role, one of {', '.join(ROLES)}; got {got}")
            if not isinstance(turn.get("content"), str) and not turn.get("tool_calls"):
                parts = " (task='image-text-to-text' takes parts)" if isinstance(turn.get("content"), list) else ""
                raise ValueError(f"must have a content, a string{parts}")
            check_turn(turn)
        except ValueError as error:
            raise ValueError(f"{name}, turn {number}: {error}") from None
