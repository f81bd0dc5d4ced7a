"""`push`: build, check, send in one atomic commit, and prove that what arrived works.

Nothing is visible in the repo before the one commit, and that commit is made on the state that was looked at before:
whoever interrupts a push at any point leaves the repo as it was, and a commit of somebody else in between is reported,
never overwritten. An answer that is lost on the way is looked up: the repo itself says whether the commit was made.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors, get_token

from minilora_hub.errors import AdapterError
from minilora_hub.publish import remote as hub
from minilora_hub.publish.build import CARD, Built, build
from minilora_hub.publish.hub_errors import (
    ATTEMPTS,
    FAILURES,
    PublishError,
    explain,
    is_passing,
    patiently,
    status_of,
    wait_after,
)
from minilora_hub.publish.plan import PlannedFile, arrived, plan_files, pushed_by_us
from minilora_hub.publish.progress import Stages
from minilora_hub.publish.sources import METHODS, Layout
from minilora_hub.publish.verify import VerifyReport
from minilora_hub.publish.verify import verify as verify_repo

COMMIT_ATTEMPTS = 3


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
    notes: tuple[str, ...] = ()

    @property
    def sends(self) -> tuple[PlannedFile, ...]:
        """The files that differ from what is there."""
        return tuple(file for file in self.files if file.action != "keep")


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Attributes:
        plan: what was sent.
        dry_run: whether nothing was sent after all.
        commit: the commit that holds the files; None for a dry run.
        url: where to look at it.
        verification: what `verify` found at that commit; None where it was not asked.
    """

    plan: PushPlan
    dry_run: bool
    commit: str | None = None
    url: str | None = None
    verification: VerifyReport | None = None

    @property
    def ok(self) -> bool:
        """Whether the adapter is there, and works as far as that was looked at."""
        return self.verification is None or self.verification.ok

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        plan = dataclasses.asdict(self.plan)
        return {
            **plan,
            "dry_run": self.dry_run,
            "ok": self.ok,
            "commit": self.commit,
            "url": self.url,
            "verification": self.verification.to_dict() if self.verification else None,
        }


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    create_pr: bool = False,
    tag: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
    base_id: str | None = None,
    license: str | None = None,
    layout: Layout = "auto",
    verify: bool = True,
    progress: bool = True,
    confirm: Callable[[PushPlan], bool] | None = None,
) -> PushResult:
    """Publish an adapter.

    Args:
        folder: what ``save_pretrained`` wrote, with results.json where something was measured.
        repo_id: ``"owner/name"``, or ``"name"`` under your own user. It is made if it is not there.
        private: whether a new repo is seen by its owner only. A repo that is public already needs ``private=False``.
        dry_run: do everything but send. Works without a token and without the Hub.
        create_pr: open a pull request instead of changing the branch.
        tag: set this tag on the commit.
        revision: the branch; it must be there, but for main. Default: main.
        message: the commit's message.
        token: default: the one of HF_TOKEN or ``hf auth login``.
        base_model: load the base from there: ``"embedded"``, a folder or an id. Default: what the adapter names.
        base_id: the base's id on the Hub, where the adapter names a folder.
        license: the adapter's licence, e.g. ``"apache-2.0"``. Default: the one in results.json.
        layout: ``"peft"`` publishes a DoRA in PEFT's layout, without code.
        verify: load it again from the new commit, in a clean process.
        progress: show what is being done, on stderr.
        confirm: asked before anything is sent; False ends it like a dry run.

    Returns:
        What was sent, and what verification found.

    Raises:
        PublishError: the token, the Hub or the way to it failed; the message says what to do. The repo is as it was,
            unless the message says otherwise.
        AdapterError: the folder has problems; the message lists them.
        BaseModelError: the base cannot be loaded.
        ValueError: the weights do not fit the configuration and the base.
    """
    if dry_run:
        api = HfApi(token=token or get_token() or False)
    else:
        api, repo_id = hub.writer(token, repo_id, create_pr)
    branch = revision or "main"
    with Stages(progress) as stages, tempfile.TemporaryDirectory(prefix="minilora-push-") as scratch:
        stages.start("Looking at the repo")
        state = _look(api, repo_id, revision, dry_run)
        _refuse_early(state, repo_id, branch, private, create_pr, tag)
        stages.start("Building")
        built = build(
            folder,
            Path(scratch, "repo"),
            repo_id=repo_id,
            revision=tag,
            layout=layout,
            base_id=base_id,
            license=license,
            base_model=base_model,
            token=api.token or None,
        )
        stages.start("Checking")
        check(built, api)
        read = _reader(api, repo_id, state.head)
        files = plan_files(built, state, pushed_by_us(read, state))
        plan = PushPlan(
            repo_id,
            state.private if state.exists else private,
            not state.exists,
            create_pr,
            tag,
            branch,
            files,
            (built.folder / CARD).read_text(encoding="utf-8"),
            built.notes,
        )
        _refuse_moving_tag(plan, state)
        stages.end()
        if dry_run or (confirm is not None and not confirm(plan)):
            return PushResult(plan, dry_run=True)
        # The client draws a bar for each large file itself.
        stages.start(f"Sending {len(plan.sends)} of {len(files)} files", spinner=False)
        with hub.quiet(not progress):
            commit, url = send(api, plan, built.folder, state, message or _message(built))
        if tag:
            stages.start("Tagging")
            _tag(api, repo_id, tag, commit)
        report = None
        if verify:
            stages.start("Verifying")
            report = verify_repo(
                repo_id, revision=commit, base_model=built.base_elsewhere, token=api.token or None, progress=False
            )
    return PushResult(plan, dry_run=False, commit=commit, url=url, verification=report)


