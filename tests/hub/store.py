"""Repositories in memory: blobs, commits, branches, tags and pull requests."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from .accounts import HubError

if TYPE_CHECKING:
    from .spaces import Space

REPO_TYPES = ("model", "dataset", "space")
LFS_SUFFIXES = """
    safetensors bin pt pth ckpt gguf onnx msgpack h5 npy npz parquet arrow zip gz tar
""".split()  # noqa: SIM905
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)


def git_oid(data: bytes, kind: str = "blob") -> str:
    """Return the object id git gives to `data`."""
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


class Clock:
    """UTC times that strictly increase by at least a millisecond, the resolution of the API."""

    def __init__(self) -> None:
        """Start now."""
        self._last = datetime.now(UTC)

    def __call__(self) -> str:
        """Return the next time as the API writes it."""
        self._last = max(datetime.now(UTC), self._last + timedelta(milliseconds=1))
        return self._last.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


@dataclass(frozen=True)
class Blob:
    """A file's bytes, and whether git holds them itself or only a pointer to LFS."""

    data: bytes
    lfs: bool = False
    sha256: str = ""

    @classmethod
    def of(cls, data: bytes, lfs: bool = False) -> Blob:
        """Build the blob that holds `data`, with its digest."""
        return cls(data, lfs, hashlib.sha256(data).hexdigest())

    @property
    def pointer(self) -> bytes:
        """The LFS pointer file that git stores."""
        lines = ["version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.data)}"]
        return ("\n".join(lines) + "\n").encode()

    @property
    def oid(self) -> str:
        """The git object id: of the pointer for an LFS file."""
        return git_oid(self.pointer if self.lfs else self.data)

    @property
    def etag(self) -> str:
        """What the cache is keyed by: sha256 for an LFS file, the git object id for a regular one."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """One commit: the whole tree by path, and where it came from."""

    oid: str
    parent: Commit | None
    blobs: Mapping[str, Blob]
    title: str
    message: str
    author: str
    date: str

    def history(self) -> list[Commit]:
        """Return this commit and its ancestors, newest first."""
        line, commit = [], self
        while commit is not None:
            line.append(commit)
            commit = commit.parent
        return line


@dataclass
class PullRequest:
    """An open pull request: its number, its title, its branch's head."""

    number: int
    title: str
    author: str
    date: str
    head: Commit


@dataclass
class Repo:
    """A repository. Tests read it with `files`, `commits` and `private`, and push to it with `push`."""

    type: str
    id: str
    clock: Clock
    private: bool = False
    sdk: str | None = None
    downloads: int = 0
    likes: int = 0
    trending: int = 0
    objects: dict[str, bytes] = field(default_factory=dict)
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    pulls: dict[int, PullRequest] = field(default_factory=dict)
    created_at: str = ""
    all_commits: dict[str, Commit] = field(default_factory=dict)
    space: Space | None = None

    def __post_init__(self) -> None:
        """Make the first commit, as the Hub does: a .gitattributes on main."""
        self.created_at = self.clock()
        blobs = {".gitattributes": Blob.of(GITATTRIBUTES.encode())}
        self.branches["main"] = self.build_commit(None, blobs, "initial commit", "", self.namespace)

    @property
    def namespace(self) -> str:
        """The user or organisation that owns the repository."""
        return self.id.split("/")[0]

    @property
    def url_path(self) -> str:
        """The repository's path on the site."""
        return ("" if self.type == "model" else f"{self.type}s/") + self.id

    def commit(self, revision: str = "main") -> Commit:
        """Return the commit a branch, tag, pull request, full or short sha names."""
        if revision.startswith("refs/pr/") and revision[8:].isdigit() and int(revision[8:]) in self.pulls:
            return self.pulls[int(revision[8:])].head
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        found = self.branches.get(name) or self.tags.get(name) or self.all_commits.get(revision)
        if found is None and len(revision) >= 7:
            matches = [commit for oid, commit in self.all_commits.items() if oid.startswith(revision)]
            found = matches[0] if len(matches) == 1 else None
        if found is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return the bytes of every file at `revision`, by path, without the .gitattributes the Hub adds."""
        return {path: blob.data for path, blob in self.commit(revision).blobs.items() if path != ".gitattributes"}

    def commits(self, revision: str = "main") -> list[Commit]:
        """Return the commits of `revision`, newest first."""
        return self.commit(revision).history()

    def push(self, files: Mapping[str, bytes | None], message: str = "push", branch: str = "main") -> str:
        """Commit `files` (None deletes) behind the API's back, as another writer would; return the commit's id."""
        blobs = dict(self.commit(branch).blobs)
        for path, data in files.items():
            blobs.pop(path, None)
            if data is not None:
                blobs[path] = blob = Blob.of(data, lfs=self.lfs_by_name(path, branch))
                if blob.lfs:
                    self.objects[blob.sha256] = data
        self.branches[branch] = self.build_commit(self.branches[branch], blobs, message, "", self.namespace)
        return self.branches[branch].oid

    def build_commit(self, parent: Commit | None, blobs: dict[str, Blob], title: str, message: str, who: str) -> Commit:
        """Store a commit on top of `parent`; the caller moves the branch."""
        date = self.clock()
        listing = "".join(f"{blob.oid} {path}\n" for path, blob in sorted(blobs.items()))
        text = f"{self.type} {self.id}\n{parent.oid if parent else ''}\n{who} {date}\n{title}\n{message}\n{listing}"
        commit = Commit(
            git_oid(text.encode(), "commit"), parent, dict(sorted(blobs.items())), title, message, who, date
        )
        self.all_commits[commit.oid] = commit
        return commit

    def advance(self, revision: str, commit: Commit) -> None:
        """Move the branch or the pull request called `revision` to `commit`."""
        if revision.startswith("refs/pr/"):
            self.pulls[int(revision[8:])].head = commit
        else:
            self.branches[revision.removeprefix("refs/heads/")] = commit

    def open_pull_request(self, title: str, author: str, head: Commit) -> PullRequest:
        """Open the next pull request at `head`."""
        number = next(number for number in itertools.count(1) if number not in self.pulls)
        self.pulls[number] = PullRequest(number, title, author, self.clock(), head)
        return self.pulls[number]

    def lfs_by_name(self, path: str, revision: str = "main") -> bool:
        """Whether the repository's .gitattributes sends `path` to LFS."""
        attributes = self.commit(revision).blobs.get(".gitattributes", Blob(b"")).data.decode()
        rules = [line.split() for line in attributes.splitlines() if "filter=lfs" in line]
        return any(fnmatch.fnmatch(path, rule[0]) or fnmatch.fnmatch(path.split("/")[-1], rule[0]) for rule in rules)
