"""The /api routes over branches, tags and pull requests."""

from __future__ import annotations

from collections.abc import Iterable

from .accounts import HubError
from .routing import API, REVISION, Answer, Call, route
from .store import Commit


@route("GET", rf"{API}/refs")
def list_refs(call: Call) -> Answer:
    """List branches, tags and pull requests."""
    repo = call.repo()

    def refs(heads: Iterable[tuple[str, Commit]], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": head.oid} for name, head in heads]

    found = {"branches": refs(repo.branches.items(), "refs/heads/"), "tags": refs(repo.tags.items(), "refs/tags/")}
    pulls = [(str(number), pull.head) for number, pull in repo.pulls.items()]
    proposed = {} if call.hub.pull_requests == "ignored" else {"pullRequests": refs(pulls, "refs/pr/")}
    return Answer.of_json({**found, "converts": [], **proposed})


@route("GET", rf"{API}/discussions")
def list_discussions(call: Call) -> Answer:
    """List the open pull requests; there are no plain discussions."""
    repo = call.repo()
    if call.hub.pull_requests == "refused":
        raise HubError(403, "Pull requests are disabled for this repository")
    if call.hub.pull_requests == "ignored":
        raise HubError(404, "no such page")
    found = [
        {
            "num": pull.number,
            "title": pull.title,
            "author": {"name": pull.author},
            "createdAt": pull.date,
            "status": "open",
            "isPullRequest": True,
            "repo": {"name": repo.id, "type": repo.type},
        }
        for pull in repo.pulls.values()
    ]
    return Answer.of_json({"discussions": found, "count": len(found), "start": 0})


@route("POST", rf"{API}/branch/(?P<name>.+)")
def create_branch(call: Call) -> Answer:
    """Create a branch at `startingPoint`, else at main."""
    repo, name = call.writable_repo(), call.parts["name"]
    if name in repo.branches:
        raise HubError(409, f"the branch {name} exists already")
    repo.branches[name] = repo.commit(call.json().get("startingPoint") or "main")
    return Answer.of_json({})


@route("DELETE", rf"{API}/branch/(?P<name>.+)")
def delete_branch(call: Call) -> Answer:
    """Delete a branch other than main."""
    repo, name = call.writable_repo(), call.parts["name"]
    if name == "main":
        raise HubError(403, "the branch main cannot be deleted")
    if repo.branches.pop(name, None) is None:
        raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return Answer.of_json({})


@route("POST", rf"{API}/tag/{REVISION}")
def create_tag(call: Call) -> Answer:
    """Tag a revision."""
    repo, name = call.writable_repo(), call.json().get("tag", "")
    if not name or name in repo.tags:
        raise HubError(409 if name else 400, f"the tag {name!r} exists already or is empty")
    repo.tags[name] = call.commit(repo)
    return Answer.of_json({})


@route("DELETE", rf"{API}/tag/{REVISION}")
def delete_tag(call: Call) -> Answer:
    """Delete a tag."""
    repo, name = call.writable_repo(), call.parts["revision"]
    if repo.tags.pop(name, None) is None:
        raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return Answer.of_json({})
