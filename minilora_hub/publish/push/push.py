"""Publish an adapter: build -> check -> plan -> send -> verify.

A push makes exactly one commit, whose parent is the state that was read at the start: an interrupted push leaves the
repo unchanged, and a concurrent commit is reported, never overwritten. If the response to the commit is lost, the
repo is read again to find out whether the commit was made.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.code import HANDLER
from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.folders import Layout, read_source
from minilora_hub.adapter_folder.results import METHODS, RESULTS_FILE, Results
from minilora_hub.errors import AdapterError
from minilora_hub.hub import client as hub
from minilora_hub.hub.errors import ATTEMPTS
from minilora_hub.publish.card.render import require_space
from minilora_hub.publish.checks.base import check_existence, check_own_license
from minilora_hub.publish.checks.folder import check_folder
from minilora_hub.publish.checks.problems import Problem
from minilora_hub.publish.push.build import Built, build
from minilora_hub.publish.push.commit import send, set_tag
from minilora_hub.publish.push.plan import PushPlan, plan_push, pushed_by_us
from minilora_hub.publish.push.progress import Stages
from minilora_hub.publish.push.target import find_target, require_free_tag
from minilora_hub.publish.verify.report import VerifyReport
from minilora_hub.publish.verify.verify import verify as verify_repo
from minilora_hub.quiet import quiet_libraries
from minilora_hub.recording.document import configuration_file
from minilora_hub.recording.recorded_base import published_base


@dataclass(frozen=True)
class PushResult:
    """Result of a push.

    Attributes:
        plan: what was sent.
        dry_run: whether nothing was sent.
        commit: the commit that holds the files; None for a dry run.
        url: URL of the commit or the pull request.
        verification: report of `verify` for that commit; None if it was not called.
    """

    plan: PushPlan
    dry_run: bool
    commit: str | None = None
    url: str | None = None
    verification: VerifyReport | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing failed: True unless verification found a problem."""
        return self.verification is None or self.verification.ok

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serializable dictionary."""
        return {
            **dataclasses.asdict(self.plan),
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
    endpoint: bool | None = None,
    verify: bool = True,
    progress: bool = True,
    confirm: Callable[[PushPlan], bool] | None = None,
) -> PushResult:
    """Publish an adapter.

    Args:
        folder: folder written by ``save_pretrained``, with results.json if something was measured.
        repo_id: ``"owner/name"``, or ``"name"`` under your own user. It is created if it does not exist.
        private: whether a new repo is private. A repo that is public already needs ``private=False``, and one that is
            private already refuses it.
        dry_run: do everything except the upload. Works without a token and without the Hub.
        create_pr: open a pull request instead of changing the branch.
        tag: set this tag on the commit.
        revision: the branch, which must exist unless it is main. Default: main.
        message: the commit's message.
        token: default: the one of HF_TOKEN or ``hf auth login``.
        base_model: where to load the base from: ``"embedded"``, a folder or an id. Default: what the adapter names.
        base_id: the base's id on the Hub, where the adapter names a folder.
        license: the adapter's licence, e.g. ``"apache-2.0"``. Default: the one in results.json.
        space: ``"owner/name"`` of the Space that the card's "try it" opens on this adapter. Default: the one that the
            card names already, in the folder or else in the repo; without one the card has the local command alone.
        layout: ``"peft"`` publishes a DoRA in PEFT's layout, without code.
        endpoint: add `handler.py` and `requirements.txt`, which make an Inference Endpoint of the repo answer with the
            adapter. None: as an earlier push to the repo did.
        verify: load it again from the new commit, in an isolated process.
        progress: show each stage on stderr.
        confirm: called with the plan before anything is sent; False ends the push like a dry run.

    Returns:
        The plan, the commit and the verification report.

    Raises:
        PublishError: the token, the Hub or the connection failed; the message says what to do. The repo is as it was,
            unless the message says otherwise.
        AdapterError: the folder has problems; the message lists them.
        BaseModelError: the base cannot be loaded.
        ValueError: the weights do not fit the configuration and the base; `space` is not the id of a Space; or an
            argument is an empty string.
    """
    require_space(space)
    given = {"tag": tag, "revision": revision, "message": message, "base_model": base_model, "base_id": base_id}
    for name, value in (given | {"license": license}).items():
        if value == "":
            raise ValueError(f"{name}='': is empty: leave it out")
    if dry_run:
        api, repo_id = hub.reader(token, repo_id)
    else:
        api, repo_id = hub.writer(token, repo_id, create_pr)
    token = api.token if isinstance(api.token, str) else None
    base = hub.BaseOnHub(api, 1 if dry_run else ATTEMPTS)
    with Stages(progress) as stages, tempfile.TemporaryDirectory(prefix="minilora-push-") as scratch:
        stages.start("Looking at the repo")
        target = find_target(
            api, repo_id, branch=revision or "main", tag=tag, private=private, create_pr=create_pr, dry_run=dry_run
        )
        source = read_source(Path(folder))
        require_free_tag(target, source, layout)
        check_before_building(source, base_id, license, base)
        if endpoint is None:
            endpoint = HANDLER in target.state.files and HANDLER in pushed_by_us(api, target)

        stages.start("Building")
        built = build(
            source.folder,
            Path(scratch, "repo"),
            repo_id=repo_id,
            revision=tag,
            layout=layout,
            base_id=base_id,
            license=license,
            base_model=base_model,
            space=space,
            endpoint=endpoint,
            published_card=target.card,
            token=token,
        )
        stages.start("Checking")
        notes = check(built, base)
        if "/" not in repo_id:
            notes += (f"without a valid token nobody knows whose {repo_id!r} is: it was taken for a new repo",)
        plan = plan_push(api, target, built, notes)
        stages.end()
        if dry_run or (confirm is not None and not confirm(plan)):
            return PushResult(plan, dry_run=True)

        stages.start(f"Sending {len(plan.sends)} of {len(plan.files)} files")
        message = message or f"{METHODS[built.method]} adapter for {built.base_id}"
        commit, url = send(api, plan, built.folder, target.state, message)
        if tag:
            stages.start("Tagging")
            set_tag(api, repo_id, tag, commit)
        report = None
        if verify:
            stages.start("Verifying")
            report = verify_repo(repo_id, revision=commit, base_model=built.base_elsewhere, token=token, progress=False)
    return PushResult(plan, dry_run=False, commit=commit, url=url, verification=report)


def check_before_building(source: Source, base_id: str | None, license: str | None, base: hub.BaseOnHub) -> None:
    """Run those checks of `check` early that need only the configuration and results.json.

    Raises:
        AdapterError: there are problems; the message lists them.
    """
    name, revision = published_base(source, base_id)
    problems = list(check_existence(configuration_file(source), name, revision, base.exists))
    if (source.folder / RESULTS_FILE).is_file():
        license = license or Results.load(source.folder).license
    _refuse([*problems, *check_own_license(license)])


def check(built: Built, base: hub.BaseOnHub) -> tuple[str, ...]:
    """Refuse a built folder that must not be published.

    Args:
        built: the folder.
        base: the Hub's information about the adapter's base.

    Returns:
        The problems that do not prevent publishing, a line each.

    Raises:
        AdapterError: there are problems; the message lists them and what to do about each.
    """
    return _refuse(check_folder(built.folder, base_exists=base.exists, base_license=base.license))


def _refuse(problems: list[Problem]) -> tuple[str, ...]:
    """Raise AdapterError where one of the problems is blocking; return the others, a line each."""
    lines = [f"{problem.file or 'the folder'}: {problem.message}; {problem.remedy}" for problem in problems]
    blocking = [line for line, problem in zip(lines, problems, strict=True) if problem.blocking]
    if blocking:
        count = f"{len(blocking)} problems" if len(blocking) > 1 else "1 problem"
        raise AdapterError(f"nothing was sent, the folder has {count}: " + " | ".join(blocking))
    return tuple(lines)
