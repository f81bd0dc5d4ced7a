"""Visitors: blind comparisons and votes, what is kept and how much of it, and which adapters they see; no browser."""

from __future__ import annotations

import json

import pytest
from demo.comparisons import column, comparison
from demo.threads import run_async
from tiny_stand_ins import ScriptedBase, byte_tokenizer, save_parrots

from minilora_hub.compare.engine import CompareEngine, Sampling
from minilora_hub.demo.adapters.cards import read_card
from minilora_hub.demo.adapters.catalogue import Catalogue
from minilora_hub.demo.runs import visitor as visitor_module
from minilora_hub.demo.runs.history import MOST_KEPT, History, KeptComparison
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.demo.runs.runner import Runner
from minilora_hub.demo.runs.visitor import Visitors
from minilora_hub.demo.ui.blind_bar import bar_value
from minilora_hub.demo.ui.page_state import text_of
from minilora_hub.demo.votes.sharing import SharedComparisons
from minilora_hub.demo.votes.votes import ALL_BAD, TIE, VoteStore
from minilora_hub.errors import AdapterError, PageError

LONG = 100_000


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A base and two parrots, slow enough that a comparison has several frames."""
    parrots = save_parrots(tmp_path_factory.mktemp("parrots"), {"parrot-dora": "dora", "parrot-mix": "mixlora"})
    return CompareEngine(ScriptedBase(delay=0.02), parrots, tokenizer=byte_tokenizer())


def visitors_of(engine, folder, **limits):
    runner = Runner(engine, limits=PageLimits(**limits))
    return Visitors(runner, VoteStore(folder / "votes"), SharedComparisons(folder / "shared"))


@pytest.fixture
def visitors(engine, tmp_path):
    return visitors_of(engine, tmp_path)


@pytest.fixture
def ana(visitors):
    return visitors.of("ana")


def run(visitor, prompt="Hello", each=lambda: None):
    """Every frame of a comparison; `each` is called after each."""

    async def collect():
        frames = [visitor.begin()]
        async for frame in visitor.run_and_keep(prompt, Sampling(12)):
            frames.append(frame)
            each()
        return frames

    return run_async(collect())


def vote(visitor, choice):
    return run_async(visitor.vote(choice))


# ---- blind ----


def test_nothing_that_is_sent_before_the_vote_tells_the_columns_apart(visitors, ana):
    """Every frame and the bar in full: what is not sent cannot be found by a curious visitor."""
    ana.blind = True
    frames = run(ana)
    sent = json.dumps([[frame.stage, frame.status] for frame in frames] + [bar_value(ana)])
    for secret in (
        "parrot",
        "dora",
        "DoRA",
        "mix",
        "MixLoRA",
        '"base',
        "parameters",
        '"l"',
        '"a"',
        '"r"',
        'sampling": {',
    ):
        assert secret not in sent, secret
    last = frames[-1].stage["columns"]
    kept = ana.history.last()
    assert kept.closed is None
    assert [text_of(one) for one in last] == [text_of(kept.comparison.columns[index]) for index in kept.order]
    assert ana.history.listed() == []
    assert "parrot-dora" in json.dumps([frame.stage for frame in run(visitors.of("bob"))])


def test_blind_switched_off_during_a_run_shows_the_names_and_takes_no_vote(ana):
    ana.blind = True

    def switch_off():
        ana.blind = False

    frames = run(ana, each=switch_off)
    assert frames[-1].stage["columns"][1]["about"]["name"] == "parrot-dora"
    with pytest.raises(PageError, match="only a blind comparison"):
        vote(ana, "0")


def test_a_failed_column_opens_a_blind_comparison(ana):
    ana.blind = True
    frames = run(ana, "explode, please")
    assert frames[-1].stage["columns"][1]["about"]["name"] == "parrot-dora"
    assert bar_value(ana)["words"].startswith("No vote: an answer was stopped or failed")


# ---- votes ----


def test_a_vote_is_for_the_column_under_the_letter(visitors, ana):
    ana.history.add(comparison(), (2, 0, 1))
    vote(ana, "0")
    (stored,) = visitors.votes.read().votes
    assert stored.candidates[stored.choice].name == "mix"
    assert stored.order == (2, 0, 1)


@pytest.mark.parametrize("choice", [TIE, ALL_BAD, "1"])
def test_nobody_votes_twice(visitors, ana, choice):
    ana.history.add(comparison(), (0, 1, 2))
    vote(ana, choice)
    with pytest.raises(PageError, match="you have voted"):
        vote(ana, "1")
    assert len(visitors.votes.read().votes) == 1


@pytest.mark.parametrize("choice", ["3", "-1", "", "x", "²", "9" * 5000])
def test_a_letter_that_was_not_shown_is_no_choice(ana, choice):
    ana.history.add(comparison(), (0, 1, 2))
    with pytest.raises(PageError, match="no such answer"):
        vote(ana, choice)
    vote(ana, "2")  # the comparison can still be voted on


def test_only_a_finished_blind_comparison_of_ones_own_is_voted_on(visitors, ana):
    with pytest.raises(PageError, match="nothing was run"):
        vote(ana, "0")
    ana.history.add(comparison(), (0, 1, 2))
    with pytest.raises(PageError, match="nothing was run"):
        vote(visitors.of("bob"), "0")
    ana.history.add(comparison())
    with pytest.raises(PageError, match="only a blind comparison"):
        vote(ana, "0")
    ana.history.add(comparison(column("base", "x"), column("dora", "y", "stopped")), (0, 1))
    with pytest.raises(PageError, match="stopped or failed"):
        vote(ana, "0")
    ana.history.add(comparison(), (0, 1, 2))
    ana.history.close_last("the names were shown before a vote")
    with pytest.raises(PageError, match="shown before a vote"):
        vote(ana, "0")
    assert visitors.votes.read().votes == ()


def test_a_vote_that_cannot_be_stored_can_be_tried_again(visitors, ana):
    ana.history.add(comparison(), (0, 1, 2))
    visitors.votes.folder.parent.mkdir(exist_ok=True)
    visitors.votes.folder.write_text("a file is in the way")
    with pytest.raises(PageError, match="the vote could not be stored"):
        vote(ana, "0")
    visitors.votes.folder.unlink()
    vote(ana, "0")


# ---- history ----


def test_a_refused_prompt_is_not_kept(ana):
    run(ana, " ")
    with pytest.raises(PageError, match="nothing was run"):
        ana.history.last()


def test_history_hides_what_can_be_voted_on_and_ends_with_the_visit(visitors, ana):
    for number in range(MOST_KEPT + 5):
        ana.history.add(comparison(prompt=f"{number}"))
    blind = ana.history.add(comparison(prompt="blind"), (0, 1, 2))
    assert [kept.comparison.prompt for kept in ana.history.listed()] == [f"{n}" for n in range(MOST_KEPT + 4, 5, -1)]
    with pytest.raises(PageError, match="no longer in your history"):
        ana.history.find(blind.id)
    with pytest.raises(PageError, match="vote first"):
        run_async(ana.share())
    vote(ana, TIE)
    assert ana.history.find(blind.id) is blind
    with pytest.raises(PageError, match="no longer in your history"):
        visitors.of("bob").history.find(blind.id)
    ana.blind = True
    visitors.leave("ana")
    assert visitors.of("ana").history.listed() == []
    assert not visitors.of("ana").blind


def test_a_comparison_is_shared_once_and_only_when_asked(visitors, ana):
    ana.history.add(comparison())
    assert not visitors.shared.folder.exists()
    assert run_async(ana.share()) == run_async(ana.share())
    assert len(list(visitors.shared.folder.glob("*.json"))) == 1


def test_a_comparison_knows_its_memory():
    """The texts and the logs, each of them once."""
    small, large = comparison(), comparison(column("base", "word " * 1000), prompt="x" * LONG)
    assert 3_000 < small.memory < 20_000
    logs = sum(len(one["log"]) for one in large.columns)
    assert LONG + logs < large.memory < LONG + logs + 20_000


def first_letters(history):
    return [kept.comparison.prompt[0] for kept in history.listed()]


def test_a_visitors_comparisons_are_bounded_in_bytes():
    """The oldest are forgotten; the last one stays, however large it is."""
    history = History()
    for prompt, left in (
        ("0" * LONG, "0"),
        ("1" * LONG, "10"),
        ("2" * LONG, "210"),
        ("3" * LONG, "321"),
        ("5" * 8 * LONG, "5"),
        ("6", "6"),
    ):
        history.add(comparison(prompt=prompt))
        history.make_room(int(3.5 * LONG))
        assert first_letters(history) == list(left)


def test_the_comparison_on_the_page_counts_and_stays():
    """One of the visitor's own that is old by now, or one that somebody shared."""
    history = History()
    for number in range(3):
        history.add(comparison(prompt=f"{number}" * LONG))
    oldest = history.listed()[-1]
    history.show(oldest)
    history.make_room(int(2.5 * LONG))
    assert history.shown() is oldest
    assert first_letters(history) == ["2", "0"]
    history.show(KeptComparison(comparison(prompt="s" * 2 * LONG), closed="this is a stored comparison"))
    history.make_room(int(3.5 * LONG))
    assert first_letters(history) == ["2"]
    assert history.shown().comparison.prompt[0] == "s"


