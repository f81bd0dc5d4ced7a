"""Turn requests into rows of the scheduler, and their updates into responses or streams of events."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from minilora_hub.compare.answer import Answer, Row, Update
from minilora_hub.compare.engine import CompareEngine, context_length
from minilora_hub.compare.prompt_index import Choice
from minilora_hub.compare.prompting import Prompting
from minilora_hub.errors import AdapterError, ServingError
from minilora_hub.serving.metrics import Metrics
from minilora_hub.serving.models import Models
from minilora_hub.serving.requests import ChatRequest, CompletionRequest
from minilora_hub.serving.responses import Shape, error_body, usage
from minilora_hub.serving.rows import ServedRow
from minilora_hub.serving.scheduler import Scheduler

COMPLETION_TOKENS = 16
"""The most tokens of a completion where the request doesn't say, as in OpenAI's API."""


@dataclass(frozen=True)
class Prompt:
    """A prompt: its tokens, and its text where it is echoed."""

    ids: list[int]
    text: str = ""


class Work:
    """The rows of one request.

    Args:
        service: of the server.
        adapter: the adapter, None for the base.
        shape: what the answers look like.
        echo: whether the prompt is part of the answer.

    Attributes:
        model: the name of the model that answers.
    """

    def __init__(self, service: Answering, adapter: str | None, shape: Shape, echo: bool) -> None:
        self._service, self._shape, self._echo = service, shape, echo
        self.model = service.models.base if adapter is None else adapter
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.rows: list[ServedRow] = []
        self._prompts: list[Prompt] = []
        self._read = 0

    def add(self, prompt: Prompt, answers: Sequence[Answer], limit: int) -> None:
        """Add the answers to a prompt."""
        self._read += len(prompt.ids)
        for answer in answers:
            self.rows.append(ServedRow(answer, limit, partial(self._deliver, len(self.rows))))
            self._prompts.append(prompt)

    def submit(self) -> None:
        """Queue the rows.

        Raises:
            ServingError: they cannot be queued now, or ever.
        """
        self._service.scheduler.submit(self.rows)
        self._service.metrics.prompt(self.model, self._read)

    def cancel(self) -> None:
        """Take out the rows that have not ended."""
        left = [row for row in self.rows if not (row.answer.finished or row.cancelled)]
        if left:
            self._service.scheduler.cancel(left)
            self._service.metrics.cancelled(self.model, len(left))

    async def response(self) -> dict[str, Any]:
        """Wait for all answers and return them.

        Raises:
            ServingError: one of them failed.
        """
        updates: list[list[Update]] = [[] for _ in self.rows]
        async for index, update in self._each():
            if update.error:
                raise ServingError(self.rows[index].status, update.error)
            updates[index].append(update)
        choices = [self._shape.choice(index, mine, False, *self._echoed(index)) for index, mine in enumerate(updates)]
        generated = sum(mine[-1].tokens for mine in updates)
        return self._shape.response(choices, usage=usage(self._read, generated))

    async def events(self, with_usage: bool) -> AsyncGenerator[str]:
        """Yield the events of a stream. An answer that fails ends it with an error."""
        shape = self._shape
        more = {"usage": None} if with_usage else {}
        generated, offsets, begun = [0] * len(self.rows), [0] * len(self.rows), [False] * len(self.rows)
        if shape.chat:
            delta = {"role": "assistant", "content": ""}
            for index in range(len(self.rows)):
                start = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
                yield event(shape.response([start], True, **more))
        try:
            async for index, update in self._each():
                if update.error:
                    raise ServingError(self.rows[index].status, update.error)
                generated[index] = update.tokens
                prompt, scores = ("", []) if begun[index] else self._echoed(index)
                begun[index] = True
                if not (update.text or prompt or update.finished or shape.chatty):
                    continue
                choice = shape.choice(index, [update], True, prompt, scores, offsets[index])
                tokens = [score.token_id for score in scores]
                offsets[index] += shape.length([*tokens, *([] if update.token_id is None else [update.token_id])])
                yield event(shape.response([choice], True, **more))
        except ServingError as error:
            yield event(error_body(error.status, str(error), error.param, error.code))
            return
        if with_usage:
            yield event(shape.response([], True, usage=usage(self._read, sum(generated))))
        yield "data: [DONE]\n\n"

    async def _each(self) -> AsyncGenerator[tuple[int, Update]]:
        left = len(self.rows)
        while left:
            index, update = await self._updates.get()
            left -= update.finished
            yield index, update

    def _echoed(self, index: int) -> tuple[str, list]:
        if not self._echo:
            return "", []
        return self._prompts[index].text, self.rows[index].answer.prompt_scores

    def _deliver(self, index: int, update: Update) -> None:
        """Count an update and hand it to the event loop; called in the thread that computes."""
        metrics = self._service.metrics
        if update.token_id is not None:
            metrics.token(self.model)
            if update.tokens == 1:
                metrics.first_token(self.model, time.perf_counter() - self.rows[index].started)
        if update.finished and update.reason != "stopped" and update.tokens_per_second is not None:
            metrics.rate(self.model, update.tokens_per_second)
        try:
            self._loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))
        except RuntimeError:  # the event loop is closed, and so is the connection
            self.rows[index].cancelled = True


class Answering:
    """Answers the requests of a server.

    Args:
        engine: the models.
        scheduler: of the engine.
        models: by name.
        metrics: counts what is done.
    """

    def __init__(self, engine: CompareEngine, scheduler: Scheduler, models: Models, metrics: Metrics) -> None:
        self._engine, self.scheduler, self.models, self.metrics = engine, scheduler, models, metrics
        self._context = min(context_length(engine.bank.model), scheduler.most_tokens)
        self._indices = itertools.count()

    async def chat(self, body: ChatRequest) -> Work:
        """Queue the answers to a chat.

        Raises:
            ServingError: the request cannot be answered; nothing is queued.
        """
        adapter, prompting, choice = await self._begin(body)
        turns = [message.turn() for message in body.messages]
        self._require_short(sum(len(turn["content"]) for turn in turns), "messages")
        ids = await self._tokens("messages", prompting.chat_ids, turns)
        if ids is None:
            raise ServingError(
                400, f"model={body.model!r}: has no chat template; use /v1/completions", "model", "no_chat_template"
            )
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        limit = self._limit(ids, asked, self.scheduler.limits.default_tokens, "messages")
        shape = self._shape(body, adapter, True, (body.top_logprobs or 0) if body.logprobs else None, choice)
        work = Work(self, adapter, shape, False)
        work.add(Prompt(ids), self._answers(body, adapter, prompting, ids, limit, shape.alternatives, False), limit)
        work.submit()
        return work

    async def complete(self, body: CompletionRequest) -> Work:
        """Queue the answers to one or more texts.

        Raises:
            ServingError: the request cannot be answered; nothing is queued.
        """
        adapter, prompting, choice = await self._begin(body)
        shape = self._shape(body, adapter, False, body.logprobs, choice)
        work = Work(self, adapter, shape, bool(body.echo))
        prompts = body.prompts()
        self.scheduler.require_room(len(prompts) * body.count)  # before thousands of prompts are tokenized
        for prompt in prompts:
            if isinstance(prompt, str):
                self._require_short(len(prompt), "prompt")
            read = prompting.text_ids if isinstance(prompt, str) else prompting.known
            ids = await self._tokens("prompt", read, prompt) or []
            if not isinstance(prompt, str) and self.scheduler.limits.prompt_characters:
                self._require_short(len(str(prompting.tokenizer.decode(ids))), "prompt")
            limit = self._limit(ids, body.max_tokens, COMPLETION_TOKENS, "prompt")
            text = ""
            if body.echo:
                text = prompt if isinstance(prompt, str) else str(prompting.tokenizer.decode(ids))
            scored = bool(body.echo) and body.logprobs is not None
            answers = self._answers(body, adapter, prompting, ids, limit, shape.alternatives, scored)
            work.add(Prompt(ids, text), answers, limit)
        work.submit()
        return work

    async def _begin(self, body: ChatRequest | CompletionRequest) -> tuple[str | None, Prompting, Choice | None]:
        body.refuse_unsupported()
        adapter, choice = self.models.adapter(body.model), None
        if self.models.is_auto(body.model):
            self.scheduler.require_room(body.count)  # before the base reads the prompt
            choice = await self.models.choose(body.asked())
            adapter = choice.adapter
        await self.models.prepare(adapter)
        return adapter, self._engine.prompting(adapter), choice

    async def _tokens(self, param: str, read: Any, prompt: Any) -> list[int] | None:
        try:
            return await asyncio.to_thread(read, prompt)
        except (AdapterError, ValueError) as error:
            raise ServingError(400, f"{param}: {error}", param) from None

    def _require_short(self, characters: int, param: str) -> None:
        most = self.scheduler.limits.prompt_characters
        if most is not None and characters > most:
            raise ServingError(400, f"{param}: {characters} characters, this server takes at most {most}", param)

    def _limit(self, ids: Sequence[int], asked: int | None, default: int, param: str) -> int:
        room = self._context - len(ids)
        most = self.scheduler.limits.answer_tokens
        if most is not None and (asked or 0) > most:
            raise ServingError(400, f"max_tokens={asked}: this server gives at most {most} an answer", "max_tokens")
        default = min(default, most or default)
        if not ids:
            raise ServingError(400, f"{param}: must hold at least one token", param)
        if room < (1 if asked is None else asked):
            raise ServingError(
                400,
                f"{param}: {len(ids)} tokens and an answer of at most {asked or 1} do not fit {self._context} tokens, "
                "the base's context or, if it is smaller, the server's cache",
                param,
                "context_length_exceeded",
            )
        return min(room, default) if asked is None else asked

    def _shape(
        self,
        body: ChatRequest | CompletionRequest,
        adapter: str | None,
        chat: bool,
        alternatives: int | None,
        choice: Choice | None,
    ) -> Shape:
        token_text = partial(self._engine.token_text, adapter=adapter)
        name = body.model if choice is None else choice.adapter
        route = None if choice is None else choice.to_dict()
        return Shape(chat, name, token_text, alternatives, bool(body.return_routed_experts), route)

    def _answers(
        self,
        body: ChatRequest | CompletionRequest,
        adapter: str | None,
        prompting: Prompting,
        ids: list[int],
        limit: int,
        alternatives: int | None,
        scored: bool,
    ) -> list[Answer]:
        return [
            Answer(
                next(self._indices),
                Row("", adapter, sampling),
                ids,
                limit,
                prompting.tokenizer,
                prompting.ends,
                alternatives or 0,
                scored,
            )
            for sampling in body.samplings(limit)
        ]


def event(body: dict[str, Any]) -> str:
    """Return a server-sent event, in ASCII: some clients take U+2028 or U+0085 for the end of its line."""
    return f"data: {json.dumps(body, allow_nan=False)}\n\n"
