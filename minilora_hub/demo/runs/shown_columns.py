"""The columns that a visitor's page shows: the page's own adapters or chosen ones, and single experts. No Gradio."""

from __future__ import annotations

from collections.abc import Sequence

from minilora_hub.compare.engine import Column
from minilora_hub.demo.adapters.catalogue import MOST_ADAPTERS
from minilora_hub.demo.adapters.columns import SoloExperts, describe_columns
from minilora_hub.demo.runs.auto_column import COLUMN
from minilora_hub.demo.runs.runner import Runner
from minilora_hub.errors import AdapterError, PageError


class ShownColumns:
    """The columns of one page.

    Args:
        runner: runs the comparisons.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._adapters: tuple[str, ...] | None = None  # None: the page's own adapters
        self._solo: SoloExperts | None = None
        self._next_solo: SoloExperts | None = None

    def columns(self) -> tuple[Column, ...]:
        """Return the columns that the page shows.

        Raises:
            AdapterError: an adapter is no longer in memory.
        """
        columns = self._columns_without_solo()
        if self._solo:
            return self._solo.columns(columns)
        auto = self._runner.auto
        # One adapter leaves nothing to choose.
        return (*columns, COLUMN) if auto and len(auto.known(columns)) > 1 else columns

    def _columns_without_solo(self) -> tuple[Column, ...]:
        own = self._runner.engine.columns
        if self._adapters is None:
            return own
        columns = [own[0]]
        for name in self._adapters:
            column = self._runner.catalogue.column(name)
            if column is None:
                raise AdapterError(
                    f"{name} is no longer in memory, because other visitors opened other adapters: choose it again"
                )
            columns.append(column)
        return tuple(columns)

    def about(self) -> list[dict]:
        """Describe the shown columns, or the page's default columns if one of them is no longer in memory."""
        try:
            columns = self.columns()
        except AdapterError:
            columns = self._runner.engine.columns
        return describe_columns(self._runner.catalogue, columns)

    def adapters(self) -> list[str]:
        """Return the names of the adapters that the page shows."""
        try:
            return [column.name for column in self._columns_without_solo()[1:]]
        except AdapterError:
            return []

    async def choose(self, names: Sequence[str]) -> None:
        """Show these adapters beside the base, in this order; load those that are not in memory.

        Raises:
            PageError: there are none, or too many.
            AdapterError: one of them cannot be shown. The shown columns are not changed then.
        """
        names = list(dict.fromkeys(names))
        if not 1 <= len(names) <= MOST_ADAPTERS:
            raise PageError(f"{len(names)} adapters are chosen: choose 1 to {MOST_ADAPTERS}")
        own = {column.name for column in self._runner.engine.columns[1:]}
        for name in names:
            if name not in own:
                await self._runner.fetch(name)
        if not all(self._runner.catalogue.column(name) for name in names):
            most = self._runner.limits.link_adapters
            raise AdapterError(f"this page keeps {most} adapters beside its own: choose fewer")
        self._adapters = tuple(names)

    def ask_solo(self, solo: SoloExperts) -> None:
        """Let experts of an adapter answer alone in the next comparison, each in a separate column.

        Raises:
            AdapterError: the page does not show this adapter, or it has no such expert.
        """
        solo.columns(self._columns_without_solo())
        self._next_solo = solo