@pytest.mark.parametrize("way", ["run", "show"])
def test_all_visitors_together_are_bounded_in_bytes(engine, tmp_path, way):
    """The longest absent lose their comparisons, also to visitors who only look at what others have shared."""
    visitors = visitors_of(engine, tmp_path, kept_megabytes=4.5 * LONG / 10**6)
    for number in range(9):
        visitor = visitors.of(f"{number}")
        large = comparison(prompt="x" * LONG)
        if way == "run":
            visitor.history.add(large)
            visitors.make_room(visitor)
        else:
            visitor.show(KeptComparison(large, closed="stored"))
    kept = []
    for number in range(9):
        try:
            kept.append(len(visitors.of(f"{number}").history.shown().comparison.prompt))
        except PageError:
            kept.append(0)
    assert kept == [0] * 5 + [LONG] * 4
    assert visitors.memory <= 4.5 * LONG


def test_the_longest_absent_visitor_is_forgotten(visitors, monkeypatch):
    monkeypatch.setattr(visitor_module, "MOST_VISITORS", 6)
    for number in range(20):
        visitors.of(f"{number}").history.add(comparison())
    assert [bool(visitors.of(f"{number}").history.listed()) for number in reversed(range(14, 20))] == [True] * 6
    assert visitors.of("13").history.listed() == []


