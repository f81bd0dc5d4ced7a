"""The fits of low-bit starts, on a tiny base, against what each of them minimises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evidence import low_bit_fits
from tiny_training import write_base

from minilora_hub.evaluation.tasks.registry import write

pytest.importorskip("torchao")
FIRST, LAST = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.mark.slow
def test_each_fit_is_the_best_of_its_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(low_bit_fits, "TOKENS", 512)
    write(tmp_path / "data", (low_bit_fits.TASK,), ("train",), 16)
    fits = low_bit_fits.Fits(tmp_path, str(write_base(tmp_path / "base")), rank=2)
    models = {fit: fits.fitted(fit) for fit in low_bit_fits.FITS}
    exact = fits.exact.get_submodule(FIRST).weight.detach().double().numpy()
    rounded = fits.rounded[FIRST].numpy()
    inputs, outputs = {}, {}
    for fit, model in {"exact": fits.exact, **models}.items():
        with torch.no_grad(), low_bit_fits._inputs(model, [FIRST, LAST]) as found:
            hidden = [model.model(row, use_cache=False).last_hidden_state for row in fits.rows]
        inputs[fit], outputs[fit] = torch.cat(found[FIRST]).double().numpy(), torch.cat(hidden, 1)

    root = np.sqrt((inputs["exact"] ** 2).mean(0))
    left = np.linalg.svd((exact - rounded) * root)[0][:, :2]
    update = models["diagonal"].get_submodule(FIRST).weight.detach().double().numpy() - rounded
    np.testing.assert_allclose(update, left @ left.T @ (exact - rounded), atol=1e-5)

    def error(fit: str) -> float:  # of the first linear's outputs, whose inputs are the same in all
        fitted = models[fit].get_submodule(FIRST).weight.detach().double().numpy()
        return float((((exact - fitted) @ inputs["exact"].T) ** 2).mean())

    assert error("whole") < error("diagonal") < float((((exact - rounded) @ inputs["exact"].T) ** 2).mean())
    assert error("in turn") == pytest.approx(error("whole"), rel=1e-3)
    # Of the whole model, too: what is fitted in turn makes up for what came before it.
    whole = {fit: float((outputs[fit] - outputs["exact"]).square().mean()) for fit in models}
    assert whole["in turn"] < whole["whole"] < whole["diagonal"]
