"""The problems that checks find, and the folder that they read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.names import PEFT_CONFIG
from minilora_hub.adapter_folder.results import Results
from minilora_hub.documents import strict_json
from minilora_hub.errors import AdapterError

LARGEST_TEXT = 64 * 2**20
LARGEST_HEADER = 100 * 2**20  # safetensors' own limit


@dataclass(frozen=True, order=True)
class Problem:
    """Something that is wrong with a folder, or that could not be checked.

    Attributes:
        code: identifier of the check that found it, e.g. ``"secret"``; stable, for scripts.
        file: path in the folder; "" for the folder as a whole.
        message: what is wrong. It never repeats a secret.
        remedy: what to do.
        blocking: whether the folder must not be published. False for unknown facts and recommendations.
    """

    code: str
    file: str
    message: str
    remedy: str
    blocking: bool = True


@dataclass(frozen=True)
class Folder:
    """The regular files of a folder, and their parsed contents as the checks need them.

    Attributes:
        path: the folder.
        files: ``{path in the folder: file}``, without links, sockets and the like.
    """

    path: Path
    files: dict[str, Path]

    @property
    def peft_layout(self) -> bool:
        """Whether the root is an adapter in PEFT's own format, without our code."""
        return "config.json" not in self.files and PEFT_CONFIG in self.files

    def data(self, name: str) -> bytes | None:
        """Return a file's bytes, the header of a safetensors file; None for a large or missing one."""
        path = self.files.get(name)
        if path is None:
            return None
        if name.endswith(".safetensors"):
            return safetensors_header(path)
        return path.read_bytes() if path.stat().st_size <= LARGEST_TEXT else None

    def text(self, name: str) -> str | None:
        """Return a file's text; None where it is not UTF-8, or holds NULs as binary files do."""
        data = self.data(name)
        if data is None or b"\0" in data:
            return None
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return None

    @cached_property
    def texts(self) -> dict[str, str]:
        """{name: text} of every file that is text, and of the headers of safetensors files."""
        found = ((name, self.text(name)) for name in self.files)
        return {name: text for name, text in found if text is not None}

    @cached_property
    def unescaped(self) -> dict[str, str]:
        """{name: its strings} of JSON with escapes, which would hide secrets and paths."""
        found = {}
        for name, text in self.texts.items():
            if "\\" in text and name.endswith((".json", ".safetensors")):
                try:
                    found[name] = "\n".join(strings_in(json.loads(text)))
                except (ValueError, RecursionError):
                    continue
        return found

    @cached_property
    def json_files(self) -> dict[str, Any]:
        """{name: content} of the JSON files; those that do not parse are left out, and found by a check."""
        found = {}
        for name in self.files:
            if name.endswith(".json"):
                try:
                    found[name] = strict_json(self.data(name) or b"")
                except ValueError:
                    continue
        return found

    @cached_property
    def results(self) -> Results | AdapterError:
        """The content of results.json, or the error of reading it."""
        try:
            return Results.load(self.path)
        except AdapterError as error:
            return error

    @property
    def config(self) -> dict[str, Any]:
        """The adapter's configuration, {} where there is none that parses."""
        content = self.json_files.get(PEFT_CONFIG if self.peft_layout else "config.json")
        return content if isinstance(content, dict) else {}


def safetensors_header(path: Path) -> bytes | None:
    """Return the JSON header of a safetensors file, None if the file is too short for it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= LARGEST_HEADER else b""
    return header if len(header) == length and length else None


def strings_in(content: Any) -> Iterator[str]:
    """Yield every string in parsed JSON, keys included."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield key
            yield from strings_in(value)
    elif isinstance(content, list):
        for value in content:
            yield from strings_in(value)
