"""The page in a real browser, used as a visitor would: typed into, watched, stopped, on a phone, in the dark."""

import re
import time

import pytest
from demo.browsing import (
    ask,
    begun,
    contrasts,
    luminance,
    open_panel,
    set_number,
    settled,
    shift,
    texts,
    wait_for_states,
    wait_for_words,
    wait_until_writing,
)


def test_columns_fill_and_tell_their_numbers(server, page):
    """Opens, streams, ends: text, kinds, parameters and measured numbers in every column."""
    assert page.title() == "minilora · compare"
    assert page.locator("h1").inner_text() == "Same prompt, three answers"
    assert page.locator(".ml-name").all_inner_texts() == ["base", "parrot-dora", "parrot-mix"]
    facts = page.locator(".ml-facts").all_inner_texts()
    assert facts[1] == "+224 parameters (50.0%) · rank 2"
    assert facts[2] == "+336 parameters (75.0%) · rank 2, 2 experts, 2 active"
    assert page.locator(".ml-badge").all_inner_texts() == ["base", "DoRA", "MixLoRA"]
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
    wait_for_words(page, f"Done. {written} tokens in ")
    badge = page.locator(".ml-count").inner_text()
    # One after the other: each column's tokens, since a short prompt is read by the forward of the first.
    assert re.fullmatch(rf"{done} steps for all 3 columns · \d+ ms a step · first token \d+\.\d s", badge)
    page.hover(".ml-count")
    hint = page.locator(".ml-hint").inner_text()
    assert f"One column after the other would take {written} steps." in hint
    # The parrots end first: until then all columns have the same steps, and so the same rate.
    shortest = min(map(int, page.locator(".ml-tokens").all_inner_texts()))
    assert hint.endswith(f"Tokens/s are those of the first {shortest} tokens, while all columns wrote.")
    rates = [float(rate) for rate in page.locator(".ml-rate").all_inner_texts()]
    assert max(rates) < 1.1 * min(rates)
    assert page.locator("#ml-stop").is_disabled()


def test_text_only_ever_appends(page):
    """No flicker: whatever was on the page stays there while more follows."""
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


@pytest.mark.parametrize("way", ["button", pytest.param("escape", marks=pytest.mark.slow)])
def test_stop_stops_the_computation(server, page, way):
    """The text no longer grows, and neither does the engine's counter."""
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
    wait_for_words(page, "Stopped.")
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


def test_a_new_prompt_replaces_a_running_one(page):
    """Enter in the middle of an answer starts over with what is typed now."""
    ask(page, "a long text, " * 20)
    wait_until_writing(page)
    ask(page, "second")
    page.wait_for_function("document.querySelectorAll('.ml-text')[1].textContent === 'second'")
    wait_for_states(page, "length", "eos", "eos")
    assert texts(page)[2] == "second"


@pytest.mark.slow
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


HOSTILE = {
    "markup": "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script><b>&amp;</b>",
    "templates": "${alert(1)} {{7*7}} {% x %} `document.title='x'` </template></script><style>*{display:none}</style>",
    "right to left": "שלום \u202eabc\u202c עולם \u2066 مرحبا",
    "emoji": "👩‍👩‍👧 🇩🇪 😀 \U0001f9d1\u200d\U0001f680 👋🏽",
    "controls": "a\x01b\x07c\x1b[31md\x7f\x85\u2028\u2029\ufeffe",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_any_prompt_is_shown_as_text(page, name):
    """Letter by letter as it was typed: nothing of it is run, and nothing becomes an element."""
    ask(page, HOSTILE[name])
    wait_for_states(page, "length", *["length" if len(HOSTILE[name].encode()) >= 96 else "eos"] * 2)
    assert all(HOSTILE[name].startswith(text.rstrip("\ufffd")) and len(text) > 10 for text in texts(page)[1:])
    assert page.title() == "minilora · compare"
    assert page.locator(".ml-card script, .ml-card img, .ml-card style, .ml-text b").count() == 0
    page.locator(".ml-answer").nth(1).press("ArrowRight")
    assert page.locator(".ml-inspected-words").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "said"), [("a\ud800b", "a\ufffdb"), ("nul \x00 here", "nul \x00 here")])
def test_texts_that_no_keyboard_types_are_answered(page, prompt, said):
    """A lone surrogate is replaced, since no answer can contain it."""
    page.evaluate(
        """text => { const box = document.querySelector('#ml-prompt textarea'); box.value = text;
                     box.dispatchEvent(new Event('input', {bubbles: true})); }""",
        prompt,
    )
    begun(page, lambda: page.click("#ml-run"))
    wait_for_states(page, "length", "eos", "eos")
    assert texts(page)[1] == said


