"""The page in a real browser, used as a visitor would: typed into, watched, stopped, on a phone, in the dark."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from demo.panels import set_number

TESTS = Path(__file__).parents[1]
HTML = "<img src=x onerror=\"document.title='hacked'\"><b>bold</b> & ${props} {{value}} `x`"


class Server:
    """tests/tiny_stand_ins.py in a process of its own: its address, and the engine's counter."""

    def __init__(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "tiny_stand_ins.py"), str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(TESTS.parent)},
        )
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http"), "the page did not start; see its traceback above"

    def forwards(self):
        """Ask the running engine how many forwards it has computed."""
        self.process.stdin.write("forwards\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server():
    """One server for all tests."""
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.terminate()
    server.process.wait(timeout=30)
    server.process.stdout.close()


@pytest.fixture
def visit(server, browser):
    """Open the page; at the end of the test nothing may have gone wrong in the browser or left this machine."""
    contexts, troubles, hosts = [], [], set()

    def open_page(width=1280, height=800, scheme="light", **settings):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.goto(server.address)
        page.wait_for_function("document.querySelectorAll('.ml-card[data-kind]').length === 3")
        for name in ("#ml-prompt textarea", "#ml-run", "#ml-stop", ".ml-chip >> nth=1"):  # each arrives on its own
            page.wait_for_selector(name, state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []
    assert hosts <= {"127.0.0.1", None}  # None: data: and blob: addresses


def ask(page, prompt):
    """Type a prompt and press Enter."""
    page.fill("#ml-prompt textarea", prompt)
    page.press("#ml-prompt textarea", "Enter")


def wait_for_states(page, *states):
    """Wait until the columns are in these states."""
    page.wait_for_function(
        "states => JSON.stringify([...document.querySelectorAll('.ml-card')].map(c => c.dataset.state)) === states",
        arg=str(list(states)).replace("'", '"').replace(" ", ""),
    )


def wait_until_writing(page):
    """Wait until every column has some text."""
    page.wait_for_function("[...document.querySelectorAll('.ml-text')].every(text => text.textContent.length > 3)")


def texts(page):
    """The columns' answers."""
    return page.locator(".ml-text").all_text_contents()


def settled(server):
    """Assert that the engine computes nothing."""
    time.sleep(0.15)  # the step that runs
    before = server.forwards()
    time.sleep(0.6)
    assert server.forwards() == before


def luminance(color):
    """Relative luminance of a CSS colour, as WCAG defines it."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrasts(page, *more):
    """Contrast ratios of the visible texts, and of `more` selectors, against what lies behind them."""
    names = (
        ".ml-head h1, .ml-head p, .ml-words, .ml-name, .ml-facts, .ml-answer, .ml-state, .ml-numbers dt, .ml-numbers dd"
    )
    pairs = page.evaluate(
        """names => names.split(", ").map(name => {
            const element = document.querySelector(name);
            let behind = element;
            while (/, 0\\)$/.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
            return [name, getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
        })""",
        ", ".join((names, ".ml-badge, #ml-prompt textarea, .ml-chip, #ml-run, #ml-stop", *more)),
    )
    for name, front, back in pairs:
        light, dark = sorted((luminance(front), luminance(back)), reverse=True)
        yield name, (light + 0.05) / (dark + 0.05)


def test_columns_fill_and_tell_their_numbers(server, visit):
    """Opens, streams, ends: text, kinds, parameters and measured numbers in every column."""
    page = visit()
    assert page.title() == "minilora · compare"
    assert page.locator("h1").inner_text() == "Same prompt, three answers"
    assert page.locator(".ml-name").all_inner_texts() == ["base", "parrot-dora", "parrot-mix"]
    facts = page.locator(".ml-facts").all_inner_texts()
    assert facts[1] == "DoRA · +224 parameters (50.0%) · r 2"
    assert facts[2] == "MixLoRA · +336 parameters (75.0%) · r 2, 2 experts, 2 active"
    assert page.locator(".ml-badge").all_inner_texts() == ["B", "D", "M"]
    before = server.forwards()
    ask(page, "Hi 👩‍👩‍👧 naïve 🇩🇪")
    wait_for_states(page, "length", "eos", "eos")
    assert texts(page)[1:] == ["Hi 👩‍👩‍👧 naïve 🇩🇪"] * 2
    assert page.locator(".ml-tokens").all_inner_texts()[0] == "96"
    assert all(float(value) > 0 for value in page.locator(".ml-rate").all_inner_texts())
    assert all(float(value.removesuffix(" s")) > 0 for value in page.locator(".ml-first").all_inner_texts())
    done = server.forwards() - before
    assert done == 96  # one forward a step, for all columns together
    written = sum(map(int, page.locator(".ml-tokens").all_inner_texts()))
    assert page.locator(".ml-words").inner_text().startswith(f"Done. {written} tokens in ")
    badge = page.locator(".ml-count").inner_text()
    # One after the other: each column's tokens, since a short prompt is read by the forward of the first.
    assert re.fullmatch(rf"1 pass · {done} forwards, not {written} · first token \d+\.\d s", badge)
    assert page.locator("#ml-stop").is_disabled()


def test_text_only_ever_appends(visit):
    """No flicker: whatever was on the page stays there while more follows."""
    page = visit()
    ask(page, "some words to be said back slowly")
    wait_until_writing(page)
    page.evaluate("window.first = document.querySelector('.ml-token')")
    seen, frames = texts(page), 0
    while page.locator(".ml-card[data-state=writing], .ml-card[data-state=waiting]").count():
        now = texts(page)
        assert all(new.startswith(old) for new, old in zip(now, seen, strict=True))
        seen, frames = now, frames + (now != seen)
    assert frames > 5
    assert page.evaluate("window.first === document.querySelector('.ml-token')")  # nothing was drawn anew
    spans = page.evaluate("[...document.querySelectorAll('.ml-text')].map(text => text.children.length)")
    assert spans == [int(count) for count in page.locator(".ml-tokens").all_inner_texts()]


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_stops_the_computation(server, visit, way):
    """The text no longer grows, and neither does the engine's counter."""
    page = visit()
    ask(page, "a long text, " * 20)
    wait_until_writing(page)
    if way == "button":
        page.click("#ml-stop")
    else:
        page.keyboard.press("Escape")
    wait_for_states(page, "stopped", "stopped", "stopped")
    before = texts(page)
    settled(server)
    assert texts(page) == before
    assert page.locator(".ml-words").inner_text().startswith("Stopped.")
    ask(page, "again")
    wait_for_states(page, "length", "eos", "eos")


def test_a_closed_tab_stops_the_computation(server, visit):
    """Nobody watches, nobody computes."""
    page = visit()
    ask(page, "a long text, " * 20)
    wait_until_writing(page)
    page.close()
    time.sleep(1)
    settled(server)


def test_a_new_prompt_replaces_a_running_one(visit):
    """Enter in the middle of an answer starts over with what is typed now."""
    page = visit()
    ask(page, "a long text, " * 20)
    wait_until_writing(page)
    ask(page, "second")
    page.wait_for_function("document.querySelectorAll('.ml-text')[1].textContent === 'second'")
    wait_for_states(page, "length", "eos", "eos")
    assert texts(page)[2] == "second"


def test_visitors_take_turns(visit):
    """Nobody waits for another's whole answer, and a Stop of one is nothing to the others."""
    first, second, third = visit(), visit(), visit()
    ask(first, "first " * 10)
    ask(third, "third " * 10)
    wait_until_writing(first)
    wait_until_writing(third)
    ask(second, "second")
    second.wait_for_function("document.querySelectorAll('.ml-text')[1].textContent === 'second'")
    assert first.locator(".ml-card[data-state=writing]").count() > 0
    third.keyboard.press("Escape")
    wait_for_states(third, "stopped", "stopped", "stopped")
    wait_for_states(second, "length", "eos", "eos")
    wait_for_states(first, "length", "eos", "eos")
    assert texts(first)[1] == "first " * 10
    assert len(texts(third)[1]) < len("third " * 10)


def test_html_is_shown_as_text(visit):
    """In the prompt, in answers and in error messages."""
    page = visit()
    ask(page, HTML)
    wait_for_states(page, "length", "eos", "eos")
    assert texts(page)[1] == HTML
    assert page.title() == "minilora · compare"
    assert page.locator(".ml-card img, .ml-card b").count() == 0


def test_one_columns_error_leaves_the_others_running(visit):
    """The failed columns say why, as text; the base goes on to its end."""
    page = visit()
    ask(page, "explode, please")
    wait_for_states(page, "length", "error", "error")
    errors = page.locator(".ml-error").all_text_contents()
    assert errors[0] == ""
    assert all("logits contain NaN" in error for error in errors[1:])
    assert texts(page)[1] == "explo"
    assert page.locator(".ml-words").inner_text().startswith("2 of 3 columns failed.")


def test_an_error_of_all_columns_is_shown_as_text(visit):
    """Markup in it is not obeyed, and the page stays usable."""
    page = visit()
    ask(page, "destroy, please")
    wait_for_states(page, "error", "error", "error")
    assert page.locator(".ml-error").all_text_contents() == ["RuntimeError: <b>boom</b>"] * 3
    assert page.locator(".ml-error b").count() == 0
    ask(page, "hi")
    wait_for_states(page, "length", "eos", "eos")


def test_an_empty_prompt_is_told_in_the_status_line(visit):
    """A sentence, and nothing breaks."""
    page = visit()
    page.click("#ml-run")
    page.wait_for_selector(".ml-status[data-phase=error]")
    assert "must hold some text" in page.locator(".ml-words").inner_text()
    assert page.locator("#ml-stop").is_disabled()


def test_examples_run_and_settings_apply(visit):
    """A chip fills the prompt and runs it; the length setting is obeyed."""
    page = visit()
    page.get_by_role("button", name="Settings").click()
    set_number(page, "Max new tokens", "7")
    page.get_by_role("button", name="Ünïcödé").click()
    wait_for_states(page, "length", "length", "length")
    assert page.input_value("#ml-prompt textarea") == "Ünïcödé"
    assert page.locator(".ml-tokens").all_inner_texts() == ["7", "7", "7"]


def test_shift_enter_makes_a_new_line(visit):
    """Only a plain Enter runs."""
    page = visit()
    page.fill("#ml-prompt textarea", "one")
    page.press("#ml-prompt textarea", "Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#ml-prompt textarea") == "one\ntwo"
    assert page.locator(".ml-card[data-state=idle]").count() == 3
    page.keyboard.press("Enter")
    wait_for_states(page, "length", "eos", "eos")
    assert texts(page)[1] == "one\ntwo"


def test_one_line_is_read_aloud(visit):
    """A screen reader hears a summary, not three streams at once."""
    page = visit()
    live = page.locator("[aria-live]:not([aria-live=off])")
    ours = [name for name in live.evaluate_all("all => all.map(one => one.className)") if name.startswith("ml-")]
    assert ours == ["ml-words"]
    assert page.locator(".ml-card").first.get_attribute("aria-label") == "base, base"


def test_on_a_phone_one_column_fills_the_screen(visit):
    """Tabs name the columns and bring them; a swipe does, too; nothing else scrolls sideways."""
    page = visit(width=390, height=844, has_touch=True)
    seen = "cards => cards.map(c => c.getBoundingClientRect()).map(b => b.left >= 0 && b.right <= 390 && b.width > 300)"
    tabs = page.locator(".ml-tab")
    assert tabs.all_inner_texts() == ["base", "DoRA", "MixLoRA"]
    assert page.locator(".ml-card").evaluate_all(seen) == [True, False, False]
    tabs.nth(2).click()
    page.wait_for_selector(".ml-tab:nth-child(3)[aria-current=true]")
    page.wait_for_timeout(500)  # the smooth scroll ends
    assert page.locator(".ml-card").evaluate_all(seen) == [False, False, True]
    page.locator(".ml-columns").hover()
    page.mouse.wheel(-300, 0)
    page.wait_for_selector(".ml-tab:nth-child(2)[aria-current=true]")
    page.wait_for_timeout(500)
    assert page.locator(".ml-card").evaluate_all(seen) == [False, True, False]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_on_a_phone_the_prompt_stays_at_hand(visit):
    """Stuck to the bottom, above whatever is scrolled, and the end of the page is not hidden behind it."""
    page = visit(width=390, height=844, has_touch=True)
    page.fill("#ml-prompt textarea", "line\n" * 15)
    page.click("#ml-run")
    page.wait_for_selector("#ml-stop:not(:disabled)")
    stop = page.locator("#ml-stop").bounding_box()
    assert stop["x"] + stop["width"] <= 390
    wait_for_states(page, "length", "eos", "eos")
    for top in (0, 300, 100_000):
        page.evaluate("top => window.scrollTo(0, top)", top)
        bars = [page.locator(name).bounding_box() for name in ("#ml-prompt textarea", "#ml-run")]
        assert all(bar["y"] > 400 and bar["y"] + bar["height"] <= 844 for bar in bars)
        assert all(bar["x"] >= 0 and bar["x"] + bar["width"] <= 390 for bar in bars)
    last = page.locator(".ml-panels").bounding_box()
    assert last["y"] + last["height"] <= page.locator("#ml-ask").bounding_box()["y"]


def test_on_a_desktop_columns_stand_side_by_side(visit):
    """In one row, equally wide and high, also when one answer is much longer than the others."""
    page = visit()
    page.fill("#ml-prompt textarea", "line\n" * 19 + "line")
    page.press("#ml-prompt textarea", "Enter")
    wait_for_states(page, "length", "length", "length")
    boxes = page.locator(".ml-card").evaluate_all("cards => cards.map(c => c.getBoundingClientRect().toJSON())")
    assert len({round(box["top"]) for box in boxes}) == len({round(box["width"]) for box in boxes}) == 1
    assert len({round(box["height"]) for box in boxes}) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(visit, scheme):
    """Contrast of at least 4.5 (WCAG AA) in light and in dark, and dark is dark."""
    page = visit(scheme=scheme)
    assert {name: ratio for name, ratio in contrasts(page) if ratio < 4.5} == {}
    paper = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert paper < 0.05 if scheme == "dark" else paper > 0.8


def test_reduced_motion_is_respected(visit):
    """Nothing pulses for those who asked for stillness."""
    page = visit(reduced_motion="reduce")
    ask(page, "still")
    page.wait_for_selector(".ml-status[data-phase=busy]")
    assert page.evaluate("getComputedStyle(document.querySelector('.ml-dot')).animationName") == "none"
    page.keyboard.press("Escape")
