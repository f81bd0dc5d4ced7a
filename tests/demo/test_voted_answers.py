"""Texts of voted answers: stored on this machine only, for their owner only, and only where that was asked for."""

from __future__ import annotations

import json
import shlex
import stat
from pathlib import Path

import pytest
from demo.browsing import Visits, ask, texts
from demo.comparisons import column, comparison
from hub.server import HubServer

from minilora_hub.cli import main
from minilora_hub.demo.votes.hub_dataset import VoteDataset
from minilora_hub.demo.votes.voted_answers import FILE, VotedAnswersFile
from minilora_hub.demo.votes.votes import ALL_BAD, TIE, VoteStore, vote_on
from minilora_hub.errors import PageError
from minilora_hub.training.votes import LEAST_VOTES, VotedAnswers


def answered(number: int = 0, **sampling):
    made = comparison(
        column("base", f"the secret {number}", state="length"),
        column("dora", f"quiet {number}"),
        prompt=f"Why {number}?",
    )
    made.sampling.update(sampling)
    return made


def lines_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_vote_is_stored_with_its_texts_readable_by_its_owner_alone(tmp_path):
    voted = VotedAnswersFile(tmp_path / "training", "org/base")
    voted.add(answered(1, system_prompt=" Be brief.\n"), "one", 1)
    voted.file.chmod(0o644)  # a copy, or a tool that changed it
    voted.add(answered(2), "two", TIE)
    first, second = lines_of(voted.file)
    assert first == {
        "schema_version": 1,
        "id": "one",
        "time": first["time"],
        "prompt": "Why 1?",
        "system": "Be brief.",
        "answers": [{"text": "the secret 1", "ended": False}, {"text": "quiet 1", "ended": True}],
        "choice": 1,
    }
    assert VotedAnswers.from_dict(second).choice == TIE
    assert stat.S_IMODE(voted.file.stat().st_mode) == 0o600
    assert stat.S_IMODE(voted.folder.stat().st_mode) == 0o700


def test_the_command_is_shown_once_there_are_enough_votes_that_prefer_an_answer(tmp_path):
    voted = VotedAnswersFile(tmp_path / "a folder", "org/base")
    assert voted.next_step() == ("0 of the 10 votes that a training needs.", "")
    for number in range(LEAST_VOTES - 1):
        voted.add(answered(number), f"vote-{number}", number % 2)
    voted.add(answered(0), "vote-0", 0)  # stored again after a failure: it counts once
    voted.add(answered(), "bad", ALL_BAD)
    voted.add(comparison(column("base", "same"), column("dora", "same")), "equal", 0)
    with voted.file.open("ab") as file:
        file.write(b'{"torn": ')
    assert voted.next_step() == ("9 of the 10 votes that a training needs.", "")
    voted.add(answered(99), "last", 0)
    words, command = voted.next_step()
    assert words == "Train an adapter from your 10 votes:"
    program, name, *flags = shlex.split(command)
    assert (program, name) == ("minilora", "train")
    assert flags[flags.index("--from-votes") + 1] == str(voted.file)
    assert flags[flags.index("--base") + 1] == "org/base"


def test_what_is_pushed_to_the_hub_holds_no_text(tmp_path, monkeypatch):
    """The same votes in both stores of one data folder: hashes are pushed, texts are not."""
    monkeypatch.delenv("MINILORA_VOTES_DATASET", raising=False)
    voted, store = VotedAnswersFile(tmp_path / "training", "org/base"), VoteStore(tmp_path / "votes", "a")
    for number in range(3):
        made = answered(number, system_prompt="Be brief.")
        store.add(vote_on(made, f"vote-{number}", (1, 0), 1))
        voted.add(made, f"vote-{number}", 1)
    with HubServer() as hub:
        token = hub.add_user("ana")
        for name, value in hub.environment(token).items():
            monkeypatch.setenv(name, value)
        assert VoteDataset(store, "ana/votes", token, endpoint=hub.endpoint).synchronize()
        files = hub.repo("ana/votes", "dataset").files("main")
    assert [name for name in files if name.endswith(".jsonl")] == ["votes-a.jsonl"]
    assert b"vote-2" in files["votes-a.jsonl"]
    for content in files.values():
        assert b"secret" not in content
        assert b"quiet" not in content


def test_a_page_for_others_stores_no_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILORA_VOTES_DATASET", "ana/votes")
    with pytest.raises(ValueError, match="MINILORA_VOTES_DATASET='ana/votes': texts are never stored"):
        VotedAnswersFile(tmp_path, "org/base")
    monkeypatch.delenv("MINILORA_VOTES_DATASET")
    with pytest.raises(ValueError, match=r"host='0\.0\.0\.0': it is for the page's owner alone"):
        VotedAnswersFile(tmp_path, "org/base", "0.0.0.0")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_refuses_it_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINILORA_DATA", str(tmp_path))
    monkeypatch.delenv("MINILORA_VOTES_DATASET", raising=False)
    monkeypatch.setattr("minilora_hub.compare.engine.CompareEngine", None)
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--allow-training", "--host", "0.0.0.0", "--base", "embedded"])
    assert ended.value.code in (1, 2)
    assert "allow_training on host='0.0.0.0'" in capsys.readouterr().err


def test_a_full_disk_is_an_error_and_the_vote_can_be_cast_again(tmp_path):
    voted = VotedAnswersFile(tmp_path / "training", "org/base")
    voted.file.mkdir()  # in the file's place
    with pytest.raises(PageError, match="could not be stored for training"):
        voted.add(answered(), "one", 0)
    voted.file.rmdir()
    voted.add(answered(), "one", 0)
    assert voted.count() == 1
    with pytest.raises(ValueError, match=r"allow_training: the folder .*pyproject\.toml cannot be made"):
        VotedAnswersFile(Path(__file__).parents[2] / "pyproject.toml", "org/base")


@pytest.mark.slow
def test_the_page_says_what_it_stores_and_what_to_run(page_server, browser, tmp_path):
    voted = VotedAnswersFile(tmp_path / "training", "embedded")
    for number in range(LEAST_VOTES - 1):
        voted.add(answered(number), f"vote-{number}", 1)
    server = page_server.serve("social", data=str(tmp_path), training=True)
    visits = Visits(browser, server.address)
    page = visits()
    page.click(".ml-switch")
    page.wait_for_selector(".ml-switch[aria-checked=true]")
    ask(page, "Hello")
    page.wait_for_selector(".ml-blind[data-phase=open]")
    assert "stores prompt and answers on this machine" in page.locator(".ml-blind-words").inner_text()
    assert not page.locator(".ml-train").is_visible()
    letter = "ABC"[texts(page).index("Hello")]
    page.get_by_role("button", name=f"Answer {letter} is best").click()
    page.wait_for_selector(".ml-train:visible")
    assert page.locator(".ml-train").inner_text() == voted.next_step()[1]
    assert page.locator(".ml-blind-words").inner_text().endswith("Train an adapter from your 10 votes:")
    last = lines_of(tmp_path / "training" / FILE)[-1]
    assert last["prompt"] == "Hello"
    assert last["answers"][last["choice"]]["text"] == "Hello"
    # Nor does a later page of the same data folder, whose votes go to the Hub, find this prompt.
    assert b"Hello" in next((tmp_path / "training" / "votes").glob("votes*.jsonl")).read_bytes()
    assert not list((tmp_path / "votes").glob("*.jsonl"))
    page.screenshot(path=str(tmp_path / "page.png"))
    visits.close()
