"""What PEFT's own tests ask of a method, and MIXLORA once failed; and that the other methods do not notice MIXLORA.

`tests/engines/peft_suite.py` runs PEFT's tests themselves.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftMixedModel, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.tuners_utils import inspect_matched_modules
from safetensors.torch import load_file
from tiny import logits, tiny_base, token_ids
from tiny_peft import STRATEGIES, adapter_tensors, fill, lora, mixlora, peft_model
from torch import nn

from minilora_hub.integrations.peft.layer import MixLoraLayer

# ---- other methods ----


def saved(config, folder, seed):
    model = get_peft_model(tiny_base(), config)
    fill(model, seed=seed)
    model.save_pretrained(folder)


def test_a_mixed_model_of_pefts_loads_its_adapters(tmp_path):
    """LoRA and LoHa together give the base with both of their changes merged into its weights."""
    saved(lora(), tmp_path / "lora", 1)
    saved(LoHaConfig(r=2, target_modules=["q_proj", "up_proj"]), tmp_path / "loha", 2)
    mixed = PeftMixedModel.from_pretrained(tiny_base(), tmp_path / "lora", "lora")
    mixed.load_adapter(tmp_path / "loha", "loha")
    mixed.set_adapter(["lora", "loha"])
    merged = PeftModel.from_pretrained(tiny_base(), tmp_path / "lora").merge_and_unload()
    merged = PeftModel.from_pretrained(merged, tmp_path / "loha").merge_and_unload()
    torch.testing.assert_close(logits(mixed), logits(merged), atol=1e-4, rtol=1e-4)
    assert (logits(mixed) - logits(tiny_base())).abs().max() > 0.1


def test_a_mixed_model_does_not_take_a_mixlora():
    mixed = get_peft_model(tiny_base(), lora(), mixed=True)
    with pytest.raises(ValueError, match=r"MIXLORA.* not supported|not compatible"):
        mixed.add_adapter("mixlora", mixlora())
    assert list(mixed.peft_config) == ["default"]


def test_prompt_tuning_loads_a_second_adapter(tmp_path):
    """A method whose model has no tuner."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny_base(), config).eval()
    model.save_pretrained(tmp_path)
    want = logits(model)
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert torch.equal(logits(model), want)


def test_what_is_no_model_is_refused_by_peft_itself(tmp_path):
    saved(lora(), tmp_path, 1)
    with pytest.raises(AttributeError, match="NoneType"):
        PeftModel.from_pretrained(None, tmp_path)


# ---- names ----

BLOCKS = {"model.layers.0.mlp", "model.layers.1.mlp"}


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("layers", [r"\d+", "1"])
def test_a_regular_expression_that_names_a_block_is_a_list_that_does(family, layers):
    chosen = None if layers == r"\d+" else 1
    by_list = peft_model(base=tiny_base(family), target_modules=["mlp"], layers_to_transform=chosen)
    by_expression = peft_model(base=tiny_base(family), target_modules=rf".*\.{layers}\.mlp")
    assert by_list.base_model.targeted_module_names == by_expression.base_model.targeted_module_names
    assert torch.equal(logits(by_list), logits(by_expression))
    assert adapter_tensors(by_list).keys() == adapter_tensors(by_expression).keys()


@pytest.mark.parametrize("excluded", [["mlp"], r".*\.mlp"])
def test_an_excluded_block_is_left_out_whole(excluded):
    """Also where its linears are named themselves."""
    with pytest.raises(ValueError, match="needs at least one projection of a feed-forward block"):
        peft_model(exclude_modules=excluded)
    one = peft_model(exclude_modules=["model.layers.0.mlp"])
    assert {name.split(".moe_lora")[0] for name in adapter_tensors(one) if ".mlp." in name} == {
        "base_model.model.model.layers.1.mlp"
    }


def test_an_exclusion_that_excludes_nothing_is_told():
    with pytest.warns(UserWarning, match=r"exclude_modules=\['wq'\]: excludes no module"):
        peft_model(exclude_modules=["wq"])


