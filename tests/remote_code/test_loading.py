"""Saving and loading: what is in the folder, bit-equality, and a clear error for everything that can be wrong."""

import copy
import json
import os
import struct
from importlib.util import find_spec

import pytest
import torch
from formats.helpers import edit_json
from safetensors.torch import load_file, save_file
from tiny import CAUSAL_LM, METHODS, logits, tiny_base, tiny_config, tiny_model, token_ids
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import minilora_hub
from minilora_hub import DoraConfig, DoraForCausalLM, MixLoraConfig, MixLoraForCausalLM
from minilora_hub.remote_code import adapter_files
from minilora_hub.remote_code.adapter_files import CODE_FILES, base_fingerprint

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base_folder(tmp_path):
    """A base on disk, so that configurations can name it."""
    folder = tmp_path / "base"
    tiny_base().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tmp_path):
    """A saved DoRA whose base is handed in when it is loaded."""
    folder = tmp_path / "adapter"
    tiny_model().save_pretrained(folder)
    return folder


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# ---- what is written ----


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_holds_the_adapter_and_its_code_only(method, tmp_path):
    model = tiny_model("llama", method)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", WEIGHTS, "generation_config.json", *CODE_FILES}
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors.keys() == model.adapter_parameters().keys()
    assert sum(tensor.numel() for tensor in tensors.values()) == model.num_adapter_parameters()


def test_config_json_names_every_field_and_no_folder_of_this_machine(base_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = MixLoraForCausalLM.from_base(base, tiny_config("mixlora", base_model_name_or_path="org/base"))
    model.config.use_cache = False  # as Trainer does
    model.save_pretrained(tmp_path / "out")
    text = (tmp_path / "out" / "config.json").read_text()
    assert str(tmp_path) not in text
    saved = json.loads(text)
    for field in (
        "r",
        "lora_alpha",
        "lora_dropout",
        "num_experts_per_tok",
        "format_version",
        "target_modules",
        "use_dora",
    ):
        assert field in saved
    assert saved["text_config"]["model_type"] == "llama"
    assert not {"top_k", "top_p", "temperature", "use_cache", "quantization_config"} & saved.keys()
    assert saved["auto_map"]["AutoModelForCausalLM"] == "modeling_minilora.MixLoraForCausalLM"


def test_a_failed_write_leaves_the_old_file(adapter, monkeypatch):
    before = (adapter / WEIGHTS).read_bytes()
    monkeypatch.setattr(adapter_files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        tiny_model(r=8).save_pretrained(adapter)
    assert (adapter / WEIGHTS).read_bytes() == before
    assert not list(adapter.glob("*.tmp"))


# ---- bit-equality and dtypes ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_model_gives_bit_equal_logits(method, dtype, base_folder, tmp_path):
    minilora_hub.register()
    model = CAUSAL_LM[method].from_base(str(base_folder), tiny_config(method), dtype=dtype, adapter_dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            if "magnitude" not in name:
                parameter.normal_(0, 0.2)
    model.eval()
    before = logits(model)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is CAUSAL_LM[method]
    assert loaded.dtype == loaded.base.dtype == dtype
    assert not loaded.training
    for name, parameter in loaded.adapter_parameters().items():
        assert parameter.dtype == (torch.float32 if name.endswith("magnitude") else dtype), name
    assert torch.equal(logits(loaded), before)
    body = AutoModel.from_pretrained(tmp_path / "out")
    assert type(body).__name__ == type(loaded).__name__.replace("ForCausalLM", "Model")


def test_dtype_applies_to_base_and_adapter_but_not_to_the_magnitude(base_folder, tmp_path):
    model = DoraForCausalLM.from_base(str(base_folder), tiny_config("dora"))
    model.save_pretrained(tmp_path / "out")
    loaded = DoraForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    kinds = {name.rsplit(".", 1)[1]: p.dtype for name, p in loaded.adapter_parameters().items()}
    assert kinds == {"lora_A": torch.bfloat16, "lora_B": torch.bfloat16, "magnitude": torch.float32}
    assert loaded.base.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["dora", "mixdora"])
def test_casting_keeps_the_magnitude_exact(method):
    model = tiny_model("llama", method)
    before = {n: p.detach().clone() for n, p in model.adapter_parameters().items() if n.endswith("magnitude")}
    model.to(torch.bfloat16)
    after = model.adapter_parameters()
    assert after["layers.0.self_attn.q_proj.lora_A"].dtype == torch.bfloat16
    assert before
    for name, tensor in before.items():
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], tensor)
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attn_implementation_reaches_the_base(implementation, base_folder, tmp_path):
    minilora_hub.register()
    DoraForCausalLM.from_base(str(base_folder), tiny_config("dora")).save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation=implementation)
    assert loaded.base.config._attn_implementation == implementation
    assert loaded.config._attn_implementation == implementation
    loaded.set_attn_implementation("eager")
    assert loaded.base.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"fusion_config": {"no such fusion": True}}, "Unknown fusion type: no such fusion"),
        pytest.param(
            {"use_kernels": True},
            "Kernels are not available",
            marks=pytest.mark.skipif(find_spec("kernels") is not None, reason="tests the error without the package"),
        ),
    ],
)
def test_what_changes_the_bases_modules_reaches_it(argument, words, base_folder, tmp_path):
    """The base's own error shows it: an argument that nobody reads would change nothing, in silence."""
    minilora_hub.register()
    DoraForCausalLM.from_base(str(base_folder), tiny_config("dora")).save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", **argument)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the error that a machine without a GPU gives")
