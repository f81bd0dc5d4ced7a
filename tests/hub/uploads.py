"""Upload routes: preupload, the LFS batch with its PUT and verify, and the commit itself."""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import json
from typing import Any

from .accounts import HubError
from .cards import check_card
from .routing import API, REPO, REVISION, Answer, Call, route
from .store import Blob, Commit, Repo

LFS = rf"/(?:(?P<type>dataset|space)s/)?{REPO}\.git/info/lfs/objects"


def ignored(path: str, gitignore: str) -> bool:
    """Whether the lines of a .gitignore leave `path` out: names, globs, folders and negations."""
    out = False
    for line in gitignore.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        keep, pattern = pattern.startswith("!"), pattern.removeprefix("!")
        folder, pattern = pattern.endswith("/"), pattern.rstrip("/")
        anchored, pattern = "/" in pattern, pattern.removeprefix("/")
        parts = path.split("/")
        stop = len(parts) if not folder else len(parts) - 1
        prefixes = ["/".join(parts[: end + 1]) if anchored else parts[end] for end in range(stop)]
        if any(fnmatch.fnmatchcase(prefix, pattern) for prefix in prefixes):
            out = not keep
    return out


@route("POST", rf"{API}/preupload/{REVISION}")
def preupload(call: Call) -> Answer:
    """Say of each file whether it goes through LFS, is ignored, and what the repository already holds there."""
    repo, sent = call.proposable_repo() if call.create_pr else call.writable_repo(), call.json()
    revision = call.parts["revision"]
    blobs = call.commit(repo).blobs
    gitignore = sent.get("gitIgnore") or blobs.get(".gitignore", Blob(b"")).data.decode()
    answers = []
    for file in sent["files"]:
        path, sample = file["path"], base64.b64decode(file.get("sample", ""))
        lfs = repo.lfs_by_name(path, revision) or file["size"] > call.hub.lfs_threshold or b"\0" in sample
        answer = {
            "path": path,
            "uploadMode": "lfs" if lfs else "regular",
            "shouldIgnore": ignored(path, gitignore),
            "oid": blobs[path].etag if path in blobs else None,
        }
        answers.append(answer)
    return Answer.of_json({"files": answers, "commitOid": call.commit(repo).oid})


@route("POST", rf"{LFS}/batch")
def lfs_batch(call: Call) -> Answer:
    """Answer where to put each object; one the repository already has gets no upload action."""
    sent = call.json()
    # The client names no ref when it uploads for a pull request.
    repo = call.writable_repo() if "ref" in sent else call.proposable_repo()
    if sent.get("operation") != "upload" or "basic" not in sent.get("transfers", ["basic"]):
        raise HubError(422, f"only basic uploads are served, got {sent.get('operation')} {sent.get('transfers')}")
    objects = []
    for asked in sent["objects"]:
        entry: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in repo.objects:
            put = f"{call.hub.endpoint}/_lfs/{repo.type}s/{repo.id}/{asked['oid']}"
            query = f"?size={asked['size']}&signature={call.hub.sign(repo, asked['oid'])}"
            verify = f"{call.hub.endpoint}/{repo.url_path}.git/info/lfs/objects/verify"
            entry["actions"] = {"upload": {"href": put + query, "header": {}}, "verify": {"href": verify, "header": {}}}
        objects.append(entry)
    return Answer.of_json({"transfer": "basic", "objects": objects})


@route("PUT", rf"/_lfs/(?P<type>model|dataset|space)s/{REPO}/(?P<oid>[0-9a-f]{{64}})")
def lfs_put(call: Call) -> Answer:
    """Take an object's bytes, at an address that is its own permission, and refuse any other bytes."""
    repo, oid = call.hub.repos.get((call.parts["type"], call.parts["id"])), call.parts["oid"]
    if repo is None or call.query.get("signature") != [call.hub.sign(repo, oid)]:
        raise HubError(403, "the signature of the upload address is wrong")
    actual, size = hashlib.sha256(call.body).hexdigest(), call.query.get("size", [""])[0]
    if actual != oid or str(len(call.body)) != size:
        raise HubError(400, f"expected {size} bytes of sha256 {oid}, got {len(call.body)} of {actual}")
    repo.objects[oid] = call.body
    return Answer()