# ---- adapters ----


def test_a_choice_during_a_run_ends_it_without_another_frame(visitors, ana):
    """Its columns must not come back under the new ones."""

    async def choose_after_two():
        frames = [ana.begin()]
        async for frame in ana.run_and_keep("Hello", Sampling(200)):
            frames.append(frame)
            if len(frames) == 3:
                await ana.choose(["parrot-mix"])
        return frames

    frames = run_async(choose_after_two())
    assert len(frames) == 3
    assert not frames[-1].finished
    assert [about["name"] for about in ana.about()] == ["base", "parrot-mix"]
    assert [column["about"]["name"] for column in run(ana)[-1].stage["columns"]] == ["base", "parrot-mix"]


def test_visitors_choose_among_the_adapters_of_the_page(visitors, ana):
    run_async(ana.choose(["parrot-mix", "parrot-mix"]))
    assert ana.adapters() == ["parrot-mix"]
    assert visitors.of("bob").adapters() == ["parrot-dora", "parrot-mix"]
    for names, words in (([], "0 adapters"), (["parrot-dora", *map(str, range(5))], "6 adapters")):
        with pytest.raises(PageError, match=words):
            run_async(ana.choose(names))
    with pytest.raises(AdapterError, match="own adapters only"):
        run_async(ana.choose(["/etc"]))
    assert ana.adapters() == ["parrot-mix"]


def test_the_folders_of_a_page_are_read_once_and_adapters_are_chosen_by_name(engine, tmp_path):
    with pytest.raises(AdapterError, match="no such folder"):
        Catalogue(engine, None, [tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="none of the folders in it holds an adapter"):
        Catalogue(engine, None, [tmp_path / "empty"])
    save_parrots(tmp_path / "same", {"parrot-dora": "dora"})
    with pytest.raises(AdapterError, match="already an adapter called 'parrot-dora'"):
        Catalogue(engine, None, [tmp_path / "same"])
    save_parrots(tmp_path / "more", {"spare": "dora"})
    (tmp_path / "more" / "notes").mkdir()
    catalogue = Catalogue(engine, None, [tmp_path / "more"])
    assert catalogue.names == ["parrot-dora", "parrot-mix", "spare"]
    assert catalogue.card("spare").kind == "DoRA"
    with pytest.raises(AdapterError, match="no such adapter"):
        catalogue.card("../more/spare")


def test_the_card_of_a_shipped_adapter_holds_its_results():
    from minilora_hub.adapter_folder.results import Results
    from minilora_hub.compare.found_adapters import shipped_adapters

    for folder in shipped_adapters():
        card, results = read_card(folder.name, folder), Results.load(folder)
        assert f"{results.parameters:,} parameters" in card.facts
        assert "licence apache-2.0" in card.facts
        assert [(one["task"], one["value"], one["base"]) for one in card.scores] == [
            (one.task, one.value, one.base_value) for one in results.evaluation[:6]
        ]
        losses = [loss for _, loss in results.training.loss]
        assert min(losses) <= min(card.loss) <= max(card.loss) <= max(losses)
        assert len(card.loss) <= 120
        assert card.trouble is None


def test_a_damaged_results_file_is_named_on_the_card(tmp_path):
    (folder,) = save_parrots(tmp_path, {"parrot": "dora"})
    (folder / "results.json").write_text('{"schema_version": 1, "method": "<b>"}')
    assert "results.json" in read_card("parrot", folder).trouble
