"""Store the answers that the page's owner votes on, with their texts, for `minilora train --from-votes`. No Gradio.

They stay on this machine, in a folder of their own that nothing uploads, readable by its owner alone, and so do the
votes that this page's Board counts. Those of other pages, which may go to a dataset on the Hub, have hashes of the
answers only.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

from minilora_hub.demo.runs.comparison import Comparison, now
from minilora_hub.demo.ui.page_state import text_of
from minilora_hub.demo.votes.storage import append_line, locked
from minilora_hub.documents import strict_json
from minilora_hub.errors import AdapterError, PageError
from minilora_hub.training.votes import LEAST_VOTES, Answer, VotedAnswers

FILE = "voted-answers.jsonl"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class VotedAnswersFile:
    """The file, and the command that trains on it.

    Args:
        folder: for the votes of this page alone; its owner alone can read it.
        base: the page's base, as a command names it.
        host: the address on which the page listens.

    Raises:
        ValueError: others can open the page, its votes go to the Hub, or the folder cannot be made.
    """

    def __init__(self, folder: Path, base: str, host: str = LOOPBACK[0]) -> None:
        if host not in LOOPBACK:
            raise ValueError(f"allow_training on host={host!r}: it is for the page's owner alone, on {LOOPBACK[0]}")
        if dataset := os.environ.get("MINILORA_VOTES_DATASET"):
            raise ValueError(
                f"allow_training with MINILORA_VOTES_DATASET={dataset!r}: texts are never stored on a page whose votes "
                "go to the Hub: unset one of the two"
            )
        self.folder, self.file, self._base = folder, folder / FILE, base
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        except OSError as error:
            raise ValueError(
                f"allow_training: the folder {folder} cannot be made: {error.strerror or error}"
            ) from error

    def add(self, comparison: Comparison, identifier: str, choice: int | str) -> None:
        """Store a vote, and flush it to disk; the arguments are those of `vote_on`.

        Raises:
            PageError: it cannot be stored.
        """
        answers = tuple(Answer(text_of(column), column["state"] == "eos") for column in comparison.columns)
        system = str(comparison.sampling.get("system_prompt", "")).strip()
        vote = VotedAnswers(identifier, now(), comparison.prompt, system, answers, choice)
        try:
            vote.validate()
            line = json.dumps(vote.to_dict(), ensure_ascii=False, allow_nan=False)
            with locked(self.folder):
                os.close(os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
                self.file.chmod(0o600)
                append_line(self.file, line.encode("utf-8", "replace"))
        except (AdapterError, OSError) as error:
            raise PageError(f"the vote could not be stored for training: {error}") from error

    def count(self) -> int:
        """Return the number of stored votes that prefer one answer to a different one."""
        found = set()
        for line in self.file.read_bytes().splitlines() if self.file.is_file() else ():
            try:
                vote = VotedAnswers.from_dict(strict_json(line))
            except (ValueError, AdapterError):
                continue  # the training names a damaged line
            if (
                isinstance(vote.choice, int)
                and len({a.text for a in vote.answers}) > 1
                and vote.answers[vote.choice].text
            ):
                found.add(vote.id)
        return len(found)

    def next_step(self) -> tuple[str, str]:
        """Return what the page says of the stored votes: words, and once there are enough the command to run."""
        count = self.count()
        if count < LEAST_VOTES:
            return f"{count} of the {LEAST_VOTES} votes that a training needs.", ""
        command = ["minilora", "train", "--method", "lora", "--base", self._base, "--from-votes", str(self.file)]
        command += ["--validation", "0.2", "--out", "mine"]
        return f"Train an adapter from your {count} votes:", shlex.join(command)
