"""Make the plan of a run, which is printed before it starts: steps, and memory and time measured on one batch."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from minilora_hub.formatting import duration, size
from minilora_hub.training.dataset import TrainingData
from minilora_hub.training.models import Trainee, trainable_parameters
from minilora_hub.training.objective_specs import parse_objectives
from minilora_hub.training.row_kind import RowKind
from minilora_hub.training.settings import TrainingSettings
from minilora_hub.training.sharding import own_part

SHOWN_LABELS = 12
TEXTS = "text-generation"
"""The usual task, which the plan does not mention."""


@dataclass(frozen=True)
class Shape:
    """How rows are divided into steps.

    Attributes:
        micro_batch: rows per forward pass and process.
        accumulation: forward passes per optimizer step.
        steps: optimizer steps.
        save_every: steps between checkpoints.
        warmup_steps: steps over which the learning rate rises.
    """

    micro_batch: int
    accumulation: int
    steps: int
    save_every: int
    warmup_steps: int


@dataclass(frozen=True)
class Plan:
    """The plan of a run, as it is printed, and as `--json` outputs it.

    Attributes:
        trainable: number of trainable parameters.
        share: their share of the base's parameters.
        rows: number of training rows.
        validation_rows: number of validation rows.
        skipped_rows: number of skipped rows.
        tokens: tokens per epoch.
        learned_tokens: tokens per epoch that have a loss.
        longest: tokens in the longest row.
        steps: optimizer steps.
        batch: rows per step, over all processes.
        base_bytes: memory of the base's weights.
        learning_bytes: memory of the adapter, its gradients and the optimizer's state.
        activation_bytes: memory of the activations that a forward pass of the longest rows saves for backward.
        seconds: expected time.
        packed: whether the rows of a step are packed.
        ends: the tokens that end an answer: trained answers end with one, and generation stops at each.
        start: the adapter it continues from, and the part of it that is trained; None for a fresh adapter.
        objectives: terms added to the loss.
        kept: adapters that stay active under the new one.
        ranks: how the ranks were distributed over the linears; None where the settings give them.
        init: the start that makes up for the rounding of a quantized base, and how much; None for the usual one.
        votes: the votes and pairs that are trained on, and what was skipped of the file; None for rows.
        task: what the rows are for.
        labels: of labelled rows, the classes.
        whole: modules of the base that are trained and saved whole, such as a new head.
    """

    trainable: int
    share: float
    rows: int
    validation_rows: int
    skipped_rows: int
    tokens: int
    learned_tokens: int
    longest: int
    steps: int
    batch: int
    base_bytes: int
    learning_bytes: int
    activation_bytes: int
    seconds: float
    packed: bool
    ends: tuple[str, ...]
    start: str | None = None
    objectives: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    ranks: str | None = None
    init: str | None = None
    votes: str | None = None
    task: str = TEXTS
    labels: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    def lines(self) -> list[tuple[str, str]]:
        """Return the plan for the terminal, as pairs of label and value."""
        held = f", {self.validation_rows:,} held out" if self.validation_rows else ""
        skipped = f", {self.skipped_rows:,} skipped" if self.skipped_rows else ""
        parts = {"base": self.base_bytes, "adapter and optimizer": self.learning_bytes}
        parts["activations"] = self.activation_bytes
        memory = ", ".join(f"{part} {size(count)}" for part, count in parts.items())
        seconds = max(self.seconds, 1) if self.seconds < 90 else 60 * round(self.seconds / 60)
        begin = [("from", self.start)] if self.start else []
        begin += [("objective", text) for text in self.objectives] + [("kept", name) for name in self.kept]
        others = {"ranks": self.ranks, "start": self.init, "votes": self.votes}
        begin += [(name, line) for name, line in others.items() if line]
        learned = f"{self.learned_tokens:,} {'labels' if self.labels else 'learned'}"
        if self.task != TEXTS:
            begin.append(("task", self.task))
        if self.labels:
            shown = ", ".join(self.labels[:SHOWN_LABELS]) + ", …" * (len(self.labels) > SHOWN_LABELS)
            head = f"{', '.join(self.whole)}: new, trained whole" if self.whole else "the base's own, frozen"
            begin += [("labels", f"{len(self.labels)}: {shown}"), ("head", head)]
        return [
            *begin,
            ("trainable", f"{self.trainable:,} parameters, {self.share:.2%} of the base"),
            ("data", f"{self.rows:,} rows{held}{skipped}"),
            ("tokens", f"{self.tokens:,} in an epoch, {learned}; longest row {self.longest:,}"),
            *([] if self.labels else [("end", f"an answer ends with {' or '.join(self.ends)}")]),
            ("steps", f"{self.steps:,} of {self.batch} {'packed ' * self.packed}row{'s' * (self.batch > 1)}"),
            ("memory", f"about {size(sum(parts.values()))}: {memory}"),
            ("time", f"about {duration(seconds)}"),
        ]


def shape_of(settings: TrainingSettings, rows: int, processes: int) -> Shape:
    """Divide rows, or packed rows, into steps on a number of processes.

    Raises:
        ValueError: the processes or micro-batches do not divide the batch.
    """
    recipe = settings.recipe
    if recipe.batch_size % processes:
        raise ValueError(f"batch_size={recipe.batch_size}: must be a multiple of the {processes} processes")
    own = recipe.batch_size // processes
    micro = min(recipe.micro_batch_size or own, own)
    if own % micro:
        raise ValueError(f"micro_batch_size={micro}: must divide the {own} rows of a step on each process")
    per_epoch = math.ceil(math.ceil(rows / (micro * processes)) / (own // micro))
    steps = recipe.max_steps or math.ceil(per_epoch * recipe.epochs)
    save_every = min(steps, recipe.save_every or max(1, round(steps / 10)))
    return Shape(micro, own // micro, steps, save_every, round(steps * recipe.warmup))


def make_plan(
    settings: TrainingSettings,
    data: TrainingData,
    trainee: Trainee,
    shape: Shape,
    kind: RowKind,
    trainer: Any,
) -> Plan:
    """Make the plan, measuring a forward and a backward pass of one typical batch; the model is not changed.

    Args:
        settings: settings of the run.
        data: the rows.
        trainee: the model.
        shape: steps and batches.
        kind: of the rows.
        trainer: the trainer of the run.
    """
    trainable = sum(parameter.numel() for parameter in trainable_parameters(trainee.model).values())
    frozen = [parameter for parameter in trainee.model.parameters() if not parameter.requires_grad]
    base_bytes = sum(tensor.numel() * tensor.element_size() for one in frozen for tensor in _stored(own_part(one)))
    lengths = sorted(data.train.lengths, reverse=True)
    seconds, kept, tokens = _probe(trainee.model, data, shape.micro_batch, kind, trainer)
    longest_batch = lengths[0] * min(shape.micro_batch, len(lengths))
    packed = settings.recipe.batching == "packed"
    if packed:
        longest_batch = shape.micro_batch * (settings.recipe.max_length or lengths[0])
        seconds *= longest_batch / tokens
    return Plan(
        trainable=trainable,
        share=trainable / trainee.base_parameters,
        rows=len(data.train),
        validation_rows=len(data.validation),
        skipped_rows=len(data.skipped),
        tokens=data.tokens,
        learned_tokens=data.learned_tokens,
        longest=lengths[0],
        steps=shape.steps,
        batch=settings.recipe.batch_size,
        base_bytes=base_bytes,
        learning_bytes=trainable * 4 * 4,  # weight, gradient and Adam's two moments, float32
        activation_bytes=round(kept / tokens * longest_batch),
        seconds=seconds * shape.accumulation * shape.steps,
        packed=packed,
        ends=tuple(kind.tokenizer.convert_ids_to_tokens(kind.ends)),
        start=None if trainee.parent is None else f"{trainee.parent.name}; {_PARTS[settings.learn]}",
        objectives=tuple(spec.shown() for spec in parse_objectives(settings.objective)),
        kept=settings.keep,
        votes=data.votes.described() if data.votes else None,
        task=kind.task,
        labels=data.labels,
        whole=tuple(getattr(trainee.model.config, "modules_to_save", None) or ()),
    )


_PARTS = {
    "all": "all of it is trained",
    "router": "its router is trained",
    "experts": "its experts are trained",
    "attention": "its updates outside the feed-forward blocks are trained",
}


def _stored(tensor: Any) -> list[Any]:
    """Return the tensors in memory that a weight consists of: several where a quantizer made it a class of its own."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def _probe(model: Any, data: TrainingData, rows: int, kind: RowKind, trainer: Any) -> tuple[float, int, int]:
    """Return (seconds, bytes saved for backward, tokens) of a micro-batch of rows around the median length."""
    import torch

    from minilora_hub.training.loss_terms import Step, recorded
    from minilora_hub.training.preference import Dpo

    device, objectives = trainer.args.device, getattr(trainer, "objectives", ())
    by_length = sorted(range(len(data.train)), key=data.train.lengths.__getitem__)
    middle = len(by_length) // 2
    batch = kind.collate([data.train.dataset[index] for index in by_length[max(0, middle - rows // 2) :][:rows]])
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    held = (tensor for one in (*model.parameters(), *model.buffers()) for tensor in _stored(own_part(one)))
    weights = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = _stored(tensor)[0].untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    training = model.training
    if not trainer.recipe.shard:  # FSDP2 has placed it
        model.to(device)
    model.train()
    for dpo in (one for one in objectives if isinstance(one, Dpo)):
        dpo.start(model, False, batch)  # once in a training, so it is no part of a step
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for _ in range(2 if device.type == "cuda" else 1):  # the first pass on a GPU also loads kernels
            started = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                with recorded(model, bool(objectives)) as forward:
                    loss = model(**batch, **kind.forward_arguments).loss
                for objective in objectives:
                    step = Step(model, batch, forward.hidden, (0, 0), forward.log_probs)
                    loss = loss + objective.weight * objective(step).value
            size_kept = sum(storage.nbytes() for storage in kept.values())  # a layer that was gathered is freed again
            kept.clear()
            loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
    for parameter in model.parameters():
        parameter.grad = None
    model.train(training)
    return seconds, size_kept, batch["input_ids"].numel()
