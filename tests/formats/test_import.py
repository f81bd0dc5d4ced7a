"""Adapters of other formats compute here what they compute at home, and come back with the same bits."""

import json

import pytest
import torch
from formats.helpers import (
    base_folder,
    edit_json,
    legacy_tensors,
    listing,
    mixlora,
    peft_folder,
    reference_folder,
    reference_tensors,
)
from peft import PeftModel
from reference import reference_mixlora
from safetensors.torch import load_file, save_file
from sweeps import sweep
from tiny import logits, tiny_base
from transformers import AutoModelForCausalLM

from minilora_hub import DoraForCausalLM, MixLoraForCausalLM
from minilora_hub.adapter_folder.folders import read_folder, read_source
from minilora_hub.adapter_folder.reading import read_ours
from minilora_hub.bases.skeleton import find_base
from minilora_hub.errors import AdapterError
from minilora_hub.formats.importing import import_adapter, import_as_experts
from minilora_hub.formats.mixlora_writing import write_reference
from minilora_hub.remote_code.routing_record import Routes

FAMILIES = ("llama", "mistral", "qwen2", "gemma2", "phi", "phi3")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return lambda family="llama", **changes: base_folder(folder, family, **changes)


# ---- the reference format ----


@pytest.mark.parametrize("family", sweep(FAMILIES, "llama"))
def test_reference_import_equals_the_package(family, bases, tmp_path):
    base = bases(family)
    model = mixlora(tiny_base(family))
    source = reference_folder(tmp_path / "source", model)
    imported = import_adapter(source, tmp_path / "out", base=str(base))
    assert (imported.method, imported.source) == ("mixlora", "reference")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    (tmp_path / "twin").mkdir()
    twin = reference_mixlora(tiny_base(family), model, tmp_path / "twin")
    assert (logits(loaded) - logits(tiny_base(family))).abs().max() > 1e-2
    torch.testing.assert_close(logits(loaded), logits(twin), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", sweep(FAMILIES, "llama", "phi3"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_to_ours_and_back_is_bit_equal(family, dtype, bases, tmp_path):
    source = reference_folder(tmp_path / "source", mixlora(tiny_base(family)), top_k=3, jitter_noise=0.25)
    before = {name: tensor.to(dtype) for name, tensor in torch.load(source / "adapter_model.bin").items()}
    torch.save(before, source / "adapter_model.bin")
    import_adapter(source, tmp_path / "ours", base=str(bases(family)))
    base = find_base(str(bases(family)))
    config, tensors, _ = read_ours(read_folder(tmp_path / "ours"), base)
    (tmp_path / "back").mkdir()
    write_reference(tmp_path / "back", config, tensors, base)
    after = torch.load(tmp_path / "back" / "adapter_model.bin", weights_only=True)
    assert after.keys() == before.keys()
    assert all(after[name].dtype is dtype and torch.equal(after[name], before[name]) for name in before)
    old, new = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("source", "back"))
    assert {key: new[key] for key in old if key != "base_model_name_or_path"} == {
        key: old[key] for key in old if key != "base_model_name_or_path"
    }


def test_what_is_written_for_the_reference_runs_there(bases, tmp_path):
    from mixlora.model import inject_adapter_in_model, load_adapter_weights

    model = mixlora(tiny_base(), lora_dropout=0.0)
    model.save_pretrained(tmp_path / "ours", tokenizer=None)
    base = find_base(str(bases()))
    config, tensors, _ = read_ours(read_folder(tmp_path / "ours"), base)
    (tmp_path / "reference").mkdir()
    write_reference(tmp_path / "reference", config, tensors, base)
    twin = tiny_base()
    inject_adapter_in_model(twin, *load_adapter_weights(str(tmp_path / "reference"), device="cpu"))
    torch.testing.assert_close(logits(model), logits(twin), rtol=0, atol=1e-4)  # its dropout is on: 1e-12


def test_legacy_names_and_safetensors(bases, tmp_path):
    model = mixlora(tiny_base())
    legacy = ["q_proj", "k_proj", "v_proj", "o_proj", "w1_proj", "w2_proj", "w3_proj"]
    source = reference_folder(
        tmp_path / "source", model, routing_strategy="mixtral", target_modules=dict.fromkeys(legacy, True)
    )
    (source / "adapter_model.bin").unlink()
    save_file(legacy_tensors(model), source / "adapter_model.safetensors")
    import_adapter(source, tmp_path / "out", base=str(bases()))
    loaded = MixLoraForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))


