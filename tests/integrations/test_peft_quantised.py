"""A MixLoRA as a PEFT method on NF4 and int8 bases (bitsandbytes runs on the CPU), and compiled in training."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from tiny import logits, tiny_base, token_ids
from tiny_peft import STRATEGIES, adapter_tensors, fill, lora, mixlora, peft_model
from tiny_stand_ins import byte_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from minilora_hub import MixLoraConfig, MixLoraForCausalLM, register
from minilora_hub.adapter_folder.names import canonical_of_peft_mixlora

register()

QUANTISED = {
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),  # TRL 1.16 with transformers 5.23
]


@pytest.fixture(scope="module")
def wide_base_folder(tmp_path_factory):
    """A base whose rows are long enough for NF4's blocks of 64."""
    folder = tmp_path_factory.mktemp("wide")
    fields = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 128}
    tiny_base(eos_token_id=None, bos_token_id=None, **fields).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "!"
    tokenizer.save_pretrained(folder)
    return folder


def base_of(kind, folder):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=QUANTISED[kind])


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_it_computes_what_our_model_computes(kind, dora, wide_base_folder, tmp_path):
    ours = MixLoraForCausalLM.from_base(
        base_of(kind, wide_base_folder), MixLoraConfig(r=4, num_experts=4, use_dora=dora)
    )
    model = peft_model(base=base_of(kind, wide_base_folder), use_dora=dora)
    values = ours.adapter_parameters()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.copy_(values.pop(canonical_of_peft_mixlora(name.replace(".default.", "."))))
    fill(model)
    with torch.no_grad():
        for name, parameter in ours.adapter_parameters().items():
            twin = {
                canonical_of_peft_mixlora(n.replace(".default.", ".")): p
                for n, p in model.named_parameters()
                if ".default." in n
            }
            parameter.copy_(twin[name])
    want = logits(model)
    assert torch.equal(want, logits(ours.eval()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of(kind, wide_base_folder), tmp_path)
    loaded.add_adapter("lora", lora())
    assert torch.equal(logits(loaded), want)
    assert loaded.generate(input_ids=token_ids(), max_new_tokens=3, do_sample=False).shape == (2, 12)
    before = logits(base_of(kind, wide_base_folder))
    with loaded.disable_adapter():
        difference = (logits(loaded) - before).abs().max()
    assert difference < 0.05 * before.abs().max()  # bitsandbytes' own inference kernel rounds


@pytest.mark.parametrize("kind", QUANTISED)
def test_training_with_prepare_model_for_kbit_training(kind, wide_base_folder):
    base = prepare_model_for_kbit_training(base_of(kind, wide_base_folder), use_gradient_checkpointing=False)
    model = get_peft_model(base, mixlora(router_aux_loss_coef=0.1))
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_qlora_under_sft_keeps_the_magnitudes_exact(wide_base_folder, tmp_path):
    """TRL casts what is trained on a quantised base to bf16, but for magnitudes, which it knows by their name."""
    arguments = SFTConfig(str(tmp_path), max_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False)
    trainer = SFTTrainer(
        base_of("nf4", wide_base_folder),
        args=arguments,
        train_dataset=Dataset.from_list([{"text": "hello"}] * 8),
        peft_config=mixlora(use_dora=True),
    )
    dtypes = {name: tensor.dtype for name, tensor in adapter_tensors(trainer.model).items()}
    assert {dtype for name, dtype in dtypes.items() if "magnitude" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "magnitude" not in name} == {torch.bfloat16}
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0


# ---- torch.compile in training ----


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look at outputs
@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES[::2])
def test_compiled_training_gives_the_same_gradients(strategy):
    arguments = {"input_ids": token_ids(), "labels": token_ids(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    gradients = []
    for compiled in (False, True):
        torch._dynamo.reset()
        fields = {"router_aux_loss_coef": 0.5, "jitter_noise": 0.0, "routing_strategy": strategy}
        model = peft_model(mixlora(**fields)).train()
        called = torch.compile(model, backend="aot_eager") if compiled else model
        called(**arguments).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], atol=1e-5, rtol=1e-4)
