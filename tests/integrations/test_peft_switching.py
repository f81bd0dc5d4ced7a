"""Several adapters on one PeftModel: two MixLoRAs, a LoRA, none, each as if it were alone."""

from __future__ import annotations

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import logits, tiny_base, token_ids
from tiny_peft import adapter_tensors, fill, lora, mixlora, peft_model

from minilora_hub import register

register()

CONFIGS = {
    "one": lambda: mixlora(),
    "two": lambda: mixlora(r=2, num_experts=3, top_k=1, use_dora=True, target_modules=["mlp", "q_proj"]),
    "lora": lambda: lora(),
    "dora": lambda: lora(use_dora=True, use_rslora=True, rank_pattern={"up_proj": 2}),
    "switch": lambda: mixlora(routing_strategy="mixlora-switch", sparse_step=2),
}
SEEDS = {name: seed for seed, name in enumerate(CONFIGS, start=1)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """{name: (logits, folder)} of each adapter alone on a base; the LoRAs in a model whose MixLoRA is not active."""
    found = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(name)
        model = peft_model(CONFIGS["one"](), name="first" if name in ("lora", "dora") else name, seed=SEEDS[name])
        if name in ("lora", "dora"):
            model.add_adapter(name, config())
            model.set_adapter(name)
            fill(model, name, SEEDS[name])
        elif name != "one":
            model = peft_model(config(), name=name, seed=SEEDS[name])
        model.eval()
        model.save_pretrained(folder, selected_adapters=[name])
        found[name] = logits(model), folder / name
    return found


def together(order) -> PeftModel:
    first, *rest = order
    model = get_peft_model(tiny_base(), CONFIGS[first](), adapter_name=first)
    for name in rest:
        model.add_adapter(name, CONFIGS[name]())
    for name in order:
        fill(model, name, SEEDS[name])
    return model.eval()


ORDERS = [["one", "two", "lora", "dora", "switch"], ["switch", "lora", "one", "dora", "two"], ["two", "dora", "one"]]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_each_is_as_if_alone(order, alone):
    model, base = together(order), logits(tiny_base())
    for name in [*order, *reversed(order), *order[::2]]:
        model.set_adapter(name)
        assert torch.equal(logits(model), alone[name][0]), name
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), alone[name][0]), name


def test_the_adapters_differ(alone):
    """Or else the test above would not notice which one is active."""
    values = [value for value, _ in alone.values()]
    for index, value in enumerate(values):
        assert all((value - other).abs().max() > 0.05 for other in values[:index])


def test_loaded_together(alone):
    model = PeftModel.from_pretrained(tiny_base(), alone["two"][1], adapter_name="two")
    for name in ("lora", "one", "dora", "switch"):
        model.load_adapter(alone[name][1], name)
    for name in ("one", "two", "lora", "dora", "switch"):
        model.set_adapter(name)
        assert torch.equal(logits(model), alone[name][0]), name


def test_saved_together(alone, tmp_path):
    together(["one", "two", "lora", "dora", "switch"]).save_pretrained(tmp_path)
    for name, (_, folder) in alone.items():
        expected, got = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / name))
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected), name
        assert (tmp_path / name / "adapter_config.json").read_text() == (folder / "adapter_config.json").read_text()


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_lora_is_pefts_own(name, alone, tmp_path):
    """Its file loads in plain PEFT, and PEFT's file loads here."""
    value, folder = alone[name]
    plain = PeftModel.from_pretrained(tiny_base(), folder)
    assert type(plain.base_model) is peft.LoraModel
    torch.testing.assert_close(logits(plain), value, atol=1e-4, rtol=1e-4)
    plain.save_pretrained(tmp_path)
    model = together(["one", "two"])
    model.load_adapter(tmp_path, name)
    model.set_adapter(name)
    assert torch.equal(logits(model), value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa': a LoRA beside a MixLoRA has"),
        ({"bias": "lora_only"}, r"bias='lora_only': a LoRA beside"),
        ({"target_modules": [], "target_parameters": ["embed"]}, "target_parameters=.*a LoRA beside"),
        ({"target_modules": ["lm_head"]}, "names lm_head"),
    ],
)
def test_what_a_lora_beside_cannot_be_is_named(fields, message):
    model = peft_model()
    want, names = logits(model), set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_adapter("lora", lora(**fields))
    assert torch.equal(logits(model), want)
    assert set(model.state_dict()) == names
    assert list(model.peft_config) == ["default"]


def test_a_lora_has_pefts_own_targets():
    model = peft_model()
    model.add_adapter("plain", peft.LoraConfig(task_type="CAUSAL_LM"))
    assert model.peft_config["plain"].target_modules == {"q_proj", "v_proj"}
    model.add_adapter("many", lora(target_modules=["q_proj", "c_attn", "query_key_value"]))
    assert {name.split(".moe_lora")[0].rpartition(".")[2] for name in adapter_tensors(model, "many")} == {"q_proj"}


