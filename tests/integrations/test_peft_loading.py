"""A MixLoRA in PEFT's layout from a folder and from a Hub, through PEFT and through stock Auto classes; bad files."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from formats.helpers import edit_json
from hub.server import HubServer
from packaging.version import parse
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from tiny import logits, tiny_base, token_ids
from tiny_peft import STRATEGIES, adapter_tensors, fill, lora, mixlora, peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from minilora_hub import register

register()

FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_base().save_pretrained(folder)
    return folder


def saved(base_folder, folder, **fields):
    model = peft_model(base=AutoModelForCausalLM.from_pretrained(base_folder), **fields)
    model.save_pretrained(folder)
    return logits(model)


# ---- stock Auto classes ----


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_auto_classes_take_the_folder(strategy, base_folder, tmp_path):
    want = saved(base_folder, tmp_path, routing_strategy=strategy, use_dora=True)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), want)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():  # transformers maps the file, and the alignment of what is mapped shows in the last digit
        torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=1e-5)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    assert torch.equal(logits(model), want)


@pytest.mark.skipif(
    parse(MIN_PEFT_VERSION) > parse(peft.__version__), reason=f"this transformers wants peft {MIN_PEFT_VERSION}"
)
def test_transformers_own_adapter_calls(base_folder, tmp_path):
    """load_adapter, add_adapter, set_adapter, disable, enable, save, delete on a plain transformers model."""
    want = saved(base_folder, tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    plain = logits(model)
    model.load_adapter(tmp_path / "one", "one")
    assert torch.equal(logits(model), want)
    with pytest.warns(UserWarning, match="Already found a `peft_config` attribute"):  # PEFT's, for any method
        model.add_adapter(mixlora(r=2), "two")
    fill(model, "two", 2)
    assert model.active_adapters() == ["two"]
    second = logits(model.eval())
    assert (second - want).abs().max() > 0.1
    model.set_adapter("one")
    assert torch.equal(logits(model), want)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    assert torch.equal(logits(model), want)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_base(), tmp_path / "again")), want)
    with pytest.warns(UserWarning, match="Adapter one was active which is now deleted"):
        model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(logits(model), second)
    model.train()
    loss = model(token_ids(), labels=token_ids()).loss
    loss.backward()
    router = model.model.layers[0].mlp.current.router
    assert router.grad.abs().sum() > 0


# ---- over HTTP ----


@pytest.fixture(scope="module")
def hub(base_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = peft_model(base=base)
    model.save_pretrained(folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path="org/base")
    expected = tmp_path_factory.mktemp("expected") / "logits.pt"
    torch.save({"ids": token_ids(), "logits": logits(model)}, expected)
    with HubServer() as server:
        for repo, source in (("org/base", base_folder), ("author/mixlora", folder)):
            server.add_repo(repo, files={path.name: path.read_bytes() for path in Path(source).iterdir()})
        yield server, expected


LOAD = """
import sys, torch, minilora_hub
from transformers import AutoModelForCausalLM
from peft import AutoPeftModelForCausalLM, PeftModel
minilora_hub.register()
expected = torch.load(sys.argv[1])
base = AutoModelForCausalLM.from_pretrained("org/base")
for model in (
    AutoModelForCausalLM.from_pretrained("author/mixlora"),
    AutoPeftModelForCausalLM.from_pretrained("author/mixlora"),
    PeftModel.from_pretrained(base, "author/mixlora"),
):
    with torch.no_grad():
        got = model(input_ids=expected["ids"]).logits
        torch.testing.assert_close(got, expected["logits"], atol=1e-5, rtol=1e-5)
model.push_to_hub("author/again")
with torch.no_grad():
    again = AutoModelForCausalLM.from_pretrained("author/again")(input_ids=expected["ids"]).logits
