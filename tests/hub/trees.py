"""The /api routes over a repository's git side: trees, paths, commits."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs

from .accounts import HubError
from .routing import API, REVISION, Answer, Call, route
from .store import Commit, git_oid


@route("GET", rf"{API}/tree/{REVISION}(?:/(?P<path>.+))?")
def tree(call: Call) -> Answer:
    """List a folder, with `recursive` all below it."""
    repo, folder = call.repo(), call.parts.get("path", "").strip("/")
    commit = call.commit(repo)
    prefix = folder + "/" if folder else ""
    paths = [path for path in all_paths(commit) if path.startswith(prefix)]
    if not paths and folder:
        raise HubError(404, f"{folder} is no folder at {commit.oid}", "EntryNotFound", {"X-Repo-Commit": commit.oid})
    if not call.flag("recursive"):
        paths = [path for path in paths if "/" not in path.removeprefix(prefix)]
    return Answer.of_json([entry(commit, path, call.flag("expand")) for path in paths])


@route("POST", rf"{API}/paths-info/{REVISION}")
def paths_info(call: Call) -> Answer:
    """Describe the paths asked for, leaving out those that are not there."""
    commit = call.commit(call.repo())
    if "json" in call.headers.get("Content-Type", ""):
        asked, expand = call.json().get("paths", []), bool(call.json().get("expand"))
    else:
        form = parse_qs(call.body.decode())
        asked, expand = form.get("paths", []), form.get("expand", [""])[-1].lower() in {"1", "true"}
    known = set(all_paths(commit))
    return Answer.of_json([entry(commit, path, expand) for path in asked if path in known])


def all_paths(commit: Commit) -> list[str]:
    """Return every file and folder of a commit, in order."""
    folders = {path.rsplit("/", depth)[0] for path in commit.blobs for depth in range(1, path.count("/") + 1)}
    return sorted([*commit.blobs, *folders])


def entry(commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    """Describe one file or folder; with `expand`, also the commit that last touched it."""
    blob = commit.blobs.get(path)
    if blob is None:
        found: dict[str, Any] = {"type": "directory", "oid": state(commit, path), "size": 0, "path": path}
    else:
        found = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path}
        if blob.lfs:
            found["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    if expand:
        line = commit.history()
        last = next(c for c in line if c.parent is None or state(c.parent, path) != state(commit, path))
        found["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
    return found


def state(commit: Commit, path: str) -> str:
    """Return an id of what `path`, a file or a folder, holds at a commit."""
    inside = {name: blob.oid for name, blob in commit.blobs.items() if name == path or name.startswith(path + "/")}
    return git_oid(repr(sorted(inside.items())).encode(), "tree")


@route("GET", rf"{API}/commits/{REVISION}")
def list_commits(call: Call) -> Answer:
    """List a revision's commits, newest first."""
    return Answer.of_json(
        [
            {"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
            for c in call.commit(call.repo()).history()
        ]
    )
