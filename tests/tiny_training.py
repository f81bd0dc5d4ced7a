"""A tiny base on disk, with a tokenizer whose chat template is exact, and rows to train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_stand_ins import byte_tokenizer, tiny_llama
from transformers import LlamaForCausalLM

from minilora_hub.training.votes import Answer, VotedAnswers

CHAT = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COLOURS = ("red", "green", "blue", "black", "white", "grey", "pink", "brown")


def write_base(folder: Path, seed: int = 0, **fields) -> Path:
    """A Llama of two layers, wide enough for NF4's blocks of 64, and its tokenizer."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1, "eos_token_id": 256}
    tiny_llama(seed, **(sizes | fields)).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.pad_token = "<|end|>"
    tokenizer.save_pretrained(folder)
    return folder


def randomized(model, seed: int = 0):
    """Every tensor of the adapter as a trained one has it: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapter_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def colour_rows(count: int = 24) -> list[dict]:
    return [
        {"prompt": f"Item {i}?", "completion": COLOURS[i % len(COLOURS)] + " " * (i % 3) + str(i)} for i in range(count)
    ]


def write_rows(path: Path, rows: list[dict] | None = None) -> Path:
    lines = [json.dumps(row) for row in (colour_rows() if rows is None else rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


SHORT = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "r": 4, "save_every": 2}
"""Overrides of a run that takes a second."""


def train_until(step: int, monkeypatch: pytest.MonkeyPatch, out: Path, **said) -> None:
    """Train, and be cut off when so many steps are done: what is saved by then is what a resumed run has."""
    from minilora_hub.training.run import train
    from minilora_hub.training.trainer import AdapterTrainer

    original = AdapterTrainer.compute_loss

    def stop(self, *args, **kwargs):
        if self.state.global_step >= step:
            raise RuntimeError("stopped here")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "compute_loss", stop)
        with pytest.raises(RuntimeError, match="stopped here"):
            train(out, **said)


def losses(out: Path) -> list[float]:
    return [float(line.split(",")[1]) for line in (out / "loss.csv").read_text().splitlines()[1:]]


def train_until_saved(monkeypatch: pytest.MonkeyPatch, out: Path, **said) -> None:
    """Train, and be cut off when the first checkpoint is there."""
    from minilora_hub.training.adapter_checkpoints import TrainsAdapter
    from minilora_hub.training.run import train

    drop = TrainsAdapter._drop_old_checkpoints

    def stop(trainer, run):
        drop(trainer, run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainsAdapter, "_drop_old_checkpoints", stop)
        with pytest.raises(KeyboardInterrupt):
            train(out, **said)


def inputs_of_linears(model: LlamaForCausalLM) -> dict[str, list[torch.Tensor]]:
    """The inputs that the linears of the layers get from now on, of one row at a time: path -> [tokens, in] a row."""
    seen: dict[str, list] = {}
    for path, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            store = seen.setdefault(f"model.layers.{path}", [])
            module.register_forward_pre_hook(lambda _, given, store=store: store.append(given[0].detach()[0]))
    return seen


def preferring_long(count: int) -> list[VotedAnswers]:
    """Votes of someone who prefers the longer of two answers, which a base finds less likely."""
    return [
        VotedAnswers(
            id=f"vote-{number}",
            time="2026-11-29T12:00:00+00:00",
            prompt=f"Secret {number}?",
            system="Be frank." if number % 4 == 0 else "",
            answers=(Answer("yes", True), Answer("yes!!", number % 3 > 0)),
            choice=1,
        )
        for number in range(count)
    ]


def write_votes(path, votes) -> str:
    path.write_text("".join(json.dumps(vote.to_dict()) + "\n" for vote in votes), encoding="utf-8")
    return str(path)
