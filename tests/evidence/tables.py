"""Markdown tables of results, and scores of items as texts of 0s and 1s."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table; every column but the first is aligned to the right."""
    top = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    return top + [f"| {' | '.join(row)} |" for row in rows]


def bits(scores: Iterable[float]) -> str:
    """Return scores that are 0 or 1 as one text."""
    return "".join(str(int(score)) for score in scores)


def percent(exact: str) -> float:
    """Return the share of 1s in such a text, in percent."""
    return 100 * exact.count("1") / len(exact)