def test_a_lora_beside_that_matches_nothing_is_an_error():
    model = peft_model()
    with pytest.raises(ValueError, match=r"target_modules=\{'wq'\}: matches no linear"):
        model.add_adapter("lora", lora(target_modules=["wq"]))
    assert list(model.peft_config) == ["default"]


def test_the_targets_can_be_inspected():
    found = inspect_matched_modules(peft_model(target_modules=["mlp", "q_proj"]).base_model)
    assert set(found["matched"]) == BLOCKS | {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}


# ---- shapes ----


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_every_layer_says_its_shape(family):
    """A block maps the hidden size to itself; GPT-2's linears have no `in_features`."""
    base, model = tiny_base(family), peft_model(base=tiny_base(family))
    layers = {
        name: module for name, module in model.base_model.model.named_modules() if isinstance(module, MixLoraLayer)
    }
    assert layers
    for name, layer in layers.items():
        x = torch.zeros(1, layer.in_features)
        assert base.get_submodule(name)(x).shape == (1, layer.out_features), name


# ---- what is refused ----


def test_a_bias_that_is_set_later_is_refused_too():
    """PEFT would train every bias, and the adapter's file would hold none."""
    config, base = mixlora(), tiny_base("phi")
    config.bias = "all"
    with pytest.raises(ValueError, match=r"bias='all': must be \"none\""):
        get_peft_model(base, config)
    assert all(parameter.requires_grad for parameter in base.parameters())


# ---- a second adapter beside what PEFT trains whole ----


def train_tokens(model, name):
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "trainable_tokens_delta" in key and key.endswith(name):
                parameter.mul_(-1)


@pytest.mark.parametrize("tied", [False, True])
def test_a_second_adapter_beside_trainable_tokens(tied, tmp_path):
    def alone(name, **fields):
        model = get_peft_model(tiny_base(tie_word_embeddings=tied), mixlora(**fields), adapter_name=name)
        fill(model, name, len(name))
        train_tokens(model, name)
        return model.eval()

    fields = {"one": {"trainable_token_indices": [3, 5]}, "three": {"trainable_token_indices": [4]}, "plain": {}}
    want = {name: logits(alone(name, **given)) for name, given in fields.items()}
    model = alone("one", **fields["one"])
    for name in ("three", "plain"):
        model.add_adapter(name, mixlora(**fields[name]))
        fill(model, name, len(name))
        train_tokens(model, name)
    for name in ("plain", "three", "one"):
        model.set_adapter(name)
        assert torch.equal(logits(model), want[name]), name
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(tiny_base(tie_word_embeddings=tied)))
    model.save_pretrained(tmp_path, selected_adapters=["three"])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["three"]
    assert any("token" in key for key in load_file(tmp_path / "three/adapter_model.safetensors"))
    loaded = alone("one", **fields["one"])
    loaded.load_adapter(tmp_path / "three", "three")
    for name in ("three", "one"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), want[name]), name
    model.set_adapter("plain")
    model.delete_adapter("one")
    assert torch.equal(logits(model), want["plain"])


def test_a_second_adapter_beside_modules_to_save():
    model = peft_model(modules_to_save=["lm_head"])
    want = logits(peft_model(name="other"))
    model.add_adapter("other", mixlora())
    fill(model, "other")
    model.set_adapter("other")
    assert torch.equal(logits(model), want)


def test_what_is_trained_whole_cannot_be_adapted():
    model = peft_model(modules_to_save=["q_proj"])
    before, want = set(model.state_dict()), logits(model)
    message = r"model\.layers\.0\.self_attn\.q_proj cannot be adapted: .*q_proj is in modules_to_save of \['default'\]"
    with pytest.raises(ValueError, match=message):
        model.add_adapter("other", mixlora())
    assert set(model.state_dict()) == before
    assert torch.equal(logits(model), want)
    model.add_adapter("other", mixlora(exclude_modules=["q_proj"]))


