"""The one commit of a push, and the tag on it; and what is true after an answer was lost on the way."""

from __future__ import annotations

import time
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from minilora_hub.errors import PublishError
from minilora_hub.hub import client as hub
from minilora_hub.hub.errors import (
    FAILURES,
    explain,
    is_passing,
    patiently,
    wait_after,
)
from minilora_hub.publish.push.plan import PushPlan, arrived

COMMIT_ATTEMPTS = 3


def send(api: HfApi, plan: PushPlan, folder: Path, state: hub.RemoteState, message: str) -> tuple[str, str]:
    """Make the one commit, and return it and where to look at it.

    Raises:
        PublishError: it was not made.
    """
    if not plan.sends and state.head:
        return state.head, f"{api.endpoint}/{plan.repo_id}"
    if plan.creates:
        try:
            patiently(lambda: api.create_repo(plan.repo_id, private=plan.private, exist_ok=True))
        except FAILURES as error:
            raise PublishError(explain(error, plan.repo_id, "making the repo")) from None
        state = hub.look(api, plan.repo_id, None)
        if set(state.files or {}) - {".gitattributes"}:
            raise PublishError(f"{plan.repo_id} was made by somebody else meanwhile: look at it, and push again")
    pulls = _pull_requests(api, plan.repo_id) if plan.create_pr else {}
    for attempt in range(COMMIT_ATTEMPTS):
        try:
            return _commit(api, plan, folder, state.head, message)
        except FAILURES as error:
            # Whether it was applied, only the repo knows: the answer may have been lost after the commit was made.
            made = _made_after_all(api, plan, folder, state, pulls, error)
            if made is not None:
                return made
            if attempt == COMMIT_ATTEMPTS - 1 or not is_passing(error):
                doing = "opening the pull request" if plan.create_pr else "sending the files"
                raise PublishError(explain(error, plan.repo_id, doing) + "; nothing was changed in the repo") from None
            time.sleep(wait_after(error, attempt))
    raise AssertionError("unreachable")


def _commit(api: HfApi, plan: PushPlan, folder: Path, parent: str | None, message: str) -> tuple[str, str]:
    operations = [
        CommitOperationDelete(file.path) if file.sha256 is None else _addition(file.path, file.sha256, folder)
        for file in plan.sends
    ]
    try:
        made = api.create_commit(
            plan.repo_id,
            operations,
            commit_message=message,
            revision=plan.revision,
            create_pr=plan.create_pr,
            parent_commit=parent,
        )
    except KeyError:
        if not plan.create_pr:
            raise
        # The client looks for the pull request's address in the answer to a commit that was made.
        raise PublishError(
            f"the Hub at {api.endpoint} has opened no pull request: it has committed to {plan.revision} of "
            f"{plan.repo_id} itself; look at it there"
        ) from None
    return made.oid, made.pr_url or made.commit_url


def _addition(path: str, sha256: str, folder: Path) -> CommitOperationAdd:
    """Add a file whose hash is known: the client need not read it for that, and the Hub refuses other bytes."""
    addition = CommitOperationAdd(path, folder / path)
    addition.upload_info.sha256 = bytes.fromhex(sha256)
    return addition


def _made_after_all(
    api: HfApi,
    plan: PushPlan,
    folder: Path,
    before: hub.RemoteState,
    pulls: dict[str, str],
    error: BaseException,
) -> tuple[str, str] | None:
    """Return the commit if it was made although its answer says otherwise or was lost; None if nothing has changed.

    Raises:
        PublishError: somebody else has committed meanwhile, or the repo is gone or cannot be asked.
    """
    if plan.create_pr:
        new = {ref: commit for ref, commit in _pull_requests(api, plan.repo_id).items() if ref not in pulls}
        for ref, commit in new.items():
            if arrived(plan.files, folder, hub.look(api, plan.repo_id, ref)):
                return commit, f"{api.endpoint}/{plan.repo_id}/discussions/{ref.rpartition('/')[2]}"
    try:
        now = hub.look(api, plan.repo_id, plan.revision)
    except PublishError as unknown:
        told = explain(error, plan.repo_id, "sending the files")
        raise PublishError(f"{told}; and it is not known whether the commit was made ({unknown}): push again") from None
    if not now.exists:
        raise PublishError(f"{plan.repo_id} was deleted while files were sent: push again to make it anew")
    if now.head == before.head:
        return None
    if not plan.create_pr and now.head is not None and arrived(plan.files, folder, now):
        return now.head, f"{api.endpoint}/{plan.repo_id}/commit/{now.head}"
    raise PublishError(
        f"somebody else has committed to {plan.repo_id} meanwhile (it is at {(now.head or 'nothing')[:12]}): "
        "nothing was overwritten; look at it, and push again"
    )


def _pull_requests(api: HfApi, repo_id: str) -> dict[str, str]:
    """Return the pull requests of a repo: ref -> commit."""
    try:
        refs = patiently(lambda: api.list_repo_refs(repo_id, include_pull_requests=True))
    except FAILURES as error:
        raise PublishError(explain(error, repo_id, "looking at the pull requests")) from None
    return {ref.ref: ref.target_commit for ref in refs.pull_requests or []}


def set_tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    """Set a tag; one that is there on the same commit is as good."""
    try:
        patiently(lambda: api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True))
        at = hub.tags_of(api, repo_id).get(tag)
    except FAILURES as error:
        told = explain(error, repo_id, f"setting the tag {tag!r}")
        raise PublishError(f"{told}; the files are in the repo, at {commit[:12]}: push again to set the tag") from None
    if at != commit:
        raise PublishError(
            f"the tag {tag!r} was set on another commit meanwhile; the files are there, at {commit[:12]}"
        )
