"""The page in a real browser when much is asked of it: hostile prompts, a line of visitors, tabs that close."""

from __future__ import annotations

import re
import time

import pytest
from demo.panels import set_number
from demo.serving import Serving
from demo.test_page import ask, texts, visit, wait_for_states  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def server():
    """One place, and one who may wait: the third is sent away."""
    with Serving(MINILORA_AT_ONCE="1", MINILORA_MAX_WAITING="1", MINILORA_MAX_TOKENS="400") as server:
        yield server


def words(page):
    """The line that is read aloud."""
    return page.locator(".ml-words").inner_text()


def wait_for_words(page, start):
    """Wait until that line starts so."""
    page.wait_for_function("start => document.querySelector('.ml-words').textContent.startsWith(start)", arg=start)


def ask_long(page, prompt):
    """Ask for an answer of 400 tokens: twelve seconds."""
    page.get_by_role("button", name="Settings").click()
    set_number(page, "Max new tokens", "400")
    ask(page, prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "<script>document.title='x'</script><img src=x onerror=\"document.title='x'\"><b>&amp;</b>",
        "${alert(1)} {{7*7}} {% x %} `document.title='x'` </script>",
        "👩‍👩‍👧 🇩🇪 😀 \U0001f9d1\u200d\U0001f680",
        "שלום \u202eabc\u202c עולם",
        "a\x01b\x07c\x1b[31md\x7f",
    ],
    ids=["html", "template", "emoji", "rtl", "control"],
)
def test_any_prompt_is_shown_as_text(visit, prompt):  # noqa: F811
    """Letter by letter as it was typed: nothing of it is run, and nothing becomes an element."""
    page = visit()
    ask(page, prompt)
    wait_for_states(page, "length", "eos", "eos")
    assert texts(page)[1:] == [prompt] * 2
    assert page.title() == "minilora · compare"
    assert page.locator(".ml-card script, .ml-card img, .ml-text b").count() == 0


def test_100_kb_are_refused_with_a_reason(server, visit):  # noqa: F811
    """Not cut off silently; the page goes on."""
    page = visit()
    before = server.forwards()
    ask(page, "x" * 100_000)
    wait_for_words(page, "prompt of 100,000 characters: this page takes at most 8,000")
    assert page.locator(".ml-status").get_attribute("data-phase") == "error"
    assert server.forwards() == before
    ask(page, "hi")
    wait_for_states(page, "length", "eos", "eos")


def test_those_who_wait_are_told_and_then_served(server, visit):  # noqa: F811
    """The second hears its place and about how long; the third is sent away; a closed tab lets the second in."""
    first, second, third = visit(), visit(), visit()
    ask_long(first, "first " * 30)
    first.wait_for_function("document.querySelector('.ml-text').textContent.length > 3")
    ask(second, "second")
    wait_for_words(second, "Number 1 in line: your turn comes in about ")
    told = int(re.search(r"about (\d+) s", words(second))[1])
    assert 0 < told < 60
    ask(third, "third")
    wait_for_words(third, "the line is full, with 1 waiting: try again in some minutes")
    first.close()
    began = time.monotonic()
    wait_for_states(second, "length", "eos", "eos")
    assert texts(second)[1:] == ["second"] * 2
    assert time.monotonic() - began < 60
    ask(third, "again")
    wait_for_states(third, "length", "eos", "eos")


def test_a_closed_tab_leaves_the_line(server, visit):  # noqa: F811
    """Who waited and left takes no place from those behind."""
    first, second, third = visit(), visit(), visit()
    ask_long(first, "first " * 30)
    first.wait_for_function("document.querySelector('.ml-text').textContent.length > 3")
    ask(second, "second")
    wait_for_words(second, "Number 1 in line")
    second.close()
    for _ in range(20):  # until the server has seen it
        ask(third, "third")
        third.wait_for_function("!/^(Ready|Waiting|Reading)/.test(document.querySelector('.ml-words').textContent)")
        if words(third).startswith("Number 1 in line"):
            break
        time.sleep(0.5)
    assert words(third).startswith("Number 1 in line")
    first.keyboard.press("Escape")
    wait_for_states(third, "length", "eos", "eos")
    server.settled()
