"""Votes that outlive a Space's disk: a data set on the Hub that is read at the start and appended to. No Gradio.

Each process appends to a file of its own, so that several never overwrite each other's; all of them are read.
huggingface_hub's CommitScheduler would do half of it, but gives up at the first failure while it starts, and tells
nobody of later ones.
"""

from __future__ import annotations

import os
import re
import secrets
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minilora_hub.demo.votes.storage import locked
from minilora_hub.demo.votes.votes import VoteStore
from minilora_hub.documents import write_whole
from minilora_hub.errors import PageError
from minilora_hub.hub.errors import FAILURES, explain

SECONDS = 60.0
"""Between two commits: the Hub allows a repo about two a minute."""
FILES = re.compile(r"votes(-[\w-]+)?\.jsonl", re.ASCII)


class VoteSync:
    """Keeps a store of votes and a data set the same, from a thread of its own.

    Args:
        store: the votes here; its file must be this process's alone.
        repo: id of the data set; it is made, private, if there is none.
        token: with the right to write there.
        say: called with a line of text when something goes wrong, or is well again.

    Attributes:
        trouble: why the last attempt failed; None if it did not.
    """

    def __init__(
        self, store: VoteStore, repo: str, token: str, say: Callable[[str], object] = lambda line: None
    ) -> None:
        """Prepare; nothing is sent or read yet."""
        from huggingface_hub import HfApi

        self._store, self._repo, self._say = store, repo, say
        self._api = HfApi(token=token)
        self._fetched = False
        self._sent: dict[str, int] = {}
        self._ending = threading.Event()
        self._busy = threading.Lock()
        self.trouble: str | None = None

    def start(self) -> None:
        """Begin: fetch what the data set holds, then send what is new, once a minute."""
        threading.Thread(target=self._work, name="minilora-votes", daemon=True).start()

    def stop(self) -> None:
        """Send what is left, and end."""
        self._ending.set()
        self.sync()

    def sync(self) -> bool:
        """Fetch once, send what is new; whether it worked. What failed is tried again the next time."""
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
        self.sync()
        while not self._ending.wait(SECONDS):
            self.sync()

    def _fetch(self) -> None:
        if self._fetched:
            return
        self._api.create_repo(self._repo, repo_type="dataset", private=True, exist_ok=True)
        names = [name for name in self._api.list_repo_files(self._repo, repo_type="dataset") if FILES.fullmatch(name)]
        with tempfile.TemporaryDirectory(prefix="minilora-votes-") as folder:
            for name in names:
                path = self._api.hf_hub_download(self._repo, name, repo_type="dataset", local_dir=folder)
                self._take(name, Path(path).read_bytes())
        # What a process that was killed has left on this disk unsent goes along once.
        for file in sorted(self._store.folder.glob("votes*.jsonl")):
            self._send(file)
        self._fetched = True

    def _take(self, name: str, content: bytes) -> None:
        self._sent[name] = len(content)
        with locked(self._store.folder):
            here = self._store.folder / name
            if not here.is_file() or here.stat().st_size < len(content):
                write_whole(here, content)

    def _send(self, file: Path) -> None:
        if not file.is_file():
            return
        with locked(self._store.folder):
            content = file.read_bytes()
        if len(content) <= self._sent.get(file.name, 0):
            return
        options: dict[str, Any] = {"repo_type": "dataset", "commit_message": "Votes"}
        self._api.upload_file(path_or_fileobj=content, path_in_repo=file.name, repo_id=self._repo, **options)
        self._sent[file.name] = len(content)


def open_votes(folder: Path, say: Callable[[str], object]) -> tuple[VoteStore, VoteSync | None]:
    """Open the votes in a folder, kept in the data set that MINILORA_VOTES_DATASET names, if it is set.

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
    return store, VoteSync(store, repo, token, say)
