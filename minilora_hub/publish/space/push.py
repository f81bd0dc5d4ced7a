"""Deploy the comparison page as a Space: stage its files, set its variables, send one commit, wait until it runs.

Everything is checked before anything is changed. Variables are set before the commit, so that the build which the
commit starts sees them.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceHardware

from minilora_hub.adapter_folder.hashes import file_sha256
from minilora_hub.errors import PublishError
from minilora_hub.formatting import counted
from minilora_hub.hub import client as hub
from minilora_hub.hub.errors import ATTEMPTS, FAILURES, explain, patiently, status_of
from minilora_hub.publish.card.render import require_space
from minilora_hub.publish.push.commit import COMMIT_ATTEMPTS
from minilora_hub.publish.push.progress import Stages
from minilora_hub.publish.space.files import APP, MARKER, OUR_VARIABLES, README, VENDORED, SpaceSettings, stage
from minilora_hub.publish.space.models import find_models
from minilora_hub.publish.space.waiting import wait_until_it_runs
from minilora_hub.quiet import quiet_libraries

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET_NAME = re.compile(r"(.*_)?(TOKEN|KEY|SECRET|PASSWORD)", re.IGNORECASE)
HUB_TOKEN = re.compile(r"(?<![A-Za-z0-9])(hf|api_org)_[A-Za-z0-9]{10,}")


@dataclass(frozen=True)
class SpacePush:
    """The changes that a push of a Space made, or would make.

    Attributes:
        space: its id.
        url: its page.
        creates: whether this push creates it.
        private: whether it is private.
        hardware: the hardware to request; None leaves it as it is.
        variables: the variables that are set.
        secrets: names of the secrets that are set, without their values.
        files: {path: bytes}.
        deletes: files that are deleted.
        requirements: the text of requirements.txt.
        card: the text of README.md.
        dry_run: whether nothing was sent.
        commit: the commit; None where nothing was sent.
        stage: the Space's last known stage, e.g. ``"RUNNING"``; None where it was not waited for.
    """

    space: str
    url: str
    creates: bool
    private: bool
    hardware: str | None
    variables: dict[str, str]
    secrets: tuple[str, ...]
    files: dict[str, int]
    deletes: tuple[str, ...]
    requirements: str
    card: str
    dry_run: bool = True
    commit: str | None = None
    stage: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serializable dictionary."""
        return asdict(self)


