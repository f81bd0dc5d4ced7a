"""MixLoRA as one of PEFT's methods: what PEFT's own tests ask of a method, asked of this one."""

from __future__ import annotations

import copy
import subprocess
import sys

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, TaskType, get_peft_model, get_peft_model_state_dict
from peft.utils import infer_device
from safetensors.torch import load_file
from sweeps import sweep
from tiny import FAMILIES, OTHER_FAMILIES, fill_adapter, logits, tiny_base, token_ids
from tiny_peft import STRATEGIES, adapter_tensors, fill, mixlora, peft_model

import minilora_hub
from minilora_hub import MixLoraConfig, MixLoraForCausalLM, MixLoraPeftConfig
from minilora_hub.errors import MiniLoraError
from minilora_hub.integrations.peft import method as peft_method

# ---- registration ----


def test_registering_again_changes_nothing():
    members, added = list(PeftType), PeftModel.add_adapter
    minilora_hub.register()
    minilora_hub.register()
    assert list(PeftType) == members
    assert members.count("MIXLORA") == 1
    assert PeftModel.add_adapter is added
    assert PeftType.MIXLORA is PeftType("MIXLORA") is copy.deepcopy(PeftType.MIXLORA)
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MIXLORA] is MixLoraPeftConfig


def test_another_peft_is_refused_by_its_version(monkeypatch):
    monkeypatch.delitem(PeftType._member_map_, "MIXLORA")
    monkeypatch.setattr(peft_method, "HOOKS", ("_check_merge_allowed", "_of_another_version"))
    with pytest.raises(MiniLoraError, match=rf"peft {peft.__version__}: .*_of_another_version.*install peft"):
        peft_method.register()


def test_every_hook_that_is_overridden_is_checked_for():
    own = {name for name in vars(peft_method.MixLoraModel) if hasattr(peft_method.BaseTuner, name)}
    private = {name for name in own if name.startswith("_") and not name.startswith("__") and "abc" not in name}
    assert private == set(peft_method.HOOKS)


def test_importing_the_package_does_not_import_peft():
    code = "import sys, minilora_hub; assert not {'peft', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the configuration ----


def test_a_configuration_survives_its_file(tmp_path):
    config = mixlora(expert_lora={"r": 2}, target_modules={"up_proj", "q_proj"}, rank_pattern={"q_proj": 3})
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert type(PeftConfig.from_pretrained(tmp_path)) is MixLoraPeftConfig
    assert config.peft_type is PeftType.MIXLORA
    assert config.expert_lora == {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
    assert config.target_modules == ["q_proj", "up_proj"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 9}, r"top_k=9: must be an integer from 1 to num_experts=4"),
        ({"routing_strategy": "mixlora-dynamic", "top_p": 1.5}, r"top_p=1\.5: must be a number above 0, at most 1"),
        ({"top_p": 0.5}, r"top_p=0\.5: only routing_strategy"),
        ({"routing_strategy": "mixtral"}, r"routing_strategy='mixtral': must be one of"),
        ({"expert_lora": {"rank": 3}}, r"expert_lora\['rank'\]=3: the experts have only"),
        ({"expert_lora": {"lora_dropout": 2}}, r"lora_dropout=2: must be a probability"),
        ({"expert_lora": {"use_dora": True}}, r"expert_lora\['use_dora'\]=True"),
        ({"bias": "all"}, r"bias='all': must be \"none\""),
        ({"r": 0}, r"r=0: the rank must be an integer of at least 1"),
    ],
)
def test_a_field_out_of_range_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        mixlora(**fields)


# ---- the mathematics is the island's ----


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_it_computes_what_our_model_computes(strategy, dora):
    island = {"mixlora": "top_k", "mixlora-dynamic": "top_p", "mixlora-switch": "switch"}[strategy]
    fields = {"r": 4, "num_experts": 4, "expert_r": 3, "use_dora": dora, "routing_strategy": island}
    ours = MixLoraForCausalLM.from_base(tiny_base(), MixLoraConfig(**fields))
    fill_adapter(ours)
    model = peft_model(expert_lora={"r": 3}, use_dora=dora, routing_strategy=strategy)
    with torch.no_grad():
        values = ours.adapter_parameters()
        from minilora_hub.adapter_folder.names import canonical_of_peft_mixlora

        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.copy_(values.pop(canonical_of_peft_mixlora(name.replace(".default.", "."))))
    assert values == {}
    assert torch.equal(logits(model), logits(ours.eval()))


