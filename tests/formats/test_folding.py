"""An adapter folded into its base's checkpoint tensor by tensor, against the exports that hold the whole model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_base, tiny_model

from minilora_hub.errors import AdapterError
from minilora_hub.formats.folding import Folding, adapted_weight
from minilora_hub.formats.moe import export_moe
from minilora_hub.formats.moe_architectures import ARCHITECTURES
from minilora_hub.remote_code.base_structure import plan_sites


def checkpoint_of(folder):
    """Every tensor in a folder's shards."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def folded(model, family, tmp_path, architecture=None, without=()):
    """The tensors of the family's tiny base with an adapter in them, read from its checkpoint."""
    base = tiny_base(family)
    base.save_pretrained(tmp_path / "base")
    tensors = {name: parameter.detach() for name, parameter in model.adapter_parameters().items()}
    folding = Folding(model.config, tensors, plan_sites(base, model.config), torch.float32, architecture)
    checkpoint = checkpoint_of(tmp_path / "base")
    return dict(folding.fold((name, tensor) for name, tensor in checkpoint.items() if name not in without))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_a_dora_equals_the_merged_model(tmp_path, family):
    model = tiny_model(family, "dora")
    found = folded(model, family, tmp_path)
    model.merge().save_pretrained(tmp_path / "merged")
    expected = checkpoint_of(tmp_path / "merged")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_mixture_equals_the_export(tmp_path, family, method):
    model = tiny_model(family, method)
    found = folded(model, family, tmp_path, ARCHITECTURES[family])
    export_moe(model, tmp_path / "moe")
    expected = checkpoint_of(tmp_path / "moe")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_experts_on_some_projections(tmp_path):
    model = tiny_model("llama", "mixlora", target_modules=["q_proj", "mlp.up_proj"])
    found = folded(model, "llama", tmp_path, ARCHITECTURES["llama"])
    export_moe(model, tmp_path / "moe")
    expected = checkpoint_of(tmp_path / "moe")
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in expected.items())


def test_a_missing_weight_is_named(tmp_path):
    with pytest.raises(
        AdapterError, match=r"no model\.layers\.1\.self_attn\.q_proj\.weight, which the adapter changes"
    ):
        folded(tiny_model("llama"), "llama", tmp_path, without=("model.layers.1.self_attn.q_proj.weight",))


def test_a_row_of_zeros_is_no_division_by_zero():
    weight, zeros = torch.zeros(3, 4), (torch.zeros(2, 4), torch.zeros(3, 2))
    assert torch.equal(adapted_weight(weight, *zeros, 1.0, torch.ones(3)), weight)