def test_expert_lora_gives_the_experts_a_rank_of_their_own(bases, tmp_path):
    model = mixlora(tiny_base(), r=4, lora_alpha=6, expert_r=2, expert_alpha=10)
    expert_lora = {"r": 2, "lora_alpha": 10, "lora_dropout": 0.05}
    source = reference_folder(tmp_path / "source", model, expert_lora=expert_lora)
    import_adapter(source, tmp_path / "out", base=str(bases()))
    assert torch.equal(logits(MixLoraForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


STRATEGIES = {
    "mixlora": ({"router_jitter_noise": 0.1}, {"top_k": 2, "jitter_noise": 0.1}),
    "mixlora-dynamic": (
        {"routing_strategy": "top_p", "router_top_p": 0.6, "router_temperature": 0.5},
        {"top_p": 0.6, "temperature": 0.5, "top_k": None},
    ),
    "mixlora-switch": (
        {"routing_strategy": "switch", "expert_capacity": 16, "router_z_loss_coef": 0.01, "expert_dropout": 0.1},
        {"expert_capacity": 16, "router_z_loss_coef": 0.01, "ffn_dropout": 0.1, "top_k": None, "sparse_step": 2},
    ),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_three_routing_strategies(strategy, bases, tmp_path):
    ours, theirs = STRATEGIES[strategy]
    model = mixlora(tiny_base(), **ours)
    source = reference_folder(tmp_path / "source", model, routing_strategy=strategy, **theirs)
    imported = import_adapter(source, tmp_path / "out", base=str(bases()))
    assert any("sparse_step" in note for note in imported.notes) == (strategy == "mixlora-switch")
    loaded = MixLoraForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    for name, value in ours.items():
        assert getattr(loaded.config, name) == value
    base = find_base(str(bases()))
    config, tensors, _ = read_ours(read_folder(tmp_path / "out"), base)
    (tmp_path / "back").mkdir()
    write_reference(tmp_path / "back", config, tensors, base)
    back = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    wanted = {"routing_strategy": strategy} | {k: v for k, v in theirs.items() if v is not None and k != "sparse_step"}
    assert {name: back[name] for name in wanted} == wanted


def test_old_files_with_a_sparse_step(bases, tmp_path):
    """Layers without a mixture have plain LoRA on their block, which those files call attention."""
    model = mixlora(tiny_base(), routing_strategy="switch", router_sparse_step=2)
    source = reference_folder(tmp_path / "source", model, routing_strategy="switch", top_k=None, sparse_step=2)
    weights = {k.replace(".0.mlp.", ".0.self_attn."): v for k, v in reference_tensors(model).items()}
    assert any(".0.self_attn.up_proj." in name for name in weights)
    torch.save(weights, source / "adapter_model.bin")
    import_adapter(source, tmp_path / "out", base=str(bases()))
    assert torch.equal(logits(MixLoraForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_targets_that_the_base_lacks_are_passed_over_and_told(bases, tmp_path):
    model = mixlora(tiny_base(), target_modules=["q_proj", "up_proj"])
    source = reference_folder(tmp_path / "source", model, target_modules=["q_proj", "up_proj", "fc1", "qkv_proj"])
    imported = import_adapter(source, tmp_path / "out", base=str(bases()))
    assert "['fc1', 'qkv_proj']" in imported.notes[0]
    assert torch.equal(logits(MixLoraForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_dora_without_magnitudes_computes_what_the_package_does(bases, tmp_path):
    """The package's own MixDoRA loads as plain LoRA; on request the magnitudes are those of its training."""
    from mixlora.model import inject_adapter_in_model, load_adapter_weights

    model = mixlora(tiny_base())
    source = reference_folder(tmp_path / "source", model, use_dora=True, lora_dropout=1e-12)
    imported = import_adapter(source, tmp_path / "loaded", base=str(bases()))
    assert "magnitudes" in imported.notes[0]
    twin = tiny_base()
    inject_adapter_in_model(twin, *load_adapter_weights(str(source), device="cpu"))
    loaded = MixLoraForCausalLM.from_pretrained(tmp_path / "loaded")
    torch.testing.assert_close(logits(loaded), logits(twin), rtol=0, atol=1e-4)
    with pytest.raises(AdapterError, match="base_revision='main': has no effect on the base"):
        import_adapter(source, tmp_path / "trained", base=str(bases()), base_revision="main")
    import_adapter(source, tmp_path / "trained", base=str(bases()), reference_dora="trained")
    trained = MixLoraForCausalLM.from_pretrained(tmp_path / "trained")
    assert trained.config.use_dora
    base = dict(tiny_base().named_parameters())
    for name, parameter in trained.adapter_parameters().items():
        if name.endswith("magnitude"):
            path = name.removesuffix(".magnitude").replace(".experts", "")
            norm = base[f"model.{path}.weight"].norm(dim=1)
            torch.testing.assert_close(parameter, norm.expand_as(parameter))
    assert (logits(trained) - logits(loaded)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routing_strategy": "mixlora-soft"}, "routing_strategy='mixlora-soft': must be one of"),
        ({"act_fn": "relu"}, "act_fn='relu': the base computes 'silu'"),
        ({"act_fn": "sleek"}, "act_fn='sleek'"),
        ({"num_experts": 5}, r"experts \[0, 1, 2, 3\] are in the file, num_experts=5"),
        ({"num_experts": 10**12}, "num_experts=1000000000000 requires that many"),
        ({"num_experts": 0}, "num_experts=0 requires that many"),
        ({"num_experts": "4"}, "num_experts='4': must be of type int"),
        ({"num_experts": None}, "num_experts is missing"),
        ({"r": 8}, r"has shape \(4, 32\), this configuration and base require \(8, 32\)"),
        ({"top_k": 9}, "num_experts_per_tok=9"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS': only CAUSAL_LM"),
        ({"bias": "all"}, "bias='all'"),
        ({"target_modules": ["q_proj", "up_proj"]}, "surplus layers.0.mlp.experts.down_proj.lora_A"),
        ({"target_modules": ["wqkv"]}, "has none of them"),
        ({"expert_lora": {"use_rslora": True}}, "use_rslora=True: experts that differ from attention"),
        ({"expert_lora": {"lora_dropout": 0.5}}, "a separate dropout of the experts"),
    ],
)
def test_reference_settings_that_cannot_be_honoured(changes, message, bases, tmp_path):
    source = reference_folder(tmp_path / "source", mixlora(tiny_base()), **changes)
    before = listing(tmp_path)
    with pytest.raises(AdapterError, match=message):
        import_adapter(source, tmp_path / "out", base=str(bases()))
    assert listing(tmp_path) == before


def test_reference_on_another_base_is_refused(bases, tmp_path):
    source = reference_folder(tmp_path / "source", mixlora(tiny_base()))
    for other, message in (({"hidden_size": 64}, "shape"), ({"num_hidden_layers": 3}, "missing layers.2")):
        with pytest.raises(AdapterError, match=message):
            import_adapter(source, tmp_path / "out", base=str(bases(**other)))
    assert not (tmp_path / "out").exists()


# ---- PEFT's format ----


@pytest.mark.parametrize("family", sweep(["llama", "qwen2", "phi3", "gpt2"], "llama", "gpt2"))
@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora_is_normalised(family, use_rslora, bases, tmp_path):
    base = tiny_base(family)
    source = peft_folder(
        tmp_path / "source", base, target_modules="all-linear", use_rslora=use_rslora, fan_in_fan_out=family == "gpt2"
    )
    before = load_file(source / "adapter_model.safetensors")
    (source / "adapter_model.safetensors").unlink()
    torch.save(before, source / "adapter_model.bin")
    imported = import_adapter(source, tmp_path / "out", base=str(bases(family)))
    assert imported.method == "lora"
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert read_source(tmp_path / "out").method == "lora"  # what a push reads
    ours = PeftModel.from_pretrained(tiny_base(family), tmp_path / "out")
    theirs = PeftModel.from_pretrained(tiny_base(family), source)
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q_proj|up_proj)", "r": 2},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 9.5}},
        {"rank_pattern": {"model.layers.1.self_attn.q_proj": 3}, "alpha_pattern": {r"^model\.layers\.0\.mlp.*": 2}},
        {"rank_pattern": {"layers.0.mlp.up_proj": 1}, "use_rslora": True},
    ],
)
def test_dora_becomes_ours_and_goes_back(settings, bases, tmp_path):
    from minilora_hub.formats.peft import peft_targets, write_peft_folder

    source = peft_folder(tmp_path / "source", tiny_base(), use_dora=True, **settings)
    import_adapter(source, tmp_path / "ours", base=str(bases()))
    twin = PeftModel.from_pretrained(tiny_base(), source)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    assert (logits(twin) - logits(tiny_base())).abs().max() > 1e-2
    torch.testing.assert_close(logits(loaded), logits(twin), rtol=0, atol=1e-4)
    base = find_base(str(bases()))
    config, tensors, sites = read_ours(read_folder(tmp_path / "ours"), base)
    write_peft_folder(tmp_path / "back", config, tensors, peft_targets(sites, base.skeleton), "org/base", None)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("source", "back"))
    before = {f"{name}.weight" if name.endswith("vector") else name: tensor for name, tensor in before.items()}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    back = PeftModel.from_pretrained(tiny_base(), tmp_path / "back")
    assert torch.equal(logits(back), logits(twin))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_bias": True}, "lora_bias=True"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.up"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4': training has changed the base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True: the base's model.layers.0"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS'"),
        ({"spectral_gain": 2.0}, "spectral_gain=2.0: unknown setting"),
        ({"r": 8}, "rank 8 on the base"),
        ({"r": 0}, "r=0"),
        ({"r": True}, "r=True: must be of type int"),
        ({"rank_pattern": {"q_proj": 3}}, "rank 3 on the base"),
        ({"rank_pattern": {"(": 3}}, r"'\(' must be a path or a regular expression"),
        ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, "does not name it"),
        ({"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj", "k_proj"]}, "k_proj: target_modules names it"),
        ({"use_dora": True}, "magnitude is missing"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
    ],
)
def test_peft_settings_that_cannot_be_honoured(changes, message, bases, tmp_path):
    source = peft_folder(tmp_path / "source", tiny_base())
    edit_json(source / "adapter_config.json", **changes)
    before = listing(tmp_path)
    with pytest.raises(AdapterError, match=message):
        import_adapter(source, tmp_path / "out", base=str(bases()))
    assert listing(tmp_path) == before


