"""Score answers, with 95% intervals: exact match, JSON field F1, perplexity, and paired comparison.

Intervals are seeded percentile bootstraps of scipy over the items. Where all items have the same score, a bootstrap
would have no width; there it is Wilson's score interval, also of scipy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minilora_hub.documents import strict_json
from minilora_hub.errors import MissingExtraError

CONFIDENCE = 0.95
RESAMPLES = 9_999
SEED = 0
DIGITS = 4
"""Decimal places of reported values."""

Interval = tuple[float, float]


def normalised(answer: str) -> str:
    """Return the answer as it is compared: without white space around it."""
    return answer.strip()


def exact_match(answer: str, reference: str) -> float:
    """Return 1 if the answer equals the reference after `normalised`, else 0."""
    return float(normalised(answer) == normalised(reference))


def json_fields(value: Any) -> dict[tuple[str | int, ...], Any]:
    """Return the leaves of a JSON value by their path; null, ``{}`` and ``[]`` are leaves, list indices are numbers."""
    children: Any = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    if not children:
        return {(): value}
    return {(key, *path): leaf for key, child in children for path, leaf in json_fields(child).items()}


def json_field_f1(answer: str, reference: str) -> float:
    """Return F1 of the answer's fields against the reference's: a field is right if its path and its value are.

    2 · right / (fields of the answer + fields of the reference). Texts are compared exactly, numbers by value, and true
    is not 1. An answer that is not JSON, or repeats a key, scores 0.
    """
    try:
        said = json_fields(strict_json(normalised(answer)))
    except ValueError:
        return 0.0
    wanted = json_fields(strict_json(reference))
    right = sum(path in said and _same(said[path], leaf) for path, leaf in wanted.items())
    return 2 * right / (len(said) + len(wanted))


def _same(one: Any, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def perplexity(negative_log_likelihoods: Sequence[float], tokens: Sequence[int]) -> float:
    """Return exp(sum of -ln p / predicted tokens), from the sums (nats) and token counts of windows of text."""
    return math.exp(math.fsum(negative_log_likelihoods) / sum(tokens))


# ---- intervals ----


def require_library() -> None:
    """Raise MissingExtraError if scipy is not installed, before hours of work."""
    _stats()


def _stats() -> Any:
    try:
        import scipy.stats
    except ImportError:
        raise MissingExtraError("scipy", "eval") from None
    return scipy.stats


def mean(scores: Sequence[float]) -> float:
    """Return the mean of at least one score."""
    return math.fsum(scores) / len(scores)


def mean_interval(scores: Sequence[float]) -> Interval | None:
    """Return the 95% interval of the mean of scores between 0 and 1; None where all are equal and neither 0 nor 1."""
    constant = _constant(scores)
    if constant is None:
        return bootstrapped([scores], _means)
    return _wilson(constant, len(scores))


def macro_interval(groups: Sequence[Sequence[float]]) -> Interval | None:
    """Return the 95% interval of the mean of the groups' means; each group is resampled on its own."""
    if all(_constant(group) is not None for group in groups):
        pooled = [score for group in groups for score in group]
        return mean_interval(pooled) if len({group[0] for group in groups}) == 1 else None
    return bootstrapped(groups, _means)


def perplexity_interval(negative_log_likelihoods: Sequence[float], tokens: Sequence[int]) -> Interval | None:
    """Return the 95% interval of `perplexity`, over windows of text; None for a single window."""
    import numpy as np

    if len(tokens) < 2:
        return None

    def statistic(nll: Any, count: Any, axis: int) -> Any:
        return np.exp(nll.sum(axis=axis) / count.sum(axis=axis))

    return bootstrapped([negative_log_likelihoods, tokens], statistic, paired=True)


@dataclass(frozen=True)
class Difference:
    """Difference of the scores of two models on the same items.

    Attributes:
        value: mean score of the first minus that of the second.
        interval: 95%, over the items; None where it cannot be estimated.
        n: number of items.
        wins: items on which the first scores higher.
        losses: items on which it scores lower.
    """

    value: float
    interval: Interval | None
    n: int
    wins: int
    losses: int

    @property
    def larger_than_noise(self) -> bool:
        """Whether the interval excludes 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare the scores of two models on the same items, in the same order.

    Where all items differ by the same amount, the interval is Wilson's for the share of such items.

    Raises:
        ValueError: there are no items, or not equally many.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"first, second of {len(first)} and {len(second)} scores: must be equally many, and some")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    constant = _constant(differences)
    interval: Interval | None
    if constant is None:
        interval = bootstrapped([differences], _means)
    elif constant == 0:
        most = _wilson(0.0, len(differences))
        interval = None if most is None else (-most[1], most[1])
    else:
        size = _wilson(abs(constant), len(differences))
        interval = size if size is None or constant > 0 else (-size[1], -size[0])
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return Difference(mean(differences), interval, len(differences), wins, losses)


def bootstrapped(samples: Sequence[Sequence[float]], statistic: Any, paired: bool = False) -> Interval:
    """Percentile bootstrap of a vectorised statistic of the samples; the same for the same input.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    import numpy as np

    found = (
        _stats()
        .bootstrap(
            [np.asarray(sample, dtype=float) for sample in samples],
            statistic,
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            method="percentile",
            paired=paired,
            vectorized=True,
            batch=1_000,
            rng=np.random.default_rng(SEED),
        )
        .confidence_interval
    )
    return float(found.low), float(found.high)


