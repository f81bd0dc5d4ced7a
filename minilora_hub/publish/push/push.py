"""`push`: build, check, send in one atomic commit, and prove that what arrived works.

Nothing is visible in the repo before the one commit, and that commit is made on the state that was looked at before:
whoever interrupts a push at any point leaves the repo as it was, and a commit of somebody else in between is reported,
never overwritten. An answer that is lost on the way is looked up: the repo itself says whether the commit was made.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import HfApi, get_token

from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.folders import Layout, read_source
from minilora_hub.adapter_folder.hashes import Hashes
from minilora_hub.adapter_folder.names import OUR_CONFIG, PEFT_CONFIG, WEIGHTS
from minilora_hub.adapter_folder.recorded import METHODS
from minilora_hub.adapter_folder.results import RESULTS_FILE, Results
from minilora_hub.errors import AdapterError, PublishError
from minilora_hub.hub import client as hub
from minilora_hub.hub.errors import ATTEMPTS, FAILURES, explain, patiently
from minilora_hub.publish.card import free_text
from minilora_hub.publish.card.files import CARD
from minilora_hub.publish.card.render import require_space
from minilora_hub.publish.checks.base import check_existence, check_own_license
from minilora_hub.publish.checks.folder import Checked, check_folder, check_unfinished
from minilora_hub.publish.checks.problems import Problem
from minilora_hub.publish.push.build import Built, PublishedFile, build
from minilora_hub.publish.push.commit import send, set_tag
from minilora_hub.publish.push.plan import PushPlan, plan_files, pushed_by_us, same_content
from minilora_hub.publish.push.progress import Stages
from minilora_hub.publish.verify.verify import VerifyReport
from minilora_hub.publish.verify.verify import verify as verify_repo
from minilora_hub.quiet import quiet_libraries
from minilora_hub.recording.bases_of_record import published_base


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


@quiet_libraries()
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
    space: str | None = None,
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
        space: ``"owner/name"`` of the Space that the card's "try it" opens on this adapter. Default: the one that the
            card names already, in the folder or else in the repo; without one the card has the local command alone.
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
        ValueError: the weights do not fit the configuration and the base; or `space` is no id of a Space.
    """
    require_space(space)
    hashes = Hashes()
    if (Path(folder) / WEIGHTS).is_file():
        hashes.start(Path(folder) / WEIGHTS)  # while the Hub answers
    if dry_run:
        api = HfApi(token=token or get_token() or False)
    else:
        api, repo_id = hub.writer(token, repo_id, create_pr)
    secret = api.token if isinstance(api.token, str) else None
    with Stages(progress) as stages, tempfile.TemporaryDirectory(prefix="minilora-push-") as scratch:
        stages.start("Looking at the repo")
        target = _Target.of(api, repo_id, revision, tag, private, create_pr, dry_run)
        base = hub.BaseOnHub(api, 1 if dry_run else ATTEMPTS)
        source = read_source(Path(folder))
        target.refuse_taken_tag(source, layout, hashes)
        _refuse_before_building(source, base_id, license, base)
        stages.start("Building")
        checked: list[Checked] = []
        built = build(
            Path(folder),
            Path(scratch, "repo"),
            repo_id=repo_id,
            revision=tag,
            layout=layout,
            base_id=base_id,
            license=license,
            base_model=base_model,
            space=space,
            published_card=target.card,
            token=secret,
            hashes=hashes,
            passing=True,
            meanwhile=lambda unfinished, loaded, card: checked.append(
                check_unfinished(
                    unfinished, base_exists=base.exists, base_license=base.license, loaded=loaded, rendered=card
                )
            ),
        )
        stages.start("Checking")
        notes = check(built, base, *checked)
        plan = target.plan(built, notes)
        stages.end()
        if dry_run or (confirm is not None and not confirm(plan)):
            return PushResult(plan, dry_run=True)
        commit, url = _send(target, plan, built, message, stages)
        report = None
        if verify:
            stages.start("Verifying")
            report = verify_repo(
                repo_id, revision=commit, base_model=built.base_elsewhere, token=secret, progress=False
            )
    return PushResult(plan, dry_run=False, commit=commit, url=url, verification=report)