@pytest.mark.slow
def test_number_keys_are_for_voting(page):
    """Outside of text fields 1 to 9 become an event; inside they are typed."""
    page.fill("#ml-prompt textarea", "")
    page.evaluate("window.votes = []; document.addEventListener('ml:vote', e => window.votes.push(e.detail))")
    page.locator("h1").click()
    page.keyboard.press("2")
    page.locator("#ml-prompt textarea").press("3")
    assert page.evaluate("window.votes") == [2]
    assert page.input_value("#ml-prompt textarea") == "3"


def test_one_columns_error_leaves_the_others_running(page):
    """The failed columns say why, as text; the base goes on to its end."""
    ask(page, "explode, please")
    wait_for_states(page, "length", "error", "error")
    errors = page.locator(".ml-error").all_text_contents()
    assert errors[0] == ""
    assert all("logits contain NaN" in error for error in errors[1:])
    assert texts(page)[1] == "explo"
    wait_for_words(page, "2 of 3 columns failed.")


@pytest.mark.slow
def test_an_error_of_all_columns_is_shown_as_text(page):
    """Markup in it is not obeyed, and the page stays usable."""
    ask(page, "destroy, please")
    wait_for_states(page, "error", "error", "error")
    assert page.locator(".ml-error").all_text_contents() == ["RuntimeError: <b>boom</b>"] * 3
    assert page.locator(".ml-error b").count() == 0
    ask(page, "hi")
    wait_for_states(page, "length", "eos", "eos")


@pytest.mark.slow
def test_an_empty_prompt_is_told_in_the_status_line(page):
    """A sentence, and what is shown stays; the next prompt is answered."""
    ask(page, "Hello")
    wait_for_states(page, "length", "eos", "eos")
    before = texts(page)
    for empty in ("", " \n"):
        page.evaluate("window.earlier = document.querySelector('.ml-card')")
        page.fill("#ml-prompt textarea", empty)
        page.click("#ml-run")
        page.wait_for_selector(".ml-status[data-phase=error]")
        assert page.locator(".ml-words").inner_text() == "Enter a prompt first."
        assert page.locator("#ml-stop").is_disabled()
        assert texts(page) == before
        assert page.evaluate("window.earlier === document.querySelector('.ml-card')")
        ask(page, "Hello")
        wait_for_states(page, "length", "eos", "eos")


@pytest.mark.slow
def test_a_field_that_is_left_empty_keeps_its_number(visit):
    page = visit()
    open_panel(page, "Settings")
    set_number(page, "Max new tokens", "7")
    page.get_by_label("number input for Max new tokens").fill("")
    page.keyboard.press("Tab")
    page.wait_for_timeout(300)
    assert page.get_by_label("number input for Max new tokens").input_value() == "7"
    ask(page, "Hello, hello, hello")
    wait_for_states(page, "length", "length", "length")
    assert page.locator(".ml-tokens").all_inner_texts() == ["7", "7", "7"]


@pytest.mark.slow
def test_a_saved_picture_keeps_indentation(page):
    """The second line of the answer stands further right than the first, and below it."""
    page.evaluate("""() => {
        window.drawn = [];
        const draw = CanvasRenderingContext2D.prototype.fillText;
        CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
            window.drawn.push([text, x, y, this.measureText(" ").width]);
            draw.call(this, text, x, y);
        };
    }""")
    ask(page, "@:  \n    \t#")
    wait_for_states(page, "length", "eos", "eos")
    with page.expect_download():
        page.get_by_role("button", name="Save picture").click()
    # The last two of each are those of the answers that repeat the prompt.
    first, second = ([one for one in page.evaluate("window.drawn") if one[0] == text][-2:] for text in ("@", "#"))
    assert len(first) == 2
    for (_, x, y, space), (_, indented, below, _) in zip(first, second, strict=True):
        assert indented == pytest.approx(x + 8 * space)
        assert below > y


@pytest.mark.slow
def test_examples_run_and_settings_apply(visit):
    """A chip fills the prompt and runs it; the length setting is obeyed."""
    page = visit()
    open_panel(page, "Settings")
    set_number(page, "Max new tokens", "7")
    page.get_by_role("button", name="Ünïcödé").click()
    wait_for_states(page, "length", "length", "length")
    assert page.input_value("#ml-prompt textarea") == "Ünïcödé"
    assert page.locator(".ml-tokens").all_inner_texts() == ["7", "7", "7"]


