"""Votes, the Board, links, history, exports, files of prompts, the picker: in a real browser, as visitors do them."""

import csv
import io
import json
import time
from pathlib import Path

import pytest
from demo.browsing import (
    ask,
    names,
    open_panel,
    set_number,
    settled,
    texts,
    violations,
    wait_for_states,
)

pytestmark = pytest.mark.slow  # a browser for minutes; test_page.py has the short look

HOSTILE = "<img src=x onerror=\"document.title='hacked'\"> & ${props} `x`"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def server(page_server, data):
    return page_server.serve("social", data=str(data))


@pytest.fixture
def votes(data):
    """Read the votes on the disk."""
    file = data / "votes" / "votes.jsonl"
    return lambda: [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run(page, prompt="Hello"):
    """Run a prompt to its end."""
    past = page.locator(".ml-past").count()
    ask(page, prompt)
    ended(page, past)


def ended(page, past):
    """Wait until a comparison has ended that is not the newest one of the history before."""
    page.wait_for_function("past => document.querySelectorAll('.ml-past').length > past", arg=past)
    page.wait_for_selector(".ml-status[data-phase=done]")


def blind_run(page, prompt="Hello"):
    """Switch to blind, and run a prompt until a vote can be cast."""
    if page.get_attribute(".ml-switch", "aria-checked") != "true":
        page.click(".ml-switch")
        page.wait_for_selector(".ml-switch[aria-checked=true]")
    ask(page, prompt)
    page.wait_for_selector(".ml-blind[data-phase=open]")


def words(page):
    return page.locator(".ml-blind-words").inner_text()


def test_an_empty_board_says_how_to_vote(visit):
    """The first test here: nobody has voted on this server yet."""
    page = visit("board", wait=False)
    page.wait_for_selector(".ml-board[data-phase=empty]")
    assert "There are no votes yet" in page.locator(".ml-board-empty").inner_text()


# ---- blind votes ----


def test_a_blind_vote_is_stored_and_shows_the_names(votes, visit):
    """Nothing that can be seen before the vote tells which column is which."""
    page = visit()
    before = len(votes())
    page.click(".ml-switch")
    page.wait_for_function("[...document.querySelectorAll('.ml-name')].every(n => n.textContent.startsWith('Answer'))")
    assert page.locator(".ml-vote:visible").count() == 0
    ask(page, "Hello")
    page.wait_for_selector(".ml-blind[data-phase=open]")
    page.wait_for_function("document.querySelectorAll('.ml-name')[2].textContent === 'Answer C'")
    assert names(page) == ["Answer A", "Answer B", "Answer C"]
    assert page.locator(".ml-facts").all_inner_texts() == ["", "", ""]
    assert page.locator(".ml-rate").all_inner_texts() == ["\N{EN DASH}"] * 3
    assert not page.locator(".ml-heat").is_visible()
    assert page.locator("[data-action=share]").is_disabled()
    cards = page.evaluate("document.querySelector('.ml-columns').outerHTML")
    assert not any(word in cards for word in ("parrot", "DoRA", "MixLoRA"))
    shown = texts(page)
    letter = "ABC"[shown.index("Hello")]
    page.get_by_role("button", name=f"Answer {letter} is best").click()
    page.wait_for_selector(".ml-blind[data-phase=closed]")
    vote = votes()[-1]
    assert len(votes()) == before + 1
    assert vote["order"][shown.index("Hello")] == vote["choice"]
    chosen = vote["candidates"][vote["choice"]]["name"]
    assert words(page) == f"Your vote is stored: {letter}, which was {chosen}."
    page.wait_for_function("document.querySelectorAll('.ml-name')[1].textContent === 'parrot-dora'")
    assert names(page) == ["base", "parrot-dora", "parrot-mix"]
    badges = page.locator(".ml-badge").all_inner_texts()
    assert badges == [
        f"{'ABC'[vote['order'].index(index)]} {badge}" for index, badge in enumerate(("base", "DoRA", "MixLoRA"))
    ]
    assert vote["prompt"] == "Hello"
    assert vote["sampling"]["max_new_tokens"] == 32
    assert vote["candidates"][1]["weights"].startswith("sha256:")
    # The keys are without effect now.
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("1")
    page.keyboard.press("t")
    time.sleep(0.5)
    assert len(votes()) == before + 1


@pytest.mark.parametrize(("key", "choice"), [("t", "tie"), ("x", "all bad")])
def test_votes_have_keys(votes, page, key, choice):
    before = page.get_attribute(".ml-switch", "aria-checked")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("b")
    page.wait_for_selector(f".ml-switch:not([aria-checked={before}])")
    blind_run(page)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press(key)
    page.wait_for_selector(".ml-blind[data-phase=closed]")
    assert votes()[-1]["choice"] == choice


def test_names_without_a_vote_and_a_stopped_comparison_give_none(votes, page):
    before = len(votes())
    blind_run(page)
    page.get_by_role("button", name="Show the names without a vote").click()
    page.wait_for_selector(".ml-blind[data-phase=closed]")
    assert words(page) == "Names shown without a vote."
    page.wait_for_function("document.querySelector('.ml-name').textContent === 'base'")
    open_panel(page, "Settings")
    set_number(page, "Max new tokens", "400")
    ask(page, "a long text, " * 20)
    page.wait_for_selector(".ml-blind[data-phase=ready]")
    page.wait_for_function("document.querySelector('.ml-name').textContent === 'Answer A'")
    page.wait_for_function("document.querySelector('.ml-text').textContent.length > 1")
    page.keyboard.press("Escape")
    page.wait_for_selector(".ml-blind[data-phase=closed]")
    assert words(page).startswith("No vote: an answer was stopped")
    page.wait_for_function("document.querySelector('.ml-name').textContent === 'base'")
    page.click(".ml-switch")
    page.wait_for_selector(".ml-switch[aria-checked=false]")
    assert len(votes()) == before


def test_a_comparison_is_voted_on_once_however_often_the_browser_votes(votes, page):
    """Three votes sent at once, and one on a page on which nothing was run."""
    before = len(votes())
    blind_run(page)
    page.evaluate("""() => {
        const one = document.querySelector('.ml-letter');
        for (let i = 0; i < 3; i++) { one.disabled = false; one.click(); }
    }""")
    page.wait_for_selector(".ml-blind[data-phase=closed]")
    time.sleep(1)
    assert len(votes()) == before + 1


# ---- the board ----


def test_the_board_counts_and_survives_a_restart(page_server, data, votes, visit):
    """A second page over the same folder shows the votes of the first, in numbers counted by hand from the file."""
    page = visit()
    blind_run(page)
    page.locator(".ml-letter").first.click()
    page.wait_for_selector(".ml-blind[data-phase=closed]")
    cast = votes()
    second = page_server.serve("social", data=str(data))
    page.goto(second.address)
    page.get_by_role("link", name="Board").click()
    page.wait_for_selector(".ml-board[data-phase=votes]")
    amount = "1 vote" if len(cast) == 1 else f"{len(cast)} votes"
    assert page.locator(".ml-board-words").inner_text() == f"{amount} on blind comparisons."
    rows = page.locator(".ml-board-rows tr")
    assert rows.count() == 3
    for row in rows.all():
        name = row.locator(".ml-model-name").inner_text()
        mine = []  # a vote for an answer is one for every model that gave it
        for one in cast:
            if isinstance(one["choice"], int):
                answers = {candidate["name"]: candidate["answer"] for candidate in one["candidates"]}
                mine.append(answers[name] == one["candidates"][one["choice"]]["answer"])
        ties, bad = (sum(one["choice"] == choice for one in cast) for choice in ("tie", "all bad"))
        counts = [sum(mine), len(mine) - sum(mine), ties, bad, len(cast)]
        assert row.locator(".ml-count-cell").all_inner_texts() == [str(count) for count in counts]
        assert row.locator(".ml-share").inner_text() == f"{round(100 * sum(mine) / len(mine))}%"
    page.get_by_role("link", name="Compare").click()
    page.wait_for_selector(".ml-switch")


# ---- again, history, links, exports ----


def test_history_restores_prompt_settings_and_answers_and_ends_with_the_visit(visit):
    page = visit()
    page.locator(".ml-history summary").click()
    assert "It is not stored" in page.locator(".ml-history-empty").inner_text()
    run(page, HOSTILE)
    open_panel(page, "Settings")
    set_number(page, "Max new tokens", "9")
    run(page, "second")
    page.wait_for_function("document.querySelector('.ml-tokens').textContent === '9'")
    past = page.locator(".ml-past")
    assert past.nth(1).inner_text().startswith(HOSTILE)
    past.nth(1).click()
    page.wait_for_function("document.querySelectorAll('.ml-tokens')[0].textContent === '32'")
    assert page.input_value("#ml-prompt textarea") == HOSTILE
    assert page.input_value("[aria-label='number input for Max new tokens']") == "32"
    assert texts(page)[1] == HOSTILE[:32]
    assert page.locator(".ml-words").inner_text().startswith("From your history")
    assert page.title() == "minilora · compare"
    page.reload()
    page.wait_for_selector(".ml-history summary")
    assert page.locator(".ml-past").count() == 0


def test_a_share_link_restores_everything_in_another_browser(server, data, visit):
    """Nothing is stored before the click; the link says that what it shows is stored; nothing is computed for it."""
    page = visit()
    open_panel(page, "Settings")
    set_number(page, "Max new tokens", "11")
    run(page, HOSTILE)
    shown = texts(page)
    folder = data / "shared"
    kept = len(list(folder.glob("*.json"))) if folder.exists() else 0
    page.click("[data-action=share]")
    page.wait_for_selector(".ml-shared:visible")
    link = page.input_value(".ml-link")
    assert len(list(folder.glob("*.json"))) == kept + 1
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click(".ml-copy")
    page.wait_for_function("document.querySelector('.ml-copy').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == link
    before = server.forwards()
    other = visit(link.removeprefix(server.address), own=True)
    other.wait_for_selector(".ml-notice[data-phase=stored]")
    assert other.locator(".ml-notice-words").inner_text().startswith("A stored comparison, run on 20")
    other.wait_for_function("document.querySelectorAll('.ml-text')[1].textContent.length > 3")
    assert texts(other) == shown
    assert other.input_value("#ml-prompt textarea") == HOSTILE
    open_panel(other, "Settings")
    assert other.input_value("[aria-label='number input for Max new tokens']") == "11"
    assert other.title() == "minilora · compare"
    assert server.forwards() == before
    assert other.locator(".ml-past").count() == 0
    with other.expect_download() as saved:
        other.click("[data-action=json]")
    assert json.loads(Path(saved.value.path()).read_text())["prompt"] == HOSTILE


@pytest.mark.parametrize("identifier", ["../votes/votes", "a" * 22, "%2e%2e%2fvotes", "<b>x</b>"])
def test_a_link_to_nothing_gives_a_reason(visit, identifier):
    page = visit(f"?shared={identifier}")
    page.wait_for_selector(".ml-notice[data-phase=error]")
    assert page.locator(".ml-notice-words").inner_text().startswith("The comparison of this link is not shown: ")
    run(page)


def test_exports_are_files(visit):
    page = visit()
    assert page.locator("[data-action=json]").is_disabled()
    run(page, "Hello 👋")
    with page.expect_download() as saved:
        page.click("[data-action=json]")
    assert saved.value.suggested_filename == "minilora-hello.json"
    content = json.loads(Path(saved.value.path()).read_text())
    assert content["prompt"] == "Hello 👋"
    assert [one["answer"] for one in content["columns"]] == texts(page)
    assert [str(one["tokens"]) for one in content["columns"]] == page.locator(".ml-tokens").all_inner_texts()
    with page.expect_download() as saved:
        page.click("[data-action=md]")
    assert saved.value.suggested_filename == "minilora-hello.md"
    text = Path(saved.value.path()).read_text()
    assert "```text\nHello 👋\n```" in text
    assert "| parrot\\-dora |" in text or "| parrot-dora |" in text


# ---- settings ----


def test_the_seed_is_drawn_kept_and_taken_again(visit):
    """Unlocked: another seed every run, shown. Again: the same seed, the same answer. Locked: it stays."""
    page = visit()
    open_panel(page, "Settings")
    page.get_by_label("Greedy", exact=True).uncheck()
    set_number(page, "Temperature", "2")
    seed = page.get_by_role("spinbutton", name="Seed", exact=True)

    def sampled(button="#ml-run"):
        past = page.locator(".ml-past").count()
        page.click(button)
        ended(page, past)
        return seed.input_value(), texts(page)

    page.fill("#ml-prompt textarea", "Hello")
    first, second = sampled(), sampled()
    assert first[0] != second[0]
    assert first[1] != second[1]
    page.wait_for_selector("[data-action=again]:enabled")
    page.fill("#ml-prompt textarea", "half typed")
    assert sampled("[data-action=again]") == second
    assert page.input_value("#ml-prompt textarea") == "Hello"
    page.get_by_label("Keep the seed").check()
    assert sampled() == second
    page.get_by_label("Greedy", exact=True).check()
    page.wait_for_function("document.querySelector('[aria-label=\"number input for Temperature\"]').disabled")
    greedy = sampled()[1]
    assert greedy == sampled()[1]
    assert greedy[1] == "Hello"


def test_top_k_and_penalty_are_obeyed(visit):
    """Top-k 1 is greedy at any temperature; a penalty reaches the engine."""
    page = visit()
    run(page, "Hello")
    greedy = texts(page)
    open_panel(page, "Settings")
    page.get_by_label("Greedy", exact=True).uncheck()
    for name, value in (("Temperature", "2"), ("Top-k (0 keeps all)", "1")):
        set_number(page, name, value)
    run(page, "Hello")
    assert texts(page) == greedy
    page.get_by_label("Greedy", exact=True).check()
    set_number(page, "Repetition penalty", "2")
    run(page, "Hello")
    # This model's one possible token stays the best under any penalty: what the engine was given tells.
    with page.expect_download() as saved:
        page.click("[data-action=json]")
    sampling = json.loads(Path(saved.value.path()).read_text())["sampling"]
    assert (sampling["repetition_penalty"], sampling["top_k"], sampling["temperature"]) == (2, 1, 0)


# ---- a file of prompts ----


def test_a_file_of_prompts_becomes_a_table_and_files(visit, tmp_path):
    page = visit()
    open_panel(page, "A file of prompts")
    file = tmp_path / "prompts.jsonl"
    prompts = ["one", HOSTILE, "explode, please", "x" * 600]
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    page.locator("#ml-batch-file").locator("xpath=..").locator("input[type=file]").set_input_files(file)
    page.wait_for_selector(".ml-batch[data-phase=done]")
    assert page.locator(".ml-batch-words").inner_text() == "Done: 4 prompts. 2 with an error."
    rows = page.locator(".ml-batch tbody tr")
    assert page.locator(".ml-batch thead th").all_inner_texts()[1:] == ["prompt", "base", "parrot-dora", "parrot-mix"]
    assert rows.nth(0).locator("td").all_inner_texts()[2:] == ["one", "one"]
    assert rows.nth(1).locator("th").inner_text() == HOSTILE
    assert "NaN" in rows.nth(2).locator("td").all_inner_texts()[2]
    assert "must be shorter than the base's context" in rows.nth(3).inner_text()
    assert page.title() == "minilora · compare"
    with page.expect_download() as saved:
        page.locator(".ml-batch [data-kind=csv]").click()
    table = list(csv.reader(io.StringIO(Path(saved.value.path()).read_bytes().decode(), newline="")))
    assert table[0] == ["prompt", "base", "parrot-dora", "parrot-mix", "errors"]
    assert [row[0] for row in table[1:]] == prompts
    assert table[1][2:4] == ["one", "one"]
    with page.expect_download() as saved:
        page.locator(".ml-batch [data-kind=json]").click()
    content = json.loads(Path(saved.value.path()).read_text())
    assert content["rows"][0]["answers"][1]["text"] == "one"
    assert content["sampling"]["max_new_tokens"] == 32
    run(page, "after a batch")  # the page goes on


def test_answers_to_a_file_are_checked(visit, tmp_path):
    """The parrots repeat the prompt and the base does not: a mark in each cell, a rate above each column."""
    page = visit()
    open_panel(page, "A file of prompts")
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "one", "expected": "one"},
        {"prompt": "two", "assert": [{"type": "contains", "value": "TWO"}]},
        {"prompt": "three"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page.locator("#ml-batch-file").locator("xpath=..").locator("input[type=file]").set_input_files(file)
    page.wait_for_selector(".ml-batch[data-phase=done]")
    heads = page.locator(".ml-batch thead th").all_inner_texts()
    assert heads[2] == "base\n0 of 2 right (95%: 0 % to 66 %)"
    assert heads[3] == "parrot-dora\n1 of 2 right (95%: 9 % to 91 %)"
    cells = [page.locator(".ml-batch tbody tr").nth(at).locator("td").all_inner_texts()[2] for at in range(3)]
    assert cells == ["✓ one", "✗ two", "three"]
    with page.expect_download() as saved:
        page.locator(".ml-batch [data-kind=csv]").click()
    table = list(csv.reader(io.StringIO(Path(saved.value.path()).read_bytes().decode(), newline="")))
    assert table[0][-3:] == ["parrot-dora right", "parrot-mix right", "errors"]
    assert [row[-3] for row in table[1:]] == ["true", "false", ""]


def test_a_batch_can_be_stopped(server, visit, tmp_path):
    page = visit()
    open_panel(page, "A file of prompts")
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"a longer prompt, number {number}" for number in range(40)))
    page.locator("#ml-batch-file").locator("xpath=..").locator("input[type=file]").set_input_files(file)
    page.wait_for_function("document.querySelectorAll('.ml-batch tbody tr').length >= 2")
    page.get_by_role("region", name="Answers to a file of prompts").get_by_role("button", name="Stop").click()
    page.wait_for_selector(".ml-batch[data-phase=done]")
    assert page.locator(".ml-batch-words").inner_text().startswith("Stopped after ")
    assert 2 <= page.locator(".ml-batch tbody tr").count() < 40
    settled(server)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("p.txt", b"\n \n", "holds no prompts"),
        ("p.jsonl", b'{"prompt": "x"}\n{"text": 1}\n', "line 2: must be"),
        ("p.csv", b"a,b\n1,2\n", "needs a header with 'prompt'"),
        ("p.txt", b"x\n" * 51, "51 prompts: at most 50"),
        ("p.txt", b"y" * 9000, "line 1: 9000 characters"),
        ("p.txt", b"z" * 600_000, "600 kB: at most 500 kB"),
    ],
)
def test_a_file_that_cannot_be_run_gives_a_reason(page, tmp_path, name, content, words):
    open_panel(page, "A file of prompts")
    (tmp_path / name).write_bytes(content)
    page.locator("#ml-batch-file").locator("xpath=..").locator("input[type=file]").set_input_files(tmp_path / name)
    page.wait_for_function("words => document.querySelector('.ml-batch-words').textContent.includes(words)", arg=words)
    assert page.get_attribute(".ml-batch", "data-phase") == "error"


