"""Tokens per second of the rows of one comparison, over the same steps for all. No Gradio."""

from __future__ import annotations

from minilora_hub.compare.engine import Update


class CommonRates:
    """Measures each row over the steps in which all rows were generating.

    A step takes less time once other rows have ended, so the rate over its own tokens would depend on its length.

    Attributes:
        steps: the number of these steps; None until a row has ended. Rows that end before their second token, and so
            have no rate, do not count.
    """

    def __init__(self) -> None:
        self.steps: int | None = None
        self._rates: dict[int, float | None] = {}

    def add(self, update: Update) -> float | None:
        """Add the update of a row, and return its rate; None before its second token."""
        if self.steps is None or update.tokens <= self.steps:
            self._rates[update.row] = update.tokens_per_second
        if update.finished and update.tokens > 1:
            self.steps = min(self.steps or update.tokens, update.tokens)
        return self._rates.get(update.row)
