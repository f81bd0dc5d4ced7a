"""Conversations of several turns: what each column was told and answered before. No Gradio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minilora_hub.compare.answer import Turns
from minilora_hub.demo.ui.page_state import text_of
from minilora_hub.errors import PageError

NEW, OWN = "new", "own"


class Conversation:
    """What the columns of the shown comparison have said, and what the next prompt continues.

    Attributes:
        continues: `NEW`: nothing. `OWN`: each column its own answers. A number: all columns those of this column.
    """

    def __init__(self) -> None:
        self.continues = NEW
        self._threads: list[tuple[tuple, Turns]] = []  # of each column: which model it is, and its messages

    def clear(self) -> None:
        """Forget it: other columns are shown."""
        self.continues, self._threads = NEW, []

    def follow(self, continues: str) -> None:
        """Set what the next prompt continues.

        Raises:
            PageError: it is none of the values of `continues`.
        """
        if continues not in (NEW, OWN, *map(str, range(len(self._threads)))):
            raise PageError(f"continue={continues[:20]!r}: must be {NEW!r}, {OWN!r} or the number of a column")
        self.continues = continues

    def keep(self, stage: dict[str, Any]) -> None:
        """Set the shown comparison, which the next prompt may continue."""
        self.rewind(stage)
        prompt, columns = stage["prompt"], stage["columns"]
        self._threads = [
            (model, (*before, ("user", prompt), ("assistant", text_of(column))))
            for (model, before), column in zip(self._threads, columns, strict=True)
        ]

    def rewind(self, stage: dict[str, Any]) -> None:
        """Go back to before a comparison, to run it again."""
        self._threads = [(_model(column["about"]), turns_before(column)) for column in stage["columns"]]
        if self.continues.isdigit() and int(self.continues) >= len(self._threads):
            self.continues = NEW

    def before(self, about: Sequence[dict[str, Any]]) -> list[Turns]:
        """Return the messages before the next prompt, for each of these columns; none for a model that said nothing."""
        if self.continues == NEW:
            return [()] * len(about)
        if self.continues == OWN:
            said = dict(self._threads)
            return [said.get(_model(one), ()) for one in about]
        return [self._threads[int(self.continues)][1]] * len(about)


def turns_before(column: dict[str, Any]) -> Turns:
    """Return the earlier turns of a column of a stage."""
    return tuple((role, text) for role, text in column.get("before", ()))


def _model(about: dict[str, Any]) -> tuple:
    return about["adapter"], about["solo"]
