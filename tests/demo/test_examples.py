"""The example prompts: which answers are right, and that the shipped adapters differ on them."""

from __future__ import annotations

import pytest
from demo.threads import run_async
from tiny_stand_ins import ScriptedBase, byte_tokenizer, save_parrots

from minilora_hub.compare.engine import CompareEngine, Sampling, Update
from minilora_hub.compare.found_adapters import shipped_adapters
from minilora_hub.demo.runs.examples import EXAMPLES, Example, is_right
from minilora_hub.demo.runs.rates import CommonRates
from minilora_hub.demo.runs.runner import Runner
from minilora_hub.demo.runs.visitor import Visitors
from minilora_hub.demo.votes.sharing import SharedComparisons
from minilora_hub.demo.votes.votes import VoteStore


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        (" 2027-09-28\n", "2027-09-28", True),
        ("It is 2027-09-28", "2027-09-28", False),
        ('{"age": 3,\n "name": "A"}', '{"name": "A", "age": 3}', True),
        ('{"name": "A", "age": 3, "job": null}', '{"name": "A", "age": 3}', False),
        ("{name: A}", '{"name": "A"}', False),
        ("", "1", False),
    ],
)
def test_an_answer_is_right_if_its_text_or_its_json_is(answer, expected, right):
    assert is_right(answer, expected) is right


def test_an_example_is_marked_right_or_wrong_in_each_column(tmp_path):
    """Parrots repeat the prompt; the base does not. Another prompt has no right answer."""
    parrots = save_parrots(tmp_path, {"parrot-dora": "dora", "parrot-mix": "mixlora"})
    engine = CompareEngine(ScriptedBase(), parrots, tokenizer=byte_tokenizer())
    examples = [Example("Hello", "Echo", "Hello")]
    visitors = Visitors(Runner(engine), VoteStore(tmp_path / "v"), SharedComparisons(tmp_path / "s"), examples)

    async def frames(prompt):
        visitor = visitors.of("ana")
        visitor.begin()
        return [frame async for frame in visitor.run_and_keep(prompt, Sampling(12))]

    ran = run_async(frames("Hello"))
    assert [column["right"] for column in ran[-1].stage["columns"]] == [False, True, True]
    assert ran[-1].stage["expected"] == "Hello"
    other = run_async(frames("Hi"))[-1].stage
    assert other["expected"] is None
    assert [column["right"] for column in other["columns"]] == [None] * 3


def test_rates_are_over_the_steps_that_all_rows_have():
    """Row 1 ends after 4 tokens: what row 0 does afterwards, in quicker steps, does not change its rate."""
    rates = CommonRates()
    rates.add(Update(2, finished=True, reason="error"))  # never wrote
    rates.add(Update(3, tokens=1, finished=True, reason="eos"))  # has no rate
    for tokens in (2, 3, 4):
        assert rates.add(Update(0, tokens=tokens, tokens_per_second=10.0)) == 10
        assert rates.add(Update(1, tokens=tokens, tokens_per_second=10.0, finished=tokens == 4)) == 10
    assert rates.steps == 4
    assert rates.add(Update(0, tokens=40, tokens_per_second=25.0, finished=True)) == 10
    assert rates.steps == 4


@pytest.mark.slow
def test_the_examples_are_items_of_the_tasks():
    from minilora_hub.evaluation.tasks.registry import TASKS

    items = {item.prompt: item.completion for task in TASKS.values() for item in task.items("test")}
    expected = {one.prompt: one.expected for one in EXAMPLES if one.expected}
    assert expected.items() <= items.items()


@pytest.mark.slow
def test_the_shipped_adapters_differ_on_the_examples():
    """On most some are right and some wrong; on one all are wrong; the opening one only the mixtures answer."""
    engine = CompareEngine("embedded", shipped_adapters())
    right = {}
    for example in EXAMPLES:
        if example.expected:
            texts = [""] * len(engine.columns)
            for update in engine.stream(example.prompt, Sampling(48)):
                texts[update.row] += update.text
            right[example.label] = [is_right(text, example.expected) for text in texts]
    assert not any(base for base, *_ in right.values())
    mixed = [label for label, (_, *adapters) in right.items() if any(adapters) and not all(adapters)]
    assert len(mixed) >= 3
    assert right["Too hard"] == [False] * 5
    kinds = [column.kind for column in engine.columns]
    assert [kind for kind, ok in zip(kinds, right[EXAMPLES[0].label], strict=True) if ok] == ["MixLoRA", "MixDoRA"]
