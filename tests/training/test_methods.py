"""Every method: trains, saves, and computes the same once stock libraries have loaded it again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_training import SHORT
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from minilora_hub import DoraForCausalLM, MixLoraForCausalLM
from minilora_hub.adapter_folder.results import Results
from minilora_hub.bases import resolve_base
from minilora_hub.errors import TrainingError
from minilora_hub.remote_code.linear_layers import keep_4bit_weights_exact
from minilora_hub.training import run as run_module
from minilora_hub.training.passthrough import build_peft_model
from minilora_hub.training.run import train
from minilora_hub.training.settings import make_settings

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights"),
]
PRESETS = {
    "rslora": {},
    "pissa": {},
    "loftq": {"r": 8},  # alpha stays 16: its start must hold at any scaling
    "adalora": {"r": None, "init_r": 6, "target_r": 3, "max_steps": 9},
    "fourierft": {"r": None, "n_frequency": 50},
    "vera": {"r": 8},
    "peft": {
        "r": None,
        "peft_type": "ia3",
        "target_modules": ["k_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
}
IDS = torch.tensor([[257, 40, 83, 68, 76, 256, 258, 81, 68]])


def quantization(kind: str) -> dict:
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else BitsAndBytesConfig(**nf4)
    if kind == "nf4":
        config.bnb_4bit_use_double_quant = True
    return {"quantization_config": config}


def plain(base: str, kind: str | None = None):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **(quantization(kind) if kind else {}))
    keep_4bit_weights_exact(model)
    return model


@pytest.fixture
def trained(monkeypatch):
    """The model of the last run, as it was when the run ended."""
    models = []
    build = run_module._train

    def noticed(trainer, *args):
        seconds = build(trainer, *args)
        models.append(trainer.model)
        return seconds

    monkeypatch.setattr(run_module, "_train", noticed)
    return models


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def results_of(out: Path) -> Results | None:
    return Results.load(out) if (out / "results.json").exists() else None


def test_our_lora_is_what_stock_transformers_loads(base, rows, trained, tmp_path):
    train(tmp_path / "out", method="lora", base=base, data=rows, **SHORT)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # finds PEFT's adapter and its base by itself
    torch.testing.assert_close(logits(loaded), logits(trained[0]), rtol=0, atol=1e-5)
    assert (logits(loaded) - logits(plain(base))).abs().max() > 0.05
    assert results_of(tmp_path / "out").method == "lora"


@pytest.mark.parametrize("method", ["dora", "mixlora", "mixdora"])
def test_our_methods_load_bit_equal(method, base, rows, trained, tmp_path):
    train(tmp_path / "out", method=method, base=base, data=rows, **SHORT)
    classes = {"dora": DoraForCausalLM}
    loaded = classes.get(method, MixLoraForCausalLM).from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(trained[0]))
    assert loaded.config.use_dora == (method != "mixlora")
    assert results_of(tmp_path / "out").method == ("dora" if method == "dora" else "mixlora")


@pytest.mark.parametrize(
    "routing",
    [
        {"routing_strategy": "top_p", "router_top_p": 0.7},
        {"routing_strategy": "switch", "num_experts_per_tok": 1, "router_z_loss_coef": 0.01},
    ],
    ids=["top_p", "switch"],
)
def test_every_field_of_a_configuration_can_be_set(routing, base, rows, trained, tmp_path):
    train(tmp_path / "out", method="mixlora", base=base, data=rows, num_experts=4, **SHORT, **routing)
    loaded = MixLoraForCausalLM.from_pretrained(tmp_path / "out")
    assert {name: getattr(loaded.config, name) for name in routing} == routing
    assert torch.equal(logits(loaded), logits(trained[0]))


@pytest.mark.parametrize("method", PRESETS)
def test_presets_load_in_stock_peft(method, base, rows, trained, tmp_path):
    out = tmp_path / "out"
    train(out, method=method, base=base, data=rows, **SHORT | PRESETS[method])
    kind = "nf4" if method == "loftq" else None
    if kind:  # LoftQ's preset quantises once
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config)
        keep_4bit_weights_exact(start)
    else:
        start = plain(base)
    before = logits(start)
    loaded = PeftModel.from_pretrained(start, out)
    torch.testing.assert_close(logits(loaded), logits(trained[0]), rtol=0, atol=2e-4 if method == "pissa" else 1e-5)
    assert (logits(loaded) - before).abs().max() > 1e-3
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    assert not (out / "README.md").exists()
    results = results_of(out)
    assert (results is not None) == (method in ("rslora", "pissa", "loftq", "adalora"))
    if results:
        assert results.method == "lora"
        assert results.parameters == sum(t.numel() for t in load_file(out / "adapter_model.safetensors").values())
    if method == "loftq":
        assert results.base.note == "trained on this base loaded in NF4 by bitsandbytes: load it in the same way"


def test_pissa_is_saved_as_a_plain_lora_of_twice_the_rank(base, rows, tmp_path):
    train(tmp_path / "out", method="pissa", base=base, data=rows, **SHORT)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 32, True)


def test_loftq_starts_nearer_to_the_base_than_its_rounding(base, rows):
    """On every layer, elementwise: W - (Q + sBA) against W - Q, whose best rank-8 part is left out of it."""
    import bitsandbytes as bnb

    said = {"method": "loftq", "base": base, "data": rows, "r": 8}
    settings = make_settings(said)
    from minilora_hub.training.models import base_arguments

    model = build_peft_model(
        settings, resolve_base(settings.base, revision=settings.base_revision), base_arguments(settings)
    )
    exact, checked = plain(base), 0
    for name, module in model.get_base_model().named_modules():
        if type(module).__name__ != "Linear4bit" or not hasattr(module, "lora_A"):
            continue
        weight = exact.get_submodule(name).weight
        state = module.base_layer.weight
        rounded = bnb.functional.dequantize_4bit(state.data, state.quant_state).float()
        update = module.scaling["default"] * module.lora_B["default"].weight @ module.lora_A["default"].weight
        assert module.scaling["default"] == 2.0
        values = torch.linalg.svdvals(weight - rounded)
        left = torch.linalg.norm(weight - rounded - update)
        torch.testing.assert_close(left, values[8:].square().sum().sqrt(), rtol=1e-3, atol=1e-6)  # Eckart-Young
        checked += 1
    assert checked == 14


def test_adalora_reduces_its_ranks_to_the_target(base, rows, trained, tmp_path):
    train(tmp_path / "out", method="adalora", base=base, data=rows, **SHORT | PRESETS["adalora"])
    kept = list(trained[0].peft_config["default"].rank_pattern.values())
    assert sum(map(sum, kept)) == 3 * 14
    assert sum(map(len, kept)) == 6 * 14
    # The saved LoRA: only the ranks that are left, and elementwise the update of every linear.
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum(len(tensor) for name, tensor in saved.items() if "lora_A" in name) == 3 * 14
    for path, layer in trained[0].get_base_model().named_modules():
        if hasattr(layer, "lora_E"):
            key = f"base_model.model.{path}.lora_"
            a, b = (saved.get(f"{key}{part}.weight", torch.zeros(0)) for part in "AB")
            update = b @ a if len(a) else torch.zeros_like(layer.base_layer.weight)
            torch.testing.assert_close(update, layer.get_delta_weight("default"), rtol=1e-4, atol=1e-7)
    said = SHORT | PRESETS["adalora"] | {"max_steps": 4, "tinit": 3, "tfinal": 3}
    with pytest.raises(TrainingError, match=r"leave none of the 4 steps for reducing ranks"):
        train(tmp_path / "short", method="adalora", base=base, data=rows, **said)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["lora", "dora", "mixlora"])
def test_quantised_bases_train_adapters_in_float32(method, kind, base, rows, trained, tmp_path):
    out = tmp_path / "out"
    result = train(out, method=method, base=base, data=rows, quantize=kind, **SHORT | {"max_steps": 8})
    assert all(p.dtype == torch.float32 for p in trained[0].adapter_parameters().values())
    losses = [float(line.split(",")[1]) for line in (out / "loss.csv").read_text().splitlines()[1:]]
    assert min(losses[4:]) < losses[0]
    assert result.plan.base_bytes < 400_000  # in float32 it is 429 kB
    results = results_of(out)
    double = " with double quantisation" if kind == "nf4" else ""
    assert (
        results.base.note
        == f"trained on this base loaded in {kind.upper()}{double} by bitsandbytes: load it in the same way"
    )
    assert results.base.parameters == sum(p.numel() for p in plain(base).parameters())
    start = plain(base, kind)
    if method == "lora":
        loaded = PeftModel.from_pretrained(start, out)
    else:
        classes = {"dora": DoraForCausalLM, "mixlora": MixLoraForCausalLM}
        loaded = classes[method].from_pretrained(out, base_model=start)
    torch.testing.assert_close(logits(loaded), logits(trained[0]), rtol=0, atol=1e-4)


def dtypes_in(state) -> set[torch.dtype]:
    if isinstance(state, dict):
        return set().union(*map(dtypes_in, state.values()))
    return {state.dtype} if torch.is_tensor(state) else set()


@pytest.mark.slow
def test_an_8bit_optimizer_learns_and_resumes_on_a_cpu(base, rows, tmp_path, monkeypatch):
    """Its states are 8-bit for tensors of 4096 values or more: rank 32 here."""
    said = SHORT | {"method": "dora", "base": base, "data": rows, "optimizer": "adamw_8bit", "r": 32, "max_steps": 6}
    train(tmp_path / "whole", **said)
    losses = [float(line.split(",")[1]) for line in (tmp_path / "whole" / "loss.csv").read_text().splitlines()[1:]]
    assert losses[-1] < losses[0] - 0.5
    state = torch.load(tmp_path / "whole" / "checkpoints" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert torch.uint8 in dtypes_in(state["state"])
    from minilora_hub.training.trainer import AdapterTrainer

    checkpoint = AdapterTrainer._save_checkpoint

    def cut(self, *args):
        checkpoint(self, *args)
        if self.state.global_step == 4:
            raise RuntimeError("stopped here")

    monkeypatch.setattr(AdapterTrainer, "_save_checkpoint", cut)
    with pytest.raises(RuntimeError, match="stopped here"):
        train(tmp_path / "cut", **said)
    monkeypatch.undo()
    train(tmp_path / "cut", resume=True)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"method": "peft"}, "peft_type=None: must be one of"),
        ({"method": "peft", "peft_type": "NOTHING"}, "peft_type='NOTHING': must be one of"),
        ({"method": "vera", "rr": 4}, "rr=4: neither a training setting nor a field of vera"),
        ({"method": "pissa", "quantize": "nf4"}, "PiSSA changes the base's weights"),
        ({"method": "loftq", "quantize": "int8"}, "LoftQ needs an NF4 base"),
    ],
)
def test_settings_that_a_method_cannot_have(said, message, base, rows, tmp_path):
    with pytest.raises(TrainingError, match=message):
        train(tmp_path / "out", base=base, data=rows, **said)
