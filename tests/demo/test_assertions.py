"""Expected values and assertions of prompt files, by what promptfoo's documentation says of each."""

import json
import time

import pytest

from minilora_hub.demo.runs.assertions import Assertion, passes, read_assertions
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.demo.runs.prompt_files import PromptTable, read_prompts
from minilora_hub.errors import PageError


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("Paris", " Paris\n", "Paris."),
        ("equals: 1999-05-03", "1999-05-03", "1999-5-3"),
        ("contains: Paris", "It is Paris.", "It is paris."),
        ("icontains: PARIS", "It is Paris.", "It is Lyon."),
        ("not-contains: sorry", "Paris", "I am sorry"),
        ("starts-with: The", "  The sky", "In The sky"),
        (r"regex: ^\d{4}-\d\d$", "1999-05", "In 1999-05"),
        ("not-regex: [A-Z]", "abc", "aBc"),
        ("is-json", ' {"a": [1, 2]} ', "{'a': 1}"),
        ("not-is-json", "hello", "3"),
        ("a: b", "a: b", "b"),  # no assertion's name
    ],
)
def test_each_kind(text, right, wrong):
    assertion = Assertion.parse(text)
    assert assertion.holds(right)
    assert not assertion.holds(wrong)


def test_a_pattern_that_would_take_for_ever_fails_in_time():
    """Exponential backtracking: without a limit it would search for longer than the universe is old."""
    began = time.monotonic()
    for kind in ("regex", "not-regex"):
        assert not Assertion(kind, r"^(a|a|aa)+$").holds("a" * 60 + "b")
    assert time.monotonic() - began < 60


def test_rows_say_what_is_expected():
    row = {
        "expected": "a",
        "__expected": "contains: b",
        "assert": [{"type": "is-json"}, {"type": "regex", "value": "c"}],
    }
    kinds = [assertion.kind for assertion in read_assertions(row)]
    assert kinds == ["equals", "contains", "is-json", "regex"]
    assert passes(read_assertions({"expected": "a", "__expected": "regex: ."}), "a") is True
    assert passes(read_assertions({"expected": "a", "__expected": "regex: ."}), "b") is False
    assert passes(read_assertions({"prompt": "x"}), "b") is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"expected": 3}, "expected='3': must be a text"),
        ({"assert": [{"type": "llm-rubric", "value": "x"}]}, "assertion 'llm-rubric': must be one of equals, contains"),
        ({"assert": [{"type": "contains"}]}, "assertion 'contains': needs a value"),
        ({"assert": [{"type": "is-json", "value": "{}"}]}, "assertion 'is-json': takes no value"),
        ({"assert": [{"type": "regex", "value": "("}]}, r"assertion regex '\(': "),
        ({"assert": [{"type": "equals", "value": 3}]}, "assert: value='3': must be a text"),
        ({"assert": "contains"}, "assert: must be a list"),
    ],
)
def test_a_wrong_assertion_is_named_with_its_line(row, message, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('"one"\n' + json.dumps({"prompt": "two"} | row))
    with pytest.raises(PageError, match=f"line 2: {message}"):
        read_prompts(file, PageLimits())


def test_a_csv_with_expected_values(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text("id,prompt,__expected,expected\n1,one,contains: a,\n2,two,,b\n3,three,,\n")
    kinds = [[one.kind for one in prompt.assertions] for prompt in read_prompts(file, PageLimits())]
    assert kinds == [["contains"], ["equals"], []]


def test_rates_of_checked_answers_with_wilsons_interval():
    table = PromptTable(["base", "dora"], 12, {})
    for at in range(12):
        checked = at < 10
        answers = [{"passed": False if checked else None}, {"passed": at < 7 if checked else None}]
        table.rows.append({"prompt": "", "answers": answers, "error": None})
    table.rows.append({"prompt": "", "answers": [], "error": "refused"})
    base, dora = table.rates
    assert (base["passed"], base["n"], base["low"]) == (0, 10, 0)
    # Wilson's interval by its formula, at 7 of 10.
    p, n, z = 0.7, 10, 1.959964
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert [dora["low"], dora["high"]] == pytest.approx(
        [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
    )
    assert PromptTable(["base"], 1, {}, [{"prompt": "", "answers": [{"passed": None}], "error": None}]).rates == [None]
