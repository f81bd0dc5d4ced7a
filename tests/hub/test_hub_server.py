"""The real huggingface_hub client against the test Hub."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .server import HubServer

# The client uploads LFS files with an argument that its own HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = b"""---
base_model: ana/base
base_model_relation: adapter
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
language: en
datasets: [ana/questions]
tags: [mixlora, dora]
---
An adapter.
"""
WEIGHTS = bytes(range(256)) * 64


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Serve an empty Hub to a client in process: no Xet, no progress bars, no waits between its retries."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    impatient = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
    monkeypatch.setattr("huggingface_hub.file_download.time", impatient)
    with HubServer(lfs_threshold=10_000) as server:
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def ana(hub: HubServer) -> HfApi:
    """Return the client of a user who may write."""
    return HfApi(endpoint=hub.endpoint, token=hub.add_user("ana"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a card, a config and weights."""
    folder = tmp_path / "adapter"
    (folder / "experts").mkdir(parents=True)
    (folder / "README.md").write_bytes(CARD)
    (folder / "config.json").write_text('{"model_type": "mixlora", "auto_map": {"AutoConfig": "c.C"}}')
    (folder / "experts" / "up.safetensors").write_bytes(WEIGHTS)
    return folder


def add(path: str, data: bytes) -> CommitOperationAdd:
    """Return the operation that adds a file."""
    return CommitOperationAdd(path, data)


def contents(folder: str | Path) -> dict[str, bytes]:
    """Return the bytes of every file under a folder."""
    root = Path(folder)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
def test_folder_round_trip(hub: HubServer, ana: HfApi, folder: Path, tmp_path: Path, repo_type: str) -> None:
    """What is uploaded is what a snapshot and a single download return."""
    sdk = "gradio" if repo_type == "space" else None
    url = ana.create_repo("ana/a", repo_type=repo_type, space_sdk=sdk)
    assert (url.repo_id, url.repo_type) == ("ana/a", repo_type)
    (folder / "notes.txt").write_bytes(b"n" * 10_001)
    if repo_type == "space":  # whose front matter the Hub checks
        front = "sdk: gradio\nemoji: x\ncolorFrom: red\ncolorTo: blue\n"
        (folder / "README.md").write_text(f"---\n{front}---\n", encoding="utf-8")
    ana.upload_folder(repo_id="ana/a", folder_path=folder, repo_type=repo_type)
    repo = hub.repo("ana/a", repo_type)
    assert repo.files() == contents(folder)
    assert [path for path, blob in repo.commit().blobs.items() if blob.lfs] == ["experts/up.safetensors", "notes.txt"]
    cache = tmp_path / "cache"
    snapshot = ana.snapshot_download("ana/a", repo_type=repo_type, cache_dir=cache)
    assert contents(snapshot) == {path: blob.data for path, blob in repo.commit().blobs.items()}
    one = ana.hf_hub_download("ana/a", "experts/up.safetensors", repo_type=repo_type, cache_dir=tmp_path / "other")
    assert Path(one).read_bytes() == WEIGHTS
    assert Path(one).resolve().name == hashlib.sha256(WEIGHTS).hexdigest()
    assert Path(one).parents[1].name == repo.commit().oid


def test_unchanged_lfs_file_is_not_sent_again(hub: HubServer, ana: HfApi, folder: Path) -> None:
    """The second upload of the same folder sends no blob and makes no commit."""
    ana.create_repo("ana/a")
    first = ana.upload_folder(repo_id="ana/a", folder_path=folder)
    assert [(put.bytes_in, put.status) for put in hub.sent("PUT")] == [(len(WEIGHTS), 200)]
    assert ana.upload_folder(repo_id="ana/a", folder_path=folder).oid == first.oid
    ana.create_commit("ana/a", [add("again.bin", WEIGHTS)], commit_message="the same bytes elsewhere")
    assert len(hub.sent("PUT")) == 1
    assert [commit.title for commit in hub.repo("ana/a").commits()][:1] == ["the same bytes elsewhere"]
    assert len(hub.repo("ana/a").commits()) == 3


def test_create_delete_and_visibility(hub: HubServer, ana: HfApi) -> None:
    """A repository is created once, hidden or shown, and deleted."""
    ana.create_repo("ana/a", private=True)
    assert ana.create_repo("ana/a", exist_ok=True).repo_id == "ana/a"
    with pytest.raises(HfHubHTTPError, match="409"):
        ana.create_repo("ana/a")
    ana.update_repo_settings("ana/a", private=False)
    assert HfApi(endpoint=hub.endpoint, token=False).model_info("ana/a").private is False
    ana.delete_repo("ana/a")
    assert not ana.repo_exists("ana/a")
    ana.delete_repo("ana/a", missing_ok=True)


