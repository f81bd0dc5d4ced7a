"""TRL's SFTTrainer for adapters: uses the model's own loss.

Differences from SFTTrainer 1.16:

- SFTTrainer computes the loss from the log-probabilities of a fused head, which ignores terms that a PEFT model adds to
  its loss (AdaLoRA's orthogonality). Here the loss is the one that the model returns, from the same fused head.
  MixLoRA's router losses are added by TRL.
- SFTTrainer casts the adapters of a quantised base to bfloat16. Here they stay float32.
- On a CPU SFTTrainer computes logits at every position, including prompts and padding, which takes a third of a step.
  Here it computes them only where there is a label, as on a GPU.
- Checkpoints, the order of rows and errors about NaN are those of `TrainsAdapter`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import Trainer
from trl import SFTTrainer

from minilora_hub.training.adapter_checkpoints import TrainsAdapter
from minilora_hub.training.loss_terms import Objective, Step, labels_scored_only, recorded
from minilora_hub.training.models import trainable_parameters
from minilora_hub.training.objectives import label_weight
from minilora_hub.training.recipes import Recipe


class AdapterTrainer(TrainsAdapter, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer for a model with a trainable adapter; see the module's docstring.

    Args:
        recipe: settings of the training.
        place_of: returns the location of the row with these token ids, for error messages about a NaN.
        **kwargs: arguments of SFTTrainer.
    """

    def __init__(self, *, recipe: Recipe, place_of: Callable[[list[int]], str | None], **kwargs: Any) -> None:
        model = kwargs["model"]
        self.recipe, self.place_of = recipe, place_of
        self.objectives: list[Objective] = []
        self._micro_batch = (-1, 0)  # (optimizer step, micro-batch in it)
        exact = {name: parameter.data for name, parameter in trainable_parameters(model).items()}
        super().__init__(**kwargs)
        for name, parameter in trainable_parameters(model).items():
            parameter.data = exact[name]

    def _send_telemetry(self) -> None:
        """Do nothing, where TRL would report the run over the network."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss with all its terms: router losses, those of a PEFT method, and the objectives."""
        self._last_inputs = inputs
        objectives = [one for one in self.objectives if model.training or one.validates]
        own = self.accelerator.unwrap_model(model)
        with labels_scored_only(), recorded(own, bool(objectives)) as forward:
            loss, outputs = self._loss(model, inputs, num_items_in_batch)
        if objectives:
            place = self._place() if model.training else (self.state.global_step, 0)
            step = Step(own, inputs, forward.hidden, place, forward.log_probs)
            loss = self._with_objectives(objectives, loss, step, num_items_in_batch)
        self._require_finite(model, loss, inputs)
        return (loss, outputs) if return_outputs else loss

    def _loss(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> tuple[Any, Any]:
        if self.aux_loss_enabled:  # a mixture: TRL adds the router losses, averaged over an accumulated batch
            return super().compute_loss(model, dict(inputs), False, num_items_in_batch), None
        inputs = inputs | {"use_cache": False, "fused_lm_head": True}
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        return loss, outputs

    def _place(self) -> tuple[int, int]:
        """Return (optimizer step, micro-batch in it, numbered over all processes), and count the micro-batch."""
        step, micro = self._micro_batch
        micro = micro + 1 if step == self.state.global_step else 0
        self._micro_batch = (self.state.global_step, micro)
        return self.state.global_step, micro * self.accelerator.num_processes + self.accelerator.process_index

    def _with_objectives(self, objectives: Sequence[Objective], loss: Any, step: Step, num_items_in_batch: Any) -> Any:
        """Add the objectives to a micro-batch's loss, and log each one.

        A term over labels counts by the micro-batch's share of the labels, as the loss does; another one is averaged
        over the micro-batches. (Where the batch was not counted, the trainer averages both.)
        """
        loss = label_weight(objectives) * loss
        counted = num_items_in_batch is not None
        for objective in objectives:
            term = objective(step)
            share: Any = 1 / self.current_gradient_accumulation_steps if counted else 1.0
            if counted and term.labels is not None:
                share = term.labels / num_items_in_batch
                share = share * self.accelerator.num_processes if self.args.average_tokens_across_devices else share
            loss = loss + objective.weight * share * term.value
            mean = self.accelerator.reduce(term.value.detach(), "mean")
            self._metrics["train" if step.model.training else "eval"][objective.name].append(mean.item())
        return loss