def test_dora_in_some_layers_only_or_on_the_head_is_refused(bases, tmp_path):
    some = peft_folder(tmp_path / "some", tiny_base(), use_dora=True, layers_to_transform=[1])
    with pytest.raises(AdapterError, match="adapted in 1 of 2 layers"):
        import_adapter(some, tmp_path / "out", base=str(bases()))
    head = peft_folder(tmp_path / "head", tiny_base(), use_dora=True, target_modules=["q_proj", "lm_head"])
    with pytest.raises(AdapterError, match="outside the decoder layers"):
        import_adapter(head, tmp_path / "out", base=str(bases()))
    lora = peft_folder(tmp_path / "lora", tiny_base(), target_modules=["q_proj", "lm_head"], layers_to_transform=None)
    import_adapter(lora, tmp_path / "out", base=str(bases()))  # plain LoRA stays in PEFT's format, which has a place
    some = peft_folder(tmp_path / "some2", tiny_base(), layers_to_transform=[1])
    import_adapter(some, tmp_path / "out2", base=str(bases()))
    ours, theirs = (PeftModel.from_pretrained(tiny_base(), tmp_path / name) for name in ("some2", "out2"))
    assert torch.equal(logits(ours), logits(theirs))


def test_the_base_that_an_adapter_names_is_used(bases, tmp_path):
    source = peft_folder(tmp_path / "source", tiny_base(), use_dora=True, name=str(bases()))
    import_adapter(source, tmp_path / "out")
    model = DoraForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.base_fingerprint.startswith("sha256:")
    edit_json(source / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(AdapterError, match="names no base"):
        import_adapter(source, tmp_path / "again")


def test_ours_and_whole_models_are_not_imported(bases, tmp_path):
    mixlora(tiny_base()).save_pretrained(tmp_path / "ours", tokenizer=None)
    with pytest.raises(AdapterError, match="own format already"):
        import_adapter(tmp_path / "ours", tmp_path / "out")
    with pytest.raises(AdapterError, match="a whole model"):
        import_adapter(bases(), tmp_path / "out")


# ---- several adapters into one ----

MLP = ["up_proj", "down_proj"]


def forced_to(model, expert):
    """The model, with a router that sends every token to one expert."""
    for module in model.modules():
        if hasattr(module, "route"):

            def route(x, leading, module=module):
                return Routes(torch.ones(x.shape[0], 1), torch.full((x.shape[0], 1), expert))

            module.route = route
    return model


def test_each_adapter_is_an_expert(bases, tmp_path):
    """With every token sent to expert e, the mixture computes what adapter e does alone."""
    settings = (
        {"r": 4, "lora_alpha": 6},
        {"r": 2, "lora_alpha": 5, "use_rslora": True},
        {"target_modules": ["up_proj"]},
    )
    folders = [
        peft_folder(tmp_path / f"lora{i}", tiny_base(), seed=i, **({"target_modules": MLP} | own))
        for i, own in enumerate(settings)
    ]
    imported = import_as_experts(folders, tmp_path / "out", base=str(bases()), num_experts_per_tok=1)
    assert "router is fresh" in imported.notes[0]
    for expert, folder in enumerate(folders):
        model = forced_to(MixLoraForCausalLM.from_pretrained(tmp_path / "out"), expert)
        twin = PeftModel.from_pretrained(tiny_base(), folder)
        assert (logits(twin) - logits(tiny_base())).abs().max() > 1e-2
        torch.testing.assert_close(logits(model), logits(twin), rtol=0, atol=1e-4)


def test_the_fresh_router_is_seeded(bases, tmp_path):
    folders = [peft_folder(tmp_path / f"l{i}", tiny_base(), seed=i, target_modules=MLP) for i in range(2)]
    routers = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        import_as_experts(folders, tmp_path / out, base=str(bases()), seed=seed)
        routers.append(load_file(tmp_path / out / "adapter_model.safetensors")["layers.0.mlp.router"])
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])
    assert 0.01 < routers[0].std() < 0.03