@quiet_libraries()
def push_space(
    space: str,
    adapters: Sequence[str] = (),
    *,
    base: str | None = None,
    title: str | None = None,
    hardware: str | None = None,
    private: bool = True,
    mcp: bool = False,
    variables: Mapping[str, str] | None = None,
    secrets: Mapping[str, str] | None = None,
    token: str | None = None,
    dry_run: bool = False,
    wait: float = 1800.0,
    progress: bool = True,
) -> SpacePush:
    """Deploy the comparison page as a Space.

    Args:
        space: ``"owner/name"``, or ``"name"`` under your own user.
        adapters: ids on the Hub. Default: the adapters shipped with minilora_hub.
        base: ``"embedded"`` or an id. Default: the base that the adapters name.
        title: its headline on the Hub. Default: its name.
        hardware: e.g. ``"cpu-basic"`` or ``"zero-a10g"``. Default: as it is, or the Hub's free one.
        private: whether a new Space is private. A Space that is public already needs ``private=False``, and one that
            is private already refuses it.
        mcp: whether the page also serves a tool for MCP clients.
        variables: more variables for app.py.
        secrets: {name: value}; the values go to the Hub's settings, into no file.
        token: default: the one of HF_TOKEN or ``hf auth login``.
        dry_run: send nothing. Works without a token; if the Hub is unreachable, the Space is treated as new,
            and adapters need `base`.
        wait: seconds until it must run; 0 does not wait.
        progress: show each stage on stderr.

    Returns:
        The changes that were made.

    Raises:
        PublishError: the token, the Hub, the build or the app failed; the message says what to do.
        AdapterError: an adapter is not on the Hub, is not an adapter, or the adapters have different bases.
        ValueError: an argument is wrong.
    """
    variables, secrets = dict(variables or {}), dict(secrets or {})
    _check_arguments(adapters, hardware, variables, secrets)
    if dry_run:
        api, space = hub.reader(token, space)
        if "/" not in space:
            raise PublishError(
                f"without a valid token nobody knows whose Space {space!r} is: write OWNER/{space}, or {hub.LOG_IN}"
            )
    else:
        api, space = hub.writer(token, space, create_pr=False)
    require_space(space)
    with Stages(progress) as stages, tempfile.TemporaryDirectory(prefix="minilora-space-") as scratch:
        stages.start("Looking at the adapters")
        base, public = find_models(api, tuple(adapters), base, "HF_TOKEN" in secrets, dry_run)
        title = title or space.rpartition("/")[2]
        settings = SpaceSettings(title, base, tuple(adapters), public, hardware, mcp, api.endpoint)
        stages.start("Looking at the Space")
        state = _read_state(api, space, dry_run)
        if state.exists and not state.private and private:
            raise PublishError(f"{space} is public already: pass --public (private=False) to say that this is meant")
        if state.exists and state.private and not private:
            raise PublishError(
                f"{space} is private, and --public (private=False) is for a new Space: make it public at "
                f"{api.endpoint}/spaces/{space}/settings, or leave that out"
            )
        if state.exists:
            _require_ours(api, space, state)
        stages.start("Staging")
        folder = Path(scratch)
        paths = stage(folder, settings)
        deletes = sorted(path for path in state.files if path.startswith(VENDORED) and path not in paths)
        plan = SpacePush(
            space,
            f"{api.endpoint}/spaces/{space}",
            not state.exists,
            state.private if state.exists else private,
            hardware,
            settings.variables() | variables,
            tuple(sorted(secrets)),
            {path: (folder / path).stat().st_size for path in paths},
            tuple(deletes),
            (folder / "requirements.txt").read_text(encoding="utf-8"),
            (folder / README).read_text(encoding="utf-8"),
        )
        stages.end()
        if dry_run:
            return plan
        stages.start("Setting it up")
        state = _set_up(api, plan, secrets, state)
        stages.start(f"Sending {counted(len(paths), 'file')}")
        commit = _commit(api, plan, folder, state)
        stage_now = wait_until_it_runs(api, space, commit, wait, stages) if wait else None
        return replace(plan, dry_run=False, commit=commit, stage=stage_now)


def _check_arguments(
    adapters: Sequence[str], hardware: str | None, variables: dict[str, str], secrets: dict[str, str]
) -> None:
    for name, count in Counter(adapters).items():
        if count > 1:
            raise ValueError(f"adapter {name!r}: is given {count} times: name it once")
        if os.path.isdir(name) or name.startswith((".", "/", "~")):
            raise ValueError(
                f"adapter {name!r}: a Space shows adapters on the Hub: publish it first (minilora push {name} "
                "OWNER/NAME), then name that id here"
            )
    known = [flavor.value for flavor in SpaceHardware]
    if hardware is not None and hardware not in known:
        raise ValueError(f"hardware={hardware!r}: must be one of {', '.join(known)}")
    for name in (*variables, *secrets):
        if not VARIABLE.fullmatch(name):
            raise ValueError(f"variable {name!r}: must be letters, digits and _, not starting with a digit")
        if name in OUR_VARIABLES:
            raise ValueError(f"variable {name}: is one that this command sets itself: pass {OUR_VARIABLES[name]}")
    for name, value in variables.items():
        # The value is not named here: it would reach logs.
        if SECRET_NAME.fullmatch(name) or HUB_TOKEN.search(value):
            what = "is the name of a secret" if SECRET_NAME.fullmatch(name) else "its value looks like a Hub token"
            raise ValueError(f"variable {name}: {what}, and everybody sees variables: use secrets (--secret {name})")
    for name in secrets:
        if not secrets[name]:
            raise ValueError(f"secret {name}='': must not be empty")
    if both := sorted(variables.keys() & secrets.keys()):
        raise ValueError(f"{both[0]} is given as a variable and as a secret: choose one")


