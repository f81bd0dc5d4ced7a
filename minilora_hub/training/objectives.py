"""Terms that are added to the loss of a training, one class each.

    distill     T^2 KL(p_teacher || p_student) at the positions with a label, of the softmax at temperature T
                (arXiv 1503.02531); the teacher is another adapter on the same base
    orthogonal  sum over the linears of |A_kept A^T|, entry by entry (O-LoRA, arXiv 2310.14152): the rows of A stay
                orthogonal to those of the adapters that are kept
    anchor      KL(p_base || p_student) on general text, at every position
    dpo         preferred answers become likelier than those beside them; see `preference`

They act in training only, so the validation loss is that of the labels and stays comparable; only dpo is also a part of
the validation loss, where pairs are held out. Each is logged under its name, before its weight. Everything that they
draw follows from seed, step and micro-batch, so a resumed run and one on other processes draw the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from minilora_hub.adapter_folder.reading import UNKNOWN
from minilora_hub.errors import TrainingError
from minilora_hub.remote_code.routing_record import record_routing
from minilora_hub.training.loss_terms import Objective, Step, Term
from minilora_hub.training.objective_specs import ObjectiveSpec
from minilora_hub.training.parent_adapter import find_adapter
from minilora_hub.training.preference import Dpo
from minilora_hub.training.swapped_modules import bare_base, frozen_modules, modules_in

if TYPE_CHECKING:
    from minilora_hub.bases.skeleton import BaseSource
    from minilora_hub.training.dataset import TrainingData

BRIEF = 8
"""Tokens with which it is checked how a base computes its logits."""


class Distill:
    """Learn another adapter's distribution; see the head of this file.

    The teacher's modules take the place of the student's for one forward without gradients. The student's forward is
    that of the training.

    Attributes:
        label_weight: factor of the ordinary loss; 0 learns from the teacher alone.
    """

    name, validates = "distill", False

    def __init__(self, values: dict[str, Any], model: Any, base: BaseSource) -> None:
        self.weight, self.temperature, self.label_weight = values["weight"], values["temperature"], values["labels"]
        teacher = find_adapter(values["teacher"])
        known, here = teacher.base_fingerprint, model.config.base_fingerprint
        if UNKNOWN not in (known, here) and known != here:
            raise TrainingError(
                f"objective: the teacher {teacher.name!r} was trained on a base with fingerprint {known}, and the base "
                f"{base.name!r} has {here}: student and teacher need the same base"
            )
        with bare_base(model) as bare:
            require_plain_head(bare, model.base_model)
            self.modules = frozen_modules(bare, teacher.source, base)

    def __call__(self, step: Step) -> Term:
        base = step.model.base
        chosen = step.inputs["labels"][:, 1:] != -100  # (batch, seq - 1)
        given = {name: step.inputs[name] for name in ("attention_mask", "position_ids") if name in step.inputs}
        with torch.no_grad(), bare_base(step.model), modules_in(base, self.modules):
            hidden = step.model.base_model(step.inputs["input_ids"], use_cache=False, **given).last_hidden_state
            teacher = self._log_probabilities(base, hidden, chosen)
        student = self._log_probabilities(base, step.hidden, chosen)
        labels = chosen.sum()
        return Term(divergence(student, teacher) * self.temperature**2 / labels.clamp(min=1), labels)

    def _log_probabilities(self, base: Any, hidden: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        logits = base.get_output_embeddings()(hidden[:, :-1][chosen])  # (labels, vocabulary)
        return F.log_softmax(logits.float() / self.temperature, dim=-1)


class Orthogonal:
    """Keep the rows of A orthogonal to those of kept adapters; see the head of this file."""

    name, label_weight, validates = "orthogonal", 1.0, False

    def __init__(self, values: dict[str, Any], model: Any, kept: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.weight = values["weight"]
        paths = {site.path for site in model.sites}
        device = next(model.parameters()).device
        self.pairs = [(path, lora_a.float().to(device)) for path, lora_a in kept if path in paths]
        if not self.pairs:
            raise TrainingError("objective='orthogonal': the adapters in --keep sit on none of the linears that learn")

    def __call__(self, step: Step) -> Term:
        overlaps = [
            (step.model.base.get_submodule(path).update.lora_A @ lora_a.mT).abs().sum()  # (r, r of the kept one)
            for path, lora_a in self.pairs
        ]
        return Term(torch.stack(overlaps).sum())


class Anchor:
    """Stay near the bare base on general text; see the head of this file."""

    name, label_weight, validates = "anchor", 1.0, False

    def __init__(self, values: dict[str, Any], model: Any, tokenizer: Any, seed: int) -> None:
        self.weight, self.rows, self.length, self.seed = (
            values["weight"],
            values["rows"],
            values["length"],
            seed,
        )
        file = Path(values["data"]).expanduser()
        try:
            ids = tokenizer(file.read_text(encoding="utf-8-sig"), add_special_tokens=False, verbose=False)["input_ids"]
        except (OSError, UnicodeDecodeError) as error:
            raise TrainingError(f"objective: anchor's data={str(file)!r} cannot be read as text: {error}") from error
        if len(ids) < self.length:
            raise TrainingError(
                f"objective: anchor's data={str(file)!r} has {len(ids)} tokens, a row needs length={self.length}"
            )
        self.ids = torch.tensor(ids, device=next(model.parameters()).device)

    def __call__(self, step: Step) -> Term:
        draw = torch.Generator().manual_seed(hash((self.seed, *step.place)) % 2**63)
        starts = torch.randint(len(self.ids) - self.length + 1, (self.rows,), generator=draw).tolist()
        ids = torch.stack([self.ids[start : start + self.length] for start in starts])  # (rows, length)
        mask = torch.ones_like(ids)
        with torch.no_grad(), bare_base(step.model) as base:
            expected = F.log_softmax(base(ids, attention_mask=mask, use_cache=False).logits.float(), dim=-1)
        with record_routing(mask):  # so that switch routing knows that there is no padding
            logits = step.model.base(ids, attention_mask=mask, use_cache=False).logits
        found = F.log_softmax(logits.float(), dim=-1)
        return Term(divergence(found, expected) / ids.numel())


def divergence(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return KL(expected || found), summed over positions, of log-probabilities (…, vocabulary).

    It is never negative; the rounding of nearly equal ones would make it so.
    """
    return F.kl_div(found, expected, log_target=True, reduction="none").sum(dim=-1).clamp(min=0).sum()