torch.testing.assert_close(again, expected["logits"], atol=1e-5, rtol=1e-5)
print("all equal")
"""


@pytest.mark.slow
def test_from_a_hub(hub, tmp_path):
    import subprocess
    import sys

    server, expected = hub
    environment = server.environment(token=server.add_user("author"), cache_dir=tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(expected)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "all equal"


# ---- files that do not fit ----

SPOILT = {
    "a missing router": (
        lambda t: t.pop("base_model.model.model.layers.1.mlp.moe_lora.router"),
        r"missing model\.layers\.1\.mlp\.moe_lora\.router",
    ),
    "a missing expert": (
        lambda t: t.pop("base_model.model.model.layers.0.mlp.moe_lora.experts.up_proj.lora_B"),
        r"missing model\.layers\.0\.mlp\.moe_lora\.experts\.up_proj\.lora_B",
    ),
    "a surplus tensor": (
        lambda t: t.update({"base_model.model.model.layers.7.mlp.moe_lora.router": torch.zeros(4, 32)}),
        r"surplus model\.layers\.7\.mlp\.moe_lora\.router",
    ),
    "another shape": (
        lambda t: t.update({"base_model.model.model.layers.0.mlp.moe_lora.router": torch.zeros(5, 32)}),
        r"router has shape \(5, 32\), this configuration and base require \(4, 32\)",
    ),
    "not a number": (
        lambda t: t["base_model.model.model.layers.0.mlp.moe_lora.router"].fill_(float("nan")),
        r"model\.layers\.0\.mlp\.moe_lora\.router holds values that are not finite",
    ),
    "the reference's names": (
        lambda t: t.update({"mixlora.layers.0.mlp.moe_gate.weight": torch.zeros(4, 32)}),
        r"reference's tensor names .* minilora import",
    ),
}


@pytest.fixture(params=SPOILT)
def spoilt(request, base_folder, tmp_path):
    saved(base_folder, tmp_path / "bad")
    change, message = SPOILT[request.param]
    tensors = load_file(tmp_path / "bad" / FILE)
    change(tensors)
    save_file(tensors, tmp_path / "bad" / FILE)
    return tmp_path / "bad", message


def test_a_bad_file_leaves_the_base_as_it_was(spoilt):
    folder, message = spoilt
    base = tiny_base()
    want, modules = logits(base), [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, folder)
    assert [type(module) for module in base.modules()] == modules
    assert torch.equal(logits(base), want)
    assert not hasattr(base, "peft_config")
    assert not base._forward_hooks
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_a_bad_file_leaves_the_other_adapters_as_they_were(spoilt):
    folder, message = spoilt
    model = peft_model(name="good", seed=3)
    want, before = logits(model), set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.load_adapter(folder, "bad")
    assert set(model.state_dict()) == before
    assert list(model.peft_config) == ["good"]
    assert model.active_adapters == ["good"]
    assert torch.equal(logits(model), want)
    assert all((".good." in name) == p.requires_grad for name, p in model.named_parameters())


def test_a_bad_file_for_an_adapter_that_is_there_changes_nothing_of_it(spoilt):
    folder, message = spoilt
    model = peft_model(seed=3)
    before = adapter_tensors(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(folder, "default")
    after = adapter_tensors(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_bad_lora_beside_is_an_error_too(tmp_path):
    model = peft_model()
    model.add_adapter("lora", lora())
    model.save_pretrained(tmp_path, selected_adapters=["lora"])
    tensors = load_file(tmp_path / "lora" / FILE)
    tensors.pop("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
    save_file(tensors, tmp_path / "lora" / FILE)
    with pytest.raises(ValueError, match=r"missing model\.layers\.0\.mlp\.up_proj\.lora_A\.weight"):
        model.load_adapter(tmp_path / "lora", "other")
    assert list(model.peft_config) == ["default", "lora"]


def test_another_rank_than_the_configuration_says(base_folder, tmp_path):
    saved(base_folder, tmp_path)
    edit_json(tmp_path / "adapter_config.json", r=5)
    with pytest.raises(ValueError, match=r"lora_A has shape \(4, 32\), .* require \(5, 32\)"):
        PeftModel.from_pretrained(tiny_base(), tmp_path)
