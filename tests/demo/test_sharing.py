"""Shared comparisons on disk, exports, blind stages, and what is kept of a visitor."""

import json
import os
from collections import Counter

import pytest
from demo.records import column, record
from markdown_it import MarkdownIt

from minilora_hub.demo.runs import visits as visits_module
from minilora_hub.demo.runs.comparison import exported_json, exported_markdown
from minilora_hub.demo.runs.visits import KEPT, Kept, KeptLimits, Visits
from minilora_hub.demo.ui.page_state import text_of
from minilora_hub.demo.votes.blind import Blindfold, revealed, shuffled
from minilora_hub.demo.votes.sharing import SharedComparisons, ShareLimits
from minilora_hub.demo.votes.votes import ALL_BAD, TIE, VoteStore
from minilora_hub.errors import PageError

HOSTILE = "```\n</textarea><script>alert(1)</script> | **b** 👋 \u202e `x` ~~~"


# ---- the store ----


def test_what_is_shared_comes_back_whole_after_a_restart(tmp_path):
    kept = record(column("base", HOSTILE), column("dora", "", "error", "boom"), prompt=HOSTILE)
    identifier = SharedComparisons(tmp_path).add(kept)
    assert SharedComparisons(tmp_path).get(identifier) == kept


def test_ids_are_random_and_long(tmp_path):
    store = SharedComparisons(tmp_path)
    ids = {store.add(record()) for _ in range(20)}
    assert len(ids) == 20
    assert {len(one) for one in ids} == {22}  # 128 bits


@pytest.mark.parametrize(
    "identifier",
    ["", ".", "..", "../votes", "/etc/passwd", "a" * 21, "a" * 23, "a" * 20 + "/x", "\uff41" * 22, "a" * 21 + "\n",
     "..%2f", "a" * 20 + "\x00b", None, 7],
)  # fmt: skip
def test_hostile_ids_are_refused(tmp_path, identifier):
    (tmp_path / "votes.json").write_text("{}")
    with pytest.raises(PageError, match="no link that the page has given out"):
        SharedComparisons(tmp_path / "shared").get(identifier)


def test_an_id_that_is_gone(tmp_path):
    with pytest.raises(PageError, match="no such comparison"):
        SharedComparisons(tmp_path).get("a" * 22)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"version": 2}', '{"version": 1}', '{"version": 1, "weights": [], "stage": {"columns": []}}',
     '{"version": 1, "weights": [], "x": 1}', "\x00", "[" * 90000],
)  # fmt: skip
def test_a_damaged_file_is_told(tmp_path, content):
    (tmp_path / f"{'a' * 22}.json").write_text(content)
    with pytest.raises(PageError, match=r"damaged|another version"):
        SharedComparisons(tmp_path).get("a" * 22)


def test_the_oldest_make_room(tmp_path):
    store = SharedComparisons(tmp_path, ShareLimits(count=3))
    ids = []
    for number in range(5):
        ids.append(store.add(record(prompt=f"{number}")))
        os.utime(tmp_path / f"{ids[-1]}.json", ns=(number * 10**9,) * 2)
    assert [one in {file.stem for file in tmp_path.glob("*.json")} for one in ids] == [False, False, True, True, True]
    assert store.get(ids[4]).prompt == "4"


def test_the_folder_stays_below_its_size(tmp_path):
    size = len(record(prompt="x" * 5000).to_json())
    store = SharedComparisons(tmp_path, ShareLimits(total_bytes=int(2.5 * size)))
    for _ in range(4):
        store.add(record(prompt="x" * 5000))
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_one_that_is_too_large_is_refused_and_nothing_goes_for_it(tmp_path):
    store = SharedComparisons(tmp_path, ShareLimits(bytes_each=5000))
    first = store.add(record())
    with pytest.raises(PageError, match=r"is 0\.0 MB|at most"):
        store.add(record(prompt="x" * 5000))
    assert store.get(first) == record(time=store.get(first).time)
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".lock" and file.name != ".lock"] == [
        f"{first}.json"
    ]


# ---- exports ----


def test_json_holds_the_texts_and_the_numbers():
    content = json.loads(exported_json(record(column("base", HOSTILE), column("dora", "y"), prompt=HOSTILE)))
    assert content["prompt"] == HOSTILE
    assert content["columns"][0]["answer"] == HOSTILE
    assert content["columns"][1]["weights"] == "sha256:dora"
    assert content["columns"][1]["tokens_per_second"] == 12.5
    assert content["sampling"]["seed"] == 3