def test_private_repository_is_hidden(hub: HubServer, ana: HfApi, tmp_path: Path) -> None:
    """A private repository looks missing to everyone but its owner."""
    hub.add_repo("ana/hidden", private=True, files={"a.txt": b"a"})
    nobody = HfApi(endpoint=hub.endpoint, token=False)
    ben = HfApi(endpoint=hub.endpoint, token=hub.add_user("ben"))
    for stranger in (nobody, ben):
        with pytest.raises(RepositoryNotFoundError):
            stranger.model_info("ana/hidden")
        with pytest.raises(RepositoryNotFoundError):
            stranger.hf_hub_download("ana/hidden", "a.txt", cache_dir=tmp_path)
        assert list(stranger.list_models(author="ana")) == []
    assert [info.id for info in ana.list_models(author="ana")] == ["ana/hidden"]
    assert {record.user for record in hub.requests} == {None, "ana", "ben"}
    assert {record.status for record in hub.sent(path_regex="ana/hidden")} == {401, 404}


def test_roles_and_tokens(hub: HubServer) -> None:
    """A read token cannot write, nor can another user; an expired token is told apart from a hidden repository."""
    hub.add_repo("ana/a")
    hub.add_repo("team/a")
    token = hub.add_user("ana", role="read", organizations=("team",))
    reader = HfApi(endpoint=hub.endpoint, token=token)
    ben = HfApi(endpoint=hub.endpoint, token=hub.add_user("ben"))
    assert reader.whoami()["auth"]["accessToken"]["role"] == "read"
    assert [org["name"] for org in reader.whoami()["orgs"]] == ["team"]
    for api in (reader, ben):
        with pytest.raises(HfHubHTTPError, match="403"):
            api.create_commit("ana/a", [add("a.txt", b"a")], commit_message="a")
    with pytest.raises(HfHubHTTPError, match="403"):
        reader.create_repo("ana/new")
    writer = HfApi(endpoint=hub.endpoint, token=hub.add_user("ana", organizations=("team",)))
    writer.create_commit("team/a", [add("a.txt", b"a")], commit_message="a")
    hub.expire(token)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        reader.model_info("ana/a")
    assert not isinstance(caught.value, RepositoryNotFoundError)
    assert token not in repr(hub.requests)


def test_parent_commit_conflict(hub: HubServer, ana: HfApi) -> None:
    """A commit on a parent that is no longer the head is refused and changes nothing."""
    repo = hub.add_repo("ana/a", files={"a.txt": b"1"})
    seen = repo.commit().oid
    head = repo.push({"a.txt": b"2"}, "somebody else")
    with pytest.raises(HfHubHTTPError, match="412") as caught:
        ana.create_commit("ana/a", [add("a.txt", b"3")], commit_message="late", parent_commit=seen)
    assert caught.value.response.status_code == 412
    assert repo.commit().oid == head
    ana.create_commit("ana/a", [add("a.txt", b"3")], commit_message="in time", parent_commit=head)
    assert repo.files() == {"a.txt": b"3"}


def test_operations(hub: HubServer, ana: HfApi) -> None:
    """Files and folders are added, copied and deleted in one commit; a missing one is an error."""
    repo = hub.add_repo("ana/a", files={"a.txt": b"a", "old/x.txt": b"x", "old/y.txt": b"y", "w.bin": WEIGHTS})
    operations = [
        CommitOperationCopy("a.txt", "b.txt"),
        CommitOperationCopy("w.bin", "v.bin"),
        CommitOperationDelete("old/"),
        CommitOperationDelete("w.bin"),
    ]
    ana.create_commit("ana/a", operations, commit_message="tidy", commit_description="up")
    assert repo.files() == {"a.txt": b"a", "b.txt": b"a", "v.bin": WEIGHTS}
    newest = ana.list_repo_commits("ana/a")[0]
    assert (newest.title, newest.message, newest.authors) == ("tidy", "up", ["ana"])
    with pytest.raises(EntryNotFoundError, match="trailing"):
        ana.delete_file("missing.txt", "ana/a")


