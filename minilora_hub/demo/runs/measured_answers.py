"""Answers that `minilora eval --out FILE` has measured, for the page's view of where its adapters differ. No Gradio."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from minilora_hub.demo.adapters.cards import routing_by_task
from minilora_hub.demo.adapters.catalogue import Catalogue
from minilora_hub.demo.runs.comparison import UNKNOWN
from minilora_hub.errors import AdapterError
from minilora_hub.evaluation.answer_cache import adapter_digest
from minilora_hub.evaluation.differences import BASE, compare_measured, read_measured

SHIPPED = Path(__file__).parent / "answers.json"
"""The answers of the shipped adapters."""

MOST_ITEMS = 20
"""Items that are sent at first; the view asks for more."""


class MeasuredAnswers:
    """Measured answers of the base and of those adapters of a page that were measured, by the names of the page.

    An adapter is found by the hash of its weights and configuration, so the answers are those of the page's weights;
    the base has to have the fingerprint of the measured one.

    Args:
        file: of `minilora eval --out`.
        catalogue: the page's adapters.

    Raises:
        AdapterError: the file cannot be read, or holds no answers.
    """

    def __init__(self, file: Path, catalogue: Catalogue) -> None:
        self._content, self._catalogue = read_measured(file), catalogue

    @property
    def expected(self) -> dict[str, str]:
        """The right answer of each measured prompt."""
        return {item["prompt"]: item["reference"] for some in self._content["items"].values() for item in some}

    @cached_property
    def _known(self) -> dict[str, Any]:
        """The file's content with the page's base and adapters only; an adapter called as the base is left out."""
        measured = {model["adapter_sha256"]: model for model in self._content["models"] if model["name"] != BASE}
        digests = {name: adapter_digest(folder) for name, folder in self._catalogue.paths().items() if name != BASE}
        adapters = [measured[digest] | {"name": name} for name, digest in digests.items() if digest in measured]
        base = [model for model in self._content["models"] if model["name"] == BASE]
        return {**self._content, "models": base + adapters}

    @cached_property
    def names(self) -> list[str]:
        """The measured adapters of the page, in its order; none if they were measured on a base of other weights."""
        measured = [model["name"] for model in self._known["models"] if model["name"] != BASE]
        if not measured:  # the base is not hashed for nothing
            return []
        (base,), measured_on = self._catalogue.weights(()), self._content["base"]["fingerprint"]
        return measured if UNKNOWN in (base.hash, measured_on) or base.hash == measured_on else []

    def view(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return what the page shows of two models.

        Args:
            asked: what a visitor has chosen: ``first``, ``second``, ``task``, ``difficulty`` and ``most``, the number
                of items; those that are missing have defaults.

        Raises:
            ValueError: there is no such model, task or item.
        """
        names = [BASE, *self.names]
        first = str(asked.get("first") or self.names[0])
        second = str(asked.get("second") or names[-1 if len(names) > 2 else 0])
        task, difficulty = str(asked.get("task") or ""), asked.get("difficulty")
        difficulty = difficulty if isinstance(difficulty, int) else None
        most = max(0, asked["most"]) if isinstance(asked.get("most"), int) else MOST_ITEMS
        found = compare_measured(self._known, first, second, (task,) if task else (), difficulty)
        groups = [
            {"name": name, "total": len(found.only(name)), "items": [vars(item) for item in found.only(name)[:most]]}
            for name in (first, second)
        ]
        items = self._known["items"]
        return {
            "names": names,
            "tasks": list(items),
            "difficulties": sorted({item["difficulty"] for some in items.values() for item in some}),
            "asked": {"first": first, "second": second, "task": task, "difficulty": difficulty, "most": most},
            "words": f"{found.summary()[0].upper()}{found.summary()[1:]}.",
            "groups": groups,
            "routing": self._routing((first, second)),
            "command": self._content["command"],
        }

    def _routing(self, names: tuple[str, str]) -> dict[str, Any]:
        """Return the experts' shares of those that are mixtures, by task."""
        uses = {
            model["name"]: [(use["task"], use["load"]) for use in model["router"]] for model in self._known["models"]
        }
        return {name: shares for name in names if (shares := routing_by_task(uses[name]))}


def find_measured(file: Path | None, catalogue: Catalogue) -> MeasuredAnswers | None:
    """Return the answers in a file, or the shipped ones if no file is named; None if they are of other adapters.

    Raises:
        AdapterError: the named file cannot be read, or none of its adapters is on the page.
    """
    if file is not None:
        named = MeasuredAnswers(file, catalogue)
        if not named.names:
            raise AdapterError(f"{str(file)!r}: none of its adapters has the weights of one on this page, on its base")
        return named
    shipped = MeasuredAnswers(SHIPPED, catalogue)
    return shipped if shipped.names else None
