"""Resolve routes: a file at a revision, with its ETag, in whole or in ranges."""

from __future__ import annotations

import mimetypes
import re

from .accounts import HubError
from .routing import REPO, REVISION, Answer, Call, route


@route("GET", rf"/(?:(?P<type>dataset|space)s/)?{REPO}/resolve/{REVISION}/(?P<path>.+)")
def resolve(call: Call) -> Answer:
    """Serve a file. LFS files come straight from here: there is no second host to redirect to."""
    repo = call.repo()
    commit = call.commit(repo)
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    blob = commit.blobs.get(call.parts["path"])
    if blob is None:
        raise HubError(404, f"{call.parts['path']} is not in {repo.id} at {commit.oid}", "EntryNotFound", headers)
    headers["ETag"] = f'"{blob.etag}"'
    headers["Content-Type"] = mimetypes.guess_type(call.parts["path"])[0] or "application/octet-stream"
    if blob.lfs:
        headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
    return ranged(blob.data, call.headers.get("Range"), headers)


def ranged(data: bytes, asked: str | None, headers: dict[str, str]) -> Answer:
    """Answer the one byte range asked for, or all of `data` without one."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
    if not found or found.groups() == ("", ""):
        return Answer(data, 200, headers)
    first, last = found.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        unsatisfied = {**headers, "Content-Range": f"bytes */{len(data)}"}
        raise HubError(416, f"the range {asked} is outside the {len(data)} bytes of the file", None, unsatisfied)
    return Answer(data[start:stop], 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})