def test_markdown_shows_hostile_texts_as_they_are():
    """Read by an independent parser: every text is one fence's content, nothing becomes markup."""
    text = exported_markdown(
        record(column("base", HOSTILE), column("dora", "", "error", "<b>boom</b> | x"), prompt=HOSTILE)
    )
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = parser.parse(text)
    assert [token.content for token in tokens if token.type == "fence"] == [HOSTILE + "\n"] * 2
    assert "html_block" not in {token.type for token in tokens}
    inner = [child for token in tokens for child in token.children or ()]
    assert not {"html_inline", "strong_open", "s_open"} & {child.type for child in inner}
    assert any("<b>boom</b> | x" in token.content.replace("\\", "") for token in tokens)
    assert sum(token.type == "tr_open" for token in tokens) == 3


# ---- blind ----


def test_a_blind_stage_tells_the_texts_and_nothing_else():
    """No name, kind, number, expert or error of the three is anywhere in what the browser gets."""
    stage = record(
        column("base", "because"), column("dora", "so"), column("mix", "thus it is", "error", "mix: NaN in its experts")
    ).stage
    fold = Blindfold((2, 0, 1))
    half = [one["log"].find("\n") + 1 for one in stage["columns"]]
    early = {
        **stage,
        "columns": [{**one, "log": one["log"][:end]} for one, end in zip(stage["columns"], half, strict=True)],
    }
    fold.stage(early)
    shown = json.dumps(fold.stage(stage))
    for secret in (
        "dora",
        "mix",
        "base",
        "DoRA",
        "MixLoRA",
        "r 2",
        "seed",
        "alternative",
        "625",
        "1000",
        "12.5",
        "NaN",
    ):
        assert secret not in shown
    columns = fold.stage(stage)["columns"]
    assert [text_of(one) for one in columns] == ["thus it is", "because", "so"]
    assert [one["about"]["badge"] for one in columns] == ["A", "B", "C"]
    assert {json.dumps(one["about"] | {"name": "", "badge": "", "kind": ""}) for one in columns[:1]} == {
        json.dumps(one["about"] | {"name": "", "badge": "", "kind": ""}) for one in columns[1:]
    }
    assert columns[0]["error"] == "This answer failed."
    letters = {one["about"]["name"]: one["about"]["letter"] for one in revealed(stage, (2, 0, 1))["columns"]}
    assert letters == {"mix": "A", "base": "B", "dora": "C"}


def test_every_order_is_drawn():
    """Chi-squared of 3,000 draws over the 6 orders of three: beyond 30 once in 70,000 runs."""
    seen = Counter(shuffled(3) for _ in range(3000))
    assert len(seen) == 6
    assert sum((count - 500) ** 2 / 500 for count in seen.values()) < 30


# ---- what is kept of a visitor ----


@pytest.fixture
def visits(tmp_path):
    return Visits(VoteStore(tmp_path / "votes"), SharedComparisons(tmp_path / "shared"))


def test_a_vote_is_for_the_column_under_the_letter(visits):
    visits.keep("ana", record(), (2, 0, 1))
    visits.vote("ana", "0")
    (vote,) = visits.votes.read().votes
    assert vote.candidates[vote.choice].name == "mix"
    assert vote.order == (2, 0, 1)


@pytest.mark.parametrize("choice", [TIE, ALL_BAD, "1"])
def test_nobody_votes_twice(visits, choice):
    visits.keep("ana", record(), (0, 1, 2))
    visits.vote("ana", choice)
    with pytest.raises(PageError, match="you have voted"):
        visits.vote("ana", "1")
    assert len(visits.votes.read().votes) == 1


@pytest.mark.parametrize("choice", ["3", "-1", "", "x", "²", "9" * 5000])
def test_a_letter_that_was_not_shown_can_be_voted_for_by_nobody(visits, choice):
    visits.keep("ana", record(), (0, 1, 2))
    with pytest.raises(PageError, match="no such answer"):
        visits.vote("ana", choice)
    visits.vote("ana", "2")  # the comparison can still be voted on


def test_what_was_not_run_here_cannot_be_voted_on(visits):
    with pytest.raises(PageError, match="nothing was run"):
        visits.vote("ana", "0")
    visits.keep("ana", record(), (0, 1, 2))
    with pytest.raises(PageError, match="nothing was run"):
        visits.vote("bob", "0")
    visits.keep("ana", record())
    with pytest.raises(PageError, match="only a blind comparison"):
        visits.vote("ana", "0")
    visits.keep("ana", record(column("base", "x"), column("dora", "y", "stopped")), (0, 1))
    with pytest.raises(PageError, match="stopped or failed"):
        visits.vote("ana", "0")
    visits.keep("ana", record(), (0, 1, 2))
    visits.give_up("ana")
    with pytest.raises(PageError, match="shown before a vote"):
        visits.vote("ana", "0")
    assert visits.votes.read().votes == ()


def test_a_vote_that_cannot_be_stored_can_be_tried_again(visits, monkeypatch):
    visits.keep("ana", record(), (0, 1, 2))
    with monkeypatch.context() as patch:

        def full(vote):
            raise PageError("the disk is full")

        patch.setattr(visits.votes, "add", full)
        with pytest.raises(PageError, match="the disk is full"):
            visits.vote("ana", "0")
    visits.vote("ana", "0")


