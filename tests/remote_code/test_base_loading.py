"""A base is loaded whole or not at all, and an adapter names a base for its weights only."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    CAUSAL_LM,
    FAMILIES,
    HEADLESS,
    METHODS,
    OTHER_FAMILIES,
    fill_adapter,
    logits,
    tiny_base,
    tiny_config,
    tiny_model,
)
from tiny_stand_ins import byte_tokenizer, tiny_llama
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from minilora_hub import DoraForCausalLM, MixLoraForCausalLM
from minilora_hub.remote_code.adapter_files import UNKNOWN, base_fingerprint
from minilora_hub.remote_code.base_loading import differing_tensors, load_checked, same_digests, tensor_digests
from minilora_hub.training.lora_model import LoraConfig, LoraForCausalLM

CHECKPOINT = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
LINEAR = {"gpt2": "transformer.h.1.mlp.c_fc.weight", "gpt_neox": "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"}
LINEAR |= {"phi": "model.layers.1.mlp.fc1.weight", "phi3": "model.layers.1.mlp.gate_up_proj.weight"}
LINEAR |= {"mixtral": "model.layers.1.mlp.gate.weight"}
EVERY = (*FAMILIES, *OTHER_FAMILIES, "mixtral")


@pytest.fixture
def base_folder(tmp_path):
    folder = tmp_path / "base"
    tiny_base().save_pretrained(folder)
    return folder


def edit_checkpoint(folder, change):
    tensors = load_file(folder / CHECKPOINT)
    save_file(change(tensors) or tensors, folder / CHECKPOINT, metadata={"format": "pt"})
    return folder


# ---- what a checkpoint must hold ----


@pytest.mark.parametrize("family", EVERY)
def test_a_missing_tensor_is_named_and_a_whole_checkpoint_loads(family, tmp_path):
    """Sharded, with its head and without, tied or not."""
    base = tiny_base(family)
    base.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / CHECKPOINT).exists()
    assert torch.equal(logits(load_checked(AutoModelForCausalLM, tmp_path)), logits(base))
    body = load_checked(AutoModel, tmp_path)  # what it does not take is no error
    assert torch.equal(logits(body), logits(base.base_model))
    name = LINEAR.get(family, UP)
    index = json.loads((tmp_path / f"{CHECKPOINT}.index.json").read_text())
    saved = (
        name
        if name in index["weight_map"]
        else next(n for n in index["weight_map"] if n.endswith("1.block_sparse_moe.gate.weight"))
    )
    shard = tmp_path / index["weight_map"].pop(saved)
    tensors = load_file(shard)
    del tensors[saved]
    save_file(tensors, shard, metadata={"format": "pt"})
    (tmp_path / f"{CHECKPOINT}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"missing {name}"):
        load_checked(AutoModelForCausalLM, tmp_path)
    with pytest.raises(ValueError, match=rf"missing {name.removeprefix(base.base_model_prefix + '.')}"):
        load_checked(AutoModel, tmp_path)


def test_a_tied_head_may_lie_under_either_name(tmp_path):
    base = tiny_base(tie_word_embeddings=True)
    base.save_pretrained(tmp_path)
    embedding = "model.embed_tokens.weight"
    assert "lm_head.weight" not in load_file(tmp_path / CHECKPOINT)
    edit_checkpoint(tmp_path, lambda t: {"lm_head.weight": t.pop(embedding), **t})
    assert torch.equal(logits(load_checked(AutoModelForCausalLM, tmp_path)), logits(base))
    edit_checkpoint(tmp_path, lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"})
    with pytest.raises(ValueError, match=rf"missing lm_head.weight, {embedding}"):
        load_checked(AutoModelForCausalLM, tmp_path)


def test_a_pickled_checkpoint_is_checked_too(base_folder):
    tensors = load_file(base_folder / CHECKPOINT)
    (base_folder / CHECKPOINT).unlink()
    torch.save(tensors, base_folder / "pytorch_model.bin")
    assert torch.equal(logits(load_checked(AutoModelForCausalLM, base_folder)), logits(tiny_base()))
    del tensors[UP]
    torch.save(tensors, base_folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"missing {UP}"):
        load_checked(AutoModelForCausalLM, base_folder)


@pytest.mark.parametrize(
    ("rename", "shown"),
    [
        (lambda name: f"_orig_mod.{name}", "_orig_mod.lm_head.weight"),
        (lambda name: f"module.{name}", "module.lm_head.weight"),
        (
            lambda name: name.replace("q_proj.", "q_proj.base_layer."),
            "model.layers.0.self_attn.q_proj.base_layer.weight",
        ),
    ],
)
def test_tensors_under_other_names_are_told(rename, shown, base_folder):
    edit_checkpoint(base_folder, lambda tensors: {rename(name): value for name, value in tensors.items()})
    with pytest.raises(
        ValueError, match=rf"missing .*it has {shown} instead, as saved from a compiled or wrapped model"
    ):
        load_checked(AutoModelForCausalLM, base_folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(base_folder):
    edit_checkpoint(base_folder, lambda tensors: tensors.update({UP: torch.ones(3, 5)}))
    for arguments in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=rf"{UP} has the shape \(3, 5\) there instead of \(48, 32\)"):
            load_checked(AutoModelForCausalLM, base_folder, **arguments)


@pytest.mark.parametrize("headless", [False, True])
def test_adapters_are_built_and_loaded_on_whole_bases_only(headless, base_folder, tmp_path):
    classes = HEADLESS if headless else CAUSAL_LM
    for method in METHODS:
        classes[method].from_base(str(base_folder), tiny_config(method)).save_pretrained(tmp_path / method)
    edit_checkpoint(base_folder, lambda tensors: {n: v for n, v in tensors.items() if n != UP})
    name = UP.removeprefix("model.") if headless else UP
    for method in METHODS:
        with pytest.raises(ValueError, match=f"missing {name}"):
            classes[method].from_base(str(base_folder), tiny_config(method))
        with pytest.raises(ValueError, match=f"missing {name}"):
            classes[method].from_pretrained(tmp_path / method)


# ---- a model that is passed ----


@pytest.mark.parametrize("family", EVERY)
def test_one_changed_value_is_found_whatever_the_architecture(family, tmp_path):
    """Also where transformers renames, fuses or ties what is in the files, in another dtype, or without the head."""
    tiny_base(family).save_pretrained(tmp_path)
    for loader, dtype in (
        (AutoModelForCausalLM, torch.float32),
        (AutoModelForCausalLM, torch.float16),
        (AutoModel, None),
    ):
        base = loader.from_pretrained(tmp_path, dtype=dtype or "auto")
        state = torch.get_rng_state()
        assert differing_tensors(base, tmp_path) == []
        assert torch.equal(torch.get_rng_state(), state)
        name, parameter = list(base.named_parameters())[-1]
        with torch.no_grad():
            parameter.view(-1)[-1] += 0.01
        assert f"{name} has other values" in differing_tensors(base, tmp_path)


def test_rounding_is_no_other_base(base_folder):
    """Loaded in bfloat16 or float16 and cast on: as every fingerprint, so the name is for any dtype."""
    for steps in ([torch.bfloat16, torch.float32], [torch.float16, torch.float32], [torch.float16, torch.bfloat16]):
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        for dtype in steps:
            base.to(dtype)
        assert differing_tensors(base, base_folder) == []


def other_weights(base):
    """Ways in which a model stops being what its name says, each with the tensor that an error names."""

    def resized(model):
        model.resize_token_embeddings(140)

    def edited(model):
        model.get_input_embeddings().weight.data[5] += 0.5

    def merged(model):
        adapted = DoraForCausalLM.from_base(model, tiny_config("dora"))
        fill_adapter(adapted)
        path = model.config.name_or_path
        adapted.merge().config.name_or_path = path  # as other libraries leave it

    def new_head(model):
        model.lm_head = torch.nn.Linear(32, 128, bias=True)

    found = {"resized": resized, "edited": edited, "merged": merged, "new head": new_head}
    for name, change in found.items():
        model = copy.deepcopy(base)
        change(model)
        yield name, model
    yield "random", AutoModelForCausalLM.from_config(base.config)


def adapter_on(folder, method, **arguments):
    """A filled adapter on the base in a folder."""
    model = CAUSAL_LM[method].from_base(str(folder), tiny_config(method), **arguments)
    fill_adapter(model)
    return model.eval()


SETTINGS = {
    "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "rms_norm_eps": 0.1,
    "hidden_act": "gelu",
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("method", ["dora", "mixlora"])
def test_a_base_with_other_settings_than_its_files_is_refused(method, name, base_folder, tmp_path):
    """An adapter does not hold them: loaded again, it would give other logits."""
    said = rf"configuration is not the one of '.*base' \({name} is .* instead of .*\).*base\.save_pretrained"
    changed = {name: SETTINGS[name]}
    for base, arguments in (
        (str(base_folder), changed),
        (AutoModelForCausalLM.from_pretrained(base_folder, **changed), {}),
    ):
        with pytest.raises(ValueError, match=said):
            CAUSAL_LM[method].from_base(base, tiny_config(method), **arguments)
    adapter_on(base_folder, method).save_pretrained(tmp_path / "adapter")
    loaded = CAUSAL_LM[method].from_pretrained(tmp_path / "adapter", **changed)  # what was asked for, this time
    plain = CAUSAL_LM[method].from_pretrained(tmp_path / "adapter")
    assert not torch.allclose(logits(loaded), logits(plain), atol=1e-4)
    with pytest.raises(ValueError, match=rf"other weights or settings .*{name} is .* instead of .*save_base"):
        loaded.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    loaded.save_base(tmp_path / "changed base")
    loaded.save_pretrained(tmp_path / "saved")
    again = CAUSAL_LM[method].from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(loaded))


def test_an_adapter_that_was_saved_over_other_settings_is_told(base_folder, tmp_path):
    """By earlier code, which did not compare them."""
    adapter_on(base_folder, "dora").save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "config.json"
    fields = json.loads(file.read_text())
    fields["text_config"]["rms_norm_eps"] = 0.3
    file.write_text(json.dumps(fields))
    with pytest.warns(UserWarning, match=r"another configuration than .*rms_norm_eps is 1e-06 instead of 0\.3"):
        DoraForCausalLM.from_pretrained(tmp_path / "adapter")


def test_settings_without_an_effect_on_outputs_are_free(base_folder, tmp_path):
    free = {"attention_dropout": 0.1, "use_cache": False, "initializer_range": 0.5, "pad_token_id": 3}
    model = adapter_on(base_folder, "dora", **free)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(DoraForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))


def test_a_model_with_other_weights_than_its_files_is_refused(base_folder):
    expected = {
        "resized": r"model\.embed_tokens\.weight has the shape \(140, 32\) instead of \(128, 32\)",
        "edited": r"model\.embed_tokens\.weight has other values",
        "merged": r"model\.layers\.0\.self_attn\.q_proj\.weight has other values",
        "new head": r"lm_head\.bias is not in the files",
        "random": r"model\.embed_tokens\.weight has other values",
    }
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    for what, model in other_weights(base):
        modules = {name: type(module) for name, module in model.named_modules()}
        for method in ("dora", "mixlora"):
            with pytest.raises(
                ValueError, match=rf"LlamaForCausalLM names '.*base'.*{expected[what]}.*save_pretrained"
            ):
                CAUSAL_LM[method].from_base(model, tiny_config(method))
        assert {name: type(module) for name, module in model.named_modules()} == modules
    with pytest.raises(ValueError, match="has other weights"):  # named by the configuration
        DoraForCausalLM.from_base(tiny_base(seed=3), tiny_config("dora", base_model_name_or_path=str(base_folder)))
    adapted = DoraForCausalLM.from_base(base, tiny_config("dora"))
    assert adapted.config.base_model_name_or_path == str(base_folder)
    assert adapted.config.base_fingerprint == base_fingerprint(base_folder)


def test_a_model_that_cannot_be_compared_is_refused(base_folder, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    monkeypatch.setattr(type(base), "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(ImportError("no kernel")))
    with pytest.raises(ValueError, match=r"cannot be compared .*ImportError: no kernel.*pass that name instead"):
        DoraForCausalLM.from_base(base, tiny_config("dora"))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_model_is_compared_with_what_its_files_become(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    sizes = {"hidden_size": 64, "intermediate_size": 128}
    tiny_base(**sizes).save_pretrained(tmp_path / "base")
    how = BitsAndBytesConfig(load_in_8bit=True)
    if kind == "nf4":
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=how, dtype=torch.float32)
    base.save_pretrained(tmp_path / "quantised")
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")
    assert differing_tensors(quantised, tmp_path / "quantised") == []
    assert differing_tensors(base, tmp_path / "base") == []
    model = DoraForCausalLM.from_base(base, tiny_config("dora"))
    model.save_pretrained(tmp_path / "dora")
    peft = get_peft_model(model.unload(), PeftConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="rounding"):
        merged = peft.merge_and_unload()
    found = differing_tensors(merged, tmp_path / "base")
    assert {clause.partition(".v_proj")[0] for clause in found} == {f"model.layers.{i}.self_attn" for i in (0, 1)}
    with pytest.raises(ValueError, match=r"v_proj\.weight has other values"):
        DoraForCausalLM.from_base(merged, tiny_config("dora"))
    loaded = DoraForCausalLM.from_pretrained(tmp_path / "dora", quantization_config=how, dtype=torch.float32)
    with torch.no_grad():
        loaded.base.model.norm.weight += 1
    with pytest.raises(ValueError, match=r"model\.norm\.weight has other values"):
        loaded.save_pretrained(tmp_path / "again")


# ---- what changes later is seen when the adapter is saved ----


def saved_and_loaded(model, folder):
    model.eval()
    before = logits(model)
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    assert torch.equal(logits(loaded), before)
    return loaded


@pytest.mark.parametrize("method", ["dora", "mixlora"])
def test_an_adapter_on_a_merged_base_needs_that_base_saved(method, base_folder, tmp_path):
    first = DoraForCausalLM.from_base(str(base_folder), tiny_config("dora"))
    fill_adapter(first)
    merged = first.merge()
    assert (merged.name_or_path, merged.config.name_or_path) == ("", "")
    second = CAUSAL_LM[method].from_base(merged, tiny_config(method))
    fill_adapter(second)
    assert (second.config.base_model_name_or_path, second.config.base_fingerprint) == (None, UNKNOWN)
    with pytest.raises(ValueError, match=r"base_model_name_or_path=None: an adapter was merged.*save_base\(folder\)"):
        second.save_pretrained(tmp_path / "second")
    assert not (tmp_path / "second").exists()
    second.save_base(tmp_path / "merged")
    with pytest.raises(ValueError, match=r"folder='.*merged': holds the base as it was loaded"):
        second.save_base(tmp_path / "merged")
    loaded = saved_and_loaded(second, tmp_path / "second")
    assert loaded.config.base_model_name_or_path == str(tmp_path / "merged")
    assert loaded.config.base_fingerprint == base_fingerprint(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert not {"output_router_logits", "router_aux_loss_coef"} & config.keys()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(second.unload()))


@pytest.mark.parametrize("kind", ["lora", "dora", "mixlora"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_embeddings_that_were_resized_and_trained(kind, family, tmp_path):
    """Untied and tied. The adapter names the base that has them, or is not saved."""
    tiny_base(family).save_pretrained(tmp_path / "base")
    tokenizer = byte_tokenizer()
    config = LoraConfig(r=4) if kind == "lora" else tiny_config(kind)
    model = {"lora": LoraForCausalLM, **CAUSAL_LM}[kind].from_base(str(tmp_path / "base"), config)
    fill_adapter(model)
    model.resize_token_embeddings(len(tokenizer))
    weight = model.get_input_embeddings().weight.requires_grad_(True)
    ids = torch.tensor([[130, 258, 257, 5]])
    model(ids, labels=ids).loss.backward()
    torch.optim.AdamW([weight], 1e-2).step()
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has the shape \(259, 32\).*call save_base\(folder\)"):
        model.save_pretrained(tmp_path / "adapter", tokenizer=tokenizer)
    assert not (tmp_path / "adapter").exists()
    model.save_base(tmp_path / "resized")
    model.save_pretrained(tmp_path / "adapter", tokenizer=tokenizer)
    again = {"lora": AutoModelForCausalLM, **CAUSAL_LM}[kind].from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(
        logits(again, ids), logits(model.eval(), ids), rtol=0, atol=1e-5 if kind == "lora" else 0
    )


def test_a_change_of_the_base_is_seen_at_every_saving(base_folder, tmp_path):
    """After from_base, after loading, and after an earlier saving; by whatever way the values changed."""
    model = DoraForCausalLM.from_base(str(base_folder), tiny_config("dora"))
    saved_and_loaded(model, tmp_path / "first")
    loaded = DoraForCausalLM.from_pretrained(tmp_path / "first")
    saved_and_loaded(loaded, tmp_path / "second")
    for changed in (model, loaded, DoraForCausalLM.from_pretrained(tmp_path / "first")):
        changed.base.model.layers[1].mlp.up_proj.base_layer.weight.data[3, 4] += 1e-3
        with pytest.raises(ValueError, match=rf"{UP} has other values"):
            changed.save_pretrained(tmp_path / "third")
        changed.base.model.layers[1].mlp.up_proj.base_layer.weight.data.copy_(tiny_base().get_parameter(UP))
        changed.save_pretrained(tmp_path / "third")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["base.model.norm.weight"] += 1
    with pytest.raises(ValueError, match=r"model\.norm\.weight has other values"):
        model.save_pretrained(tmp_path / "third", state_dict=state)
    model.config.base_model_name_or_path = str(tmp_path / "other")
    tiny_base(seed=2).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"files of '.*other'.*has other values"):
        model.save_pretrained(tmp_path / "third")


def test_a_cast_is_no_change(base_folder, tmp_path):
    model = DoraForCausalLM.from_base(str(base_folder), tiny_config("dora")).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    model.to(torch.float32).save_pretrained(tmp_path / "whole")


def test_saving_reads_the_files_of_an_unchanged_base_once(base_folder, tmp_path, monkeypatch):
    from minilora_hub.remote_code import saving

    compared = []
    real = saving.differing_tensors
    monkeypatch.setattr(saving, "differing_tensors", lambda *a: compared.append(a) or real(*a))
    model = DoraForCausalLM.from_base(str(base_folder), tiny_config("dora"))
    for _ in range(2):
        model.save_pretrained(tmp_path / "out")
    assert len(compared) == 0  # it was loaded by its name
    loaded = DoraForCausalLM.from_pretrained(tmp_path / "out")
    for _ in range(2):
        loaded.save_pretrained(tmp_path / "out")
    assert len(compared) == 1
    handed_in = DoraForCausalLM.from_base(AutoModelForCausalLM.from_pretrained(base_folder), tiny_config("dora"))
    handed_in.save_pretrained(tmp_path / "out")
    assert len(compared) == 2


def test_digests_see_every_change_of_a_value():
    base = tiny_base()
    before = tensor_digests(base)
    assert same_digests(before, tensor_digests(copy.deepcopy(base)))
    for name, parameter in base.named_parameters():
        value = parameter.detach().clone()
        swapped = value.flatten().roll(1).view_as(value) if value.std() > 0 else value * 2
        for changed in (value + torch.eye(1).new_tensor(1e-3), swapped, value.bfloat16()):
            parameter.data = changed
            assert not same_digests(before, tensor_digests(base)), name
        parameter.data = value
    assert same_digests(before, tensor_digests(base))


# ---- tokens that the base does not know ----


def test_a_tokenizer_with_more_tokens_than_the_base_is_not_saved(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model = DoraForCausalLM.from_base(str(tmp_path / "base"), tiny_config("dora"))
    more = byte_tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    with pytest.raises(ValueError, match=r"token '<tool>' has the id 259, but the base's embedding has 259 rows"):
        model.save_pretrained(tmp_path / "adapter", tokenizer=more)
    assert not (tmp_path / "adapter").exists()
    more.save_pretrained(tmp_path / "base")  # as with a base whose own tokenizer has a token that is never used
    model.save_pretrained(tmp_path / "adapter", tokenizer=more)


def test_an_unnamed_base_is_saved_without_a_name(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "config.json").read_text())["base_model_name_or_path"] is None
    unknown = MixLoraForCausalLM.from_base(tiny_base(), tiny_config("mixlora", base_model_name_or_path="org/elsewhere"))
    unknown.save_pretrained(tmp_path / "unknown")
    assert unknown.config.base_fingerprint == UNKNOWN


def test_files_that_are_not_there_are_told(base_folder, tmp_path, caplog):
    """A model from a GGUF file, or from a cache elsewhere: nothing to compare it with."""
    from transformers.utils import logging

    base = AutoModelForCausalLM.from_pretrained(base_folder)
    (base_folder / CHECKPOINT).rename(base_folder / "model.gguf")
    library = logging.get_logger("transformers")
    library.addHandler(caplog.handler)
    try:
        model = DoraForCausalLM.from_base(base, tiny_config("dora"))
    finally:
        library.removeHandler(caplog.handler)
    assert f"The files of '{base_folder}' are not on this machine, so it was not checked" in caplog.text
    with pytest.raises(ValueError, match=r"cannot be compared with them \(OSError: .*call save_base\(folder\)"):
        model.save_pretrained(tmp_path / "adapter")
    model.save_base(tmp_path / "saved")
    saved_and_loaded(model, tmp_path / "adapter")


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "its_own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_base_with_code_of_its_own_is_compared_too(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "own.py").write_text(CODE)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"model_type": "its_own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    assert differing_tensors(base, tmp_path / "base") == []
    DoraForCausalLM.from_base(base, tiny_config("dora")).save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    base.model.norm.weight.data += 1
    with pytest.raises(ValueError, match=r"names '.*base'.*model\.norm\.weight has other values"):
        DoraForCausalLM.from_base(base, tiny_config("dora"))
