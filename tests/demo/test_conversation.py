"""Conversations: what each column is told before a prompt, one column again or stopped alone, and safe Markdown."""

from __future__ import annotations

import json

import pytest
from demo.threads import run_async
from tiny_stand_ins import ScriptedBase, byte_tokenizer, save_parrots

from minilora_hub.compare.engine import CompareEngine, Row, Sampling
from minilora_hub.demo.runs.comparison import exported_json, exported_markdown
from minilora_hub.demo.runs.runner import Runner
from minilora_hub.demo.runs.visitor import Visitors
from minilora_hub.demo.ui.page_state import rendered, text_of
from minilora_hub.demo.votes.sharing import SharedComparisons
from minilora_hub.demo.votes.votes import VoteStore
from minilora_hub.errors import PageError

LENGTH = 8


def run(visitor, prompt, system="", seed=0, each=lambda frame: None):
    """The last frame of a comparison; `each` gets every frame."""

    async def collect():
        visitor.begin()
        sampling = Sampling(LENGTH, temperature=1.0, seed=seed)
        async for frame in visitor.run_and_keep(prompt, sampling, system):
            each(frame)
        return frame

    return run_async(collect())


def answers(frame):
    return [text_of(column) for column in frame.stage["columns"]]


def by_hand(engine, prompt, before, seed=0):
    """What the engine answers to the whole conversation, for each column."""
    rows = [
        Row(prompt, column.adapter, Sampling(LENGTH, temperature=1.0, seed=seed), None, turns)
        for column, turns in zip(engine.columns, before, strict=True)
    ]
    texts = [""] * len(rows)
    for update in engine.stream_rows(rows):
        texts[update.row] += update.text
    return texts


def test_a_conversation_is_one_chat_of_all_its_messages(engine):
    """As the chat template writes it; without a template the texts follow each other."""
    before = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"))
    turns = [{"role": role, "content": text} for role, text in [*before, ("user", "Why?")]]
    wanted = engine.tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert engine.prompt_ids("Why?", None, before) == list(wanted)
    bare = CompareEngine(ScriptedBase(), tokenizer=byte_tokenizer(chat=False))
    assert bare.prompt_ids("Why?", None, before) == bare.prompt_ids("Be brief.\n\nHi\n\nYes?\n\nWhy?")


def test_each_column_continues_its_own_answers(engine, ana):
    first = answers(run(ana, "Hello"))
    ana.conversation.follow("own")
    second = run(ana, "And then?")
    before = [(("user", "Hello"), ("assistant", text)) for text in first]
    assert answers(second) == by_hand(engine, "And then?", before)
    assert [column["before"] for column in second.stage["columns"]] == [[list(turn) for turn in one] for one in before]
    third = run(ana, "Go on")
    assert [len(column["before"]) for column in third.stage["columns"]] == [4] * 3


def test_all_columns_continue_one_of_them_and_a_new_one_begins(engine, ana):
    first = answers(run(ana, "Hello"))
    ana.conversation.follow("1")
    second = run(ana, "And then?")
    assert answers(second) == by_hand(engine, "And then?", [(("user", "Hello"), ("assistant", first[1]))] * 3)
    ana.conversation.follow("new")
    assert answers(run(ana, "Hello")) == first


def test_a_system_prompt_is_the_first_message_and_is_kept_with_the_settings(engine, ana):
    frame = run(ana, "Hello", system="Be brief.")
    assert answers(frame) == by_hand(engine, "Hello", [(("system", "Be brief."),)] * 3)
    kept = ana.history.last().comparison
    assert kept.sampling["system_prompt"] == "Be brief."
    assert [column["before"] for column in kept.columns] == [[]] * 3


def test_running_again_does_not_continue_from_itself(engine, ana):
    first = answers(run(ana, "Hello"))
    ana.conversation.follow("own")
    second = answers(run(ana, "And then?"))
    ana.conversation.rewind(ana.history.last().comparison.stage)
    assert answers(run(ana, "And then?")) == second != first