def check(built: Built, api: HfApi) -> None:
    """Refuse a built folder that must not be published.

    Raises:
        AdapterError: there are problems; the message lists them and what to do about each.
    """
    from minilora_hub.publish.checks import check_folder

    def base_exists(base: str) -> bool | None:
        """Whether the Hub has the base; None where it cannot be asked."""
        try:
            patiently(lambda: api.model_info(base), attempts=2)
        except errors.GatedRepoError:
            return True
        except errors.RepositoryNotFoundError:
            return False
        except FAILURES:
            return None
        return True

    problems = check_folder(built.folder, base_exists=base_exists)
    if problems:
        lines = [f"{problem.file}: {problem.message}; {problem.remedy}" for problem in problems]
        count = f"{len(lines)} problems" if len(lines) > 1 else "1 problem"
        raise AdapterError(f"nothing was sent, the folder has {count}: " + " | ".join(lines))


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
                raise PublishError(
                    explain(error, plan.repo_id, "sending the files") + "; nothing was changed in the repo"
                ) from None
            time.sleep(wait_after(error, attempt))
    raise AssertionError("unreachable")


def _commit(api: HfApi, plan: PushPlan, folder: Path, parent: str | None, message: str) -> tuple[str, str]:
    operations = [
        CommitOperationDelete(file.path)
        if file.action == "delete"
        else CommitOperationAdd(file.path, folder / file.path)
        for file in plan.sends
    ]
    made = api.create_commit(
        plan.repo_id,
        operations,
        commit_message=message,
        revision=plan.revision,
        create_pr=plan.create_pr,
        parent_commit=parent,
    )
    return made.oid, made.pr_url or made.commit_url


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
        if status_of(error) == 412:
            raise PublishError(explain(error, plan.repo_id, "committing") + "; nothing was overwritten") from None
        return None
    if not plan.create_pr and now.head is not None and arrived(plan.files, folder, now):
        return now.head, f"{api.endpoint}/{plan.repo_id}/commit/{now.head}"
    raise PublishError(
        f"somebody else has committed to {plan.repo_id} meanwhile (it is at {(now.head or 'nothing')[:12]}): nothing was "
        "overwritten; look at it, and push again"
    )


def _pull_requests(api: HfApi, repo_id: str) -> dict[str, str]:
    """Return the pull requests of a repo: ref -> commit."""
    try:
        refs = patiently(lambda: api.list_repo_refs(repo_id, include_pull_requests=True))
    except FAILURES as error:
        raise PublishError(explain(error, repo_id, "looking at the pull requests")) from None
    return {ref.ref: ref.target_commit for ref in refs.pull_requests or []}


def _tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    """Set a tag; one that is there on the same commit is as good."""
    try:
        patiently(lambda: api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True))
        at = patiently(lambda: api.list_repo_refs(repo_id)).tags
    except FAILURES as error:
        told = explain(error, repo_id, f"setting the tag {tag!r}")
        raise PublishError(f"{told}; the files are in the repo, at {commit[:12]}: push again to set the tag") from None
    if {found.name: found.target_commit for found in at}.get(tag) != commit:
        raise PublishError(
            f"the tag {tag!r} was set on another commit meanwhile; the files are there, at {commit[:12]}"
        )


def _look(api: HfApi, repo_id: str, revision: str | None, dry_run: bool) -> hub.RemoteState:
    """Look at the repo; a dry run does without where it cannot."""
    if dry_run and "/" not in repo_id:
        return hub.RemoteState(False)
    try:
        return hub.look(api, repo_id, revision, attempts=1 if dry_run else ATTEMPTS)
    except PublishError:
        if dry_run:
            return hub.RemoteState(False)
        raise


def _refuse_early(
    state: hub.RemoteState, repo_id: str, branch: str, private: bool, create_pr: bool, tag: str | None
) -> None:
    """Refuse what cannot or must not be done, before the long work."""
    if state.exists and not state.private and private and not create_pr:
        raise PublishError(f"{repo_id} is public, and private=True was asked for: pass private=False (--public)")
    if state.exists and state.head is None:
        raise PublishError(f"{repo_id} has no branch {branch!r}: make it first, or push to main")
    if not state.exists and (create_pr or branch != "main"):
        need = "a pull request" if create_pr else f"the branch {branch!r}"
        raise PublishError(f"{repo_id} is not on the Hub yet, so it cannot have {need}: push to main first")
    if tag and create_pr:
        raise PublishError(f"tag={tag!r} with create_pr: tag it when the pull request is merged")


def _refuse_moving_tag(plan: PushPlan, state: hub.RemoteState) -> None:
    at = (state.tags or {}).get(plan.tag or "")
    if at and (plan.sends or at != state.head):
        raise PublishError(f"the tag {plan.tag!r} is on {at[:12]} already: choose another one, or delete it first")


def _reader(api: HfApi, repo_id: str, commit: str | None) -> Callable[[str], bytes]:
    def read(path: str) -> bytes:
        with hub.quiet(True):
            try:
                return Path(patiently(lambda: api.hf_hub_download(repo_id, path, revision=commit))).read_bytes()
            except FAILURES as error:
                raise PublishError(explain(error, repo_id, f"reading {path} of the repo")) from None

    return read


def _message(built: Built) -> str:
    return f"{METHODS[built.method]} adapter for {built.base_id}"
