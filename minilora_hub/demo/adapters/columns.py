"""What the page says about its models before any of them runs: one dictionary a column, and the headline. No Gradio."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from minilora_hub.compare.engine import Column, CompareEngine

NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")


def describe_columns(engine: CompareEngine, columns: Sequence[Column]) -> list[dict]:
    """Describe each column in one line, and give it a letter."""
    base_size = sum(parameter.numel() for parameter in engine.bank.model.parameters())
    seen: Counter[str] = Counter()
    described = []
    for column in columns:
        facts: list[str] = [column.kind]
        if column.parameters_added:
            share = column.parameters_added / base_size
            facts.append(f"+{_count(column.parameters_added)} parameters ({share:.1%})")
        if column.detail:
            facts.append(column.detail)
        if column.solo_expert is None:
            initial = column.kind[0].upper()  # two adapters of a kind, or a MixLoRA and a MixDoRA, are M and M2
            seen[initial] += 1
            badge = initial + (str(seen[initial]) if seen[initial] > 1 else "")
        else:
            badge = letter(column.solo_expert)
            facts = [f"{column.name} with expert {badge} alone, whatever the router says"]
        described.append(
            {
                "name": column.name if column.solo_expert is None else f"{column.name}, {badge} alone",
                "adapter": column.adapter,
                "kind": column.kind,
                "badge": badge,
                "facts": " · ".join(facts),
                "experts": column.experts,
                "solo": column.solo_expert,
            }
        )
    return described


def letter(expert: int) -> str:
    """Call an expert A to Z, then A1 to Z1 and so on, as the page does."""
    return chr(65 + expert % 26) + (str(expert // 26) if expert >= 26 else "")


def headline(engine: CompareEngine, title: str | None = None, *, columns: Sequence[Column] | None = None) -> dict:
    """Say how many answers there are, and what they cost in memory."""
    amount = len(engine.columns if columns is None else columns)
    answers = NUMBERS[amount] if amount < len(NUMBERS) else amount
    return {"title": title or f"Same prompt. {answers} answers. One forward pass.", "facts": _memory_line(engine)}


def _memory_line(engine: CompareEngine) -> str:
    memory = engine.memory()
    adapters = f"; its adapters add {_bytes(memory.adapters)}" if memory.adapters else ""
    return f"{engine.columns[0].name} is in memory once: {_bytes(memory.base)}{adapters}."


def _count(value: int) -> str:
    return f"{value / 1e6:.1f} M" if value >= 1e5 else f"{value:,}"


def _bytes(value: int) -> str:
    return (
        f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB" if value < 1e7 else f"{value / 1e6:.0f} MB"
    )
