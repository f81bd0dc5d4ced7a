"""Build the trainer of a run from settings, examples and a model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minilora_hub.errors import TrainingError
from minilora_hub.training.dataset import ExampleRows, TrainingData
from minilora_hub.training.models import Trainee, compute_dtype
from minilora_hub.training.objective_specs import parse_objectives
from minilora_hub.training.passthrough import method_callbacks
from minilora_hub.training.plan import Shape, shape_of
from minilora_hub.training.recipes import OURS
from minilora_hub.training.row_kind import RowKind
from minilora_hub.training.settings import TrainingSettings
from minilora_hub.training.sharding import shard


@contextmanager
def known_warnings_ignored() -> Iterator[None]:
    """Ignore warnings that libraries raise about each other, and about cases that are handled here."""
    with warnings.catch_warnings():
        for start in (
            "`is_gradient_checkpointing` is deprecated",  # PEFT reads transformers' old name
            "PiSSA changes the base weights",  # which is why it is converted
            "Adapter 'default': .* LoRA tensor.* have invalid shape",  # AdaLoRA's ranks of 0
            "MatMul8bitLt",
        ):
            warnings.filterwarnings("ignore", message=start)
        yield


def build_trainer(
    settings: TrainingSettings,
    trainee: Trainee,
    data: TrainingData,
    kind: RowKind,
    out: Path,
    processes: int,
) -> tuple[Any, Shape]:
    """Return the trainer, ready to run, and the shape of its steps.

    Raises:
        TrainingError: packed rows would attend to each other on this base.
        ValueError: the processes or micro-batches do not divide the batch.
    """
    from transformers import EarlyStoppingCallback, PrinterCallback

    from minilora_hub.training.callbacks import GradientsChecked

    recipe = settings.recipe
    packed = recipe.batching == "packed"
    rows = data.train.dataset
    if packed:
        from trl.data_utils import pack_dataset

        rows = pack_dataset(rows, recipe.max_length or max(data.train.lengths), "bfd")
    shape = shape_of(settings, len(rows), processes)
    checked = GradientsChecked()
    arguments = _arguments(settings, shape, out, validated=bool(data.validation))
    trainer = kind.make_trainer(
        arguments,
        recipe=recipe,
        place_of=data.place_of,
        model=trainee.model,
        train_dataset=rows,
        eval_dataset=data.validation.dataset if data.validation else None,
        processing_class=kind.processor,
        callbacks=[checked, *([] if settings.method in OURS else method_callbacks(trainee.model, shape.steps))],
    )
    checked.trainer = trainer
    if settings.objective:
        from minilora_hub.bases.skeleton import find_base
        from minilora_hub.training.objectives import build_objectives

        base = find_base(settings.base, settings.base_revision)
        factors = trainee.kept.factors if trainee.kept else ()
        specs = parse_objectives(settings.objective)
        with trainer.compute_loss_context_manager():
            trainer.objectives = build_objectives(
                specs, trainee.model, base, kind.tokenizer, recipe.seed, factors, data
            )
    trainer.remove_callback(PrinterCallback)
    if recipe.early_stopping:
        trainer.add_callback(EarlyStoppingCallback(recipe.early_stopping))
    if packed:
        _require_independent_rows(trainee.model, data.train)
    if recipe.shard:
        shard(trainee.model)
    return trainer, shape


def _arguments(settings: TrainingSettings, shape: Shape, out: Path, validated: bool) -> Any:
    import torch
    from trl import SFTConfig

    recipe = settings.recipe
    on_gpu = torch.cuda.is_available()
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    arguments: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": shape.steps,
        "per_device_train_batch_size": shape.micro_batch,
        "per_device_eval_batch_size": shape.micro_batch,
        "gradient_accumulation_steps": shape.accumulation,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": shape.warmup_steps,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "optim": recipe.optimizer,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": shape.save_every,
        "eval_strategy": "steps" if validated else "no",
        "eval_steps": shape.save_every if validated else None,
        "load_best_model_at_end": validated,
        "metric_for_best_model": "eval_loss" if validated else None,
        "greater_is_better": False if validated else None,
        "prediction_loss_only": True,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "use_cpu": not (on_gpu or torch.backends.mps.is_available()),
        "bf16": on_gpu and compute_dtype(settings) == torch.bfloat16,
        "fp16": False,
        "packing": recipe.batching == "packed",
        "eval_packing": False,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "report_to": list(recipe.report_to) or "none",
        "disable_tqdm": True,
        "include_num_input_tokens_seen": "non_padding",
        "dataloader_pin_memory": on_gpu,
        # Every adapter tensor is used in every step: a mixture's experts are slices of one.
        "ddp_find_unused_parameters": False,
    }
    return SFTConfig(**arguments | {checkpointing: recipe.gradient_checkpointing})


def _require_independent_rows(model: Any, examples: ExampleRows) -> None:
    """Raise if the logits of two packed rows differ from those of each row alone, with this base and attention."""
    import torch

    rows = [examples[index].input_ids[:24] for index in range(min(2, len(examples)))]
    if len(rows) < 2:
        return
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    with torch.no_grad():
        alone = [model(torch.tensor([row], device=device), use_cache=False).logits[0] for row in rows]
        together = model(
            torch.tensor([rows[0] + rows[1]], device=device),
            position_ids=torch.tensor([[*range(len(rows[0])), *range(len(rows[1]))]], device=device),
            use_cache=False,
        ).logits[0]
    model.train(training)
    gap = (together - torch.cat(alone)).abs().max().item()
    limit = 1e-3 if together.dtype == torch.float32 else 0.25
    if not gap < limit * max(1.0, together.abs().max().item()):
        raise TrainingError(
            f"batching='packed': on this base packed rows attend to each other (logits differ by {gap:.2g}): "
            "pass --batching length-grouped"
        )


@contextmanager
def collected_notes() -> Iterator[list[str]]:
    """Collect warnings about skipped targets, instead of printing them."""
    from minilora_hub.remote_code.probe import TargetsWarning

    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TargetsWarning)
        yield notes
    for warning in caught:
        if issubclass(warning.category, TargetsWarning):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
