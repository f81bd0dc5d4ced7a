"""Compute the ranking from votes: scores, wins, ties, and win rates with confidence intervals. No Gradio.

Equal answers share their outcome: a vote for one of them is a vote for all, and no vote between them.

- ``score`` of a model: Bradley-Terry's, on the scale of Elo: the mean model has 0, and 400 points are odds of 10 to 1.
  The chosen answer beats each other one that was shown; of a tie and of "all bad", each pair gets half a win. Its 95%
  interval is a bootstrap over the votes, since the pairs of one vote are not independent. A model that always won has
  no finite maximum-likelihood score, so a weak normal prior (see `PRIOR`) is added.
- ``share`` of a model, with Wilson's 95% interval: wins divided by the votes that chose some answer while it was
  shown. ``chance`` is the share expected at random, the mean of 1/k over votes on k different answers.
- ``share`` of a pair (a, b): votes for a divided by votes for a or b, over comparisons that showed both. Votes for a
  third model do not count; ties and "all bad" are counted separately, and not split.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import combinations, count
from typing import Any, NamedTuple

from minilora_hub.demo.runs.examples import Example
from minilora_hub.demo.votes.votes import ALL_BAD, TIE, Vote
from minilora_hub.evaluation.metrics import wilson_interval

PRIOR = 2.0
"""Standard deviation of the prior of a score in logits: it says as much as one vote against an equal opponent."""
ELO = 400 / math.log(10)
RESAMPLES, SEED = 200, 0


class Model(NamedTuple):
    """A model in the ranking: weights under a name, on one base."""

    name: str
    kind: str
    weights: str
    base_fingerprint: str


class Shown(NamedTuple):
    """A model in a vote, and the hash of its answer."""

    model: Model
    answer: str


def shown_in(vote: Vote) -> list[Shown]:
    """Return the models and answers of a vote."""
    return [Shown(Model(one.name, one.kind, one.weights, vote.base_fingerprint), one.answer) for one in vote.candidates]


def rank(votes: Sequence[Vote]) -> dict[str, list[dict[str, Any]]]:
    """Count votes.

    Returns:
        ``{"models": [...], "pairs": [...]}``, the highest score first. A model has ``name``, ``kind``, ``weights``,
        ``base_fingerprint``, the numbers of votes ``shown``, ``wins``, ``losses``, ``ties``, ``all_bad``, and its
        ``score``, ``share`` and ``chance``. A pair has ``first``, ``second`` and the ``share`` of the first.
    """
    counts: dict[Model, Counter[str]] = defaultdict(Counter)
    chances: dict[Model, float] = defaultdict(float)
    chosen_over: Counter[tuple[Model, Model]] = Counter()
    for vote in votes:
        shown = shown_in(vote)
        chosen = shown[vote.choice].answer if isinstance(vote.choice, int) else None
        for model, answer in shown:
            if chosen is None:
                outcome = {TIE: "ties", ALL_BAD: "all_bad"}[str(vote.choice)]
            else:
                outcome = "wins" if answer == chosen else "losses"
                chances[model] += 1 / len({one.answer for one in shown})
            counts[model].update(["shown", outcome])
        chosen_over.update(pair for pair in _wins(vote) if chosen is not None)
    scores = bradley_terry(votes)
    rows = []
    for model, of in counts.items():
        decided = of["wins"] + of["losses"]
        numbers = {name: of[name] for name in ("shown", "wins", "losses", "ties", "all_bad")}
        chance = chances[model] / decided if decided else None
        of_model = {"score": scores.get(model), "share": share(of["wins"], decided), "chance": chance}
        rows.append({**model._asdict(), **numbers, **of_model})
    rows.sort(key=lambda row: (-(row["score"]["value"] if row["score"] else -math.inf), -row["shown"], row["name"]))
    pairs = []
    for first, second in combinations([Model(*(row[name] for name in Model._fields)) for row in rows], 2):
        wins = chosen_over[first, second]
        if of_first := share(wins, wins + chosen_over[second, first]):
            pairs.append({"first": first._asdict(), "second": second._asdict(), "share": of_first})
    return {"models": rows, "pairs": pairs}


def _wins(vote: Vote) -> Iterable[tuple[Model, Model]]:
    """Return (winner, loser) for each pair of different answers; of a tie, and where all are bad, both ways."""
    shown = shown_in(vote)
    chosen = shown[vote.choice].answer if isinstance(vote.choice, int) else None
    for one in shown:
        for other in shown:
            if one.answer != other.answer and chosen in (None, one.answer):
                yield one.model, other.model


def bradley_terry(votes: Sequence[Vote]) -> dict[Model, dict[str, float]]:
    """Return the score of each model with its interval, ``{"value", "low", "high"}``; see the module.

    Models whose answers were never voted on against a different answer have none.
    """
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import expit

    outcomes = [
        (row, pair, 1.0 if isinstance(vote.choice, int) else 0.5)
        for row, vote in enumerate(votes)
        for pair in _wins(vote)
    ]
    models = sorted({model for _, pair, _ in outcomes for model in pair})
    if not models:
        return {}
    size, place = len(models), {model: index for index, model in enumerate(models)}
    rows = np.array([row for row, _, _ in outcomes])
    winners, losers = (np.array([place[pair[side]] for _, pair, _ in outcomes]) for side in (0, 1))
    halves = np.array([weight for _, _, weight in outcomes])

    def fit(times: Any) -> Any:
        """Return the scores in logits when vote i was cast ``times[i]`` times."""
        wins = np.bincount(winners * size + losers, halves * times[rows], size * size).reshape(size, size)

        def loss(scores: Any) -> tuple[float, Any]:
            gaps = scores[:, None] - scores[None, :]
            missed = wins * expit(-gaps)
            slope = missed.sum(axis=0) - missed.sum(axis=1) + scores / PRIOR**2
            return float((wins * np.logaddexp(0, -gaps)).sum() + (scores**2).sum() / (2 * PRIOR**2)), slope

        return minimize(loss, np.zeros(size), jac=True, method="L-BFGS-B").x

    draws = np.random.default_rng(SEED).multinomial(len(votes), [1 / len(votes)] * len(votes), size=RESAMPLES)
    resampled = ELO * np.array([fit(times) for times in draws])
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    values = ELO * fit(np.ones(len(votes)))
    return {
        model: {"value": float(values[i]), "low": float(min(low[i], values[i])), "high": float(max(high[i], values[i]))}
        for i, model in enumerate(models)
    }


def rankings(votes: Sequence[Vote], examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Return the ranking of all votes, and of those on each example and on other prompts, where there are any.

    Returns:
        ``{"title", "votes", **rank(votes)}`` of each group.
    """
    groups: dict[str, list[Vote]] = {"All prompts": list(votes)}
    titles = {one.prompt: one.label or one.prompt[:60] for one in examples}
    if any(vote.prompt.strip() in titles for vote in votes):
        groups |= {title: [] for title in [*titles.values(), "Other prompts"]}
        for vote in votes:
            groups[titles.get(vote.prompt.strip(), "Other prompts")].append(vote)
    return [{"title": title, "votes": len(some), **rank(some)} for title, some in groups.items() if some]


@cache
def votes_needed(preference: float, power: float = 0.8) -> int:
    """Return how many votes between two models show a true preference above one half with probability `power`.

    "Show" is a two-sided exact binomial test against one half at the 5% level.
    """
    from scipy.stats import binom

    for n in count(1):
        least = binom.isf(0.025, n, 0.5) + 1  # the fewest wins that are significant
        if binom.sf(least - 1, n, preference) >= power:
            return n
    raise AssertionError


def share(wins: int, n: int) -> dict[str, float] | None:
    """Return the share ``value`` = `wins`/`n` with its interval, ``low`` to ``high``; None for no votes."""
    if not n:
        return None
    low, high = wilson_interval(wins, n)
    return {"wins": wins, "n": n, "value": wins / n, "low": low, "high": high}
