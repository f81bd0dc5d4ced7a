"""Make the commit of a push and set the tag; if a response is lost, find out whether the commit was made."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from minilora_hub.errors import PublishError
from minilora_hub.hub import client as hub
from minilora_hub.hub.errors import FAILURES, explain, patiently
from minilora_hub.publish.push.plan import PushPlan

COMMIT_ATTEMPTS = 3


def send(api: HfApi, plan: PushPlan, folder: Path, state: hub.RemoteState, message: str) -> tuple[str, str]:
    """Make the commit, and return its hash and URL.

    Raises:
        PublishError: it was not made.
    """
    if not plan.sends and state.head:
        return state.head, f"{api.endpoint}/{plan.repo_id}"
    if plan.creates:
        try:
            patiently(lambda: api.create_repo(plan.repo_id, private=plan.private, exist_ok=True))
        except FAILURES as error:
            raise PublishError(explain(error, plan.repo_id, "creating the repo")) from None
        state = hub.look(api, plan.repo_id)
        if state.files.keys() - {".gitattributes"}:
            raise PublishError(f"{plan.repo_id} was created by another process meanwhile: inspect it, and push again")
    pulls = _pull_requests(api, plan.repo_id) if plan.create_pr else {}
    try:
        return patiently(
            lambda: _commit(api, plan, folder, state.head, message),
            COMMIT_ATTEMPTS,
            recover=lambda error: _find_commit(api, plan, folder, state, pulls, error),
        )
    except FAILURES as error:
        doing = "opening the pull request" if plan.create_pr else "sending the files"
        raise PublishError(explain(error, plan.repo_id, doing) + "; nothing was changed in the repo") from None


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
        # The client expects the pull request's URL in the response, and fails after the commit was made.
        raise PublishError(
            f"the Hub at {api.endpoint} has opened no pull request: it has committed to {plan.revision} of "
            f"{plan.repo_id} itself; look at it there"
        ) from None
    return made.oid, made.pr_url or made.commit_url


def _addition(path: str, sha256: str, folder: Path) -> CommitOperationAdd:
    """Add a file with the hash that was checked, so that the Hub rejects changed content."""
    addition = CommitOperationAdd(path, folder / path)
    addition.upload_info.sha256 = bytes.fromhex(sha256)
    return addition


def _find_commit(
    api: HfApi,
    plan: PushPlan,
    folder: Path,
    before: hub.RemoteState,
    pulls: dict[str, str],
    error: BaseException,
) -> tuple[str, str] | None:
    """Return the commit if it was made although the call failed; None if nothing has changed in the repo.

    Raises:
        PublishError: there is another commit, or the repo was deleted or cannot be read.
    """
    hashes = {file.path: file.sha256 for file in plan.files}
    if plan.create_pr:
        new = {ref: commit for ref, commit in _pull_requests(api, plan.repo_id).items() if ref not in pulls}
        for ref, commit in new.items():
            if hub.look(api, plan.repo_id, ref).holds(folder, hashes):
                return commit, f"{api.endpoint}/{plan.repo_id}/discussions/{ref.rpartition('/')[2]}"
    try:
        now = hub.look(api, plan.repo_id, plan.revision)
    except PublishError as unknown:
        failure = explain(error, plan.repo_id, "sending the files")
        raise PublishError(
            f"{failure}; and it is not known whether the commit was made ({unknown}): push again"
        ) from None
    if not now.exists:
        raise PublishError(f"{plan.repo_id} was deleted while files were sent: push again to create it")
    if now.head == before.head:
        return None
    if not plan.create_pr and now.head is not None and now.holds(folder, hashes):
        return now.head, f"{api.endpoint}/{plan.repo_id}/commit/{now.head}"
    raise PublishError(
        f"{plan.repo_id} has received another commit meanwhile (it is at {(now.head or 'nothing')[:12]}): "
        "nothing was overwritten; inspect it, and push again"
    )


def _pull_requests(api: HfApi, repo_id: str) -> dict[str, str]:
    """Return the pull requests of a repo: ref -> commit."""
    try:
        refs = patiently(lambda: api.list_repo_refs(repo_id, include_pull_requests=True))
    except FAILURES as error:
        raise PublishError(explain(error, repo_id, "looking at the pull requests")) from None
    return {ref.ref: ref.target_commit for ref in refs.pull_requests or []}


def set_tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    """Set a tag on a commit, which may have it already.

    Raises:
        PublishError: it was not set.
    """
    try:
        patiently(lambda: api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True))
        at = hub.tags_of(api, repo_id).get(tag)
    except FAILURES as error:
        failure = explain(error, repo_id, f"setting the tag {tag!r}")
        raise PublishError(f"{failure}; the files are in the repo, at {commit[:12]}: push again to set it") from None
    if at != commit:
        raise PublishError(
            f"the tag {tag!r} was set on another commit meanwhile; the files are there, at {commit[:12]}"
        )