@route("POST", rf"{LFS}/verify")
def lfs_verify(call: Call) -> Answer:
    """Confirm that an object arrived."""
    repo, sent = call.repo(), call.json()
    if len(repo.objects.get(sent.get("oid"), b"")) != sent.get("size"):
        raise HubError(404, f"no object {sent.get('oid')} of {sent.get('size')} bytes")
    return Answer.of_json({})


@route("POST", rf"{API}/commit/{REVISION}")
def commit(call: Call) -> Answer:
    """Make one commit of the NDJSON in the body, on the branch itself or on a new pull request."""
    repo, revision = call.proposable_repo() if call.create_pr else call.writable_repo(), call.parts["revision"]
    head = repo.commit(revision)
    if not revision.startswith("refs/pr/") and revision.removeprefix("refs/heads/") not in repo.branches:
        raise HubError(404, f"Invalid rev id: {revision} is not a branch", "RevisionNotFound")
    lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    header = next((line["value"] for line in lines if line["key"] == "header"), {"summary": ""})
    base = repo.commit(header["parentCommit"]) if header.get("parentCommit") else head
    if base is not head and not call.create_pr:
        raise HubError(412, f"{revision} is at {head.oid}, no longer at the parentCommit {base.oid}")
    blobs = apply_lines(repo, base, lines)
    if blobs.get("README.md") != head.blobs.get("README.md") and "README.md" in blobs:
        errors, _ = check_card(blobs["README.md"].data.decode(), repo.type)
        if errors:
            raise HubError(400, "; ".join(errors))
    author = call.caller.name if call.caller else ""
    made = repo.build_commit(base, blobs, header["summary"], header.get("description", ""), author)
    url = f"{call.hub.endpoint}/{repo.url_path}"
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}", "hookOutput": ""}
    if call.create_pr:
        answer["pullRequestUrl"] = f"{url}/discussions/{repo.open_pull_request(made.title, author, made).number}"
    else:
        repo.advance(revision, made)
        if repo.space is not None:
            repo.space.committed()
    return Answer.of_json(answer)


def apply_lines(repo: Repo, base: Commit, lines: list[dict[str, Any]]) -> dict[str, Blob]:
    """Return the tree that the operations of a commit make of the one at `base`."""
    blobs = dict(base.blobs)
    for line in lines:
        if line["key"] == "header":
            continue
        if line["key"] not in OPERATIONS:
            raise HubError(400, f"an operation is one of {sorted(OPERATIONS)}, got {line['key']!r}")
        OPERATIONS[line["key"]](repo, blobs, line["value"])
    return blobs


def add_file(repo: Repo, blobs: dict[str, Blob], value: dict[str, Any]) -> None:
    """Add a regular file whose content came in the line."""
    try:
        data = base64.b64decode(value["content"], validate=True)
    except binascii.Error as error:
        raise HubError(400, f"{value['path']} is not base64: {error}") from None
    blobs[value["path"]] = Blob.of(data)


def add_lfs_file(repo: Repo, blobs: dict[str, Blob], value: dict[str, Any]) -> None:
    """Add a pointer to an object that was uploaded before."""
    if value["oid"] not in repo.objects:
        raise HubError(400, f"{value['path']} points to the object {value['oid']}, which was not uploaded")
    blobs[value["path"]] = Blob(repo.objects[value["oid"]], True, value["oid"])


def delete_file(repo: Repo, blobs: dict[str, Blob], value: dict[str, Any]) -> None:
    """Delete one file."""
    if blobs.pop(value["path"], None) is None:
        # The client adds a hint to this exact message.
        raise HubError(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")


def delete_folder(repo: Repo, blobs: dict[str, Blob], value: dict[str, Any]) -> None:
    """Delete all files under a folder."""
    inside = [path for path in blobs if path.startswith(value["path"].rstrip("/") + "/")]
    if not inside:
        raise HubError(404, f"no folder {value['path']}", "EntryNotFound")
    for path in inside:
        del blobs[path]


def copy_file(repo: Repo, blobs: dict[str, Blob], value: dict[str, Any]) -> None:
    """Copy a file of the same repository."""
    source = repo.commit(value["srcRevision"]).blobs if value.get("srcRevision") else blobs
    if value["srcPath"] not in source:
        raise HubError(404, f"no file {value['srcPath']} to copy", "EntryNotFound")
    blobs[value["path"]] = source[value["srcPath"]]


OPERATIONS = {
    "file": add_file,
    "lfsFile": add_lfs_file,
    "deletedFile": delete_file,
    "deletedFolder": delete_folder,
    "copyFile": copy_file,
}
