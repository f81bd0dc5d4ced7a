"""Votes on disk: several writers, kills, a full disk, damage; and the data set on the Hub that keeps them."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from demo.comparisons import comparison
from hub.server import HubServer

from minilora_hub.demo.runs.comparison import answer_hash
from minilora_hub.demo.votes.hub_dataset import VoteDataset, open_votes
from minilora_hub.demo.votes.storage import locked
from minilora_hub.demo.votes.votes import ALL_BAD, TIE, VoteStore, vote_on
from minilora_hub.errors import AdapterError, PageError

TESTS = Path(__file__).parents[1]


def cast(store, identifier, choice=0, prompt="Why?"):
    """Store a vote and return it."""
    vote = vote_on(comparison(prompt=prompt), identifier, (2, 0, 1), choice)
    store.add(vote)
    return vote


def test_a_vote_is_there_after_a_restart_with_everything_it_is_about(tmp_path):
    first = cast(VoteStore(tmp_path), "one", choice=2, prompt="Wörld 👋 \u202eRTL\x00")
    second = cast(VoteStore(tmp_path), "two", choice=TIE)
    third = cast(VoteStore(tmp_path), "three", choice=ALL_BAD)
    read = VoteStore(tmp_path).read()
    assert read.skipped == 0
    assert list(read.votes) == [first, second, third]
    line = json.loads((tmp_path / "votes.jsonl").read_text().splitlines()[0])
    assert line["prompt"] == "Wörld 👋 \u202eRTL\x00"
    assert line["sampling"] == {"max_new_tokens": 8, "temperature": 0.5, "seed": 3}
    assert line["base_fingerprint"] == "sha256:base"
    assert line["order"] == [2, 0, 1]
    assert line["choice"] == 2
    assert line["candidates"][2] == {
        "name": "mix",
        "kind": "MixLoRA",
        "weights": "sha256:mix",
        "revision": None,
        "answer": answer_hash("thus"),
    }


def test_a_store_that_holds_nothing(tmp_path):
    assert VoteStore(tmp_path / "never-made").read().votes == ()
    assert not (tmp_path / "never-made").exists()


@pytest.mark.parametrize("choice", [3, -1, "b", True, None])
def test_a_choice_that_was_not_shown_is_refused_before_anything_is_written(tmp_path, choice):
    with pytest.raises((PageError, AdapterError)):
        cast(VoteStore(tmp_path), "one", choice=choice)
    assert not (tmp_path / "votes.jsonl").exists()


def test_a_torn_line_is_skipped_and_counted_and_swallows_nobody_elses_vote(tmp_path):
    store = VoteStore(tmp_path)
    first = cast(store, "one")
    whole = store.file.read_bytes()
    store.file.write_bytes(whole + whole[: len(whole) // 2])  # a writer was killed here
    assert store.read().skipped == 1
    second = cast(VoteStore(tmp_path), "two")
    read = store.read()
    assert list(read.votes) == [first, second]
    assert read.skipped == 1


@pytest.mark.parametrize(
    "line", ["[]", "null", "{}", '{"schema_version": 99}', "\xff\xfe", '{"schema_version": 1, "id": "x"}', "[" * 9000]
)
def test_lines_that_are_no_votes_are_counted(tmp_path, line):
    store = VoteStore(tmp_path)
    vote = cast(store, "one")
    with store.file.open("a", encoding="latin-1") as file:
        file.write(line + "\n")
    assert store.read().votes == (vote,)
    assert store.read().skipped == 1


def test_the_same_vote_in_two_files_counts_once(tmp_path):
    vote = cast(VoteStore(tmp_path), "one")
    VoteStore(tmp_path, "other").add(vote)
    assert len(list(tmp_path.glob("votes*.jsonl"))) == 2
    assert VoteStore(tmp_path).read().votes == (vote,)


@pytest.mark.slow
def test_two_writers_that_are_killed_lose_no_vote_that_was_stored(tmp_path):
    """Lines of 10 kB, longer than any buffer: without the lock they would be torn, without fsync-and-newline joined."""
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    command = [sys.executable, str(TESTS / "demo" / "vote_writer.py"), str(tmp_path)]
    writers = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True, env=environment) for name in ("a", "b")
    ]
    told = {writer.stdout.readline().strip() for writer in writers for _ in range(15)}
    for writer in writers:
        writer.kill()
    for writer in writers:
        told |= {line.strip() for line in writer.stdout if line.endswith("\n")}
        writer.wait()
        writer.stdout.close()
    after = cast(VoteStore(tmp_path), "after")
    read = VoteStore(tmp_path).read()
    stored = {vote.id for vote in read.votes}
    assert len(told) >= 30
    assert told | {after.id} <= stored
    assert len(stored) <= len(told) + 3  # one more each may have been stored and not yet told
    assert read.skipped <= 2


def test_on_a_full_disk_the_vote_is_refused_and_the_file_stays_as_it_was(tmp_path):
    store = VoteStore(tmp_path)
    cast(store, "one")
    before = store.file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        with pytest.raises(PageError, match="could not be stored"):
            cast(store, "two")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.file.read_bytes() == before
    assert cast(store, "three") in store.read().votes


def test_a_folder_that_another_writer_holds_is_an_error(tmp_path):
    with locked(tmp_path), pytest.raises(PageError, match="held by another writer"), locked(tmp_path, 0.05):
        pass


# ---- on the Hub ----


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def account(hub, monkeypatch):
    token = hub.add_user("ana")
    for name, value in hub.environment(token).items():
        monkeypatch.setenv(name, value)
    return token


def synced(hub, token, folder, writer, repo, lines=None):
    """A store and its dataset on the test's Hub."""
    store = VoteStore(folder, writer)
    say = (lines if lines is not None else []).append
    return store, VoteDataset(store, repo, token, say, endpoint=hub.endpoint)