@pytest.mark.parametrize("family", sweep(FAMILIES + OTHER_FAMILIES, "llama", "phi3", "gpt2"))
def test_every_family(family, tmp_path):
    base = tiny_base(family)
    want = logits(base)
    model = get_peft_model(base, mixlora())
    torch.testing.assert_close(logits(model), want, atol=1e-4, rtol=1e-4)  # fresh: the base's output
    fill(model)
    got = logits(model.eval())
    assert (got - want).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_base(family), tmp_path)), got)
    with model.disable_adapter():
        assert torch.equal(logits(model), want)
    assert torch.equal(logits(model.unload()), want)


def test_initial_weights_follow_torchs_seed():
    def fresh(seed):
        base = tiny_base()
        torch.manual_seed(seed)
        return adapter_tensors(get_peft_model(base, mixlora()))

    base = tiny_base()
    first, again, other = fresh(1), fresh(1), fresh(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if not name.endswith("lora_B"))
    torch.manual_seed(0)
    model = get_peft_model(base, mixlora(init_lora_weights=False))
    assert (logits(model) - logits(tiny_base())).abs().max() > 0.01


# ---- what is adapted ----


def adapted(model) -> set[str]:
    return set(model.base_model.targeted_module_names)


LLAMA = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")] + [
    f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {0: LLAMA, 1: LLAMA}),
        ({"target_modules": "all-linear"}, {0: LLAMA, 1: LLAMA}),
        ({"target_modules": ["v_proj", "mlp.up_proj"]}, {0: [LLAMA[2], LLAMA[5]], 1: [LLAMA[2], LLAMA[5]]}),
        ({"target_modules": ["mlp"]}, {0: LLAMA[4:], 1: LLAMA[4:]}),
        ({"target_modules": r".*\.1\.mlp\.(up|down)_proj|.*q_proj"}, {0: LLAMA[:1], 1: [LLAMA[0], *LLAMA[5:]]}),
        ({"exclude_modules": ["down_proj", "k_proj"]}, {i: [LLAMA[j] for j in (0, 2, 3, 4, 5)] for i in (0, 1)}),
        ({"exclude_modules": r".*\.0\.mlp\..*"}, {0: LLAMA[:4], 1: LLAMA}),
        ({"layers_to_transform": 1}, {1: LLAMA}),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, {0: LLAMA}),
        ({"modules_to_save": ["q_proj"]}, {0: LLAMA[1:], 1: LLAMA[1:]}),
    ],
)
def test_targets_are_named_in_pefts_ways(fields, expected, tmp_path):
    names = {f"model.layers.{layer}.{path}" for layer, paths in expected.items() for path in paths}
    model = peft_model(**fields)
    assert adapted(model) == names
    tensors = adapter_tensors(model)
    for name in (f"model.layers.{layer}.{path}" for layer in (0, 1) for path in LLAMA):
        block, _, leaf = name.rpartition(".")
        inside = f"{block}.moe_lora.default.experts.{leaf}." if ".mlp." in name else f"{name}.moe_lora.default.update."
        assert any(inside in key for key in tensors) == (name in names), name
    # The same through a file, and as the second adapter of a model that has other layers.
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_base(), tmp_path)), logits(model))
    if "modules_to_save" in fields:  # PEFT cannot train a module whole that is adapted
        return
    second = peft_model(name="first", seed=7)
    second.load_adapter(tmp_path, "second")
    second.set_adapter("second")
    assert torch.equal(logits(second), logits(model))


def test_ranks_and_scalings_by_pattern():
    model = peft_model(rank_pattern={"layers.0.self_attn.q_proj": 2, "up_proj": 3}, alpha_pattern={"o_proj": 1})
    layers = model.base_model.model.model.layers
    assert layers[0].self_attn.q_proj.current.update.lora_A.shape[0] == 2
    assert layers[1].self_attn.q_proj.current.update.lora_A.shape[0] == 4
    assert layers[1].mlp.current.experts["up_proj"].lora_A.shape[1] == 3
    assert layers[1].mlp.current.experts["down_proj"].lora_A.shape[1] == 4
    assert (layers[0].self_attn.o_proj.current.update.scaling, layers[0].self_attn.v_proj.current.update.scaling) == (
        1 / 4,
        2,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj"]}, "needs at least one projection of a feed-forward block"),
        ({"target_modules": ["self_attn"]}, r"names model\.layers\.0\.self_attn \(LlamaAttention\), which is neither"),
        ({"target_modules": ["lm_head", "mlp"]}, r"names lm_head \(Linear\), which is neither a linear of a decoder"),
        ({"target_modules": ["up_proj", "embed_tokens"]}, r"names model\.embed_tokens \(Embedding\)"),
        ({"target_modules": ["up_proj", "wq"]}, r"target_modules=\['wq'\]: the base has no such linear"),
        ({"rank_pattern": {"wq": 3}}, r"rank_pattern\['wq'\]: matches none"),
        ({"act_fn": "gelu"}, r"act_fn='gelu': the base's activation is 'silu'"),
        ({"layers_to_transform": [7]}, "needs at least one projection of a feed-forward block"),
    ],
)
def test_a_target_that_cannot_be_is_named_and_nothing_is_changed(fields, message):
    base = tiny_base()
    modules, want = [type(module) for module in base.modules()], logits(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, mixlora(**fields))
    assert [type(module) for module in base.modules()] == modules
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert torch.equal(logits(get_peft_model(base, mixlora()).unload()), want)


