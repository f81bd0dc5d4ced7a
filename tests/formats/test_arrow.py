"""Arrow: LoRAs as experts whose router follows from their weights, against PEFT's implementation and the equations."""

from __future__ import annotations

import pytest
import torch
from formats.helpers import base_folder, peft_folder
from peft import ArrowConfig, create_arrow_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from safetensors.torch import load_file, save_file
from tiny import logits, mixtures, tiny_base, token_ids

from minilora_hub import MixLoraConfig, MixLoraForCausalLM
from minilora_hub.adapter_folder.folders import adapter_facts
from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.errors import AdapterError, TrainingError
from minilora_hub.formats.experts_from_loras import prototype
from minilora_hub.formats.exporting import export_adapter
from minilora_hub.formats.importing import import_as_experts
from minilora_hub.publish.push.build import build
from minilora_hub.remote_code.routing import load_balancing_loss
from minilora_hub.training.parent_adapter import complete_settings

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(base_folder(tmp_path_factory.mktemp("bases")))


def loras(folder, targets, count=3):
    """LoRAs with one dominant direction each, to which PEFT's power iteration converges."""
    folders = []
    for number in range(count):
        one = peft_folder(folder / f"lora{number}", tiny_base(), seed=number, target_modules=targets)
        tensors = load_file(one / WEIGHTS)
        for name, tensor in tensors.items():
            if "lora_B" in name:
                tensor[:, 0] *= 12
        save_file(tensors, one / WEIGHTS, metadata={"format": "pt"})
        folders.append(str(one))
    return folders


def made(folders, out, base, **settings):
    import_as_experts(folders, out, base=base, router="arrow", **settings)
    return MixLoraForCausalLM.from_pretrained(out).eval()


@pytest.mark.parametrize("projections", [1, 2])
def test_the_prototype_is_the_top_right_singular_vector(projections):
    generator = torch.Generator().manual_seed(projections)
    pairs = [
        (torch.randn(4, 32, generator=generator), torch.randn(48, 4, generator=generator)) for _ in range(projections)
    ]
    dense = torch.cat([b.double() @ a.double() for a, b in pairs])  # (48 of each, 32)
    expected = torch.linalg.svd(dense).Vh[0]
    found = prototype(pairs).double()
    found = found * torch.sign(found @ expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("active", "temperature"), [(2, 0.05), (3, 1.0)])
def test_a_whole_model_equals_pefts_arrow(active, temperature, base, tmp_path):
    """PEFT routes each linear. On up_proj alone, which the block is linear in, both compute the same."""
    folders = loras(tmp_path, ["up_proj"])
    model = made(folders, tmp_path / "out", base, num_experts_per_tok=active, temperature=temperature)
    config = ArrowConfig(top_k=active, router_temperature=temperature, rng_seed=1)
    theirs = create_arrow_model(tiny_base(), folders, config).eval()
    with torch.no_grad():
        expected, found = logits(theirs), logits(model)
        prototypes = [m.prototypes for m in theirs.modules() if isinstance(m, ArrowLoraLinearLayer)]
    assert len(prototypes) == len(mixtures(model)) == 2
    for ours, other in zip(mixtures(model), prototypes, strict=True):
        signs = torch.sign((ours.router * other).sum(-1, keepdim=True))
        torch.testing.assert_close(signs * ours.router, other, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found - logits(tiny_base())).abs().max() > 0.1
    weights = model(token_ids(), output_routing=True).routing_weights[0]
    assert weights.std() > 0.05  # the router decides something


@pytest.mark.parametrize(
    ("family", "inputs", "output"),
    [
        ("llama", ["gate_proj", "up_proj"], "down_proj"),
        ("phi3", ["gate_up_proj"], "down_proj"),
        ("phi", ["fc1"], "fc2"),
    ],
)
def test_every_form_of_a_block_is_routed_by_its_inputs(family, inputs, output, tmp_path):
    """A pair, a fused pair, a single projection: the router is the singular vector of the stacked dense updates."""
    folders = [
        peft_folder(tmp_path / f"lora{number}", tiny_base(family), seed=number, target_modules=[*inputs, output])
        for number in range(2)
    ]
    base = str(base_folder(tmp_path, family))
    import_as_experts([str(folder) for folder in folders], tmp_path / "out", base=base, router="arrow")
    tensors = load_file(folders[1] / WEIGHTS)
    names = sorted(name for name in tensors if ".layers.1." in name and "lora_A" in name and output not in name)
    assert len(names) == len(inputs)
    dense = torch.cat([tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double() for name in names])
    expected = torch.linalg.svd(dense).Vh[0]
    found = load_file(tmp_path / "out" / WEIGHTS)["layers.1.mlp.router"][1].double()
    torch.testing.assert_close(found * torch.sign(found @ expected), expected, rtol=0, atol=1e-5)