def test_gitignore(hub: HubServer, ana: HfApi) -> None:
    """What the .gitignore in a commit leaves out is not sent."""
    repo = hub.add_repo("ana/a")
    names = ["run.log", "keep.log", "tmp/a.txt", "a/tmp/b.txt", "c.txt"]
    rules = b"# logs\n*.log\n!keep.log\ntmp/\n"
    operations = [add(".gitignore", rules), *(add(name, b"x") for name in names)]
    ana.create_commit("ana/a", operations, commit_message="all")
    assert set(repo.files()) == {".gitignore", "keep.log", "c.txt"}


def test_revisions(hub: HubServer, ana: HfApi, tmp_path: Path) -> None:
    """Branches, tags, pull requests and commits each resolve to their own commit."""
    repo = hub.add_repo("ana/a", files={"a.txt": b"1"})
    first = repo.commit().oid
    ana.create_tag("ana/a", tag="v1")
    ana.create_branch("ana/a", branch="next/one")
    ana.create_branch("ana/a", branch="next/one", exist_ok=True)
    ana.create_commit("ana/a", [add("a.txt", b"2")], commit_message="2", revision="next/one")
    ben = HfApi(endpoint=hub.endpoint, token=hub.add_user("ben"))
    operations = [add("a.txt", b"3"), add("w.bin", WEIGHTS)]
    pull = ben.create_commit("ana/a", operations, commit_message="3", create_pr=True)
    assert (pull.pr_num, pull.pr_revision) == (1, "refs/pr/1")
    expected = {"main": b"1", "v1": b"1", first: b"1", "next/one": b"2", "refs/pr/1": b"3", pull.oid: b"3"}
    for revision, data in expected.items():
        path = ana.hf_hub_download("ana/a", "a.txt", revision=revision, cache_dir=tmp_path)
        assert (Path(path).read_bytes(), Path(path).parent.name) == (data, repo.commit(revision).oid)
        assert ana.model_info("ana/a", revision=revision).sha == repo.commit(revision).oid
    refs = ana.list_repo_refs("ana/a", include_pull_requests=True)
    assert [ref.name for ref in refs.branches] == ["main", "next/one"]
    assert [(ref.ref, ref.target_commit) for ref in refs.tags] == [("refs/tags/v1", first)]
    assert [ref.ref for ref in refs.pull_requests or []] == ["refs/pr/1"]
    assert [found.title for found in ana.get_repo_discussions("ana/a")] == ["3"]
    ana.delete_tag("ana/a", tag="v1")
    ana.delete_branch("ana/a", branch="next/one")
    for revision in ("v1", "next/one", "never"):
        with pytest.raises(RevisionNotFoundError):
            ana.model_info("ana/a", revision=revision)
    with pytest.raises(HfHubHTTPError, match="409"):
        ana.create_branch("ana/a", branch="main")


def test_search(hub: HubServer, ana: HfApi, folder: Path) -> None:
    """A search finds models by the tags of their cards, their author and their name."""
    hub.add_repo("ana/adapter", files=contents(folder))
    hub.add_repo("ben/other", files={"README.md": b"---\ntags: [mixlora]\n---\n"}).downloads = 5
    hub.add_repo("ben/secret", files=contents(folder), private=True)

    def found(**query: object) -> list[str]:
        return [info.id for info in ana.list_models(**query)]

    assert found(filter="base_model:ana/base") == ["ana/adapter"]
    assert found(filter=["base_model:adapter:ana/base", "mixlora"]) == ["ana/adapter"]
    assert found(filter=["base_model:finetune:ana/base"]) == []
    assert found(filter="mixlora") == ["ben/other", "ana/adapter"]
    assert found(search="ADAPT") == ["ana/adapter"]
    assert found(author="ben") == ["ben/other"]
    assert found(sort="downloads", limit=1) == ["ben/other"]
    assert found(pipeline_tag="text-generation") == ["ana/adapter"]
    hub.repo("ana/adapter").push({"new.txt": b""})
    assert found(sort="last_modified") == ["ana/adapter", "ben/other"]
    info = next(iter(ana.list_models(author="ana", full=True, cardData=True)))
    assert {"dataset:ana/questions", "license:apache-2.0", "en", "custom_code", "safetensors"} <= set(info.tags or [])
    assert (info.library_name, info.card_data.base_model) == ("transformers", "ana/base")


