"""Forwards of the rows of a step: all packed into one sequence, or one after the other where a base can't be packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.continuous_batching.requests import RequestState

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.batch import experts_at
from minilora_hub.compare.decoding import DecodingBatch
from minilora_hub.remote_code.few_rows import plain_products


@dataclass(frozen=True)
class Part:
    """The tokens of one row in a step.

    Attributes:
        key: identifies the row.
        adapter: None for the base.
        solo: the only expert that serves the row; see `Row`.
        ids: the tokens.
        start: number of tokens of the row before them.
        every: whether the logits after each of them are needed.
        last: whether the logits after the last are needed.
    """

    key: str
    adapter: str | None
    solo: int | None
    ids: list[int]
    start: int
    every: bool
    last: bool

    @property
    def kept(self) -> range:
        """The positions in `ids` after which logits are needed."""
        return range(0 if self.every else len(self.ids) - (1 if self.last else 0), len(self.ids))


@dataclass(frozen=True)
class Result:
    """What a step computed for a row.

    Attributes:
        logits: (positions of `Part.kept`, vocabulary).
        experts: fields of an `Update`: the experts of the last token, for a MixLoRA.
        error: why there is nothing.
    """

    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    experts: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


class PackedForward:
    """One forward for the tokens of all rows, over the manager's paged cache.

    Args:
        bank: the models.
    """

    def __init__(self, bank: AdapterBank) -> None:
        self._bank = bank
        self._cuts = bank.model._supports_logits_to_keep()  # type: ignore[operator]

    def __call__(self, parts: Sequence[Part], inputs: dict[str, Any]) -> list[Result]:
        """Compute a step.

        Args:
            parts: the rows, in the order of their tokens.
            inputs: arguments of the model's forward from transformers' `ContinuousBatchingIOs`.
        """
        starts = [0, *accumulate(len(part.ids) for part in parts)]
        ends = [start - 1 for start in starts[1:]]
        kept = [start + place for start, part in zip(starts, parts, strict=False) for place in part.kept]
        at = torch.tensor(kept or ends[-1:], device=inputs["input_ids"].device)
        adapters = [part.adapter for part in parts for _ in part.ids]
        solos = [part.solo for part in parts for _ in part.ids]
        # An adapter of the head needs the tokens of all rows, because they say which rows are whose.
        cut = self._cuts and not self._bank.adapts_head(adapters)
        with self._bank.rows(adapters, solos) as rows:
            logits = self._bank.model(**inputs, **({"logits_to_keep": at} if cut else {})).logits[0]
            experts = experts_at(rows.routing, ends)
        logits = logits if cut else logits[at]
        pieces = logits.to("cpu")[: len(kept)].split([len(part.kept) for part in parts])
        return [Result(piece, experts.get(index, {})) for index, piece in enumerate(pieces)]

    def forget(self, key: str) -> None:
        """Do nothing: the cache is the manager's."""


class SeparateForward:
    """A forward for each row, with a cache of its own: for bases whose layers can't tell packed rows apart.

    Args:
        bank: the models.
    """

    def __init__(self, bank: AdapterBank) -> None:
        self._bank = bank
        self._rows: dict[str, DecodingBatch] = {}

    def __call__(self, parts: Sequence[Part], inputs: dict[str, Any]) -> list[Result]:
        """Compute a step; see `PackedForward`. An error ends its own row only."""
        return [self._result(part) for part in parts]

    def _result(self, part: Part) -> Result:
        try:
            if part.start == 0:
                self._rows[part.key] = DecodingBatch(self._bank, [part.adapter], [part.solo])
            batch = self._rows[part.key]
            batch.append([part.ids])
            logits = batch.read(every=part.every)
        except Exception as error:
            return Result(error=error)
        routing = {group._replace(stop=len(part.ids)): layers for group, layers in batch.routing.items()}
        experts = experts_at(routing, [len(part.ids) - 1]).get(0, {})
        return Result((logits[0] if part.every else logits).to("cpu")[: len(part.kept)], experts)

    def forget(self, key: str) -> None:
        """Free the cache of a row."""
        self._rows.pop(key, None)


def stand_in() -> LlamaForCausalLM:
    """Return a tiny model for the manager's accounts where the real one's caches are not the manager's."""
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
@plain_products()  # the ways of multiplying few rows would be timed first, while other things start
def differs(bank: AdapterBank, processor: Any) -> str | None:
    """Compare packed rows with each row alone: two prompts, and a token after each.

    Args:
        bank: the models.
        processor: transformers' `ContinuousBatchProcessor` of the bank's model; it is reset afterwards.

    Returns:
        Why the model can't be packed, or None.
    """
    vocabulary = bank.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    texts = [[(7 * place + 3) % vocabulary for place in range(count)] for count in (5, 3)]
    forward = PackedForward(bank)
    states = [RequestState(request_id=f"{index}", initial_tokens=list(ids)) for index, ids in enumerate(texts)]
    try:
        for state in states:
            processor.scheduler.add_waiting_request(state)
        for _ in range(2):
            processor.prepare_next_batch()
            parts = [
                Part(
                    state.request_id,
                    None,
                    None,
                    texts[index][state.position_offset - 1 :] if state.generated_tokens else texts[index],
                    0,
                    False,
                    True,
                )
                for index, state in enumerate(states)
            ]
            packed = forward(parts, processor.inputs_and_outputs.get_model_kwargs())
            for ids, result in zip(texts, packed, strict=True):
                batch = DecodingBatch(bank, [None])
                batch.append([ids])
                alone = batch.read()[0].to("cpu", torch.float32)
                found = result.logits[0].float()
                tolerance = (0.05 if result.logits.dtype.itemsize < 4 else 1e-3) * float(alone.abs().max())
                difference = float((found - alone).abs().max())
                if not difference <= tolerance:
                    return f"logits of packed rows differ by {difference:.2g} from those of a row alone"
            processor.inputs_and_outputs.output_ids[0, :2] = 1
            processor.update_batch()
            for ids in texts:
                ids.append(1)
    except Exception as error:
        return f"a packed forward fails: {type(error).__name__}: {error}"
    finally:
        processor.reset()
    return None
