"""What training costs against PEFT's LoRA: time of a whole optimizer step, and memory, on the same rows.

    python tests/bench/bench_training.py [--rounds 7] [--json FILE] [--variants DoRA MixLoRA]

Every variant goes through the trainer of `minilora train` on the embedded base, with the rows of the shipped adapters,
eight a step. A round takes one step of each, in turn; the table shows the median over the rounds of the ratio to PEFT's
LoRA in the same round, and its quartiles. Memory is what a forward pass keeps for the backward pass, counted tensor by
tensor, and the adapter with its gradients and AdamW's state; the base is the same for all.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from minilora_hub.bases import resolve_base
from minilora_hub.evaluation.tasks.registry import MIX, write
from minilora_hub.quiet import quiet_libraries
from minilora_hub.training.loop import build_trainer, known_warnings_ignored
from minilora_hub.training.models import build_trainee, trainable_parameters
from minilora_hub.training.row_kinds import kind_of
from minilora_hub.training.settings import make_settings

PEFT = {"method": "peft", "peft_type": "LORA", "lora_alpha": 32, "target_modules": "all-linear"}
REFERENCE = "PEFT LoRA"
VARIANTS = {
    REFERENCE: PEFT,
    "LoRA": {"method": "lora"},
    "DoRA": {"method": "dora"},
    "MixLoRA": {"method": "mixlora"},
    "PEFT DoRA": PEFT | {"use_dora": True},
}
WRAPPERS = re.compile(r"(^|\.)(base_model|model_base|base_layer|base_block|base)(?=\.)")


def build(names: list[str], rows: Path, scratch: Path) -> dict:
    """A trainer for each variant, all over one set of base weights."""
    trainers, weights = {}, {}
    for name in names:
        settings = make_settings({"base": "embedded", "data": str(rows), "r": 16}, VARIANTS[name])
        resolved = resolve_base(settings.base, revision=settings.base_revision)
        kind = kind_of(settings, resolved)
        data = kind.prepare(scratch / name, datetime(2026, 1, 1))
        trainee, _ = build_trainee(settings, resolved)
        for path, parameter in trainee.model.named_parameters():
            if not parameter.requires_grad:
                plain = re.sub(r"^(model\.)+", "", WRAPPERS.sub("", path).lstrip("."))
                parameter.data = weights.setdefault(plain, parameter.data)
        trainers[name], _ = build_trainer(settings, trainee, data, kind, scratch / name, processes=1)
        trainers[name].create_optimizer()
        trainers[name].current_gradient_accumulation_steps = 1  # which `train` would set
    return trainers


def step(trainer, batch) -> tuple[float, int]:
    """(seconds, bytes kept for the backward pass) of one optimizer step."""
    model, kept = trainer.model.train(), {}
    frozen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    items = (batch["labels"][:, 1:] != -100).sum()
    started = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable_parameters(model).values(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return time.perf_counter() - started, sum(kept.values())


def measure(trainers: dict, rounds: int) -> dict[str, dict[str, float]]:
    seconds = {name: [] for name in trainers}
    memory = dict.fromkeys(trainers, 0)
    batches = list(next(iter(trainers.values())).get_train_dataloader())
    for index in range(rounds + 1):
        for name, trainer in trainers.items():
            took, kept = step(trainer, batches[index % len(batches)])
            memory[name] = max(memory[name], kept)
            if index:  # the first round warms up
                seconds[name].append(took)
    table = {}
    for name, taken in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(taken, seconds[REFERENCE], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        learned = sum(p.numel() for p in trainable_parameters(trainers[name].model).values())
        table[name] = {
            "step_ms": 1000 * statistics.median(taken),
            "ratio": middle,
            "low": low,
            "high": high,
            "activations_mb": memory[name] / 1e6,
            "learning_mb": learned * 16 / 1e6,
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, help="besides PEFT's LoRA; default: all")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    names = [name for name in VARIANTS if name == REFERENCE or name in (arguments.variants or VARIANTS)]
    with tempfile.TemporaryDirectory() as scratch, quiet_libraries(), known_warnings_ignored():
        write(Path(scratch), (), ("train",), 16)
        table = measure(build(names, Path(scratch, f"{MIX}.train.jsonl"), Path(scratch)), arguments.rounds)
    print(f"{'':10} {'step':>8} {'ratio':>6} {'quartiles':>13} {'activations':>12} {'adapter, AdamW':>15}")
    for name, row in table.items():
        print(
            f"{name:10} {row['step_ms']:5.0f} ms {row['ratio']:6.2f} {row['low']:6.2f}-{row['high']:.2f} "
            f"{row['activations_mb']:9.0f} MB {row['learning_mb']:12.0f} MB"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
