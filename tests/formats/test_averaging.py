"""The mean of adapters compared with NumPy: whole matrices, a full SVD, experts one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minilora_hub.errors import AdapterError
from minilora_hub.formats.averaging import mean_of_adapters

RANK, SHAPES = 3, {"layers.0.self_attn.q_proj": (12, 10), "layers.0.mlp.experts.up_proj": (7, 10)}
PLAIN = {
    "layers.0.self_attn.q_proj.magnitude": (12,),
    "layers.0.mlp.router": (4, 10),
    "base_model.model.score.modules_to_save.weight": (5, 10),
}
WEIGHTS = (5, 1, 2)


def adapter(seed: int) -> dict[str, torch.Tensor]:
    """A DoRA's linear, a mixture of four experts and its router, and a whole module."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in PLAIN.items()}
    for name, (rows, columns) in SHAPES.items():
        stack = (4,) if "experts" in name else ()
        tensors[f"{name}.lora_A"] = torch.randn(*stack, RANK, columns, generator=generator)
        tensors[f"{name}.lora_B"] = torch.randn(*stack, rows, RANK, generator=generator)
    return tensors


def numpy_mean(adapters, weights, name):
    """The mean of one update over the adapters, [experts or 1, out, in]."""
    products = [one[f"{name}.lora_B"].double().numpy() @ one[f"{name}.lora_A"].double().numpy() for one in adapters]
    mean = np.average(products, axis=0, weights=weights)
    return mean.reshape(-1, *mean.shape[-2:])


def test_the_mean_is_numpys_elementwise():
    adapters = [adapter(seed) for seed in range(3)]
    means, residual = mean_of_adapters(adapters, WEIGHTS)
    assert {name: tensor.shape for name, tensor in means.items()} == {n: t.shape for n, t in adapters[0].items()}
    lost = whole = 0.0
    for name in SHAPES:
        exact = numpy_mean(adapters, WEIGHTS, name)
        product = (means[f"{name}.lora_B"].double() @ means[f"{name}.lora_A"].double()).numpy()
        for matrix, ours in zip(exact, product.reshape(exact.shape), strict=True):
            u, s, vh = np.linalg.svd(matrix)
            np.testing.assert_allclose(ours, (u[:, :RANK] * s[:RANK]) @ vh[:RANK], rtol=0, atol=1e-5)
            lost, whole = lost + (s[RANK:] ** 2).sum(), whole + (matrix**2).sum()
        factors = (
            np.average([one[f"{name}.lora_{half}"] for one in adapters], axis=0, weights=WEIGHTS) for half in "BA"
        )
        assert np.abs(np.matmul(*factors).reshape(exact.shape) - exact).max() > 0.5  # what FedAvg would give
    assert residual == pytest.approx(np.sqrt(lost / whole), rel=1e-9)
    assert 0.1 < residual < 1
    for name in PLAIN:
        expected = np.average([one[name].numpy() for one in adapters], axis=0, weights=WEIGHTS)
        np.testing.assert_allclose(means[name].numpy(), expected, rtol=0, atol=1e-6)


def test_a_mean_that_has_the_rank_is_exact():
    """Three adapters whose updates share their rows' space: nothing is lost."""
    adapters = [adapter(seed) for seed in range(3)]
    for name in SHAPES:
        mix = torch.randn(3, RANK, RANK, generator=torch.Generator().manual_seed(9))
        for one, square in zip(adapters, mix, strict=True):
            one[f"{name}.lora_A"] = square @ adapters[0][f"{name}.lora_A"]
    means, residual = mean_of_adapters(adapters, WEIGHTS)
    assert residual < 1e-6
    for name in SHAPES:
        exact = numpy_mean(adapters, WEIGHTS, name)
        product = (means[f"{name}.lora_B"] @ means[f"{name}.lora_A"]).numpy()
        np.testing.assert_allclose(product.reshape(exact.shape), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3])
def test_equal_adapters_stay_as_they_are(count):
    means, residual = mean_of_adapters([adapter(0)] * count, (1, 2, 3)[:count])
    assert residual == 0
    for name, tensor in adapter(0).items():
        torch.testing.assert_close(means[name], tensor, rtol=0, atol=0 if "lora" in name else 1e-6)


def test_what_is_zero_can_still_learn():
    """Fresh adapters have B = 0: A keeps rows of length 1, and a rank above the matrix's is filled with zeros."""
    adapters = [adapter(seed) for seed in range(2)]
    wide = {"x.lora_A": torch.randn(6, 4), "x.lora_B": torch.randn(5, 6)}
    for one in adapters:
        one |= {name: torch.zeros_like(tensor) for name, tensor in one.items() if "lora_B" in name} | wide
    adapters[1]["x.lora_A"] = -wide["x.lora_A"]
    means, residual = mean_of_adapters(adapters, (1, 3))
    assert residual < 1e-6
    for name in SHAPES:
        assert not means[f"{name}.lora_B"].any()
        torch.testing.assert_close(means[f"{name}.lora_A"].norm(dim=-1).min(), torch.tensor(1.0))
    assert (means["x.lora_A"].shape, means["x.lora_B"].shape) == ((6, 4), (5, 6))
    expected = -0.5 * wide["x.lora_B"] @ wide["x.lora_A"]
    torch.testing.assert_close(means["x.lora_B"] @ means["x.lora_A"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "weights", "message"),
    [
        ({}, (1, 0), r"weights=\[1, 0\]: must be one number above 0"),
        ({}, (1, float("nan")), "must be one number above 0"),
        ({}, (1,), "for each of 2 adapters"),
        ({"more": torch.zeros(1)}, (1, 1), "adapter 1: more is not in all"),
        ({"layers.0.mlp.router": torch.zeros(3, 10)}, (1, 1), r"router has shape \(3, 10\), that of the first has \(4"),
        ({"layers.0.mlp.router": torch.full((4, 10), torch.nan)}, (1, 1), "adapter 1: .*router holds values that are"),
    ],
)
def test_what_cannot_be_averaged_is_named(change, weights, message):
    with pytest.raises(AdapterError, match=message):
        mean_of_adapters([adapter(0), adapter(1) | change], weights)
