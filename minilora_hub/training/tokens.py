"""Encode rows as token ids and labels, with exactly the tokens that occur in generation.

A chat is tokenized once, as a whole, by `apply_chat_template`, which gives the row's ids. An answer begins where the
ids of the generation prompt end, and ends with the token at which generation stops. Both positions are found by
comparing ids, so they are correct for every tokenizer, with or without offsets. A row is rejected if the prompt's ids
are not a prefix of the row's: tokenizing parts separately would train on tokens that never occur at inference
(SentencePiece adds a space before a part; a token may cross a boundary; a template may drop earlier reasoning).

If a template writes no end token after an answer, the tokenizer's eos token is added after the last answer.

A plain prompt and its completion are tokenized together in the same way. If a token would cross the boundary, the
completion's tokens are appended to the prompt's, as in generation, if together they decode to the same text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from minilora_hub.bases.end_tokens import end_token_ids
from minilora_hub.training.data import Row
from minilora_hub.training.sources import BadRow

IGNORED = -100
DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
AS_TEXTS = "write the rendered prompt and the answer as texts, with --set chat=false"
MARKS = ("weight", "loss")
"""Fields that set whether a message has a loss; they are not passed to the chat template."""


@dataclass(frozen=True)
class Example:
    """A tokenized row: `labels` equals `input_ids` where there is a loss, else -100; `more` is in further columns."""

    place: str
    input_ids: list[int]
    labels: list[int]
    more: dict[str, Any] = field(default_factory=dict)


class Encoder:
    """Converts rows to examples.

    Args:
        tokenizer: the base's.
        max_length: maximum tokens in a row.
        truncate: cut longer rows at their end; otherwise they are bad rows.
        loss_on: ``"completions"`` or ``"all"``.
        chat: write texts in `prompt` as the user's turn, where the tokenizer has a chat template.
        ends: ids of the tokens that end an answer. Default: those of the tokenizer and its chat template.
        now: the time for chat templates that write the date. Default: the time of each call.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        truncate: bool = False,
        loss_on: str = "completions",
        chat: bool = True,
        ends: Sequence[int] | None = None,
        now: datetime | None = None,
    ) -> None:
        self.tokenizer, self.max_length, self.truncate, self.loss_on = tokenizer, max_length, truncate, loss_on
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.chat = chat and self.has_template
        self.ends = frozenset(end_token_ids(tokenizer, None) if ends is None else ends)
        self._now = now if "strftime_now" in str(getattr(tokenizer, "chat_template", None)) else None

    def encode(self, row: Row) -> Example | BadRow:
        """Tokenize a row, or return it as a bad row with the reason why it cannot be tokenized exactly."""
        try:
            ids, learned = self._encoded(row)
        except _CannotBeExact as error:
            return BadRow(row.place, str(error))
        labels = [token if kept else IGNORED for token, kept in zip(ids, learned, strict=True)]
        if len(ids) > self.max_length:
            if not self.truncate:
                reason = f"has {len(ids)} tokens, max_length is {self.max_length}: raise it, or pass --truncate"
                return BadRow(row.place, reason)
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORED for label in labels[1:]):
            return BadRow(row.place, "has no token with a loss" + (" after truncation" if self.truncate else ""))
        return Example(row.place, ids, labels)

    def _encoded(self, row: Row) -> tuple[list[int], list[bool]]:
        """Return the row's ids, and for each whether it has a loss."""
        fields = row.fields
        if row.kind == "text":
            ids = self._closed(self._plain(fields["text"]))
            return ids, [True] * len(ids)
        tools = fields.get("tools")
        if row.kind == "messages":
            return self._chat(fields["messages"], tools)
        prompt, completion = fields["prompt"], fields["completion"]
        if not isinstance(prompt, str):
            return self._chat([*prompt, *completion], tools, first=len(prompt))
        if self.chat:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return self._chat(turns, tools)
        return self._continued(prompt, completion)

    def _chat(self, messages: list[dict[str, Any]], tools: Any, first: int = 0) -> tuple[list[int], list[bool]]:
        """Encode a conversation; the assistant's turns from the `first` message on are its answers."""
        if not self.has_template:
            raise _CannotBeExact("is a chat, but the base's tokenizer has no chat template: use prompt and completion")
        turns, ids = self._whole(messages, tools)
        learned = [self.loss_on == "all"] * len(ids)
        for index, turn in enumerate(turns):
            is_learned = _is_learned(messages[index])
            if self.loss_on == "all" and turn["role"] != "assistant" and not is_learned:
                raise _CannotBeExact(f"turn {index + 1}: has weight 0, which is only allowed in the assistant's turns")
            in_prompt = turn["role"] != "assistant" or index < first
            if in_prompt and (self.loss_on != "all" or is_learned):
                continue
            start = self._answer_start(turns, index, tools, ids)
            last = index == len(turns) - 1
            stop = self._answer_stop(ids if last else self._ids(turns[: index + 1], tools), ids, start, index)
            if last and ids[stop - 1] not in self.ends:
                ids, stop, learned = self._with_eos(ids), len(ids) + 1, [*learned, True]
            learned[start:stop] = [is_learned] * (stop - start)
        return ids, learned

    def _whole(self, messages: list[dict[str, Any]], tools: Any) -> tuple[list[dict[str, Any]], list[int]]:
        """Return the messages in the form that the template accepts, and all ids.

        Arguments of tool calls that are JSON strings are parsed, as most templates expect; if the template fails on
        the parsed form, the strings are used.
        """
        given = [{name: value for name, value in turn.items() if name not in MARKS} for turn in messages]
        parsed = [_with_parsed_arguments(turn) for turn in given]
        try:
            return parsed, self._ids(parsed, tools)
        except _CannotBeExact:
            if parsed == given:
                raise
            return given, self._ids(given, tools)

    def _answer_start(self, turns: list[dict[str, Any]], index: int, tools: Any, ids: list[int]) -> int:
        """Return the number of ids that precede this turn in generation; they must be a prefix of `ids`."""
        if not index:
            raise _CannotBeExact("starts with the assistant: a chat needs a user turn before it")
        prompt = self._ids(turns[:index], tools, opened=True)
        if ids[: len(prompt)] == prompt:
            return len(prompt)
        opened = self._template(turns[:index], tools, tokenize=False, add_generation_prompt=True)
        if not self._template(turns, tools, tokenize=False).startswith(opened):
            raise self._written_differently(index)
        raise _CannotBeExact(
            f"turn {index + 1}: its first characters merge with the prompt's last token, so generation would write "
            f"other tokens: begin it with another character (not white space), or {AS_TEXTS}"
        )

    def _answer_stop(self, alone: list[int], ids: list[int], start: int, index: int) -> int:
        """Return the end of the turn, after its end token; `alone` holds the ids of the conversation up to this turn.

        After the first end token a template may write white space and further end tokens, some templates only after
        the last turn. They need not occur in the whole conversation, and have no loss.
        """
        same = _common(alone, ids)
        places = [place for place in range(start, same) if ids[place] in self.ends]
        for place in places:
            if not self.tokenizer.decode([t for t in alone[place + 1 :] if t not in self.ends]).strip():
                return place + 1
        if same < len(alone):
            raise self._written_differently(index)
        if places:
            return places[-1] + 1
        return same + (
            same < len(ids) and ids[same] in self.ends
        )  # some templates start the next turn with the end token of this turn

    @staticmethod
    def _written_differently(index: int) -> _CannotBeExact:
        return _CannotBeExact(
            f"turn {index + 1}: the chat template renders it differently alone than in the whole conversation, "
            f"so its tokens cannot be separated: write each answer as a row of prompt and completion, or {AS_TEXTS}"
        )

    def _ids(self, messages: list[dict[str, Any]], tools: Any, opened: bool = False) -> list[int]:
        encoded = self._template(messages, tools, tokenize=True, return_dict=True, add_generation_prompt=opened)
        return list(encoded["input_ids"])

    def _template(self, messages: list[dict[str, Any]], tools: Any, **settings: Any) -> Any:
        try:
            return self._rendered(messages, tools, **settings)
        except Exception as error:  # a template is arbitrary code of the base's author
            raise _CannotBeExact(f"the chat template rejects it: {' '.join(str(error).split())[:200]}") from error

    def _rendered(self, messages: list[dict[str, Any]], tools: Any, **settings: Any) -> Any:
        if self._now is not None:
            template = self.tokenizer.get_chat_template(None, tools)
            settings["chat_template"] = dated_template(template, self._now)
        return self.tokenizer.apply_chat_template(messages, tools=tools, **settings)

    def _continued(self, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
        """Encode a plain prompt as in generation, followed by the completion."""
        given, ids = self._plain(prompt), self._plain(prompt + completion)
        if ids[: len(given)] != given:
            joined = [*given, *self._following(completion)]
            if self._decoded(joined) != self._decoded(ids):
                raise _CannotBeExact(
                    "the completion's first characters merge with the prompt's last token, and tokenized separately "
                    "they decode to another text: "
                    "move white space from the end of the prompt to the beginning of the completion"
                )
            ids = joined
        ids = self._closed(ids)
        return ids, [self.loss_on == "all"] * len(given) + [True] * (len(ids) - len(given))

    def _plain(self, text: str) -> list[int]:
        """Return a text's ids as in generation.

        They begin with the tokenizer's special tokens, unless the text begins like a rendered chat, which already
        contains them. A special token that the tokenizer appends is removed: `_closed` decides the end of a row.
        """
        if text.startswith(self._openings):
            return self._tokens(text)
        ids: list[int] = self.tokenizer(text)["input_ids"]
        if ids[-1:] != [self.tokenizer.eos_token_id]:
            return ids
        bare, before_end = self._tokens(text), ids[:-1]
        return before_end if before_end[len(before_end) - len(bare) :] == bare else ids

    @cached_property
    def _openings(self) -> tuple[str, ...]:
        """Special tokens with which a rendered chat begins: BOS, or the token that starts the first turn."""
        found = {self.tokenizer.bos_token_id}
        user = {"role": "user", "content": "Question"}
        for turns in ([user], [{"role": "system", "content": "Answer"}, user]):
            try:
                found.add(self._ids(turns, None)[0] if self.has_template else None)
            except (_CannotBeExact, IndexError):
                continue  # many templates reject a system message
        special = found & {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return tuple(self.tokenizer.convert_ids_to_tokens(sorted(special)))

    def _following(self, text: str) -> list[int]:
        """Return a text's ids without the space that SentencePiece adds: encode it after a line break."""
        before, after = self._tokens("\n"), self._tokens("\n" + text)
        return after[len(before) :] if after[: len(before)] == before else self._tokens(text)

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _closed(self, ids: list[int]) -> list[int]:
        """Add the eos token, unless the last token that is not white space ends an answer."""
        for token in reversed(ids):
            if token in self.ends:
                return ids
            if self.tokenizer.decode([token]).strip():
                break
        return self._with_eos(ids)

    def _with_eos(self, ids: list[int]) -> list[int]:
        if self.tokenizer.eos_token_id is None:
            raise _CannotBeExact("has no end: the tokenizer has no eos token")
        return [*ids, self.tokenizer.eos_token_id]


def dated_template(template: str, now: datetime) -> str:
    """Replace a chat template's calls of `strftime_now`, which return the current time, with a fixed time.

    Calls whose format is not a literal are kept. (transformers overrides a function that is passed to a template.)
    """
    return DATE_CALL.sub(lambda call: json.dumps(now.strftime(call[2])), template)


def _is_learned(turn: dict[str, Any]) -> bool:
    return bool(turn.get("weight", 1)) and bool(turn.get("loss", True))


def _with_parsed_arguments(turn: dict[str, Any]) -> dict[str, Any]:
    """Return the message with the arguments of its tool calls parsed from JSON strings."""
    if not turn.get("tool_calls"):
        return turn
    calls = []
    for call in turn["tool_calls"]:
        function = call.get("function", call)
        if isinstance(function.get("arguments"), str):
            function = function | {"arguments": json.loads(function["arguments"] or "{}")}
            call = call | {"function": function} if "function" in call else function
        calls.append(call)
    return turn | {"tool_calls": calls}


def _common(one: list[int], other: list[int]) -> int:
    """Return the length of the lists' common prefix."""
    different = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(different, min(len(one), len(other)))


class _CannotBeExact(Exception):  # noqa: N818  it becomes a BadRow
    pass
