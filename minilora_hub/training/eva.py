"""Distribute a number of parameters over the linears of a base by their inputs: EVA (arXiv 2410.07170), by PEFT.

The inputs of each linear on the training rows have principal components. Those that explain the largest share of their
linear's inputs become the first rows of A, so a linear gets as many ranks as it has of them, and one without any gets
no adapter. s = alpha / r is the same for all linears. Everything follows from the base, the data and the seed, so a
resumed run finds the same ranks again.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minilora_hub.bases.resolving import ResolvedBase
from minilora_hub.errors import TrainingError
from minilora_hub.training.dataset import ExampleRows
from minilora_hub.training.models import build_trainee
from minilora_hub.training.settings import TrainingSettings
from minilora_hub.training.tokens import IGNORED

RHO = 2.0
"""A linear gets at most this many times the average rank: the paper's rho, and PEFT's default."""
SCALING = 2.0
"""alpha / r, as in the recipes."""


@dataclass(frozen=True)
class Distribution:
    """Ranks and first directions.

    Attributes:
        settings: those of the run, with the ranks in the adapter's configuration.
        directions: A of each adapted linear, [r, in], by its path in the base.
        described: one line for the plan.
    """

    settings: TrainingSettings
    directions: dict[str, Tensor]
    described: str

    @torch.no_grad()
    def start(self, model: Any) -> None:
        """Write the directions into a fresh adapter with these ranks."""
        for path, directions in self.directions.items():
            model.base.get_submodule(path).update.lora_A.copy_(directions)


def distribute(
    settings: TrainingSettings, resolved: ResolvedBase, rows: ExampleRows, padding: int, progress: bool = False
) -> Distribution:
    """Choose the ranks of a run whose rank is "auto".

    Args:
        settings: of the run; `recipe.budget` is the most parameters of the adapter.
        resolved: the base.
        rows: the training rows; the inputs at tokens with a loss count.
        padding: id of the token that pads rows.
        progress: show a bar on stderr, if it is a terminal.

    Raises:
        TrainingError: the budget or the rows are too few.
    """
    budget = settings.recipe.budget
    assert budget is not None
    # A fresh LoRA changes nothing, and calls each linear with its inputs only.
    bare = dataclasses.replace(_with(settings, r=1, lora_alpha=SCALING), method="lora")
    model = build_trainee(bare, resolved)[0].model
    sites = {site.path: site for site in model.sites}
    per_rank = sum(site.in_features + site.out_features for site in sites.values())
    # A magnitude for each output of an adapted linear.
    magnitudes = {path: site.out_features * (settings.method == "dora") for path, site in sites.items()}
    rank = (budget - sum(magnitudes.values())) // per_rank
    while rank >= 1:
        found = _components(model, list(sites), rank, rows, padding, settings.recipe.seed, progress)
        used = sum(
            len(a) * (sites[path].in_features + sites[path].out_features) + magnitudes[path]
            for path, a in found.items()
        )
        if used <= budget:
            break
        rank = min(rank - 1, int(rank * budget / used))  # ranks have gone to wider linears than the average one
    else:
        least = per_rank + sum(magnitudes.values())
        raise TrainingError(
            f"budget={budget}: is too small for EVA on this base: rank 1 everywhere takes {least:,} parameters; pass a "
            "larger budget, or fewer target_modules"
        )
    ranks = {sites[path].name: len(a) for path, a in found.items()}
    chosen = _with(
        settings,
        r=rank,
        lora_alpha=SCALING * rank,
        target_modules=list(ranks),
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: SCALING * r for name, r in ranks.items() if r != rank},
    )
    left_out = f", {len(sites) - len(ranks)} linears without" if len(ranks) < len(sites) else ""
    described = f"{min(ranks.values())} to {max(ranks.values())} by EVA within {budget:,} parameters{left_out}"
    return Distribution(chosen, found, described)


def _with(settings: TrainingSettings, **fields: Any) -> TrainingSettings:
    adapter = dict(settings.recipe.adapter) | fields
    return dataclasses.replace(settings, recipe=dataclasses.replace(settings.recipe, adapter=adapter))


def _components(
    model: Any, paths: list[str], rank: int, rows: ExampleRows, padding: int, seed: int, progress: bool
) -> dict[str, Tensor]:
    """Return EVA's components for an average rank: path -> [r, in], without the linears that get none."""
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    config = LoraConfig(
        r=rank,
        target_modules=[f"{path}.base_layer" for path in paths],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=RHO, adjust_scaling_factors=False),
    )
    found = get_eva_state_dict(
        model.base,
        _Batches(rows, round(rank * RHO), padding, seed),
        config,
        forward_fn=lambda base, batch: base(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ),
        prepare_model_inputs_fn=lambda batch, config: (batch["labels"] != IGNORED).flatten(),
        prepare_layer_inputs_fn=lambda inputs, learned, name: inputs[0].flatten(0, -2)[learned],
        gather_distributed_inputs=False,  # every process computes the same
        show_progress_bar=progress and sys.stderr.isatty(),
    )
    return {name.removesuffix(".base_layer"): a.float().contiguous() for name, a in found.items() if len(a)}


class _Batches:
    """Padded batches of the training rows, each with at least twice as many learned tokens as there are components."""

    def __init__(self, rows: ExampleRows, components: int, padding: int, seed: int) -> None:
        self.rows, self.padding = rows, padding
        order = list(range(len(rows)))
        random.Random(seed).shuffle(order)  # noqa: S311  not for security
        self.batches: list[list[int]] = []
        batch: list[int] = []
        for index in order:
            batch.append(index)
            if sum(rows.learned[i] for i in batch) >= 2 * components:
                self.batches.append(batch)
                batch = []
        if not self.batches:
            raise TrainingError(
                f"data: has {sum(rows.learned):,} tokens with a loss, EVA needs at least {2 * components:,} for this "
                "budget: pass more rows, or a smaller budget"
            )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        padded = DataCollatorForLanguageModeling(self.padding)
        for batch in self.batches:
            examples = [self.rows[index] for index in batch]
            yield dict(padded([{"input_ids": one.input_ids, "labels": one.labels} for one in examples]))
