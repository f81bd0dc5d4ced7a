"""What a push would send: each file of the built folder against what the repo holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minilora_hub.adapter_folder.results import VERIFICATION_FILE
from minilora_hub.hub.client import RemoteFile, RemoteState
from minilora_hub.publish.push.build import Built, PublishedFile, Recorded

Action = Literal["add", "change", "keep", "delete"]
ReadRemote = Callable[[str], bytes]


@dataclass(frozen=True)
class PlannedFile:
    """A file and what a push does with it; `sha256` is None for one that is deleted."""

    path: str
    action: Action
    size: int
    sha256: str | None


@dataclass(frozen=True)
class PushPlan:
    """What is about to be sent, for a question before it is.

    Attributes:
        repo_id: the full id.
        private: whether the repo is, or will be, seen by its owner only.
        creates: whether the repo is made by this push.
        create_pr: whether the commit opens a pull request instead of changing the branch.
        tag: the tag that is set, None for none.
        revision: the branch.
        files: every file and what happens to it.
        card: the text of README.md.
        recording: whether the logits that `verify` compares with were recorded now, or before; and why.
        notes: what the author should know.
    """

    repo_id: str
    private: bool
    creates: bool
    create_pr: bool
    tag: str | None
    revision: str
    files: tuple[PlannedFile, ...]
    card: str
    recording: Recorded
    notes: tuple[str, ...] = ()

    @property
    def sends(self) -> tuple[PlannedFile, ...]:
        """The files that differ from what is there."""
        return tuple(file for file in self.files if file.action != "keep")


def plan_files(built: Built, remote: RemoteState, ours: set[str]) -> tuple[PlannedFile, ...]:
    """Say what happens to each file.

    Args:
        built: what is to be in the repo.
        remote: what is in it.
        ours: paths that an earlier push of ours put there: those that are not built any more are deleted. Files of
            others stay.
    """
    there = remote.files or {}
    planned = []
    for file in built.files:
        before = there.get(file.path)
        same = before is not None and same_content(built.folder / file.path, file, before)
        action: Action = "keep" if same else "add" if before is None else "change"
        planned.append(PlannedFile(file.path, action, file.size, file.sha256))
    gone = sorted((ours & there.keys()) - {file.path for file in built.files})
    planned += [PlannedFile(path, "delete", there[path].size, None) for path in gone]
    return tuple(sorted(planned, key=lambda file: file.path))


def same_content(path: Path, file: PublishedFile, remote: RemoteFile) -> bool:
    """Whether a file is what the repo holds: large files are known by their sha256, others by git's id of them."""
    if remote.size != file.size:
        return False
    return remote.sha256 == file.sha256 if remote.sha256 else remote.oid == git_id(path)


def git_id(path: Path) -> str:
    """Return the id git gives to a file's content."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def arrived(files: tuple[PlannedFile, ...], folder: Path, remote: RemoteState) -> bool:
    """Whether a repo holds everything that was planned, and nothing that was to be deleted."""
    there = remote.files or {}
    for file in files:
        if file.action == "delete":
            if file.path in there:
                return False
        elif file.path not in there or not same_content(
            folder / file.path, PublishedFile(file.path, file.size, file.sha256 or ""), there[file.path]
        ):
            return False
    return True


def pushed_by_us(read: ReadRemote, remote: RemoteState) -> set[str]:
    """Return the paths that an earlier push put into a repo: those its verification.json lists, and what goes along."""
    if VERIFICATION_FILE not in (remote.files or {}):
        return set()
    try:
        listed: Any = json.loads(read(VERIFICATION_FILE)).get("sha256", {})
    except (ValueError, AttributeError):
        return set()  # nothing is deleted on the word of a damaged file
    evaluations = {path for path in remote.files or {} if path.startswith(".eval_results/")}
    return {str(path) for path in listed} | evaluations | {VERIFICATION_FILE}
