"""Shared comparisons on disk, exports, and blind stages."""

import json
import os
from collections import Counter

import pytest
from demo.comparisons import column, comparison
from markdown_it import MarkdownIt

from minilora_hub.demo.runs.comparison import exported_json, exported_markdown
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.demo.ui.page_state import text_of
from minilora_hub.demo.votes import sharing
from minilora_hub.demo.votes.blind import Blindfold, revealed, shuffled
from minilora_hub.demo.votes.sharing import SharedComparisons
from minilora_hub.errors import PageError

HOSTILE = "```\n</textarea><script>alert(1)</script> | **b** 👋 \u202e `x` ~~~"


# ---- the store ----


def test_what_is_shared_comes_back_whole_after_a_restart(tmp_path):
    kept = comparison(column("base", HOSTILE), column("dora", "", "error", "boom"), prompt=HOSTILE)
    identifier = SharedComparisons(tmp_path).add(kept)
    assert SharedComparisons(tmp_path).get(identifier) == kept


def test_ids_are_random_and_long(tmp_path):
    store = SharedComparisons(tmp_path)
    ids = {store.add(comparison()) for _ in range(20)}
    assert len(ids) == 20
    assert {len(one) for one in ids} == {22}  # 128 bits


@pytest.mark.parametrize(
    "identifier",
    ["", ".", "..", "../votes", "/etc/passwd", "a" * 21, "a" * 23, "a" * 20 + "/x", "\uff41" * 22, "a" * 21 + "\n",
     "..%2f", "a" * 20 + "\x00b", None, 7],
)  # fmt: skip
def test_hostile_ids_are_refused(tmp_path, identifier):
    (tmp_path / "votes.json").write_text("{}")
    with pytest.raises(PageError, match="not a share link of this page"):
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
    store = SharedComparisons(tmp_path, PageLimits(shared=3))
    ids = []
    for number in range(5):
        ids.append(store.add(comparison(prompt=f"{number}")))
        os.utime(tmp_path / f"{ids[-1]}.json", ns=(number * 10**9,) * 2)
    assert [one in {file.stem for file in tmp_path.glob("*.json")} for one in ids] == [False, False, True, True, True]
    assert store.get(ids[4]).prompt == "4"


def test_the_folder_stays_below_its_size(tmp_path):
    size = len(comparison(prompt="x" * 5000).to_json())
    store = SharedComparisons(tmp_path, PageLimits(shared_megabytes=2.5 * size / 10**6))
    for _ in range(4):
        store.add(comparison(prompt="x" * 5000))
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_one_that_is_too_large_is_refused_and_nothing_is_removed_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "MOST_BYTES", 5000)
    store = SharedComparisons(tmp_path)
    first = store.add(comparison())
    with pytest.raises(PageError, match=r"is 0\.0 MB|at most"):
        store.add(comparison(prompt="x" * 5000))
    assert store.get(first) == comparison(time=store.get(first).time)
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".lock" and file.name != ".lock"] == [
        f"{first}.json"
    ]


# ---- exports ----


def test_json_holds_the_texts_and_the_numbers():
    content = json.loads(exported_json(comparison(column("base", HOSTILE), column("dora", "y"), prompt=HOSTILE)))
    assert content["prompt"] == HOSTILE
    assert content["columns"][0]["answer"] == HOSTILE
    assert content["columns"][1]["weights"] == "sha256:dora"
    assert content["columns"][1]["tokens_per_second"] == 12.5
    assert content["sampling"]["seed"] == 3


def test_markdown_shows_hostile_texts_as_they_are():
    """Read by an independent parser: every text is the content of one fence, nothing becomes markup."""
    text = exported_markdown(
        comparison(column("base", HOSTILE), column("dora", "", "error", "<b>boom</b> | x"), prompt=HOSTILE)
    )
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = parser.parse(text)
    assert [token.content for token in tokens if token.type == "fence"] == [
        HOSTILE.replace("\u202e", "\\u202e") + "\n"
    ] * 2
    assert "html_block" not in {token.type for token in tokens}
    inner = [child for token in tokens for child in token.children or ()]
    assert not {"html_inline", "strong_open", "s_open"} & {child.type for child in inner}
    assert any("<b>boom</b> | x" in "".join(child.content for child in token.children or ()) for token in tokens)
    assert sum(token.type == "tr_open" for token in tokens) == 3


# ---- blind ----


def test_a_blind_stage_tells_the_texts_and_nothing_else():
    """No name, kind, number, expert or error of the three is anywhere in what the browser gets."""
    stage = comparison(
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
        "rank 2",
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