def test_flash_attention_without_a_gpu_is_transformers_own_error(base_folder, tmp_path):
    minilora_hub.register()
    DoraForCausalLM.from_base(str(base_folder), tiny_config("dora")).save_pretrained(tmp_path / "out")
    with pytest.raises((ImportError, ValueError), match=r"[Ff]lash"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="flash_attention_2")


def test_the_adapters_own_generation_settings_are_loaded(base_folder, tmp_path):
    model = DoraForCausalLM.from_base(str(base_folder), tiny_config("dora"))
    model.generation_config.update(temperature=0.3, do_sample=True)
    model.save_pretrained(tmp_path / "out")
    loaded = DoraForCausalLM.from_pretrained(tmp_path / "out")
    assert (loaded.generation_config.temperature, loaded.base.generation_config.do_sample) == (0.3, True)
    os.remove(tmp_path / "out" / "generation_config.json")
    bare = DoraForCausalLM.from_pretrained(tmp_path / "out")
    assert bare.generation_config.to_dict() == tiny_base().generation_config.to_dict() | {
        "_from_model_config": bare.generation_config.to_dict().get("_from_model_config")
    }


# ---- which base ----


def test_base_model_and_base_revision_override_the_configuration(base_folder, tmp_path, monkeypatch):
    DoraForCausalLM.from_base(str(base_folder), tiny_config("dora")).save_pretrained(tmp_path / "out")
    edit_json(tmp_path / "out" / "config.json", base_model_name_or_path="org/unreachable", base_model_revision="abc")
    loaded = DoraForCausalLM.from_pretrained(tmp_path / "out", base_model=base_folder)
    assert loaded.config.base_model_name_or_path == str(base_folder)
    asked = {}

    def record(name, **arguments):
        asked.update(arguments, name=name)
        raise OSError("stop here")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", record)
    with pytest.raises(OSError, match=r"org/unreachable.*stop here.*\n.*base_model="):
        DoraForCausalLM.from_pretrained(tmp_path / "out", base_revision="v2", device_map="cpu", token="hf_x")
    assert asked["name"] == "org/unreachable"
    assert asked["revision"] == "v2"
    assert asked["trust_remote_code"] is False
    assert asked["device_map"] == "cpu"
    assert asked["token"] == "hf_x"


def test_the_adapters_revision_does_not_reach_the_base(base_folder, tmp_path, monkeypatch):
    DoraForCausalLM.from_base(str(base_folder), tiny_config("dora")).save_pretrained(tmp_path / "out")
    real, asked = AutoModelForCausalLM.from_pretrained, {}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda n, **a: asked.update(a) or real(n, **a))
    DoraForCausalLM.from_pretrained(tmp_path / "out", revision="v7", trust_remote_code=True)
    assert asked["revision"] is None
    assert asked["trust_remote_code"] is False


def test_a_base_with_its_own_code_needs_its_own_trust(base_folder, tmp_path):
    edit_json(
        base_folder / "config.json", model_type="its_own", auto_map={"AutoModelForCausalLM": "x.Y", "AutoConfig": "x.Z"}
    )
    tiny_model().save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="base_trust_remote_code=True"):
        DoraForCausalLM.from_pretrained(tmp_path / "out", base_model=base_folder, trust_remote_code=True)


