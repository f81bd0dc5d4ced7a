"""What is trained, against independent loops: PEFT's modules under plain torch, and losses added up by hand."""

from __future__ import annotations

import csv
from datetime import datetime
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from tiny_training import SHORT
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from minilora_hub.adapter_folder.names import to_peft
from minilora_hub.bases import resolve_base
from minilora_hub.errors import TrainingError
from minilora_hub.training.loop import build_trainer, known_warnings_ignored
from minilora_hub.training.models import build_trainee
from minilora_hub.training.row_kinds import kind_of
from minilora_hub.training.run import train
from minilora_hub.training.settings import make_settings

PLAIN = {"schedule": "constant", "warmup": 0.0, "learning_rate": 3e-3, "max_grad_norm": 1.0}


def parts(out: Path, **said):
    """The model and the batches of a run, as the run itself builds them."""
    settings = make_settings(said)
    resolved = resolve_base(settings.base, revision=settings.base_revision)
    kind = kind_of(settings, resolved)
    data = kind.prepare(out, datetime(2026, 1, 1))
    trainee, _ = build_trainee(settings, resolved)
    trainer, shape = build_trainer(settings, trainee, data, kind, out, processes=1)
    return trainer, shape


def batches(trainer, count: int) -> list[dict]:
    loader, found, epoch = trainer.get_train_dataloader(), [], 0
    while len(found) < count:
        loader.set_epoch(epoch)
        found += list(loader)
        epoch += 1
    return found[:count]


def curve(out: Path) -> list[float]:
    with (out / "loss.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_50_steps_follow_pefts_loss_curve(method, base, rows, tmp_path):
    said = SHORT | PLAIN | {"method": method, "base": base, "data": rows, "max_steps": 50}
    train(tmp_path / "ours", **said)
    ours = curve(tmp_path / "ours")

    trainer, _ = parts(tmp_path / "again", **said)
    config = LoraConfig(r=4, lora_alpha=8, use_dora=method == "dora", target_modules="all-linear")
    reference = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    initial = {to_peft(name, "model.layers"): value for name, value in trainer.model.adapter_parameters().items()}
    loaded = set_peft_model_state_dict(
        reference, {name.replace("vector.weight", "vector"): value.detach() for name, value in initial.items()}
    )
    assert not loaded.unexpected_keys
    learned = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=3e-3, weight_decay=0.0)
    theirs = []
    for batch in batches(trainer, 50):
        loss = reference(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    assert theirs[-1] < theirs[0] - 1.5  # it learns, so that the curves could part
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-3)


@pytest.mark.parametrize("micro_batch_size", [4, 2])
def test_the_logged_loss_of_a_mixture_holds_its_balance_loss(micro_batch_size, base, rows, tmp_path):
    """Over an accumulated batch it is the mean of the micro-batches'."""
    said = SHORT | {"method": "mixlora", "base": base, "data": rows, "max_steps": 1, "num_experts": 4}
    said |= {"router_aux_loss_coef": 0.5, "micro_batch_size": micro_batch_size}
    train(tmp_path / "run", **said)
    trainer, _ = parts(tmp_path / "again", **said)
    model = trainer.model.eval()
    chosen = batches(trainer, 4 // micro_batch_size)
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in chosen)
    language, balance = 0.0, 0.0
    for batch in chosen:
        with torch.no_grad():
            outputs = model(batch["input_ids"], batch["attention_mask"], output_router_logits=True)
        labels = batch["labels"][:, 1:]
        losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels, reduction="sum", ignore_index=-100)
        language += losses.item() / items
        balance += 0.5 * outputs.aux_loss.item() / len(chosen)
    assert balance > 0.9  # 0.5 times at least the number of active experts: far from rounding
    assert curve(tmp_path / "run")[0] == pytest.approx(language + balance, abs=1e-4)


def test_adaloras_orthogonality_is_in_the_loss(base, rows, tmp_path):
    said = SHORT | {"method": "adalora", "base": base, "data": rows, "max_steps": 9, "r": None, "init_r": 6}
    said |= {"target_r": 3}
    losses = []
    for weight in (0.0, 0.5):
        train(tmp_path / str(weight), **said, orth_reg_weight=weight)
        losses.append(curve(tmp_path / str(weight))[0])
    with known_warnings_ignored():
        trainer, _ = parts(tmp_path / "again", **said)
    named = [(name, p) for name, p in trainer.model.named_parameters() if "lora_A" in name or "lora_B" in name]
    grams = [p @ p.T if "lora_A" in name else p.T @ p for name, p in named]
    expected = torch.stack([(gram - torch.eye(len(gram))).norm() for gram in grams]).mean().item()
    assert losses[1] - losses[0] == pytest.approx(0.5 * expected, abs=1e-4)


def test_packed_rows_learn_what_they_learn_alone(base, rows, tmp_path):
    """One step over all rows, packed and padded: the same loss and, up to rounding, the same gradients."""
    said = {"method": "dora", "base": base, "data": rows, "r": 4, "max_steps": 1, "warmup": 0.0}
    gradients, losses = [], []
    for batching, size in (("shuffled", 24), ("packed", None)):
        extra = {"batching": batching, "batch_size": size or 1, "max_length": 512 if size is None else None}
        trainer, _ = parts(tmp_path / batching, **said, **extra)
        (batch,) = batches(trainer, 1)
        count = (batch["labels"][:, 1:] != -100).sum()
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in trainer.model.adapter_parameters().items()})
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6)