@pytest.mark.slow
def test_talk_on_and_one_column_alone(visit):
    """The next prompt continues each answer; one column is answered again, copied, stopped; Markdown is rendered."""
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    said = "**bold** and `code`"
    ask(page, said)
    wait_for_states(page, "length", "eos", "eos")
    page.click(".ml-markdown")
    assert page.locator(".ml-rendered strong:visible").all_inner_texts() == ["bold", "bold"]
    assert not page.locator(".ml-text").nth(1).is_visible()
    page.click(".ml-markdown")
    assert page.locator(".ml-text").nth(1).is_visible()
    page.get_by_role("button", name="Copy the answer of parrot-dora").click()
    page.wait_for_function("document.querySelectorAll('.ml-copy-answer')[1].textContent === '✓'")
    assert page.evaluate("navigator.clipboard.readText()") == said
    page.locator(".ml-talk select").select_option("own")
    ask(page, "next")
    wait_for_states(page, "length", "eos", "eos")
    assert page.locator(".ml-before").nth(1).locator("p").all_inner_texts() == [said, said]
    begun(page, lambda: page.get_by_role("button", name="Answer again: parrot-dora").click())
    wait_for_states(page, "length", "eos", "eos")
    page.wait_for_function("document.querySelector('.ml-count').textContent.includes('steps for 1 column')")
    assert page.locator(".ml-before").nth(1).locator("p").count() == 2
    page.locator(".ml-talk select").select_option("new")
    ask(page, "a long text, " * 7)
    wait_until_writing(page)
    page.get_by_role("button", name="Stop base").click()
    wait_for_states(page, "stopped", "eos", "eos")
    assert texts(page)[1] == "a long text, " * 7
    assert page.locator(".ml-before p").count() == 0


@pytest.mark.slow
def test_shift_enter_makes_a_new_line(page):
    """Only a plain Enter runs."""
    page.fill("#ml-prompt textarea", "one")
    page.press("#ml-prompt textarea", "Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#ml-prompt textarea") == "one\ntwo"
    assert page.locator("#ml-stop").is_disabled()
    begun(page, lambda: page.keyboard.press("Enter"))
    wait_for_states(page, "length", "eos", "eos")
    assert texts(page)[1] == "one\ntwo"


def test_one_line_is_read_aloud(page):
    """A screen reader hears a summary, not three streams at once."""
    live = page.locator("[aria-live]:not([aria-live=off])")
    ours = [name for name in live.evaluate_all("all => all.map(one => one.className)") if name.startswith("ml-")]
    assert ours == ["ml-words"]
    assert page.locator(".ml-card").first.get_attribute("aria-label") == "base, base"


@pytest.mark.slow
def test_on_a_phone_one_column_fills_the_screen(visit):
    """Tabs name the columns and bring them; a swipe does, too; nothing else scrolls sideways."""
    page = visit(width=390, height=844)
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


@pytest.mark.slow
def test_on_a_phone_the_prompt_stays_at_hand(visit):
    """Stuck to the bottom, above whatever is scrolled, and the end of the page is not hidden behind it."""
    page = visit(width=390, height=844)
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
    last = page.locator(".ml-heat").bounding_box()
    assert last["y"] + last["height"] <= page.locator("#ml-ask").bounding_box()["y"]


@pytest.mark.slow
def test_on_a_desktop_columns_stand_side_by_side(page):
    """In one row, equally wide and high, also when one answer is much longer than the others."""
    ask(page, "line\n" * 19 + "line")
    wait_for_states(page, "length", "length", "length")
    boxes = page.locator(".ml-card").evaluate_all("cards => cards.map(c => c.getBoundingClientRect().toJSON())")
    assert len({round(box["top"]) for box in boxes}) == len({round(box["width"]) for box in boxes}) == 1
    assert len({round(box["height"]) for box in boxes}) == 1


def test_loading_does_not_move_a_phones_page(visit):
    """The cumulative layout shift of loading is below 0.1."""
    page = visit("", 390, 844)
    page.wait_for_timeout(300)  # the parts that arrive last
    assert shift(page) < 0.1


@pytest.mark.parametrize(("width", "height"), [(1280, 800), pytest.param(390, 844, marks=pytest.mark.slow)])
def test_neither_loading_nor_run_moves_the_page(visit, width, height):
    """The cumulative layout shift of each is below 0.1, and on a desktop all columns stay in view."""
    page = visit("", width, height, own=True)
    page.wait_for_timeout(500)  # fonts and late parts
    loaded = shift(page)
    assert loaded < 0.1
    ask(page, "a long text, " * 4)
    wait_for_states(page, "length", "eos", "eos")
    page.wait_for_timeout(300)
    assert shift(page) - loaded < 0.1
    bottoms = page.locator(".ml-card").evaluate_all("cards => cards.map(c => c.getBoundingClientRect().bottom)")
    assert width < 500 or max(bottoms) <= height


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(visit, scheme):
    """Contrast of at least 4.5 (WCAG AA) in light and in dark, and dark is dark."""
    page = visit(scheme=scheme)
    assert {name: ratio for name, ratio in contrasts(page) if ratio < 4.5} == {}
    paper = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert paper < 0.05 if scheme == "dark" else paper > 0.8


@pytest.mark.slow
def test_reduced_motion_is_respected(visit):
    """Nothing pulses for those who asked for stillness."""
    page = visit(reduced_motion="reduce")
    ask(page, "still")
    page.wait_for_selector(".ml-status[data-phase=busy]")
    assert page.evaluate("getComputedStyle(document.querySelector('.ml-dot')).animationName") == "none"
    page.keyboard.press("Escape")