def test_the_bank_and_the_losses_see_the_similarities(base, tmp_path):
    """The recorded logits are what the softmax is applied to, so balance loss and entropy are Arrow's."""
    model = made(loras(tmp_path, ["gate_proj", "up_proj", "down_proj"]), tmp_path / "out", base, temperature=0.5)
    ids = token_ids()
    outputs = model(ids, output_router_logits=True, output_routing=True)
    seen = []
    handle = mixtures(model)[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(ids)
    handle.remove()
    expected = (seen[0].double() @ mixtures(model)[0].router.double().T).abs() / 0.5
    torch.testing.assert_close(outputs.router_logits[0].double(), expected, rtol=0, atol=1e-5)
    balance = load_balancing_loss(outputs.router_logits, 2)
    torch.testing.assert_close(outputs.aux_loss, balance)
    bank = AdapterBank(tiny_base())
    bank.load("arrow", tmp_path / "out")
    with torch.no_grad(), bank.use(["arrow"]), bank.rows([None, *["arrow"] * (len(ids) - 1)]):
        together = bank.model(ids).logits
    torch.testing.assert_close(together[1:], outputs.logits[1:], rtol=0, atol=1e-4)


def test_its_router_can_be_trained(base, tmp_path):
    model = made(loras(tmp_path, ["gate_proj", "up_proj"]), tmp_path / "out", base, temperature=0.5).train()
    model(token_ids(), labels=token_ids()).loss.backward()
    assert all(block.router.grad.abs().max() > 0 for block in mixtures(model))
    one = {"from_adapter": str(tmp_path / "out"), "learn": "router", "data": "rows.jsonl", "num_experts_per_tok": 1}
    with pytest.raises(TrainingError, match=r"num_experts_per_tok=1: with arrow routing .* is always 1"):
        complete_settings(one)


def test_it_is_published_like_any_mixture(base, tmp_path):
    """The folder has the code that computes it, and the card says how it routes."""
    made(loras(tmp_path, ["up_proj", "down_proj"]), tmp_path / "out", base, temperature=0.5)
    where = {"base_id": "org/base", "base_model": base}
    built = build(tmp_path / "out", tmp_path / "built", repo_id="me/arrow", **where)
    card = (built.folder / "README.md").read_text(encoding="utf-8")
    assert "| Routing | arrow |\n| Router temperature | 0.5 |" in card
    assert "ArrowRouting" in (built.folder / "routing.py").read_text(encoding="utf-8")
    assert adapter_facts(built.folder).detail.endswith("3 experts, 2 active")


def test_what_it_cannot_do_is_refused(base, tmp_path):
    with pytest.raises(AdapterError, match=r"no update of gate_proj or up_proj in layers\.0\.mlp.*choose router=fresh"):
        import_as_experts(loras(tmp_path / "down", ["down_proj"]), tmp_path / "out", base=base, router="arrow")
    made(loras(tmp_path, ["up_proj"]), tmp_path / "out", base)
    for to, message in (("mixlora", "the reference has"), ("peft", "MIXLORA in PEFT has"), ("mixtral", "these arch")):
        with pytest.raises(AdapterError, match=rf"routing_strategy='arrow': {message}"):
            export_adapter(tmp_path / "out", tmp_path / to, to)
        assert not (tmp_path / to).exists()
    with pytest.raises(ValueError, match=r"router_temperature=0: must be above 0"):
        MixLoraConfig(routing_strategy="arrow", router_temperature=0)
    with pytest.raises(ValueError, match=r"router_temperature=2: only routing_strategy \"top_p\" and \"arrow\" has it"):
        MixLoraConfig(router_temperature=2)
    with pytest.raises(AdapterError, match=r"router='hard': must be one of fresh, arrow"):
        import_as_experts(loras(tmp_path / "more", ["up_proj"]), tmp_path / "o", base=base, router="hard")
