"""What the Hub knows: who holds the token, what a repo holds, and copies of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, get_token, snapshot_download

from minilora_hub.errors import AdapterError, PublishError
from minilora_hub.hub.download_bar import download_bar
from minilora_hub.hub.errors import (
    ATTEMPTS,
    FAILURES,
    explain,
    patiently,
    root_cause,
    server_message,
    status_of,
)
from minilora_hub.hub.plain_files import require_plain_names
from minilora_hub.quiet import quiet_libraries

COMMIT = re.compile(r"[0-9a-f]{40}")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token with the role write"


@dataclass(frozen=True)
class RemoteFile:
    """A file in a repo: its size, and the git object id, or for a large file the sha256, of its content."""

    size: int
    oid: str
    sha256: str | None


@dataclass(frozen=True)
class RemoteState:
    """A repo at one moment.

    Attributes:
        exists: whether there is one.
        private: whether only its owner sees it.
        head: the newest commit of the branch; None where the repo or the branch is not there.
        files: what is in it.
    """

    exists: bool
    private: bool = True
    head: str | None = None
    files: dict[str, RemoteFile] | None = None


def writer(token: str | None, repo_id: str, create_pr: bool) -> tuple[HfApi, str]:
    """Check the credentials before any work is done.

    Args:
        token: a token; default: the one of HF_TOKEN or ``hf auth login``.
        repo_id: ``"owner/name"``, or ``"name"`` under the token's own user.
        create_pr: a pull request may be opened in anybody's repo.

    Returns:
        A client that uses the token, and the full id of the repo.

    Raises:
        PublishError: there is no token, it is not valid any more, or it may not write there.
    """
    token = token or get_token()
    if not token:
        raise PublishError(f"no token for the Hub: {LOG_IN}")
    api = HfApi(token=token)
    try:
        account = patiently(lambda: api.whoami(token=token))
    except FAILURES as error:
        if status_of(error) == 401:
            raise PublishError(f"the token is not valid: it is expired, revoked or mistyped; {LOG_IN}") from None
        raise PublishError(explain(error, repo_id, "checking the token")) from None
    user, access = account["name"], (account.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise PublishError(f"the token of {user} may only read: {LOG_IN}")
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    owner = repo_id.split("/")[0]
    organizations = [organization["name"] for organization in account.get("orgs") or []]
    if owner not in (user, *organizations) and not create_pr:
        raise PublishError(
            f"{user} may not write under {owner!r}: push to {user}/{repo_id.split('/')[1]}, or offer the change with "
            "create_pr=True (--create-pr)"
        )
    return api, repo_id


def look(api: HfApi, repo_id: str, revision: str | None, attempts: int = ATTEMPTS) -> RemoteState:
    """Look at a repo, without changing anything.

    Raises:
        PublishError: the Hub cannot be asked.
    """

    def info(at: str | None) -> Any:
        return patiently(lambda: api.model_info(repo_id, revision=at, files_metadata=True), attempts)

    try:
        try:
            found, here = info(revision), True
        except errors.RevisionNotFoundError:
            found, here = info(None), False
    except errors.RepositoryNotFoundError:
        return RemoteState(False)
    except FAILURES as error:
        raise PublishError(explain(error, repo_id, "looking at the repo")) from None
    if not here:
        return RemoteState(True, bool(found.private), None, {})
    files = {
        file.rfilename: RemoteFile(file.size or 0, file.blob_id or "", file.lfs.sha256 if file.lfs else None)
        for file in found.siblings or []
    }
    return RemoteState(True, bool(found.private), found.sha, files)


def tags_of(api: HfApi, repo_id: str, attempts: int = ATTEMPTS) -> dict[str, str]:
    """Return the tags of a repo: tag -> commit. May raise one of `FAILURES`."""
    refs = patiently(lambda: api.list_repo_refs(repo_id), attempts)
    return {tag.name: tag.target_commit for tag in refs.tags}


def require_pull_requests(api: HfApi, repo_id: str, attempts: int = ATTEMPTS) -> None:
    """Refuse a repo in which no pull request can be opened; a Hub that does not know them would change the branch.

    Raises:
        PublishError: it takes none, or cannot be asked.
    """
    discussions = partial(api.get_repo_discussions, repo_id, discussion_type="pull_request")
    try:
        patiently(lambda: next(iter(discussions()), None), attempts)
    except FAILURES as error:
        status = status_of(error)
        if status in (401, 429) or status is None or status >= 500:
            raise PublishError(explain(error, repo_id, "looking at the pull requests")) from None
        told = f"HTTP {status}: {server_message(root_cause(error))}"
        raise PublishError(
            f"create_pr=True: the Hub at {api.endpoint} takes no pull requests for {repo_id} ({told}): push to a repo "
            "of your own, or to a branch of this one"
        ) from None


def fetch(repo_id: str, *, revision: str | None, token: str | None, progress: bool) -> tuple[Path, str]:
    """Fetch a repo into the Hub's cache.

    Returns:
        The folder, and the commit.

    Raises:
        AdapterError: there is no such repo or revision, the Hub cannot be reached, or the repo lists files elsewhere.
    """
    try:
        with quiet_libraries():
            if not constants.HF_HUB_OFFLINE:
                # Asked for by itself: the download alone would be content with an old copy of what is gone.
                info = patiently(partial(HfApi(token=token).model_info, repo_id, revision=revision))
                require_plain_names((file.rfilename for file in info.siblings or []), repo_id)
                revision = info.sha
            download = partial(snapshot_download, tqdm_class=download_bar(repo_id, progress))
            folder = Path(patiently(partial(download, repo_id, revision=revision, token=token)))
    except errors.HFValidationError:
        raise AdapterError(f"{repo_id!r} is neither a folder nor an id on the Hub (owner/name)") from None
    except FAILURES as error:
        raise AdapterError(explain(error, repo_id, f"fetching {repo_id}")) from None
    return folder, folder.name


class BaseOnHub:
    """What the Hub says about the base an adapter names; it is asked once."""

    def __init__(self, api: HfApi, attempts: int) -> None:
        """Ask with this client, so often at most."""
        self._api, self._attempts = api, attempts
        self._known: dict[tuple[str, str | None], Any] = {}

    def exists(self, base: str, revision: str | None) -> bool:
        """Whether it is there at that revision, also where its conditions were not accepted. May raise: unknown."""
        return self._ask(base, revision) is not None

    def license(self, base: str, revision: str | None) -> str | None:
        """The licence on its card, None where it has none. May raise: unknown."""
        card = getattr(self._ask(base, revision), "card_data", None)
        data = card.to_dict() if card else {}
        found = data.get("license_name") if data.get("license") == "other" else data.get("license")
        return found if isinstance(found, str) else None

    def _ask(self, base: str, revision: str | None) -> Any:
        if (base, revision) not in self._known:
            try:
                ask = partial(self._api.model_info, base, revision=revision)
                self._known[base, revision] = patiently(ask, self._attempts)
            except errors.GatedRepoError:
                self._known[base, revision] = True
            except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
                self._known[base, revision] = None
            except FAILURES as error:
                self._known[base, revision] = error
        known = self._known[base, revision]
        if isinstance(known, BaseException):
            raise known
        return known
