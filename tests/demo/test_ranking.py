"""The board's numbers, against Wilson's formula and counts made by hand."""

import math

import pytest
from demo.records import column, record

from minilora_hub.demo.votes.ranking import board, wilson
from minilora_hub.demo.votes.votes import ALL_BAD, TIE, vote_on

PAIR = (column("base", "x"), column("dora", "y"))
THREE = (*PAIR, column("mix", "z"))


def votes(*choices, columns=THREE):
    """One vote for each choice."""
    order = tuple(range(len(columns)))
    return [vote_on(record(*columns), f"{columns[-1]}-{index}", order, choice) for index, choice in enumerate(choices)]


def wilson_by_hand(wins, n, z=1.959963984540054):
    """Wilson (1927), written out."""
    p = wins / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


@pytest.mark.parametrize(("wins", "n"), [(0, 1), (1, 1), (7, 10), (50, 100), (999, 1000)])
def test_intervals_are_wilsons(wins, n):
    rate = wilson(wins, n)
    low, high = wilson_by_hand(wins, n)
    assert rate.low == pytest.approx(max(low, 0), abs=1e-9)
    assert rate.high == pytest.approx(min(high, 1), abs=1e-9)
    assert rate.low <= rate.value <= rate.high


def test_no_votes():
    assert board([]).standings == ()
    assert board([]).votes == 0


def test_counts_and_shares():
    """Ten votes on three answers and two on a pair: who was shown, chosen, left, found equal."""
    cast = votes(1, 1, 1, 2, 0, TIE, ALL_BAD, TIE, 2, 1) + votes(0, 1, columns=PAIR)
    result = board(cast)
    assert result.votes == 12
    by_name = {standing.model.name: standing for standing in result.standings}
    assert [standing.model.name for standing in result.standings] == ["dora", "mix", "base"]
    dora, mix, base = by_name["dora"], by_name["mix"], by_name["base"]
    assert (dora.shown, dora.wins, dora.losses, dora.ties, dora.all_bad) == (12, 5, 4, 2, 1)
    assert (mix.shown, mix.wins, mix.losses, mix.ties, mix.all_bad) == (10, 2, 5, 2, 1)
    assert (base.shown, base.wins, base.losses, base.ties, base.all_bad) == (12, 2, 7, 2, 1)
    assert (dora.share.wins, dora.share.n) == (5, 9)
    assert dora.chance == pytest.approx((7 / 3 + 2 / 2) / 9)
    assert mix.chance == pytest.approx(1 / 3)


def test_pairs_count_only_votes_that_chose_one_of_the_two():
    result = board(votes(1, 1, 1, 2, 0, TIE, ALL_BAD))
    pairs = {(pair.first.name, pair.second.name): (pair.rate.wins, pair.rate.n) for pair in result.pairs}
    assert pairs == {("dora", "base"): (3, 4), ("dora", "mix"): (3, 4), ("base", "mix"): (1, 2)}


def test_only_ties_give_counts_and_no_rate():
    result = board(votes(TIE, ALL_BAD))
    assert [standing.share for standing in result.standings] == [None] * 3
    assert result.pairs == ()
    assert {standing.ties for standing in result.standings} == {1}


def test_other_weights_under_the_same_name_stand_apart():
    retrained = (column("base", "x"), column("dora", "y"))
    first = votes(1, columns=PAIR)
    from dataclasses import replace

    from minilora_hub.demo.runs.comparison import Weights

    other = replace(record(*retrained), weights=(Weights("sha256:base"), Weights("sha256:newer")))
    second = [vote_on(other, "two", (0, 1), 1)]
    result = board(first + second)
    assert sorted(standing.model.weights for standing in result.standings if standing.model.name == "dora") == [
        "sha256:dora",
        "sha256:newer",
    ]
