"""Read the target repo of a push before anything is built, and fail early if the push cannot be made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from huggingface_hub import HfApi

from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.folders import Layout
from minilora_hub.adapter_folder.hashes import file_sha256
from minilora_hub.adapter_folder.names import WEIGHTS
from minilora_hub.errors import AdapterError, PublishError
from minilora_hub.hub import client as hub
from minilora_hub.hub.errors import ATTEMPTS, FAILURES, explain
from minilora_hub.publish.card import free_text
from minilora_hub.publish.card.files import CARD


@dataclass(frozen=True)
class Target:
    """The target of a push, and its state when the push began.

    Attributes:
        repo_id: the full id.
        branch: the branch.
        tag: the tag to set, None for none.
        private: whether the repo is, or will be, private.
        create_pr: whether a pull request is opened.
        state: what the repo holds.
        tagged: the commit that the tag already points to.
        card: the README.md of the repo.
    """

    repo_id: str
    branch: str
    tag: str | None
    private: bool
    create_pr: bool
    state: hub.RemoteState
    tagged: str | None
    card: str | None

    def refuse_to_move_tag(self) -> NoReturn:
        """Raise the error about a tag that is on another commit."""
        commit = (self.tagged or "")[:12]
        raise PublishError(f"the tag {self.tag!r} is on {commit} already: choose another one, or delete it first")


def find_target(
    api: HfApi, repo_id: str, *, branch: str, tag: str | None, private: bool, create_pr: bool, dry_run: bool
) -> Target:
    """Read the state of the repo, and raise if the push cannot or must not be made.

    A dry run treats a repo that it cannot read as a new one.

    Raises:
        PublishError: the repo cannot be pushed to like this, or the Hub cannot be asked.
    """
    attempts = 1 if dry_run else ATTEMPTS
    state, tagged = hub.RemoteState(False), None
    try:
        if "/" in repo_id:
            state = hub.look(api, repo_id, branch, attempts=attempts)
        if tag and state.exists:
            tagged = hub.tags_of(api, repo_id, attempts).get(tag)
    except PublishError:
        if not dry_run:
            raise
    except FAILURES as error:
        if not dry_run:
            raise PublishError(explain(error, repo_id, "looking at the tags")) from None
    if state.exists and not state.private and private and not create_pr:
        raise PublishError(f"{repo_id} is public, and private=True was given: pass private=False (--public)")
    if state.exists and state.private and not private:
        settings = f"{api.endpoint}/{repo_id}/settings"
        raise PublishError(
            f"{repo_id} is private, and private=False (--public) was given, which is for a new repo: make it public at "
            f"{settings}, or leave that out"
        )
    if state.exists and state.head is None:
        raise PublishError(f"{repo_id} has no branch {branch!r}: make it first, or push to main")
    if not state.exists and (create_pr or branch != "main"):
        need = "a pull request" if create_pr else f"the branch {branch!r}"
        raise PublishError(f"{repo_id} is not on the Hub yet, so it cannot have {need}: push to main first")
    if tag and create_pr:
        raise PublishError(f"tag={tag!r} with create_pr: tag it when the pull request is merged")
    if create_pr:
        hub.require_pull_requests(api, repo_id, attempts)
    private = state.private if state.exists else private
    return Target(repo_id, branch, tag, private, create_pr, state, tagged, _published_card(api, repo_id, state))


def require_free_tag(target: Target, source: Source, layout: Layout) -> None:
    """Raise if this push would have to move the tag, as far as that is known before anything is built.

    A tag on the newest commit may stay if the push changes nothing; a push with other weights changes something.

    Raises:
        PublishError: the tag would have to be moved.
    """
    if target.tagged is None:
        return
    weights, there = source.folder / WEIGHTS, target.state.files.get(WEIGHTS)
    if target.tagged == target.state.head and there is not None:
        # A DoRA is converted for PEFT's layout; all other weights are published unchanged.
        rewritten = source.method == "dora" and "peft" in (source.layout, layout)
        if rewritten or there.has_content(weights, file_sha256(weights)):
            return
    target.refuse_to_move_tag()


def _published_card(api: HfApi, repo_id: str, state: hub.RemoteState) -> str | None:
    """Return the README.md of the repo, which people edit on the Hub."""
    if CARD not in state.files:
        return None
    try:
        card = free_text.decode_card(hub.read_file(api, repo_id, CARD, state.head))
        free_text.sections_of(card)
    except (UnicodeDecodeError, AdapterError) as error:
        raise PublishError(f"{CARD} in {repo_id} cannot be kept ({error}): repair it there, and push again") from None
    return card
