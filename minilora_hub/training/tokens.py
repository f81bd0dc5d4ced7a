"""Rows as token ids and labels: which tokens are learned, and that they are exactly the ones generation will meet.

A chat is rendered by the tokenizer's own template, and cut where each of the assistant's turns begins and ends. The
places are found by rendering the conversation up to there, which is exact only if each such text is the start of the
whole one; a template that writes earlier turns differently once later ones follow is refused for such a row, and so is
never trained with labels that are off. Each piece is tokenized on its own, as generation does with its prompt. What
the template writes after the end-of-turn token is no answer: it has no loss.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from minilora_hub.training.data import BadRow, Row

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """A row ready for training: `labels` equals `input_ids` where there is a loss, else -100."""

    place: str
    input_ids: list[int]
    labels: list[int]


class Encoder:
    """Turns rows into examples.

    Args:
        tokenizer: the base's.
        max_length: tokens in a row at most.
        truncate: cut longer rows at their end; otherwise they are bad rows.
        loss_on: ``"completions"`` or ``"all"``.
        chat: write texts in `prompt` as the user's turn, where the tokenizer has a chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        truncate: bool = False,
        loss_on: str = "completions",
        chat: bool = True,
    ) -> None:
        self.tokenizer, self.max_length, self.truncate, self.loss_on = tokenizer, max_length, truncate, loss_on
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.chat = chat and self.has_template

    def encode(self, row: Row) -> Example | BadRow:
        """One row as tokens, or why that cannot be done exactly."""
        try:
            pieces = self._pieces(row)
        except _CannotBeExact as error:
            return BadRow(row.place, str(error))
        ids: list[int] = []
        labels: list[int] = []
        for tokens, learned in pieces:
            ids += tokens
            labels += tokens if learned or self.loss_on == "all" else [IGNORED] * len(tokens)
        if len(ids) > self.max_length:
            if not self.truncate:
                reason = f"has {len(ids)} tokens, max_length is {self.max_length}: raise it, or pass --truncate"
                return BadRow(row.place, reason)
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORED for label in labels[1:]):
            return BadRow(row.place, "has nothing to learn" + (" once it is cut" if self.truncate else ""))
        return Example(row.place, ids, labels)

    def _pieces(self, row: Row) -> list[tuple[list[int], bool]]:
        """(tokens, whether they are learned), in order."""
        fields = row.fields
        if row.kind == "text":
            return [(self._closed(self._tokens(fields["text"], special=True)), True)]
        if row.kind == "messages":
            return self._chat(fields["messages"], fields.get("tools"))
        prompt, completion = fields["prompt"], fields["completion"]
        if not isinstance(prompt, str):
            return self._chat([*prompt, *completion], fields.get("tools"), first=len(prompt))
        if self.chat:
            # As generation sees it: the prompt with the opening of the answer, then the answer and its end.
            start = self._render([{"role": "user", "content": prompt}], opened=True)
            return [(self._tokens(start), False), (self._closed(self._tokens(completion)), True)]
        # The base's own special tokens at the start belong to the prompt, also where that is empty.
        return [(self._tokens(prompt, special=True), False), (self._closed(self._tokens(completion)), True)]

    def _chat(self, messages: list[dict[str, Any]], tools: Any, first: int = 0) -> list[tuple[list[int], bool]]:
        if not self.has_template:
            raise _CannotBeExact("is a chat, but the base's tokenizer has no chat template: use prompt and completion")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        whole = self._render(messages, tools=tools)
        pieces, done = [], 0
        for index, turn in enumerate(messages):
            if turn["role"] != "assistant" or index < first:
                continue
            start = self._render(messages[:index], tools=tools, opened=True)
            end = self._render(messages[: index + 1], tools=tools)
            if not (whole.startswith(end) and end.startswith(start) and len(start) >= done):
                raise _CannotBeExact(
                    f"turn {index + 1}: the chat template writes it differently alone than in the whole conversation, "
                    "so its tokens cannot be told apart: make a row of prompt and completion for each answer"
                )
            answer = self._tokens(whole[len(start) : len(end)])
            kept = self._up_to_end_of_turn(answer)
            pieces += [(self._tokens(whole[done : len(start)]), False), (answer[:kept], True), (answer[kept:], False)]
            done = len(end)
        pieces.append((self._tokens(whole[done:]), False))
        while pieces and not pieces[-1][1]:  # nothing is learned after the last answer
            pieces.pop()
        return pieces

    def _render(self, messages: list[dict[str, Any]], tools: Any = None, opened: bool = False) -> str:
        from jinja2 import TemplateError

        if not messages:
            raise _CannotBeExact("starts with the assistant: a chat needs a turn before it")
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=opened
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise _CannotBeExact(f"the chat template refuses it: {' '.join(str(error).split())[:200]}") from error
        return str(text)

    def _tokens(self, text: str, special: bool = False) -> list[int]:
        if not text and not special:
            return []
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        # Some tokenizers end a text by themselves; the end of a row is decided here.
        return ids[:-1] if special and ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _closed(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def _up_to_end_of_turn(self, answer: list[int]) -> int:
        """How many tokens of an answer there are up to its last end token; all of them where there is none."""
        end = self.tokenizer.eos_token_id
        places = [index for index, token in enumerate(answer) if token == end]
        return places[-1] + 1 if places else len(answer)


class _CannotBeExact(Exception):  # noqa: N818  it becomes a BadRow
    pass