def test_a_blind_comparison_begins_anew(ana):
    """Earlier answers were shown with names."""
    first = answers(run(ana, "Hello"))
    ana.conversation.follow("own")
    ana.blind = True
    assert run(ana, "Hello").stage["columns"][0]["before"] == []
    assert [text_of(column) for column in ana.history.last().comparison.columns] == first


def test_exports_hold_the_earlier_turns(ana):
    run(ana, "Hello")
    ana.conversation.follow("own")
    run(ana, "And then?")
    comparison = ana.history.last().comparison
    assert json.loads(exported_json(comparison))["columns"][1]["before"][0] == ["user", "Hello"]
    assert "user, earlier:\n\n```text\nHello\n```" in exported_markdown(comparison)


@pytest.mark.parametrize("value", ["3", "-1", "all", ""])
def test_only_a_column_of_the_comparison_is_continued(ana, value):
    run(ana, "Hello")
    with pytest.raises(PageError, match="must be 'new', 'own' or the number of a column"):
        ana.conversation.follow(value)


def test_one_column_is_answered_again(engine, ana):
    """With the new seed; the other columns stay as they are, and so does the conversation before."""
    run(ana, "Hello")
    ana.conversation.follow("own")
    before = run(ana, "And then?")
    ana.ask_again(1)
    frame = run(ana, "And then?", seed=5)
    turns = [tuple(map(tuple, column["before"])) for column in before.stage["columns"]]
    assert answers(frame)[1] == by_hand(engine, "And then?", turns, seed=5)[1] != answers(before)[1]
    kept = [before.stage["columns"][at] | {"sampling": {"seed": 0}} for at in (0, 2)]  # theirs, not the new one
    assert [frame.stage["columns"][at] for at in (0, 2)] == kept
    assert frame.status["badge"].startswith(f"{LENGTH} steps for 1 column · ")
    assert answers(run(ana, "More"))  # the next run is of all columns
    assert len({column["tokens"] for column in ana.history.last().comparison.columns}) == 1


def test_an_answer_of_other_columns_is_not_repeated(ana):
    with pytest.raises(PageError, match="nothing was run yet"):
        ana.ask_again(0)
    run(ana, "Hello")
    with pytest.raises(PageError, match="column 3: must be from 0 to 2"):
        ana.ask_again(3)
    ana.blind = True
    with pytest.raises(PageError, match="blind"):
        ana.ask_again(0)


def test_one_column_is_stopped_alone(tmp_path):
    """The others go on to their end, and the engine no longer computes the stopped one."""
    parrots = save_parrots(tmp_path, {"parrot-dora": "dora", "parrot-mix": "mixlora"})
    engine = CompareEngine(ScriptedBase(delay=0.02), parrots, tokenizer=byte_tokenizer())
    visitors = Visitors(Runner(engine), VoteStore(tmp_path / "votes"), SharedComparisons(tmp_path / "shared"))
    ana = visitors.of("ana")

    def halt(frame):
        if frame.stage["columns"][1]["tokens"] >= 2:
            ana.halt(1)

    ana.begin()

    async def collect():
        async for frame in ana.run_and_keep("a long text to repeat", Sampling(40)):
            halt(frame)
        return frame

    frame = run_async(collect())
    assert [column["state"] for column in frame.stage["columns"]] == ["length", "stopped", "eos"]
    assert text_of(frame.stage["columns"][2]) == "a long text to repeat"
    assert "a long text to repeat".startswith(text_of(frame.stage["columns"][1]))
    assert frame.status["words"].startswith("Done. ")


HOSTILE = (
    "<script>alert(1)</script>\n\n<img src=x onerror=alert(1)> ![x](https://example.org/x.png) "
    "[a](javascript:alert(1)) [b](https://example.org)\n\n```html\n<b>x</b>\n```"
)


def test_markdown_is_rendered_without_html_pictures_or_scripts():
    html = rendered(HOSTILE)
    assert "<script" not in html
    assert "<img" not in html
    assert "<b>" not in html
    assert 'href="javascript' not in html
    assert '<a href="https://example.org">b</a>' in html
    assert '<pre><code class="language-html">' in html