def test_history_hides_what_is_to_be_voted_on_and_ends_with_the_visit(visits):
    for number in range(KEPT + 5):
        visits.keep("ana", record(prompt=f"{number}"))
    blind = visits.keep("ana", record(prompt="blind"), (0, 1, 2))
    assert [kept.record.prompt for kept in visits.history("ana")] == [f"{number}" for number in range(KEPT + 4, 5, -1)]
    with pytest.raises(PageError, match="no longer kept"):
        visits.find("ana", blind.id)
    with pytest.raises(PageError, match="vote first"):
        visits.share(blind)
    visits.vote("ana", TIE)
    assert visits.find("ana", blind.id) is blind
    with pytest.raises(PageError, match="no longer kept"):
        visits.find("bob", blind.id)
    visits.forget("ana")
    assert visits.history("ana") == []


def test_a_comparison_is_shared_once_and_only_when_asked(visits):
    kept = visits.keep("ana", record())
    assert not visits.shared.folder.exists()
    assert visits.share(kept) == visits.share(kept)
    assert len(list(visits.shared.folder.glob("*.json"))) == 1


LONG = 100_000


def of_visitors(tmp_path, **limits):
    """Visits under these limits."""
    return Visits(VoteStore(tmp_path / "votes"), SharedComparisons(tmp_path / "shared"), KeptLimits(**limits))


def test_a_comparison_knows_what_it_takes():
    """The texts and the logs, and each of them once."""
    small, large = record(), record(column("base", "word " * 1000), prompt="x" * LONG)
    assert 3_000 < small.memory < 20_000
    logs = sum(len(one["log"]) for one in large.columns)
    assert LONG + logs < large.memory < LONG + logs + 20_000


def test_a_visitors_comparisons_are_bounded_in_bytes(tmp_path):
    """The oldest go; the last one stays, however large it is."""
    visits = of_visitors(tmp_path, visitor_bytes=int(3.5 * LONG), total_bytes=10 * LONG)
    for number in range(5):
        visits.keep("ana", record(prompt=f"{number}" * LONG))
    assert [kept.record.prompt[0] for kept in visits.history("ana")] == ["4", "3", "2"]
    visits.keep("ana", record(prompt="5" * 8 * LONG))
    assert [kept.record.prompt[0] for kept in visits.history("ana")] == ["5"]
    visits.keep("ana", record(prompt="6"))
    assert [kept.record.prompt[0] for kept in visits.history("ana")] == ["6"]


def test_what_a_visitor_looks_at_counts_and_stays(tmp_path):
    """One of their own that is old by now, or one that somebody shared."""
    visits = of_visitors(tmp_path, visitor_bytes=int(3.5 * LONG), total_bytes=10 * LONG)
    for number in range(3):
        visits.keep("ana", record(prompt=f"{number}" * LONG))
    oldest = visits.history("ana")[-1]
    visits.show("ana", oldest)
    assert visits.shown("ana") is oldest
    visits.show("ana", Kept(record(prompt="s" * 2 * LONG), closed="it is a stored comparison"))
    assert [kept.record.prompt[0] for kept in visits.history("ana")] == ["2"]
    assert visits.shown("ana").record.prompt[0] == "s"


@pytest.mark.parametrize("way", ["keep", "show"])
def test_all_visitors_together_are_bounded_in_bytes(tmp_path, monkeypatch, way):
    """Those who were here longest ago make room, also for visitors who only look at what others have shared."""
    monkeypatch.setattr(visits_module, "VISITORS", 6)
    visits = of_visitors(tmp_path, visitor_bytes=5 * LONG, total_bytes=int(4.5 * LONG))
    for number in range(9):
        one = record(prompt="x" * LONG)
        visits.keep(f"{number}", one) if way == "keep" else visits.show(f"{number}", Kept(one, closed="stored"))
        visits.shown(f"{number}")
    for number in range(9):
        if number < 5:
            with pytest.raises(PageError, match="nothing was run yet"):
                visits.shown(f"{number}")
        else:
            assert visits.shown(f"{number}").record.prompt == "x" * LONG
    for number in range(20):
        visits.keep(f"small {number}", record())
    assert sum(bool(visits.history(f"small {number}")) for number in range(20)) == 6


def test_the_owner_says_how_much(monkeypatch):
    monkeypatch.setenv("MINILORA_KEPT_MEGABYTES", "80")
    assert KeptLimits.from_environment() == KeptLimits(8 * 10**6, 80 * 10**6)
    monkeypatch.setenv("MINILORA_KEPT_MEGABYTES", "0")
    with pytest.raises(ValueError, match="MINILORA_KEPT_MEGABYTES='0'"):
        KeptLimits.from_environment()
