"""The /api routes that read or administer repositories."""

from __future__ import annotations

from typing import Any

from .accounts import HubError, check_writer
from .cards import card_of, check_card, config_of, tags_of
from .routing import API, REVISION, Answer, Call, route
from .spaces import create_space
from .store import Blob, Commit, Repo, git_oid

LISTED = ["_id", "id", "modelId", "likes", "private", "downloads", "tags", "createdAt", "sdk"]
LISTED += ["pipeline_tag", "library_name"]
FULL = ["author", "sha", "lastModified", "gated", "disabled", "siblings"]


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Answer:
    """Say who holds the token and with which role."""
    if call.caller is None:
        raise HubError(401, "Invalid username or password.")
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": call.caller.role}}
    orgs = [{"type": "org", "name": name} for name in call.caller.organizations]
    name = call.caller.name
    return Answer.of_json({"type": "user", "name": name, "fullname": name, "orgs": orgs, "auth": token})


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Answer:
    """Check a README's front matter."""
    sent = call.json()
    errors, warnings = check_card(sent.get("content", ""), sent.get("repoType") or "model")
    found = {
        name: [{"message": text} for text in texts] for name, texts in (("errors", errors), ("warnings", warnings))
    }
    return Answer.of_json(found, 400 if errors else 200)


@route("POST", "/api/repos/create")
def create_repo(call: Call) -> Answer:
    """Create a repository; one that exists is a conflict, whose answer carries its address all the same."""
    sent = call.json()
    namespace = sent.get("organization") or (call.caller.name if call.caller else "")
    check_writer(call.caller, namespace)
    kind, repo_id = sent.get("type") or "model", f"{namespace}/{sent.get('name')}"
    existing = call.hub.repos.get((kind, repo_id))
    if existing:
        answer = {"error": f"the {kind} {repo_id} exists already", "url": f"{call.hub.endpoint}/{existing.url_path}"}
        return Answer.of_json(answer, 409)
    private = sent.get("visibility") == "private" or bool(sent.get("private"))
    repo = call.hub.add_repo(repo_id, kind, private=private, sdk=sent.get("sdk"))
    if kind == "space":
        try:
            create_space(repo, sent)
        except HubError:
            del call.hub.repos[(kind, repo_id)]
            raise
    return Answer.of_json({"url": f"{call.hub.endpoint}/{repo.url_path}", "name": repo.id, "private": repo.private})


@route("DELETE", "/api/repos/delete")
def delete_repo(call: Call) -> Answer:
    """Delete a repository with everything in it."""
    sent = call.json()
    namespace = sent.get("organization") or (call.caller.name if call.caller else "")
    repo = call.hub.visible(sent.get("type") or "model", f"{namespace}/{sent.get('name')}", call.caller)
    check_writer(call.caller, repo.namespace)
    del call.hub.repos[(repo.type, repo.id)]
    return Answer(b"OK")


@route("PUT", rf"{API}/settings")
def update_settings(call: Call) -> Answer:
    """Change who sees the repository."""
    repo, sent = call.writable_repo(), call.json()
    if "visibility" in sent or "private" in sent:
        repo.private = sent.get("visibility") == "private" or bool(sent.get("private"))
    return Answer.of_json({"private": repo.private})


@route("GET", rf"{API}/auth-check(?P<write>/write)?")
def auth_check(call: Call) -> Answer:
    """Say whether the caller may read, or write."""
    (call.writable_repo if "write" in call.parts else call.repo)()
    return Answer.of_json({})


@route("GET", "/api/(?P<type>model|dataset|space)s")
def list_repos(call: Call) -> Answer:
    """Search: author, words in the id, tags, newest or most downloaded first."""
    query, asked = call.query, set(call.query.get("filter", []) if call.hub.searches_tags else [])
    words = [word.lower() for word in query.get("search", [])]
    authors, pipelines = query.get("author", []), query.get("pipeline_tag", [])
    infos = []
    for repo in call.hub.repos.values():
        if repo.type != call.parts["type"] or not call.hub.sees(call.caller, repo):
            continue
        info = describe(repo, repo.commit())
        named = all(word in repo.id.lower() for word in words) and all(repo.namespace == name for name in authors)
        if named and asked <= set(info["tags"]) and all(info.get("pipeline_tag") == name for name in pipelines):
            infos.append(info)
    key = query.get("sort", ["lastModified"])[-1]
    infos.sort(key=lambda info: info.get(key) or 0, reverse=True)
    limit = int(query.get("limit", [len(infos)])[-1])
    shown = [*LISTED, *(FULL if call.flag("full") else []), *(["cardData"] if call.flag("cardData") else [])]
    shown = (
        ["_id", "id", *query["expand"]] if "expand" in query else shown + (["config"] if call.flag("config") else [])
    )
    return Answer.of_json([{name: info[name] for name in shown if name in info} for info in infos[:limit]])


@route("GET", rf"{API}(?:/revision/{REVISION})?")
def repo_info(call: Call) -> Answer:
    """Describe a repository at a revision."""
    repo = call.repo()
    info = describe(repo, call.commit(repo), blobs=call.flag("blobs"))
    if "expand" in call.query:
        info = {name: info[name] for name in ["_id", "id", *call.query["expand"]] if name in info}
    return Answer.of_json(info)


def describe(repo: Repo, commit: Commit, blobs: bool = False) -> dict[str, Any]:
    """Return all that the API says of a repository at a commit."""
    card = card_of(commit)
    siblings = [{"rfilename": path, **(sibling(blob) if blobs else {})} for path, blob in commit.blobs.items()]
    info = {
        "_id": git_oid(f"{repo.type} {repo.id}".encode())[:24],
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.oid,
        "lastModified": commit.date,
        "createdAt": repo.created_at,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": repo.downloads,
        "likes": repo.likes,
        "trendingScore": repo.trending,
        "tags": tags_of(repo, commit),
        "cardData": card,
        "siblings": siblings,
        "usedStorage": sum(len(data) for data in repo.objects.values()),
    }
    if repo.type == "model":
        info |= {"modelId": repo.id, "config": config_of(commit)}
        info |= {name: card[name] for name in ("pipeline_tag", "library_name") if name in card}
    return info | ({"sdk": repo.sdk} if repo.sdk else {})


def sibling(blob: Blob) -> dict[str, Any]:
    """Return a file's size and ids, as a repository's description lists them."""
    entry: dict[str, Any] = {"size": len(blob.data), "blobId": blob.oid}
    if blob.lfs:
        entry["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return entry
