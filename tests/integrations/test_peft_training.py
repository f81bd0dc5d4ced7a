"""The router losses reach training: in the loss that is logged, and in its gradient, whoever computes the loss."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from sweeps import sweep
from tiny import fill_adapter, tiny_base, token_ids
from tiny_peft import STRATEGIES, fill, lora, mixlora, peft_model
from tiny_stand_ins import byte_tokenizer
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from minilora_hub import MixLoraForCausalLM, register
from minilora_hub.remote_code.mixture import MixtureOfLoraExperts
from minilora_hub.remote_code.routing_record import record_routing

register()

# TRL 1.16 sets a field that transformers 5.23 calls otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

COEFFICIENT = 0.5
MASK = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
LABELS = token_ids().masked_fill(MASK == 0, -100)


def training_model(strategy="mixlora", **fields):
    """Deterministic in training: no jitter. The weights are random, so that nothing is zero by chance."""
    fields = {"router_aux_loss_coef": COEFFICIENT, "jitter_noise": 0.0, "routing_strategy": strategy} | fields
    if strategy == "mixlora-switch":
        fields = {"expert_capacity": 2, "router_z_loss_coef": 0.25} | fields
    return peft_model(mixlora(**fields)).train()


def written_out(logits, mask, strategy):
    """The balance and z-loss of one batch, one token and one expert at a time: E * sum_i f_i P_i, and logsumexp^2."""
    experts, tokens = logits[0].shape[-1], 0
    share, probability, z_loss = torch.zeros(experts), [torch.zeros(())] * experts, torch.zeros(())
    for layer in logits:
        for row, keep in zip(layer.flatten(0, 1), mask.flatten(), strict=True):
            if not keep:
                continue
            tokens += 1
            p = row.exp() / row.exp().sum()
            order = p.argsort(descending=True)
            if strategy == "mixlora":
                chosen = order[:2]
            elif strategy == "mixlora-switch":
                chosen = order[:1]
            else:
                before = torch.cat([torch.zeros(1), p[order].cumsum(0)[:-1]])
                chosen = order[before <= 0.8]
            for expert in chosen:
                share[expert] += 1
            probability = [total + p[expert] for expert, total in enumerate(probability)]
            z_loss = z_loss + row.exp().sum().log() ** 2
    balance = experts * sum(share[i] / tokens * probability[i] / tokens for i in range(experts))
    return balance, z_loss / tokens


def causal_lm(model):
    """Transformers' own model, with the adapter's modules in it and nothing of ours around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model.base


def expected_loss(model, ids, mask, labels, strategy, items=None):
    """Cross-entropy and penalty, written out; differentiable."""
    with record_routing(mask) as record:
        logits = causal_lm(model)(input_ids=ids, attention_mask=mask).logits
    targets = labels[:, 1:]
    entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    count = (targets != -100).sum()
    balance, z_loss = written_out(record.logits, mask, strategy)
    penalty = COEFFICIENT * balance + (0.25 * z_loss if strategy == "mixlora-switch" else 0)
    share = 1 if items is None else count / items
    return entropy / (items or count) + penalty * share, entropy / (items or count)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loss_and_gradient_are_those_of_the_written_out_sum(strategy, items):
    model = training_model(strategy)
    arguments = {"attention_mask": MASK, "labels": LABELS} | ({"num_items_in_batch": items} if items else {})
    loss = model(input_ids=token_ids(), **arguments).loss
    expected, entropy = expected_loss(model, token_ids(), MASK, LABELS, strategy, items)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert (loss - entropy).abs() > 0.05
    got, wanted = gradients(model, loss), gradients(model, expected)
    assert got.keys() == wanted.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-5, rtol=1e-4, msg=name)


def test_no_penalty_outside_training():
    model = training_model()
    with_labels = {"input_ids": token_ids(), "labels": LABELS, "attention_mask": MASK}
    _, entropy = expected_loss(model.eval(), token_ids(), MASK, LABELS, "mixlora")
    torch.testing.assert_close(model(**with_labels).loss, entropy)
    model.train()
    with model.disable_adapter():
        torch.testing.assert_close(model(**with_labels).loss, tiny_base()(**with_labels).loss)
    model.add_adapter("lora", lora())
    model.set_adapter("lora")
    assert model(**with_labels).loss.requires_grad
    torch.testing.assert_close(model(**with_labels).loss, tiny_base()(**with_labels).loss)  # a fresh LoRA
    off = training_model(router_loss=False)
    torch.testing.assert_close(
        off(**with_labels).loss, expected_loss(off, token_ids(), MASK, LABELS, "mixlora")[1], atol=1e-6, rtol=1e-6
    )


