"""The comparison that the page opens with: whether the shipped adapters do it, and what a visitor sees of it."""

from __future__ import annotations

import json
import time
from itertools import zip_longest

import pytest
from demo.browsing import ask, shift, texts, wait_for_states

from minilora_hub.compare.engine import CompareEngine, Sampling
from minilora_hub.compare.found_adapters import shipped_adapters
from minilora_hub.demo.runs.replay import SHIPPED, difference, find_replay, make_replay
from minilora_hub.demo.ui.page_state import text_of
from minilora_hub.errors import MiniLoraError

TIE = 0.05
"""Of log-probabilities: on another processor the second of two that are as near as this may be written."""


@pytest.fixture(scope="module")
def replay():
    return json.loads(SHIPPED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def stage(replay):
    return replay["stage"]


@pytest.fixture(scope="module")
def server(page_server):
    return page_server.serve("shipped")


@pytest.mark.slow
def test_the_replay_is_of_the_shipped_adapters(replay, stage):
    """Their weights and their tokens, up to a tie. If not: python -m minilora_hub.demo.runs.replay."""
    engine = CompareEngine("embedded", shipped_adapters())
    assert difference(replay, engine) is None
    sampling = Sampling(**{**stage["sampling"], "stop": tuple(stage["sampling"]["stop"])})
    again = [[] for _ in stage["columns"]]
    for update in engine.stream(stage["prompt"], sampling):
        if update.token_id is not None:
            again[update.row].append(update)
    for column, updates in zip(stage["columns"], again, strict=True):
        told = [json.loads(line) for line in column["log"].split("\n")[:-1]]
        for one, update in zip_longest([one for one in told if "i" in one], updates):
            if one is None or update is None or one["i"] != update.token_id:
                assert update is not None
                assert update.alternatives[0][1] - update.alternatives[1][1] < TIE
                break
            assert abs(one["l"] - update.logprob) < 0.01


@pytest.mark.slow
def test_the_page_opens_with_it_and_plays_it(visit, stage, replay):
    """At reading pace, labelled, without computing anything; at the end all of it is there."""
    page = visit(wait=False)  # the replay may be over before every part of the page is there
    some_of_it = "document.querySelectorAll('.ml-token:not([hidden])').length > 6"
    page.wait_for_function(f"{some_of_it} && document.querySelector('.ml-token[hidden]')")
    label = page.locator(".ml-asked").inner_text()
    assert label.startswith("replay")
    assert stage["prompt"] in label
    assert replay["machine"] in label
    assert page.locator(".ml-words").inner_text() == "Replay of a recorded run."
    page.wait_for_function("!document.querySelector('.ml-token[hidden]')")
    assert texts(page) == [text_of(column) for column in stage["columns"]]
    assert page.locator(".ml-count").inner_text() == replay["status"]["badge"]
    assert shift(page) < 0.1


@pytest.mark.slow
def test_nothing_moves_for_those_who_asked_for_stillness(visit, stage):
    """Reduced motion: all of it at once."""
    page = visit(reduced_motion="reduce")
    page.wait_for_selector(".ml-token")
    assert page.locator(".ml-token[hidden]").count() == 0
    assert texts(page) == [text_of(column) for column in stage["columns"]]


@pytest.mark.slow
def test_a_prompt_ends_it(visit, server):
    """The label goes, and what follows is computed now."""
    page = visit()
    page.wait_for_selector(".ml-token")
    before = server.forwards()
    ask(page, "Write this in digits: seven thousand, eight hundred and ten")
    page.wait_for_selector(".ml-replay-mark", state="hidden")
    # The replay may have ended as well: its columns are finished before the new ones begin.
    page.wait_for_function("document.querySelector('.ml-words').textContent.startsWith('Done.')")
    wait_for_states(page, *["eos"] * page.locator(".ml-card").count())
    assert server.forwards() > before
    assert all(text.strip() for text in texts(page))
    assert page.locator(".ml-token[hidden]").count() == 0


def test_other_models_do_not_show_it(saved, tmp_path, monkeypatch, replay):
    """A page over other adapters starts empty, until it has a replay of its own; one that has aged is told."""
    base, adapters = saved
    engine = CompareEngine(base, adapters[:1], device="cpu")
    assert find_replay(engine) is None
    own = tmp_path / "own.json"
    made = make_replay(engine, "Hello", 5)
    own.write_text(json.dumps(made))
    monkeypatch.setenv("MINILORA_REPLAY", str(own))
    found = find_replay(engine)
    assert [text_of(column) for column in found["stage"]["columns"]] == [
        text_of(column) for column in made["stage"]["columns"]
    ]
    own.write_text(json.dumps({**made, "weights": {"mix": "0" * 64}}))
    with pytest.raises(MiniLoraError, match="other weights of mix; make it again with"):
        find_replay(engine)
    own.write_text(SHIPPED.read_text(encoding="utf-8"))
    with pytest.raises(MiniLoraError, match="it was recorded with the columns"):
        find_replay(engine)
    own.write_text("[]")
    with pytest.raises(MiniLoraError, match="must be a replay"):
        find_replay(engine)
    own.unlink()
    with pytest.raises(MiniLoraError, match="cannot be read as a replay"):
        find_replay(engine)


def test_a_replay_is_made_by_computing(saved):
    """It tells its command, day and machine, and the forwards that the engine counted."""
    base, adapters = saved
    engine = CompareEngine(base, adapters, device="cpu")
    before = engine.forwards
    made = make_replay(engine, "Hello", 7)
    assert engine.forwards - before == 4 + 7  # a short warm-up, then one forward a token
    assert made["status"]["badge"].startswith("7 steps for all 4 columns · ")
    assert "would take 28 steps" in made["status"]["hint"]
    assert made["date"] == time.strftime("%Y-%m-%d", time.gmtime())
    assert [column["tokens"] for column in made["stage"]["columns"]] == [7] * 4
    assert made["machine"] in made["stage"]["replay"]