def build_objectives(
    specs: Sequence[ObjectiveSpec],
    model: Any,
    base: BaseSource,
    tokenizer: Any,
    seed: int,
    kept: Sequence[tuple[str, torch.Tensor]] = (),
    data: TrainingData | None = None,
) -> list[Objective]:
    """Build the objectives of a run.

    Args:
        specs: which, with their values.
        model: the adapted model, on the device where it trains.
        base: its base.
        tokenizer: the base's.
        seed: of what they draw.
        kept: (path of a linear, A of a kept adapter on it).
        data: the rows; of votes, where `dpo` is asked for.

    Raises:
        TrainingError, AdapterError: one of them cannot be computed on this model.
    """
    found: list[Objective] = []
    for spec in specs:
        if spec.name == "distill":
            found.append(Distill(spec.values, model, base))
        elif spec.name == "orthogonal":
            found.append(Orthogonal(spec.values, model, kept))
        elif spec.name == "dpo" and data and data.votes:
            found.append(Dpo(spec.values, data.votes, data.held_out_pairs, tokenizer.pad_token_id))
        else:
            found.append(Anchor(spec.values, model, tokenizer, seed))
    return found


def label_weight(objectives: Sequence[Objective]) -> float:
    """Return the factor of the ordinary loss."""
    return math.prod(one.label_weight for one in objectives)


@torch.no_grad()
def require_plain_head(base: Any, decoder: Any) -> None:
    """Raise a TrainingError unless a base's logits are its output embeddings applied to its last hidden states."""
    ids = torch.arange(BRIEF, device=next(base.parameters()).device).unsqueeze(0)
    logits = base(ids, use_cache=False).logits
    hidden = decoder(ids, use_cache=False).last_hidden_state
    if not torch.allclose(logits, base.get_output_embeddings()(hidden), rtol=1e-2, atol=1e-2):
        raise TrainingError(
            f"objective='distill': {type(base).__name__} scales or caps its logits, which distillation does not "
            "reproduce: use a base that does not"
        )
