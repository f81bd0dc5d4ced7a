"""What the trainers of adapters share: atomic checkpoints, the order of rows, and stopping at the first NaN.

Differences from transformers' Trainer:

- It writes checkpoints in place. Here they are written to a temporary folder and renamed, with only the adapter's
  tensors.
- It draws a length-grouped order from torch's global random state, which a resumed run does not have. Here the order
  follows from seed and epoch.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import Sampler
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices

from minilora_hub.errors import TrainingError
from minilora_hub.remote_code.adapter_files import check_tensors, read_adapter, write_adapter
from minilora_hub.remote_code.linear_layers import is_split, whole_tensor
from minilora_hub.training.models import trainable_parameters
from minilora_hub.training.passthrough import allocation_state, restore_allocation_state
from minilora_hub.training.recipes import Recipe
from minilora_hub.training.run_folder import how_to_resume, reason_of
from minilora_hub.training.sharding import keep_states_whole, split_like

CHECKPOINTS = "checkpoints"
WEIGHTS, SCORES = "trainable.safetensors", "scores.safetensors"
SAVING = ".saving"


def last_checkpoint(out: Path) -> Path | None:
    """Return the last complete checkpoint of a run, or None."""
    found = [path for path in (out / CHECKPOINTS).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    return max(found, key=lambda path: int(path.name.partition("-")[2]), default=None)


class LengthGrouped(Sampler[int]):
    """Samples rows so that a batch holds rows of similar length; the order follows from seed and epoch."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; called by the data loader at its start."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class TrainsAdapter(Trainer):
    """The part of a trainer that knows that only an adapter is trained; see the module's docstring."""

    recipe: Recipe = Recipe()
    place_of: Callable[[list[int]], str | None]
    _last_inputs: dict[str, Any] | None = None
    _whole: dict[str, Any] = {}  # noqa: RUF012  what FSDP2 has split, while a checkpoint is written

    def on_saved(self) -> None:
        """Do nothing; a run replaces it by what follows a checkpoint."""

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        if not self.recipe.shard:  # FSDP2 moves it in parts
            super()._move_model_to_device(model, device)

    @property
    def run_dir(self) -> Path:
        """The folder of the checkpoints."""
        return Path(str(self.args.output_dir))

    def _require_finite(self, model: Any, loss: Any, inputs: dict[str, Any]) -> None:
        """Raise TrainingError in training where a loss is not finite."""
        if model.training and not torch.isfinite(loss):
            raise TrainingError(self._not_finite("loss", loss.detach().item(), inputs))

    def _not_finite(self, what: str, value: float, inputs: dict[str, Any] | None) -> str:
        saved = last_checkpoint(self.run_dir.parent)
        kept = f"{saved.name} is complete" if saved else "no checkpoint was saved yet"
        rows = f" on {', '.join(self._rows_in(inputs))}" if inputs else ""
        rate = self._get_learning_rate() if self.lr_scheduler is not None else self.args.learning_rate
        return (
            f"the {what} became {value} in step {self.state.global_step + 1}{rows}, at learning rate {rate:.2g}: "
            f"nothing was updated, {kept}. Try a lower --learning-rate, a longer --set warmup=, "
            "--set dtype=float32, or inspect those rows"
        )

    def not_finite_gradients(self) -> str:
        """Return the message about gradients that are not finite."""
        return self._not_finite("gradient", float("nan"), self._last_inputs)

    def _rows_in(self, inputs: dict[str, Any]) -> list[str]:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is None:  # packed: a row starts at position id 0
            starts = [*(inputs["position_ids"][0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
            rows = [ids[0, start:end] for start, end in itertools.pairwise(starts)]
        else:
            rows = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
        return [self.place_of(row.tolist()) or "a part of a row" for row in rows]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.recipe.batching != "length-grouped":
            return super()._get_train_sampler(train_dataset)
        dataset: Any = train_dataset or self.train_dataset
        lengths = [len(row) for row in dataset["input_ids"]]
        return LengthGrouped(lengths, self.recipe.batch_size, self.args.seed)

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the recipe's optimizer: with `loraplus_ratio` by PEFT; `router_lr_ratio` gives routers own groups."""
        created = self.optimizer is None
        if created and self.recipe.loraplus_ratio:
            from peft.optimizers import create_loraplus_optimizer

            target: Any = model if model is not None else self.model
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, target)
            rate = arguments.pop("lr")
            self.optimizer = create_loraplus_optimizer(
                target,
                kind,
                lr=rate,
                loraplus_lr_ratio=self.recipe.loraplus_ratio,
                loraplus_weight_decay=self.recipe.weight_decay,
                **arguments,
            )
        super().create_optimizer(model)
        if created and self.recipe.router_lr_ratio is not None:
            self._split_off_routers(self.recipe.router_lr_ratio)
        if created and self.recipe.shard:
            keep_states_whole(self.optimizer)
        return self.optimizer

    def _split_off_routers(self, ratio: float) -> None:
        """Move the routers into parameter groups with `ratio` times the learning rate."""
        named = trainable_parameters(self.accelerator.unwrap_model(self.model))
        routers = {id(parameter) for name, parameter in named.items() if name.endswith(".router")}
        optimizer: Any = self.optimizer
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in routers]
            if own:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in routers]
                optimizer.add_param_group(group | {"params": own, "lr": group["lr"] * ratio})

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any = None) -> str:
        run = self.run_dir
        return str(run / SAVING if getattr(self, "_saving", False) else run)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Write a checkpoint to a temporary folder, and rename it once it is complete."""
        run, step = self.run_dir, self.state.global_step
        target = run / f"checkpoint-{step}"
        if self.args.should_save:
            shutil.rmtree(run / SAVING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        self._whole = {n: whole_tensor(p) for n, p in trainable_parameters(self.model).items() if is_split(p)}
        try:
            Trainer._save_checkpoint(self, model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(run / SAVING, ignore_errors=True)
            saved = last_checkpoint(run.parent)
            raise TrainingError(
                f"the checkpoint of step {step} could not be written to {str(run)!r} ({reason_of(error)}); "
                f"{how_to_resume(run.parent, saved.name if saved else None)}"
            ) from error
        finally:
            self._saving, self._whole = False, {}
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(run / SAVING / target.name, target)
            shutil.rmtree(run / SAVING, ignore_errors=True)
            self._drop_old_checkpoints(run)
            self.on_saved()
        self.accelerator.wait_for_everyone()

    def _drop_old_checkpoints(self, run: Path) -> None:
        by_step = {int(path.name.partition("-")[2]): path for path in run.glob("checkpoint-*")}
        kept = sorted(by_step)[-self.recipe.keep_checkpoints :]
        for step, path in by_step.items():
            if step not in kept and step != self.state.best_global_step:
                shutil.rmtree(path, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        values = trainable_parameters(model) | self._whole if state_dict is None else state_dict
        learned = {name: values[name].detach().cpu() for name in trainable_parameters(model)}
        write_adapter(folder / WEIGHTS, learned)
        scores = allocation_state(model)
        if scores:
            write_adapter(folder / SCORES, scores)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.recipe.shard and not self.args.should_save:
            self.optimizer.state_dict()  # type: ignore[union-attr]  # all processes take part where one writes
        super()._save_optimizer_and_scheduler(output_dir)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """Restore the state of a run; its best checkpoint has been renamed since, or moved with the folder."""
        made = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(self.run_dir / f"checkpoint-{self.state.best_global_step}")
        return made

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_learned(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self.load_learned(self.run_dir / f"checkpoint-{self.state.best_global_step}")

    def take_over(self, checkpoint: Path) -> None:
        """Restore the state after the last step from its checkpoint: the best weights, and the history."""
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self.load_learned(checkpoint)
        if self.args.load_best_model_at_end:
            self._load_best_model()

    def load_learned(self, checkpoint: Path) -> None:
        """Load a checkpoint's tensors into the model.

        Raises:
            ValueError: they do not fit the model; the message names the tensor.
        """
        parameters = trainable_parameters(self.accelerator.unwrap_model(self.model))
        tensors = read_adapter(checkpoint / WEIGHTS)
        check_tensors(checkpoint / WEIGHTS, tensors, {name: value.shape for name, value in parameters.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(split_like(tensors[name], parameter))
        if (checkpoint / SCORES).is_file():
            restore_allocation_state(self.accelerator.unwrap_model(self.model), read_adapter(checkpoint / SCORES))