def test_another_base_than_trained_on_is_a_warning_that_says_both(base_folder, tmp_path):
    DoraForCausalLM.from_base(str(base_folder), tiny_config("dora")).save_pretrained(tmp_path / "out")
    trained_on = base_fingerprint(base_folder)
    assert trained_on.startswith("sha256:")
    other = tmp_path / "other"
    tiny_base(seed=9).save_pretrained(other)
    with pytest.warns(UserWarning, match=f"{trained_on}.*{base_fingerprint(other)}"):
        DoraForCausalLM.from_pretrained(tmp_path / "out", base_model=other)


def test_the_fingerprint_does_not_depend_on_dtype_or_folder(base_folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for file in base_folder.iterdir():
        (tmp_path / "elsewhere" / file.name).write_bytes(file.read_bytes())
    assert base_fingerprint(tmp_path / "elsewhere") == base_fingerprint(base_folder)
    for dtype in (torch.float32, torch.bfloat16):
        model = DoraForCausalLM.from_base(str(base_folder), tiny_config("dora"), dtype=dtype)
        assert model.config.base_fingerprint == base_fingerprint(base_folder)
    sharded = tmp_path / "sharded"
    tiny_base().save_pretrained(sharded, max_shard_size="20KB")
    assert base_fingerprint(sharded).startswith("sha256:")
    assert base_fingerprint(tmp_path) == "unknown"


def test_a_base_that_is_not_named_must_be_passed(adapter):
    with pytest.raises(ValueError, match="names no base; pass base_model="):
        DoraForCausalLM.from_pretrained(adapter)


# ---- strict loading: the error names the thing, and a base that is handed in stays as it was ----


def assert_refused(folder, match, base=None, kind=ValueError):
    base = tiny_base() if base is None else base
    before, modules = logits(base), {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(kind, match=match):
        DoraForCausalLM.from_pretrained(folder, base_model=base)
    assert torch.equal(logits(base), before)
    assert {name: type(module) for name, module in base.named_modules()} == modules
    assert all(parameter.requires_grad for parameter in base.parameters())


NAME = "layers.1.mlp.down_proj.lora_A"


def test_a_missing_tensor(adapter):
    edit_weights(adapter, lambda tensors: tensors.pop(NAME))
    assert_refused(adapter, f"missing {NAME}")


def test_a_surplus_tensor(adapter):
    edit_weights(adapter, lambda tensors: tensors.update({"layers.9.extra": torch.ones(1)}))
    assert_refused(adapter, r"surplus layers\.9\.extra")


def test_a_misshapen_tensor(adapter):
    edit_weights(adapter, lambda tensors: tensors.update({NAME: torch.ones(4, 47)}))
    assert_refused(adapter, rf"{NAME} has shape \(4, 47\).*require \(4, 48\)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite(adapter, value):
    edit_weights(adapter, lambda tensors: tensors[NAME].view(-1).__setitem__(5, value))
    assert_refused(adapter, f"{NAME} holds values that are not finite")


def test_a_tensor_of_integers(adapter):
    edit_weights(adapter, lambda tensors: tensors.update({NAME: torch.ones(4, 48, dtype=torch.int64)}))
    assert_refused(adapter, rf"{NAME} has dtype torch\.int64")


@pytest.mark.parametrize("keep", [0, 5, 2000, -1])
def test_a_truncated_file(adapter, keep):
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[:keep])
    assert_refused(adapter, rf"{WEIGHTS}: not a readable safetensors file")


def test_a_header_that_claims_a_terabyte(adapter):
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 40) + content[8:])
    assert_refused(adapter, "not a readable safetensors file")


def test_a_missing_file(adapter):
    os.remove(adapter / WEIGHTS)
    assert_refused(adapter, WEIGHTS, kind=OSError)


def test_a_base_of_the_wrong_shape(adapter):
    assert_refused(
        adapter, r"layers\.0\.mlp\.gate_proj\.lora_B has shape \(48, 4\).*\(64, 4\)", tiny_base(intermediate_size=64)
    )


def test_an_error_names_adapter_and_base(adapter, base_folder, tmp_path):
    other = tmp_path / "other-base"
    tiny_base(num_hidden_layers=3).save_pretrained(other)
    with pytest.raises(ValueError, match=rf"adapter '{adapter}' on base '{other}': .*missing layers\.2"):
        DoraForCausalLM.from_pretrained(adapter, base_model=str(other))


