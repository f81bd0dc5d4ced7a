"""What the page draws of a comparison, seen as a visitor sees it, and held against what the engine itself tells."""

from __future__ import annotations

import re
from functools import lru_cache
from math import exp

import pytest
from demo.browsing import Visits, ask, open_panel, texts, violations, wait_for_states, wait_for_words
from demo.serving import STAGE_ADAPTERS
from tiny_stand_ins import save_base_and_adapters

from minilora_hub.compare.engine import CompareEngine, Row, Sampling

pytestmark = pytest.mark.slow  # a browser for minutes; test_page.py has the short look

PROMPT, LENGTH = "Hello", 40
NAMES = ("base", *STAGE_ADAPTERS)
BASE, LORA, DORA, MIX = range(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters so near to their base that they begin as it does."""
    folder = tmp_path_factory.mktemp("stage")
    save_base_and_adapters(folder, noise=0.05)
    return folder


@pytest.fixture(scope="module")
def server(page_server, folder):
    return page_server.serve("stage", folder=str(folder))


class Expected:
    """The same comparison by the engine alone: for each column its updates with a token."""

    def __init__(self, folder):
        self.engine = CompareEngine(folder / "base", [folder / name for name in STAGE_ADAPTERS], device="cpu")
        self.columns = [[] for _ in NAMES]
        for update in self.engine.stream(PROMPT, Sampling(LENGTH)):
            if update.token_id is not None:
                self.columns[update.row].append(update)

    def ids(self, column):
        return [update.token_id for update in self.columns[column]]

    def texts(self, column):
        return [update.text for update in self.columns[column]]

    def fork(self, column):
        pairs = zip(self.ids(BASE), self.ids(column), strict=False)
        return next(index for index, (ours, theirs) in enumerate(pairs) if ours != theirs)

    def weights(self, update):
        """{layer: {expert: weight}} of one token of the mixture."""
        layers = zip(update.experts, update.expert_weights, strict=True)
        return [dict(zip(*layer, strict=True)) for layer in layers]

    def letter(self, update):
        """Of the expert with the largest sum of weights, as they are sent: in thousandths."""
        sums = {}
        for layer in self.weights(update):
            for expert, weight in layer.items():
                sums[expert] = sums.get(expert, 0) + round(1000 * weight)
        return "ABCD"[max(sorted(sums), key=sums.get)]


@pytest.fixture(scope="module")
def expected(folder):
    expected = Expected(folder)
    assert [expected.fork(column) > 0 for column in (LORA, DORA, MIX)].count(True) > 0  # or there is nothing to compare
    return expected


@pytest.fixture
def visit(server, browser):
    visits = Visits(browser, server.address, len(NAMES))
    yield visits
    visits.close()


def answered(page):
    """Ask, and wait for all answers."""
    ask(page, PROMPT)
    wait_for_states(page, *["length"] * len(NAMES))
    return page


@pytest.fixture(scope="module")
def finished(server, browser):
    """One page on which all has been answered, for tests that only look at it."""
    visits = Visits(browser, server.address, len(NAMES))
    yield answered(visits())
    visits.close()


@pytest.fixture
def looked_at(finished):
    """That page, as it was when the answers had ended."""
    page = finished
    page.locator(".ml-scrub").focus()
    page.keyboard.press("End")
    page.keyboard.press("Escape")
    for name in ("Diff D", "Experts"):
        if page.get_by_role("button", name=name).get_attribute("aria-pressed") != "true":
            page.get_by_role("button", name=name).click()
    return page


def card(page, column):
    return page.locator(".ml-card").nth(column)


def token(page, column, index):
    return card(page, column).locator(".ml-token").nth(index)


@lru_cache
def common_length(a, b):
    """Length of the longest common subsequence, by its definition."""
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return common_length(a[:-1], b[:-1]) + 1
    return max(common_length(a[:-1], b), common_length(a, b[:-1]))


def is_part_of(part, whole):
    rest = iter(whole)
    return all(one in rest for one in part)


def test_every_token_is_an_element_of_its_own(looked_at, expected):
    """In order, with the text that the engine gave, and nothing else."""
    for column in range(len(NAMES)):
        spans = card(looked_at, column).locator(".ml-token").all_text_contents()
        assert spans[: len(expected.texts(column))] == expected.texts(column)
        assert "".join(spans) == texts(looked_at)[column]


def seen_tokens(page, column):
    """[(text, underlined)] of the tokens with a text, as the browser draws them."""
    return (
        card(page, column)
        .locator(".ml-token")
        .evaluate_all(
            "all => all.filter(one => one.textContent && !one.hidden).map(one =>"
            " [one.textContent, getComputedStyle(one).textDecorationLine === 'underline'])"
        )
    )


@pytest.mark.parametrize("column", [LORA, DORA, MIX])
def test_diff_underlines_what_the_base_did_not_write(looked_at, column):
    """What is left is a longest common subsequence: a common one, and none is longer."""
    base = [text for text, _ in seen_tokens(looked_at, BASE)]
    tokens = seen_tokens(looked_at, column)
    kept = [text for text, underlined in tokens if not underlined]
    assert is_part_of(kept, base)
    assert len(kept) == common_length(tuple(text for text, _ in tokens), tuple(base))
    assert any(underlined for _, underlined in tokens)
    assert not any(underlined for _, underlined in seen_tokens(looked_at, BASE))


def test_d_and_its_button_switch_the_diff(looked_at):
    """Off and on again; typing a d in the prompt types it."""
    button = looked_at.get_by_role("button", name="Diff D")
    looked_at.keyboard.press("d")
    assert button.get_attribute("aria-pressed") == "false"
    assert not any(underlined for _, underlined in seen_tokens(looked_at, LORA))
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert any(underlined for _, underlined in seen_tokens(looked_at, LORA))
    looked_at.locator("#ml-prompt textarea").press("d")
    assert button.get_attribute("aria-pressed") == "true"
    looked_at.fill("#ml-prompt textarea", PROMPT)


def seen_letters(page):
    return (
        card(page, MIX)
        .locator(".ml-token")
        .evaluate_all(
            "all => all.map(one => [getComputedStyle(one, '::before').content.split('\"')[1] || '',"
            " getComputedStyle(one).backgroundColor])"
        )
    )


def test_each_token_of_a_mixture_shows_its_main_expert(looked_at, expected):
    """As a letter and as a colour, one a letter; E and its button hide both."""
    letters = [expected.letter(update) for update in expected.columns[MIX]]
    seen = seen_letters(looked_at)[: len(letters)]
    assert [letter for letter, _ in seen] == letters
    assert len(set(letters)) > 1
    colours = {}
    for letter, colour in seen:
        assert colours.setdefault(letter, colour) == colour
    assert len(set(colours.values())) == len(colours)
    looked_at.keyboard.press("e")
    assert {letter for letter, _ in seen_letters(looked_at)} == {""}
    assert len({colour for _, colour in seen_letters(looked_at)}) == 1
    looked_at.get_by_role("button", name="Experts").click()
    assert [letter for letter, _ in seen_letters(looked_at)][: len(letters)] == letters


def percent(share):
    """As the page writes it."""
    if 0 < share < 0.001:
        return "<0.1 %"
    return f"{100 * share:.1f} %" if 0 < share < 0.1 else f"{round(100 * share)} %"


def near(seen, share):
    """Whether a percentage on the page is a share, up to what rounding may change."""
    if seen == "<0.1 %":
        return share < 0.0011
    return abs(float(seen.removesuffix(" %")) / 100 - share) < 0.0061


def test_a_chosen_token_is_looked_into(looked_at, expected):
    """Its probability, the five most probable ones, and the routing of each layer, as the engine gave them."""
    at = next(
        index for index, text in enumerate(expected.texts(MIX)) if index > 4 and text.isprintable() and text.strip()
    )
    update = expected.columns[MIX][at]
    token(looked_at, MIX, at).click()
    words = looked_at.locator(".ml-inspected-words").inner_text()
    found = re.fullmatch(rf"token {at + 1} of mix · probability (.+ %) · log-probability (-\d+\.\d+)", words)
    assert found, words
    assert near(found[1], exp(update.logprob))
    assert abs(float(found[2]) - update.logprob) < 0.002
    shares = looked_at.locator(".ml-choice-box:first-child .ml-probability").all_inner_texts()
    assert len(shares) == 5
    assert all(near(s, exp(logprob)) for s, (_, logprob) in zip(shares, update.alternatives, strict=True))
    assert looked_at.locator(".ml-choice-box:first-child .ml-picked").count() >= 1  # greedy: the first
    layers = looked_at.locator(".ml-layers li").all()
    assert len(layers) == len(update.experts) == 2
    for layer, experts in zip(layers, expected.weights(update), strict=True):
        parts = dict(part.split(" ", 1) for part in layer.locator(".ml-layer-part").all_text_contents())
        assert parts.keys() == {"ABCD"[expert] for expert in experts}
        assert all(near(parts["ABCD"[expert]], weight) for expert, weight in experts.items())
        widths = layer.locator(".ml-layer-part").evaluate_all("all => all.map(one => one.offsetWidth)")
        assert widths == sorted(widths, reverse=True)  # the heaviest first, and the widest
    looked_at.keyboard.press("Escape")
    assert looked_at.locator(".ml-inspected-words").count() == 0


@pytest.mark.parametrize("column", [BASE, MIX])
def test_the_box_of_a_token_is_in_view_beside_it(looked_at, expected, column):
    """All of it, without covering the token; its button closes it."""
    printed = [at for at, text in enumerate(expected.texts(column)) if text.isprintable() and text.strip()]
    place = token(looked_at, column, printed[5])
    place.click()
    box, at = looked_at.locator(".ml-inspector").bounding_box(), place.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 1280
    assert box["y"] >= 0
    assert box["y"] + box["height"] <= 800
    beside = box["x"] + box["width"] <= at["x"] or box["x"] >= at["x"] + at["width"]
    assert beside or box["y"] + box["height"] <= at["y"] or box["y"] >= at["y"] + at["height"]
    looked_at.get_by_role("button", name="Close").click()
    assert not looked_at.locator(".ml-inspector").is_visible()


def token_type(text, before):
    if not text:
        return "end"
    if not text.strip():
        return "space"
    if any(char.isdigit() for char in text):
        return "digit"
    if not any(char.isalpha() for char in text):
        return "punctuation"
    return "rest of a word" if text[0].isalpha() and before[-1:].isalpha() else "start of a word"


def test_experts_by_type_of_token(looked_at, expected):
    """Counts of the letters of the tokens of each type, made by hand; the first view returns with its button."""
    looked_at.get_by_role("button", name="by token type").click()
    counts, before = {}, ""
    for update in expected.columns[MIX]:
        counts.setdefault(token_type(update.text, before), []).append(expected.letter(update))
        before += update.text
    rows = looked_at.locator(".ml-share-table tbody tr")
    seen = {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in rows.all()}
    assert seen.keys() == {f"{name} ({len(letters)})" for name, letters in counts.items()}
    for name, letters in counts.items():
        shares = seen[f"{name} ({len(letters)})"]
        assert all(near(share, letters.count(one) / len(letters)) for share, one in zip(shares, "ABCD", strict=True))
    assert not looked_at.get_by_role("button", name="by task").is_visible()  # these adapters have no results.json
    looked_at.get_by_role("button", name="by layer").click()
    assert looked_at.locator(".ml-heat-table").is_visible()


def test_the_keyboard_goes_from_token_to_token(looked_at):
    """Tab reaches an answer, the arrow keys its tokens."""
    card(looked_at, DORA).locator(".ml-answer").focus()
    for key, number in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", LENGTH), ("Home", 1)):
        looked_at.keyboard.press(key)
        count = card(looked_at, DORA).locator(".ml-token").count()
        at = count if key == "End" else number
        assert looked_at.locator(".ml-inspected-words").inner_text().startswith(f"token {at} of dora")


OVERLAP = """card => {
    const box = (token, pseudo) => {
        const style = getComputedStyle(token, pseudo);
        const { left, top } = token.getClientRects()[0];
        const x = left + parseFloat(style.left), y = top + parseFloat(style.top);
        return { x, y, right: x + parseFloat(style.width), bottom: y + parseFloat(style.height) };
    };
    const mark = box(card.querySelector(".ml-token[data-fork]"), "::after");
    return [...card.querySelectorAll(".ml-token[data-letter]")].some((token) => {
        const letter = box(token, "::before");
        return mark.x < letter.right && letter.x < mark.right && mark.y < letter.bottom && letter.y < mark.bottom;
    });
}"""
"""Whether the mark of the fork covers the letter of an expert."""


@pytest.mark.parametrize("column", [LORA, DORA, MIX])
def test_the_first_fork_shows_both_sides(looked_at, expected, column):
    """A marker at the token, a button in the card, a tick on the timeline; behind them the top five of each side."""
    at = expected.fork(column)
    button = card(looked_at, column).locator(".ml-fork")
    assert button.inner_text() == f"≠ base at token {at + 1}"
    marked = (
        card(looked_at, column)
        .locator(".ml-token")
        .evaluate_all(
            "all => all.flatMap((one, at) => getComputedStyle(one, '::after').maskImage.includes('svg') ? [at] : [])"
        )
    )
    assert marked == [at]
    assert not card(looked_at, column).evaluate(OVERLAP)
    looked_at.keyboard.press("Escape")
    if column == LORA:
        button.click()
    else:
        name = f"{NAMES[column]} differs from the base from token {at + 1}"
        looked_at.get_by_role("button", name=name, exact=True).last.click()
    titles = looked_at.locator(".ml-choice-box h4").all_inner_texts()
    assert titles == [NAMES[column], "base, after the same text"]
    for side, update in ((0, expected.columns[column][at]), (1, expected.columns[BASE][at])):
        shares = looked_at.locator(".ml-choice-box").nth(side).locator(".ml-probability").all_inner_texts()
        assert all(near(s, exp(logprob)) for s, (_, logprob) in zip(shares, update.alternatives, strict=True))


def heatmap(page):
    """{letter: [percent of each layer]} from the table, as a screen reader reads it."""
    rows = page.locator(".ml-heat-table tbody tr")
    return {
        row.locator("th").inner_text(): row.locator(".ml-cell").all_text_contents()
        for row in (rows.nth(index) for index in range(rows.count()))
    }


def mean_weights(expected, count):
    """[layer][expert]: mean weight over the first tokens of the mixture."""
    sums = [[0.0] * 4 for _ in range(2)]
    for update in expected.columns[MIX][:count]:
        for layer, experts in enumerate(expected.weights(update)):
            for expert, weight in experts.items():
                sums[layer][expert] += weight / count
    return sums


def check_heatmap(page, expected, count):
    seen = heatmap(page)
    assert list(seen) == ["A", "B", "C", "D"]
    means = mean_weights(expected, count)
    for expert, letter in enumerate("ABCD"):
        assert all(near(text, means[layer][expert]) for layer, text in enumerate(seen[letter])), letter


def test_the_heatmap_tells_which_expert_served_which_layer(looked_at, expected):
    """Its numbers are the mean weights; a darker cell has the larger one."""
    check_heatmap(looked_at, expected, LENGTH)
    weights = looked_at.locator(".ml-heat-table tbody tr:first-child .ml-cell").evaluate_all(
        "all => all.map(one => Number(getComputedStyle(one).backgroundColor.match(/[\\d.]+/g).at(-1)))"
    )
    means = [layer[0] for layer in mean_weights(expected, LENGTH)]
    assert (weights[0] > weights[1]) == (means[0] > means[1])


def test_the_scrubber_replays_text_and_heatmap_in_step(looked_at, expected):
    """Back to step 9: every answer has its first nine tokens, the heatmap those of the mixture."""
    looked_at.locator(".ml-scrub").focus()
    looked_at.keyboard.press("Home")
    assert [text.strip() for text in looked_at.locator(".ml-text").all_inner_texts()] == [""] * 4
    for _ in range(9):
        looked_at.keyboard.press("ArrowRight")
    for column in range(4):
        seen = (
            card(looked_at, column)
            .locator(".ml-token")
            .evaluate_all("all => all.filter(one => one.getClientRects().length).map(one => one.textContent)")
        )
        assert "".join(seen) == "".join(expected.texts(column)[:9])
    check_heatmap(looked_at, expected, 9)
    assert looked_at.locator(".ml-at").inner_text().startswith("9 / ")
    assert looked_at.locator(".ml-heat-words").inner_text().startswith("9 tokens")
    looked_at.keyboard.press("End")
    check_heatmap(looked_at, expected, LENGTH)


def test_play_shows_the_steps_again(looked_at):
    """From the start to the end, one after the other; a key on the slider takes over."""
    looked_at.get_by_role("button", name="Play the steps again").click()
    looked_at.wait_for_function("parseInt(document.querySelector('.ml-at').textContent) >= 3")
    assert len(texts(looked_at)[0]) > 0
    shown = card(looked_at, BASE).locator(".ml-token:not([hidden])").count()
    assert shown < LENGTH
    looked_at.get_by_role("button", name="Pause").click()
    looked_at.locator(".ml-scrub").focus()
    looked_at.keyboard.press("End")
    assert card(looked_at, BASE).locator(".ml-token:not([hidden])").count() >= LENGTH


def test_the_ribbon_tells_how_far_they_agree(looked_at):
    """Counted over the base's tokens: how many are in all other answers, how many in none."""
    label = looked_at.locator(".ml-ribbon").get_attribute("aria-label")
    found = re.fullmatch(
        r"Agreement: of the base's (\d+) tokens (\d+) are in all 3 other answers, (\d+) in none\.", label
    )
    total, everywhere, nowhere = map(int, found.groups())
    kept = [sum(not underlined for _, underlined in seen_tokens(looked_at, column)) for column in (LORA, DORA, MIX)]
    assert total >= LENGTH
    assert everywhere <= min(kept)
    assert max(kept) <= total - nowhere <= sum(kept)
    bars = looked_at.locator(".ml-ribbon path").get_attribute("d").count("M")
    assert bars == total


def test_one_expert_answers_alone(visit, expected):
    """Its column stands beside the mixture; up to four of them, and the next prompt is for all again."""
    page = answered(visit())
    page.get_by_role("button", name="Expert B alone").click()
    page.wait_for_function("document.querySelectorAll('.ml-card').length === 3")
    wait_for_states(page, "length", "length", "length")
    assert page.locator(".ml-name").all_inner_texts() == ["base", "mix", "mix, B alone"]
    rows = [Row(PROMPT, None, Sampling(LENGTH)), Row(PROMPT, "mix", Sampling(LENGTH))]
    rows.append(Row(PROMPT, "mix", Sampling(LENGTH), solo_expert=1))
    answers = ["", "", ""]
    for update in expected.engine.stream_rows(rows):
        answers[update.row] += update.text
    assert texts(page) == answers
    letters = card(page, 2).locator(".ml-token").evaluate_all("all => all.map(one => one.dataset.letter || '')")
    assert set(letters[:LENGTH]) == {"B"}
    assert page.get_by_role("button", name="Expert B alone").get_attribute("aria-pressed") == "true"
    for count, letter in ((4, "A"), (5, "C"), (6, "D")):
        page.get_by_role("button", name=f"Expert {letter} alone").click()
        page.wait_for_function(f"document.querySelectorAll('.ml-card').length === {count}")
        wait_for_states(page, *["length"] * count)
    boxes = page.locator(".ml-card").evaluate_all("cards => cards.map(c => c.getBoundingClientRect().toJSON())")
    assert all(box["width"] > 250 for box in boxes)  # six columns: three beside each other
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    ask(page, "Why?")
    page.wait_for_function("document.querySelectorAll('.ml-card').length === 4")
    wait_for_states(page, *["length"] * 4)
    assert page.locator(".ml-name").all_inner_texts() == list(NAMES)


def test_a_picture_to_share(looked_at, tmp_path):
    """A PNG with the cards on the page's paper, saved by the browser; nothing is sent anywhere."""
    from PIL import Image

    with looked_at.expect_download() as waiting:
        looked_at.get_by_role("button", name="Save picture").click()
    waiting.value.save_as(tmp_path / "picture.png")
    assert waiting.value.suggested_filename == "comparison.png"
    picture = Image.open(tmp_path / "picture.png").convert("RGB")
    assert picture.width == 1400
    assert picture.height > 400
    colours = {colour: count for count, colour in picture.getcolors(2**24)}

    def rgb(name):
        value = looked_at.evaluate(f"getComputedStyle(document.body).getPropertyValue('--ml-{name}').trim()")
        return tuple(bytes.fromhex(value[1:]))

    for name, least in (("paper", 10_000), ("card", 100_000), ("ink", 300), ("lora", 300), ("dora", 300), ("mix", 300)):
        assert colours.get(rgb(name), 0) > least, name


def test_only_new_tokens_are_sent(visit):
    """What a comparison costs on the wire grows with its tokens, not with their square."""
    page = visit()
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    received = []
    session.on("Network.dataReceived", lambda event: received.append(event["dataLength"]))
    answered(page)
    spans = page.locator(".ml-token").count()
    page.wait_for_timeout(300)
    # A token is at most 400 bytes here, and is sent twice: when it is written, and with the finished whole.
    assert spans > 150
    assert sum(received) < 2 * 400 * spans + 60_000


LOOKS = [
    (390, 844, "dark"),
    *(pytest.param(*look, marks=pytest.mark.slow) for look in ((390, 844, "light"), (1280, 900, "dark"))),
    (1280, 900, "light"),
]


@pytest.mark.parametrize(("width", "height", "scheme"), LOOKS)
def test_no_accessibility_violation(visit, width, height, scheme):
    """axe-core over the page with answers, an open token and a played timeline; nothing scrolls sideways."""
    page = answered(visit("", width, height, scheme))
    if width < 500:
        page.get_by_role("button", name="Show mix").click()
        page.wait_for_selector(".ml-tab:nth-child(4)[aria-current=true]")
    token(page, MIX, 3).dispatch_event("click")
    page.wait_for_selector(".ml-layers")
    assert violations(page) == {}
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_heatmap_follows_while_it_streams(visit):
    """Its count of tokens grows with the answer."""
    page = visit()
    ask(page, PROMPT)
    page.wait_for_function("parseInt(document.querySelector('.ml-heat-words').textContent) > 2")
    first = int(page.locator(".ml-heat-words").inner_text().split()[0])
    page.wait_for_function(
        "before => parseInt(document.querySelector('.ml-heat-words').textContent) > before", arg=first
    )
    wait_for_states(page, *["length"] * 4)
    assert page.locator(".ml-heat-words").inner_text() == f"{LENGTH} tokens through 2 layers of mix"


def test_the_base_is_shown_to_be_the_base(looked_at):
    """On request: the measured difference, and the hash of the checkpoint."""
    open_panel(looked_at, "Is the base the base")
    looked_at.wait_for_selector("#ml-proof >> text=The base column is the bare checkpoint: over 3 fixed prompts")
    assert "fingerprint of its files" in looked_at.locator("#ml-proof").inner_text()


# ---- sampling of one column ----


def test_a_column_gets_settings_of_its_own_by_the_keyboard(visit, server):
    """Before the first run for the next one; after it, the column answers again; reset gives the common ones back."""
    page = visit()

    def tune(column, *keys):
        card(page, column).locator(".ml-tune").focus()
        page.keyboard.press("Enter")
        page.wait_for_selector(".ml-tuner[open]")
        for key in keys:
            page.keyboard.press(key)

    def own():
        return page.locator(".ml-own").all_text_contents()

    tune(LORA, "1", ".", "5", "Enter")  # the first field is the temperature
    wait_for_words(page, "The next run")
    assert own() == ["", "own settings: temperature 1.5", "", ""]
    ask(page, PROMPT)
    wait_for_words(page, "Done.")  # whatever ends an answer that is drawn
    first = texts(page)
    assert own() == ["", "own settings: temperature 1.5", "", ""]
    before = server.settled()
    tune(DORA, "2", *["Tab"] * 4, "7")
    assert violations(page) == {}
    page.evaluate("window.earlier = document.querySelector('.ml-card')")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.ml-card') !== window.earlier")
    wait_for_words(page, "Done.")
    assert own()[DORA] == "own settings: temperature 2, seed 7"
    again = texts(page)
    assert again[DORA] != first[DORA]
    assert [again[at] for at in (BASE, LORA, MIX)] == [first[at] for at in (BASE, LORA, MIX)]
    assert 0 < server.settled() - before <= LENGTH
    tune(DORA)
    assert page.get_by_label("Temperature (0 is greedy)").input_value() == "2"
    page.evaluate("window.earlier = document.querySelector('.ml-card')")
    page.get_by_role("button", name="Reset to the common settings").click()
    page.wait_for_function("document.querySelector('.ml-card') !== window.earlier")
    wait_for_words(page, "Done.")
    assert (own()[DORA], texts(page)[DORA]) == ("", first[DORA])


def test_letters_are_explained_by_what_was_routed(looked_at, expected):
    """The number of active experts is that of the tokens shown."""
    counts = {len(layer) for update in expected.columns[MIX] for layer in update.experts}
    (active,) = counts
    words = looked_at.locator(".ml-key").inner_text()
    assert words.startswith("Underlined: not in the base's answer;")
    assert f"In each layer {active} of 4 experts serve a token" in words
