"""Read the prompts of training rows, without their answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilora_hub.errors import DataError
from minilora_hub.training.data import Row, read_rows
from minilora_hub.training.settings import SETTINGS_FILE, read_yaml
from minilora_hub.training.sources import BadRow


def trained_on(adapter: Path) -> tuple[str, ...]:
    """Return the data that an adapter in the folder of its run was trained on, as it was named there.

    Raises:
        DataError: the folder does not say; published adapters do not.
    """
    file = adapter / SETTINGS_FILE
    data = read_yaml(file).get("data") if file.is_file() else None
    if not data:
        raise DataError(f"adapter {adapter.name!r}: its folder does not say what it was trained on")
    return (data,) if isinstance(data, str) else tuple(data)


def read_prompts(sources: Sequence[str], count: int) -> list[str]:
    """Read prompts, evenly spread over the rows: of a text file its lines, of training rows what the user says last.

    Args:
        sources: text files, files of training rows, or the id of a data set on the Hub.
        count: the most prompts that are returned.

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
        for row in read_rows((source,)):
            if isinstance(row, BadRow):
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
