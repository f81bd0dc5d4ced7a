"""Compare the built folder with the repo and list the files to upload and to delete."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub import HfApi

from minilora_hub.adapter_folder.verification import VERIFICATION_FILE, is_hashed, is_loaded
from minilora_hub.errors import PublishError
from minilora_hub.hub import client as hub
from minilora_hub.publish.push.build import Built, Recorded
from minilora_hub.publish.push.target import Target
from minilora_hub.remote_code.adapter_files import first_names

Action = Literal["add", "change", "keep", "delete"]


@dataclass(frozen=True)
class PlannedFile:
    """A file and its planned change; `sha256` is None for a file to delete."""

    path: str
    action: Action
    size: int
    sha256: str | None


@dataclass(frozen=True)
class PushPlan:
    """The changes that a push will make.

    Attributes:
        repo_id: the full id.
        private: whether the repo is, or will be, private.
        creates: whether the push creates the repo.
        create_pr: whether the commit opens a pull request instead of changing the branch.
        tag: the tag that is set, None for none.
        revision: the branch.
        files: every file and its planned change.
        card: the text of README.md.
        recording: whether the logits that `verify` compares with were recorded now or before, and why.
        notes: notes for the author.
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
        """The files that differ from the repo's."""
        return tuple(file for file in self.files if file.action != "keep")


def plan_push(api: HfApi, target: Target, built: Built, notes: tuple[str, ...]) -> PushPlan:
    """Return the changes that uploading a built folder would make.

    A file that an earlier push uploaded and that is no longer built is deleted; all other files are kept, and told.

    Raises:
        PublishError: the tag would have to be moved, the repo cannot be read, or it holds files of others that would be
            loaded with the adapter.
    """
    there = target.state.files
    planned = []
    for file in built.files:
        before = there.get(file.path)
        same = before is not None and before.has_content(built.folder / file.path, file.sha256)
        action: Action = "keep" if same else "add" if before is None else "change"
        planned.append(PlannedFile(file.path, action, file.size, file.sha256))
    others = there.keys() - {file.path for file in built.files}
    gone = pushed_by_us(api, target) & others
    kept = _notes_on_others(target.repo_id, sorted(others - gone - {".gitattributes"}))
    planned += [PlannedFile(path, "delete", there[path].size, None) for path in gone]
    plan = PushPlan(
        repo_id=target.repo_id,
        private=target.private,
        creates=not target.state.exists,
        create_pr=target.create_pr,
        tag=target.tag,
        revision=target.branch,
        files=tuple(sorted(planned, key=lambda file: file.path)),
        card=built.card,
        recording=built.recorded,
        notes=built.notes + notes + kept,
    )
    if target.tagged and (plan.sends or target.tagged != target.state.head):
        target.refuse_to_move_tag()
    return plan


def _notes_on_others(repo_id: str, paths: list[str]) -> tuple[str, ...]:
    """Return notes on files of the repo that no push has put there; refuse those that are loaded with an adapter.

    An adapter_config.json, for example, would hide the adapter's own class from AutoModel.
    """
    if loaded := [path for path in paths if is_loaded(path)]:
        raise PublishError(
            f"{repo_id} holds files that no earlier push put there and that would be loaded with the adapter "
            f"({first_names(loaded)}): nothing was sent; delete them on the Hub, or push to another repo"
        )
    unknown = [path for path in paths if is_hashed(path)]
    documents = [path for path in paths if path not in unknown]
    notes = [f"stays in the repo, not from a push: {first_names(documents)}"] if documents else []
    if unknown:
        notes.append(
            f"stays in the repo, not from a push: {first_names(unknown)}; `minilora verify` takes only recorded files "
            "and fails: delete it on the Hub"
        )
    return tuple(notes)


def pushed_by_us(api: HfApi, target: Target) -> set[str]:
    """Return the paths that an earlier push uploaded: verification.json and the files it lists."""
    if VERIFICATION_FILE not in target.state.files:
        return set()
    content = hub.read_file(api, target.repo_id, VERIFICATION_FILE, target.state.head)
    try:
        listed: Any = json.loads(content).get("sha256", {})
    except (ValueError, AttributeError):
        return set()  # a damaged file must not cause deletions
    evaluations = {path for path in target.state.files if path.startswith(".eval_results/")}
    return {str(path) for path in listed} | evaluations | {VERIFICATION_FILE}