def test_attention_is_the_callers_decision(bases, tmp_path):
    targets = ["q_proj", *MLP]
    folders = [
        peft_folder(tmp_path / f"l{i}", tiny_base(), seed=i, target_modules=targets, r=2 + i, lora_alpha=6)
        for i in range(2)
    ]
    with pytest.raises(AdapterError, match=r"the adapters' updates differ.*mean, svd or drop"):
        import_as_experts(folders, tmp_path / "same", base=str(bases()))
    assert not (tmp_path / "same").exists()
    deltas = []
    for folder, scaling in zip(folders, (3.0, 2.0), strict=True):
        tensors = load_file(folder / "adapter_model.safetensors")
        name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
        deltas.append(scaling * tensors[name.format("B")] @ tensors[name.format("A")])
    mean = sum(deltas) / 2
    for choice, rank in (("mean", 5), ("svd", 3)):  # the experts keep the rank of their own
        import_as_experts(folders, tmp_path / choice, base=str(bases()), attention=choice)
        model = MixLoraForCausalLM.from_pretrained(tmp_path / choice)
        update = model.base.model.layers[1].self_attn.q_proj.update
        assert (update.lora_A.shape[0], model.config.expert_r) == (rank, 3)
        got = update.scaling * update.lora_B @ update.lora_A
        if choice == "mean":
            torch.testing.assert_close(got, mean, rtol=0, atol=1e-5)
        else:
            u, s, vh = torch.linalg.svd(mean)
            torch.testing.assert_close(got, (u[:, :3] * s[:3]) @ vh[:3], rtol=0, atol=1e-5)
    import_as_experts(folders, tmp_path / "drop", base=str(bases()), attention="drop")
    assert all("self_attn" not in name for name in load_file(tmp_path / "drop" / "adapter_model.safetensors"))
    again = import_as_experts([folders[0], folders[0]], tmp_path / "equal", base=str(bases()))
    assert again.method == "mixlora"
    assert MixLoraForCausalLM.from_pretrained(tmp_path / "equal").config.r == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: [peft_folder(at / "a", tiny_base())], "at least 2"),
        (lambda at: [peft_folder(at / n, tiny_base(), use_dora=n == "b") for n in "ab"], "is a dora in the format"),
        (lambda at: [peft_folder(at / n, tiny_base(), target_modules=["q_proj"]) for n in "ab"], "no experts in them"),
        (lambda at: [peft_folder(at / n, tiny_base(), layers_to_transform=[0]) for n in "ab"], "in 1 of 2 layers"),
        (lambda at: [peft_folder(at / n, tiny_base(), name=n) for n in "ab"], "name 2 bases, 'a' and 'b'"),
    ],
)
def test_adapters_that_make_no_mixture_are_refused(make, message, bases, tmp_path):
    folders = make(tmp_path)
    base = None if "name 2 bases" in message else str(bases())
    with pytest.raises(AdapterError, match=message):
        import_as_experts(folders, tmp_path / "out", base=base, attention="drop")
    assert not (tmp_path / "out").exists()
