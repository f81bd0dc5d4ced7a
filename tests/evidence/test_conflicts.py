"""Tasks that pull apart: the answers follow from the rule, nothing of a test item is in training, the cue decides."""

from __future__ import annotations

import json
import re
from itertools import combinations

import pytest
from evidence.conflicts import CONFLICTS, COUNTS, DUE, LETTERS, PAIRS, PEOPLE


@pytest.mark.parametrize("pair", PAIRS)
def test_no_entity_of_a_side_is_in_two_splits_of_either(pair):
    entities = {split: {item.entity for name in pair for item in CONFLICTS[name].items(split)} for split in COUNTS}
    assert all(entities[one].isdisjoint(entities[other]) for one, other in combinations(COUNTS, 2))
    prompts = [item.prompt for name in pair for split in COUNTS for item in CONFLICTS[name].items(split)]
    assert len(prompts) == len(set(prompts)) == 2 * sum(COUNTS.values())


@pytest.mark.parametrize("pair", PAIRS)
def test_no_test_value_is_in_a_training_prompt(pair):
    """Also as text: the date, the number and the surname that an item asks about."""
    trained = " ".join(item.prompt for name in pair for item in CONFLICTS[name].items("train"))
    words = set(re.findall(r"[\w/]+", trained))
    for name in pair:
        for item in CONFLICTS[name].items("test"):
            value = item.entity if name not in PAIRS[0] else item.prompt.rpartition(" ")[2]
            assert value not in words
            if name in PAIRS[0]:
                first, second, year = value.split("/")
                assert f"{second}/{first}/{year}" not in words


def test_the_instruction_is_the_same_and_the_cues_are_not():
    for one, other in PAIRS:
        starts = {item.prompt.partition(":")[0] for name in (one, other) for item in CONFLICTS[name].items("test")}
        assert len(starts) == 1
    for cues in (DUE, LETTERS, PEOPLE):
        left, right = cues.values()
        assert set(left).isdisjoint(right)


def test_answers_follow_from_the_rule():
    for name, (month, day) in {"month-first": (0, 1), "day-first": (1, 0)}.items():
        for item in CONFLICTS[name].items("test"):
            *numbers, year = re.search(r"(\d\d)/(\d\d)/(\d{4})$", item.prompt).groups()
            assert item.completion == f"{year}-{numbers[month]}-{numbers[day]}"
            assert numbers[0] != numbers[1]
    for item in CONFLICTS["in-digits"].items("test"):
        assert item.completion.replace(",", "") == item.entity
    assert all(item.completion.replace("-", "").replace(",", "").replace(" ", "").isalpha()
               for item in CONFLICTS["in-words"].items("test"))  # fmt: skip
    for name, keys in {"patients": ["family", "given", "age", "town"], "players": ["player", "club", "years"]}.items():
        for item in CONFLICTS[name].items("test"):
            record = json.loads(item.completion)
            assert list(record) == keys
            assert all(str(value) in item.prompt for value in record.values())
