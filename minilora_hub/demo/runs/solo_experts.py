"""Experts of a mixture that answer alone, beside the mixture and the base. No Gradio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minilora_hub.compare.engine import Column
from minilora_hub.errors import AdapterError

MOST_COLUMNS = 6


@dataclass(frozen=True)
class Solo:
    """Which experts shall answer alone.

    Attributes:
        adapter: whose.
        experts: their numbers; none of them is the ordinary comparison.
    """

    adapter: str
    experts: tuple[int, ...]

    @classmethod
    def read(cls, told: Any) -> Solo:
        """Read what a browser sent: ``{"adapter": name, "experts": [0, 2]}``.

        Raises:
            AdapterError: it is something else.
        """
        told = told if isinstance(told, dict) else {}
        adapter, experts = told.get("adapter"), told.get("experts")
        numbers = isinstance(experts, list) and all(type(one) is int for one in experts)
        if not isinstance(adapter, str) or not numbers:
            raise AdapterError("experts alone: must name an adapter and the numbers of its experts")
        return cls(adapter, tuple(dict.fromkeys(experts)))

    def columns(self, columns: Sequence[Column]) -> tuple[Column, ...]:
        """Return the base, the mixture, and a column for each expert; without experts, `columns` as they are.

        Raises:
            AdapterError: there is no such adapter among `columns`, no such expert, or too many for the page.
        """
        if not self.experts:
            return tuple(columns)
        mixture = next((one for one in columns if one.adapter == self.adapter and one.experts), None)
        if mixture is None:
            raise AdapterError(f"experts alone: no adapter {self.adapter[:100]!r} with experts is shown here")
        wrong = [one for one in self.experts if not 0 <= one < mixture.experts]
        if wrong:
            raise AdapterError(
                f"experts alone: expert {wrong[0]} of {self.adapter!r} must be from 0 to {mixture.experts - 1}"
            )
        if len(self.experts) + 2 > MOST_COLUMNS:
            raise AdapterError(f"experts alone: {len(self.experts)} at once, must be at most {MOST_COLUMNS - 2}")
        return (columns[0], mixture, *(mixture.alone(expert) for expert in self.experts))
