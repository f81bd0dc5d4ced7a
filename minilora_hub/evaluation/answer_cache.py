"""What was computed, kept in files: a run that is stopped goes on where it was, and a base is measured once.

A file for each model (base and adapter), a line for each batch. A line's key is a hash of everything that determines
what the batch computes: the weights, the prompts of the whole batch, the limits, the dtype, the code that computes it,
the libraries. So an answer is never taken for that of other weights, settings or code, and a run that is resumed gives
what it would have given.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from minilora_hub.code_inputs import code_inputs, library_inputs

FORMAT = 2
# Hashed as this module is imported: what a file says later is not what this process runs.
CODE_AND_LIBRARIES = code_inputs("minilora_hub.evaluation.run") | library_inputs()


def default_folder() -> Path:
    """Where it is kept: in minilora_hub's cache."""
    from minilora_hub.bases.embedded import cache_root

    return cache_root() / "evaluation"


def digest_of(value: Any) -> str:
    """Hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def adapter_digest(folder: Path) -> str:
    """Hash of an adapter's weights and configuration: the files that determine what it computes."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "config.json", "adapter_model.safetensors"):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                digest.update(f"{name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


class AnswerCache:
    """What one model has computed.

    Args:
        folder: where the files are; None keeps nothing.
        model: what identifies the model's weights and how they are computed, as JSON.

    Attributes:
        hits: how many values were found.
    """

    def __init__(self, folder: Path | None, model: dict[str, Any]) -> None:
        """Read what is there. A line that was not written to its end is as good as none."""
        self._model = {"format": FORMAT, **model} | CODE_AND_LIBRARIES
        self._path = None if folder is None else folder / f"{digest_of(self._model)[:32]}.jsonl"
        self._known: dict[str, Any] = {}
        self._torn = False
        self.hits = 0
        if self._path is None or not self._path.is_file():
            return
        text = self._path.read_text(encoding="utf-8", errors="replace")
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.split("\n"):
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                continue

    def key(self, work: dict[str, Any]) -> str:
        """The key of a piece of work, described as JSON, for this model."""
        return digest_of([self._model, work])

    def get(self, key: str) -> Any | None:
        """What is known under a key; None where nothing is."""
        found = self._known.get(key)
        self.hits += found is not None
        return found

    def put(self, key: str, value: Any) -> None:
        """Add a value, a JSON value, and write it through to the disk."""
        self._known[key] = value
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            line = json.dumps({"key": key, "value": value}, separators=(",", ":")) + "\n"
            file.write(("\n" if self._torn else "") + line)
            file.flush()
            os.fsync(file.fileno())
        self._torn = False