def test_what_peft_refuses_late_leaves_the_model_as_it_was():
    model = peft_model()
    want, names = logits(model), set(model.state_dict())
    with pytest.raises(TypeError, match="modules_to_save cannot be applied to modules of type"):
        model.add_adapter("other", mixlora(target_modules=["mlp"], modules_to_save=["q_proj"]))
    assert list(model.peft_config) == ["default"]
    assert set(model.state_dict()) == names
    assert torch.equal(logits(model), want)
    assert all((".default." in name) == p.requires_grad for name, p in model.named_parameters())


def test_a_frozen_adapter_stays_frozen_when_another_goes():
    model = together(["one", "two"])
    model.set_adapter("one", inference_mode=True)
    model.delete_adapter("two")
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_of_loras_stays_pefts():
    model = get_peft_model(tiny_base(), lora())
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("mixlora", mixlora())
    model.add_adapter("another", lora(r=2))
    assert type(model.peft_config["another"]) is peft.LoraConfig


def test_training_one_leaves_the_others(alone):
    model = together(["one", "two", "lora"])
    model.set_adapter("two")
    model.train()
    before = {name: adapter_tensors(model, name) for name in ("one", "two", "lora")}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    for name in ("one", "two", "lora"):
        after = adapter_tensors(model, name)
        same = [torch.equal(before[name][key], after[key]) for key in after]
        assert not any(same) if name == "two" else all(same), name
    assert all((".two." in name) == p.requires_grad for name, p in model.named_parameters())


def test_deleting(alone):
    model = together(["one", "two", "lora"])
    model.delete_adapter("two")  # inactive
    assert model.active_adapters == ["one"]
    assert not adapter_tensors(model, "two")
    assert torch.equal(logits(model), alone["one"][0])
    with pytest.warns(UserWarning, match="Adapter one was active which is now deleted"):
        model.delete_adapter("one")
    assert model.active_adapters == ["lora"]
    assert torch.equal(logits(model), alone["lora"][0])
    assert all((".lora." in name) == p.requires_grad for name, p in model.named_parameters())
    model.delete_adapter("lora")
    assert model.active_adapters == []
    assert torch.equal(logits(model.get_submodule("base_model.model")), logits(tiny_base()))
    model.add_adapter("one", CONFIGS["one"]())
    fill(model, "one", SEEDS["one"])
    model.set_adapter("one")
    assert torch.equal(logits(model.eval()), alone["one"][0])
    with pytest.raises(ValueError, match="two does not exist"):
        model.delete_adapter("two")


def test_an_exclusion_in_a_wrapped_block_is_understood():
    """The linears of a block that carries another adapter already are named as ever, without a false warning."""
    model = peft_model(name="one")
    model.add_adapter("two", mixlora(exclude_modules=["down_proj"], rank_pattern={"gate_proj": 2}))
    assert not any("down_proj" in name for name in adapter_tensors(model, "two"))
    model.add_adapter("lora", lora(exclude_modules=["up_proj"]))
    assert not any("up_proj" in name for name in adapter_tensors(model, "lora"))


def test_one_at_a_time():
    model = together(["one", "two"])
    with pytest.raises(ValueError, match=r"adapter_name=\['one', 'two'\]: one adapter can be active, not 2"):
        model.base_model.set_adapter(["one", "two"])
    assert model.active_adapters == ["one"]
    with pytest.raises(ValueError, match="Adapter three not found"):
        model.set_adapter("three")


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_mixed_batch_is_refused(call):
    model = together(["one", "two"])
    with pytest.raises(ValueError, match=r"adapter_names=\['one', 'two'\]: a MixLoRA serves one adapter per call"):
        getattr(model, call)(input_ids=token_ids(), adapter_names=["one", "two"])


@pytest.mark.parametrize("name", ["mlp", "0", "router", "up_proj", "weight", "a.b"])
def test_a_name_that_would_be_mistaken_for_a_module_is_refused(name):
    model = peft_model(name="one")
    with pytest.raises(ValueError, match=rf"adapter_name='{name}': must not be a part"):
        model.add_adapter(name, mixlora())
    assert list(model.peft_config) == ["one"]


@pytest.mark.parametrize("name", ["mixlora", "lora", "mix", "default", "experts_a"])
def test_natural_names_give_no_warning(name):
    peft_model(name=name).add_adapter("other", mixlora())  # a warning fails a test


# ---- compiled ----


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["base", "peft model"])
@pytest.mark.parametrize("other", [mixlora, pytest.param(lora, marks=pytest.mark.slow)], ids=["same shapes", "a lora"])
def test_switching_when_compiled(whole, other):
    """Adapters of the same shapes share a compiled base's graphs; PEFT's own forward is compiled once per name."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = get_peft_model(tiny_base(), mixlora(), adapter_name="one")
    model.add_adapter("two", other())
    fill(model, "one", 1)
    fill(model, "two", 2)
    model.eval()
    expected = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        expected[name] = logits(model)
    if whole:
        model = torch.compile(model, backend=backend)
    else:
        model.get_base_model().compile(backend=backend)
    counts = []
    for name in ("one", "two", "one", "two"):
        model.set_adapter(name, inference_mode=True)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=token_ids()).logits, expected[name], atol=1e-5, rtol=1e-5)
        counts.append(len(graphs))
    again = whole or other is lora
    assert counts == ([1, 2, 2, 2] if again else [1, 1, 1, 1])
