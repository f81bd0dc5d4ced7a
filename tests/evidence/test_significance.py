"""Corrected p-values, the bootstrap over two levels, and the smallest effect, against independent ways to them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from evidence.significance import (
    POWER,
    compare_all,
    holm,
    means,
    resampled_means,
    smallest_effect,
)
from scipy.stats import ttest_ind


def scores(seeds=3, items=400, better=0.0, of_seeds=0.01, draw=0):
    """Two tasks of 0s and 1s: items have difficulties of their own, seeds have luck of their own."""
    rng = np.random.default_rng(draw)
    difficulty = np.random.default_rng(99).uniform(0.2, 0.8, (2, items))
    luck = rng.normal(0, of_seeds, (seeds, 1))
    return [(rng.random((seeds, items)) < task + better + luck).astype(float) for task in difficulty]


def test_holm_is_the_closed_test_of_bonferroni():
    """A corrected p-value is the largest Bonferroni p-value of all sets of hypotheses that hold this one."""
    ps = [0.01, 0.04, 0.03, 0.005, 0.6]
    sets = [chosen for size in range(1, 6) for chosen in combinations(range(5), size)]
    expected = [
        max(min(1.0, len(chosen) * min(ps[at] for at in chosen)) for chosen in sets if place in chosen)
        for place in range(5)
    ]
    assert holm(ps) == pytest.approx(expected)
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([]) == []


def test_resamples_have_the_variance_of_both_levels():
    """Against the plug-in formula of a mean over seeds and items that cross: V = seeds / n + items / m + rest / nm."""
    (task, _) = scores(seeds=8, of_seeds=0.05)
    drawn = resampled_means({"a": [task]})["a"]
    middle, n, m = task.mean(), *task.shape
    seeds, items = task.mean(1) - middle, task.mean(0) - middle
    rest = task - middle - seeds[:, None] - items[None]
    grown = n / (n - 1)
    variance = (seeds**2).mean() * grown / n + (items**2).mean() / m + (rest**2).mean() * grown / (n * m)
    assert drawn.mean() == pytest.approx(middle, abs=1e-3)
    assert drawn.var() == pytest.approx(variance, rel=0.05)


def test_items_are_drawn_for_all_methods_alike():
    """Methods that answer the same items right differ by nothing in any resample."""
    groups = [np.repeat(task[:1], 3, axis=0) for task in scores()]
    drawn = resampled_means({"a": groups, "b": groups})
    assert np.abs(drawn["a"] - drawn["b"]).max() < 1e-12
    assert drawn["a"].std() > 0.01


def test_a_difference_is_found_where_there_is_one():
    one, other = compare_all({"a": scores(draw=1), "b": scores(draw=2), "c": scores(draw=3, better=0.1)})[:2]
    assert not one.larger_than_noise
    assert other.larger_than_noise
    assert other.difference == pytest.approx(means(scores(draw=1)).mean() - means(scores(draw=3, better=0.1)).mean())
    assert other.interval[0] < other.difference < other.interval[1] < 0


def test_the_smallest_effect_is_found_as_often_as_it_says():
    rng = np.random.default_rng(4)
    groups = [[rng.normal(0, 1, (3, 1))] for _ in range(50)]
    effect = smallest_effect(groups, 1)
    spread = np.mean([means(one).var(ddof=1) for one in groups]) ** 0.5
    sides = rng.normal(0, spread, (3, 4000)), rng.normal(effect, spread, (3, 4000))
    assert (ttest_ind(*sides).pvalue < 0.05).mean() == pytest.approx(POWER, abs=0.03)
    assert smallest_effect(groups, 6) > effect
    assert smallest_effect([scores(seeds=1)], 1) is None


def test_methods_with_runs_to_come_have_no_smallest_effect():
    assert smallest_effect([scores(), scores(seeds=2)], 1) is None
    assert smallest_effect([scores(seeds=1), scores(seeds=1)], 1) is None
