"""A push meets every fault at every request: it finishes, or fails with one clear line; the repo is never half-written.

`pytest -s` prints how many faults struck and how the pushes ended.
"""

from __future__ import annotations

import shutil
from collections import Counter
from contextlib import suppress

import pytest

from minilora_hub import push
from minilora_hub.errors import MiniLoraError, PublishError
from minilora_hub.publish.push.build import build

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

# What strikes once, at one request.
ONCE = {
    "lost request": {"kind": "drop"},
    "lost answer": {"kind": "drop", "applied": True},
    "429": {"kind": "status", "status": 429, "headers": {"Retry-After": "1"}},
    "503": {"kind": "status", "status": 503},
    "500 after it was done": {"kind": "status", "status": 500, "applied": True},
    "cut answer": {"kind": "truncate"},
    "slow answer": {"kind": "slow", "delay": 0.03},
}
# What strikes at one request and at every one after it.
FOR_EVER = {
    "the server is gone": {"kind": "drop", "times": None},
    "the server is down": {"kind": "status", "status": 503, "times": None},
    "the token expires": {"kind": "status", "status": 401, "times": None},
}
OLD = {"README.md": b"---\nlicense: mit\n---\nAn old card.\n", "config.json": b"{}", "mine.txt": b"mine"}


@pytest.fixture
def ready(hub, monkeypatch, trained, base_folder, tmp_path):
    """A user, and an adapter that is built already: these tests are about what comes after."""
    token = hub.add_user("ana")
    monkeypatch.setenv("HF_TOKEN", token)
    built = build(trained["dora"], tmp_path / "built", repo_id="ana/case", base_model=str(base_folder))
    monkeypatch.setattr("minilora_hub.publish.push.push.build", lambda *args, **kwargs: built)
    shutil.copytree(trained["dora"], tmp_path / "a folder")
    monkeypatch.chdir(tmp_path)
    # It asks the Hub for the base only, through the same calls as the rest; it takes longer than all of that.
    monkeypatch.setattr("minilora_hub.publish.push.push.check", lambda *args: ())
    return hub, token, built


def push_to(repo, **arguments):
    return push("a folder", repo, **{"verify": False, "progress": False} | arguments)


def count_requests(hub, repo, **arguments):
    """Push without a fault; how many requests that takes."""
    start = len(hub.requests)
    push_to(repo, **arguments)
    return len(hub.requests) - start


def strike(hub, token, built, repo, fault, **arguments):
    """Push with a fault; what became of it, once the repo was found to be either as it was or complete."""
    there = ("model", repo) in hub.repos
    before = hub.repo(repo).files("main") if there else {}
    struck = hub.faults.add(**fault)
    try:
        push_to(repo, **arguments)
        end = "finished"
    except MiniLoraError as error:
        end, line = "failed with one line", str(error)
        assert "\n" not in line
        assert token not in line
        assert 20 < len(line) < 500, line
    hub.faults.clear()
    fired = struck.fired
    now = hub.repo(repo).files("main") if ("model", repo) in hub.repos else {}
    complete = {file.path: file.sha256 for file in built.files}
    after = {path: file.sha256 for path, file in zip_files(hub, repo)} if now else {}
    is_new = complete.items() <= after.items() and all(now[name] == before[name] for name in before.keys() - complete)
    assert now == before or is_new, f"half-written after {fault}"
    if end == "finished":
        assert is_new
    # Whatever it was, it is over now, and the same push finishes.
    result = push_to(repo, **arguments)
    assert complete.items() <= {path: file.sha256 for path, file in zip_files(hub, repo)}.items()
    if arguments.get("tag"):
        assert hub.repo(repo).tags[arguments["tag"]].oid == result.commit
    return end, fired


def zip_files(hub, repo):
    return hub.repo(repo).commit("main").blobs.items()


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)], ids=["some requests", "every request"])
@pytest.mark.parametrize("new", [pytest.param(True, marks=pytest.mark.slow), False], ids=["new repo", "old repo"])
def test_every_fault_at_every_request(ready, new, every, capsys):
    """Each fault strikes at other requests, where not at every one."""
    hub, token, built = ready
    arguments = {"tag": "v1"}

    def repo_for(case):
        if not new:
            hub.add_repo(f"ana/{case}", files=OLD, private=True)
        return f"ana/{case}"

    total = count_requests(hub, repo_for("clean"), **arguments)
    ends, faults = Counter(), 0
    for position, (name, fault) in enumerate({**ONCE, **FOR_EVER}.items()):
        for nth in range(1 + position % every, total + 1, every):
            case = f"{name.replace(' ', '-')}-{nth}"
            end, fired = strike(hub, token, built, repo_for(case), {**fault, "nth": nth}, **arguments)
            assert fired, case
            ends[end if name in ONCE else f"{end}, the fault lasting"] += 1
            faults += fired
            if name == "slow answer":
                assert end == "finished"
    with capsys.disabled():
        what = "a new repo" if new else "an old repo"
        print(f"\n{what}: {total} requests, {faults} faults in {sum(ends.values())} pushes: {dict(ends)}")
    once = sum(count for end, count in ends.items() if not end.endswith("the fault lasting"))
    assert once >= total * len(ONCE) // every - len(ONCE)
    # Nearly every single fault is survived: what must not be sent twice is looked up instead.
    assert ends["finished"] >= 0.9 * once


