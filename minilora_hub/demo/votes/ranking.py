"""What votes add up to: wins, ties and rates with their intervals. No Gradio.

Two rates, each with Wilson's 95% interval (scipy's ``binomtest(…).proportion_ci(method="wilson")``):

- A model's share: of the votes that chose one answer while this model was among them, those that chose it. With k
  answers, chance alone gives 1/k; `Standing.chance` is the mean of that over the same votes.
- Of a pair (a, b): of the votes where both were shown and one of the two was chosen, those that chose a. A vote for a
  third model says nothing about the two, and ties and "all bad" are counted, not split.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from minilora_hub.demo.votes.votes import ALL_BAD, TIE, Candidate, Vote
from minilora_hub.evaluation.metrics import wilson_interval


@dataclass(frozen=True)
class Rate:
    """A share of `n` votes that is `wins`/`n`, with its 95% interval from `low` to `high`."""

    wins: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share."""
        return self.wins / self.n


@dataclass(frozen=True)
class Model:
    """Who stands on the board: weights under a name, on one base."""

    name: str
    kind: str
    weights: str
    base_fingerprint: str


@dataclass(frozen=True)
class Standing:
    """One model's votes.

    Attributes:
        model: who.
        shown: votes in which it was among the answers.
        wins: that chose it.
        losses: that chose another.
        ties: that found all equal.
        all_bad: that found all bad.
        share: of the decided votes; None where there is none.
        chance: the share that chance alone would give.
    """

    model: Model
    shown: int
    wins: int
    losses: int
    ties: int
    all_bad: int
    share: Rate | None
    chance: float | None


@dataclass(frozen=True)
class Pair:
    """How often `first` was chosen where it or `second` was, both being shown."""

    first: Model
    second: Model
    rate: Rate


@dataclass(frozen=True)
class Board:
    """Everything the board shows: models from the largest share down, and pairs in the same order."""

    votes: int
    standings: tuple[Standing, ...]
    pairs: tuple[Pair, ...]


def board(votes: Iterable[Vote]) -> Board:
    """Add votes up."""
    counts: dict[Model, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    chances: dict[Model, list[float]] = defaultdict(list)
    chosen_over: dict[tuple[Model, Model], int] = defaultdict(int)
    amount = 0
    for vote in votes:
        amount += 1
        models = [_model(candidate, vote) for candidate in vote.candidates]
        for index, model in enumerate(models):
            counts[model]["shown"] += 1
            counts[model][_outcome(index, vote.choice)] += 1
            if isinstance(vote.choice, int):
                chances[model].append(1 / len(models))
                if index != vote.choice:
                    chosen_over[models[vote.choice], model] += 1
    standings = [_standing(model, count, chances[model]) for model, count in counts.items()]
    standings.sort(key=lambda one: (-(one.share.value if one.share else -1), -one.shown, one.model.name))
    pairs = [
        Pair(first.model, second.model, rate)
        for first, second in combinations(standings, 2)
        if (rate := _rate(chosen_over, first.model, second.model))
    ]
    return Board(amount, tuple(standings), tuple(pairs))


def _model(candidate: Candidate, vote: Vote) -> Model:
    return Model(candidate.name, candidate.kind, candidate.weights, vote.base_fingerprint)


def _outcome(index: int, choice: int | str) -> str:
    if isinstance(choice, int):
        return "wins" if index == choice else "losses"
    return {TIE: "ties", ALL_BAD: "all_bad"}[choice]


def _standing(model: Model, count: dict[str, int], chances: list[float]) -> Standing:
    outcomes = {name: count[name] for name in ("shown", "wins", "losses", "ties", "all_bad")}
    share = wilson(count["wins"], len(chances)) if chances else None
    return Standing(model, **outcomes, share=share, chance=sum(chances) / len(chances) if chances else None)


def _rate(chosen_over: dict[tuple[Model, Model], int], first: Model, second: Model) -> Rate | None:
    wins = chosen_over[first, second]
    n = wins + chosen_over[second, first]
    return wilson(wins, n) if n else None


def wilson(wins: int, n: int) -> Rate:
    """Return the rate `wins`/`n` with Wilson's 95% interval."""
    return Rate(wins, n, *wilson_interval(wins, n))