def test_description(hub: HubServer, ana: HfApi, folder: Path) -> None:
    """A repository's description, tree and paths agree on sizes and ids."""
    repo = hub.add_repo("ana/a", files=contents(folder))
    info = ana.model_info("ana/a", files_metadata=True)
    weights = next(file for file in info.siblings or [] if file.rfilename == "experts/up.safetensors")
    assert weights.lfs is not None
    assert (weights.size, weights.lfs.sha256) == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    assert info.last_modified is not None
    assert info.model_index is None
    flat = [item.path for item in ana.list_repo_tree("ana/a")]
    assert flat == [".gitattributes", "README.md", "config.json", "experts"]
    assert [item.path for item in ana.list_repo_tree("ana/a", "experts")] == ["experts/up.safetensors"]
    deep = list(ana.list_repo_tree("ana/a", recursive=True, expand=True))
    assert deep[-1].path == "experts/up.safetensors"
    assert deep[-1].last_commit is not None
    assert deep[-1].last_commit.oid == repo.commit().oid
    paths = ana.get_paths_info("ana/a", ["experts", "config.json", "missing"])
    assert [item.path for item in paths] == ["experts", "config.json"]
    with pytest.raises(EntryNotFoundError):
        list(ana.list_repo_tree("ana/a", "additional_chat_templates"))
    with pytest.raises(EntryNotFoundError):
        ana.hf_hub_download("ana/a", "missing.json", cache_dir=folder.parent / "cache")
    assert ana.file_exists("ana/a", "config.json")
    ana.auth_check("ana/a", write=True)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (b"---\nbase_model: /home/someone/model\n---\n", "/home/someone/model"),
        (b"---\ntags: [\n---\n", "not YAML"),
        (b"---\nbase_model_relation: cousin\n---\n", "cousin"),
    ],
)
def test_bad_card(hub: HubServer, ana: HfApi, card: bytes, message: str) -> None:
    """A card that the Hub would refuse is refused before anything is uploaded."""
    repo = hub.add_repo("ana/a")
    with pytest.raises(ValueError, match=message):
        ana.create_commit("ana/a", [add("README.md", card)], commit_message="card")
    assert repo.files() == {}
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        ana.create_commit("ana/a", [add("README.md", b"no front matter")], commit_message="card")


def test_ranges(hub: HubServer) -> None:
    """Byte ranges answer with their part, and a range outside the file with 416."""
    hub.add_repo("ana/a", files={"w.bin": WEIGHTS})
    session, url = huggingface_hub.get_session(), f"{hub.endpoint}/ana/a/resolve/main/w.bin"
    for asked, part in (("0-3", WEIGHTS[:4]), ("100-", WEIGHTS[100:]), ("-5", WEIGHTS[-5:])):
        response = session.get(url, headers={"Range": f"bytes={asked}"})
        assert (response.status_code, response.content) == (206, part)
    assert session.get(url, headers={"Range": "bytes=99999-"}).status_code == 416
    head = session.head(url)
    assert head.headers["X-Linked-Size"] == head.headers["Content-Length"] == str(len(WEIGHTS))


