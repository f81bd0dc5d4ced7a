"""Whether two methods differ: over seeds and items together, corrected for the number of comparisons.

    interval  hierarchical bootstrap: a resample draws seeds of each method, and items of each task, the same for both
              methods and all seeds. (scipy's bootstrap cannot draw two levels that cross.) With n seeds their spread
              comes out too small by (n - 1) / n in variance, so deviations from a method's mean are scaled up first.
    p         Welch's t-test over the seeds' means, corrected by Holm's method for all pairs of methods
    smallest effect
              the true difference that the corrected test finds in `POWER` of all such experiments, if the methods'
              spread over seeds is what it is here: from the noncentral t distribution

The interval says what other seeds and items would give. With three seeds it knows their spread badly, which the t-test
takes into account: a difference is called larger than noise only where both say so.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.optimize import brentq
from scipy.stats import nct, t, ttest_ind

CONFIDENCE, POWER = 0.95, 0.8
RESAMPLES, AT_ONCE = 10_000, 1_000
Groups = Sequence[np.ndarray]
"""The scores of one method: for each task an array [seeds, items]."""


@dataclass(frozen=True)
class Compared:
    """The difference of two methods.

    Attributes:
        first: one.
        second: the other.
        difference: mean of the first less that of the second.
        interval: 95%, over seeds and items.
        p: of Welch's test over the seeds; None with a single seed, or where no seed differs.
        p_corrected: the same by Holm's method, for all pairs.
    """

    first: str
    second: str
    difference: float
    interval: tuple[float, float]
    p: float | None
    p_corrected: float | None

    @property
    def larger_than_noise(self) -> bool:
        """Whether both the interval and the corrected test say so."""
        low, high = self.interval
        return not low <= 0 <= high and self.p_corrected is not None and self.p_corrected < 1 - CONFIDENCE


def compare_all(scores: dict[str, Groups]) -> list[Compared]:
    """Compare every pair of methods, which have the same tasks and items."""
    pairs = list(combinations(scores, 2))
    ps = [welch(scores[first], scores[second]) for first, second in pairs]
    corrected = iter(holm([p for p in ps if p is not None]))
    middle = {name: float(means(groups).mean()) for name, groups in scores.items()}
    drawn = resampled_means(scores)
    found = []
    for (first, second), p in zip(pairs, ps, strict=True):
        ends = np.percentile(drawn[first] - drawn[second], [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
        interval = float(ends[0]), float(ends[1])
        difference = middle[first] - middle[second]
        found.append(Compared(first, second, difference, interval, p, None if p is None else next(corrected)))
    return found


def means(groups: Groups) -> np.ndarray:
    """Return the mean of the tasks' means, [seeds]."""
    return np.mean([scores.mean(1) for scores in groups], axis=0)


def welch(first: Groups, second: Groups) -> float | None:
    """Return the p-value of Welch's test over the seeds."""
    sides = [means(first), means(second)]
    if min(map(len, sides)) < 2 or all(np.ptp(side) == 0 for side in sides):
        return None
    return float(ttest_ind(*sides, equal_var=False).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """Return p-values corrected by Holm's step-down method, in the order given."""
    order, corrected, before = sorted(range(len(ps)), key=lambda place: ps[place]), [0.0] * len(ps), 0.0
    for rank, place in enumerate(order):
        before = corrected[place] = max(before, min(1.0, (len(ps) - rank) * ps[place]))
    return corrected


def resampled_means(scores: dict[str, Groups]) -> dict[str, np.ndarray]:
    """Return each method's mean in every resample, [resamples]; all methods have the resample's items in common."""
    rng = np.random.default_rng(0)
    spread = {name: [_spread_corrected(task) for task in groups] for name, groups in scores.items()}
    found: dict[str, list[np.ndarray]] = {name: [] for name in scores}
    for _ in range(RESAMPLES // AT_ONCE):
        items = [_shares(rng, task.shape[1]) for task in next(iter(scores.values()))]
        for name, groups in spread.items():
            seeds = _shares(rng, len(groups[0]))
            parts = [((seeds @ task) * shares).sum(1) for task, shares in zip(groups, items, strict=True)]
            found[name].append(np.mean(parts, axis=0))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _shares(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return the share of each of `count` units in resamples of as many, [AT_ONCE, count]."""
    drawn = rng.integers(count, size=(AT_ONCE, count)) + count * np.arange(AT_ONCE)[:, None]
    return np.bincount(drawn.ravel(), minlength=AT_ONCE * count).reshape(AT_ONCE, count) / count


def _spread_corrected(scores: np.ndarray) -> np.ndarray:
    """Scale the seeds' deviations from their mean, so that resampling them has the variance of the mean of seeds."""
    seeds, middle = len(scores), scores.mean(0)
    return middle + (scores - middle) * (seeds / (seeds - 1)) ** 0.5 if seeds > 1 else scores


def smallest_effect(scores: Sequence[Groups], comparisons: int) -> float | None:
    """Return the true difference of two methods that the strictest step of Holm's test finds with probability `POWER`.

    Args:
        scores: of each method, whose variances over the seeds are averaged.
        comparisons: how many are corrected for; 1 for none.
    """
    seeds = len(scores[0][0])
    if seeds < 2 or any(len(groups[0]) != seeds for groups in scores):  # some runs are still to come
        return None
    variance = statistics.fmean(float(np.var(means(groups), ddof=1)) for groups in scores)
    freedom, error = 2 * (seeds - 1), (2 * variance / seeds) ** 0.5
    critical = t.ppf(1 - (1 - CONFIDENCE) / comparisons / 2, freedom)
    shift = brentq(lambda d: nct.sf(critical, freedom, d) - POWER, 0, 100)
    return float(shift * error)
