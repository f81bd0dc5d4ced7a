"""Answer with a base and adapters on it side by side, token by token: one forward of the base per step for all rows.

The rows have a common prompt, or each has its own prompt, adapter and sampling settings. Only one forward runs at a
time, even if several streams use one engine: a lock is held for one step, and streams take turns. (Two concurrent torch
threads compete for the cores, and were measured to be ten times slower.) Rows of several people share forwards in
`minilora_hub.serving.scheduler`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from minilora_hub.bases.loading import load_base, load_tokenizer, require_dtype
from minilora_hub.bases.resolving import resolve_base
from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.answer import Answer, Column, Row, Step, Turns, Update
from minilora_hub.compare.bank_entries import BankMemory
from minilora_hub.compare.base_proof import BareLogits, BaseProof
from minilora_hub.compare.batch import Batch
from minilora_hub.compare.fair_lock import FairLock
from minilora_hub.compare.found_adapters import find_adapters
from minilora_hub.compare.openmp_workers import release_workers
from minilora_hub.compare.prompting import Prompting, Promptings
from minilora_hub.compare.sampling import Sampling
from minilora_hub.errors import AdapterError
from minilora_hub.formatting import require_encodable

__all__ = ["Column", "CompareEngine", "Row", "Sampling", "Step", "Update"]


class CompareEngine:
    """A base and adapters on it, ready to answer prompts side by side.

    Args:
        base: name or folder of the base (see `minilora_hub.bases`), or a loaded model, which is not changed.
        adapters: folders or Hub ids of adapters. The last part of each is the name of its column.
        tokenizer: the base's; required if `base` is a model.
        device: where to load a named base. Default: a GPU if there is one.
        dtype: its dtype, or ``"int8"``; see `load_base`. Default: fp32 on a CPU, otherwise that of the checkpoint.
        memory_limit: maximum bytes of adapter tensors in memory; see `AdapterBank`.
        keep_bare_logits: compute logits of the base before there are adapters, for `base_proof`.
        progress: called with a message at each step of loading.

    Attributes:
        bank: the adapters, and the model that runs.
        columns: the base's column, then one for each adapter of `adapters`.
        tokenizer: the base's.

    Raises:
        MiniLoraError: the base or an adapter cannot be found or read, or an adapter does not fit the base.
        ValueError: an adapter is named twice, or `tokenizer` is missing.
    """

    def __init__(
        self,
        base: str | Path | nn.Module,
        adapters: Iterable[str | Path] = (),
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        memory_limit: int | None = None,
        keep_bare_logits: bool = False,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Load everything; see the class for the arguments."""
        # Before loading the base, so that a misspelt name fails early.
        if isinstance(dtype, str):
            require_dtype(dtype)
        found = find_adapters(adapters)
        if isinstance(base, nn.Module):
            if tokenizer is None:
                raise ValueError("tokenizer=None: is required if base is a model")
            model, name = base, "base"
        else:
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            resolved = resolve_base(base)
            # On a CPU, fp32 is both the fastest and the exact choice; elsewhere the checkpoint's own dtype.
            wanted = dtype or (torch.float32 if device.type == "cpu" else "auto")
            model = load_base(resolved, dtype=wanted, device=device, progress=progress)
            tokenizer = tokenizer or load_tokenizer(resolved)
            name = (resolved.hub_id or resolved.path.name).rpartition("/")[2]
        self.tokenizer = tokenizer
        self._bare = BareLogits.of(model, tokenizer) if keep_bare_logits else None
        self.bank = AdapterBank(model, limit=memory_limit)
        self._promptings = Promptings(self.bank.model, tokenizer)
        # By the name of an adapter: the version of its files, and its prompting.
        self._prompted: dict[str, tuple[Hashable, Prompting]] = {}
        self._lock = FairLock()  # streams and the server's scheduler take turns, step by step
        self._token_texts: dict[tuple[int, int], str] = {}  # by tokenizer and token
        self._forwards = 0
        _decoder(self.bank.model).register_forward_pre_hook(self._count)
        self._context = context_length(self.bank.model)
        size = sum(parameter.numel() for parameter in self.bank.model.parameters())
        self.columns: tuple[Column, ...] = (Column(name, "base", detail=f"{size / 1e6:.1f} M parameters"),)
        progress(
            f"  answers end at {' '.join(self._promptings.base.end_names) or 'no token, only at the length limit'}"
        )
        for adapter in found:
            column = self.load(adapter.name, adapter.folder)
            self.columns = (*self.columns, column)
            progress(f"  + {column.name}: {column.kind}, {column.detail}")

    def load(self, name: str, folder: str | Path) -> Column:
        """Load an adapter into the bank; other streams may be running.

        Returns:
            A column for `stream`; it is not added to `columns`.

        Raises:
            AdapterError: the folder holds no adapter of a known kind, it is damaged, it does not fit the base, or its
                tokenizer cannot be read or has more tokens than the base.
            ValueError: the name is taken.
        """
        prompting = self._promptings.of(Path(folder))
        with self.exclusive():
            entry = self.bank.load(name, folder)
            self._prompted[name] = entry.version, prompting
        detail = ", ".join([entry.facts.detail, *prompting.differs_from(self._promptings.base)])
        facts = entry.facts
        return Column(name, facts.kind, facts.parameters, detail, facts.experts, facts.experts_by_layer)

    def unload(self, name: str) -> None:
        """Remove an adapter from the bank, and its column if it has one.

        Raises:
            AdapterError: there is no adapter of this name.
            ValueError: a stream is using it.
        """
        with self.exclusive():
            self.bank.unload(name)
            self._prompted.pop(name, None)
        self.columns = tuple(column for column in self.columns if column.adapter != name)

    def _count(self, module: nn.Module, args: tuple) -> None:
        self._forwards += 1

    def __deepcopy__(self, memo: dict) -> CompareEngine:
        """Return the engine itself, because copying the model copies its counting hook, which refers to the engine."""
        return self

    @property
    def forwards(self) -> int:
        """Number of forwards through the base's layers since loading."""
        return self._forwards

    @contextmanager
    def exclusive(self, step: bool = False) -> Iterator[None]:
        """Hold the models inside the `with` block: no stream computes then.

        Args:
            step: whether it is one of many steps, between which this thread keeps its workers.
        """
        with self._lock:
            try:
                yield
            finally:
                if not step:
                    release_workers()

    def base_proof(self) -> BaseProof | None:
        """Compare the base's rows with the bare checkpoint; None without `keep_bare_logits`. It counts no forwards."""
        if self._bare is None:
            return None
        with self.exclusive():
            before = self._forwards
            proof = self._bare.compared_with(self.bank)
            self._forwards = before
            return proof

    def memory(self) -> BankMemory:
        """Count bytes of tensors: of the base, and of the adapters in memory."""
        return self.bank.memory()

    def prompting(self, adapter: str | None = None) -> Prompting:
        """Return the prompting of an adapter of the bank, or that of the base for None and for an unknown name.

        Raises:
            AdapterError: its tokenizer cannot be read, or has more tokens than the base.
        """
        entry = None if adapter is None else self.bank.find(adapter)
        if entry is None:
            return self._promptings.base
        known = self._prompted.get(entry.name)
        if known is None or known[0] != entry.version:  # registered with the bank directly, or its files were replaced
            known = self._prompted[entry.name] = entry.version, self._promptings.of(entry.folder)
        return known[1]

    def token_text(self, token: int, adapter: str | None = None) -> str:
        """Return the text of a single token; special tokens by name, incomplete UTF-8 as U+FFFD."""
        tokenizer = self.prompting(adapter).tokenizer
        key = id(tokenizer), token
        if key not in self._token_texts:
            self._token_texts[key] = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
        return self._token_texts[key]

    def prompt_ids(self, prompt: str, adapter: str | None = None, before: Turns = ()) -> list[int]:
        """Return the token ids of a prompt, as the last user turn of a chat if the tokenizer has a chat template.

        Args:
            prompt: the user's text.
            adapter: the adapter of the rows; its own tokenizer and chat template are used if it has any.
            before: the messages before the prompt; without a chat template, their texts stand before it, with blank
                lines between.

        Raises:
            AdapterError: see `prompting`; or the chat template rejects the prompt.
            ValueError: the prompt is empty, no text, longer than the base's context, or has a token without an
                embedding.
        """
        if not prompt.strip():
            raise ValueError("prompt='': must not be empty")
        prompting = self.prompting(adapter)
        turns = [*before, ("user", prompt)]
        require_encodable([text for _, text in turns], "prompt")
        ids = prompting.chat_ids([{"role": role, "content": text} for role, text in turns])
        ids = prompting.text_ids("\n\n".join(text for _, text in turns)) if ids is None else ids
        if len(ids) >= self._context:
            raise ValueError(
                f"prompt of {len(ids)} tokens: must be shorter than the base's context of {self._context} tokens"
            )
        return ids

    def stream(
        self,
        prompt: str,
        sampling: Sampling,
        stop: threading.Event | None = None,
        columns: Sequence[Column] | None = None,
    ) -> Generator[Update]:
        """Answer `prompt` with every column: row i is column i. Otherwise like `stream_rows`.

        Args:
            prompt: the user's text.
            sampling: the same for every column.
            stop: set it from any thread to end the stream within one step.
            columns: the columns. Default: the engine's `columns`.
        """
        columns = self.columns if columns is None else columns
        return self.stream_rows([column.row(prompt, sampling) for column in columns], stop)

    def stream_rows(self, rows: Sequence[Row], stop: threading.Event | None = None) -> Generator[Update]:
        """Answer every row, one token per row and step.

        Each step runs in the thread that advances the iterator; closing the iterator ends the work.

        Args:
            rows: the rows; adapters are those of the columns, or any that are registered with `bank`.
            stop: set it from any thread to end the stream within one step.

        Returns:
            An iterator of updates. Every row ends with one update that is `finished`, unless the iterator is closed.
            An adapter that cannot be loaded or computes NaN ends its own rows only, with the reason in `error`.

        Raises:
            ValueError: there are no rows, a prompt is empty or too long, or an adapter has no such expert.
        """
        return _one_by_one(self.stream_steps(rows, stop))

    def stream_steps(
        self, rows: Sequence[Row], stop: threading.Event | None = None, halted: Collection[int] = ()
    ) -> Generator[Step]:
        """Answer like `stream_rows`, but yield the updates of a step together, so that streams can alternate.

        While the prompts are being read, there are no updates. Rows whose index is added to `halted`, from any thread,
        end within one step.
        """
        return self._stream(*self.answers(rows), stop or threading.Event(), halted)

    def answers(self, rows: Sequence[Row]) -> tuple[list[Answer], list[Update]]:
        """Return the state of each row that can be answered, and the last update of each of the others.

        Raises:
            ValueError: see `stream_rows`.
        """
        if not rows:
            raise ValueError("rows=[]: must hold at least one row")
        answers, failed = [], []
        for index, row in enumerate(rows):
            self.bank.check_solo(row.adapter, row.solo_expert)
            try:
                prompting = self.prompting(row.adapter)
                ids = self.prompt_ids(row.prompt, row.adapter, row.before)
            except AdapterError as error:  # a damaged tokenizer or template ends its own rows only
                failed.append(failure(index, error))
            except ValueError as error:
                raise ValueError(f"{error} (row {index})" if len({row.prompt for row in rows}) > 1 else error) from None
            else:
                limit = min(row.sampling.max_new_tokens, self._context - len(ids))
                answers.append(Answer(index, row, ids, limit, prompting.tokenizer, prompting.ends))
        return answers, failed

    def _stream(
        self, answers: list[Answer], failed: list[Update], stop: threading.Event, halted: Collection[int]
    ) -> Generator[Step]:
        if failed:
            yield Step(0, failed)
        with ExitStack() as held:
            ready = []
            for answer in answers:
                try:
                    with self.exclusive(step=True):
                        if not stop.is_set():
                            held.enter_context(self.bank.use([answer.row.adapter]))
                except Exception as error:  # a damaged or missing adapter ends its own rows only
                    yield Step(0, [failure(answer.index, error)])
                else:
                    ready.append(answer)
            if not ready:
                return
            batch = Batch(self.bank, ready)
            held.callback(release_workers)
            while not batch.finished:
                with self.exclusive(step=True):
                    updates = batch.end(None if stop.is_set() else halted)
                    forwards = 0 if batch.finished else 1
                    if forwards:
                        updates += batch.step()
                yield Step(forwards, updates)


def failure(row: int, error: Exception) -> Update:
    """Return the only update of a row that cannot be answered."""
    return Update(row, finished=True, reason="error", error=f"{type(error).__name__}: {error}")


def _one_by_one(steps: Generator[Step]) -> Generator[Update]:
    with closing(steps):
        for step in steps:
            yield from step.updates


def _decoder(model: Any) -> nn.Module:
    """Return the decoder without the head, which every forward calls exactly once."""
    return model._modules.get(getattr(model, "base_model_prefix", ""), model)


def context_length(model: nn.Module) -> int:
    """Return the maximum context length of a model, from its configuration."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    # The second is MPT's name for it.
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 2**31
