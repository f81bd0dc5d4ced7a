"""Cache computed answers in files, so that an interrupted run can continue and a base is measured only once.

There is one file for each model (base and adapter) and one line for each batch. A line's key is a hash of everything
that determines the result: the weights, the prompts of the whole batch, the limits, the dtype, the code, the libraries.
So a resumed run gives the same results as one that was not interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.names import OUR_CONFIG, PEFT_CONFIG, WEIGHTS
from minilora_hub.code_inputs import code_inputs, library_inputs

FORMAT = 2
# Hashed at import, because the files may change while this process runs.
CODE_AND_LIBRARIES = code_inputs("minilora_hub.evaluation.run") | library_inputs()


def default_folder() -> Path:
    """Return the folder in minilora_hub's cache."""
    from minilora_hub.bases.embedded import cache_root

    return cache_root() / "evaluation"


def digest_of(value: Any) -> str:
    """Hash a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def adapter_digest(folder: Path) -> str:
    """Hash an adapter's weights and configuration: the files that determine its answers."""
    digest = hashlib.sha256()
    for name in (PEFT_CONFIG, OUR_CONFIG, WEIGHTS):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                digest.update(f"{name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


class AnswerCache:
    """The cached results of one model.

    Args:
        folder: the folder of the files; None: nothing is written.
        model: JSON that identifies the model's weights and how they are run.

    Attributes:
        hits: number of values that were found.
    """

    def __init__(self, folder: Path | None, model: dict[str, Any]) -> None:
        """Read the file. A line that was not written completely is ignored."""
        self._model = {"format": FORMAT, **model} | CODE_AND_LIBRARIES
        self._path = None if folder is None else folder / f"{digest_of(self._model)[:32]}.jsonl"
        self._known: dict[str, Any] = {}
        self._torn = False
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
        """Return the key of this model's result for a piece of work, described as JSON."""
        return digest_of([self._model, work])

    def get(self, key: str) -> Any | None:
        """Return the value of a key; None if there is none."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Add a JSON value, and write it to the disk."""
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
