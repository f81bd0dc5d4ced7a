"""The column "auto": for each prompt it is answered by the adapter that an index chooses. No Gradio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from minilora_hub.adapter_folder.folders import Kind
from minilora_hub.compare.engine import Column, CompareEngine
from minilora_hub.compare.prompt_index import AdapterIndex, Choice, choose_in
from minilora_hub.demo.runs import zero_gpu
from minilora_hub.errors import AdapterError

AUTO = "auto"
COLUMN = Column(AUTO, cast(Kind, AUTO), detail="the adapter that suits the prompt")


class AutoColumn:
    """Chooses an adapter of a page for each prompt.

    Args:
        engine: the page's models.
        file: an index of `minilora route build`.
        fingerprint: of the base.

    Raises:
        AdapterError: the index cannot be read, is of another base or other adapters, or this is ZeroGPU.
    """

    def __init__(self, engine: CompareEngine, file: Path, fingerprint: str) -> None:
        if zero_gpu.is_zero_gpu():
            raise AdapterError("index: on ZeroGPU nothing is computed before a comparison, so no adapter can be chosen")
        self._engine, self._index = engine, AdapterIndex.load(file)
        self._index.require_base(fingerprint)
        names = [column.name for column in engine.columns]
        if AUTO in names:
            raise AdapterError(f"index: a model is called {AUTO!r}: rename its folder")
        missing = sorted(one.name for one in self._index.adapters if one.name not in names)
        if missing:
            raise AdapterError(f"index: its adapters {', '.join(missing)} are not on this page: name their folders")

    def known(self, columns: Sequence[Column]) -> list[str]:
        """Return the names of those of these columns that the index has."""
        ours = {one.name for one in self._index.adapters}
        return [column.name for column in columns if column.name in ours]

    def choose(self, prompt: str, columns: Sequence[Column]) -> tuple[Choice, Column]:
        """Choose among these columns; computes one forward of the base.

        Raises:
            ValueError: the prompt has no token.
        """
        choice = choose_in(self._engine, self._index, prompt, self.known(columns))
        return choice, next(column for column in columns if column.name == choice.adapter)