def test_a_pull_request_is_not_opened_twice(ready):
    """Its answer is lost after it was opened: it is found again."""
    hub, _, _ = ready
    for count, fault in enumerate([ONCE["lost answer"], ONCE["500 after it was done"], ONCE["lost request"]]):
        hub.add_repo(f"ana/pr{count}", files=OLD, private=True)
        struck = hub.faults.add(path_regex="/commit/", **fault)
        result = push_to(f"ana/pr{count}", create_pr=True)
        repo = hub.repo(f"ana/pr{count}")
        assert (struck.fired, list(repo.pulls)) == (1, [1])
        assert (repo.commit("refs/pr/1").oid, repo.files("main")) == (result.commit, OLD)
        assert result.url.endswith("/discussions/1")


@pytest.mark.parametrize("create_pr", [True, False])
@pytest.mark.parametrize("status", [409, 412])
def test_a_conflict_where_nobody_has_committed_is_not_told_as_one(ready, status, create_pr):
    """In the Hub's own words: it may take no pull requests, or refuse for another reason."""
    hub, _, _ = ready
    repo = hub.add_repo("ana/case", files=OLD, private=True)
    hub.faults.add(kind="status", status=status, path_regex="/commit/", times=None)
    what = "opening the pull request" if create_pr else "sending the files"
    with pytest.raises(
        PublishError, match=rf"^{what}: the Hub refused it \(HTTP {status}: an injected fault\)"
    ) as told:
        push_to("ana/case", create_pr=create_pr)
    assert "somebody else" not in str(told.value)
    assert (repo.files(), repo.pulls) == (OLD, {})


def test_a_hub_that_commits_to_the_branch_instead_is_told(ready, monkeypatch):
    """Which only the answer to the commit tells, where it lists pull requests all the same."""
    hub, _, _ = ready
    hub.add_repo("ana/case", files=OLD, private=True)
    monkeypatch.setattr("minilora_hub.hub.client.require_pull_requests", lambda *args: None)
    monkeypatch.setattr("minilora_hub.publish.push.commit._pull_requests", lambda *args: {})
    hub.pull_requests = "ignored"
    with pytest.raises(PublishError, match="has opened no pull request: it has committed to main of ana/case itself"):
        push_to("ana/case", create_pr=True)


@pytest.mark.parametrize("times", [1, None])
def test_bytes_that_change_on_the_way(ready, times):
    """The Hub refuses them, and the repo is as it was."""
    hub, _, _ = ready
    hub.add_repo("ana/case", files=OLD, private=True)
    hub.faults.add(kind="corrupt", method="PUT", times=times)
    with pytest.raises(PublishError, match=r"HTTP 400.*sha256.*nothing was changed") as caught:
        push_to("ana/case")
    assert "\n" not in str(caught.value)
    assert hub.repo("ana/case").files("main") == OLD
    hub.faults.clear()
    push_to("ana/case")


def meanwhile(deed):
    """A `confirm` that says yes after somebody did something."""
    return lambda plan: deed() or True


def test_a_commit_of_somebody_else_is_reported_and_not_overwritten(ready):
    hub, _, _ = ready
    repo = hub.add_repo("ana/case", files=OLD, private=True)
    theirs = {**OLD, "config.json": b'{"theirs": true}'}
    with pytest.raises(PublishError, match=r"ana/case has received another commit meanwhile.*nothing was overwritten"):
        push_to("ana/case", confirm=meanwhile(lambda: repo.push(theirs) and None))
    assert repo.files("main") == theirs
    push_to("ana/case")
    assert repo.files("main")["mine.txt"] == b"mine"


def test_a_repo_that_is_deleted_meanwhile(ready):
    hub, _, _ = ready
    hub.add_repo("ana/case", files=OLD, private=True)
    with pytest.raises(PublishError, match="ana/case was deleted"):
        push_to("ana/case", confirm=meanwhile(lambda: hub.repos.pop(("model", "ana/case")) and None))
    assert ("model", "ana/case") not in hub.repos
    push_to("ana/case")


def test_a_repo_that_somebody_makes_meanwhile(ready):
    hub, _, _ = ready
    with pytest.raises(PublishError, match="ana/case was created by another process meanwhile"):
        push_to("ana/case", confirm=meanwhile(lambda: hub.add_repo("ana/case", files=OLD, private=True) and None))
    assert hub.repo("ana/case").files("main") == OLD


def test_a_token_that_expires_meanwhile(ready):
    hub, token, _ = ready
    hub.add_repo("ana/case", files=OLD, private=True)
    with pytest.raises(PublishError, match="the token is not valid") as caught:
        push_to("ana/case", confirm=meanwhile(lambda: hub.expire(token)))
    assert token not in str(caught.value)
    assert hub.repo("ana/case").files("main") == OLD


# An interrupt may also strike in a destructor, where Python only reports it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)], ids=["some requests", "every request"])
def test_ctrl_c_at_every_request(ready, monkeypatch, every):
    """An interrupt leaves the repo as it was or complete, and nothing behind on the disk."""
    import tempfile

    hub, _, built = ready
    scratch = built.folder.parent / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    total = count_requests(hub, "ana/clean")
    take = hub.faults.take

    for nth in range(0, total, every):
        hub.add_repo(f"ana/case-{nth}", files=OLD, private=True)
        seen = []

        def interrupting(method, path, seen=seen, nth=nth):
            seen.append(path)
            if len(seen) == nth + 1:
                interrupt_main_thread()
            return take(method, path)

        monkeypatch.setattr(hub.faults, "take", interrupting)
        with suppress(KeyboardInterrupt, MiniLoraError):
            push_to(f"ana/case-{nth}")
        monkeypatch.setattr(hub.faults, "take", take)
        files = hub.repo(f"ana/case-{nth}").files("main")
        assert files == OLD or {file.path for file in built.files} <= files.keys()
        assert not list(scratch.iterdir())
        push_to(f"ana/case-{nth}")


def interrupt_main_thread():
    import _thread

    _thread.interrupt_main()