def _means(*samples: Any, axis: int) -> Any:
    """The mean of the samples' means."""
    return sum(sample.mean(axis=axis) for sample in samples) / len(samples)


def _constant(scores: Sequence[float]) -> float | None:
    return scores[0] if min(scores) == max(scores) else None


def _wilson(share: float, n: int) -> Interval | None:
    """For n items that all score `share`, 0 or 1. For another score nothing is known of the spread: None."""
    if share not in (0, 1):
        return None
    return wilson_interval(n * int(share), n)


def wilson_interval(successes: int, n: int) -> Interval:
    """Return Wilson's 95% interval of the share of successes."""
    found = _stats().binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test, from the items that one of two passes; 1 without any."""
    if not only_first + only_second:
        return 1.0
    return float(_stats().binomtest(only_first, only_first + only_second, 0.5).pvalue)


# ---- labels ----


@dataclass(frozen=True)
class Counts:
    """Counts of each label in each row: how often it was right, was said, and was asked for; arrays (rows, labels)."""

    right: Any
    said: Any
    asked: Any

    @property
    def accuracy(self) -> float:
        """Share of the items whose label was said."""
        return float(self.right.sum() / self.asked.sum())

    def support(self, label: int) -> int:
        """Return how many items have a label."""
        return int(self.asked[:, label].sum())

    def f1(self, label: int) -> float:
        """Return the F1 of a label: 0 where it never occurs."""
        either = self.said[:, label].sum() + self.asked[:, label].sum()
        return float(2 * self.right[:, label].sum() / either) if either else 0.0


def label_counts(references: Sequence[Sequence[int]], predictions: Sequence[Sequence[int]], labels: int) -> Counts:
    """Count labels in rows of items.

    Args:
        references: per row, the number of the label of each item.
        predictions: those that were said, in the same order.
        labels: how many labels there are.
    """
    import numpy as np

    right, said, asked = (np.zeros((len(references), labels)) for _ in range(3))
    for row, (wanted, given) in enumerate(zip(references, predictions, strict=True)):
        for one, other in zip(wanted, given, strict=True):
            asked[row, one] += 1
            said[row, other] += 1
            right[row, one] += one == other
    return Counts(right, said, asked)


def macro_f1(counts: Counts) -> float:
    """Return the mean F1 of the labels that were said or asked for, as scikit-learn's ``average="macro"``."""
    either = (counts.said + counts.asked).sum(axis=0)
    found = either > 0
    return float((2 * counts.right.sum(axis=0)[found] / either[found]).mean())


def share_interval(counts: Counts) -> Interval | None:
    """Return the 95% interval of the accuracy: Wilson's where each row is one item, or else a bootstrap of the rows."""
    per_row = counts.asked.sum(axis=1)
    if (per_row == 1).all():
        return wilson_interval(int(counts.right.sum()), len(per_row))
    if len(per_row) < 2:
        return None

    def statistic(right: Any, asked: Any, axis: int) -> Any:
        return right.sum(axis=axis) / asked.sum(axis=axis)

    return bootstrapped([counts.right.sum(axis=1), per_row], statistic, paired=True)


def macro_f1_interval(counts: Counts) -> Interval | None:
    """Return the 95% interval of `macro_f1`: a bootstrap of the rows; None for a single row or without an error."""
    import numpy as np

    if len(counts.asked) < 2 or counts.accuracy == 1:
        return None

    def statistic(rows: Any, axis: int) -> Any:
        chosen = rows.astype(int)
        total, labels = np.zeros(chosen.shape[:-1]), np.zeros(chosen.shape[:-1])
        for label in range(counts.asked.shape[1]):
            either = (counts.said + counts.asked)[:, label][chosen].sum(axis=axis)
            there = either > 0
            total += np.divide(2 * counts.right[:, label][chosen].sum(axis=axis), either, where=there, out=0.0 * either)
            labels += there
        return total / labels

    return bootstrapped([range(len(counts.asked))], statistic)