def test_loraplus_lets_b_learn_faster(base, rows, tmp_path):
    said = SHORT | {"method": "dora", "base": base, "data": rows, "max_steps": 1, "warmup": 0.0}
    trainer, _ = parts(tmp_path / "run", **said, loraplus_ratio=16.0)
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(trainer.model.adapter_parameters())
    assert {rate for name, rate in rates.items() if name.endswith("lora_B")} == {16e-2}
    assert {rate for name, rate in rates.items() if name.endswith("lora_A")} == {1e-2}


@pytest.mark.parametrize("loraplus", [None, 16.0])
def test_routers_learn_at_their_own_rate(loraplus, base, rows, tmp_path):
    """Every tensor has one rate, and a step of the schedule keeps the ratio."""
    said = SHORT | {"method": "mixlora", "base": base, "data": rows, "max_steps": 4, "warmup": 0.5}
    trainer, _ = parts(tmp_path / "run", **said, router_lr_ratio=0.25, loraplus_ratio=loraplus)
    trainer.create_optimizer_and_scheduler(4)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()  # the first of two steps of warm-up: half the rates
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = [(names[id(p)], group["lr"]) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(name for name, _ in rates) == sorted(
        name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad
    )
    found = {name.rpartition(".")[2]: rate for name, rate in rates}
    assert found == {"router": 0.125e-2, "lora_A": 0.5e-2, "lora_B": 0.5e-2 * (loraplus or 1)}


def test_a_rate_for_routers_needs_routers_that_are_trained(base, rows, tmp_path):
    said = SHORT | {"method": "dora", "base": base, "data": rows}
    with pytest.raises(TrainingError, match=r"router_lr_ratio=2.0: needs a mixture"):
        parts(tmp_path / "run", **said, router_lr_ratio=2)
    train(tmp_path / "parent", **said | {"method": "mixlora", "max_steps": 1})
    said |= {"method": "mixlora", "from_adapter": str(tmp_path / "parent"), "learn": "experts"}
    with pytest.raises(TrainingError, match=r"router_lr_ratio=2.0: needs a mixture whose routers learn"):
        parts(tmp_path / "run", **said, router_lr_ratio=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("method", ["dora", "mixlora", "rslora"])
def test_recomputed_activations_change_nothing(method, base, rows, tmp_path):
    said = SHORT | {"method": method, "base": base, "data": rows}
    train(tmp_path / "kept", **said)
    train(tmp_path / "recomputed", **said, gradient_checkpointing=True)
    assert curve(tmp_path / "recomputed") == pytest.approx(curve(tmp_path / "kept"), abs=1e-5)


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "mixlora"])
def test_a_bfloat16_base_learns_with_adapters_in_float32(method, base, rows, tmp_path):
    said = SHORT | {"method": method, "base": base, "data": rows, "max_steps": 8}
    train(tmp_path / "half", **said, dtype="bfloat16")
    train(tmp_path / "exact", **said)
    assert curve(tmp_path / "half") == pytest.approx(curve(tmp_path / "exact"), rel=3e-2)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("method", ["lora", "mixlora"])
def test_the_head_scores_labels_only_and_the_loss_is_that_of_all_positions(method, base, rows, tmp_path):
    from trl.trainer import utils

    trainer, _ = parts(tmp_path, **SHORT, method=method, base=base, data=rows)
    (batch,) = batches(trainer, 1)
    scored = []
    chunked = utils._ChunkedLogProbFunction

    class Counted(chunked):
        @staticmethod
        def forward(ctx, hidden, *others):
            scored.append(hidden.shape[0])
            return chunked.forward(ctx, hidden, *others)

    before = utils._use_triton
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_ChunkedLogProbFunction", Counted)
        loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    assert scored == [int((batch["labels"][:, 1:] != -100).sum())]
    assert scored[0] < batch["labels"][:, 1:].numel() / 2
    assert utils._use_triton is before

    output = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    wanted = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    if method == "mixlora":
        assert loss.item() > wanted.item()  # the balance loss is in it; the test above holds its size
    else:
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.slow
def test_another_attention_of_the_base_learns_the_same(base, rows, tmp_path):
    said = SHORT | {"method": "lora", "base": base, "data": rows}
    train(tmp_path / "sdpa", **said)
    train(tmp_path / "eager", **said, attention="eager")
    assert curve(tmp_path / "eager") == pytest.approx(curve(tmp_path / "sdpa"), abs=1e-5)


@pytest.mark.parametrize(
    "method", [pytest.param("lora", marks=pytest.mark.slow), pytest.param("dora", marks=pytest.mark.slow), "mixdora"]
)
def test_an_adapter_saved_in_bfloat16_keeps_its_magnitudes_in_float32(method, base, rows, tmp_path):
    from safetensors.torch import load_file

    said = SHORT | {"method": method, "base": base, "data": rows}
    train(tmp_path / "whole", **said)
    train(tmp_path / "half", **said, save_dtype="bfloat16")
    whole, half = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "half"))
    assert whole.keys() == half.keys()
    assert any("magnitude" in name for name in half) == (method != "lora")
    for name, tensor in half.items():
        assert tensor.dtype == (torch.float32 if "magnitude" in name else torch.bfloat16)
        torch.testing.assert_close(tensor.float(), whole[name].to(tensor.dtype).float(), rtol=0, atol=0)
