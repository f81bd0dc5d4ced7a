"""Read the prompts of training rows, without their answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilora_hub.errors import DataError
from minilora_hub.training.data import Row, read_rows
from minilora_hub.training.settings import SETTINGS_FILE, read_yaml
from minilora_hub.training.sources import BadRow


def trained_on(adapter: Path) -> dict[str, Any]:
    """Return what `read_prompts` reads of an adapter in the folder of its run: the data that it was trained on.

    Raises:
        DataError: the folder does not say; published adapters do not.
    """
    file = adapter / SETTINGS_FILE
    run = read_yaml(file) if file.is_file() else {}
    if not (data := run.get("data")):
        raise DataError(f"adapter {adapter.name!r}: its folder does not say what it was trained on")
    return {
        "sources": (data,) if isinstance(data, str) else tuple(data),
        "split": run.get("data_split") or "train",
        "revision": run.get("data_revision"),
        "skip_bad_rows": run.get("skip_bad_rows", False),
    }


def read_prompts(
    sources: Sequence[str], count: int, split: str = "train", revision: str | None = None, skip_bad_rows: bool = False
) -> list[str]:
    """Read prompts, evenly spread over the rows: of a text file its lines, of training rows what the user says last.

    Args:
        sources: text files, files of training rows, or the id of a data set on the Hub.
        count: the most prompts that are returned.
        split: of a data set on the Hub.
        revision: its branch, tag or commit.
        skip_bad_rows: whether invalid rows are skipped.

    Raises:
        DataError: a file cannot be read, or has no prompt.
    """
    found: list[str] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.suffix == ".txt":
            try:
                found += [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"prompts {source!r} cannot be read as text: {error}") from error
            continue
        for row in read_rows((source,), split=split, revision=revision):
            if isinstance(row, BadRow):
                if skip_bad_rows:
                    continue
                raise DataError(f"{row.place}: {row.reason}")
            text = _prompt_of(row)
            if text.strip():
                found.append(text)
    if not found:
        raise DataError(f"{', '.join(sources)}: has no prompt")
    return [found[index * len(found) // count] for index in range(count)] if len(found) > count else found


def _prompt_of(row: Row) -> str:
    """The last message of the user, the prompt, or plain text as it is."""
    if row.kind == "text":
        return str(row.fields["text"])
    said = row.fields["messages" if row.kind == "messages" else "prompt"]
    if isinstance(said, str):
        return said
    users = [turn for turn in said if turn.get("role") == "user"]
    return _text(users[-1].get("content")) if users else ""


def _text(content: Any) -> str:
    """A message's content: a text, or parts of which the texts count."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
