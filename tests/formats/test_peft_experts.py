"""LoRA on stacked experts between PEFT's `target_parameters` and our modules, and in a bank of adapters."""

import copy
import json
import warnings

import pytest
import torch
from formats.helpers import edit_json
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import fill_adapter, logits, tiny_config, token_ids
from tiny_architectures import tiny_architecture
from transformers import AutoModelForCausalLM

from minilora_hub import DoraForCausalLM
from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.errors import AdapterError
from minilora_hub.formats.combine import Combination, combine
from minilora_hub.formats.dense import export_dense
from minilora_hub.formats.exporting import export_adapter
from minilora_hub.formats.importing import import_adapter, import_as_experts
from minilora_hub.remote_code.probe import TargetsWarning
from minilora_hub.training import lora_model

EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
FAMILIES = ("mixtral", "gpt_oss", "qwen3_moe")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folder of a saved base, by its family."""
    folder = tmp_path_factory.mktemp("bases")

    def saved(family):
        if not (folder / family).is_dir():
            tiny_architecture(family).save_pretrained(folder / family)
        return folder / family

    return saved


def load(base):
    return AutoModelForCausalLM.from_pretrained(base).eval()


def peft_lora(base, folder, **settings):
    """A filled LoRA of PEFT's on attention and experts, saved; the model."""
    settings = {"target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERTS} | settings
    with warnings.catch_warnings():  # PEFT looks for the patterns' keys among modules only, and heeds them all the same
        warnings.filterwarnings("ignore", message=".*keys did not match any targeted module", category=RuntimeWarning)
        model = get_peft_model(load(base), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return model


def in_a_bank(base, folder):
    bank = AdapterBank(load(base))
    bank.load("it", folder)
    with torch.no_grad(), bank.use(["it"]), bank.rows(["it", "it"]):
        return bank.model(token_ids()).logits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": [], "use_rslora": True},
        {"target_parameters": EXPERTS[:1]},
        {"rank_pattern": {"experts.gate_up_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    ],
    ids=["both", "experts alone", "one parameter", "patterns"],
)
def test_pefts_lora_computes_the_same_here(bases, settings, tmp_path):
    theirs = peft_lora(bases("mixtral"), tmp_path / "peft", **settings)
    assert (logits(theirs) - logits(load(bases("mixtral")))).abs().max() > 0.1
    torch.testing.assert_close(in_a_bank(bases("mixtral"), tmp_path / "peft"), logits(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_imported_with_the_same_bits(bases, family, tmp_path):
    """`minilora import` writes what PEFT loads, with equal tensors; `export --to dense` merges it."""
    theirs = peft_lora(bases(family), tmp_path / "peft")
    imported = import_adapter(tmp_path / "peft", tmp_path / "out", base=str(bases(family)))
    assert imported.method == "lora"
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = PeftModel.from_pretrained(load(bases(family)), tmp_path / "out").eval()
    assert torch.equal(logits(again), logits(theirs))
    export_dense(tmp_path / "out", tmp_path / "dense", base=str(bases(family)))
    torch.testing.assert_close(logits(load(tmp_path / "dense")), logits(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_of_ours_is_pefts(bases, family, tmp_path):
    """What training saves loads in PEFT, in stock transformers and in a bank, and computes the same."""
    config = lora_model.LoraConfig(r=4, lora_dropout=0.1)
    model = lora_model.LoraForCausalLM.from_base(str(bases(family)), config)
    assert model.config.target_parameters == EXPERTS
    fill_adapter(model)
    model.eval().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["target_parameters"], settings["lora_dropout"]) == (EXPERTS, 0.0)
    expected = logits(model)
    theirs = PeftModel.from_pretrained(load(bases(family)), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(load(tmp_path)), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(in_a_bank(bases(family), tmp_path), expected, rtol=0, atol=1e-4)


def test_linears_that_peft_takes_for_experts_are_left_out(bases, tmp_path):
    """PEFT reads `gate_proj` on DeepSeek-V3 as its experts, which it was in transformers 4."""
    with pytest.warns(TargetsWarning, match=r"left out is .*mlp\.down_proj.*PEFT takes this name"):
        model = lora_model.LoraForCausalLM.from_base(str(bases("deepseek_v3")), lora_model.LoraConfig(r=4))
    assert model.config.target_parameters == EXPERTS
    assert not {"gate_proj", "up_proj", "down_proj"} & {*model.config.target_modules}
    fill_adapter(model)
    model.eval().save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(load(bases("deepseek_v3")), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def dora(bases, tmp_path_factory):
    """A saved DoRA on everything of the tiny Mixtral."""
    model = DoraForCausalLM.from_base(str(bases("mixtral")), tiny_config("dora"))
    fill_adapter(model)
    folder = tmp_path_factory.mktemp("dora")
    model.eval().save_pretrained(folder)
    return model, folder


def test_rows_of_a_bank_are_what_each_is_alone(bases, dora, tmp_path):
    lora = peft_lora(bases("mixtral"), tmp_path / "lora")
    bank = AdapterBank(load(bases("mixtral")))
    bank.load("lora", tmp_path / "lora")
    bank.load("dora", dora[1])
    alone = {None: load(bases("mixtral")), "lora": lora, "dora": dora[0]}
    names = [None, "lora", "lora", "dora", None, "dora"]
    ids = token_ids(len(names))
    with torch.no_grad(), bank.use(names), bank.rows(names):
        prefill = bank.model(ids).logits
        decoded = bank.model(ids[:, -1:]).logits
    for row, name in enumerate(names):
        one = ids[row : row + 1]
        torch.testing.assert_close(prefill[row], logits(alone[name], one)[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(decoded[row], logits(alone[name], one[:, -1:])[0], rtol=0, atol=1e-4)
    bank.unload("dora")
    with torch.no_grad(), bank.use(["lora"]), bank.rows(["lora"]):
        torch.testing.assert_close(bank.model(ids[1:2]).logits[0], prefill[1], rtol=0, atol=1e-4)


# ---- what is refused ----


def test_a_dora_cannot_become_pefts(bases, dora, tmp_path):
    with pytest.raises(AdapterError, match=r"target_parameters=.*PEFT has no DoRA on the parameters.*--to dense"):
        export_adapter(dora[1], tmp_path / "out", "peft", base=str(bases("mixtral")))
    assert not (tmp_path / "out").exists()
    export_dense(dora[1], tmp_path / "dense", base=str(bases("mixtral")))
    torch.testing.assert_close(logits(load(tmp_path / "dense")), logits(dora[0]), rtol=0, atol=1e-4)


def test_what_does_not_fit_is_refused(bases, tmp_path):
    base = bases("mixtral")
    peft_lora(base, tmp_path / "peft")
    folder = tmp_path / "peft"
    good, tensors = (folder / "adapter_config.json").read_text(), load_file(folder / "adapter_model.safetensors")

    def refused(message):
        with pytest.raises(AdapterError, match=message):
            import_adapter(folder, tmp_path / "out", base=str(base))
        with pytest.raises(AdapterError, match=message):
            AdapterBank(load(base)).load("it", folder)
        (folder / "adapter_config.json").write_text(good)
        save_file(tensors, folder / "adapter_model.safetensors")

    edit_json(folder / "adapter_config.json", target_parameters=["self_attn.q_proj.weight", EXPERTS[0]])
    refused(r"target_parameters=\['self_attn\.q_proj\.weight'\]: the base has no stacked experts of this name")
    edit_json(folder / "adapter_config.json", use_dora=True)
    refused(r"target_parameters=.*PEFT has no DoRA on parameters")
    edit_json(folder / "adapter_config.json", target_parameters=EXPERTS[:1])
    refused(r"experts\.base_layer: .*no such linear")
    edit_json(folder / "adapter_config.json", r=3)
    refused(r"experts\.?\w*\.lora_A has shape \(16, \d+\), rank 3 .*needs \(12, ")
    name = next(name for name in tensors if "experts.base_layer.lora_A" in name)
    save_file(
        {key: tensor for key, tensor in tensors.items() if "experts.base" not in key},
        folder / "adapter_model.safetensors",
    )
    refused(r"experts\.gate_up_proj: target_parameters names it, but there are no tensors")
    save_file(tensors | {name: tensors[name] * float("nan")}, folder / "adapter_model.safetensors")
    refused("not finite")


def test_what_has_no_place_for_experts_refuses_them(bases, tmp_path):
    for name in ("one", "two"):
        peft_lora(bases("mixtral"), tmp_path / name)
    both = [tmp_path / "one", tmp_path / "two"]
    with pytest.raises(AdapterError, match="combining does not support updates of a base's stacked experts"):
        combine(both, tmp_path / "out", Combination("linear", (0.5, 0.5)))
    with pytest.raises(AdapterError, match="stacked experts"):
        import_as_experts(both, tmp_path / "out")


def test_training_continues_from_a_lora_with_experts(bases, tmp_path):
    from minilora_hub.bases.skeleton import find_base
    from minilora_hub.training.parent_adapter import find_adapter, read_canonical

    peft_lora(bases("mixtral"), tmp_path, target_modules=["q_proj"])
    config, tensors = read_canonical(find_adapter(str(tmp_path)), find_base(str(bases("mixtral"))))
    assert (config.target_modules, config.target_parameters) == (["q_proj"], EXPERTS)
    model = lora_model.LoraForCausalLM.from_base(str(bases("mixtral")), copy.deepcopy(config))
    assert {name: p.shape for name, p in model.adapter_parameters().items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