def test_interrupted_download_resumes(
    hub: HubServer, ana: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download cut in the middle goes on from where it stopped."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 2**14)  # what is kept of a cut download
    data = WEIGHTS * 20
    hub.add_repo("ana/a", files={"w.bin": data})
    hub.faults.add(kind="truncate", method="GET", path_regex="w.bin$")
    path = ana.hf_hub_download("ana/a", "w.bin", cache_dir=tmp_path)
    assert Path(path).read_bytes() == data
    first, second = hub.sent("GET", "w.bin$")
    assert (first.range, first.bytes_out) == (None, len(data) // 2)
    assert (second.status, second.range) == (206, f"bytes={len(data) // 2}-")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_status_fault_is_retried(hub: HubServer, ana: HfApi, status: int) -> None:
    """The client retries a batch that met 429 or a server error."""
    repo = hub.add_repo("ana/a")
    fault = hub.faults.add(
        kind="status", method="POST", path_regex="/preupload/", status=status, headers={"Retry-After": "0"}, times=2
    )
    ana.create_commit("ana/a", [add("a.txt", b"a")], commit_message="a")
    assert (repo.files(), fault.fired) == ({"a.txt": b"a"}, 2)
    assert [record.status for record in hub.sent("POST", "/preupload/")] == [status, status, 200]


def test_status_fault_is_raised(hub: HubServer, ana: HfApi) -> None:
    """A request the client does not retry raises, and once the fault is spent it works."""
    repo = hub.add_repo("ana/a")
    hub.faults.add(kind="status", path_regex="/commit/main", status=503)
    with pytest.raises(HfHubHTTPError, match="injected fault"):
        ana.create_commit("ana/a", [add("a.txt", b"a")], commit_message="a")
    assert repo.files() == {}
    ana.create_commit("ana/a", [add("a.txt", b"a")], commit_message="a")
    assert repo.files() == {"a.txt": b"a"}


def test_lost_answer(hub: HubServer, ana: HfApi) -> None:
    """An applied drop loses the answer of a commit that took effect."""
    repo = hub.add_repo("ana/a")
    hub.faults.add(kind="drop", path_regex="/commit/main", applied=True)
    with pytest.raises(Exception, match="disconnected"):
        ana.create_commit("ana/a", [add("a.txt", b"a")], commit_message="a")
    assert repo.files() == {"a.txt": b"a"}


def test_disk_full(hub: HubServer, ana: HfApi) -> None:
    """A full disk refuses the blob, and then there is no commit."""
    repo = hub.add_repo("ana/a")
    hub.faults.add(kind="status", method="PUT", status=507, times=None)
    with pytest.raises(RuntimeError, match=r"w\.bin") as caught:
        ana.create_commit("ana/a", [add("w.bin", WEIGHTS)], commit_message="w")
    assert "507" in str(caught.value.__cause__)
    assert (repo.files(), repo.objects) == ({}, {})


def test_dropped_connection_at_the_nth_request(hub: HubServer, ana: HfApi) -> None:
    """The second of two uploads loses its connection and is sent again."""
    repo = hub.add_repo("ana/a")
    hub.faults.add(kind="drop", method="PUT", nth=2)
    for name in ("one.bin", "two.bin"):
        ana.create_commit("ana/a", [add(name, name.encode() * 500)], commit_message=name)
    assert [record.status for record in hub.sent("PUT")] == [200, 0, 200]
    assert set(repo.files()) == {"one.bin", "two.bin"}


def test_corrupt_upload_is_refused(hub: HubServer, ana: HfApi) -> None:
    """Bytes that changed on the way do not become the object they claim to be."""
    repo = hub.add_repo("ana/a")
    hub.faults.add(kind="corrupt", method="PUT")
    with pytest.raises(RuntimeError) as caught:
        ana.create_commit("ana/a", [add("w.bin", WEIGHTS)], commit_message="w")
    assert isinstance(caught.value.__cause__, BadRequestError)
    assert repo.objects == {}


def test_corrupt_download(hub: HubServer, ana: HfApi, tmp_path: Path) -> None:
    """A corrupted download has the right size and the wrong bytes, which the client does not notice."""
    hub.add_repo("ana/a", files={"w.bin": WEIGHTS})
    hub.faults.add(kind="corrupt", method="GET", path_regex="w.bin$")
    data = Path(ana.hf_hub_download("ana/a", "w.bin", cache_dir=tmp_path)).read_bytes()
    assert len(data) == len(WEIGHTS)
    assert sum(a != b for a, b in zip(data, WEIGHTS, strict=True)) == 1


def test_slow_answer(hub: HubServer, ana: HfApi) -> None:
    """A slow answer runs into the client's timeout."""
    hub.add_repo("ana/a")
    fault = hub.faults.add(kind="slow", path_regex="^/api/models/ana/a$", delay=0.15)
    with pytest.raises(Exception, match="timed out"):
        ana.model_info("ana/a", timeout=0.05)
    assert fault.fired == 1
    assert ana.model_info("ana/a", timeout=5).id == "ana/a"


def test_unknown_fault_kind(hub: HubServer) -> None:
    """A misspelt kind of fault is an error, not a fault that never strikes."""
    with pytest.raises(ValueError, match="'dropp'"):
        hub.faults.add(kind="dropp")


def test_failure_of_the_server_itself_is_seen() -> None:
    """A mistake in a route fails the test that met it, instead of passing for a server error."""
    hub = HubServer()
    hub.repos["model", "ana/a"] = None.__class__  # type: ignore[assignment]

    def meet_the_mistake() -> None:
        with hub:
            assert huggingface_hub.get_session().get(f"{hub.endpoint}/api/models/ana/a").status_code == 500

    with pytest.raises(AssertionError, match="the test Hub itself failed"):
        meet_the_mistake()
    huggingface_hub.close_session()


def test_subprocess_environment(hub: HubServer, tmp_path: Path) -> None:
    """A process with the environment uses this Hub, its token and its cache."""
    hub.add_repo("ana/hidden", private=True, files={"w.bin": WEIGHTS})
    script = "import huggingface_hub as h; print(h.hf_hub_download('ana/hidden', 'w.bin'))"
    environment = {**os.environ, **hub.environment(hub.add_user("ana"), cache_dir=tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    path = Path(done.stdout.strip())
    assert path.is_relative_to(tmp_path)
    assert path.read_bytes() == WEIGHTS
