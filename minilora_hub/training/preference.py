"""DPO, a term of the loss over pairs of answers (Direct Preference Optimization, arXiv 2305.18290).

    dpo   -log sigmoid(beta ((log p(y_w) - log p_0(y_w)) - (log p(y_l) - log p_0(y_l)))), with p(y) the probability of a
          whole answer after its prompt, y_w the chosen one, y_l another one, and p_0 the model before the training

A row is a chosen answer; its term is the mean over the answers that it was preferred to. The micro-batch's own forward
gives p(y_w), a second one p(y_l); p_0 is computed once. TRL's DPOTrainer computes the same (a test compares them), but
learns that an answer ends where it was cut off, and would be a second loop beside the one that plans, resumes and adds
the other terms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from minilora_hub.progress_display import ProgressDisplay
from minilora_hub.training.loss_terms import Step, Term, labels_scored_only
from minilora_hub.training.tokens import Example
from minilora_hub.training.votes import VotePairs


@dataclass(frozen=True)
class HeldOutPairs:
    """Pairs that were not trained on: in how many the chosen answer is the likelier one.

    Attributes:
        votes: number of votes.
        pairs: number of pairs.
        before: pairs in which it was likelier before the training.
        after: pairs in which it is likelier now.
    """

    votes: int
    pairs: int
    before: int
    after: int

    def described(self) -> str:
        """Return the numbers in one line."""
        return (
            f"in {self.before} of {self.pairs} held-out pairs the chosen answer was the likelier one before the "
            f"training, in {self.after} after it"
        )


class Dpo:
    """The term; see the head of this file.

    Args:
        values: those of the objective's keys.
        votes: the pairs.
        held_out: whether the validation rows are pairs.
        pad: id of the padding token.
    """

    name = "dpo"

    def __init__(self, values: dict[str, Any], votes: VotePairs, held_out: bool, pad: int) -> None:
        self.weight, self.beta, self.label_weight = values["weight"], values["beta"], values["labels"]
        self.validates = held_out
        self._pairs, self._collate = votes.pairs, DataCollatorForLanguageModeling(pad)
        # {ids of a chosen row: log p_0 of it, and of each answer beside it}
        self._before: dict[tuple[int, ...], torch.Tensor] = {}

    def start(self, model: Any, shown: bool, batch: dict[str, Any] | None = None) -> None:
        """Compute log p_0 where it is not known.

        Args:
            model: the adapted model as it is before the first step, with TRL's fused head.
            shown: whether to show progress.
            batch: the rows. Default: all.
        """
        rows = self._pairs if batch is None else _rows(batch)
        missing = [row for row in dict.fromkeys(rows) if row not in self._before]
        display = ProgressDisplay("Votes before training", "vote", total=len(missing), shown=shown)
        try:
            for done, (row, scores) in enumerate(self._scored(model, missing), 1):
                self._before[row] = scores
                display.update(done, "likelihoods before training")
        finally:
            display.close()

    def __call__(self, step: Step) -> Term:
        mask, rows = step.inputs["attention_mask"], _rows(step.inputs)
        beside = [(index, one) for index, row in enumerate(rows) for one in self._pairs[row].rejected]
        place = torch.tensor([index for index, _ in beside], device=mask.device)  # the row of each pair
        before = [self._before[row].to(mask.device) for row in rows]
        assert step.log_probs is not None
        chosen = step.log_probs.sum(1) - torch.stack([one[0] for one in before])  # (rows)
        rejected = self._log_probs(step.model, [one for _, one in beside]) - torch.cat([one[1:] for one in before])
        losses = -F.logsigmoid(self.beta * (chosen[place] - rejected))  # (pairs)
        counts = torch.bincount(place, minlength=len(rows))
        return Term((losses / counts[place]).sum() / len(rows))

    def likelier(self, model: Any, rows: Iterable[Example]) -> HeldOutPairs:
        """Count the pairs of these chosen rows in which the chosen answer is likelier, before and now."""
        votes = [tuple(row.input_ids) for row in rows]
        ids = list(dict.fromkeys(votes))  # equal votes share their pairs
        now = dict(self._scored(model, dict.fromkeys(ids)))
        before, after = (
            sum(int((scores[row][0] > scores[row][1:]).sum()) for row in ids) for scores in (self._before, now)
        )
        return HeldOutPairs(len(votes), sum(len(now[row]) - 1 for row in ids), before, after)

    def _scored(self, model: Any, rows: Iterable[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        training = model.training
        model.eval()
        try:
            for row in rows:
                with torch.no_grad():
                    scores = self._log_probs(model, [self._pairs[row].chosen, *self._pairs[row].rejected]).cpu()
                yield row, scores
        finally:
            model.train(training)

    def _log_probs(self, model: Any, examples: Sequence[Example]) -> torch.Tensor:
        """Return log p of each example's labels, (examples)."""
        batch = self._collate([{"input_ids": one.input_ids, "labels": one.labels} for one in examples])
        device = next(model.parameters()).device
        with labels_scored_only():
            outputs = model(
                **{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False, fused_lm_head=True
            )
        return outputs.log_probs.sum(1)


def _rows(batch: dict[str, Any]) -> list[tuple[int, ...]]:
    """The ids of each row, without its padding."""
    mask = batch["attention_mask"].bool()
    return [tuple(ids[kept].tolist()) for ids, kept in zip(batch["input_ids"], mask, strict=True)]
