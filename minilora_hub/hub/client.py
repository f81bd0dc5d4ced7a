"""Query the Hub for the owner of a token, the content of a repo and facts about a base; download repos."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, get_token, snapshot_download
from huggingface_hub.utils.sha import git_hash

from minilora_hub.errors import AdapterError, PublishError
from minilora_hub.hub.download_bar import download_bar
from minilora_hub.hub.errors import ATTEMPTS, FAILURES, explain, patiently, root_cause, server_message, status_of
from minilora_hub.hub.plain_files import require_plain_names
from minilora_hub.quiet import quiet_libraries

PUBLIC_HUB = "https://huggingface.co"
REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token with the role write"


@dataclass(frozen=True)
class RemoteFile:
    """A file in a repo.

    Attributes:
        size: in bytes.
        oid: git's id of its content.
        sha256: of its content, where it is stored in LFS; else None.
    """

    size: int
    oid: str
    sha256: str | None

    def has_content(self, path: Path, sha256: str) -> bool:
        """Return whether it is the same as a local file, whose sha256 is given."""
        if path.stat().st_size != self.size:
            return False
        return self.sha256 == sha256 if self.sha256 else self.oid == git_hash(path.read_bytes())


@dataclass(frozen=True)
class RemoteState:
    """A repo at one moment.

    Attributes:
        exists: whether it is there.
        private: whether it is private.
        head: the newest commit of the branch; None where the repo or the branch does not exist.
        files: {path: file} at that commit.
    """

    exists: bool
    private: bool = True
    head: str | None = None
    files: dict[str, RemoteFile] = field(default_factory=dict)

    def holds(self, folder: Path, hashes: Mapping[str, str | None]) -> bool:
        """Return whether it has the files of `hashes`, {path: sha256}, of a folder, and none whose hash is None."""
        return all(
            path not in self.files
            if sha256 is None
            else path in self.files and self.files[path].has_content(folder / path, sha256)
            for path, sha256 in hashes.items()
        )


def writer(token: str | None, repo_id: str, create_pr: bool) -> tuple[HfApi, str]:
    """Check the credentials before any work is done.

    Args:
        token: a token; default: the one of HF_TOKEN or ``hf auth login``.
        repo_id: ``"owner/name"``, or ``"name"`` under the token's own user.
        create_pr: whether a pull request is opened, which is possible in other users' repos, too.

    Returns:
        A client that uses the token, and the full id of the repo.

    Raises:
        PublishError: there is no token, it is not valid, or it may not write there.
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


def reader(token: str | None, repo_id: str) -> tuple[HfApi, str]:
    """Return a client for a dry run, and the full id of the repo: as it is given where no token tells its owner."""
    token = token or get_token()
    api = HfApi(token=token or False)
    if "/" not in repo_id and token:
        with suppress(*FAILURES):  # a dry run works without the Hub
            repo_id = f"{api.whoami()['name']}/{repo_id}"
    return api, repo_id


def look(
    api: HfApi, repo_id: str, revision: str | None = None, *, attempts: int = ATTEMPTS, repo_type: str = "model"
) -> RemoteState:
    """Return what a repo holds.

    Raises:
        PublishError: the Hub cannot be asked.
    """

    def info(at: str | None) -> Any:
        ask = partial(api.repo_info, repo_id, revision=at, repo_type=repo_type, files_metadata=True)
        return patiently(ask, attempts)

    try:
        try:
            found = info(revision)
        except errors.RevisionNotFoundError:
            return RemoteState(True, bool(info(None).private))
    except errors.RepositoryNotFoundError:
        return RemoteState(False)
    except FAILURES as error:
        what = "Space" if repo_type == "space" else "repo"
        raise PublishError(explain(error, repo_id, f"looking at the {what}")) from error
    files = {
        file.rfilename: RemoteFile(file.size or 0, file.blob_id or "", file.lfs.sha256 if file.lfs else None)
        for file in found.siblings or []
    }
    return RemoteState(True, bool(found.private), found.sha, files)


def read_file(api: HfApi, repo_id: str, path: str, commit: str | None, repo_type: str = "model") -> bytes:
    """Return the content of a small file of a repo.

    Raises:
        PublishError: it cannot be read.
    """
    try:
        download = partial(api.hf_hub_download, repo_id, path, revision=commit, repo_type=repo_type)
        return Path(patiently(download)).read_bytes()
    except FAILURES as error:
        raise PublishError(explain(error, repo_id, f"reading {path} of the repo")) from None


def tags_of(api: HfApi, repo_id: str, attempts: int = ATTEMPTS) -> dict[str, str]:
    """Return {tag: commit} of a repo. May raise one of `FAILURES`."""
    refs = patiently(lambda: api.list_repo_refs(repo_id), attempts)
    return {tag.name: tag.target_commit for tag in refs.tags}


def require_pull_requests(api: HfApi, repo_id: str, attempts: int = ATTEMPTS) -> None:
    """Refuse a repo in which no pull request can be opened: some Hubs would commit to the branch instead.

    Raises:
        PublishError: it takes none, or the Hub cannot be asked.
    """
    discussions = partial(api.get_repo_discussions, repo_id, discussion_type="pull_request")
    try:
        patiently(lambda: next(iter(discussions()), None), attempts)
    except FAILURES as error:
        status = status_of(error)
        if status in (401, 429) or status is None or status >= 500:
            raise PublishError(explain(error, repo_id, "looking at the pull requests")) from None
        reason = f"HTTP {status}: {server_message(root_cause(error))}"
        raise PublishError(
            f"create_pr=True: the Hub at {api.endpoint} takes no pull requests for {repo_id} ({reason}): push to a "
            "repo of your own, or to a branch of this one"
        ) from None


def require_no_revision(folder: str, revision: str | None) -> None:
    """Raise ValueError where a revision is given for a folder."""
    if revision is not None:
        raise ValueError(f"revision={revision!r}: {folder!r} is a folder, which has no revisions")


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
                # The download alone would return an old copy from the cache where the repo is gone.
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
    """The Hub's information about the bases of adapters. Each base is requested only once.

    Args:
        api: the client. Default: one with the user's own token.
        attempts: the largest number of calls for an answer.
    """

    def __init__(self, api: HfApi | None = None, attempts: int = 1) -> None:
        self._api, self._attempts = api or HfApi(), attempts
        self._known: dict[tuple[str, str | None], Any] = {}

    def exists(self, base: str, revision: str | None) -> bool:
        """Return whether a base is there at a revision, also where its conditions were not accepted yet.

        Raises one of `FAILURES` where the Hub does not answer.
        """
        return self._ask(base, revision) is not None

    def license(self, base: str, revision: str | None) -> str | None:
        """Return the licence on a base's card, None where it has none. Raises as `exists`."""
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
