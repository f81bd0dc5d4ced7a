"""Read rows of training data from JSONL, CSV and Parquet files and from data sets on the Hub, each with its location.

The fields of a row determine its kind, the first of these that matches:

    messages             [{"role": "user", "content": …}, …]; the loss covers the assistant's turns
    prompt, completion   texts, or lists of messages
    text                 plain text

Rows of ShareGPT and Alpaca become messages (see `row_formats`). Other fields are ignored, except `tools`, which is
passed to the chat template. A message with `weight` 0 (or `loss` false) has no loss. Torch is not imported.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora_hub.errors import DataError
from minilora_hub.quiet import quiet_libraries
from minilora_hub.training.row_formats import (
    ROLES,
    as_messages,
    check_learnable,
    check_turn,
    lone_surrogate,
    parsed_tools,
    without_nulls,
)

KINDS = {"messages": ("messages",), "prompt and completion": ("prompt", "completion"), "text": ("text",)}
SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")
PARQUET_ROWS = 1000
"""Rows of a Parquet file that are converted to Python objects at a time."""


@dataclass(frozen=True)
class Row:
    """A valid row: its location (``"data.jsonl:3"``), its kind, and its fields."""

    place: str
    kind: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """An invalid row: its location, and the reason."""

    place: str
    reason: str


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
    for place, value in read_values(sources, split, revision):
        yield value if isinstance(value, BadRow) else (check or checked)(place, value)


def read_values(sources: tuple[str, ...], split: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    """Yield (place, parsed value or BadRow) of every row; see `read_rows`."""
    for source in sources:
        count = 0
        for found in _values(source, split, revision):
            count += 1
            yield found
        if not count:
            raise DataError(f"{source}: has no rows")


def _values(source: str, split: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"data {source!r} is a folder: pass files ({', '.join(SUFFIXES)}) or the id of a data set")
    if path.suffix.lower() in SUFFIXES or path.exists():
        if not path.is_file():
            raise DataError(f"data {source!r}: no such file")
        if not path.stat().st_size:
            raise DataError(f"{path.name}: is empty (0 bytes)")
        readers = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
        reader = readers.get(path.suffix.lower())
        if reader is None:
            raise DataError(f"data {source!r}: must end with one of {', '.join(SUFFIXES)}")
        try:
            yield from reader(path)
        except OSError as error:
            raise DataError(f"{path.name} cannot be read: {error.strerror or error}") from error
        return
    yield from _read_hub(source, split, revision)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            place = f"{path.name}:{number}"
            text = _decoded(raw, number, place)
            if isinstance(text, BadRow):
                yield place, text
                continue
            if not text.strip():
                continue
            try:
                yield place, json.loads(text)
            except (ValueError, RecursionError) as error:
                yield place, BadRow(place, f"is not JSON ({_json_problem(error, text)})")


def _decoded(raw: bytes, number: int, place: str) -> str | BadRow:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{place}: is UTF-16, not UTF-8: save the file as UTF-8")
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return BadRow(place, f"is not UTF-8 (byte {error.start + 1} is 0x{raw[error.start]:02x}): save it as UTF-8")


def _json_problem(error: Exception, text: str) -> str:
    if isinstance(error, json.JSONDecodeError):
        if text.strip() in ("[", "[{") and error.pos >= len(text.rstrip()):
            return "this looks like one JSON array: write one object a line"
        return f"{error.msg} at column {error.colno}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    def lines() -> Iterator[str]:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                text = _decoded(raw, number, f"{path.name}:{number}")
                if isinstance(text, BadRow):  # a cell may span lines, so the rows around it are lost as well
                    raise DataError(f"{text.place}: {text.reason}")
                yield text

    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines(), strict=True)
    try:
        heads = next(reader, None)
        if heads is None:
            return
        start = reader.line_num + 1
        for cells in reader:
            place, start = f"{path.name}:{start}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(heads):
                yield place, BadRow(place, f"has {len(cells)} cells, the header has {len(heads)}")
                continue
            yield place, _parsed_cells(dict(zip(heads, cells, strict=True)))
    except csv.Error as error:
        old = "new-line character" in str(error)
        reason = "has lines that end with CR only: save it with LF line endings" if old else f"is not CSV ({error})"
        raise DataError(f"{path.name}:{max(reader.line_num, 1)}: {reason}") from error


def _parsed_cells(fields: dict[str, str]) -> dict[str, Any]:
    """Parse cells that hold a list of messages as JSON; every other cell is text."""
    parsed: dict[str, Any] = dict(fields)
    for name in ("messages", "prompt", "completion", "conversations", "history"):
        if fields.get(name, "").lstrip().startswith(("[{", "[[")):
            try:
                parsed[name] = json.loads(fields[name])
            except ValueError:
                continue  # text that starts like a list, or an invalid list: a later check reports it
    return parsed


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=PARQUET_ROWS):
            for fields in batch.to_pylist():
                number += 1
                yield f"{path.name}, row {number}", without_nulls(fields)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path.name}: is not a readable Parquet file ({str(error).splitlines()[0]})") from error


def _read_hub(name: str, split: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise DataError(f"data {name!r}: neither a file nor a valid id of a data set (owner/name)") from error
    try:
        with quiet_libraries():
            rows = load_dataset(name, split=split, revision=revision)
    except DatasetNotFoundError as error:
        at = f" at revision {revision!r}" if revision else ""
        raise DataError(
            f"data {name!r}{at}: no such file, and no such data set on the Hub, or it is private or gated: check the "
            "name, or log in with `hf auth login`"
        ) from error
    except Exception as error:  # raised by one of the many libraries that `datasets` reads with
        raise DataError(f"data {name!r} cannot be read: {' '.join(str(error).split())[:300]}") from error
    for number, fields in enumerate(rows, 1):
        yield f"{name} ({split}), row {number}", without_nulls(fields)


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
                raise ValueError("must have a content, a string")
            check_turn(turn)
        except ValueError as error:
            raise ValueError(f"{name}, turn {number}: {error}") from None
