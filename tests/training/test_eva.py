"""Ranks and first directions by EVA, against principal components computed apart, and what is saved with them."""

from __future__ import annotations

import json
import signal
from datetime import datetime

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_training import SHORT, inputs_of_linears
from training.killed_run import killed_run
from transformers import AutoModelForCausalLM

from minilora_hub import DoraForCausalLM
from minilora_hub.adapter_folder.folders import adapter_facts
from minilora_hub.bases.resolving import resolve_base
from minilora_hub.errors import TrainingError
from minilora_hub.training.dataset import prepare_data
from minilora_hub.training.eva import distribute
from minilora_hub.training.models import load_tokenizer
from minilora_hub.training.run import train
from minilora_hub.training.settings import make_settings

AUTO = {name: value for name, value in SHORT.items() if name != "r"} | {"r": "auto", "budget": 6500}


@pytest.fixture
def found(base, rows, tmp_path):
    """A distribution for a LoRA, and the rows and labels that it comes from."""
    settings = make_settings(AUTO | {"method": "lora", "base": base, "data": rows})
    resolved = resolve_base(base)
    tokenizer = load_tokenizer(resolved)
    data = prepare_data(settings, tokenizer, 256, tmp_path / "rows", ends=[256], now=datetime(2026, 1, 1))
    return distribute(settings, resolved, data.train, tokenizer.pad_token_id), data.train


def inputs_at_learned_tokens(base, rows):
    """The inputs of every linear of the layers, by path: [tokens, in]."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    seen = inputs_of_linears(model)
    learned = []
    for example in rows:
        model(torch.tensor([example.input_ids]))
        learned.append(torch.tensor(example.labels) != -100)
    return {path: torch.cat([x[kept] for x, kept in zip(held, learned, strict=True)]) for path, held in seen.items()}


def test_directions_are_the_principal_components_of_the_inputs(found, base):
    distribution, rows = found
    inputs = inputs_at_learned_tokens(base, rows)
    shares = {}
    for path, directions in distribution.directions.items():
        values = inputs[path].double().numpy()
        _, singular, components = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
        shares[path] = singular**2 / (singular**2).sum()
        a = directions.double().numpy()
        assert np.allclose(a @ a.T, np.eye(len(a)), atol=1e-4)
        # Components with nearly equal shares may mix: the subspace is compared, and the first where it stands out.
        explained = ((values - values.mean(axis=0)) @ a.T).var(axis=0).sum()
        best = shares[path][: len(a)].sum() * (values - values.mean(axis=0)).var(axis=0).sum()
        assert explained == pytest.approx(best, rel=0.05), path
        if shares[path][0] > 1.5 * shares[path][1]:
            assert abs(a[0] @ components[0]) > 0.95, path
    ranks = {path: len(a) for path, a in distribution.directions.items()}
    assert len(set(ranks.values())) > 1
    # More ranks where the components explain more: the last one taken beats the first one left out, up to a tie.
    last = min(shares[path][rank - 1] for path, rank in ranks.items())
    most = max(ranks.values())
    left = [shares[path][rank] for path, rank in ranks.items() if rank < most]
    assert last > 0.7 * max(left)


@pytest.mark.parametrize("method", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_what_is_saved_has_these_ranks(method, base, rows, tmp_path):
    """Within the budget, the same scaling everywhere, and the logits of W + s B A with the saved tensors."""
    out = tmp_path / "run"
    result = train(out, method=method, base=base, data=rows, progress=False, **AUTO)
    tensors = load_file(out / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == result.plan.trainable <= AUTO["budget"]
    assert "by EVA within 6,500 parameters" in result.plan.ranks
    ranks = {name: len(tensor) for name, tensor in tensors.items() if "lora_A" in name}
    assert len(set(ranks.values())) > 1
    config = json.loads((out / ("adapter_config.json" if method == "lora" else "config.json")).read_text())
    assert config["lora_alpha"] == 2 * config["r"]
    assert config["alpha_pattern"] == {name: 2 * rank for name, rank in config["rank_pattern"].items()}
    assert f"({min(config['rank_pattern'].values())} to {max(ranks.values())} where" in adapter_facts(out).detail
    ids = torch.arange(9)[None] + 40
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    if method == "dora":
        model = DoraForCausalLM.from_pretrained(out).eval()
        assert not torch.equal(model(ids).logits, plain(ids).logits)
        return
    folded = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        for name, a in tensors.items():
            if "lora_A" in name:
                path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                folded.get_submodule(path).weight += 2 * tensors[name.replace("lora_A", "lora_B")] @ a
    model = PeftModel.from_pretrained(plain, out).eval()
    torch.testing.assert_close(model(ids).logits, folded(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_killed_run_finds_the_same_ranks_again(base, rows, forked, tmp_path):
    """SIGKILL before the first checkpoint and after it."""
    weights = {}
    for where in ("step:1", "step:3", "never"):
        out = tmp_path / where.replace(":", "")
        said = AUTO | {"method": "lora", "base": base, "data": rows, "progress": False}
        status = forked.run(killed_run, where, str(out), said)
        assert status == (0 if where == "never" else -signal.SIGKILL), forked.said.read_text()[-2000:]
        if where != "never":
            assert not (out / "adapter_model.safetensors").exists()
            train(out, resume=True, progress=False, method="lora", r="auto", budget=AUTO["budget"])
        weights[where] = (out / "adapter_model.safetensors").read_bytes()
    assert len(set(weights.values())) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": None}, "r='auto': needs --budget"),
        ({"r": 4}, "budget=6500: needs --rank auto"),
        ({"method": "mixlora"}, "budget=6500: needs --method lora or dora"),
        ({"keep": ["x"]}, "budget=6500: needs --method lora or dora, without --from and --keep"),
        ({"lora_alpha": 3}, "lora_alpha=3: follows from --rank auto"),
        ({"budget": 0}, "budget=0: must be at least 1"),
    ],
)
def test_what_does_not_go_together(changes, words):
    with pytest.raises(TrainingError, match=words):
        make_settings(AUTO | {"method": "lora", "base": "base", "data": "rows"} | changes)


@pytest.mark.parametrize(
    ("budget", "words"), [(100, "rank 1 everywhere takes 2,048"), (900_000, "191 tokens with a loss, EVA needs")]
)
def test_budgets_that_cannot_be_met(budget, words, base, rows, tmp_path):
    with pytest.raises(TrainingError, match=words):
        train(tmp_path / "run", method="lora", base=base, data=rows, progress=False, **AUTO | {"budget": budget})
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