def _read_state(api: HfApi, space: str, dry_run: bool) -> hub.RemoteState:
    """Read the state of the Space; a dry run that does not reach the Hub treats it as new."""
    try:
        return hub.look(api, space, attempts=1 if dry_run else ATTEMPTS, repo_type="space")
    except PublishError as error:
        if dry_run and error.__cause__ is not None and status_of(error.__cause__) is None:
            return hub.RemoteState(False)
        raise


def _require_ours(api: HfApi, space: str, state: hub.RemoteState) -> None:
    """Refuse to overwrite a Space that was not made by `minilora space push`."""
    if APP not in state.files:
        return
    card = hub.read_file(api, space, README, state.head, repo_type="space") if README in state.files else b""
    if MARKER not in card.decode("utf-8", "replace"):
        raise PublishError(
            f"{space} is a Space that `minilora space push` did not make: nothing is overwritten; choose another name"
        )


def _set_up(api: HfApi, plan: SpacePush, secrets: dict[str, str], state: hub.RemoteState) -> hub.RemoteState:
    """Create the Space, or update those settings that differ, because each change restarts it."""
    space = plan.space
    try:
        if plan.creates:
            api.create_repo(
                space,
                repo_type="space",
                space_sdk="gradio",
                private=plan.private,
                space_hardware=plan.hardware,  # type: ignore[arg-type]  # the Hub takes names, too
                space_variables=[{"key": name, "value": value} for name, value in plan.variables.items()],
                space_secrets=[{"key": name, "value": value} for name, value in secrets.items()],
            )
            return hub.look(api, space, repo_type="space")
        there = patiently(lambda: api.get_space_variables(space))
        for name, value in plan.variables.items():
            if name not in there or there[name].value != value:
                patiently(partial(api.add_space_variable, space, name, value))
        for name in OUR_VARIABLES:
            if name in there and name not in plan.variables:
                patiently(partial(api.delete_space_variable, space, name))
        for name, value in secrets.items():  # the Hub does not return the current values to compare with
            patiently(partial(api.add_space_secret, space, name, value))
        if plan.hardware is not None:
            runtime = patiently(lambda: api.get_space_runtime(space))
            if plan.hardware not in (runtime.requested_hardware, runtime.hardware):
                api.request_space_hardware(space, plan.hardware)  # type: ignore[arg-type]
    except FAILURES as error:
        raise PublishError(explain(error, space, "setting it up") + "; its files are as they were") from None
    return state


def _commit(api: HfApi, plan: SpacePush, folder: Path, state: hub.RemoteState) -> str:
    """Make the commit and return its hash."""

    def commit() -> str:
        return api.create_commit(
            plan.space,
            [
                *(CommitOperationDelete(path) for path in plan.deletes),
                *(CommitOperationAdd(path, folder / path) for path in plan.files),
            ],
            repo_type="space",
            commit_message="The comparison page of minilora_hub",
            parent_commit=state.head,
        ).oid

    def find_commit(error: BaseException) -> str | None:
        now = hub.look(api, plan.space, repo_type="space")
        if not now.head or now.head == state.head:
            return None
        if now.holds(folder, dict.fromkeys(plan.deletes) | {path: file_sha256(folder / path) for path in plan.files}):
            return now.head
        raise PublishError(f"{plan.space} has received another commit meanwhile: nothing was overwritten; push again")

    try:
        return patiently(commit, COMMIT_ATTEMPTS, recover=find_commit)
    except FAILURES as error:
        failure = explain(error, plan.space, "sending the files")
        raise PublishError(f"{failure}; its settings are set, its files are as they were: push again") from None
