"""Find the items on which two measured models differ, in the JSON that `minilora eval --out FILE` writes.

Nothing is computed: the file holds every answer. McNemar's exact test says whether the difference may be chance: of the
items that one model passes and the other fails, each would pass half.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora_hub.documents import strict_json
from minilora_hub.errors import AdapterError
from minilora_hub.evaluation.metrics import mcnemar_p

BASE = "base"


@dataclass(frozen=True)
class ComparedItem:
    """An item with the answers of the base and two models.

    Attributes:
        task: its task; items in a format that is not in training have a name of their own.
        difficulty: from 1 to 3.
        prompt: the question.
        reference: the right answer.
        answers: name of the model -> its answer.
        right: name of the model -> whether that is the right one.
    """

    task: str
    difficulty: int
    prompt: str
    reference: str
    answers: dict[str, str]
    right: dict[str, bool]


@dataclass(frozen=True)
class Differences:
    """Two models on the same items.

    Attributes:
        first: the name of one.
        second: the name of the other.
        items: all items that were asked for, in the file's order.
        routing: name of a mixture -> task -> the mean share of each expert over the layers.
    """

    first: str
    second: str
    items: tuple[ComparedItem, ...]
    routing: dict[str, dict[str, list[float]]]

    def only(self, name: str) -> list[ComparedItem]:
        """Return the items that one of the two passes and the other fails."""
        other = self.second if name == self.first else self.first
        return [item for item in self.items if item.right[name] and not item.right[other]]

    @property
    def counts(self) -> dict[str, int]:
        """Number of items by who passes them: ``"both"``, the first's name, the second's name, ``"neither"``."""
        both = sum(item.right[self.first] and item.right[self.second] for item in self.items)
        found = {"both": both, self.first: len(self.only(self.first)), self.second: len(self.only(self.second))}
        return found | {"neither": len(self.items) - sum(found.values())}

    @property
    def p_value(self) -> float:
        """Of McNemar's exact test, two-sided."""
        return mcnemar_p(len(self.only(self.first)), len(self.only(self.second)))

    def summary(self) -> str:
        """Return the counts, and whether they may be chance, as two sentences without the last full stop."""
        counts = self.counts
        return (
            f"{len(self.items)} items: both right {counts['both']}, only {self.first} {counts[self.first]}, only "
            f"{self.second} {counts[self.second]}, neither {counts['neither']}. Between equally good models chance "
            f"alone makes such a difference, or a larger, with probability {self.p_value:.2g} (McNemar's exact test)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and the items on which they differ, as JSON."""
        items = [vars(item) for name in (self.first, self.second) for item in self.only(name)]
        return {"first": self.first, "second": self.second, "counts": self.counts, "p_value": self.p_value} | {
            "routing": self.routing,
            "items": items,
        }

    def _repr_html_(self) -> str:
        """Show the items on which they differ as a table, in a notebook."""
        names = list(dict.fromkeys([BASE, self.first, self.second]))
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("task", "prompt", "right answer", *names))
        rows = []
        for item in (*self.only(self.first), *self.only(self.second)):
            known = [name for name in names if name in item.right]
            answers = [f"{'✓' if item.right[name] else '✗'} {item.answers[name]}" for name in known]
            cells = (item.task, item.prompt, item.reference, *answers)
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
        return f"<p>{html.escape(self.summary())}</p><table><tr>{head}</tr>{''.join(rows)}</table>"


def read_measured(file: Path) -> dict[str, Any]:
    """Read the JSON that `minilora eval --out FILE` has written.

    Raises:
        AdapterError: it cannot be read, or holds no answers.
    """
    try:
        content = strict_json(file.read_bytes())
    except OSError as error:
        raise AdapterError(f"{str(file)!r} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise AdapterError(f"{str(file)!r} is not JSON: {error}") from error
    models = content.get("models") if isinstance(content, dict) else None
    answered = isinstance(models, list) and all(isinstance(one, dict) and "answers" in one for one in models)
    if not answered or not isinstance(content.get("items"), dict):
        raise AdapterError(f"{str(file)!r}: must be written by minilora eval --out, of the built-in tasks")
    return content


def compare_measured(
    content: dict[str, Any],
    first: str | None = None,
    second: str | None = None,
    tasks: Sequence[str] = (),
    difficulty: int | None = None,
) -> Differences:
    """Put two models' answers side by side.

    Args:
        content: from `read_measured`.
        first: a model's name in it. Default: the first adapter.
        second: another. Default: the second adapter; with one adapter the base.
        tasks: only these. Default: all.
        difficulty: only items of this difficulty.

    Raises:
        ValueError: there is no such model, task or item; the message lists those that there are.
    """
    models = {model["name"]: model for model in content["models"]}
    adapters = [name for name, model in models.items() if model["method"]]
    first = first or (adapters[0] if adapters else None)
    second = second or next((name for name in (*adapters, BASE) if name != first), None)
    for argument, name in (("first", first), ("second", second)):
        if name not in models:
            raise ValueError(f"{argument}={name!r}: must be one of {', '.join(models)}")
    assert first is not None  # as it is in `models`, and so is the second
    assert second is not None
    if first == second:
        raise ValueError(f"second={second!r}: must be another model than the first")
    unknown = [task for task in tasks if task not in content["items"]]
    if unknown:
        raise ValueError(f"task={unknown[0]!r}: must be one of {', '.join(content['items'])}")
    names = [name for name in dict.fromkeys([BASE, first, second]) if name in models]
    found = []
    for task in dict.fromkeys(tasks) or content["items"]:
        for place, item in enumerate(content["items"][task]):
            if difficulty in (None, item["difficulty"]):
                answers = {name: models[name]["answers"][task][place] for name in names}
                found.append(
                    ComparedItem(
                        task,
                        item["difficulty"],
                        item["prompt"],
                        item["reference"],
                        {name: answer["text"] for name, answer in answers.items()},
                        {name: bool(answer["exact"]) for name, answer in answers.items()},
                    )
                )
    if not found:
        raise ValueError(f"difficulty={difficulty!r}: there are no such items")
    routing = {
        name: {use["task"]: [sum(shares) / len(shares) for shares in zip(*use["load"], strict=True)] for use in uses}
        for name in names
        if (uses := models[name].get("router"))
    }
    return Differences(first, second, tuple(found), routing)


def llm_comparator(differences: Differences) -> dict[str, Any]:
    """Return the items as the JSON that LLM Comparator opens (github.com/PAIR-code/llm-comparator).

    Its score is above 0 where A is better; here 1 where only the first is right, -1 where only the second is.
    """
    a, b = differences.first, differences.second
    return {
        "metadata": {
            "source_path": "minilora diff",
            "custom_fields_schema": [
                {"name": "right answer", "type": "text"},
                {"name": "difficulty", "type": "category"},
                {"name": "base's answer", "type": "text"},
                {"name": "right", "type": "per_model_boolean"},
            ],
        },
        "models": [{"name": a}, {"name": b}],
        "examples": [
            {
                "input_text": item.prompt,
                "tags": [item.task],
                "output_text_a": item.answers[a],
                "output_text_b": item.answers[b],
                "score": int(item.right[a]) - int(item.right[b]),
                "individual_rater_scores": [],
                "custom_fields": {
                    "right answer": item.reference,
                    "difficulty": str(item.difficulty),
                    "base's answer": item.answers.get(BASE, ""),
                    "right": [item.right[a], item.right[b]],
                },
            }
            for item in differences.items
        ],
    }
