"""Votes on blind comparisons, one JSON line each, in a file that several processes may append to. No Gradio.

A writer that is killed while it writes leaves an incomplete line, which readers skip and count.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from minilora_hub.demo.runs.comparison import Comparison, answer_hash, now
from minilora_hub.demo.ui.page_state import text_of
from minilora_hub.demo.votes.storage import append_line, locked
from minilora_hub.documents import Document, Scalar, need, strict_json
from minilora_hub.errors import AdapterError, PageError
from minilora_hub.training.votes import ALL_BAD, TIE

EACH_ONCE = need(
    "must be the index of each candidate once",
    lambda order, vote: sorted(order) == [*range(len(vote.get("candidates", order)))],
)
A_CANDIDATE = need(
    f"must be the index of a candidate, {TIE!r} or {ALL_BAD!r}",
    lambda choice, vote: choice in (*range(len(vote.get("candidates", ()))), TIE, ALL_BAD) and choice is not True,
)


@dataclass(frozen=True)
class Candidate:
    """One answer that was voted on.

    Attributes:
        name: of the base or the adapter.
        kind: the method, or ``"base"``.
        weights: hash of its weights, or ``"unknown"``.
        answer: hash of the answer.
        revision: the adapter's commit on the Hub, None where it comes from a folder.
    """

    name: Annotated[str, Field(min_length=1)]
    kind: str
    weights: str
    answer: str
    revision: str | None = None


@dataclass(frozen=True)
class Vote(Document):
    """A visitor's vote on one blind comparison.

    Attributes:
        id: of the comparison; there is one vote per comparison.
        time: ISO 8601, UTC.
        prompt: the prompt.
        sampling: the settings, seed included.
        base: the base's name.
        base_fingerprint: of its checkpoint.
        candidates: the answers, the base's first.
        order: for each letter shown, A first, the index of its candidate.
        choice: index of the chosen candidate, `TIE` or `ALL_BAD`.
    """

    FILE: ClassVar[str] = "vote"
    VERSION: ClassVar[int] = 1

    id: Annotated[str, Field(min_length=1)]
    time: str
    prompt: str
    sampling: dict[str, Scalar]
    base: str
    base_fingerprint: str
    candidates: Annotated[tuple[Candidate, ...], Field(min_length=2)]
    order: Annotated[tuple[int, ...], EACH_ONCE]
    choice: Annotated[int | str, A_CANDIDATE]
    schema_version: int = VERSION


def vote_on(comparison: Comparison, identifier: str, order: tuple[int, ...], choice: int | str) -> Vote:
    """Return a vote on a comparison; `choice` is the index of one of its columns, `TIE` or `ALL_BAD`."""
    candidates = tuple(
        Candidate(about["name"], about["kind"], weights.hash, answer_hash(text_of(column)), weights.revision)
        for column, weights in zip(comparison.columns, comparison.weights, strict=True)
        for about in [column["about"]]
    )
    return Vote(
        identifier,
        now(),
        comparison.prompt,
        comparison.sampling,
        comparison.base,
        comparison.weights[0].hash,
        candidates,
        order,
        choice,
    )


@dataclass(frozen=True)
class Votes:
    """The votes of a store in chronological order, and the number of unreadable lines."""

    votes: tuple[Vote, ...]
    skipped: int


class VoteStore:
    """The votes in a folder.

    Args:
        folder: created when the first vote is stored.
        writer: new votes are written to ``votes-<writer>.jsonl``; default: ``votes.jsonl``. All files are read.
    """

    def __init__(self, folder: Path, writer: str | None = None) -> None:
        self.folder = folder
        self.file = folder / ("votes.jsonl" if writer is None else f"votes-{writer}.jsonl")

    def add(self, vote: Vote) -> None:
        """Store a vote, and flush it to disk.

        Raises:
            PageError: it cannot be stored.
        """
        try:
            vote.validate()
            line = json.dumps(vote.to_dict(), ensure_ascii=False, allow_nan=False)
            with locked(self.folder):
                # Browsers can send lone surrogates, which UTF-8 cannot encode.
                append_line(self.file, line.encode("utf-8", "replace"))
        except (AdapterError, OSError) as error:
            raise PageError(f"the vote could not be stored: {error}") from error

    def read(self) -> Votes:
        """Read all votes, without duplicates.

        Raises:
            PageError: the folder cannot be read.
        """
        if not self.folder.is_dir():
            return Votes((), 0)
        try:
            with locked(self.folder):
                contents = [file.read_bytes() for file in sorted(self.folder.glob("votes*.jsonl"))]
        except OSError as error:
            raise PageError(f"the votes cannot be read: {error}") from error
        votes: dict[str, Vote] = {}
        skipped = 0
        for line in (line for content in contents for line in content.split(b"\n") if line.strip()):
            try:
                vote = Vote.from_dict(strict_json(line))
            except (ValueError, AdapterError):
                skipped += 1
            else:
                votes.setdefault(vote.id, vote)
        return Votes(tuple(sorted(votes.values(), key=lambda vote: vote.time)), skipped)