def test_routing_is_put_out_where_it_is_asked_for():
    model = training_model().eval()
    outputs = model(input_ids=token_ids(), attention_mask=MASK, output_router_logits=True)
    assert [tuple(layer.shape) for layer in outputs.router_logits] == [(2, 9, 4)] * 2
    torch.testing.assert_close(outputs.aux_loss, written_out(outputs.router_logits, MASK, "mixlora")[0])
    assert "router_logits" not in model(input_ids=token_ids())


def checkpointing(model):
    """Its name from transformers 5.20 on, or the one before."""
    base = model.get_base_model()
    return getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_checkpointing_changes_nothing(strategy):
    arguments = {"input_ids": token_ids(), "attention_mask": MASK, "labels": LABELS}
    plain = training_model(strategy)
    wanted = gradients(plain, plain(**arguments).loss)
    model = training_model(strategy)
    checkpointing(model)({"use_reentrant": False})
    got = gradients(model, model(**arguments).loss)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_reentrant_checkpointing_is_refused():
    model = training_model()
    model.enable_input_require_grads()
    checkpointing(model)({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"pass gradient_checkpointing_kwargs=\{.use_reentrant.: False\}"):
        model(input_ids=token_ids(), labels=LABELS)


def test_a_failed_call_leaves_nothing_behind():
    model = training_model()
    with pytest.raises((TypeError, AttributeError)):
        model(input_ids=token_ids(), labels=LABELS, position_ids="none")
    expected, _ = expected_loss(model, token_ids(), MASK, LABELS, "mixlora")
    loss = model(input_ids=token_ids(), attention_mask=MASK, labels=LABELS).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


# ---- Trainer and TRL, a script without a word about mixtures ----

TEXTS = ["hello, world", "a much longer line of text than the others", "x", "short", "middle sized text", "the end"]


def settings(kind, folder, **fields):
    return kind(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **({"learning_rate": 0.0} | fields),
    )


def tokenizer():
    made = byte_tokenizer()
    made.pad_token = "!"
    return made


class Batches:
    """Keeps what a trainer feeds to its model."""

    def __init__(self, model):
        self.seen = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        if module.training and torch.is_grad_enabled():
            self.seen.append({name: kwargs[name].clone() for name in ("input_ids", "attention_mask", "labels")})


def expected_of(trainer, seen, strategy, steps, equal_weights):
    """The loss that should have been logged, per optimizer step."""
    model, found = trainer.model, []
    for start in range(0, len(seen), steps):
        micro = seen[start : start + steps]
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro)
        total = 0.0
        for batch in micro:
            ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
            whole, entropy = expected_loss(model, ids, mask, labels, strategy, items)
            if equal_weights:
                alone, alone_entropy = expected_loss(model, ids, mask, labels, strategy)
                whole = entropy + (alone - alone_entropy) / len(micro)
            total += whole.item()
        found.append(total)
    return found


