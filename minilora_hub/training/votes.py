"""Answers that a person voted on, with their texts, and the pairs that follow from them. Torch is not imported.

`minilora demo --allow-training` writes the file, a JSON line for each vote; `minilora train --from-votes` reads it. A
vote for an answer is a row (its prompt and that answer) and a pair with each different answer that was shown beside it.
Ties, "all bad" and votes on equal answers prefer nothing, and are skipped.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from minilora_hub.documents import Document, need
from minilora_hub.errors import AdapterError, DataError
from minilora_hub.formatting import counted, lone_surrogate
from minilora_hub.training.data import Row
from minilora_hub.training.sources import BadRow
from minilora_hub.training.tokens import IGNORED, Encoder, Example

TIE, ALL_BAD = "tie", "all bad"
LEAST_VOTES = 10
"""Votes for an answer that a training needs."""
AN_ANSWER = need(
    f"must be the index of an answer, {TIE!r} or {ALL_BAD!r}",
    lambda choice, vote: choice in (*range(len(vote.get("answers", ()))), TIE, ALL_BAD) and choice is not True,
)


@dataclass(frozen=True)
class Answer:
    """An answer's text, and whether it ended by itself rather than at the length limit or a stop text."""

    text: str
    ended: bool


CUT_EMPTY = Answer("", False)


@dataclass(frozen=True)
class VotedAnswers(Document):
    """A vote, with the texts that it was on.

    Attributes:
        id: of the comparison.
        time: ISO 8601, UTC.
        prompt: the prompt.
        system: the system prompt; empty for none.
        answers: what was shown.
        choice: index of the chosen answer, `TIE` or `ALL_BAD`.
    """

    FILE: ClassVar[str] = "vote"
    VERSION: ClassVar[int] = 1

    id: Annotated[str, Field(min_length=1)]
    time: str
    prompt: str
    system: str
    answers: Annotated[tuple[Answer, ...], Field(min_length=2)]
    choice: Annotated[int | str, AN_ANSWER]
    schema_version: int = VERSION


@dataclass(frozen=True)
class Pair:
    """An answer that was chosen, and the different ones beside it, after the same prompt."""

    chosen: Example
    rejected: list[Example] = field(default_factory=list)


class VotePairs:
    """The pairs of a file of votes, which are collected while it is read.

    Args:
        file: the file, which must exist.
        encoder: of the base; it must label completions only.

    Attributes:
        pairs: {ids of a chosen row: its pair}; equal rows share one.
        prompts: ids of the prompt of each row.
        count: number of pairs.
        skipped: number of votes without a pair, by the reason.

    Raises:
        DataError: there is no such file.
    """

    def __init__(self, file: str, encoder: Encoder) -> None:
        if not Path(file).expanduser().is_file():
            raise DataError(f"from_votes={file!r}: no such file; minilora demo --allow-training writes one")
        self.file, self._encoder = file, encoder
        self.pairs: dict[tuple[int, ...], Pair] = {}
        self.prompts: list[tuple[int, ...]] = []
        self.count = 0
        self.skipped: Counter[str] = Counter()
        self._seen: set[str] = set()

    def check(self, place: str, value: Any) -> Row | BadRow:
        """Return a parsed value as a row, or as a bad one with the reason."""
        if isinstance(value, dict) and "candidates" in value:
            return BadRow(
                place, "is a vote without texts: only those stored by minilora demo --allow-training have them"
            )
        try:
            vote = VotedAnswers.from_dict(value)
        except AdapterError as error:
            return BadRow(place, str(error))
        if surrogate := lone_surrogate(vote.to_dict()):
            return BadRow(place, f"contains a lone surrogate, {surrogate}, which no tokenizer can encode")
        return Row(place, "vote", {"vote": vote})

    def encode(self, row: Row) -> Example | BadRow | None:
        """Return the chosen answer after its prompt, and keep its pair; None for a vote that prefers nothing."""
        vote: VotedAnswers = row.fields["vote"]
        if vote.id in self._seen:
            return None
        self._seen.add(vote.id)
        if not isinstance(vote.choice, int):
            self.skipped[vote.choice] += 1
            return None
        if not vote.answers[vote.choice].text:
            self.skipped["empty"] += 1
            return None
        chosen = self._encoded(row.place, vote, vote.answers[vote.choice])
        # One that was stopped before its first token is nothing to compare with.
        others = [
            self._encoded(row.place, vote, answer) for answer in dict.fromkeys(vote.answers) if answer != CUT_EMPTY
        ]
        for example in (chosen, *others):
            if isinstance(example, BadRow):
                return example
        assert isinstance(chosen, Example)
        rejected = [other for other in others if isinstance(other, Example) and other.input_ids != chosen.input_ids]
        if not rejected:
            self.skipped["equal answers"] += 1
            return None
        pair = self.pairs.setdefault(tuple(chosen.input_ids), Pair(chosen))
        known = {tuple(other.input_ids) for other in pair.rejected}
        new = [other for other in rejected if tuple(other.input_ids) not in known]
        pair.rejected.extend(new)
        self.prompts.append(tuple(chosen.input_ids[: _first_label(chosen)]))
        self.count += len(new)
        return chosen

    def require_enough(self) -> None:
        """Raise DataError if too few votes prefer an answer."""
        if len(self.prompts) < LEAST_VOTES:
            raise DataError(
                f"from_votes={self.file!r}: {self.described()}; at least {LEAST_VOTES} votes with a choice are needed"
            )

    def described(self) -> str:
        """Return the numbers in one line."""
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        choices = f"{counted(len(self.prompts), 'vote')} with a choice, {counted(self.count, 'pair')}"
        return choices + (f"; skipped: {skipped}" if skipped else "")

    def _encoded(self, place: str, vote: VotedAnswers, answer: Answer) -> Example | BadRow:
        prompt: Any = vote.prompt
        completion: Any = answer.text
        if vote.system and not self._encoder.has_template:  # as the page writes them
            prompt = f"{vote.system}\n\n{prompt}"
        elif vote.system:
            prompt = [{"role": "system", "content": vote.system}, {"role": "user", "content": prompt}]
            completion = [{"role": "assistant", "content": completion}]
        row = Row(place, "prompt and completion", {"prompt": prompt, "completion": completion})
        example = self._encoder.encode(row)
        if answer.ended or isinstance(example, BadRow):
            return example
        # An answer that was cut off has no end token: it must not be learned that answers end there.
        last = max(index for index, label in enumerate(example.labels) if label != IGNORED)
        if example.labels[last] in self._encoder.ends:
            example = replace(example, input_ids=example.input_ids[:last], labels=example.labels[:last])
        return example if _first_label(example) else BadRow(place, "an answer was cut off before its first token")


def _first_label(example: Example) -> int:
    """Return the index of the first token with a loss; 0 if there is none."""
    return next((index for index, label in enumerate(example.labels) if label != IGNORED), 0)
