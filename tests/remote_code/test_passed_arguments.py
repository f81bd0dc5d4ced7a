"""What is passed to `from_pretrained` on top of an adapter's configuration is checked as the configuration is."""

import re

import pytest
import torch
from tiny import CAUSAL_LM, fill_adapter, logits, tiny_base, tiny_config
from transformers import AutoModelForCausalLM

from minilora_hub import register


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter of each kind, and their base."""
    register()
    folder = tmp_path_factory.mktemp("adapters")
    tiny_base().save_pretrained(folder / "base")
    for method in ("dora", "mixlora"):
        model = CAUSAL_LM[method].from_base(str(folder / "base"), tiny_config(method))
        fill_adapter(model)
        model.save_pretrained(folder / method)
    return folder


@pytest.mark.parametrize(
    ("method", "said", "message"),
    [
        ("dora", {"lora_alpha": -1}, "lora_alpha=-1: must be a number above 0"),
        ("mixlora", {"lora_alpha": float("nan")}, "lora_alpha=nan: must be a number above 0"),
        ("dora", {"lora_alpha": "8"}, "lora_alpha='8': must be a number above 0"),
        ("dora", {"r": "x"}, "r='x': the rank must be an integer"),
        ("dora", {"format_version": 9}, "format_version=9: this code reads format versions 1 to 4"),
        ("dora", {"use_dora": "no"}, "use_dora='no': must be True or False"),
        ("dora", {"target_modules": "q_proj"}, "target_modules='q_proj': must be"),
        ("mixlora", {"router_aux_loss_coef": -1}, "router_aux_loss_coef=-1: must be a number of at least 0"),
        ("mixlora", {"router_temperature": 0.5}, "router_temperature=0.5: only routing_strategy"),
        ("mixlora", {"num_experts_per_tok": 0}, "num_experts_per_tok=0: must be an integer from 1"),
        ("mixlora", {"num_experts_per_tok": 99}, "num_experts_per_tok=99: must be an integer from 1"),
        ("mixlora", {"routing_strategy": "foo"}, "routing_strategy='foo': this version of the code knows"),
        ("dora", {"state_dict": {}}, "state_dict: an adapter has the weights of its file"),
        ("dora", {"dtype": torch.int8}, "dtype=torch.int8: must be"),
        ("dora", {"dtype": 32}, "dtype=32: must be"),
    ],
)
def test_a_wrong_value_is_named(method, said, message, folders):
    with pytest.raises(ValueError, match=re.escape(message)):
        AutoModelForCausalLM.from_pretrained(folders / method, **said)


def test_a_right_value_has_its_effect(folders):
    """Twice the alpha is twice the update: the same as B times two."""
    doubled = AutoModelForCausalLM.from_pretrained(folders / "mixlora", lora_alpha=4 * tiny_config("mixlora").r)
    plain = AutoModelForCausalLM.from_pretrained(folders / "mixlora")
    assert doubled.config.lora_alpha == 2 * plain.config.lora_alpha
    with torch.no_grad():
        for name, parameter in plain.adapter_parameters().items():
            if name.endswith("lora_B"):
                parameter *= 2
    torch.testing.assert_close(logits(doubled), logits(plain), rtol=0, atol=1e-5)