def logged(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("steps", sweep([1, 2], 2))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trainer(strategy, steps, tmp_path):
    model = training_model(strategy)
    batches = Batches(model)
    ids = [[3 + ord(c) % 100 for c in text] for text in TEXTS]

    def collate(rows):
        width = max(len(row["ids"]) for row in rows)
        pad = [width - len(row["ids"]) for row in rows]
        ids = torch.tensor([row["ids"] + [0] * extra for row, extra in zip(rows, pad, strict=True)])
        mask = torch.tensor([[1] * len(row["ids"]) + [0] * extra for row, extra in zip(rows, pad, strict=True)])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    arguments = settings(TrainingArguments, tmp_path, gradient_accumulation_steps=steps, remove_unused_columns=False)
    trainer = Trainer(model, arguments, collate, train_dataset=[{"ids": row} for row in ids] * 2)
    trainer.train()
    expected = expected_of(trainer, batches.seen, strategy, steps, equal_weights=False)
    torch.testing.assert_close(logged(trainer), expected, atol=1e-4, rtol=1e-4)


def sft(tmp_path, config, **fields):
    torch.manual_seed(0)
    base = tiny_base(vocab_size=259, eos_token_id=None, bos_token_id=None)
    arguments = settings(SFTConfig, tmp_path, bf16=False, **fields)
    trainer = SFTTrainer(
        base,
        args=arguments,
        train_dataset=Dataset.from_list([{"text": text} for text in TEXTS * 2]),
        peft_config=config,
        processing_class=tokenizer(),
    )
    fill(trainer.model)
    return trainer


def sft_config(strategy="mixlora"):
    more = {"expert_capacity": 2, "router_z_loss_coef": 0.25} if strategy == "mixlora-switch" else {}
    return mixlora(router_aux_loss_coef=COEFFICIENT, jitter_noise=0.0, routing_strategy=strategy, **more)


@pytest.mark.parametrize("steps", sweep([1, 2], 2))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sft_trainer(strategy, steps, tmp_path):
    trainer = sft(tmp_path, sft_config(strategy), gradient_accumulation_steps=steps)
    batches = Batches(trainer.model)
    trainer.train()
    # TRL weighs the micro-batches of a step alike, as it does for transformers' own mixtures.
    expected = expected_of(trainer, batches.seen, strategy, steps, equal_weights=True)
    torch.testing.assert_close(logged(trainer), expected, atol=1e-4, rtol=1e-4)
    assert all(entry["aux_loss"] > 0 for entry in trainer.state.log_history if "aux_loss" in entry)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sft_trainer_on_our_own_model(strategy, tmp_path):
    """Given to SFTTrainer as it is, without PEFT: its forward is replaced there, too."""
    base = tiny_base(vocab_size=259, eos_token_id=None, bos_token_id=None)
    model = MixLoraForCausalLM.from_base(base, sft_config(strategy).model_config())
    fill_adapter(model)
    model.save_pretrained(tmp_path / "before", tokenizer=tokenizer())
    trainer = SFTTrainer(
        model,
        args=settings(SFTConfig, tmp_path, bf16=False, gradient_accumulation_steps=2),
        train_dataset=Dataset.from_list([{"text": text} for text in TEXTS * 2]),
        processing_class=tokenizer(),
    )
    batches = Batches(trainer.model)
    trainer.train()
    expected = expected_of(trainer, batches.seen, strategy, 2, equal_weights=True)
    torch.testing.assert_close(logged(trainer), expected, atol=1e-4, rtol=1e-4)
    assert all(entry["aux_loss"] > 0 for entry in trainer.state.log_history if "aux_loss" in entry)
    trainer.model.save_pretrained(tmp_path / "after", tokenizer=tokenizer())
    fields = json.loads((tmp_path / "after" / "config.json").read_text())["text_config"]
    assert not {"output_router_logits", "router_aux_loss_coef"} & fields.keys()
    trainer.model.save_base(tmp_path / "base")
    fields = json.loads((tmp_path / "base" / "config.json").read_text())
    assert not {"output_router_logits", "router_aux_loss_coef"} & fields.keys()
    assert trainer.model.base.config.router_aux_loss_coef == COEFFICIENT
    assert not hasattr(trainer.model.unload().config, "output_router_logits")


def test_sft_trains_the_routers(tmp_path):
    """A fresh MixLoRA under a heavy balance loss: the routers move, and the load gets more even."""
    config = mixlora(router_aux_loss_coef=20.0, router_init_range=2.0)
    trainer = sft(tmp_path, config, learning_rate=5e-2)
    trainer.args.max_steps = 12
    router = trainer.model.base_model.model.model.layers[0].mlp.current.router
    before = router.detach().clone()
    trainer.train()
    aux = [entry["aux_loss"] for entry in trainer.state.log_history if "aux_loss" in entry]
    assert not torch.equal(router, before)
    assert sum(aux[-3:]) < sum(aux[:3])
    assert min(aux) >= 1.9  # 2 experts a token: 2 when even


def test_trls_own_setting_counts(tmp_path):
    gentle, off = (sft(tmp_path, sft_config(), router_aux_loss_coef=value) for value in (0.25, 0.0))
    default = sft(tmp_path, sft_config())
    for trainer in (gentle, off, default):
        trainer.train()
    losses = [logged(trainer)[0] for trainer in (default, gentle, off)]
    aux = next(entry["aux_loss"] for entry in default.state.log_history if "aux_loss" in entry)
    torch.testing.assert_close(losses[0] - losses[2], 0.5 * aux, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(losses[1] - losses[2], 0.25 * aux, atol=1e-3, rtol=1e-3)


def test_dpo_trainer(tmp_path):
    rows = [{"prompt": "say ", "chosen": text, "rejected": text[::-1] + "!"} for text in TEXTS]
    base = tiny_base(vocab_size=259, eos_token_id=None, bos_token_id=None)
    arguments = settings(DPOConfig, tmp_path, bf16=False)
    trainer = DPOTrainer(
        base,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        peft_config=sft_config(),
        processing_class=tokenizer(),
    )
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    # A fresh adapter equals its reference, so the preference loss is log 2.
    torch.testing.assert_close(entry["loss"], 0.6931 + COEFFICIENT * entry["aux_loss"], atol=1e-3, rtol=1e-3)


def test_the_bases_configuration_is_left_clean():
    base = tiny_base()
    before = base.config.to_dict()
    model = get_peft_model(base, mixlora())
    assert base.config.router_aux_loss_coef == 0.001
    model.add_adapter("lora", lora())
    model.set_adapter("lora")
    assert not hasattr(base.config, "router_aux_loss_coef")
    model.set_adapter("default")
    assert any(isinstance(module, MixtureOfLoraExperts) for module in model.modules())
    model.unload()
    assert base.config.to_dict() == before
