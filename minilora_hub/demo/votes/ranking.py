"""Compute the ranking from votes: wins, ties, and win rates with confidence intervals. No Gradio.

There are two rates, called ``share``, each with its 95% Wilson interval:

- Of a model: wins divided by the votes that chose some answer while this model was shown. With k answers the expected
  rate at random is 1/k; ``chance`` is its mean over the same votes.
- Of a pair (a, b): votes for a divided by votes for a or b, over comparisons that showed both. Votes for a third model
  do not count; ties and "all bad" are counted separately, and not split.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

from minilora_hub.demo.votes.votes import ALL_BAD, TIE, Vote
from minilora_hub.evaluation.metrics import wilson_interval


class Model(NamedTuple):
    """A model in the ranking: weights under a name, on one base."""

    name: str
    kind: str
    weights: str
    base_fingerprint: str


def rank(votes: Sequence[Vote]) -> dict[str, list[dict[str, Any]]]:
    """Count votes.

    Returns:
        ``{"models": [...], "pairs": [...]}``, the largest share first. A model has ``name``, ``kind``, ``weights``,
        ``base_fingerprint``, the numbers of votes ``shown``, ``wins``, ``losses``, ``ties``, ``all_bad``, and ``share``
        and ``chance``. A pair has ``first`` and ``second``, two models, and the ``share`` of the first.
    """
    counts: dict[Model, Counter[str]] = defaultdict(Counter)
    chances: dict[Model, float] = defaultdict(float)
    chosen_over: Counter[tuple[Model, Model]] = Counter()
    for vote in votes:
        models = [Model(one.name, one.kind, one.weights, vote.base_fingerprint) for one in vote.candidates]
        for index, model in enumerate(models):
            if isinstance(vote.choice, int):
                outcome = "wins" if index == vote.choice else "losses"
                chances[model] += 1 / len(models)
                chosen_over[models[vote.choice], model] += 1
            else:
                outcome = {TIE: "ties", ALL_BAD: "all_bad"}[vote.choice]
            counts[model].update(["shown", outcome])
    rows = []
    for model, count in counts.items():
        decided = count["wins"] + count["losses"]
        numbers = {name: count[name] for name in ("shown", "wins", "losses", "ties", "all_bad")}
        chance = chances[model] / decided if decided else None
        rows.append({**model._asdict(), **numbers, "share": share(count["wins"], decided), "chance": chance})
    rows.sort(key=lambda row: (-(row["share"]["value"] if row["share"] else -1), -row["shown"], row["name"]))
    pairs = []
    for first, second in combinations([Model(*(row[name] for name in Model._fields)) for row in rows], 2):
        wins = chosen_over[first, second]
        if of_first := share(wins, wins + chosen_over[second, first]):
            pairs.append({"first": first._asdict(), "second": second._asdict(), "share": of_first})
    return {"models": rows, "pairs": pairs}


def share(wins: int, n: int) -> dict[str, float] | None:
    """Return the share ``value`` = `wins`/`n` with its interval, ``low`` to ``high``; None for no votes."""
    if not n:
        return None
    low, high = wilson_interval(wins, n)
    return {"wins": wins, "n": n, "value": wins / n, "low": low, "high": high}