def test_targets_do_not_come_from_a_files_tensors():
    with pytest.raises(ValueError, match="state_dict: the configuration determines where a MixLoRA goes"):
        peft.inject_adapter_in_model(mixlora(), tiny_base(), state_dict={"layers.0.mlp.router": torch.zeros(4, 32)})


def test_a_block_of_an_unknown_form_is_named():
    with pytest.raises(ValueError, match=r"model\.layers\.0 \(MixtralDecoderLayer\): no feed-forward block"):
        get_peft_model(tiny_base("mixtral", num_local_experts=4), mixlora())


# ---- using it ----


def test_parameters_are_counted(capsys):
    model = get_peft_model(tiny_base(), mixlora())
    trainable, total = model.get_nb_trainable_parameters()
    ours = MixLoraForCausalLM.from_base(tiny_base(), MixLoraConfig(r=4, num_experts=4))
    assert trainable == ours.num_adapter_parameters()
    assert total == trainable + sum(parameter.numel() for parameter in tiny_base().parameters())
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,d}" in capsys.readouterr().out
    assert all((".default." in name) == parameter.requires_grad for name, parameter in model.named_parameters())


def test_status_is_reported():
    model = peft_model(name="one")
    model.add_adapter("two", mixlora(target_modules=["mlp"]))
    status = model.get_model_status()
    assert (status.adapter_model_type, status.peft_types) == ("MixLoraModel", {"one": "MIXLORA", "two": "MIXLORA"})
    assert (status.enabled, status.active_adapters, status.available_adapters) == (True, ["one"], ["one", "two"])
    assert status.num_adapter_layers == 2 * 5
    assert status.requires_grad == {"one": True, "two": False}
    assert {layer.name for layer in model.get_layer_status() if "two" in layer.available_adapters} == {
        "model.model.layers.0.mlp",
        "model.model.layers.1.mlp",
    }


def test_it_generates_as_our_model_does():
    model = peft_model()
    ids = token_ids(batch=1)
    out = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    step = ids
    for _ in range(6):
        step = torch.cat([step, logits(model, step)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, step)


def test_inference_mode_and_trainability():
    model = get_peft_model(tiny_base(), mixlora(inference_mode=True))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_adapter("default")
    assert any(parameter.requires_grad for parameter in model.parameters())
    model.set_adapter("default", inference_mode=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_requires_grad("default")
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if ".default." in name)


def test_loaded_adapters_are_frozen_unless_asked(tmp_path):
    peft_model().save_pretrained(tmp_path)
    assert not any(p.requires_grad for p in PeftModel.from_pretrained(tiny_base(), tmp_path).parameters())
    model = PeftModel.from_pretrained(tiny_base(), tmp_path, is_trainable=True)
    assert all((".default." in name) == p.requires_grad for name, p in model.named_parameters())


def test_a_copy_is_independent():
    model = peft_model()
    want = logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin), want)
    twin.train()
    loss = twin(token_ids(), labels=token_ids()).loss
    loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_modules_to_save(tmp_path):
    model = get_peft_model(tiny_base(), mixlora(modules_to_save=["lm_head"]))
    fill(model)
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(2)
    want = logits(model.eval())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_base(), tmp_path)
    assert torch.equal(logits(loaded), want)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter_model.safetensors")
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_base()))


def test_trainable_tokens(tmp_path):
    model = get_peft_model(tiny_base(), mixlora(trainable_token_indices=[3, 5]))
    fill(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.mul_(-1)
    want = logits(model.eval())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_base(), tmp_path)), want)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION", None])
