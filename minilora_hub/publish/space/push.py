"""`minilora space push`: a Space made or brought up to date by one commit, its variables set, waited for until it runs.

Everything that can be wrong is looked at before anything is changed. Variables are set before the commit, so that the
build which the commit starts sees them already.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceHardware, errors, get_token

from minilora_hub.adapter_folder.hashes import file_sha256
from minilora_hub.errors import PublishError
from minilora_hub.hub import client as hub
from minilora_hub.hub.errors import ATTEMPTS, FAILURES, explain, is_passing, patiently, status_of, wait_after
from minilora_hub.publish.card.render import require_space
from minilora_hub.publish.push.build import PublishedFile
from minilora_hub.publish.push.plan import same_content
from minilora_hub.publish.push.progress import Stages
from minilora_hub.publish.space.files import APP, MARKER, OUR_VARIABLES, README, VENDORED, SpaceSettings, stage
from minilora_hub.publish.space.models import find_models
from minilora_hub.publish.space.waiting import wait_until_it_runs
from minilora_hub.quiet import quiet_libraries

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
COMMIT_ATTEMPTS = 3


@dataclass(frozen=True)
class SpacePush:
    """What was sent, or would be.

    Attributes:
        space: its id.
        url: its page.
        creates: whether it is made by this push.
        private: whether only its owner sees it.
        hardware: what is asked for; None leaves it as it is.
        variables: all that are set.
        secrets: names of those that are set; their values are nowhere in here.
        files: {path: bytes}.
        deletes: files that go.
        requirements: the text of requirements.txt.
        card: the text of README.md.
        dry_run: whether nothing was sent.
        commit: the commit; None where nothing was sent.
        stage: what the Space was doing when it was last looked at; None where nobody waited.
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
        """Return it as JSON has it."""
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
        adapters: ids on the Hub. Default: the adapters that travel with minilora_hub.
        base: ``"embedded"`` or an id. Default: the base that the adapters name.
        title: its headline on the Hub. Default: its name.
        hardware: e.g. ``"cpu-basic"`` or ``"zero-a10g"``. Default: as it is, or the Hub's free one.
        private: whether a new Space is seen by its owner only. One that is public already needs ``private=False``.
        mcp: whether the page is a tool for MCP clients, too.
        variables: more variables for app.py.
        secrets: {name: value}; the values go to the Hub's settings, into no file.
        token: default: the one of HF_TOKEN or ``hf auth login``.
        dry_run: look and stage, but send nothing. Works without a token; where the Hub is not reached, the Space is
            taken for a new one, and `base` must be given beside adapters.
        wait: seconds until it must run; 0 does not wait.
        progress: show what is being done, on stderr.

    Returns:
        What was sent.

    Raises:
        PublishError: the token, the Hub, the build or the app failed; the message says what to do.
        AdapterError: an adapter is not on the Hub, or is none, or they are for different bases.
        ValueError: an argument is wrong.
    """
    variables, secrets = dict(variables or {}), dict(secrets or {})
    _check_arguments(adapters, hardware, variables, secrets)
    if dry_run:
        api = HfApi(token=token or get_token() or False)
    else:
        api, space = hub.writer(token, space, create_pr=False)
    require_space(space)
    with Stages(progress) as stages, tempfile.TemporaryDirectory(prefix="minilora-space-") as scratch:
        stages.start("Looking at the adapters")
        base, public = find_models(api, tuple(adapters), base, "HF_TOKEN" in secrets, dry_run)
        title = title or space.rpartition("/")[2]
        settings = SpaceSettings(title, base, tuple(adapters), public, hardware, mcp, api.endpoint)
        stages.start("Looking at the Space")
        state = _look(api, space, dry_run)
        if state.exists and not state.private and private:
            raise PublishError(f"{space} is public already: pass --public (private=False) to say that this is meant")
        if state.exists:
            _require_ours(api, space, state)
        stages.start("Staging")
        folder = Path(scratch)
        paths = stage(folder, settings)
        deletes = sorted(path for path in state.files or {} if path.startswith(VENDORED) and path not in paths)
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
        stages.start(f"Sending {len(paths)} files")
        commit = _commit(api, plan, folder, state)
        done = SpacePush(**{**vars(plan), "dry_run": False, "commit": commit})
        if not wait:
            return done
        return SpacePush(**{**vars(done), "stage": wait_until_it_runs(api, space, commit, wait, stages)})


def _check_arguments(
    adapters: Sequence[str], hardware: str | None, variables: dict[str, str], secrets: dict[str, str]
) -> None:
    for name in adapters:
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
    for name in secrets:
        if not secrets[name]:
            raise ValueError(f"secret {name}='': must not be empty")
    if both := sorted(variables.keys() & secrets.keys()):
        raise ValueError(f"{both[0]} is given as a variable and as a secret: choose one")


def _look(api: HfApi, space: str, dry_run: bool = False) -> hub.RemoteState:
    try:
        info = patiently(lambda: api.space_info(space, files_metadata=True), 1 if dry_run else ATTEMPTS)
    except errors.RepositoryNotFoundError:
        return hub.RemoteState(False)
    except FAILURES as error:
        if dry_run and status_of(error) is None:
            return hub.RemoteState(False)
        raise PublishError(explain(error, space, "looking at the Space")) from None
    files = {
        file.rfilename: hub.RemoteFile(file.size or 0, file.blob_id or "", file.lfs.sha256 if file.lfs else None)
        for file in info.siblings or []
    }
    return hub.RemoteState(True, bool(info.private), info.sha, files)


def _require_ours(api: HfApi, space: str, state: hub.RemoteState) -> None:
    """Refuse to write over a Space that somebody made otherwise."""
    if APP not in (state.files or {}):
        return
    card = ""
    if README in (state.files or {}):
        try:
            with tempfile.TemporaryDirectory(prefix="minilora-space-") as folder:
                path = api.hf_hub_download(space, README, repo_type="space", revision=state.head, local_dir=folder)
                card = Path(path).read_text(encoding="utf-8", errors="replace")
        except FAILURES as error:
            raise PublishError(explain(error, space, "reading its card")) from None
    if MARKER not in card:
        raise PublishError(
            f"{space} is a Space that `minilora space push` did not make: nothing is overwritten; choose another name"
        )


def _set_up(api: HfApi, plan: SpacePush, secrets: dict[str, str], state: hub.RemoteState) -> hub.RemoteState:
    """Make the Space, or bring its settings up to date; only what differs is set, as each change restarts it."""
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
            return _look(api, space)
        there = patiently(lambda: api.get_space_variables(space))
        for name, value in plan.variables.items():
            if name not in there or there[name].value != value:
                _set(api.add_space_variable, space, name, value)
        for name in OUR_VARIABLES:
            if name in there and name not in plan.variables:
                _set(api.delete_space_variable, space, name)
        for name, value in secrets.items():  # nobody can read whether it is the same
            _set(api.add_space_secret, space, name, value)
        if plan.hardware is not None:
            runtime = patiently(lambda: api.get_space_runtime(space))
            if plan.hardware not in (runtime.requested_hardware, runtime.hardware):
                api.request_space_hardware(space, plan.hardware)  # type: ignore[arg-type]
    except FAILURES as error:
        raise PublishError(explain(error, space, "setting it up") + "; its files are as they were") from None
    return state


def _set(setter: Any, *arguments: str) -> None:
    patiently(lambda: setter(*arguments))


def _commit(api: HfApi, plan: SpacePush, folder: Path, state: hub.RemoteState) -> str:
    """Make the one commit. Whether it was made although its answer was lost, the repo itself says."""
    operations: list[Any] = [CommitOperationDelete(path) for path in plan.deletes]
    for attempt in range(COMMIT_ATTEMPTS):
        added = [CommitOperationAdd(path, folder / path) for path in plan.files]
        try:
            made = api.create_commit(
                plan.space,
                [*operations, *added],
                repo_type="space",
                commit_message="The comparison page of minilora_hub",
                parent_commit=state.head,
            )
            return made.oid
        except FAILURES as error:
            now = _look(api, plan.space)
            if now.head and now.head != state.head:
                if _arrived(plan, folder, now):
                    return now.head
                raise PublishError(
                    f"somebody else has committed to {plan.space} meanwhile: nothing was overwritten; push again"
                ) from None
            if attempt == COMMIT_ATTEMPTS - 1 or not is_passing(error):
                told = explain(error, plan.space, "sending the files")
                raise PublishError(f"{told}; its settings are set, its files are as they were: push again") from None
            time.sleep(wait_after(error, attempt))
    raise AssertionError("unreachable")


def _arrived(plan: SpacePush, folder: Path, now: hub.RemoteState) -> bool:
    there = now.files or {}
    return not any(path in there for path in plan.deletes) and all(
        path in there
        and same_content(folder / path, PublishedFile(path, size, file_sha256(folder / path)), there[path])
        for path, size in plan.files.items()
    )
