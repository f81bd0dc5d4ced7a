"""Settings of a row are checked by name, and what passes the check can be computed."""

import re

import pytest
import torch

from minilora_hub.compare.sampling import Sampling, TokenPicker


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"top_k": 2**63}, f"top_k={2**63}: must be an integer from 0 to 2**63 - 1 (0 keeps all tokens)"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty=1e-40: must be a number from 0.01 to 10"),
        ({"repetition_penalty": 10.5}, "repetition_penalty=10.5: must be a number from 0.01 to 10"),
        ({"temperature": True}, "temperature=True: must be a number of at least 0"),
        ({"temperature": float("nan")}, "temperature=nan: must be a number of at least 0"),
        ({"temperature": "0.5"}, "temperature='0.5': must be a number of at least 0"),
        ({"stop": ("end", "")}, "stop='': must be a text that is not empty"),
        ({"stop": ["end"]}, "stop=['end']: must be a tuple of texts"),
    ],
)
def test_a_wrong_setting_is_named(said, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampling(**said)


@pytest.mark.parametrize("said", [{"repetition_penalty": 0.01}, {"repetition_penalty": 10}, {"top_k": 2**63 - 1}])
@pytest.mark.parametrize("temperature", [0, 1e-5, 2.0])
def test_the_ends_of_the_ranges_give_a_token(said, temperature):
    picker = TokenPicker(Sampling(temperature=temperature, **said))
    logits = torch.tensor([[-80.0, 3.0, 60.0, 0.0]])
    assert picker(torch.tensor([[0, 2]]), logits) in range(4)
