"""The ranking, against Wilson's formula and counts made by hand."""

import math
from dataclasses import replace

import pytest
from demo.comparisons import column, comparison

from minilora_hub.demo.runs.comparison import Weights
from minilora_hub.demo.runs.examples import Example
from minilora_hub.demo.votes.ranking import rank, rankings, share, votes_needed
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
    assert {model["name"] for model in models} == {"dora", "mix", "base"}
    dora, mix, base = (next(one for one in models if one["name"] == name) for name in ("dora", "mix", "base"))
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


SAME = (column("base", "x"), column("dora", "y"), column("mix", "y"))


def test_equal_answers_are_no_vote_between_them():
    """A vote for one of two equal answers is one for both, over the third; the chance of each answer is a half."""
    result = rank(votes(1, 2, 0, columns=SAME))
    counts = {model["name"]: (model["wins"], model["losses"]) for model in result["models"]}
    assert counts == {"base": (1, 2), "dora": (2, 1), "mix": (2, 1)}
    assert {model["chance"] for model in result["models"]} == {0.5}
    pairs = {frozenset((one["first"]["name"], one["second"]["name"])): one["share"]["n"] for one in result["pairs"]}
    assert pairs == {frozenset(("base", "dora")): 3, frozenset(("base", "mix")): 3}
    scores = {model["name"]: model["score"]["value"] for model in result["models"]}
    assert scores["dora"] == pytest.approx(scores["mix"], abs=0.1)


def test_all_equal_answers_are_no_vote():
    columns = tuple(column(name, "same") for name in ("base", "dora"))
    models = rank(votes(0, 1, TIE, columns=columns))["models"]
    assert [(model["wins"], model["losses"], model["score"]) for model in models] == [(2, 0, None)] * 2


def test_scores_are_bradley_terrys():
    """Of many votes between two models the gap is the log odds of the wins; a tie is half a win for each."""
    models = rank(votes(*[1] * 280, *[0] * 80, *[TIE] * 40, columns=PAIR))["models"]
    first, second = models
    assert first["name"] == "dora"
    gap = first["score"]["value"] - second["score"]["value"]
    assert gap == pytest.approx(400 * math.log10(300 / 100), rel=0.01)
    assert first["score"]["value"] == pytest.approx(-second["score"]["value"], abs=0.01)
    assert first["score"]["low"] < first["score"]["value"] < first["score"]["high"]
    # The interval against the normal approximation of the log odds of 400 votes.
    wins = [1.0] * 280 + [0.0] * 80 + [0.5] * 40
    error = math.sqrt(sum((one - 0.75) ** 2 for one in wins)) / (400 * 0.75 * 0.25)
    width = first["score"]["high"] - first["score"]["low"]
    assert width == pytest.approx(2 * 1.96 * error * 400 / math.log(10) / 2, rel=0.2)


def test_a_model_that_always_won_has_a_finite_score():
    models = rank(votes(1, 1, 1, columns=PAIR))["models"]
    assert 0 < models[0]["score"]["value"] < 2000


def test_each_example_has_a_ranking():
    """Of the votes on its prompt; the rest are other prompts. Without votes on examples there is one group."""
    columns = PAIR
    on_example = [vote_on(comparison(*columns, prompt="One?"), f"e{index}", (0, 1), 1) for index in range(3)]
    groups = rankings([*votes(0, columns=columns), *on_example], [Example("One?", "First"), Example("Two?")])
    assert [(group["title"], group["votes"]) for group in groups] == [
        ("All prompts", 4),
        ("First", 3),
        ("Other prompts", 1),
    ]
    assert [group["models"][0]["name"] for group in groups] == ["dora", "dora", "base"]
    assert [group["title"] for group in rankings(votes(0), [Example("Two?")])] == ["All prompts"]


@pytest.mark.parametrize("preference", [0.6, 0.75])
def test_enough_votes_show_a_preference(preference):
    """With as many, four of five exact binomial tests against one half find it."""
    from scipy.stats import binom, binomtest

    def power(n):
        return sum(binom.pmf(k, n, preference) for k in range(n + 1) if binomtest(k, n).pvalue < 0.05)

    n = votes_needed(preference)
    assert power(n) >= 0.8 > power(n - 1)