def test_votes_survive_a_lost_disk_through_the_data_set(hub, account, tmp_path):
    store, dataset = synced(hub, account, tmp_path / "a", "a", "ana/votes")
    first = cast(store, "one")
    assert dataset.synchronize()
    second = cast(store, "two")
    dataset.stop()
    assert hub.repo("ana/votes", "dataset").private
    again, dataset = synced(hub, account, tmp_path / "b", "b", "ana/votes")
    assert dataset.synchronize()
    assert list(again.read().votes) == [first, second]
    third = cast(again, "three")
    assert dataset.synchronize()
    files = hub.repo("ana/votes", "dataset").files("main")
    assert {name for name in files if name.endswith(".jsonl")} == {"votes-a.jsonl", "votes-b.jsonl"}
    assert [json.loads(line)["id"] for line in files["votes-b.jsonl"].splitlines()] == [third.id]
    commits = len([record for record in hub.requests if "/commit/" in record.path])
    assert dataset.synchronize()  # nothing new: nothing is sent
    assert len([record for record in hub.requests if "/commit/" in record.path]) == commits


def test_what_a_killed_process_left_unsent_is_sent_by_the_next(hub, account, tmp_path):
    store, dataset = synced(hub, account, tmp_path, "old", "ana/leftover")
    first = cast(store, "one")
    dataset.synchronize()
    second = cast(store, "two")  # and now it is killed
    _, dataset = synced(hub, account, tmp_path, "new", "ana/leftover")
    assert dataset.synchronize()
    content = hub.repo("ana/leftover", "dataset").files("main")["votes-old.jsonl"]
    assert [json.loads(line)["id"] for line in content.splitlines()] == [first.id, second.id]
    assert list(store.read().votes) == [first, second]


def test_a_hub_that_cannot_be_reached_is_told_once_and_tried_again(hub, account, tmp_path):
    lines = []
    store, dataset = synced(hub, account, tmp_path, "a", "ana/flaky", lines)
    vote = cast(store, "one")
    hub.faults.add(kind="status", status=403, path_regex="/commit/", times=2)
    assert not dataset.synchronize()
    assert not dataset.synchronize()
    assert "the token may not do this in ana/flaky" in dataset.trouble
    assert len(lines) == 1
    assert store.read().votes == (vote,)
    assert dataset.synchronize()
    assert dataset.trouble is None
    assert len(lines) == 2
    assert b'"one"' in hub.repo("ana/flaky", "dataset").files("main")["votes-a.jsonl"]
    assert account not in "".join(lines)


def test_a_data_set_without_a_token_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILORA_VOTES_DATASET", "ana/votes")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="MINILORA_VOTES_DATASET='ana/votes': needs a token"):
        open_votes(tmp_path, print)
    monkeypatch.delenv("MINILORA_VOTES_DATASET")
    assert open_votes(tmp_path, print)[1] is None