@dataclass(frozen=True)
class _Target:
    """Where a push goes, and what was there when it was looked at.

    Attributes:
        api: the client.
        repo_id: the full id.
        branch: the branch.
        tag: the tag to set.
        private: whether the repo is, or will be, private.
        create_pr: whether a pull request is opened.
        state: what the repo holds.
        tagged: the commit that the tag is on already.
        card: the card that the repo has.
    """

    api: HfApi
    repo_id: str
    branch: str
    tag: str | None
    private: bool
    create_pr: bool
    state: hub.RemoteState
    tagged: str | None
    card: str | None

    @classmethod
    def of(
        cls,
        api: HfApi,
        repo_id: str,
        revision: str | None,
        tag: str | None,
        private: bool,
        create_pr: bool,
        dry_run: bool,
    ) -> _Target:
        """Look at the repo, and refuse what cannot or must not be done, before the long work."""
        state, branch = _look(api, repo_id, revision, dry_run), revision or "main"
        tagged = _tagged(api, repo_id, tag, dry_run) if tag and state.exists else None
        _refuse_early(state, repo_id, branch, private, create_pr, tag)
        if create_pr:
            hub.require_pull_requests(api, repo_id, 1 if dry_run else ATTEMPTS)
        card = _published_card(_reader(api, repo_id, state.head), state, repo_id)
        private = state.private if state.exists else private
        return cls(api, repo_id, branch, tag, private, create_pr, state, tagged, card)

    def refuse_taken_tag(self, source: Source, layout: Layout, hashes: Hashes) -> None:
        """Refuse a tag that this push would have to move, as far as that can be told before anything is built.

        On the newest commit it may stay where the push turns out to change nothing: with other weights it will not.
        """
        if self.tagged is None:
            return
        weights, there = source.folder / WEIGHTS, (self.state.files or {}).get(WEIGHTS)
        if self.tagged == self.state.head and there is not None:
            # A DoRA is written anew for PEFT's layout; everything else is published byte by byte.
            rewritten = source.method == "dora" and "peft" in (source.layout, layout)
            known = PublishedFile(WEIGHTS, weights.stat().st_size, hashes.of(weights))
            if rewritten or same_content(weights, known, there):
                return
        self._refuse_tag()

    def _refuse_tag(self) -> NoReturn:
        on = (self.tagged or "")[:12]
        raise PublishError(f"the tag {self.tag!r} is on {on} already: choose another one, or delete it first")

    def plan(self, built: Built, notes: tuple[str, ...]) -> PushPlan:
        """Say what sending a built folder here would do, and refuse to move a tag."""
        ours = pushed_by_us(_reader(self.api, self.repo_id, self.state.head), self.state)
        plan = PushPlan(
            repo_id=self.repo_id,
            private=self.private,
            creates=not self.state.exists,
            create_pr=self.create_pr,
            tag=self.tag,
            revision=self.branch,
            files=plan_files(built, self.state, ours),
            card=built.card,
            recording=built.recorded,
            notes=built.notes + notes,
        )
        if self.tagged and (plan.sends or self.tagged != self.state.head):
            self._refuse_tag()
        return plan


def _send(target: _Target, plan: PushPlan, built: Built, message: str | None, stages: Stages) -> tuple[str, str]:
    """Make the commit, and the tag; return the commit and where to look at it."""
    stages.start(f"Sending {len(plan.sends)} of {len(plan.files)} files")
    commit, url = send(target.api, plan, built.folder, target.state, message or _message(built))
    if target.tag:
        stages.start("Tagging")
        set_tag(target.api, target.repo_id, target.tag, commit)
    return commit, url


def check(built: Built, base: hub.BaseOnHub, earlier: Checked | None = None) -> tuple[str, ...]:
    """Refuse a built folder that must not be published.

    Args:
        built: the folder.
        base: what knows of the adapter's base on the Hub.
        earlier: what was found while the folder was built.

    Returns:
        What may be published but should be known, a line each.

    Raises:
        AdapterError: there are problems; the message lists them and what to do about each.
    """
    problems = check_folder(
        built.folder, base_exists=base.exists, base_license=base.license, hashes=built.hashes, earlier=earlier
    )
    return _refuse(problems)


def _refuse_before_building(source: Source, base_id: str | None, license: str | None, base: hub.BaseOnHub) -> None:
    """Refuse what `check` would refuse after the long work, where the configuration and results.json tell it."""
    name, revision = published_base(source, base_id)
    config = OUR_CONFIG if source.layout == "auto" else PEFT_CONFIG
    problems = list(check_existence(config, name, revision, base.exists))
    if (source.folder / RESULTS_FILE).is_file():
        license = license or Results.load(source.folder).license
    _refuse([*problems, *check_own_license(license)])


def _refuse(problems: list[Problem]) -> tuple[str, ...]:
    """Raise AdapterError where one of the problems is blocking; return the others, a line each."""
    lines = [f"{problem.file or 'the folder'}: {problem.message}; {problem.remedy}" for problem in problems]
    blocking = [line for line, problem in zip(lines, problems, strict=True) if problem.blocking]
    if blocking:
        count = f"{len(blocking)} problems" if len(blocking) > 1 else "1 problem"
        raise AdapterError(f"nothing was sent, the folder has {count}: " + " | ".join(blocking))
    return tuple(lines)


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


def _tagged(api: HfApi, repo_id: str, tag: str, dry_run: bool) -> str | None:
    """Look at which commit a tag is; a dry run does without where it cannot."""
    try:
        return hub.tags_of(api, repo_id, 1 if dry_run else ATTEMPTS).get(tag)
    except FAILURES as error:
        if dry_run:
            return None
        raise PublishError(explain(error, repo_id, "looking at the tags")) from None


def _reader(api: HfApi, repo_id: str, commit: str | None) -> Callable[[str], bytes]:
    def read(path: str) -> bytes:
        try:
            return Path(patiently(lambda: api.hf_hub_download(repo_id, path, revision=commit))).read_bytes()
        except FAILURES as error:
            raise PublishError(explain(error, repo_id, f"reading {path} of the repo")) from None

    return read


def _published_card(read: Callable[[str], bytes], state: hub.RemoteState, repo_id: str) -> str | None:
    """Return the card that the repo has: people write on it on the Hub's page."""
    if CARD not in (state.files or {}):
        return None
    try:
        card = read(CARD).decode("utf-8")
        free_text.sections_of(card)
    except (UnicodeDecodeError, AdapterError) as error:
        raise PublishError(f"{CARD} in {repo_id} cannot be kept ({error}): repair it there, and push again") from None
    return card


def _message(built: Built) -> str:
    return f"{METHODS[built.method]} adapter for {built.base_id}"
