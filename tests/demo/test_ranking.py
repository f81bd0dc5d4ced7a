"""The ranking, against Wilson's formula and counts made by hand."""

import math
from dataclasses import replace

import pytest
from demo.comparisons import column, comparison

from minilora_hub.demo.runs.comparison import Weights
from minilora_hub.demo.votes.ranking import rank, share
from minilora_hub.demo.votes.votes import ALL_BAD, TIE, vote_on

PAIR = (column("base", "x"), column("dora", "y"))
THREE = (*PAIR, column("mix", "z"))


def votes(*choices, columns=THREE):
    """One vote for each choice."""
    order = tuple(range(len(columns)))
    return [
        vote_on(comparison(*columns), f"{columns[-1]}-{index}", order, choice) for index, choice in enumerate(choices)
    ]


def wilson_by_hand(wins, n, z=1.959963984540054):
    """Wilson (1927), written out."""
    p = wins / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


@pytest.mark.parametrize(("wins", "n"), [(0, 1), (1, 1), (7, 10), (50, 100), (999, 1000)])
def test_intervals_are_wilsons(wins, n):
    found = share(wins, n)
    low, high = wilson_by_hand(wins, n)
    assert found["low"] == pytest.approx(max(low, 0), abs=1e-9)
    assert found["high"] == pytest.approx(min(high, 1), abs=1e-9)
    assert found["low"] <= found["value"] == wins / n <= found["high"]


def test_no_votes():
    assert rank([]) == {"models": [], "pairs": []}


def test_counts_and_shares():
    """Ten votes on three answers and two on a pair."""
    models = rank(votes(1, 1, 1, 2, 0, TIE, ALL_BAD, TIE, 2, 1) + votes(0, 1, columns=PAIR))["models"]
    assert [model["name"] for model in models] == ["dora", "mix", "base"]
    dora, mix, base = models
    counts = {
        model["name"]: [model[name] for name in ("shown", "wins", "losses", "ties", "all_bad")] for model in models
    }
    assert counts == {"dora": [12, 5, 4, 2, 1], "mix": [10, 2, 5, 2, 1], "base": [12, 2, 7, 2, 1]}
    assert (dora["share"]["wins"], dora["share"]["n"]) == (5, 9)
    assert dora["chance"] == pytest.approx((7 / 3 + 2 / 2) / 9)
    assert mix["chance"] == pytest.approx(1 / 3)
    assert base["kind"] == "base"


def test_pairs_count_only_votes_that_chose_one_of_the_two():
    pairs = rank(votes(1, 1, 1, 2, 0, TIE, ALL_BAD))["pairs"]
    found = {(pair["first"]["name"], pair["second"]["name"]): pair["share"] for pair in pairs}
    assert {names: (share["wins"], share["n"]) for names, share in found.items()} == {
        ("dora", "base"): (3, 4),
        ("dora", "mix"): (3, 4),
        ("base", "mix"): (1, 2),
    }


def test_only_ties_give_counts_and_no_share():
    result = rank(votes(TIE, ALL_BAD))
    assert [model["share"] for model in result["models"]] == [None] * 3
    assert result["pairs"] == []
    assert {model["ties"] for model in result["models"]} == {1}


def test_other_weights_under_the_same_name_are_another_model():
    newer = replace(comparison(*PAIR), weights=(Weights("sha256:base"), Weights("sha256:newer")))
    result = rank([*votes(1, columns=PAIR), vote_on(newer, "two", (0, 1), 1)])
    assert sorted(model["weights"] for model in result["models"] if model["name"] == "dora") == [
        "sha256:dora",
        "sha256:newer",
    ]