def test_other_tasks(task, tmp_path):
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

    auto = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}
    config = tiny_base().config

    def base():
        torch.manual_seed(0)
        return auto.get(task, AutoModel).from_config(config).eval()

    model = peft_model(base=base(), task_type=task)
    labels = {"SEQ_CLS": torch.tensor([0, 1]), "TOKEN_CLS": token_ids() % 2}.get(task)
    ids = token_ids()
    if labels is not None:
        model.train()
        model(input_ids=ids, labels=labels).loss.backward()
        assert model.base_model.model.model.layers[0].mlp.current.router.grad.abs().sum() > 0
        model.eval()
    want = model(input_ids=ids)[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(input_ids=ids)[0], want)


# ---- dtypes ----


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_on_a_bf16_base(autocast, dora, tmp_path):
    base = tiny_base().to(torch.bfloat16)
    model = get_peft_model(base, mixlora(use_dora=dora), autocast_adapter_dtype=autocast)
    for name, tensor in adapter_tensors(model).items():
        assert tensor.dtype == (torch.float32 if autocast or "magnitude" in name else torch.bfloat16), name
    fill(model)
    want = logits(model.eval())
    assert want.dtype == torch.bfloat16
    full = logits(peft_model(use_dora=dora)).float()
    assert (want.float() - full).abs().max() < 0.1 * full.abs().max()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_base().to(torch.bfloat16), tmp_path, autocast_adapter_dtype=autocast)
    assert torch.equal(logits(again), want)
    model.train()
    model(token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".default." in name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_the_whole_model(dtype):
    model = peft_model(use_dora=True).to(dtype)
    assert {t.dtype for name, t in adapter_tensors(model).items() if "magnitude" not in name} == {dtype}
    assert {t.dtype for name, t in adapter_tensors(model).items() if "magnitude" in name} == {torch.float32}
    assert logits(model).dtype == dtype


@pytest.mark.parametrize("low", [True, False])
def test_memory_saving_loading_gives_the_same(low, tmp_path):
    model = peft_model(use_dora=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_base(), tmp_path, low_cpu_mem_usage=low)
    assert torch.equal(logits(loaded), logits(model))
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=low)
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), logits(model))
    assert {parameter.device.type for parameter in loaded.parameters()} == {torch.device(infer_device()).type}


# ---- merging, unloading ----


def test_merging_is_refused_with_the_way_out():
    model = peft_model()
    want = logits(model)
    for refused in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"cannot be merged.*minilora export --to mixtral"):
            refused()
    assert torch.equal(logits(model), want)


def test_unloading_gives_the_base_back():
    base = tiny_base()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = base.config.to_dict()
    model = peft_model(base=base)
    model.add_adapter("lora", peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    fill(model, "lora", 3)
    assert model.unload() is base
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [type(module) for module in base.modules()] == [type(module) for module in tiny_base().modules()]
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert base.config.to_dict() == config
    assert not base._forward_hooks
    assert not base._forward_pre_hooks
    assert MixLoraForCausalLM.from_base(base, MixLoraConfig(r=4, num_experts=2))


# ---- files ----


@pytest.mark.parametrize("safe", [True, False])
def test_saving_and_loading_under_another_name(safe, tmp_path):
    model = peft_model(name="here", use_dora=True)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    names = {path.name for path in (tmp_path / "here").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors" if safe else "adapter_model.bin"}
    loaded = PeftModel.from_pretrained(tiny_base(), tmp_path / "here", adapter_name="there")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.active_adapters == ["there"]
    mine, theirs = adapter_tensors(model, "here"), adapter_tensors(loaded, "there")
    assert {name.replace(".here.", ".there.") for name in mine} == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name.replace(".here.", ".there.")]) for name in mine)


def test_a_state_dict_holds_one_adapter_and_no_base():
    model = peft_model(name="one")
    model.add_adapter("two", mixlora(r=2))
    fill(model, "two", 2)
    for name in ("one", "two"):
        state = get_peft_model_state_dict(model, adapter_name=name)
        assert len(state) == len(adapter_tensors(model, name))
        assert not any(part in key for key in state for part in (".one.", ".two.", "base_layer", "base_block"))
        assert all("moe_lora" in key for key in state)
    assert set(model.state_dict()) == {
        name for name, _ in model.named_parameters(remove_duplicate=False)
    }  # every base tensor once, and no buffers


def test_our_own_layout_loads_in_peft(tmp_path):
    """Tensors under the island's names, as in a published folder's file."""
    from minilora_hub.adapter_folder.names import canonical_of_peft_mixlora

    model = peft_model(use_dora=True)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    from safetensors.torch import save_file

    save_file({canonical_of_peft_mixlora(name): tensor for name, tensor in load_file(file).items()}, file)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_base(), tmp_path)), logits(model))


def test_the_task_type_is_kept(tmp_path):
    peft_model().save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).task_type == TaskType.CAUSAL_LM
