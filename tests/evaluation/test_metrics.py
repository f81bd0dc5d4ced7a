"""How answers count, by cases written by hand, and intervals against scipy's and their own coverage."""

from __future__ import annotations

import json
import math
import random

import pytest
from scipy.stats import binomtest

from minilora_hub.evaluation import metrics


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("1990-05-05", "1990-05-05", 1),
        ("  1990-05-05\n", "1990-05-05", 1),
        ("1990-05-05.", "1990-05-05", 0),
        ("The date is 1990-05-05", "1990-05-05", 0),
        ("went", "Went", 0),
        ("", "x", 0),
        ('{"a":1}', '{"a": 1}', 0),
    ],
)
def test_exact_match(answer, reference, value):
    assert metrics.exact_match(answer, reference) == value


REFERENCE = {"name": "Ana", "address": {"city": "Oslo", "zip": None}, "tags": ["x", "y"], "extra": {}}


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (REFERENCE, 1),
        (dict(reversed(REFERENCE.items())), 1),
        (REFERENCE | {"name": "Eva"}, 10 / 12),  # 6 fields: name, city, zip, two tags, extra
        (REFERENCE | {"more": 1}, 12 / 13),
        ({"name": "Ana"}, 2 / 7),
        (REFERENCE | {"address": {"city": "Oslo"}}, 10 / 11),  # a missing field is not a null one
        (REFERENCE | {"address": {"city": None, "zip": None}}, 10 / 12),
        (REFERENCE | {"tags": ["y", "x"]}, 8 / 12),
        (REFERENCE | {"extra": None}, 10 / 12),
        (REFERENCE | {"address": "Oslo"}, 8 / 11),
        ({}, 0),
        ([], 0),
        (None, 0),
        ("Ana", 0),
    ],
)
def test_json_field_f1(answer, value):
    assert metrics.json_field_f1(f" {json.dumps(answer)}\n", json.dumps(REFERENCE)) == pytest.approx(value)


@pytest.mark.parametrize(
    "text", ["", "name: Ana", '{"name": "Ana"', '```json\n{"a": 1}\n```', '{"a": 1, "a": 1}', "NaN"]
)
def test_what_is_no_json_scores_nothing(text):
    assert metrics.json_field_f1(text, '{"a": 1}') == 0


@pytest.mark.parametrize(
    ("said", "wanted", "value"),
    [("1", "1.0", 1), ("true", "1", 0), ("1", "true", 0), ("false", "0", 0), ('"1"', "1", 0), ("null", "null", 1)],
)
def test_types_of_values(said, wanted, value):
    assert metrics.json_field_f1(f'{{"a": {said}}}', f'{{"a": {wanted}}}') == value
    assert metrics.json_field_f1(said, wanted) == value


def test_perplexity():
    assert metrics.perplexity([math.log(8) * 3, math.log(2) * 1], [3, 1]) == pytest.approx(2 ** (10 / 4))


def test_an_interval_is_like_the_exact_one_where_there_is_one():
    scores = [1.0] * 140 + [0.0] * 60
    low, high = metrics.mean_interval(scores)
    exact = binomtest(140, 200).proportion_ci(0.95, method="exact")
    assert (low, high) == pytest.approx((exact.low, exact.high), abs=0.01)
    assert metrics.mean_interval(scores) == (low, high), "seeded"


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    rng = random.Random(3)
    held = 0
    for _ in range(60):
        low, high = metrics.mean_interval([float(rng.random() < 0.3) for _ in range(120)])
        held += low <= 0.3 <= high
    assert 51 <= held <= 60  # 95% of 60 is 57; below 51 by chance in 1 of 300


@pytest.mark.parametrize("score", [0.0, 1.0])
@pytest.mark.parametrize("n", [1, 4, 500])
def test_scores_that_are_all_the_same_are_not_certain(score, n):
    low, high = metrics.mean_interval([score] * n)
    wilson = binomtest(int(score) * n, n).proportion_ci(0.95, method="wilson")
    assert (low, high) == (wilson.low, wilson.high)
    assert high - low > 0.005
    assert metrics.macro_interval([[score] * n, [score] * n]) == metrics.mean_interval([score] * (2 * n))


def test_where_nothing_is_known_there_is_no_interval():
    assert metrics.mean_interval([0.5, 0.5]) is None
    assert metrics.macro_interval([[1.0, 1.0], [0.0, 0.0]]) is None
    assert metrics.perplexity_interval([3.0], [2]) is None


def test_groups_are_resampled_on_their_own():
    """A large group that is certain does not make the mean of two groups certain."""
    small, large = [0.0, 1.0] * 10, [1.0] * 1000
    low, high = metrics.macro_interval([small, large])
    alone = metrics.mean_interval(small)
    assert (low, high) == pytest.approx(((alone[0] + 1) / 2, (alone[1] + 1) / 2), abs=0.02)


def test_perplexity_over_windows():
    rng = random.Random(0)
    nll, tokens = [rng.uniform(200, 400) for _ in range(40)], [100] * 40
    low, high = metrics.perplexity_interval(nll, tokens)
    middle = metrics.perplexity(nll, tokens)
    assert low < middle < high
    error = 1.96 * (sum((x / 100 - math.log(middle)) ** 2 for x in nll) / 40 / 40) ** 0.5
    assert (math.log(low), math.log(high)) == pytest.approx(
        (math.log(middle) - error, math.log(middle) + error), abs=0.02
    )


def test_a_difference_is_paired():
    """What is right on the same items differs less than what is right on as many others."""
    first = [1.0] * 60 + [0.0] * 40
    second = [1.0] * 50 + [0.0] * 50
    same = metrics.paired_difference(first, second)
    assert (same.value, same.n, same.wins, same.losses) == (pytest.approx(0.1), 100, 10, 0)
    assert same.larger_than_noise
    other = metrics.paired_difference(first, second[::-1])
    assert (other.value, other.wins, other.losses) == (pytest.approx(0.1), 50, 40)
    assert not other.larger_than_noise
    backwards = metrics.paired_difference(second, first)
    assert backwards.interval == pytest.approx((-same.interval[1], -same.interval[0]), abs=0.02)


def test_differences_that_are_all_the_same():
    n = 50
    most = binomtest(0, n).proportion_ci(0.95, method="wilson").high
    equal = metrics.paired_difference([1.0] * n, [1.0] * n)
    assert equal.interval == (-most, most)
    assert not equal.larger_than_noise
    better = metrics.paired_difference([1.0] * n, [0.0] * n)
    assert better.interval == pytest.approx((1 - most, 1))
    worse = metrics.paired_difference([0.0] * n, [1.0] * n)
    assert worse.interval == pytest.approx((-1, most - 1))
    assert better.larger_than_noise
    assert worse.larger_than_noise
    assert metrics.paired_difference([0.5] * n, [0.0] * n).interval is None


@pytest.mark.parametrize(("first", "second"), [([], []), ([1.0], [1.0, 0.0])])
def test_what_cannot_be_compared_is_refused(first, second):
    with pytest.raises(ValueError, match=r"first, second of \d and \d scores: must be equally many, and some"):
        metrics.paired_difference(first, second)
