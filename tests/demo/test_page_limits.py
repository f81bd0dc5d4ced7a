"""The page in a real browser under its limits: a long prompt, a full queue, tabs that close."""

from __future__ import annotations

import re
import time

import pytest
from demo.browsing import ask, open_panel, set_number, texts, wait_for_states, wait_for_words, words

pytestmark = pytest.mark.slow  # queues that take their time


@pytest.fixture(scope="module")
def server(page_server):
    """One comparison runs, one waits, and a third is refused."""
    return page_server.serve("scripted", at_once=1, waiting=1, tokens=400)


def ask_long(page, prompt):
    """Ask for an answer of 400 tokens: twelve seconds."""
    open_panel(page, "Settings")
    set_number(page, "Max new tokens", "400")
    ask(page, prompt)


def test_100_kb_are_refused_with_a_reason(server, visit):
    """Not cut off silently; the page goes on."""
    page = visit()
    before = server.forwards()
    ask(page, "x" * 100_000)
    wait_for_words(page, "prompt of 100,000 characters: this page takes at most 8,000")
    assert page.locator(".ml-status").get_attribute("data-phase") == "error"
    assert server.forwards() == before
    ask(page, "hi")
    wait_for_states(page, "length", "eos", "eos")


@pytest.mark.slow
def test_visitors_who_wait_see_their_place_and_are_then_served(server, visit):
    """The second sees its position and an estimate; the third is refused; a closed tab lets the second start."""
    first, second, third = visit(), visit(), visit()
    ask_long(first, "first " * 30)
    first.wait_for_function("document.querySelector('.ml-text').textContent.length > 3")
    ask(second, "second")
    wait_for_words(second, "Number 1 in the queue: starting in about ")
    seconds = int(re.search(r"about (\d+) s", words(second))[1])
    assert 0 < seconds < 60
    ask(third, "third")
    wait_for_words(third, "the queue is full, with 1 waiting: try again in some minutes")
    first.close()
    began = time.monotonic()
    wait_for_states(second, "length", "eos", "eos")
    assert texts(second)[1:] == ["second"] * 2
    assert time.monotonic() - began < 60
    ask(third, "again")
    wait_for_states(third, "length", "eos", "eos")


def test_a_closed_tab_leaves_the_queue(server, visit):
    """A visitor who waited and left takes no place from those behind."""
    first, second, third = visit(), visit(), visit()
    ask_long(first, "first " * 30)
    first.wait_for_function("document.querySelector('.ml-text').textContent.length > 3")
    ask(second, "second")
    wait_for_words(second, "Number 1 in the queue")
    second.close()
    for _ in range(20):  # until the server has seen it
        ask(third, "third")
        third.wait_for_function("!/^(Ready|Waiting|Reading)/.test(document.querySelector('.ml-words').textContent)")
        if words(third).startswith("Number 1 in the queue"):
            break
        time.sleep(0.5)
    assert words(third).startswith("Number 1 in the queue")
    first.keyboard.press("Escape")
    wait_for_states(third, "length", "eos", "eos")
    server.settled()
