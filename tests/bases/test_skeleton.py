"""The skeleton of a base: its structure without its weights."""

from itertools import pairwise

import torch

from minilora_hub.bases.skeleton import _make_blocks_real


def test_linears_of_one_shape_get_different_weights():
    """The form of a feed-forward block is found by calling it: equal gate and up could not be told apart."""
    with torch.device("meta"):
        block = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64, bias=False) for name in ("gate", "up", "down")})
    _make_blocks_real([torch.nn.ModuleList([block])])
    weights = [linear.weight for linear in block.values()]
    assert all(not torch.equal(one, other) for one, other in pairwise(weights))
    assert all(torch.linalg.matrix_rank(weight) == 64 for weight in weights)
