"""Back up votes to a dataset on the Hub, from which they are restored when a Space's disk is lost. No Gradio.

Each process appends to a separate file, so that processes never overwrite each other; all files are read.
huggingface_hub's CommitScheduler is not used: it does not restore, stops at the first failure while it starts, and does
not report later failures.
"""

from __future__ import annotations

import os
import re
import secrets
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from minilora_hub.demo.votes.storage import locked
from minilora_hub.demo.votes.votes import VoteStore
from minilora_hub.documents import write_whole
from minilora_hub.errors import PageError
from minilora_hub.hub.errors import FAILURES, explain

SECONDS = 60.0
"""Seconds between two commits: the Hub allows about two per minute in one repo."""
FILES = re.compile(r"votes(-[\w-]+)?\.jsonl", re.ASCII)


class VoteDataset:
    """Synchronizes a store of votes with a dataset, in a background thread.

    Args:
        store: the local votes; no other process may write to its file.
        repo: id of the dataset; it is created, private, if it does not exist.
        token: with the right to write there.
        say: called with a message when synchronization fails, and when it works again.
        endpoint: URL of the Hub. Default: that of huggingface_hub.

    Attributes:
        trouble: why the last synchronization failed; None if it succeeded.
    """

    def __init__(
        self,
        store: VoteStore,
        repo: str,
        token: str,
        say: Callable[[str], object] = lambda line: None,
        endpoint: str | None = None,
    ) -> None:
        from huggingface_hub import HfApi

        self._store, self._repo, self._say = store, repo, say
        self._api = HfApi(endpoint=endpoint, token=token)
        self._fetched = False
        self._sent: dict[str, int] = {}  # size of each file in the dataset
        self._ending = threading.Event()
        self._busy = threading.Lock()
        self.trouble: str | None = None

    def start(self) -> None:
        """Start the thread: download the dataset, then upload new votes once a minute."""
        threading.Thread(target=self._work, name="minilora-votes", daemon=True).start()

    def stop(self) -> None:
        """Upload the remaining votes, and end the thread."""
        self._ending.set()
        self.synchronize()

    def synchronize(self) -> bool:
        """Download the dataset once, upload new votes, and return whether that worked. May be repeated on failure."""
        with self._busy:
            try:
                self._fetch()
                self._send(self._store.file)
            except (*FAILURES, PageError) as error:
                known = isinstance(error, PageError)
                trouble = f"{error}" if known else explain(error, self._repo, f"keeping votes in {self._repo}")
                if trouble != self.trouble:
                    self._say(f"Votes are only on this machine's disk: {trouble}")
                self.trouble = trouble
                return False
            if self.trouble:
                self._say(f"Votes are in {self._repo} again.")
            self.trouble = None
            return True

    def _work(self) -> None:
        self.synchronize()
        while not self._ending.wait(SECONDS):
            self.synchronize()

    def _fetch(self) -> None:
        if self._fetched:
            return
        self._api.create_repo(self._repo, repo_type="dataset", private=True, exist_ok=True)
        names = [name for name in self._api.list_repo_files(self._repo, repo_type="dataset") if FILES.fullmatch(name)]
        with tempfile.TemporaryDirectory(prefix="minilora-votes-") as folder:
            for name in names:
                path = self._api.hf_hub_download(self._repo, name, repo_type="dataset", local_dir=folder)
                content = Path(path).read_bytes()
                self._sent[name] = len(content)
                here = self._store.folder / name
                with locked(self._store.folder):
                    if not here.is_file() or here.stat().st_size < len(content):
                        write_whole(here, content)
        # Upload the files that a killed process left on this disk.
        for file in sorted(self._store.folder.glob("votes*.jsonl")):
            self._send(file)
        self._fetched = True

    def _send(self, file: Path) -> None:
        if not file.is_file():
            return
        with locked(self._store.folder):
            content = file.read_bytes()
        if len(content) > self._sent.get(file.name, 0):
            self._api.upload_file(
                path_or_fileobj=content,
                path_in_repo=file.name,
                repo_id=self._repo,
                repo_type="dataset",
                commit_message="Votes",
            )
            self._sent[file.name] = len(content)


def open_votes(folder: Path, say: Callable[[str], object] = print) -> tuple[VoteStore, VoteDataset | None]:
    """Open the votes in a folder, and the dataset that MINILORA_VOTES_DATASET names, if it is set.

    Raises:
        ValueError: it is set, and there is no token.
    """
    repo = os.environ.get("MINILORA_VOTES_DATASET")
    if not repo:
        return VoteStore(folder), None
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise ValueError(f"MINILORA_VOTES_DATASET={repo!r}: needs a token that may write there, in HF_TOKEN")
    store = VoteStore(folder, secrets.token_hex(6))
    return store, VoteDataset(store, repo, token, say)
