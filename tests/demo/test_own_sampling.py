"""Columns with sampling settings of their own: what they answer, and that everything that is kept says so."""

from __future__ import annotations

import json

import pytest
from demo.threads import run_async

from minilora_hub.compare.engine import Row, Sampling
from minilora_hub.demo.runs.comparison import Comparison, exported_json, exported_markdown
from minilora_hub.demo.runs.prompt_files import FilePrompt, run_prompts
from minilora_hub.demo.ui.page_state import text_of
from minilora_hub.demo.ui.settings import next_seed
from minilora_hub.errors import PageError

GREEDY, OWN = Sampling(8), {"temperature": 1.5, "top_k": 40, "seed": 7}
OF_OWN = Sampling(8, temperature=1.5, top_k=40, seed=7)


def run(visitor, sampling=GREEDY, prompt="Hello", system=""):
    """The last frame of a comparison."""

    async def last():
        visitor.begin(prompt)
        async for frame in visitor.run_and_keep(prompt, sampling, system):
            final = frame
        return final

    return run_async(last())


def answers(frame):
    return [text_of(column) for column in frame.stage["columns"]]


def by_hand(engine, *samplings):
    """What each column answers with these settings, all in one batch."""
    rows = [Row("Hello", column.adapter, sampling) for column, sampling in zip(engine.columns, samplings, strict=True)]
    texts = [""] * len(rows)
    for update in engine.stream_rows(rows):
        texts[update.row] += update.text
    return texts


def test_a_column_has_its_own_settings_and_the_others_the_common_ones(engine, ana):
    common = answers(run(ana))
    ana.tune(1, OWN, again=False)
    frame = run(ana)
    assert answers(frame) == by_hand(engine, GREEDY, OF_OWN, GREEDY)
    assert answers(frame)[1] != common[1]
    assert [column["sampling"] for column in frame.stage["columns"]] == [{}, OWN, {}]
    ana.tune(1, {}, again=False)
    assert answers(run(ana)) == common


def test_what_is_kept_shared_and_exported_says_so(ana):
    ana.tune(1, OWN, again=False)
    run(ana)
    kept = ana.history.last().comparison
    again = Comparison.from_json(kept.to_json())
    assert (again.columns, again.sampling) == (kept.columns, kept.sampling)
    assert [again.sampling_of(column)["temperature"] for column in again.columns] == [0, 1.5, 0]
    exported = json.loads(exported_json(kept))
    assert [column["sampling"]["seed"] for column in exported["columns"]] == [0, 7, 0]
    assert exported["sampling"]["seed"] == 0
    assert exported_markdown(kept).count("Its own settings: temperature 1.5, top k 40, seed 7.") == 1


def test_a_comparison_that_is_opened_or_repeated_brings_its_settings(engine, ana):
    first = run(ana)
    ana.tune(1, OWN, again=False)
    second = run(ana)
    plain, tuned = reversed(ana.history.listed())
    ana.show(plain)
    assert answers(run(ana)) == answers(first)
    ana.show(tuned)
    assert answers(run(ana)) == answers(second)
    ana.tune(1, {}, again=False)
    ana.repeat()
    assert answers(run(ana)) == answers(second)


def test_one_column_answers_again_and_the_others_keep_the_settings_that_they_had(engine, ana):
    """The seed, the length and the system prompt of the new run are not those of the kept answers."""
    old, new = Sampling(8, temperature=1.0, seed=1), Sampling(6, temperature=1.0, seed=2)
    first = answers(run(ana, old))
    ana.tune(1, {"temperature": 0.5}, again=True)
    frame = run(ana, new, system="Be brief.")
    kept = ana.history.last().comparison
    assert [answers(frame)[0], answers(frame)[2]] == [first[0], first[2]]
    was = {"max_new_tokens": 8, "temperature": 1.0, "seed": 1, "system_prompt": ""}
    for column, wanted in zip(kept.columns, (was, {"temperature": 0.5, "seed": 2}, was), strict=True):
        assert wanted.items() <= kept.sampling_of(column).items()
    ana.repeat()
    assert answers(run(ana, new))[0] == by_hand(engine, Sampling(6, temperature=1.0, seed=1), new, new)[0]


def test_blind_comparisons_have_the_common_settings(ana):
    """A vote is for a model, not for its sampling; and a column's own would show which it is."""
    common = answers(run(ana))
    ana.tune(1, OWN, again=False)
    ana.blind = True
    frame = run(ana)
    assert "temperature" not in json.dumps(frame.stage)
    kept = ana.history.last().comparison
    assert [text_of(column) for column in kept.columns] == common
    assert [column["sampling"] for column in kept.columns] == [{}] * 3
    ana.blind = False
    assert run(ana).stage["columns"][1]["sampling"] == OWN


def test_a_column_that_samples_gets_a_new_seed_with_every_run(ana):
    assert not ana.samples
    ana.tune(1, {"temperature": 0.5}, again=False)
    assert ana.samples
    assert len({next_seed(not ana.samples, False, 3) for _ in range(5)}) > 1


def test_a_file_of_prompts_names_them(ana):
    ana.tune(1, OWN, again=False)

    async def table():
        async for found in run_prompts(ana, [FilePrompt("Hello")], GREEDY):
            last = found
        return last

    found = run_async(table())
    assert [name.partition(" (")[2] for name in found.names] == ["", "temperature 1.5, top k 40, seed 7)", ""]
    texts = [one["text"] for one in found.rows[0]["answers"]]
    assert texts == answers(run(ana))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"temperature": -1}, "temperature=-1: must be at least 0"),
        ({"top_k": 1.5}, "top_k=1.5: must be an integer"),
        ({"max_new_tokens": 9}, "setting 'max_new_tokens' of a column: must be one of temperature"),
        ([1], r"sampling=\[1\]: must be settings"),
        (None, "sampling=None: must be settings"),
    ],
)
def test_wrong_settings_change_nothing(ana, own, message):
    ana.tune(1, OWN, again=False)
    with pytest.raises(PageError, match=message):
        ana.tune(1, own, again=False)
    assert ana.own()[1] == OWN
    with pytest.raises(PageError, match="column 3: must be from 0 to 2"):
        ana.tune(3, {}, again=False)
    with pytest.raises(PageError, match="nothing was run yet"):
        ana.tune(1, {}, again=True)
    assert ana.own()[1] == OWN