@pytest.mark.parametrize(("method", "other"), [("dora", "mixlora"), ("mixlora", "dora")])
def test_a_configuration_of_the_other_method_is_refused(method, other):
    base = tiny_base()
    need = type(tiny_config(method)).__name__
    with pytest.raises(ValueError, match=rf"config={type(tiny_config(other)).__name__}.*requires a {need}"):
        CAUSAL_LM[method].from_base(base, tiny_config(other))
    assert torch.equal(logits(base), logits(tiny_base()))


def test_a_base_of_another_depth(adapter):
    assert_refused(adapter, r"missing layers\.2", tiny_base(num_hidden_layers=3))


def test_a_newer_format_version(adapter):
    edit_json(adapter / "config.json", format_version=5)
    with pytest.raises(ValueError, match=r"format_version=5: .*1 to 4.*update"):
        DoraForCausalLM.from_pretrained(adapter, base_model=tiny_base())


def test_unknown_targets():
    base = tiny_base()
    with pytest.raises(ValueError, match=r"target_modules=\['w1'\].*'mlp\.gate_proj'"):
        DoraForCausalLM.from_base(base, DoraConfig(target_modules=["q_proj", "w1"]))
    with pytest.raises(ValueError, match=r"rank_pattern\['nope'\]"):
        DoraForCausalLM.from_base(base, DoraConfig(rank_pattern={"nope": 2}))
    with pytest.raises(ValueError, match=r"at least one projection of the feed-forward"):
        MixLoraForCausalLM.from_base(base, MixLoraConfig(target_modules=["q_proj"]))
    assert torch.equal(logits(base), logits(tiny_base()))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapted_base_is_refused(method):
    from peft import LoraConfig, get_peft_model

    ours = tiny_model("llama", method)
    theirs = get_peft_model(tiny_base(), LoraConfig(r=2, target_modules=["q_proj"]))
    for adapted in (ours, ours.base, theirs, theirs.get_base_model()):
        before = logits(adapted)
        with pytest.raises(ValueError, match=r"already carries an adapter.*unload\(\)"):
            CAUSAL_LM[method].from_base(adapted, tiny_config(method))
        assert torch.equal(logits(adapted), before)


def test_arguments_for_loading_are_refused_with_a_loaded_base():
    with pytest.raises(ValueError, match=r"\['dtype'\]"):
        DoraForCausalLM.from_base(tiny_base(), tiny_config("dora"), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="keyword arguments only"):
        DoraForCausalLM.from_pretrained("x", 1)


def test_no_network_says_what_to_do(tmp_path):
    tiny_model(base_model_name_or_path="org/never-seen").save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"(?s)'org/never-seen' could not be loaded.*What to do: pass base_model="):
        DoraForCausalLM.from_pretrained(tmp_path, local_files_only=True)


# ---- register ----


def test_register_is_idempotent_and_needs_no_trust(base_folder, tmp_path):
    minilora_hub.register()
    minilora_hub.register()
    DoraForCausalLM.from_base(str(base_folder), tiny_config("dora")).save_pretrained(tmp_path / "out")
    assert type(AutoConfig.from_pretrained(tmp_path / "out")) is DoraConfig
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert type(model) is DoraForCausalLM


@pytest.mark.parametrize("method", METHODS)
def test_deepcopy_and_pickle_free_state_round_trip(method):
    model = tiny_model("llama", method)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    other = tiny_model("llama", method, filled=False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_disk_offload_of_the_base(base_folder, tmp_path):
    """With part of the base on disk its weights are on the meta device: they are called through accelerate's hooks."""
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    whole = {}
    for method in METHODS:
        model = CAUSAL_LM[method].from_base(str(base_folder), tiny_config(method))
        model.save_pretrained(tmp_path / method)
        whole[method] = logits(model)
        offloaded = CAUSAL_LM[method].from_pretrained(
            tmp_path / method, device_map=device_map, offload_folder=tmp_path / "offload"
        )
        assert offloaded.base.model.layers[1].self_attn.o_proj.base_layer.weight.is_meta
        torch.testing.assert_close(logits(offloaded), whole[method], rtol=0, atol=1e-5)
        assert offloaded.generate(token_ids(), max_new_tokens=3, do_sample=False).shape == (2, 12)
