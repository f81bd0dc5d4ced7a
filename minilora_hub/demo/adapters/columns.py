"""Columns of a comparison: their descriptions, the headline above them, and single experts as columns. No Gradio."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from huggingface_hub import constants

import minilora_hub
from minilora_hub.compare.engine import Column
from minilora_hub.demo.adapters.cards import AdapterCard
from minilora_hub.demo.adapters.catalogue import Catalogue
from minilora_hub.errors import AdapterError, MiniLoraError

NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
MOST_SOLO_EXPERTS = 4


@dataclass(frozen=True)
class SoloExperts:
    """Experts of a mixture that each answer alone, in a separate column.

    Attributes:
        adapter: the mixture.
        experts: their numbers; empty for the ordinary comparison.
    """

    adapter: str
    experts: tuple[int, ...]

    @classmethod
    def read(cls, content: Any) -> SoloExperts:
        """Parse an event from the browser: ``{"adapter": name, "experts": [0, 2]}``.

        Raises:
            AdapterError: the content has another form.
        """
        content = content if isinstance(content, dict) else {}
        adapter, experts = content.get("adapter"), content.get("experts")
        numbers = isinstance(experts, list) and all(type(one) is int for one in experts)
        if not isinstance(adapter, str) or not numbers:
            raise AdapterError("experts alone: must name an adapter and the numbers of its experts")
        return cls(adapter, tuple(dict.fromkeys(experts)))

    def columns(self, columns: Sequence[Column]) -> tuple[Column, ...]:
        """Return the base, the mixture, and a column for each expert; without experts, `columns`.

        Raises:
            AdapterError: the adapter is not among `columns`, it has no such expert, or there are too many experts.
        """
        if not self.experts:
            return tuple(columns)
        mixture = next((one for one in columns if one.adapter == self.adapter and one.experts), None)
        if mixture is None:
            raise AdapterError(f"experts alone: no adapter {self.adapter[:100]!r} with experts is shown here")
        wrong = [one for one in self.experts if not 0 <= one < mixture.solo_choices]
        if wrong:
            raise AdapterError(
                f"experts alone: expert {wrong[0]} of {self.adapter!r} must be from 0 to {mixture.solo_choices - 1}"
            )
        if len(self.experts) > MOST_SOLO_EXPERTS:
            raise AdapterError(f"experts alone: {len(self.experts)} at once, must be at most {MOST_SOLO_EXPERTS}")
        return (columns[0], mixture, *(mixture.alone(expert) for expert in self.experts))


def describe_columns(catalogue: Catalogue, columns: Sequence[Column]) -> list[dict]:
    """Return the ``about`` of each column of a stage: name, method, badge, a summary line, training data and score."""
    base_size = sum(parameter.numel() for parameter in catalogue.engine.bank.model.parameters())
    seen: Counter[str] = Counter()
    described = []
    for column in columns:
        facts: list[str] = []
        if column.parameters_added:
            count = column.parameters_added
            shown = f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
            facts.append(f"+{shown} parameters ({count / base_size:.1%})")
        if column.detail:
            facts.append(column.detail)
        if column.solo_expert is None:
            seen[column.kind] += 1
            badge = column.kind + (f" {seen[column.kind]}" if seen[column.kind] > 1 else "")
        else:
            letter = expert_letter(column.solo_expert)
            badge = f"expert {letter}"
            facts = [f"{column.name} with expert {letter} alone, ignoring the router"]
        card = _card(catalogue, column)
        described.append(
            {
                "name": column.name if column.solo_expert is None else f"{column.name}, {letter} alone",
                "adapter": column.adapter,
                "kind": column.kind,
                "badge": badge,
                "facts": " · ".join(facts),
                "experts": column.experts,
                "experts_by_layer": list(column.experts_by_layer),
                "solo_choices": column.solo_choices,
                "solo": column.solo_expert,
                "purpose": card and card.purpose,
                "score": card and card.score,
                "routing": card and card.routing,
            }
        )
    return described


def _card(catalogue: Catalogue, column: Column) -> AdapterCard | None:
    if column.adapter is None or column.solo_expert is not None:
        return None
    try:
        return catalogue.card(column.adapter)
    except MiniLoraError:  # its folder was removed or changed while it stayed in memory
        return None


def expert_letter(expert: int) -> str:
    """Return the letter of an expert: A to Z, then A1 to Z1 and so on, as in comparison_model.js."""
    return chr(65 + expert % 26) + (str(expert // 26) if expert >= 26 else "")


def headline(catalogue: Catalogue, columns: Sequence[Column], title: str | None = None) -> dict:
    """Return the headline: how many answers there are, the base, and how much memory the models take."""
    answers = NUMBERS[len(columns)] if len(columns) < len(NUMBERS) else len(columns)
    memory = catalogue.engine.memory()
    adapters = f"; its adapters add {_bytes(memory.adapters)}" if memory.adapters else ""
    return {
        "title": title or f"Same prompt. {answers} answers.",
        "base": catalogue.engine.columns[0].name,
        "link": f"{constants.ENDPOINT}/{catalogue.base}" if "/" in catalogue.base else None,
        "facts": f"The base is in memory once: {_bytes(memory.base)}{adapters}.",
        "made": {"words": f"minilora_hub {minilora_hub.__version__}", "link": project_link()},
    }


def project_link() -> str | None:
    """Return where the code of this page is: the project's address in the package's metadata, or this Space's files."""
    try:
        urls = [one.partition(", ")[2] for one in metadata.metadata("minilora_hub").get_all("Project-URL") or ()]
    except metadata.PackageNotFoundError:
        urls = []
    space = os.environ.get("SPACE_ID")
    return next(iter(urls), f"{constants.ENDPOINT}/spaces/{space}/tree/main" if space else None)


def _bytes(value: int) -> str:
    if value >= 1e9:
        return f"{value / 1e9:.1f} GB"
    return f"{value / 1e6:.1f} MB" if value < 1e7 else f"{value / 1e6:.0f} MB"
