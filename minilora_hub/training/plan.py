"""What a run will do and cost, told before it starts; time and activations are measured on one batch."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from minilora_hub.formatting import duration, size
from minilora_hub.training.dataset import TrainingData
from minilora_hub.training.models import Trainee, trainable_parameters
from minilora_hub.training.settings import TrainingSettings


@dataclass(frozen=True)
class Shape:
    """How the rows become steps.

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
    """The plan of a run, as it is printed and as `--json` has it.

    Attributes:
        trainable: parameters that learn.
        share: their share of the base's.
        rows, validation_rows, skipped_rows: how many rows there are, are held out, were left out.
        tokens, learned_tokens: in an epoch; those with a loss.
        longest: tokens in the longest row.
        steps: optimizer steps.
        batch: rows per step, over all processes.
        base_bytes: the base's weights as they are held.
        learning_bytes: adapter, its gradients and the optimizer's state.
        activation_bytes: what a forward pass of the longest rows keeps for the backward pass.
        seconds: expected time; None where nothing was measured.
        packed: whether a step's rows are packed ones.
        ends: the tokens that end an answer: what is learned ends with one, and generation stops at each.
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
    activation_bytes: int | None
    seconds: float | None
    packed: bool = False
    ends: tuple[str, ...] = ()

    def lines(self) -> list[tuple[str, str]]:
        """The plan for people: (what, how much)."""
        held = f", {self.validation_rows:,} held out" if self.validation_rows else ""
        skipped = f", {self.skipped_rows:,} skipped" if self.skipped_rows else ""
        memory = self.base_bytes + self.learning_bytes + (self.activation_bytes or 0)
        parts = f"base {size(self.base_bytes)}, adapter and optimizer {size(self.learning_bytes)}"
        if self.activation_bytes is not None:
            parts += f", activations {size(self.activation_bytes)}"
        return [
            ("trainable", f"{self.trainable:,} parameters, {self.share:.2%} of the base"),
            ("data", f"{self.rows:,} rows{held}{skipped}"),
            ("tokens", f"{self.tokens:,} in an epoch, {self.learned_tokens:,} learned; longest row {self.longest:,}"),
            ("end", f"an answer ends with {' or '.join(self.ends)}"),
            ("steps", f"{self.steps:,} of {self.batch} {'packed ' * self.packed}row{'s' * (self.batch > 1)}"),
            ("memory", f"about {size(memory)}: {parts}"),
            ("time", "unknown" if self.seconds is None else f"about {duration(_rounded(self.seconds))}"),
        ]


def _rounded(seconds: float) -> float:
    """Round an estimated time to what can be known: whole minutes from 90 seconds on."""
    return max(seconds, 1) if seconds < 90 else 60 * round(seconds / 60)


def shape_of(settings: TrainingSettings, rows: int, processes: int) -> Shape:
    """How `rows` rows (packed ones, if they are packed) become steps on that many processes.

    Raises:
        ValueError: the batch cannot be shared out evenly.
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
    tokenizer: Any,
    ends: list[int],
    device: Any,
) -> Plan:
    """The plan; one batch of typical rows goes forward and backward through a trainer's model, and leaves no trace.

    Args:
        settings: what is asked for.
        data: the rows.
        trainee: the model.
        shape: steps and batches.
        tokenizer: the base's, with a padding token.
        ends: ids of the tokens that end an answer.
        device: where it trains.
    """
    trainable = sum(parameter.numel() for parameter in trainable_parameters(trainee.model).values())
    frozen = [parameter for parameter in trainee.model.parameters() if not parameter.requires_grad]
    base_bytes = sum(parameter.numel() * parameter.element_size() for parameter in frozen)
    lengths = sorted(data.train.lengths, reverse=True)
    seconds, kept, tokens = _probe(trainee.model, data, shape.micro_batch, tokenizer.pad_token_id, device)
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
        ends=tuple(tokenizer.convert_ids_to_tokens(ends)),
    )


def _probe(model: Any, data: TrainingData, rows: int, pad: int, device: Any) -> tuple[float, int, int]:
    """(seconds, bytes kept for the backward pass, tokens) of a micro-batch of rows around the median length."""
    import torch

    by_length = sorted(range(len(data.train)), key=data.train.lengths.__getitem__)
    middle = len(by_length) // 2
    chosen = [data.train[index] for index in by_length[max(0, middle - rows // 2) :][:rows]]
    width = max(len(example.input_ids) for example in chosen)
    ids = torch.full((len(chosen), width), pad, device=device)
    labels = torch.full((len(chosen), width), -100, device=device)
    mask = torch.zeros((len(chosen), width), dtype=torch.long, device=device)
    for row, example in enumerate(chosen):
        length = len(example.input_ids)
        ids[row, :length] = torch.tensor(example.input_ids)
        labels[row, :length] = torch.tensor(example.labels)
        mask[row, :length] = 1
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    training = model.training
    model.to(device).train()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for _ in range(2 if device.type == "cuda" else 1):  # the first one on a GPU also loads its kernels
            started = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                outputs = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True)
            outputs.loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
    for parameter in model.parameters():
        parameter.grad = None
    model.train(training)
    return seconds, sum(kept.values()), ids.numel()
