"""Read the values of files (JSONL, CSV, Parquet, documents) and of data sets on the Hub, each with its location."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora_hub.errors import DataError
from minilora_hub.quiet import quiet_libraries
from minilora_hub.training.row_formats import without_nulls

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet", ".txt", ".md")
PASSAGE = 1000
"""Characters after which a passage of a document ends with its paragraph; longer paragraphs are not split."""
CR_ONLY = "has lines that end with CR only: save it with LF line endings"
PARQUET_ROWS = 1000
PARQUET_BYTES = 2**26
"""Rows of a Parquet file that are converted to Python objects at a time."""


@dataclass(frozen=True)
class BadRow:
    """An invalid row: its location, and the reason."""

    place: str
    reason: str


def read_values(sources: tuple[str, ...], split: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    """Yield (place, parsed value or BadRow) of every row; see `read_rows`."""
    for source in sources:
        count = 0
        for found in _values(source, split, revision):
            count += 1
            yield found
        if not count:
            raise DataError(f"{source}: has no rows")


def is_file(source: str) -> bool:
    """Return whether a source is a file, and not the id of a data set."""
    path = Path(source).expanduser()
    return path.suffix.lower() in SUFFIXES or path.exists()


def _values(source: str, split: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"data {source!r} is a folder: pass files ({', '.join(SUFFIXES)}) or the id of a data set")
    if is_file(source):
        if not path.is_file():
            raise DataError(f"data {source!r}: no such file")
        if not path.stat().st_size:
            raise DataError(f"{path.name}: is empty (0 bytes)")
        readers = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
        reader = (readers | {".txt": _read_document, ".md": _read_document}).get(path.suffix.lower())
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


def _read_document(path: Path) -> Iterator[tuple[str, Any]]:
    """Split a document at empty lines into passages of about `PASSAGE` characters."""
    passage, began = "", 1
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = _decoded(raw, number, f"{path.name}:{number}")
            if isinstance(line, BadRow):
                raise DataError(f"{line.place}: {line.reason}")
            line = line.rstrip("\r\n") + "\n"  # otherwise the ends of lines of Windows would be learned
            if "\r" in line:
                raise DataError(f"{path.name}:{number}: {CR_ONLY}")
            if not line.strip() and len(passage) >= PASSAGE:
                yield f"{path.name}:{began}", {"text": passage.strip("\n")}
                passage = ""
            elif line.strip() or passage:
                began = number if not passage else began
                passage += line
    if passage.strip():
        yield f"{path.name}:{began}", {"text": passage.strip("\n")}


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
        if twice := [name for name in heads if heads.count(name) > 1 and name]:
            raise DataError(f"{path.name}:1: has two columns called {twice[0]!r}: rename one")
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
        reason = CR_ONLY if old else f"is not CSV ({error})"
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
        stored = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
        rows = PARQUET_BYTES * file.metadata.num_rows // max(1, stored)  # of pictures, a few
        for batch in file.iter_batches(batch_size=max(1, min(PARQUET_ROWS, rows))):
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
            rows = _with_encoded_pictures(load_dataset(name, split=split, revision=revision))
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


def _with_encoded_pictures(rows: Any) -> Any:
    """Return a data set that yields pictures as they are in its files, as {"bytes": …}."""
    from datasets import Image, List

    for name, feature in rows.features.items():
        several = isinstance(feature, List)
        if isinstance(feature.feature if several else feature, Image):
            encoded = Image(decode=False)
            rows = rows.cast_column(name, List(encoded) if several else encoded)
    return rows