# ---- the picker ----


def test_adapters_are_chosen_from_cards(visit):
    """Those of the page and of the owner's folder; never a path; one to five."""
    page = visit()
    open_panel(page, "Adapters")
    page.wait_for_function("document.querySelectorAll('.ml-adapter').length === 4")
    cards = page.locator(".ml-adapter")
    assert cards.locator(".ml-adapter-name").all_inner_texts() == [
        "parrot-dora", "parrot-mix", "spare-dora", "spare-mix",
    ]  # fmt: skip
    assert cards.locator("input:checked").count() == 2
    assert "224 parameters" in cards.nth(2).inner_text()
    page.get_by_role("checkbox", name="parrot-dora").uncheck()
    page.get_by_role("checkbox", name="parrot-mix").uncheck()
    page.click(".ml-strong:visible")
    page.wait_for_selector(".ml-picker[data-phase=error]")
    assert "choose 1 to 5" in page.locator(".ml-picker-words").inner_text()
    for path in ("/etc", "../allowed/spare-dora", "spare-dora/..", "C:\\x", "<b>x</b>/y"):
        before = page.locator(".ml-picker-words").inner_text()
        page.fill("[name=hub]", path)
        page.click(".ml-strong:visible")
        page.wait_for_function(
            "before => document.querySelector('.ml-picker-words').textContent !== before"
            " && document.querySelector('.ml-picker').dataset.phase === 'error'",
            arg=before,
        )
        words = page.locator(".ml-picker-words").inner_text()
        assert "Not changed" in words
        assert path.split("/")[-1][:2] in words
    page.fill("[name=hub]", "")
    page.get_by_role("checkbox", name="spare-mix").check()
    page.click(".ml-strong:visible")
    page.wait_for_selector(".ml-picker[data-phase=done]")
    assert names(page) == ["base", "spare-mix"]
    assert page.locator("h1").inner_text().startswith("Same prompt. Two answers.")
    ask(page, "Hello")
    wait_for_states(page, "length", "eos")
    assert texts(page)[1] == "Hello"


# ---- looks ----


@pytest.mark.parametrize(
    ("width", "height", "scheme"),
    [(1280, 800, "light"), (390, 844, "dark"), (390, 844, "light"), (1280, 800, "dark")],
)
def test_everything_can_be_read_and_reached(server, visit, width, height, scheme):
    """Blind mode, opened panels, the board: nothing to scroll sideways, no violation for axe-core."""
    page = visit("", width, height, scheme)
    blind_run(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert violations(page) == {}
    page.locator(".ml-letter").first.click()
    page.wait_for_selector("[data-action=share]:enabled")
    page.click("[data-action=share]")
    page.wait_for_selector(".ml-shared:visible")
    page.locator(".ml-history summary").click()
    for panel in ("Settings", "Adapters", "A file of prompts"):
        open_panel(page, panel)
    page.wait_for_selector(".ml-adapter:visible")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert violations(page) == {}
    page.goto(f"{server.address}board")
    page.wait_for_selector(".ml-board[data-phase=votes]")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert violations(page) == {}
