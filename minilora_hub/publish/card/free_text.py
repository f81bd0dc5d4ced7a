"""Parse the sections of a card that the author writes and that are kept when the card is rendered again.

    <!-- minilora:free-text intro -->
    Whatever the author wants to say.
    <!-- /minilora:free-text -->

Each mark is alone on its line. Inside a code block it is plain text, so a model's answer cannot open a section.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from minilora_hub.errors import AdapterError

OPEN = re.compile(r"<!-- minilora:free-text ([a-z][a-z0-9-]*) -->\s*")
CLOSE = "<!-- /minilora:free-text -->"
Kind = Literal["text", "code", "mark", "free"]
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")


def read_card(folder: Path) -> str | None:
    """Return the README.md of a folder, None where there is none.

    Raises:
        AdapterError: it is not UTF-8.
    """
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        return decode_card(card.read_bytes())
    except UnicodeDecodeError as error:
        raise AdapterError(f"{card} is not UTF-8 ({error}): repair or delete it") from error


def decode_card(content: bytes) -> str:
    """Return a card as text, with line feeds for the line ends of every system. May raise UnicodeDecodeError."""
    return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def classify(card: str) -> Iterator[tuple[Kind, str, str]]:
    """Classify every line of a card.

    Yields:
        ``(kind, section, line)``: ``"mark"`` (opens or closes the section), ``"free"`` (in it), ``"code"`` (a fenced
        block, with its fences) or ``"text"``; `section` is "" outside one.

    Raises:
        AdapterError: a section is not closed, or its name occurs twice.
    """
    seen: set[str] = set()
    name, opened_at, fence = "", 0, ""
    lines = card.splitlines()
    # In the front matter, which is YAML, a fence or a mark is part of a value.
    metadata_end = lines.index("---", 1) + 1 if lines[:1] == ["---"] and "---" in lines[1:] else 0
    for count, line in enumerate(lines, start=1):
        if count <= metadata_end:
            yield "text", "", line
            continue
        found, opening = FENCE.fullmatch(line), OPEN.fullmatch(line)
        if name:
            yield ("mark" if line.strip() == CLOSE else "free"), name, line
            name = "" if line.strip() == CLOSE else name
        elif fence:
            yield "code", "", line
            if found and found[1].startswith(fence) and not found[2].strip():
                fence = ""
        elif found:
            fence = found[1]
            yield "code", "", line
        elif opening:
            name, opened_at = opening[1], count
            if name in seen:
                raise AdapterError(
                    f"README.md, line {count}: a second free-text section {name!r}: give it another name"
                )
            seen.add(name)
            yield "mark", name, line
        else:
            yield "text", "", line
    if name:
        raise AdapterError(f"README.md, line {opened_at}: the free-text section {name!r} is not closed: add {CLOSE}")


def sections_of(card: str) -> dict[str, str]:
    """Return ``{name: text between its marks}`` of every section, also of empty ones."""
    sections: dict[str, list[str]] = {}
    for kind, name, line in classify(card):
        if kind in ("mark", "free"):
            sections.setdefault(name, []).extend([line] if kind == "free" else [])
    return {name: "\n".join(lines).strip("\n") for name, lines in sections.items()}


def squeeze(card: str) -> str:
    """Collapse consecutive blank lines; free text and code are not changed."""
    kept: list[str] = []
    for kind, _, line in classify(card):
        if kind != "text" or line.strip() or (kept and kept[-1].strip()):
            kept.append(line.rstrip() if kind == "text" else line)
    return "\n".join(kept).rstrip("\n") + "\n"


def section(name: str, text: str) -> str:
    """Return a section with its marks."""
    return "\n".join([f"<!-- minilora:free-text {name} -->", *([text] if text else []), CLOSE])
