"""Several models answer one prompt side by side, token by token, in one thread.

Each column keeps its own key/value cache and takes turns: one decode step per unfinished column, round after round. One
thread, because two torch threads that compute at once fight over the cores and were measured ten times slower. Only one
forward runs at a time, also when several visitors stream from the same engine: a lock is held for the length of one
step, so they take turns as well, and nobody waits for another's whole answer.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from minilora_hub.compare.columns import Column, Progress, find_adapter, load_base, load_columns, shared_copy
from minilora_hub.compare.sampling import Sampling, TokenPicker
from minilora_hub.compare.text_stream import TextStream

__all__ = ["Column", "CompareEngine", "Sampling", "Update", "shared_copy"]

Reason = Literal["eos", "length", "stopped", "error"]

PREFILL_CHUNK = 256
"""Prompt tokens in one forward: a long prompt is read in pieces, so that Stop works while it is read."""


@dataclass(frozen=True)
class Update:
    """What one step changed in one column.

    Attributes:
        column: index into `CompareEngine.columns`.
        text: text to append; may be empty.
        token_id: the token that was generated, or None if the step generated none.
        tokens: tokens this column has generated so far, an end-of-text token included.
        seconds_to_first_token: from the start of the stream, as a visitor sees it; None before the first.
        tokens_per_second: since this column's first token, as a visitor sees it: the columns share the machine.
        milliseconds_per_token: this column's own computing time for one decode step, whatever the others do.
        finished: nothing follows for this column.
        reason: why it finished.
        error: what went wrong, where reason is ``"error"``.
        experts: for a MixLoRA, which experts served the position that predicted this token: per layer, their numbers.
    """

    column: int
    text: str = ""
    token_id: int | None = None
    tokens: int = 0
    seconds_to_first_token: float | None = None
    tokens_per_second: float | None = None
    milliseconds_per_token: float | None = None
    finished: bool = False
    reason: Reason | None = None
    error: str | None = None
    experts: tuple[tuple[int, ...], ...] | None = None


class CompareEngine:
    """A base and adapters on it, ready to answer prompts side by side.

    Args:
        base: name or folder of the base (see `minilora_hub.bases`), or a loaded model, which is left as it is.
        adapters: folders or Hub ids of adapters, or columns that are ready.
        tokenizer: needed where `base` is a model; otherwise it comes with the base.
        device: where to load a base that is named. Default: a GPU if there is one.
        dtype: its dtype. Default: fp32 on a CPU, the checkpoint's own elsewhere.
        routing: whether updates of a MixLoRA column carry its experts.
        progress: called with a line of text at each step of loading.

    Attributes:
        columns: the base's column, then one for each adapter.
        tokenizer: the base's.

    Raises:
        MiniLoraError: the base or an adapter cannot be found or read.
        ValueError: an adapter does not fit the base, or `tokenizer` is missing.
    """

    def __init__(
        self,
        base: str | Path | nn.Module,
        adapters: Sequence[str | Path | Column] = (),
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        routing: bool = False,
        progress: Progress = lambda line: None,
    ) -> None:
        """Load everything; see the class for the arguments."""
        # A misspelt name is told before a base is loaded in vain.
        found = [adapter if isinstance(adapter, Column) else find_adapter(adapter) for adapter in adapters]
        if isinstance(base, nn.Module):
            if tokenizer is None:
                raise ValueError("tokenizer=None: must be given where base is a model")
            model, name = base, "base"
        else:
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            model, own_tokenizer, name = load_base(base, device, dtype, progress)
            tokenizer = tokenizer or own_tokenizer
        self.columns = tuple(load_columns(model, name, found, progress))
        self.tokenizer = tokenizer
        self._routing = routing
        self._lock = threading.Lock()
        self._forwards = 0
        for column in self.columns:
            _inner_model(column.model).register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: tuple) -> None:
        self._forwards += 1

    def __deepcopy__(self, memo: dict) -> CompareEngine:
        """Return the engine itself: a copy of a column's model takes the counting hook along, which belongs to it."""
        return self

    @property
    def forwards(self) -> int:
        """Count of forwards through the base's layers since loading, in all columns, from a hook on the models."""
        return self._forwards

    def memory(self) -> tuple[int, int]:
        """Count bytes of parameters and buffers: of the base, and of all columns together with shared tensors once."""
        base, everything = _tensor_bytes(self.columns[:1]), _tensor_bytes(self.columns)
        return base, everything

    def prompt_ids(self, prompt: str) -> list[int]:
        """Turn a prompt into the ids every column reads: a chat of one user turn where the tokenizer has a template.

        Raises:
            ValueError: the prompt is empty, or longer than the base's context.
        """
        if not prompt.strip():
            raise ValueError("prompt='': must hold some text")
        if getattr(self.tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": prompt}]
            encoded: Any = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        else:
            encoded = self.tokenizer(prompt)
        ids = list(encoded["input_ids"])
        context = min(_context(column.model) for column in self.columns)
        if len(ids) >= context:
            raise ValueError(
                f"prompt of {len(ids)} tokens: must be shorter than the base's context of {context} tokens"
            )
        return ids

    def stream(self, prompt: str, sampling: Sampling, stop: threading.Event | None = None) -> Generator[Update]:
        """Answer `prompt` with every column.

        The prompt is read by one column after the other; then they take turns. Work happens only while the iterator is
        advanced, in the thread that advances it; closing it ends the work.

        Args:
            prompt: what the visitor typed.
            sampling: the same for every column.
            stop: set it from any thread, and the stream ends within one step of one column.

        Returns:
            An iterator of updates. Every column ends with one update that is `finished`, unless the iterator is closed.
            An exception in a column ends that column, with its text in `error`, and no other.

        Raises:
            ValueError: the prompt is empty or too long.
        """
        ids = self.prompt_ids(prompt)
        stop = stop or threading.Event()
        answers = [
            _Answer(index, column, ids, sampling, self.tokenizer, self._routing)
            for index, column in enumerate(self.columns)
        ]
        return self._stream(answers, stop)

    def _stream(self, answers: list[_Answer], stop: threading.Event) -> Generator[Update]:
        started = time.perf_counter()
        for answer in answers:
            answer.started = started
        for answer in answers:
            while answer.reading:
                yield from self._step(answer, stop)
        while unfinished := [answer for answer in answers if not answer.finished]:
            for answer in unfinished:
                yield from self._step(answer, stop)

    def _step(self, answer: _Answer, stop: threading.Event) -> Iterator[Update]:
        with self._lock:
            # Asked again under the lock: another visitor's step may have kept us waiting.
            update = answer.end("stopped") if stop.is_set() else answer.step()
        if update is not None:
            yield update


class _Answer:
    """One column's answer in the making: its cache, its text, its clock."""

    def __init__(
        self,
        index: int,
        column: Column,
        ids: list[int],
        sampling: Sampling,
        tokenizer: PreTrainedTokenizerBase,
        routing: bool,
    ) -> None:
        """Prepare; nothing is computed yet."""
        self.index = index
        self.model = column.model
        self.ids = torch.tensor([ids])  # (1, tokens so far), on the CPU
        self.unread = self.ids  # (1, tokens the model has not seen)
        self.cache = None
        self.limit = min(sampling.max_new_tokens, _context(self.model) - len(ids))
        self.pick = TokenPicker(sampling)
        self.text = TextStream(tokenizer)
        self.ends = _end_tokens(self.model, tokenizer)
        self.options: dict[str, object] = {}
        if "logits_to_keep" in inspect.signature(_base_of(self.model).forward).parameters:
            self.options["logits_to_keep"] = 1  # the head is a fifth of a small model's work: only where it is needed
        if routing and "output_routing" in inspect.signature(self.model.forward).parameters:
            self.options["output_routing"] = True
        self.device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        self.started = 0.0
        self.first_at: float | None = None
        self.decode_seconds = 0.0
        self.tokens = 0
        self.finished = False

    @property
    def reading(self) -> bool:
        """Whether the prompt is still being read."""
        return self.tokens == 0 and not self.finished

    def step(self) -> Update | None:
        """Run one forward; None while a long prompt is still being read."""
        began = time.perf_counter()
        try:
            output = self._forward()
            if self.unread.shape[1]:
                return None
            token = self.pick(self.ids, output.logits[:, -1])
            text = self.text.push(token)
        except Exception as error:  # whatever a model throws ends its own column only
            return self.end("error", f"{type(error).__name__}: {error}")
        self._tick(began)
        self.unread = torch.tensor([[token]])
        self.ids = torch.cat([self.ids, self.unread], dim=1)
        experts = _last_experts(output)
        if token in self.ends:
            return self.end("eos", token_id=token, text=text, experts=experts)
        if self.tokens >= self.limit:
            return self.end("length", token_id=token, text=text, experts=experts)
        return self._update(token_id=token, text=text, experts=experts)

    @torch.no_grad()
    def _forward(self):
        chunk, self.unread = self.unread[:, :PREFILL_CHUNK], self.unread[:, PREFILL_CHUNK:]
        output = self.model(
            input_ids=chunk.to(self.device),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **self.options,
        )
        self.cache = output.past_key_values
        return output

    def _tick(self, began: float) -> None:
        now = time.perf_counter()
        self.tokens += 1
        if self.first_at is None:
            self.first_at = now
        else:
            self.decode_seconds += now - began

    def end(self, reason: Reason, error: str | None = None, text: str = "", **fields) -> Update:
        """Finish, give the cache back, and hand out what text was held back."""
        self.finished, self.cache = True, None
        if reason != "error":
            text += self.text.finish(complete=reason == "eos")
        return self._update(text=text, finished=True, reason=reason, error=error, **fields)

    def _update(self, **fields) -> Update:
        decoded = self.tokens - 1
        first, rate, own = None, None, None
        if self.first_at is not None:
            first = self.first_at - self.started
            if decoded > 0:
                rate = decoded / (time.perf_counter() - self.first_at)
                own = 1000 * self.decode_seconds / decoded
        return Update(
            self.index,
            tokens=self.tokens,
            seconds_to_first_token=first,
            tokens_per_second=rate,
            milliseconds_per_token=own,
            **fields,
        )


def _base_of(model: Any) -> Any:
    """Find the base inside a column's model: below PEFT's wrapper or ours, or the model itself."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model._modules.get("base", model)


def _inner_model(model: nn.Module) -> nn.Module:
    """Find the part that every forward of the base goes through once: its decoder, without the head."""
    base = _base_of(model)
    return base._modules.get(getattr(base, "base_model_prefix", ""), base)


def _tensor_bytes(columns: Sequence[Column]) -> int:
    storages = {}
    for column in columns:
        for tensor in (*column.model.parameters(), *column.model.buffers()):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _context(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    return getattr(config, "max_position_embeddings", None) or 2**31


def _end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)


def _last_experts(output) -> tuple[tuple[int, ...], ...] | None:
    selected = getattr(output, "selected_experts", None)  # per layer (1, seq, K), -1 where a slot has no expert
    if selected is None:
        return None
    return tuple(tuple(expert for expert in layer[0, -1].tolist() if expert >= 0) for layer in selected)
