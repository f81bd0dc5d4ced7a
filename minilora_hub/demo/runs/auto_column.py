"""The column "auto": for each prompt it is answered by the adapter that an index chooses. No Gradio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from minilora_hub.adapter_folder.folders import Kind
from minilora_hub.compare.engine import Column, CompareEngine, Row
from minilora_hub.compare.prompt_index import AdapterIndex, Choice, choose_in, prompt_tokens
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
        AdapterError: the index cannot be read, or is of another base or other adapters.
    """

    def __init__(self, engine: CompareEngine, file: Path, fingerprint: str) -> None:
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

    def check(self, rows: Sequence[Row], among: Sequence[str]) -> list[Row]:
        """Return the rows that these can become, with each adapter that can be chosen, to validate them.

        Raises:
            ValueError: the prompt has no token by which to choose.
        """
        own = [row for row in rows if row.adapter == AUTO]
        for row in own:
            prompt_tokens(self._engine.tokenizer, row.prompt)
        others = [row for row in rows if row.adapter != AUTO]
        return [*others, *(replace(row, adapter=name) for row in own for name in among)]

    def choose(self, rows: Sequence[Row], among: Sequence[str]) -> tuple[Choice, list[Row]]:
        """Choose among these adapters by the prompt, with one forward of the base; return the rows to be answered."""
        choice = choose_in(self._engine, self._index, rows[0].prompt, among)
        return choice, [replace(row, adapter=choice.adapter) if row.adapter == AUTO else row for row in rows]