def test_what_is_trained_of_the_base_stays_so():
    """A further adapter leaves alone what was frozen or not, and which adapter is active."""
    model = peft_model()
    norm = model.base_model.model.model.norm.weight.requires_grad_(True)
    router = model.base_model.model.model.layers[0].mlp.current.router.requires_grad_(False)
    model.add_adapter("other", mixlora())
    assert norm.requires_grad
    assert not router.requires_grad
    assert model.active_adapter == "default"
    assert model.active_adapters == ["default"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".other." in name)


# ---- disabled, deleted ----


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_disabled_in_training_is_the_base(strategy):
    """The outputs and the loss, too: no router loss is added, and no class of outputs is changed."""
    base, model = tiny_base().train(), peft_model(routing_strategy=strategy, router_aux_loss_coef=0.5).train()
    want = base(token_ids(), labels=token_ids())
    with model.disable_adapter():
        got = model(token_ids(), labels=token_ids())
    assert type(got) is type(want)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.logits, want.logits)
    assert model(token_ids(), labels=token_ids()).loss > got.loss + 0.1


def test_the_last_adapter_leaves_nothing_in_the_configuration():
    base = tiny_base()
    before = base.config.to_dict()
    model = peft_model(base=base, router_aux_loss_coef=0.5)
    model.delete_adapter("default")
    assert base.config.to_dict() == before
    assert model.active_adapters == []
    assert torch.equal(logits(base), logits(tiny_base()))


# ---- dtypes ----

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_in_half_precision(dtype, cast, autocast):
    """Forward and backward of both of two adapters on a base of `dtype`, near what float32 gives."""
    full = logits(peft_model(use_dora=True))
    model = get_peft_model(tiny_base().to(dtype), mixlora(use_dora=True), autocast_adapter_dtype=cast)
    model.add_adapter("other", lora(), autocast_adapter_dtype=cast)
    for name in ("default", "other"):
        fill(model, name)
        tensors = adapter_tensors(model, name)
        exact = {key for key in tensors if "magnitude" in key}
        assert {tensors[key].dtype for key in tensors.keys() - exact} == {torch.float32 if cast else dtype}
        assert {tensors[key].dtype for key in exact} <= {torch.float32}
        model.set_adapter(name)
        with torch.autocast("cpu", dtype=dtype if dtype in HALF else torch.bfloat16, enabled=autocast):
            outputs = model.eval()(token_ids(), labels=token_ids())
            if name == "default":  # by token, for one that is between two experts may take another
                error = (outputs.logits.float() - full).abs().amax(-1).median() / full.abs().max()
                assert error < (0.05 if autocast or dtype != torch.float32 else 1e-6)
            outputs.loss.backward()
        gradients = [p.grad for key, p in model.named_parameters() if f".{name}." in key]
        assert gradients
        assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


def test_pefts_own_configuration_of_a_lora_is_not_changed():
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft_model().add_adapter("lora", config)
    assert type(config) is LoraConfig
    assert config.peft_type == peft.PeftType.LORA


# ---- models from elsewhere ----


class Classifier(nn.Module):
    """Decoder layers in a model that is not one of transformers' classes: token ids -> two classes."""

    def __init__(self):
        super().__init__()
        base = tiny_base(head=False)
        self.config, self.decoder, self.classifier = base.config, base, nn.Linear(32, 2)

    def forward(self, ids):
        return self.classifier(self.decoder(ids).last_hidden_state.mean(dim=1))


def test_a_model_that_is_not_of_transformers(tmp_path):
    torch.manual_seed(0)
    plain = Classifier().eval()
    base, ids = copy.deepcopy(plain), token_ids()
    model = get_peft_model(copy.deepcopy(plain), mixlora(task_type=None, modules_to_save=["classifier"]))
    torch.testing.assert_close(model(ids), plain(ids), atol=1e-5, rtol=1e-5)  # fresh
    fill(model)
    want = model.eval()(ids)
    assert (want - plain(ids)).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(ids), want)
